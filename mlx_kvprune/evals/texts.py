"""Where texts come from: the user's own files, or the document that the repository ships."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'\u201d\u2019])\s+|\n\s*\n")
SUFFIXES = (".txt", ".md", ".jsonl")
CHARS_PER_TOKEN = 8  # more than natural text has: how much is cut off before it is tokenized


def documents(path: str | Path | None = None) -> list[str]:
    """The texts of a file: ``.txt`` and ``.md`` hold one, ``.jsonl`` one a line in its field ``text``; also ``.gz``.

    Args:
        path: the file; None for the document that the repository ships.

    Raises:
        ValueError: no such file, another kind of file, or no text in it.
    """
    path = shipped() if path is None else Path(path).expanduser()
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in SUFFIXES:
        raise ValueError(f"[data] not a known kind of text; got {path.name!r}; try {', '.join(SUFFIXES)} (or .gz)")
    content = _read(path)
    found = _lines(path, content) if kind == ".jsonl" else [content]
    found = [text for text in found if text.strip()]
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


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"[data] cannot read {path}; got {problem}; try another --data") from error


def _lines(path: Path, content: str) -> list[str]:
    return [_text_of(path, i, line) for i, line in enumerate(content.splitlines(), 1) if line.strip()]


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"[data] no JSON object with a field text; got line {number} of {path}; try one a line")
    return text


def excerpt(tokenizer: Any, texts: Sequence[str], n: int) -> list[int]:
    """The first ``n`` tokens of the first text that has as many.

    Raises:
        ValueError: none has.
    """
    longest = 0
    for text in texts:
        tokens = tokenizer.encode(text[: CHARS_PER_TOKEN * n])
        if len(tokens) >= n:
            return list(tokens[:n])
        longest = max(longest, len(tokens))
    raise ValueError(f"[data] no text of {n} tokens; got {longest} at most; try --tokens {longest}, or a longer --data")


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
