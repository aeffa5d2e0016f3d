"""A text as the full cache reads it, with what training needs of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_kvprune.attach import hooked, replaced
from mlx_kvprune.cache import Handle
from mlx_kvprune.forward import leaves
from mlx_kvprune.numerics import softmax_beside

SEGMENT = 256  # tokens of a chunk: where a student may start
TOP = 64  # logits of the teacher that are kept
PIECE = 1 << 24  # logits that are worked on at a time: a vocabulary may be large
OUTPUTS = ("o_proj", "out_proj", "wo", "dense", "c_proj")  # names of an attention's last projection


@dataclass
class LayerReading:
    """What one bounded layer did with a text of ``T`` tokens.

    Attributes:
        x: attention inputs ``(T, width)`` float16.
        keys: as the model rotated them ``(H_kv, T, D)`` float16.
        values: ``(H_kv, T, D_v)`` float16.
        mass: attention that each token got from tokens at least ``window`` later, summed over them, mean over the query
            heads of its KV head ``(H_kv, T)`` float32.
        peak: the largest of it over tokens and the query heads of the KV head ``(H_kv, T)`` float32; if norms were wanted,
            times ``|W_o v_i| / |x_j|``, what the value adds to the output of the token that reads it.
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
        top: of each prediction, the largest log-probabilities ``(T, TOP)`` float32; empty if they were not wanted.
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
        states = [x for _, x in tree_flatten(self.others) if isinstance(x, mx.array)]
        return sum(x.nbytes for x in [*arrays, *states, self.top, self.top_ids])

    def lean(self) -> Reading:
        """Without what only a student needs."""
        none = mx.zeros((0,))
        layers = [replace(layer, keys=none, values=none) for layer in self.layers]
        return Reading(self.tokens, layers, none, none)


class Recorder:
    """Stands in the place of one layer's cache: holds everything, and notes who was attended to.

    Args:
        window: younger tokens are not counted: they are never evicted.
        repeat: if given, only queries from this position on count, and keys before it (a second reading of the text).
        projection: of values to the output, of each query head ``(H_q, D_v, D_v)`` (see ``gram``); None for no norms.
    """

    def __init__(self, window: int, repeat: int | None = None, projection: mx.array | None = None):
        self.offset, self.window, self.repeat, self.projection = 0, window, repeat, projection
        self.x: list[mx.array] = []
        self.staged: mx.array | None = None
        self.keys = self.values = self.mass = self.peak = mx.zeros((1, 0, 0))

    def stage(self, x: mx.array) -> None:
        """Whose keys come next counts: a later layer that shares them has an input of its own."""
        self.staged = x[0].astype(mx.float16)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        first = not self.offset
        if self.staged is not None:
            self.x.append(self.staged)
            self.staged = None
        self.keys = keys if first else mx.concatenate([self.keys, keys], axis=2)
        self.values = values if first else mx.concatenate([self.values, values], axis=2)
        self.offset += keys.shape[2]
        self.handle = Handle(self, keys, values, self.keys.shape, keys.dtype)  # type: ignore[arg-type]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """For later layers that share these keys: what they attend to counts as well."""
        return self.handle, self.handle

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return "causal" if N > 1 else None

    def attend(self, queries: mx.array, handle: Any, scale: float, mask: Any, sinks: Any) -> mx.array:
        batch, n_heads, length, width = queries.shape
        heads, slots = self.keys.shape[1], self.offset
        grouped = (queries * scale).reshape(batch, heads, -1, width)
        logits = (grouped @ self.keys.swapaxes(-1, -2)).reshape(batch, heads, n_heads // heads, length, slots)
        at, of = mx.arange(slots - length, slots)[:, None], mx.arange(slots)
        logits = mx.where(of <= at, logits.astype(mx.float32), -mx.inf)
        weights = softmax_beside(logits, sinks)
        self._note(weights, at, of)
        flat = weights.reshape(batch, heads, -1, slots).astype(self.values.dtype)
        return (flat @ self.values).reshape(batch, n_heads, length, -1)

    def _note(self, weights: mx.array, at: mx.array, of: mx.array) -> None:
        counts = at - of >= self.window
        if self.repeat is not None:
            counts = counts & (of < self.repeat) & (at >= self.repeat)
        counted = mx.where(counts, weights[0], 0.0)  # (H_kv, group, L, S)
        mass = counted.mean(axis=1).sum(axis=1)
        peak = (counted * self._effect(counted.shape[1])).max(axis=(1, 2))
        known = self.mass.shape[1] if self.mass.ndim == 2 else 0
        longer = lambda x: mx.pad(x, [(0, 0), (0, mass.shape[1] - known)]) if known else mx.zeros_like(mass)
        self.mass, self.peak = longer(self.mass) + mass, mx.maximum(longer(self.peak), peak)

    def _effect(self, group: int) -> mx.array:
        """``|W_o v_i| / |x_j|`` of keys and queries ``(H_kv, group, L, S)``; one where it is not wanted."""
        if self.projection is None:
            return mx.array(1.0)
        values = self.values[0].astype(mx.float32)[:, None]  # (H_kv, 1, S, D_v)
        grams = self.projection.reshape(-1, group, *self.projection.shape[1:])
        added = mx.sqrt(mx.maximum(((values @ grams) * values).sum(axis=-1), 0.0))
        reader = self.x[-1] if self.staged is None else self.staged
        readers = mx.linalg.norm(reader.astype(mx.float32), axis=-1)
        return added[:, :, None] / mx.maximum(readers, 1e-6)[:, None]

    @property
    def arrays(self) -> list[mx.array]:
        return [self.keys, self.values, self.mass, self.peak, *self.x]

    def taken(self, length: int) -> LayerReading:
        """What was noted of the first ``length`` tokens.

        Raises:
            ValueError: the keys came without the attention's input.
        """
        if not self.x:
            raise ValueError(
                "[fit] gates need the attention's input; got a layer that writes keys without showing it; try another model"
            )
        half = lambda x: x[0, :, :length].astype(mx.float16)
        x = mx.concatenate(self.x)[:length]
        return LayerReading(x, half(self.keys), half(self.values), self.mass[:, :length], self.peak[:, :length])


def gram(attention: nn.Module, n_heads: int, width: int) -> mx.array | None:
    """``W_o^T W_o`` of each query head ``(H_q, D_v, D_v)``: ``v^T G v`` is the squared norm of what a value adds to the output.

    None where the attention has no projection of a known name.
    """
    for name in OUTPUTS:
        project: Any = getattr(attention, name, None)
        if not isinstance(project, nn.Module):
            continue
        try:
            rows = project(mx.eye(n_heads * width)) - project(mx.zeros((1, n_heads * width)))
        except ValueError:
            continue
        rows = rows.astype(mx.float32).reshape(n_heads, width, -1)
        return rows @ rows.swapaxes(1, 2)
    return None


def check_readable(model: nn.Module) -> None:
    """Refuse a model whose attention does not go through us.

    Raises:
        ValueError: with the reason.
    """
    rung = hooked(model).rung
    if rung.name != "ragged":
        raise ValueError(
            f"[fit] gates can be trained where attention goes through us; got {rung.reason}; try another model"
        )


def projections(model: nn.Module) -> list[mx.array]:
    """``gram`` of every bounded layer; the identity (the value's own norm) where there is none."""
    found = []
    for layer in hooked(model).rung.layers:
        heads, width = layer.shape.n_heads, layer.shape.value_dim
        one = gram(layer.attention, heads, width)
        found.append(mx.broadcast_to(mx.eye(width), (heads, width, width)) if one is None else one)
    mx.eval(found)
    return found


def read(
    model: nn.Module,
    tokens: Sequence[int],
    window: int,
    *,
    segment: int = SEGMENT,
    twice: bool = False,
    grams: Sequence[mx.array] | None = None,
    outputs: bool = True,
    tick: Callable[[int], None] | None = None,
) -> Reading:
    """Read a text with the full cache, a segment at a time.

    Args:
        model: of mlx-lm; the hook is put in if it is not there.
        tokens: ``T`` of them.
        window: the newest tokens, which are never evicted.
        twice: read the text again after itself, and count only what that second reading attends to.
        grams: of every bounded layer (see ``projections``), to have norms in ``peak``.
        outputs: keep the teacher's likeliest tokens; without them no logits are computed, which saves time,
            most where the vocabulary is large.
        tick: is told how many tokens were read.
    """
    check_readable(model)
    length, tokens = len(tokens), [*tokens, *tokens] if twice else list(tokens)
    recorder = lambda i: Recorder(window, length if twice else None, grams[i] if grams else None)
    caches = replaced(model, recorder)
    mine = [c for c in leaves(caches) if isinstance(c, Recorder)]
    theirs = [c for c in leaves(caches) if not isinstance(c, Recorder)]
    ids, tops, picks, others = mx.array(tokens), [], [], []
    for start in range(0, len(tokens), segment):
        others.append([tree_map(_copied, c.state) if not c.empty() else None for c in theirs])
        logits: Any = model(ids[None, start : start + segment], cache=caches)
        if outputs:
            top, pick = most_likely(logits[0])
            mx.eval(top, pick)
            tops.append(top)
            picks.append(pick)
        mx.eval([c.arrays for c in mine], [c.state for c in theirs])
        if tick:
            tick(logits.shape[1])
    layers = [c.taken(length) for c in mine]
    joined = lambda parts: mx.concatenate(parts)[:length] if parts else mx.zeros((0,))
    top, pick = joined(tops), joined(picks)
    mx.eval(top, pick, [list(vars(layer).values()) for layer in layers])  # or they would hold all logits
    return Reading(np.array(tokens[:length]), layers, top, pick, others[: -(-length // segment)])


def most_likely(logits: mx.array, n: int = TOP) -> tuple[mx.array, mx.array]:
    """The largest ``n`` log-probabilities of each row ``(L, vocab)``, and which they are."""
    found = [_most_likely(logits[rows].astype(mx.float32), min(n, logits.shape[1])) for rows in pieces(logits)]
    return mx.concatenate([top for top, _ in found]), mx.concatenate([ids for _, ids in found])


def _most_likely(logits: mx.array, n: int) -> tuple[mx.array, mx.array]:
    picks = mx.argpartition(logits, kth=-n, axis=-1)[:, -n:]
    return mx.take_along_axis(logits, picks, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True), picks


def pieces(logits: mx.array) -> list[slice]:
    """Rows of ``(L, vocab)`` in pieces of at most ``PIECE`` numbers."""
    rows = max(1, PIECE // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _copied(x: Any) -> Any:
    return mx.array(x) if isinstance(x, mx.array) else x
