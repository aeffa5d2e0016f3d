"""What this machine gives: the bandwidth of its memory, the share of it that attention reaches, the speed of its BLAS."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_kvprune.attend import View, attend, backend
from mlx_kvprune.bench.variants import spread_of
from mlx_kvprune.slots.format import plain
from mlx_kvprune.slots.parts import Part

import mlx.core as mx  # isort: skip

Attention = Callable[[mx.array, View], mx.array]  # queries (B, H_q, 1, D) and what they attend to -> outputs
Spread = list[float]  # median, least, most
RING = 64  # slots of the ring, beside those of the pool
AT_ONCE = 16  # passes that a GPU is given in one go, lest the time of a launch count


@dataclass(frozen=True)
class Load:
    """A decode step of one layer: one query attends to a pool and a ring, both dense.

    Attributes:
        kv_heads: KV heads.
        gqa_factor: query heads per KV head.
        slots: of the pool, per KV head.
        width: D.
        dtype: of keys, values and queries.
    """

    kv_heads: int
    gqa_factor: int
    slots: int
    width: int
    dtype: mx.Dtype

    def view(self) -> View:
        """Random keys and values."""
        return View(tuple(Part(plain(self._rows(n)), plain(self._rows(n))) for n in (self.slots, RING)))

    def queries(self) -> mx.array:
        """``(1, H_q, 1, D)``."""
        return mx.random.normal((1, self.kv_heads * self.gqa_factor, 1, self.width)).astype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, each of which has to be read once."""
        return 2 * self.kv_heads * (self.slots + RING) * self.width * self.dtype.size

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("mlx.core.")
        return f"{self.kv_heads} x {self.gqa_factor} heads, {self.slots:,} slots, D {self.width}, {name}"

    def _rows(self, n: int) -> mx.array:
        return mx.random.normal((1, self.kv_heads, n, self.width)).astype(self.dtype)


def on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def usual_load() -> Load:
    """What is measured where nothing else is asked for: 134 MB on a GPU, 67 MB on the CPU, beyond most caches."""
    return Load(32, 4, 8192, 128, mx.float16) if on_gpu() else Load(8, 4, 8192, 128, mx.float32)


def usual_attention(load: Load) -> tuple[str, Attention]:
    """How a decode step attends on this machine: the name of the implementation, and it."""
    run: Attention = lambda queries, view: attend(queries, view, scale=queries.shape[-1] ** -0.5).out
    return backend(load.queries(), load.view())[0], run


def copy_bandwidth(nbytes: int = 1 << 28, rounds: int = 5) -> Spread:
    """GB/s of a copy of ``nbytes``, read and written bytes counted; on the CPU by one thread, as MLX computes there."""
    if not on_gpu():
        source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)  # untouched zeros share one page
        return _rate(lambda: np.copyto(target, source), 2 * nbytes, rounds)
    source = mx.ones(nbytes // 4)
    mx.eval(source)
    return _rate(lambda: mx.eval(_passes(source)), 2 * nbytes * AT_ONCE, rounds)


def _passes(x: mx.array) -> mx.array:
    for _ in range(AT_ONCE):
        x = x + 1
    return x


def attend_bandwidth(run: Attention, load: Load, rounds: int = 5) -> Spread:
    """GB/s at which attention goes through the keys and values of a decode step."""
    view = load.view()
    queries = [load.queries() for _ in range(AT_ONCE if on_gpu() else 1)]
    mx.eval(queries, [rows.parts for part in view.parts for rows in (part.keys, part.values)])
    return _rate(lambda: mx.eval([run(q, view) for q in queries]), load.nbytes * len(queries), rounds)


def matmul_speed(size: int = 512, rounds: int = 3) -> Spread:
    """GFLOP/s of a float32 matrix product on the CPU: what the BLAS gives, whatever the default device."""
    a = mx.random.normal((size, size), stream=mx.cpu)
    mx.eval(a)
    return _rate(lambda: mx.eval(mx.matmul(a, a, stream=mx.cpu)), 2 * size**3, rounds)


def _rate(work: Callable[[], object], amount: int, rounds: int) -> Spread:
    """Billions of ``amount`` per second: median, least, most; a first round does not count."""
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        rates.append(amount / (time.perf_counter() - start) / 1e9)
    return spread_of(rates[1:])
