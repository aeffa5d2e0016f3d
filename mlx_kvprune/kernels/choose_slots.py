"""Which slots the tokens that come overwrite: ``exchange`` as one launch of ``metal/choose_slots.metal``."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_kvprune.kernels import checks
from mlx_kvprune.kernels.launch import LEAST, SIMD, Kernel, enough
from mlx_kvprune.numerics import device
from mlx_kvprune.slots.choose import Exchange, exchange_by_scores

KERNEL = Kernel(
    "choose_slots", ("pool_scores", "pool_positions", "scores", "positions", "sizes"), ("slots", "replace", "order")
)
THREADS = 512  # of the threadgroup that owns a head, where its pool has that many slots
MOST_TOKENS = 512  # both sorts lie in 16 KiB of threadgroup memory
MOST_SLOTS = 1 << 24


def can_run(pool_scores: mx.array, pool_positions: mx.array, scores: mx.array, positions: mx.array) -> str:
    """Why the kernel cannot choose here; empty if it can. Arguments as for ``choose_slots``."""
    return checks.verdict("choose_slots") or why_not(pool_scores, scores)


def why_not(pool_scores: mx.array, scores: mx.array) -> str:
    """What keeps the kernel from choosing; empty if nothing does. Whether there is a GPU is not asked."""
    if not pool_scores.size or not scores.size:
        return "no slots or no tokens"
    if scores.shape[-1] > MOST_TOKENS:
        return f"{scores.shape[-1]} tokens at once, more than {MOST_TOKENS}"
    return "" if pool_scores.shape[-1] <= MOST_SLOTS else f"{pool_scores.shape[-1]} slots, more than {MOST_SLOTS}"


def reference(pool_scores: mx.array, pool_positions: mx.array, scores: mx.array, positions: mx.array) -> Exchange:
    """The same in plain MLX operations."""
    return exchange_by_scores(pool_scores, pool_positions, scores, positions)


def choose_slots(
    pool_scores: mx.array, pool_positions: mx.array, scores: mx.array, positions: mx.array, force: bool = False
) -> Exchange:
    """Set the i-th worst slot against the i-th best token, by the kernel where it can run, else by the reference.

    One launch per layer and upkeep and no host synchronisation, where the reference takes about 27 launches and sorts
    all slots. An input that is not contiguous, not of the type below or has fewer than eight elements costs another
    launch that copies it. The slots are read once per leading byte of the keys that tells them apart and once more: four
    times on scores of softmax, normal or log-normal shape, nine where the m-th worst slot is empty.

    Args:
        pool_scores: retention scores of the slots ``(B, H_kv, P)`` float32; minus infinity where a slot is empty.
        pool_positions: ``(B, H_kv, P)`` int32; negative where a slot is empty. No two slots that are held are alike.
        scores: retention scores of the tokens that come ``(B, H_kv, n)`` float32; no NaN.
        positions: ``(B, H_kv, n)`` int32.
        force: raise where the kernel cannot run.

    Returns:
        The pairs, ``m = min(P, n)`` of them; of slots that are empty alike the first ones.
    """
    if reason := can_run(pool_scores, pool_positions, scores, positions):
        if force:
            raise ValueError(f"[kernels] choose_slots cannot run: {reason}; try force=False")
        return reference(pool_scores, pool_positions, scores, positions)
    case = (pool_scores, pool_positions, scores, positions)
    size = max(SIMD, 1 << (scores.shape[-1] - 1).bit_length())
    if checks.refuted("choose_slots", size, lambda: _wrong(_launch(*case), reference(*case)), LIMIT):
        return reference(*case)
    return _launch(*case)


def _wrong(found: Exchange, wanted: Exchange) -> float:
    """How many of the choices differ."""
    pairs = zip(vars(found).values(), vars(wanted).values(), strict=True)
    return float(sum(int((ours != theirs).sum()) for ours, theirs in pairs))


def _launch(pool_scores: mx.array, pool_positions: mx.array, scores: mx.array, positions: mx.array) -> Exchange:
    (*lead, P), n = pool_scores.shape, scores.shape[-1]
    assert pool_positions.shape == (*lead, P) and scores.shape == positions.shape == (*lead, n)
    m = min(P, n)
    threads = min(THREADS, -(-max(P, n) // SIMD) * SIMD)
    slots, replace, order = KERNEL(
        [
            _flat(pool_scores, mx.float32),
            _flat(pool_positions, mx.int32),
            _flat(scores, mx.float32),
            _flat(positions, mx.int32),
            mx.array([P, n] + [0] * (LEAST - 2), mx.int32),
        ],
        template=[("SIZE", max(SIMD, 1 << (n - 1).bit_length()))],
        grid=(math.prod(lead) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*lead, m), (*lead, m), (*lead, n)],
        output_dtypes=[mx.uint32, mx.bool_, mx.uint32],
    )
    return Exchange(slots, order[..., :m], replace, order[..., m:])


def _flat(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """``x`` as the kernel reads it: of ``dtype``, contiguous, not too short."""
    return enough(mx.contiguous(x.astype(dtype)))


# -- a case to try a machine with --------------------------------------------------------------------------------------

LIMIT = 0.0


def self_check() -> float:
    """How many of the choices for two heads, 300 slots and 32 tokens are not the reference's."""
    random = np.random.default_rng(0)
    scores = [device(random.standard_normal((1, 2, n)).astype(np.float32)) for n in (300, 32)]
    places = [device(random.permuted(np.tile(np.arange(n, dtype=np.int32), (1, 2, 1)), axis=-1)) for n in (300, 32)]
    case = (scores[0], places[0], scores[1], places[1] + 300)
    return _wrong(_launch(*case), reference(*case))
