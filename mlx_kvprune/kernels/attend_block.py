"""Attention of a block of prefill: pages are unpacked into a buffer for MLX's own fused attention.

No kernel of ours, and this is why. A block has at least 32 queries, so that a slot meets ``32 G`` query rows: with D = 128
and G = 4 that are 65,000 operations for a key and a value. Reading them packed in 4 bits takes 144 bytes; unpacking first
takes those, writes 512 bytes (half precision) and reads them again: 1.2 kB. That is still 55 operations per byte (220 with
a block of 128), where a chip of Apple's M series is balanced at 25 to 40: the block is bound by arithmetic either way, and
MLX's kernel does that with the matrix units. The buffer is one layer's slots, bounded by the budget, and is given back when
the layer is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_kvprune.kernels import checks, launch
from mlx_kvprune.slots import PagedPart, Part

FUSED_WIDTHS = (64, 80, 128)  # head dims of MLX's fused attention for many queries


def can_run(queries: mx.array, parts: Sequence[Part | PagedPart]) -> str:
    """Whether a block is unpacked on this machine: empty if it is, else the reason. Arguments as of ``attend_block``."""
    return ("" if launch.engine() else checks.NO_GPU) or why_not(queries, parts)


def why_not(queries: mx.array, parts: Sequence[Part | PagedPart]) -> str:
    """What keeps MLX's fused attention from serving this block; empty if nothing does."""
    width, value_width = queries.shape[-1], parts[-1].values.codec.width
    if width != value_width or width not in FUSED_WIDTHS:
        return f"head dims {width} and {value_width}, for which MLX has no fused attention of many queries"
    rows = queries.shape[1] * queries.shape[2] // parts[-1].keys.parts[0].shape[1]
    if any(isinstance(part, PagedPart) and not part.gathers(rows) for part in parts):
        return "heads that differ so much that gathering their pages would be mostly padding"
    return ""


def attend_block(
    queries: mx.array, parts: Sequence[Part | PagedPart], scale: float, sinks: mx.array | None = None
) -> mx.array:
    """Causal attention of ``L`` new queries over parts, of which the last ends with the new tokens.

    Args:
        queries: ``(B, H_q, L, D)``.
        parts: as in a view.
        scale: factor of the logits.
        sinks: logits of attention sinks ``(H_q,)``.

    Returns:
        ``(B, H_q, L, D_v)``.
    """
    n_heads, n_new = queries.shape[1:3]
    kv_heads = parts[-1].keys.parts[0].shape[1]
    dense = [part.ready(queries.dtype).for_rows(n_heads * n_new // kv_heads, queries.dtype) for part in parts]
    keys, values = (
        mx.concatenate([rows.decoded(queries.dtype) for rows in side], axis=2)
        for side in ([part.keys for part in dense], [part.values for part in dense])
    )
    mask: str | mx.array = "causal"
    if any(part.mask is not None for part in dense):
        mask = _mask([part for part in dense if isinstance(part, Part)], keys.shape[:3], n_heads, n_new)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _mask(parts: list[Part], shape: tuple[int, ...], n_heads: int, n_new: int) -> mx.array:
    """Which slots the queries may see ``(B, H_q, L, S)`` bool."""
    batch, kv_heads, slots = shape
    width = lambda part: part.keys.parts[0].shape[2] * part.keys.codec.granule
    every = lambda part: mx.ones((batch, kv_heads, 1, width(part)), mx.bool_) if part.mask is None else part.mask
    held = mx.concatenate([every(part) for part in parts], axis=-1)
    seen = mx.arange(slots) <= mx.arange(slots - n_new, slots)[:, None]
    return mx.repeat(held, n_heads // kv_heads, axis=1) & seen
