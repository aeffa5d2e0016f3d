"""A decode attention kernel in the manner of MLX's ``sdpa_vector``: what the checker is tested on."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from .wrapper import Definition

THREADS = 1024

# One threadgroup of 32 simdgroups of 32 lanes per query head; keys are strided over simdgroups.
BODY = """
  constexpr int BN = 32;
  constexpr int BD = 32;
  constexpr int EPT = D / BD;
  uint head = threadgroup_position_in_grid.x;
  uint sg = simdgroup_index_in_threadgroup;
  uint lane = thread_index_in_simdgroup;
  const int n = k_shape[1];
  uint kv_head = head / GQA;
  const device T* qp = q + head * D + lane * EPT;
  const device T* kp = k + (kv_head * n + sg) * D + lane * EPT;
  const device T* vp = v + (kv_head * n + sg) * D + lane * EPT;

  thread float qr[EPT];
  thread float o[EPT];
  threadgroup float outputs[BN * BD];
  threadgroup float max_scores[BN];
  threadgroup float sum_scores[BN];

  for (int i = 0; i < EPT; i++) { qr[i] = scale * qp[i]; o[i] = 0; }
  float m = -INFINITY;
  float l = 0;
  for (int t = sg; t < n; t += BN) {
    float s = 0;
    for (int j = 0; j < EPT; j++) s += qr[j] * static_cast<float>(kp[j]);
    s = simd_sum(s);
    float nm = max(m, s);
    float f = fast::exp(m - nm);
    float e = fast::exp(s - nm);
    m = nm;
    l = l * f + e;
    for (int j = 0; j < EPT; j++) o[j] = o[j] * f + e * static_cast<float>(vp[j]);
    kp += BN * D;
    vp += BN * D;
  }
  if (lane == 0) { max_scores[sg] = m; sum_scores[sg] = l; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  m = max_scores[lane];
  float gm = simd_max(m);
  float f = fast::exp(m - gm);
  float gl = simd_sum(sum_scores[lane] * f);
  for (int i = 0; i < EPT; i++) {
    outputs[lane * BD + sg] = o[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[i] = simd_sum(outputs[sg * BD + lane] * f) / gl;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (lane == 0) {
    for (int i = 0; i < EPT; i++) out[head * D + sg * EPT + i] = static_cast<T>(o[i]);
  }
"""


def definition(body: str = BODY) -> Definition:
    """The kernel as ``mx.fast.metal_kernel`` is given it."""
    return Definition("attend", ["q", "k", "v", "scale"], ["out"], body)


def problem(
    n_keys: int, width: int, dtype: mx.Dtype, n_heads: int = 4, n_kv_heads: int = 2, seed: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """The keyword arguments of a call, and what it should return, computed in float64."""
    rng = np.random.default_rng(seed)
    shapes = [(n_heads, width), (n_kv_heads, n_keys, width), (n_kv_heads, n_keys, width)]
    q, k, v = (mx.array(rng.standard_normal(s), mx.float32).astype(dtype) for s in shapes)
    gqa_factor = n_heads // n_kv_heads
    call = {
        "inputs": [q, k, v, mx.array(width**-0.5)],
        "template": [("T", dtype), ("D", width), ("GQA", gqa_factor)],
        "grid": (n_heads * THREADS, 1, 1),
        "threadgroup": (THREADS, 1, 1),
        "output_shapes": [(n_heads, width)],
        "output_dtypes": [dtype],
    }
    return call, attention(q, k, v, width**-0.5)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> np.ndarray:
    """Attention of one query per head ``(H_q, D)`` over keys and values ``(H_kv, S, D)``, in float64."""
    q, k, v = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    logits = np.einsum("hd,hsd->hs", q, k) * scale
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.einsum("hs,hsd->hd", weights / weights.sum(axis=1, keepdims=True), v)
