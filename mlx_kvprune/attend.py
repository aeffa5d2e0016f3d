"""Attention over what is held, where it lies."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.kernels import attend_block, attend_slots, checks
from mlx_kvprune.kernels.attend_slots import MOST_NEW
from mlx_kvprune.numerics import LOG2_E, exp2
from mlx_kvprune.slots import EVERYTHING, PagedPart, Part, Sight

Mask = mx.array | str | None
HALF_SUM = 4.0  # what weights sum to in float16: values up to 16,000 fit, and weights of a hundred-thousandth are exact
WITHIN = {
    mx.float32: 1e-3,
    mx.float16: 2.0**-7,
    mx.bfloat16: 2.0**-5,
}  # errors of a kernel, relative to the largest value


@dataclass(frozen=True)
class View:
    """What ``L`` new queries may attend to.

    Attributes:
        parts: pools first; the ring, with the new tokens last, at the end.
    """

    parts: tuple[Part | PagedPart, ...]

    @property
    def ring(self) -> Part:
        """The last part."""
        last = self.parts[-1]
        assert isinstance(last, Part)
        return last


@dataclass(frozen=True)
class Attended:
    """Output ``(B, H_q, L, D_v)`` and, if asked for, weights per part ``(B, H_kv, gqa_factor, L, S_part)``."""

    out: mx.array
    weights: tuple[mx.array, ...] | None = None


def backend(
    queries: mx.array, view: View, mask: Mask = None, want_weights: bool = False, sight: Sight = EVERYTHING
) -> tuple[str, str]:
    """Which implementation serves these queries ``(B, H_q, L, D)``, and why: ``(name, reason)``.

    ``fused``: MLX's own attention. ``kernel``: ``metal/attend_slots.metal``. ``block``: slots unpacked for MLX's own attention.
    ``ops``: plain MLX operations.
    """
    own_mask = isinstance(mask, mx.array)
    alone = len(view.parts) == 1 and view.ring.gate is None and sight is EVERYTHING
    if alone and not own_mask and not want_weights:
        return "fused", "everything lies in the ring: mx.fast.scaled_dot_product_attention"
    if own_mask:
        return "ops", "the model brings a mask of its own"
    if queries.shape[2] <= MOST_NEW:
        reason = attend_slots.can_run(queries, view.parts, want_weights)
        return ("ops", reason) if reason else ("kernel", "metal/attend_slots.metal reads slots where they lie")
    if want_weights or sight is not EVERYTHING or any(part.gate for part in view.parts):
        return "ops", "a block whose weights are wanted, or with gates, windows or caps"
    reason = attend_block.can_run(queries, view.parts)
    return ("ops", reason) if reason else ("block", "slots are unpacked for mx.fast.scaled_dot_product_attention")


def attend(
    queries: mx.array,
    view: View,
    *,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
    want_weights: bool = False,
    sight: Sight = EVERYTHING,
) -> Attended:
    """Causal attention of ``L`` new queries over the parts of a view.

    Args:
        queries: ``(B, H_q, L, D)``.
        view: what is held and the ``L`` new tokens.
        scale: factor of the logits.
        mask: None or ``"causal"``; or an array ``(..., L, L)``, bool or additive, among the new tokens. Held tokens are
            all older than the queries and visible.
        sinks: logits of attention sinks ``(H_q,)``, added to the softmax's denominator.
        want_weights: return the weights as well; a kernel gives each query head the mean of its KV head's.
        sight: windows and caps of the logits.
    """
    name, _ = backend(queries, view, mask, want_weights, sight)
    if name == "fused":
        ring, causal = view.ring.ready(queries.dtype), "causal" if queries.shape[2] > 1 else None
        keys, values = ring.keys.parts[0], ring.values.parts[0]
        return Attended(
            mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=causal, sinks=sinks)
        )
    if name == "kernel":
        by_kernel = lambda: Attended(*attend_slots.attend_slots(queries, view.parts, scale, sinks, want_weights, sight))
        error = lambda: _error(
            by_kernel(), attend_ops(queries.astype(mx.float32), view, scale, mask, sinks, want_weights, sight)
        )
        variant = attend_slots.variant(queries, view.parts, sinks, want_weights, sight)
        if not checks.refuted("attend_slots", variant, error, WITHIN[queries.dtype]):
            return by_kernel()
        name = "ops"
    if name == "block":
        return Attended(attend_block.attend_block(queries, view.parts, scale, sinks))
    return attend_ops(queries, view, scale, mask, sinks, want_weights, sight)


def _error(found: Attended, wanted: Attended) -> float:
    """Largest difference, relative to the largest value: of outputs, and of weights (the mean over a KV head's queries)."""
    pairs = [(found.out.astype(mx.float32), wanted.out)]
    for ours, theirs in zip(found.weights or (), wanted.weights or (), strict=True):
        if ours.size:
            pairs.append((ours[:, :, 0], theirs.mean(axis=2)))
    errors = [mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-6) for a, b in pairs]
    return float(mx.stack(errors).max())  # not a number if one is none


def attend_ops(
    queries: mx.array,
    view: View,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
    want_weights: bool = False,
    sight: Sight = EVERYTHING,
) -> Attended:
    """The reference in plain MLX ops: a score product per part, one softmax over all, a value product per part.

    The softmax is taken to the base of two, its denominator divided out last; logits and weights are float32.
    """
    batch, n_heads, n_new, width = queries.shape
    kv_heads = view.ring.keys.parts[0].shape[1]
    gqa_factor = n_heads // kv_heads
    rows = (batch, kv_heads, gqa_factor * n_new)
    grouped = (queries * (scale * LOG2_E)).reshape(*rows, width)
    parts = [part.for_rows(gqa_factor * n_new, queries.dtype) for part in view.parts]
    logits = [part.logits(grouped, sight, n_new) for part in parts]
    if n_new > 1 or isinstance(mask, mx.array):
        newest = logits[-1].reshape(batch, kv_heads, gqa_factor, n_new, -1)
        logits[-1] = _masked(newest, mask).reshape(*rows, -1)
    peaks = [part.peak(x) for part, x in zip(parts, logits, strict=True)]
    if sinks is not None:
        column = (sinks.astype(mx.float32) * LOG2_E).reshape(1, kv_heads, gqa_factor, 1)
        peaks.append(mx.broadcast_to(column, (batch, kv_heads, gqa_factor, n_new)).reshape(*rows, 1))
    peak = functools.reduce(mx.maximum, peaks)
    may_hide_all = sight is not EVERYTHING or any(part.gate for part in parts)
    if may_hide_all:  # of a query that sees nothing the output is zero
        peak = mx.maximum(peak, -1e30)
    weights = [exp2(x - part.spread(peak)) for part, x in zip(parts, logits, strict=True)]
    totals = [part.total(w) for part, w in zip(parts, weights, strict=True)]
    if sinks is not None:
        totals.append(exp2(peaks[-1] - peak))
    total = sum(totals[1:], totals[0])
    total = mx.where(total > 0, total, 1.0) if may_hide_all else total
    mixed, sums = weights, total
    if queries.dtype == mx.float16:  # which the sum of many values may be too large for
        mixed, sums = [w * part.spread(HALF_SUM / total) for part, w in zip(parts, weights, strict=True)], HALF_SUM
    products = [part.mix(w) for part, w in zip(parts, mixed, strict=True)]
    out = (sum(products[1:], products[0]) / sums).astype(queries.dtype).reshape(batch, n_heads, n_new, -1)
    if not want_weights:
        return Attended(out)
    by_head = (part.by_head(w) / total for part, w in zip(parts, weights, strict=True))
    return Attended(out, tuple(w.reshape(batch, kv_heads, gqa_factor, n_new, -1) for w in by_head))


def among_new(mask: Mask, span: slice, total: int) -> Mask:
    """The part of a mask over ``total`` new tokens that concerns a span of them."""
    if not isinstance(mask, mx.array):
        return mask
    newest = mask[..., -total:]
    return newest[..., span, span] if newest.shape[-2] == total else newest[..., span]


def _masked(logits: mx.array, mask: Mask) -> mx.array:
    """Hide what the new queries may not see in the part that ends with the new tokens ``(B, H_kv, G, L, S)``."""
    n_new, slots = logits.shape[-2:]
    if not isinstance(mask, mx.array):
        visible = mx.arange(slots)[None] <= mx.arange(slots - n_new, slots)[:, None]
        return mx.where(visible, logits, -mx.inf)
    mask = _per_kv_head(mask, logits.shape)
    fill = mx.array(True) if mask.dtype == mx.bool_ else mx.array(0.0, mask.dtype)
    mask = mx.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(slots - n_new, 0)], constant_values=fill)
    if mask.dtype == mx.bool_:
        return mx.where(mask, logits, mx.finfo(logits.dtype).min)
    return logits + mask.astype(mx.float32) * LOG2_E


def _per_kv_head(mask: mx.array, shape: tuple[int, ...]) -> mx.array:
    """A mask ``(L, L)`` or ``(B, 1 or H_q, L, L)`` in the shape of grouped logits."""
    if mask.ndim < 4:
        return mask
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mask.reshape(mask.shape[0], shape[1], shape[2], *mask.shape[-2:])
