"""A text as the full cache reads it, with what training needs of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_kvprune.attach import hooked, replaced
from mlx_kvprune.cache import Handle
from mlx_kvprune.numerics import softmax

SEGMENT = 256  # tokens of a chunk: where a student may start
TOP = 64  # logits of the teacher that are kept


@dataclass
class LayerReading:
    """What one bounded layer did with a text of ``T`` tokens.

    Attributes:
        x: attention inputs ``(T, width)`` float16.
        keys: as the model rotated them ``(H_kv, T, D)`` float16.
        values: ``(H_kv, T, D_v)`` float16.
        mass: attention that each token got from tokens at least ``window`` later, summed over them, mean over the query
            heads of its KV head ``(H_kv, T)`` float32.
        peak: the largest of it, times the norm of what the value adds to the output ``(H_kv, T)``; for KVzap.
    """

    x: mx.array
    keys: mx.array
    values: mx.array
    mass: mx.array
    peak: mx.array


@dataclass
class Reading:
    """A text and what every bounded layer did with it.

    Attributes:
        tokens: ``(T,)``.
        layers: of the bounded layers, in order.
        top: of each prediction, the largest log-probabilities ``(T, TOP)`` float32.
        top_ids: and which tokens they are ``(T, TOP)`` int32.
        others: states of the model's other caches at the start of each segment.
    """

    tokens: np.ndarray
    layers: list[LayerReading]
    top: mx.array
    top_ids: mx.array
    others: list[list[Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        arrays = [x for layer in self.layers for x in vars(layer).values()]
        return sum(x.nbytes for x in arrays) + self.top.nbytes + self.top_ids.nbytes


class Recorder:
    """Stands in the place of one layer's cache: holds everything, and notes who was attended to.

    Args:
        window: younger tokens are not counted: they are never evicted.
        repeat: if given, only queries from this position on count, and keys before it (a second reading of the text).
    """

    def __init__(self, window: int, repeat: int | None = None):
        self.offset, self.window, self.repeat = 0, window, repeat
        self.x: list[mx.array] = []
        self.keys = self.values = self.mass = self.peak = mx.zeros((1, 0, 0))
        self.norms: Callable[[mx.array], mx.array] | None = None

    def stage(self, x: mx.array) -> None:
        self.x.append(x[0].astype(mx.float16))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        first = not self.offset
        self.keys = keys if first else mx.concatenate([self.keys, keys], axis=2)
        self.values = values if first else mx.concatenate([self.values, values], axis=2)
        self.offset += keys.shape[2]
        handle = Handle(self, keys, values, self.keys.shape, keys.dtype)  # type: ignore[arg-type]
        return handle, handle

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return "causal" if N > 1 else None

    def attend(self, queries: mx.array, handle: Any, scale: float, mask: Any, sinks: Any) -> mx.array:
        batch, n_heads, length, width = queries.shape
        heads, slots = self.keys.shape[1], self.offset
        grouped = (queries * scale).reshape(batch, heads, -1, width)
        logits = (grouped @ self.keys.swapaxes(-1, -2)).reshape(batch, heads, n_heads // heads, length, slots)
        at, of = mx.arange(slots - length, slots)[:, None], mx.arange(slots)
        logits = mx.where(of <= at, logits.astype(mx.float32), -mx.inf)
        if sinks is not None:
            extra = mx.broadcast_to(sinks.reshape(1, heads, -1, 1, 1), (*logits.shape[:-1], 1))
            weights = softmax(mx.concatenate([logits, extra], axis=-1))[..., :-1]
        else:
            weights = softmax(logits)
        self._note(weights, at - of)
        flat = weights.reshape(batch, heads, -1, slots).astype(self.values.dtype)
        return (flat @ self.values).reshape(batch, n_heads, length, -1)

    def _note(self, weights: mx.array, age: mx.array) -> None:
        counts = age >= self.window
        if self.repeat is not None:
            counts = counts & (age > -1) & (mx.arange(age.shape[1]) < self.repeat)
            if self.offset <= self.repeat:
                counts = mx.zeros_like(counts)
        counted = mx.where(counts, weights[0], 0.0)  # (H_kv, group, L, S)
        mass, peak = counted.mean(axis=1).sum(axis=1), counted.max(axis=(1, 2))
        known = self.mass.shape[1] if self.mass.ndim == 2 else 0
        longer = lambda x: mx.pad(x, [(0, 0), (0, mass.shape[1] - known)]) if known else mx.zeros_like(mass)
        self.mass, self.peak = longer(self.mass) + mass, mx.maximum(longer(self.peak), peak)

    @property
    def arrays(self) -> list[mx.array]:
        return [self.keys, self.values, self.mass, self.peak, *self.x]

    def taken(self) -> LayerReading:
        """What was noted."""
        half = lambda x: x[0].astype(mx.float16)
        return LayerReading(mx.concatenate(self.x), half(self.keys), half(self.values), self.mass, self.peak)


def read(
    model: nn.Module,
    tokens: Sequence[int],
    window: int,
    *,
    segment: int = SEGMENT,
    tick: Callable[[int], None] | None = None,
) -> Reading:
    """Read a text with the full cache, a segment at a time.

    Args:
        model: of mlx-lm; the hook is put in if it is not there.
        tokens: ``T`` of them.
        window: the newest tokens, which are never evicted.
        tick: is told how many tokens were read.
    """
    attachment = hooked(model)
    if attachment.rung.name != "ragged":
        raise ValueError(
            f"[fit] gates can be trained where attention goes through us; got {attachment.rung.reason}; try another model"
        )
    caches = replaced(model, lambda layer: Recorder(window))
    mine = [c for c in flat(caches) if isinstance(c, Recorder)]
    theirs = [c for c in flat(caches) if not isinstance(c, Recorder)]
    ids, tops, picks, others = mx.array(list(tokens)), [], [], []
    for start in range(0, len(tokens), segment):
        others.append([tree_map(_copied, c.state) if not c.empty() else None for c in theirs])
        logits: Any = model(ids[None, start : start + segment], cache=caches)
        top, pick = most_likely(logits[0])
        mx.eval(top, pick, [c.arrays for c in mine], [c.state for c in theirs])
        tops.append(top)
        picks.append(pick)
        if tick:
            tick(pick.shape[0])
    layers = [c.taken() for c in mine]
    mx.eval([list(vars(layer).values()) for layer in layers])
    return Reading(np.array(tokens), layers, mx.concatenate(tops), mx.concatenate(picks), others)


def most_likely(logits: mx.array, n: int = TOP) -> tuple[mx.array, mx.array]:
    """The largest ``n`` log-probabilities of each row ``(L, vocab)``, and which they are."""
    logits = logits.astype(mx.float32)
    picks = mx.argpartition(logits, kth=-n, axis=-1)[:, -n:]
    return mx.take_along_axis(logits, picks, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True), picks


def flat(caches: Any) -> list[Any]:
    """The single caches of a (nested) list."""
    return [one for c in caches for one in (flat(c.caches) if hasattr(c, "caches") else [c])]


def _copied(x: Any) -> Any:
    return mx.array(x) if isinstance(x, mx.array) else x
