"""Read again what is held: the tokens that a cache kept, alone and in a row, in a fresh cache of the same size.

What a token's key and value say depends on what could be attended to when it was read. Behind an eviction that is little,
and a question asked of what is held then misses what it would find in the same tokens of a full cache (LOG.md,
2026-11-29). Read again they are a short text, as the model knows texts. It takes as many tokens as are held; the first
cache is given up before the second is made.

Layers that are left alone (sliding window, recurrent) are read again, too: what they knew of the rest of the text is gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.attach import make_from_settings
from mlx_kvprune.documents import Progress, Prompt, Reading, prefill
from mlx_kvprune.forward import listen, pruned
from mlx_kvprune.report import CacheReport, report

GAP = "\n"  # stands where tokens are left out
LEAST = 16  # tokens that are worth reading again
OF_ANSWER = 8  # at most this part of the slots is left free for the answer


@dataclass(kw_only=True)
class Reread(Reading):
    """What was read again; ``prompt`` has the excerpt in the place of the document.

    Attributes:
        first: of the cache that read the document.
    """

    first: CacheReport

    def report(self, cache: list[Any]) -> CacheReport:
        """Of a cache that answers, with what was seen and held before it."""
        now, excerpt = report(cache), len(self.prompt.before) + len(self.prompt.document)
        seen = self.first.tokens_seen + now.tokens_seen - excerpt
        full = self.first.kv_bytes_full * seen // self.first.tokens_seen
        peak = max(self.first.kv_bytes_peak, now.kv_bytes_peak)
        return replace(now, tokens_seen=seen, kv_bytes_full=full, kv_bytes_peak=peak)


def read_again(
    model: nn.Module,
    tokenizer: Any,
    reading: Reading,
    *,
    step: int = 512,
    max_tokens: int = 0,
    progress: Progress | None = None,
) -> Reading:
    """Read the tokens that ``reading.cache`` holds once more; ``reading`` itself where it holds all, or too few.

    The new cache has the settings of the old one, which is emptied: ``reading`` is of no use then. What is read fits in it
    beside the question and the answer's first tokens, so that nothing of it is evicted before the answer has begun; but for
    layers that hold less than the others (``pyramid``, local ones), heads whose slots go to others (``head_adaptive``,
    ``global``), and tokens that a threshold drops.

    Args:
        step: tokens per call.
        max_tokens: of the answer.
        progress: called as ``progress(done, total, cache)``.

    Returns:
        A ``Reread``, to be asked like the reading.
    """
    start, prompt = time.perf_counter(), reading.prompt
    gap = list(tokenizer.encode(GAP, add_special_tokens=False))
    positions = _positions(model, reading, len(gap), max_tokens)
    if len(positions) < LEAST:
        return reading
    first, settings = report(reading.cache), pruned(reading.cache)[0].settings
    reading.cache.clear()
    mx.clear_cache()
    text = prompt.before + prompt.document
    excerpt = Prompt(prompt.before, strung([text[i] for i in positions], positions, gap), prompt.after)
    cache = make_from_settings(model, settings)
    prefill(model, excerpt.before + excerpt.document, cache, step=step, progress=progress)
    seconds = reading.seconds + time.perf_counter() - start
    return Reread(prompt=excerpt, cache=cache, seconds=seconds, first=first, positions=positions)


def _positions(model: nn.Module, reading: Reading, gap: int, max_tokens: int) -> list[int]:
    """What is to be read again of the document; nothing where nothing was evicted."""
    prompt, bounded = reading.prompt, pruned(reading.cache)
    if not any(cache.evicted for cache in bounded):
        return []
    slots = int(np.mean([cache.held.capacity for cache in bounded if not cache.local]))
    room = slots - len(prompt.before) - len(prompt.after) - min(max_tokens, slots // OF_ANSWER)
    listen(model, reading.cache)
    found = best_that_fit(places(reading.cache), len(prompt.before), room, gap)
    for cache in bounded:
        cache.forget_heard()
    return found


def places(cache: list[Any]) -> np.ndarray:
    """How much each token of the text is wanted ``(tokens seen,)``: its place among those that a head holds, by the policy's
    own score, from 0 for the lowest to 1, on average over all heads that choose; 0 in heads that do not hold it.

    Places instead of scores, as heads have scales of their own (Borda's count).
    """
    bounded = [c for c in pruned(cache) if not c.local]
    total, heads = np.zeros(bounded[0].held.written), 0
    for one in bounded:
        scores = np.array(one.scorer.score(one.everything(), one.signals)[0].astype(mx.float32))
        for at, score in zip(np.array(one.held.positions()[0]), scores, strict=True):
            at, score = at[at >= 0], score[at >= 0]
            upwards = at[np.lexsort((at, score))]  # of equals the newer is wanted more
            total[upwards] += np.arange(1, len(at) + 1) / len(at)
            heads += 1
    return total / heads


def best_that_fit(wanted: np.ndarray, start: int, room: int, gap: int = 0) -> list[int]:
    """The positions from ``start`` on that are wanted most, in order, as many as fit.

    Args:
        wanted: how much each position is; those with zero are never taken.
        start: the first that may be.
        room: how many tokens there may be.
        gap: tokens that stand where positions are left out.
    """
    order = [int(i) for i in np.argsort(-wanted[start:], kind="stable") + start if wanted[i] > 0]
    n = max(0, min(room, len(order)))
    while n and (over := n + gap * _gaps(sorted(order[:n])) - room) > 0:
        n = max(0, n - -(-over // (gap + 1)))
    return sorted(order[:n])


def _gaps(positions: Sequence[int]) -> int:
    return sum(b != a + 1 for a, b in pairwise(positions))


def strung(tokens: Sequence[int], positions: Sequence[int], gap: Sequence[int]) -> list[int]:
    """Tokens in a row, with ``gap`` between those that are not neighbours in the text."""
    found = [*tokens[:1]]
    for token, (a, b) in zip(tokens[1:], pairwise(positions), strict=True):
        found += [token] if b == a + 1 else [*gap, token]
    return found
