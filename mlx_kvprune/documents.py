"""Ask questions about documents: read, prefill, probe, answer."""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvprune.attach import attachment_of, make_from_settings
from mlx_kvprune.context import placed
from mlx_kvprune.policy import knows_question, policy_for
from mlx_kvprune.report import CacheReport, report
from mlx_kvprune.settings import CacheSettings

HERE = "\x00document\x00"
BEFORE = "Read the document and answer the question.\n"
AFTER = "\n\nAccording to the document, answer this question in a few words: {question}"
ONE = BEFORE + "Question: {question}\n\nDocument:\n" + HERE + AFTER
MANY = BEFORE + "\nDocument:\n" + HERE + AFTER

Progress = Callable[[int, int, list[Any]], None]


def read(path: str | Path) -> str:
    """The text of a file: plain text, Markdown or PDF (extra ``pdf``); ``-`` reads standard input.

    Raises:
        ValueError: missing, binary, empty, or a PDF without text.
    """
    if str(path) == "-":
        data, name = sys.stdin.buffer.read(), "standard input"
    else:
        data, name = _bytes_of(Path(path)), str(path)
    text = _pdf_text(data, name) if data[:5] == b"%PDF-" else _plain_text(data, name)
    if not text.strip():
        raise ValueError(f"[ask] no text in {name}; got {len(data)} bytes; try another file")
    return text.strip()


def _bytes_of(path: Path) -> bytes:
    if os.path.isdir(path):
        raise ValueError(f"[ask] {path} is a folder; got no file; try {path}/*.txt")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"[ask] cannot read {path}; got {error.strerror}; try the path of a text or PDF file"
        ) from None


def _plain_text(data: bytes, name: str) -> str:
    try:
        if b"\x00" in data[:8192] and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            raise UnicodeError
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeError:
        raise ValueError(f"[ask] {name} is not text; got binary data; try a .txt, .md or .pdf file in UTF-8") from None
    return text.replace("\r\n", "\n")


def _pdf_text(data: bytes, name: str) -> str:
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports damage on its own account
    try:
        from pypdf import PdfReader
    except ImportError:
        raise ValueError(f"[ask] {name} is a PDF; got no PDF reader; try pip install pypdf") from None
    locked = False
    try:
        reader = PdfReader(io.BytesIO(data))
        locked = reader.is_encrypted
        pages = [page.extract_text() or "" for page in reader.pages]
    except Exception as error:  # pypdf raises many types on damaged files
        if locked:
            raise ValueError(f"[ask] {name} asks for a password; got {error}; try a copy without one") from None
        raise ValueError(f"[ask] {name} is a damaged PDF; got {error}; try to print it to PDF again") from None
    return "\n\n".join(pages).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation about a document: what comes before it, the document, what comes after it."""

    before: list[int]
    document: list[int]
    after: list[int]

    @property
    def n_tokens(self) -> int:
        return len(self.before) + len(self.document) + len(self.after)


def prompt_for(tokenizer: Any, document: str, question: str, *, pinned: bool) -> Prompt:
    """The prompt of one question; ``pinned`` puts the question before the document as well as after it."""
    content = (ONE if pinned else MANY).format(question=question.strip())
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        special = False
    else:
        text, special = content + "\nAnswer:", True
    before, after = text.split(HERE)
    encode = lambda x, first=False: list(tokenizer.encode(x, add_special_tokens=special and first))
    return Prompt(encode(before, True), encode(document), encode(after))


def settings_for(settings: CacheSettings, prompt: Prompt) -> CacheSettings:
    """Pin what stands before the document; let the question probe where the policy does. A block that nobody asked for is
    chosen anew, for what is pinned takes its room."""
    n_sink = max(settings.n_sink, len(prompt.before))
    question = tuple(prompt.after) if knows_question(settings.policy) else ()
    left_open = settings.but(block=None)
    if policy_for(left_open)[1].block == settings.block:
        settings = left_open
    return policy_for(settings.but(n_sink=n_sink, question=question))[1]


def settings_to_read(
    model: nn.Module, settings: CacheSettings, prompt: Prompt, max_tokens: int, where: str, spare: int = 0
) -> CacheSettings:
    """``settings_for`` with positions decided, for a document of this length.

    Args:
        max_tokens: the longest answer.
        where: names the verb in an error.
        spare: tokens that another question is longer.

    Raises:
        ValueError: the text is too long, or the budget has no room for what stands before it.
    """
    chosen = settings_for(placed(model, settings, prompt.n_tokens + spare, max_tokens, where), prompt)
    if chosen.budget.tokens is not None and settings.policy != "full" and chosen.budget.tokens < chosen.smallest_budget:
        raise ValueError(
            f"[{where}] the budget has no room for the {chosen.n_sink} tokens before the text, which are pinned, beside a "
            f"ring of {chosen.ring_size}; got {chosen.budget.tokens}; try {chosen.smallest_budget} or more, better "
            f"{100 * -(-(chosen.smallest_budget + 200) // 100)}"
        )
    return chosen


def prefill(
    model: nn.Module, tokens: list[int], cache: list[Any], *, step: int = 512, progress: Progress | None = None
) -> None:
    """Run ``tokens`` through the model for the sake of its cache.

    Args:
        step: tokens per call.
        progress: called as ``progress(done, total, cache)`` after each call.
    """
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        model(mx.array(chunk)[None], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        if progress:
            progress(start + len(chunk), len(tokens), cache)


@dataclass
class Reading:
    """A document that lies in a cache and can be asked.

    Attributes:
        prompt: of the first question.
        cache: holds everything up to the end of the document.
        seconds: that reading took.
        positions: which tokens were read, in order, where it is an excerpt of a longer text; else empty.
    """

    prompt: Prompt
    cache: list[Any]
    seconds: float
    positions: list[int] = field(default_factory=list)

    def report(self, cache: list[Any]) -> CacheReport:
        """Of a cache that answers: this one, or a copy of it."""
        return report(cache)


def read_into_cache(
    model: nn.Module,
    tokenizer: Any,
    document: str,
    question: str,
    settings: CacheSettings,
    *,
    pinned: bool,
    step: int = 512,
    max_tokens: int = 0,
    spare: int = 0,
    progress: Progress | None = None,
) -> Reading:
    """Read a document into a bounded cache (the model must be attached).

    Args:
        question: the one question, which is pinned and probes; or the first of several with ``pinned=False``.
        spare: tokens that the longest of several is longer.
    """
    assert attachment_of(model) is not None
    prompt = prompt_for(tokenizer, document, question, pinned=pinned)
    cache = make_from_settings(model, settings_to_read(model, settings, prompt, max_tokens, "ask", spare))
    start = time.perf_counter()
    prefill(model, prompt.before + prompt.document, cache, step=step, progress=progress)
    return Reading(prompt, cache, time.perf_counter() - start)


def answer(
    model: nn.Module, tokenizer: Any, reading: Reading, question: str | None = None, **generation: Any
) -> Iterator[Any]:
    """Stream mlx-lm's responses to a question about what was read.

    Args:
        question: another question than the one read with; it is asked of a copy, so that others can follow.
        generation: passed on to ``mlx_lm.stream_generate`` (``max_tokens``, ``sampler`` ...).
    """
    from mlx_lm import stream_generate

    prompt, cache = reading.prompt.after, reading.cache
    if question is not None:
        prompt, cache = prompt_for(tokenizer, "", question, pinned=False).after, copy.deepcopy(cache)
    return stream_generate(model, tokenizer, prompt, prompt_cache=cache, **generation)
