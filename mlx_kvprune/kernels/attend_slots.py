"""Attention of a few queries over slots where they lie: ``metal/attend_slots.metal`` and what puts its results together.

Launches per layer and decoded token: one of ``attend_slots`` for each part that holds something (the ring, and a pool per
precision) and one of ``merge_slots``; with weights one of ``slot_mass`` more per part. No host synchronisation.

The reference is ``attend.attend_ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvprune.kernels import checks
from mlx_kvprune.kernels.launch import LEAST, SIMD, Kernel, enough
from mlx_kvprune.numerics import device
from mlx_kvprune.quantize import Codec, Frame
from mlx_kvprune.rope import Tables
from mlx_kvprune.settings import PAGE
from mlx_kvprune.slots import EVERYTHING, Gate, PagedPart, Part, Rows, Sight, plain

MOST_NEW = 8  # queries of one sequence that the kernel takes: decode, verification, short suffixes
MOST_ROWS = 16  # query rows that a threadgroup takes at once
MOST_WIDTH = 256  # of a head
MOST_PARTS = 3
SIMDS = 8  # SIMD groups of a threadgroup
LEAST_TILES, MOST_TILES, ITEMS = 32, 64, 512  # tiles of 32 slots per threadgroup, and how many of those are enough
FEW, FEW_TILES = 256, 8  # of so few tiles in all, threadgroups take less: there would be too few of them
SCHEMES = {"token": 0, "channel": 1, "page": 2}
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

READS = (
    *(
        "queries",
        "items",
        "numbers",
        "factors",
        "keys",
        "key_scales",
        "key_biases",
        "values",
        "value_scales",
        "value_biases",
    ),
    *("table", "mask", "frame_offset", "frame_scale", "ranks", "cosines", "sines", "gates", "decays", "positions"),
)
ATTEND = Kernel("attend_slots", READS, ("mixed", "stats"))
MASS = Kernel("slot_mass", (*READS, "totals"), ("mass",))
MERGE = Kernel(
    "merge_slots",
    ("mixed0", "stats0", "firsts0", "mixed1", "stats1", "firsts1", "mixed2", "stats2", "firsts2", "sinks", "numbers"),
    ("out", "totals"),
)


def can_run(queries: mx.array, parts: Sequence[Part | PagedPart], weights: bool = False) -> str:
    """Whether the kernel serves this on this machine: empty if it does, else the reason. Arguments as of ``why_not``."""
    return checks.verdict("attend_slots") or why_not(queries, parts, weights)


def why_not(queries: mx.array, parts: Sequence[Part | PagedPart], weights: bool = False) -> str:
    """What keeps the kernel from serving this; empty if nothing does. Whether there is a GPU is not asked.

    Args:
        queries: ``(B, H_q, L, D)``.
        parts: the view's.
        weights: whether the weights are wanted as well.
    """
    n_new, rows = queries.shape[2], queries.shape[1] * queries.shape[2] // _kv_heads(parts)
    if n_new > MOST_NEW:
        return f"more than {MOST_NEW} new tokens at once"
    if weights and n_new > 1:
        return "weights of more than one new token at once"
    if weights and rows > MOST_ROWS:
        return f"weights of more than {MOST_ROWS} query heads per KV head"
    if len(parts) > MOST_PARTS:
        return f"more than {MOST_PARTS} parts"
    if queries.dtype not in DTYPES:
        return f"queries of type {queries.dtype}"
    return next((reason for part in parts if (reason := _why_not_part(part, queries))), "")


def _why_not_part(part: Part | PagedPart, queries: mx.array) -> str:
    for rows in (part.keys, part.values):
        if rows.codec.width % 8 or rows.codec.width > MOST_WIDTH:
            return f"a head dim of {rows.codec.width}, not a multiple of 8 up to {MOST_WIDTH}"
        if rows.codec.bits is None and rows.parts[0].dtype != queries.dtype:
            return f"rows of type {rows.parts[0].dtype} for queries of type {queries.dtype}"
        if any(0 < x.size < LEAST for x in rows.parts):  # padded, they would not lie as the others do
            return f"a part of fewer than {LEAST} numbers"
    if part.ranks is None:
        return ""
    tables, codec = part.ranks.turn.tables(part.keys.codec.width), part.keys.codec
    if tables is None:
        return "positions beyond the table of rotations"
    if codec.bits is not None and codec.scheme == "page":
        return "positions in the cache with keys in scheme 'page'"
    if tables.dims % (8 if tables.neighbours else 16):
        return f"a rotation of {tables.dims} channels"
    return ""


def attend_slots(
    queries: mx.array,
    parts: Sequence[Part | PagedPart],
    scale: float,
    sinks: mx.array | None = None,
    weights: bool = False,
    sight: Sight = EVERYTHING,
    force: bool = False,
) -> tuple[mx.array, tuple[mx.array, ...] | None]:
    """Causal attention of ``L`` new queries over parts, of which the last ends with the new tokens.

    Args:
        queries: ``(B, H_q, L, D)``.
        parts: as in a view.
        scale: factor of the logits.
        sinks: logits of attention sinks ``(H_q,)``.
        weights: return weights as well, of one new token: ``(B, H_kv, G, 1, S)`` per part, each the mean over the ``G``
            query heads of its KV head.
        sight: window and cap of the logits.
        force: look whether the kernel can run here, and raise if it cannot; who asked ``can_run`` knows.

    Returns:
        Output ``(B, H_q, L, D_v)``, and weights or None.

    Raises:
        ValueError: with ``force``, where the kernel cannot run.
    """
    if force and (reason := can_run(queries, parts, weights)):
        raise ValueError(f"[kernels] attend_slots cannot run: {reason}; try attend, which takes what can")
    batch, n_heads, n_new, width = queries.shape
    shape = _Shape(queries.dtype, batch, _kv_heads(parts), n_heads * n_new // _kv_heads(parts), n_new)
    grouped = mx.contiguous(queries.reshape(batch, shape.kv_heads, shape.rows, width))
    asks = [
        _Ask.of(shape, part, grouped, scale, sight, causal=n_new > 1 and i == len(parts) - 1)
        for i, part in enumerate(parts)
        if _tiles(part)
    ]
    if not asks:
        out = mx.zeros((batch, n_heads, n_new, parts[-1].values.codec.width), queries.dtype)
        return out, tuple(mx.zeros((batch, shape.kv_heads, shape.rows, 1, 0)) for _ in parts) if weights else None
    found = [ask.run() for ask in asks]
    out, totals = _merge(shape, asks, found, sinks)
    out = out.reshape(batch, n_heads, n_new, -1)
    return out, tuple(_weights(shape, part, asks, totals) for part in parts) if weights else None


def variant(
    queries: mx.array, parts: Sequence[Part | PagedPart], sinks: mx.array | None, weights: bool, sight: Sight
) -> tuple[Any, ...]:
    """What the kernels are compiled for; equal where the same machine code runs."""
    of = lambda part: (
        type(part),
        part.keys.codec,
        part.values.codec,
        part.mask is None,
        part.ranks is None,
        part.gate and (part.gate.bias is None, part.gate.decay is None),
    )
    asked = (weights, sinks is None, sight.window is None, sight.softcap is None)
    return queries.dtype, queries.shape[1:], _kv_heads(parts), *asked, *(of(part) for part in parts)


@dataclass(frozen=True)
class _Shape:
    dtype: mx.Dtype
    batch: int
    kv_heads: int
    rows: int
    n_new: int

    @property
    def heads(self) -> int:
        return self.batch * self.kv_heads

    @property
    def rows_at_once(self) -> int:
        """Rows of a threadgroup: as many as there are in decode; else a power of two, lest each length be compiled."""
        rows = self.rows if self.n_new == 1 else 1 << (self.rows - 1).bit_length()
        return min(rows, MOST_ROWS)


@dataclass(frozen=True)
class _Ask:
    """One launch of ``attend_slots``: a part, what is handed over of it, and the constants that fit it."""

    shape: _Shape
    part: Part | PagedPart
    inputs: list[mx.array]
    template: list[tuple[str, Any]]
    firsts: mx.array
    n_items: int
    width: int

    @staticmethod
    def of(shape: _Shape, part: Part | PagedPart, queries: mx.array, scale: float, sight: Sight, causal: bool) -> _Ask:
        sight.check(part.gate)
        n_items, items, firsts = _items(_tiles(part))
        tables = part.ranks and part.ranks.turn.tables(part.keys.codec.width)
        inputs = [
            queries,
            items,
            _numbers(_counts(shape, part, sight)),
            _factors(float(scale), float(sight.softcap or 0)),
        ]
        inputs += _arrays(part, tables)
        template = [*_storage(shape, part), *_turning(tables), *_seeing(part, sight, causal)]
        return _Ask(shape, part, inputs, template, firsts, n_items, part.values.codec.width)

    def run(self) -> list[mx.array]:
        """``mixed`` and ``stats`` of its items."""
        rows, n = self.shape.rows, self.n_items
        return ATTEND(
            self.inputs,
            template=self.template,
            grid=(SIMD * SIMDS, n, -(-rows // self.shape.rows_at_once)),
            threadgroup=(SIMD * SIMDS, 1, 1),
            output_shapes=[(n, rows, self.width), (n, rows, 2)],
            output_dtypes=[mx.float32, mx.float32],
        )

    def mass(self, totals: mx.array) -> mx.array:
        """Weights of its slots, summed over the rows: ``(B * H_kv, S)``, or ``(P, PAGE)``."""
        size = (
            (self.part.layout.owner.shape[0], PAGE)
            if isinstance(self.part, PagedPart)
            else (self.shape.heads, _slots(self.part))
        )
        return MASS(
            [*self.inputs, enough(totals)],
            template=self.template,
            grid=(SIMD * SIMDS, self.n_items, 1),
            threadgroup=(SIMD * SIMDS, 1, 1),
            output_shapes=[size],
            output_dtypes=[mx.float32],
        )[0]


def _merge(
    shape: _Shape, asks: list[_Ask], found: list[list[mx.array]], sinks: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Output ``(B, H_kv, R, D_v)`` and totals ``(B * H_kv, R, 2)``."""
    width, heads, rows = asks[0].width, shape.heads, shape.rows
    inputs = [enough(x) for ask, arrays in zip(asks, found, strict=True) for x in (*arrays, ask.firsts)]
    inputs += [_nothing(mx.int32 if i % 3 == 2 else mx.float32) for i in range(3 * len(asks), 3 * MOST_PARTS)]
    inputs.append(_flat(sinks, mx.float32))
    inputs.append(_numbers((rows, shape.n_new)))
    template = [("T", shape.dtype), ("DV", width), ("KV_HEADS", shape.kv_heads)]
    template += [("PARTS", len(asks)), ("SINKS", sinks is not None)]
    out, totals = MERGE(
        inputs,
        template=template,
        grid=(width, heads * rows, 1),
        threadgroup=(width, 1, 1),
        output_shapes=[(shape.batch, shape.kv_heads, rows, width), (heads, rows, 2)],
        output_dtypes=[shape.dtype, mx.float32],
    )
    return out, totals


def _weights(shape: _Shape, part: Part | PagedPart, asks: list[_Ask], totals: mx.array) -> mx.array:
    """Of one part ``(B, H_kv, G, 1, S)``, the mean over the query heads of a KV head."""
    ask = next((ask for ask in asks if ask.part is part), None)
    if ask is None:
        return mx.zeros((shape.batch, shape.kv_heads, shape.rows, 1, 0))
    mass = ask.mass(totals) / shape.rows
    if isinstance(part, PagedPart):
        mass = part.by_head(mass[:, None])[:, :, 0]
    mass = mass.reshape(shape.batch, shape.kv_heads, 1, 1, -1)
    return mx.broadcast_to(mass, (*mass.shape[:2], shape.rows, 1, mass.shape[-1]))


# -- what is handed over ----------------------------------------------------------------------------------------------


def _counts(shape: _Shape, part: Part | PagedPart, sight: Sight) -> tuple[int, ...]:
    """``numbers``: slots, newest query, window, shift of ranks, slots of a head, its pages, rows, new tokens."""
    slots, width = (0, part.layout.table.shape[1]) if isinstance(part, PagedPart) else (_slots(part), 0)
    shift = part.ranks.shift if part.ranks else 0
    return slots, sight.newest or 0, sight.window or 0, shift, slots, width, shape.rows, shape.n_new


def _arrays(part: Part | PagedPart, tables: Tables | None) -> list[mx.array]:
    """Rows, tables and whatever there is one of per slot, in the order of ``READS``."""
    gate = part.gate or Gate()
    frame = _frame(part)
    table = part.layout.table if isinstance(part, PagedPart) else None
    floats = lambda *arrays: [_flat(x, mx.float32) for x in arrays]
    turning = [_flat(part.ranks and part.ranks.ranks, mx.int32), *floats(tables and tables.cos, tables and tables.sin)]
    return [
        *_operands(part.keys),
        *_operands(part.values),
        _flat(table, mx.int32),
        _flat(part.mask, mx.bool_),
        *floats(frame and frame.offset, frame and frame.scale),
        *turning,
        *floats(gate.bias, gate.decay),
        _flat(gate.positions, mx.int32),
    ]


def _storage(shape: _Shape, part: Part | PagedPart) -> list[tuple[str, Any]]:
    """Constants: types, widths and how rows are stored."""
    keys, values = part.keys, part.values
    return [
        *(("T", shape.dtype), ("D", keys.codec.width), ("DV", values.codec.width), ("KV_HEADS", shape.kv_heads)),
        *(("SIMDS", SIMDS), ("ROWS", shape.rows_at_once)),
        *(("PAGED", isinstance(part, PagedPart)), ("MASKED", part.mask is not None)),
        *(*_constants("KEY", keys), *_constants("VALUE", values)),
        *(("KEY_SCHEME", SCHEMES[_scheme(keys)]), ("FRAMED", _frame(part) is not None)),
    ]


def _turning(tables: Tables | None) -> list[tuple[str, Any]]:
    """Constants: how keys are rotated."""
    dims, neighbours = (tables.dims, tables.neighbours) if tables else (0, False)
    return [("TURNED", dims > 0), ("DIMS", dims), ("NEIGHBOURS", neighbours)]


def _seeing(part: Part | PagedPart, sight: Sight, causal: bool) -> list[tuple[str, Any]]:
    """Constants: what acts on logits."""
    gate = part.gate or Gate()
    gated = [("GATED", gate.bias is not None), ("DECAYED", gate.decay is not None)]
    return [("CAUSAL", causal), *gated, ("WINDOWED", sight.window is not None), ("SOFTCAP", sight.softcap is not None)]


def _kv_heads(parts: Sequence[Part | PagedPart]) -> int:
    ring = parts[-1]
    assert isinstance(ring, Part)
    return ring.keys.parts[0].shape[1]


def _slots(part: Part) -> int:
    return part.keys.parts[0].shape[2] * part.keys.codec.granule


def _tiles(part: Part | PagedPart) -> tuple[int, ...]:
    """Tiles of 32 slots of each head; empty if there are none."""
    if isinstance(part, PagedPart):
        return part.layout.counts if any(part.layout.counts) else ()
    batch, heads = part.keys.parts[0].shape[:2]
    return (-(-_slots(part) // PAGE),) * (batch * heads) if _slots(part) else ()


def _frame(part: Part | PagedPart) -> Frame | None:
    """Of the keys, of each head."""
    return part.frame if isinstance(part, PagedPart) else part.keys.frame


def _scheme(rows: Rows) -> str:
    return rows.codec.scheme if rows.codec.bits is not None else "token"


def _constants(name: str, rows: Rows) -> list[tuple[str, Any]]:
    codec = rows.codec
    turned = codec.width & -codec.width if codec.bits is not None and codec.hadamard else 0
    return [(f"{name}_BITS", codec.bits or 0), (f"{name}_GROUP", codec.group), (f"{name}_HADAMARD", turned)]


def _operands(rows: Rows) -> list[mx.array]:
    """Codes, scales and biases; where nothing is quantized, rows and two that are never read."""
    if rows.codec.bits is None:
        return [rows.parts[0], _nothing(mx.float16), _nothing(mx.float16)]
    return list(rows.parts)


def _flat(x: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """An array to be read as one stretch of memory; eight zeros in its place if there is none."""
    return _nothing(dtype) if x is None or not x.size else enough(mx.contiguous(x.astype(dtype)))


@lru_cache(maxsize=16)
def _nothing(dtype: mx.Dtype) -> mx.array:
    return _kept(mx.zeros(LEAST, dtype))


@lru_cache(maxsize=1024)
def _numbers(numbers: tuple[int, ...]) -> mx.array:
    return _kept(mx.array([*numbers, *[0] * (LEAST - len(numbers))], mx.int32))


@lru_cache(maxsize=64)
def _factors(*factors: float) -> mx.array:
    return _kept(mx.array([*factors, *[0.0] * (LEAST - len(factors))], mx.float32))


@lru_cache(maxsize=256)
def _items(tiles: tuple[int, ...]) -> tuple[int, mx.array, mx.array]:
    """Stretches of tiles, head by head: how many, ``(n, 3)`` head, first and last tile, and where each head's begin."""
    least = FEW_TILES if sum(tiles) <= FEW else LEAST_TILES
    most = min(MOST_TILES, max(least, -(-sum(tiles) // ITEMS)))
    items = [(head, start, min(n, start + most)) for head, n in enumerate(tiles) for start in range(0, n, most)]
    firsts = np.cumsum([0, *(-(-n // most) for n in tiles)])
    return len(items), _handed(np.array(items)), _handed(firsts)


def _handed(x: np.ndarray) -> mx.array:
    """Integers of the host, flat and not too few; padded here, for a kernel that pads would have to be waited for."""
    flat = x.astype(np.int32).reshape(-1)
    return device(np.pad(flat, (0, max(0, LEAST - flat.size))))


def _kept(x: mx.array) -> mx.array:
    """Evaluated, so that any thread may use it."""
    mx.eval(x)
    return x


# -- a case to try a machine with --------------------------------------------------------------------------------------

LIMIT = 1e-4


def self_check() -> float:
    """Largest difference from float64 on two small cases of two heads and 70 slots: as they are, and in 4 bits."""
    random = np.random.default_rng(0)
    queries, *rows = (random.standard_normal((1, h, n, 64)).astype(np.float32) for h, n in ((4, 1), (2, 70), (2, 70)))
    codec = Codec(64, bits=4, hadamard=True)
    packed = [Rows(codec, codec.encode(device(x))) for x in rows]
    exact = [np.array(x.decoded(mx.float32)) for x in packed]
    plainly = Part(plain(device(rows[0])), plain(device(rows[1])))
    found = [_difference(queries, plainly, rows), _difference(queries, Part(packed[0], packed[1]), exact)]
    return float(np.max(found))  # not a number if one is none


def _difference(queries: np.ndarray, part: Part, rows: list[np.ndarray]) -> float:
    """Of the output and the weights, from keys and values ``(1, 2, S, D)``."""
    out, found = attend_slots(device(queries), (part,), 0.125, weights=True)
    keys, values = (x.astype(np.float64) for x in rows)
    logits = queries.reshape(1, 2, 2, 64).astype(np.float64) @ keys.swapaxes(-1, -2) * 0.125
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    assert found is not None
    of_out = np.abs(np.array(out).reshape(1, 2, 2, 64) - shares @ values).max()
    return float(np.maximum(of_out, np.abs(np.array(found[0])[:, :, 0, 0] - shares.mean(axis=2)).max()))
