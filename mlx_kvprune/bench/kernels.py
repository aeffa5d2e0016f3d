"""``python -m mlx_kvprune.bench --kernels``: attention of one decode step on a GPU, by bytes.

The ceiling comes first: what a copy reaches. Then, for each length, what the step's keys and values (packed rows and scales)
are read at, and the share of the ceiling: ours in the model's type, 8 and 4 bits, dense and in ragged pages; beside them
``mx.fast.scaled_dot_product_attention`` over the full cache and mlx-lm's quantized attention. All of a round in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_kvprune.attend import View, attend
from mlx_kvprune.bench.bandwidth import copy_bandwidth
from mlx_kvprune.bench.variants import spread_of
from mlx_kvprune.numerics import device
from mlx_kvprune.quantize import Codec
from mlx_kvprune.settings import PAGE
from mlx_kvprune.slots import PagedPart, Part, Rows, plain
from mlx_kvprune.slots.parts import Layout

import mlx.core as mx  # isort: skip

Step = Callable[[mx.array], mx.array]  # queries (1, H_q, 1, D) -> outputs
AT_ONCE = 16  # steps that are given to the GPU in one go
GROUP = 64


def kernel_table(
    lengths: list[int], say: Callable[[str], None], heads: int = 32, gqa: int = 4, width: int = 128, rounds: int = 7
) -> dict[str, Any]:
    """Microseconds, GB/s and share of a copy's, for every way and length; ``heads`` are KV heads.

    Raises:
        ValueError: MLX has no GPU here.
    """
    if mx.default_device().type != mx.DeviceType.gpu:
        raise ValueError("[bench] --kernels measures a GPU; got MLX on the CPU; try a Mac, or the extra [cuda13]")
    ceiling = copy_bandwidth()
    say(f"copy: {ceiling[0]:.0f} GB/s; {heads} x {gqa} heads, D {width}, bfloat16; us a step, GB/s, share of a copy's")
    table: dict[str, Any] = {"copy_gbps": ceiling, "heads": heads, "gqa_factor": gqa, "width": width, "lengths": {}}
    for slots in lengths:
        steps = _steps(heads, gqa, slots, width)
        queries = mx.random.normal((1, heads * gqa, 1, width)).astype(mx.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds + 1):  # the first one compiles
            for name, (step, _) in steps.items():
                times[name].append(_seconds(step, queries))
        rows = table["lengths"][slots] = {}
        for name, (_, nbytes) in steps.items():
            seconds = times[name][1:]
            rate = spread_of([nbytes / s / 1e9 for s in seconds])
            rows[name] = {"us": spread_of([1e6 * s for s in seconds]), "gbps": rate, "share": rate[0] / ceiling[0]}
            say(f"  {slots:7} slots  {name:34} {rows[name]['us'][0]:9.1f}  {rate[0]:7.0f}  {rows[name]['share']:5.0%}")
    return table


def _seconds(step: Step, queries: mx.array) -> float:
    """Of one step, out of ``AT_ONCE`` that wait for one another."""
    mx.eval(queries)
    start = time.perf_counter()
    x = queries
    for _ in range(AT_ONCE):
        x = step(x)
    mx.eval(x)
    return (time.perf_counter() - start) / AT_ONCE


def _steps(heads: int, gqa: int, slots: int, width: int) -> dict[str, tuple[Step, int]]:
    """Ways to attend by name, each with the bytes of keys and values that it has to read."""
    rows = [mx.random.normal((1, heads, slots, width)).astype(mx.bfloat16) for _ in range(2)]
    newest = lambda: plain(mx.random.normal((1, heads, PAGE, width)).astype(mx.bfloat16))
    ring = Part(newest(), newest())
    scale = width**-0.5
    ours = lambda part: lambda q: attend(q, View((part, ring)), scale=scale).out
    steps: dict[str, tuple[Step, int]] = {
        "mx.fast, full cache": (
            lambda q: mx.fast.scaled_dot_product_attention(q, *rows, scale=scale),
            sum(x.nbytes for x in rows),
        )
    }
    for bits in (None, 8, 4):
        codec = Codec(width) if bits is None else Codec(width, bits=bits, group_size=GROUP, hadamard=True)
        stored = [Rows(codec, codec.encode(x)) for x in rows]
        mx.eval([x.parts for x in stored])
        name = "ours, bfloat16" if bits is None else f"ours, {bits} bits"
        steps[name] = ours(Part(stored[0], stored[1])), _nbytes(stored)
        paged = _paged(heads, slots, codec, width)
        steps[f"{name}, ragged pages"] = ours(paged), _nbytes([paged.keys, paged.values])
        if bits is not None:
            steps[f"mlx-lm, {bits} bits"] = _stock(rows, bits, scale)
    return steps


def _nbytes(rows: list[Rows]) -> int:
    return sum(x.nbytes for r in rows for x in r.parts)


def _paged(heads: int, slots: int, codec: Codec, width: int) -> PagedPart:
    """As many slots in all, shared unevenly: heads hold from a half to one and a half of the mean."""
    counts = np.linspace(0.5, 1.5, heads) * slots / PAGE
    counts = tuple(int(n) for n in np.diff(np.round(np.cumsum(counts)), prepend=0))
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(heads), counts))
    table = np.full((heads, max(counts)), len(owner), np.int32)
    back = np.zeros(len(owner), np.int32)
    for head, n in enumerate(counts):
        mine = np.flatnonzero(owner == head)
        table[head, :n] = mine
        back[mine] = head * table.shape[1] + np.arange(n)
    hot = (owner[None] == np.arange(heads)[:, None]).astype(np.float32)
    layout = Layout(device(owner.astype(np.uint32)), device(table), device(back), device(hot), 1, counts)
    pages = [mx.random.normal((len(owner), PAGE, width)).astype(mx.bfloat16) for _ in range(2)]
    stored = [Rows(codec, codec.encode(x)) for x in pages]
    mx.eval([x.parts for x in stored])
    return PagedPart(stored[0], stored[1], layout)


def _stock(rows: list[mx.array], bits: int, scale: float) -> tuple[Step, int]:
    """mlx-lm's own attention over a quantized cache."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention

    keys, values = (mx.quantize(x, group_size=GROUP, bits=bits) for x in rows)
    mx.eval(keys, values)
    more = {"scale": scale, "mask": None, "group_size": GROUP, "bits": bits}
    step = lambda q: quantized_scaled_dot_product_attention(q, keys, values, **more)
    return step, sum(x.nbytes for side in (keys, values) for x in side)
