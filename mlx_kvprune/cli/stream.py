"""One answer through mlx-lm's ``stream_generate`` into given caches: text as it comes, and the numbers."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from mlx_kvprune.cli.options import SamplingOptions
from mlx_kvprune.cli.output import capacity, slots_held
from mlx_kvprune.progress import Bar

PATIENCE = 3  # Ctrl-C pressed this often means now


@dataclass
class Run:
    """What came of a prompt.

    Attributes:
        prompt_tokens: that were prefilled.
        prefilled: of them, those that are in the cache.
        tokens: generated; all of them are in the cache.
        text: of the answer.
        finish_reason: ``stop``, ``length`` or ``interrupt``.
        ttft_s: seconds to the first token.
        decode_s: seconds from the first token to the last.
    """

    prompt_tokens: int
    prefilled: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "interrupt"
    ttft_s: float | None = None
    decode_s: float = 0.0

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens)

    @property
    def prefill_tps(self) -> float | None:
        """Prompt tokens per second, the first new token included in the time."""
        return self.prompt_tokens / self.ttft_s if self.ttft_s else None

    @property
    def decode_tps(self) -> float | None:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s > 0 and len(self.tokens) > 1 else None


class Interrupted(Exception):
    """The user pressed Ctrl-C while a prompt was read."""


class Stop:
    """While this is entered, Ctrl-C only raises a flag: a forward pass is never cut in two."""

    def __init__(self) -> None:
        self.presses = 0

    def __bool__(self) -> bool:
        return self.presses > 0

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.presses += 1
        if self.presses >= PATIENCE:
            raise KeyboardInterrupt


class Prefilling:
    """mlx-lm's progress callback: a bar with the speed and how full the cache is, after two seconds."""

    def __init__(self, run: Run, cache: list[Any], stop: Stop | None):
        self.run, self.cache, self.stop = run, cache, stop
        self.bar, self.began = Bar(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self.run.prefilled = done
        if done >= total:  # the first token is in the cache as well: too late to stop here
            return
        speed = done / max(1e-6, time.monotonic() - self.began)
        self.bar(f"reading, {speed:.0f} tok/s{fill_of(self.cache)}", done, total)
        if self.stop:
            raise Interrupted


def fill_of(cache: list[Any]) -> str:
    """How full the caches are, for a progress bar."""
    cap = capacity(cache)
    return "" if cap is None else f", cache {slots_held(cache):,} of {cap:,} slots"


def stream(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    cache: list[Any],
    sampling: SamplingOptions,
    write: Callable[[str], None],
    sampler: Callable[[Any], Any] | None = None,
    max_tokens: int | None = None,
    stop: Stop | None = None,
) -> Run:
    """Prefill ``prompt`` into ``cache`` and generate.

    mlx-lm feeds a token before it hands it out: when this returns, the cache holds what it held before, the first
    ``run.prefilled`` tokens of the prompt and ``run.tokens``; in every layer.

    Args:
        write: takes the text as it comes.
        stop: true when the user wants no more.
    """
    from mlx_lm import stream_generate

    run = Run(len(prompt))
    progress = Prefilling(run, cache, stop)
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens or sampling.max_tokens,
        sampler=sampler or sampling.sampler(),
        prompt_cache=cache,
        prefill_step_size=sampling.prefill_step_size,
        prompt_progress_callback=progress,
    )
    began = time.perf_counter()
    try:
        with progress.bar:
            response = next(responses)
        run.ttft_s = time.perf_counter() - began
        while True:
            _take(run, response, write)
            if response.finish_reason or stop:
                break
            response = next(responses)
    except Interrupted:
        pass
    finally:
        responses.close()
    run.decode_s = time.perf_counter() - began - (run.ttft_s or 0.0)
    return run


def _take(run: Run, response: Any, write: Callable[[str], None]) -> None:
    run.tokens.append(response.token)
    run.text += response.text
    run.finish_reason = response.finish_reason or "interrupt"
    write(response.text)


def prefill(model: Any, tokens: list[int], cache: list[Any], step: int, stop: Stop | None = None) -> int:
    """Feed ``tokens`` into ``cache`` without generating; returns how many went in before the user stopped it."""
    from mlx_kvprune import documents

    run = Run(len(tokens))
    progress = Prefilling(run, cache, stop)
    try:
        with progress.bar:
            progress(0, len(tokens))
            documents.prefill(model, tokens, cache, step=step, progress=lambda done, total, _: progress(done, total))
    except Interrupted:
        pass
    return run.prefilled
