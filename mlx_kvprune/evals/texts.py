"""Where texts come from: the user's own files, or the document that the repository ships."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_kvprune.places import expand

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'\u201d\u2019])\s+|(?<=[\u3002\uff01\uff1f])|\n\s*\n")
SUFFIXES = (".txt", ".md", ".jsonl")
TEXT_FIELDS = ("context", "text", "document", "passage", "prompt", "content", "input")
# LongBench asks in ``input`` about ``context``; in BABILong ``input`` is the text, in RULER too: its last line asks;
# L-Eval asks in ``instructions``, several questions of a text, and is not read for them
QUESTION_FIELDS = ("question", "query", "input")
ANSWER_FIELDS = ("answers", "answer", "outputs", "target", "output")  # RULER has ``outputs``
FEWEST = 64  # tokens that a text must have
RULER_QA = "Answer the question based on the given documents"  # there ``outputs`` are one answer in several ways
CHARS_PER_TOKEN = 8  # more than natural text has: how much is tokenized at first


@dataclass(frozen=True)
class Document:
    """A text, its name, and a question about it with its possible answers if the data have one; ``every``: all are wanted."""

    text: str
    name: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    every: bool = False


def documents(path: str | Path | None = None) -> list[str]:
    """The texts of one file, as ``loaded`` reads it."""
    return [document.text for document in loaded([] if path is None else [path])]


def loaded(paths: Sequence[str | Path] = ()) -> list[Document]:
    """The documents of files: ``.txt`` and ``.md`` hold one, ``.jsonl`` one a line (see ``TEXT_FIELDS``); also ``.gz``.

    Args:
        paths: the files; none for the document that the repository ships.

    Raises:
        ValueError: no such file, another kind of file, or no text in it.
    """
    return [document for path in (paths or [shipped()]) for document in _of_file(expand(path))]


def _of_file(path: Path) -> list[Document]:
    name = path.name.removesuffix(".gz")
    if Path(name).suffix not in SUFFIXES:
        raise ValueError(f"[data] not a known kind of text; got {path.name!r}; try {', '.join(SUFFIXES)} (or .gz)")
    text = content(path)
    found = _lines(path, text) if name.endswith(".jsonl") else [Document(text, Path(name).stem)]
    found = [document for document in found if document.text.strip()]
    if not found:
        raise ValueError(f"[data] no text in it; got {path}; try a file with some pages of text")
    return found


def shipped() -> Path:
    """The public-domain document of ``examples/documents/``, which a checkout has and an installed wheel has not.

    Raises:
        ValueError: this is not a checkout.
    """
    folder = Path(__file__).parents[2] / "examples" / "documents"
    found = sorted(folder.glob("*.txt"))
    if not found:
        raise ValueError(
            "[data] the example document comes with the source checkout only; got none; try --data FILE "
            "(.txt, .md, or .jsonl with a field text)"
        )
    return found[0]


def content(path: Path) -> str:
    """What a text file says, unpacked if it is a ``.gz``.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"[data] cannot read {path}; got {problem}; try another --data") from error


def _lines(path: Path, text: str) -> list[Document]:
    return [_document(path, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _document(path: Path, number: int, line: str) -> Document:
    """A line's document, whatever benchmark it is from."""
    try:
        fields = json.loads(line)
        texts = [name for name in TEXT_FIELDS if isinstance(fields.get(name), str)]
        where = next((name for name in texts if fields[name].strip()), texts[0])
        fields[where].encode()  # half a pair of surrogates is no text
    except (ValueError, AttributeError, IndexError):
        raise ValueError(
            f"[data] no JSON object with a text in {', '.join(TEXT_FIELDS)}; got line {number} of {path}; try one a line"
        ) from None
    questions = [name for name in QUESTION_FIELDS if name != where and _says(fields.get(name))]
    asked = next((fields[name] for name in questions), "")
    answers = next((found for name in ANSWER_FIELDS if (found := _answers(fields.get(name)))), ())
    text, ruler = fields[where], "outputs" in fields and "instructions" not in fields
    if where == "input" and ruler and not asked:
        text, asked = _last_line(text)
    name = Path(path.name.removesuffix(".gz")).stem
    return Document(text, name, asked, answers, every=ruler and not text.lstrip().startswith(RULER_QA))


def _says(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _last_line(text: str) -> tuple[str, str]:
    """What stands before the question, and the question: the last line, with the one before if it only opens the answer."""
    lines = [line for line in text.split("\n") if line.strip()]
    count = 2 if len(lines) > 2 and len(lines[-1].split()) < 4 and lines[-1].rstrip().endswith(":") else 1
    return ("\n".join(lines[:-count]), " ".join(lines[-count:])) if len(lines) > count else (text, "")


def _answers(given: Any) -> tuple[str, ...]:
    """Answers as the benchmarks write them: a text or number, a list of such, SQuAD's ``{"text": [...]}``, a list of
    ``{"text": ...}``, or TriviaQA's ``{"value": ..., "aliases": [...]}``.
    """
    if isinstance(given, dict):
        return _answers([given.get("value"), given.get("text"), given.get("aliases")])
    if isinstance(given, list | tuple):
        return tuple(dict.fromkeys(answer for x in given for answer in _answers(x)))
    return (said,) if isinstance(given, str | int | float) and (said := str(given).strip()) else ()


def excerpt(tokenizer: Any, texts: Sequence[str], n: int) -> list[int]:
    """The first ``n`` tokens of the first text that has as many.

    Raises:
        ValueError: none has.
    """
    return excerpts(tokenizer, texts, n, 1)[0]


def excerpts(tokenizer: Any, texts: Sequence[str], n: int, count: int, seed: int = 0) -> list[list[int]]:
    """``count`` excerpts of ``n`` tokens: the first of every text, then the second of every text, and so on.

    Another seed takes the next ``count``, and begins again where texts end.

    Raises:
        ValueError: there are not as many.
    """
    tokens = [_start(tokenizer, text, n * count * (seed + 1)) for text in texts]
    longest = max(map(len, tokens), default=0)
    found = [
        one[start : start + n] for start in range(0, longest - n + 1, n) for one in tokens if len(one) >= start + n
    ]
    if len(found) >= count:
        first = seed * count
        return [found[(first + i) % len(found)] for i in range(count)]
    if not found:
        raise ValueError(f"[data] no text of {n} tokens; got {longest} at most; try {_shorter(longest)}a longer --data")
    raise ValueError(
        f"[data] no {count} texts of {n} tokens; got {len(found)}; try --texts {len(found)}, or more --data"
    )


def _shorter(longest: int) -> str:
    return f"--tokens or --haystack {longest}, or " if longest >= FEWEST else ""


def _start(tokenizer: Any, text: str, n: int) -> list[int]:
    """The first ``n`` tokens of a text, perhaps with some more; all if it has fewer."""
    chars = CHARS_PER_TOKEN * n
    while len(found := list(tokenizer.encode(text[:chars]))) < n and chars < len(text):
        chars *= 2
    return found


def sentences(texts: Sequence[str], most_chars: int) -> list[str]:
    """Sentences of the texts in their order, white space made single, up to ``most_chars`` characters in all."""
    found, total = [], 0
    for text in texts:
        for sentence in SENTENCE_END.split(text):
            sentence = " ".join(sentence.split())
            if total >= most_chars:
                return found
            if sentence:
                found.append(sentence)
                total += len(sentence)
    return found
