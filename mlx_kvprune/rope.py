"""Rotary position embedding of the model's own, forwards and backwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Rope = Callable[..., mx.array] | None

# Classes of mlx and mlx-lm whose rotation was found to depend on relative position alone; whatever is not here is refused.
RELATIVE = (
    "RoPE",
    "Llama3RoPE",
    "YarnRoPE",
    "ProportionalRoPE",
    "DeepseekV2YarnRotaryEmbedding",
    "DynamicNTKAlphaRoPE",  # of hunyuan: its base is changed once, not by length
    "NoPE",
)
SHORTEST, LONGEST = 256, 1 << 16  # positions of a table of cosines and sines; it has a power of two of them
TABLES = 4  # that are kept; layers of equal rotation share one, and no model has more than three rotations


class Shared:
    """Holds a rotary module that copies of a cache have in common."""

    def __init__(self, module: Rope):
        self.module = module

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


def find_rope(attention: Any) -> Rope:
    """The rotary module of an attention module, or None if it has none (some layers are without positions)."""
    if not getattr(attention, "use_rope", True):
        return None
    for name in ("rope", "rotary_emb", "rotary", "rope_emb", "pos_emb"):
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module) and callable(module):
            return module
    return None


def position_scale(rope: Rope, width: int) -> mx.array:
    """The factor per channel that a rotary module multiplies in beside the rotation (yarn, longrope) ``(D,)``."""
    if rope is None:
        return mx.ones(width)
    return rope(mx.ones((1, 1, 1, width)), offset=0)[0, 0, 0]


def unrotate(rope: Rope, x: mx.array, start: int) -> mx.array:
    """Undo the rotation of ``x`` ``(B, H, L, D)`` whose tokens stand at ``start .. start + L - 1``.

    A rotation by minus the position undoes one by the position. Read backwards, the tokens stand at consecutive
    negative positions, so that the module itself, of whatever type, can be asked to do it.
    """
    if rope is None:
        return x
    last = start + x.shape[2] - 1
    backwards = rope(x[:, :, ::-1], offset=-last)[:, :, ::-1]
    return backwards / (position_scale(rope, x.shape[-1]) ** 2).astype(x.dtype)


def rotate(rope: Rope, x: mx.array, at: mx.array | np.ndarray, size: int | None = None) -> mx.array:
    """Rotate un-rotated rows to positions of their own, by the module's own rotation.

    ``y = x * cos[at] + partner(x) * sin[at]`` with tables that the module itself filled in, in float32 and rounded to the
    type of ``x`` at the end.

    Args:
        rope: passes ``check_rankable``; None (a layer without positions) gives ``x``.
        x: rows ``(..., S, D)``.
        at: position of each row, in any order; broadcasts to ``(..., S)``.
        size: greater than every position, which is not checked on the device. Without it the greatest is looked up, which
            waits for ``at`` if that is an MLX array.

    Returns:
        The rotated rows ``(..., S, D)``.
    """
    if rope is None or not x.size:
        return x
    if size is None:
        low, high = (int(end) for end in (at.min(), at.max()))
        size = high + 1 if low >= 0 else LONGEST + 1
    if size > LONGEST:
        return rotate_rows(rope, x, at)
    return _tables_for(rope, x.shape[-1], size).turn(x, _as_int32(at))


@dataclass(frozen=True)
class Turning:
    """Rotates rows to positions of their own, all smaller than ``size``."""

    rope: Rope
    size: int
    _tables: dict[int, Tables | None] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, x: mx.array, at: mx.array) -> mx.array:
        """``rotate(rope, x, at)``."""
        return rotate(self.rope, x, at, self.size)

    def tables(self, width: int) -> Tables | None:
        """What ``rotate`` multiplies rows of this width with; None where it asks the module row by row."""
        if width not in self._tables:
            self._tables[width] = self._look_up(width)
        return self._tables[width]

    def _look_up(self, width: int) -> Tables | None:
        if self.rope is None:
            return Tables(0, False, mx.zeros(0), mx.zeros(0))
        return _tables_for(self.rope, width, self.size) if self.size <= LONGEST else None


def rotate_rows(rope: Rope, x: mx.array, at: mx.array | np.ndarray) -> mx.array:
    """What ``rotate`` gives, computed by the module row by row: for any position, also a negative one.

    The module takes one offset per sequence of a batch, and each row is made one. Needs no table, but the cosines of all
    rows are computed anew: on a CPU seven times slower.
    """
    if rope is None or not x.size:
        return x
    offsets = mx.broadcast_to(_as_int32(at), x.shape[:-1]).reshape(-1)
    return rope(x.reshape(-1, 1, 1, x.shape[-1]), offset=offsets).reshape(x.shape)


def check_rankable(rope: Rope) -> None:
    """See that a module's rotation is a function of relative position alone, so that a slot's rank can be its position.

    The class must be a known one, and a few random rows are rotated to see that it does what it is known for.

    Raises:
        ValueError: it is not (dynamic NTK), it may not be (longrope), or the class is unknown.
    """
    if rope is None:
        return
    name = type(rope).__name__
    if name not in RELATIVE or not _is_relative(rope):
        raise ValueError(
            f"[positions] cache positions need a rotation by relative position alone; got {name}; try --positions text"
        )


@dataclass(frozen=True)
class Tables:
    """Cosines and signed sines ``(size, dims)``, float32, of the first ``dims`` channels; the others are not rotated.

    Channel ``c`` is turned with ``c + dims / 2`` or, if ``neighbours``, pairwise; without ``dims`` nothing is rotated.
    """

    dims: int
    neighbours: bool
    cos: mx.array
    sin: mx.array

    def turn(self, x: mx.array, at: mx.array) -> mx.array:
        """Rotate rows ``(..., S, D)`` to the positions ``at``."""
        if not self.dims:
            return x
        front = x[..., : self.dims]
        turned = (front * self.cos[at] + self._partner(front) * self.sin[at]).astype(x.dtype)
        return turned if self.dims == x.shape[-1] else mx.concatenate([turned, x[..., self.dims :]], axis=-1)

    def _partner(self, front: mx.array) -> mx.array:
        if not self.neighbours:
            return mx.roll(front, self.dims // 2, -1)
        return front.reshape(*front.shape[:-1], -1, 2)[..., ::-1].reshape(front.shape)


@dataclass(frozen=True)
class _Ask:
    """The key of a table: what the rotation is made of, not which module makes it; the module itself is not kept alive."""

    made_of: tuple[Any, ...]
    width: int
    size: int
    module: weakref.ref[Any] = field(compare=False)

    @staticmethod
    def of(rope: Any, width: int, size: int) -> _Ask:
        arrays = {name: bytes(memoryview(cast(Any, x))) for name, x in rope.items() if isinstance(x, mx.array)}
        others = {
            name: x for name, x in {**vars(rope), **rope}.items() if name not in (*arrays, "_training", "_no_grad")
        }
        return _Ask((type(rope), repr(others), *arrays.items()), width, size, weakref.ref(rope))


def _tables_for(rope: Any, width: int, size: int) -> Tables:
    return _tables(_Ask.of(rope, width, max(SHORTEST, 1 << (size - 1).bit_length())))


@lru_cache(maxsize=TABLES)
def _tables(ask: _Ask) -> Tables:
    """Fill tables by asking the module to rotate rows whose first channel of each pair is one, the second zero."""
    rope, width, size = ask.module(), ask.width, ask.size
    assert rope is not None, "its caller has it"
    dims, neighbours = _layout(rope, width)
    if not dims:
        return Tables(0, False, mx.zeros(0), mx.zeros(0))
    first = mx.arange(width) % 2 == 0 if neighbours else mx.arange(width) < dims // 2
    rows = mx.broadcast_to(first.astype(mx.float32), (1, 1, size, width))
    turned = rope(rows, offset=0)[0, 0, :, :dims]
    if neighbours:
        cos, sin = turned[:, ::2], turned[:, 1::2]
        cos, sin = (mx.stack(pair, axis=-1).reshape(size, dims) for pair in ([cos, cos], [-sin, sin]))
    else:
        cos, sin = mx.split(turned, 2, axis=1)
        cos, sin = (mx.concatenate(pair, axis=1) for pair in ([cos, cos], [-sin, sin]))
    cos, sin = mx.contiguous(cos), mx.contiguous(sin)
    mx.eval(cos, sin)  # so that any thread may use them
    return Tables(dims, neighbours, cos, sin)


def _layout(rope: Any, width: int) -> tuple[int, bool]:
    """How many of the channels are rotated, and whether neighbours are pairs: seen by where the first one goes to."""
    first = mx.zeros((1, 1, 1, width)).at[..., 0].add(1.0)
    others = np.abs(np.array(rope(first, offset=1)[0, 0, 0, 1:]))
    if not others.any():
        return 0, False
    apart = int(others.argmax()) + 1
    return (width - width % 2, True) if apart == 1 else (2 * apart, False)


def _is_relative(rope: Any) -> bool:
    """Whether products of random rows depend on their distance alone, and ``rotate`` does what the module does."""
    width, context = _width(rope), getattr(rope, "max_position_embeddings", None) or 8192
    a, b = mx.random.normal((2, 1, 1, 64, 1, width), key=mx.random.key(0)) / width**0.5
    a, b = a[0].transpose(1, 0, 2, 3), b[0].transpose(1, 0, 2, 3)  # 64 sequences of one row
    product = lambda shift: (rope(a, offset=shift + 3) * rope(b, offset=shift + 17)).sum(axis=-1)
    try:
        if not all(_alike(product(s), product(0), s) for s in (1000, context - 10, context + 1000, 4 * context)):
            return False
        at, turned = mx.full(a.shape[:-1], 100, mx.int32), rope(a, offset=100)
        return _alike(rotate(rope, a, at), turned) and _alike(rotate_rows(rope, a, at), turned)
    except TypeError:  # not called as mlx's modules are
        return False


def _alike(x: mx.array, y: mx.array, position: int = 0) -> bool:
    """Whether two arrays agree up to what rounding the angles at ``position`` does."""
    return bool((mx.abs(x - y) <= 1e-4 + position * 2.0**-22).all())


def _width(rope: Any) -> int:
    freqs = getattr(rope, "_freqs", None)
    return getattr(rope, "dims", None) or (64 if freqs is None else 2 * freqs.size)


def _as_int32(at: mx.array | np.ndarray) -> mx.array:
    return at.astype(mx.int32) if isinstance(at, mx.array) else mx.array(np.asarray(at, np.int32))
