"""What upkeep costs a layer, against the decode steps between two of them: prints one line a setting.

    python tests/upkeep_table.py      (half a minute)

Two KV heads, four query heads, D 64, ``knorm``, float32. A step here is one layer's attention alone, which makes the share
of upkeep larger than in a model.
"""

from __future__ import annotations

import time
from statistics import median

import mlx.core as mx

from mlx_kvprune.cache import PrunedKVCache
from mlx_kvprune.forward import settle
from mlx_kvprune.settings import CacheSettings


def feed(cache: PrunedKVCache, n: int, attend: bool = False) -> float:
    """Bring ``n`` random tokens; returns seconds."""
    keys, values, queries = (mx.random.normal((1, heads, n, 64)) for heads in (2, 2, 4))
    mx.eval(keys, values, queries)
    start = time.perf_counter()
    handle, _ = cache.update_and_fetch(keys, values)
    if attend:
        mx.eval(cache.attend(queries, handle, 0.125), cache.state)
    else:
        for _ in cache.write_blocks(handle):
            pass
        mx.eval(cache.state)
    cache.fetched = None
    return time.perf_counter() - start


def measure(allocator: str, slots: int, **more: int) -> str:
    cache = PrunedKVCache(CacheSettings(policy="knorm", allocator=allocator, budget=slots, **more), slots)
    cache.lends = False
    while cache.held.written < slots + 1024:
        feed(cache, 512)
    steps, upkeeps, peaks, block = [], [], [], cache.held.block
    for _ in range(4):
        while cache.held.spare() > 0:
            if cache.held.spare() <= 8:
                steps.append(feed(cache, 1, attend=True))
            else:
                feed(cache, cache.held.spare() - 8)
        mx.reset_peak_memory()
        active, start = mx.get_active_memory(), time.perf_counter()
        settle([cache])
        cache.upkeep(block)
        mx.eval(cache.state)
        upkeeps.append(time.perf_counter() - start)
        peaks.append(mx.get_peak_memory() - active)
    step, upkeep = median(steps), median(upkeeps)
    share = upkeep / (block * step + upkeep)
    return (
        f"{allocator:14} {slots:6} slots {more.get('kv_bits', 32):2} bits   step {1e3 * step:6.2f} ms   "
        f"upkeep {1e3 * upkeep:5.2f} ms every {block}: {share:.1%}   "
        f"pool {cache.nbytes / 1e6:6.1f} MB, peak {max(peaks) / 1e6:+.1f} MB"
    )


def main() -> None:
    for slots in (1024, 65536):
        for allocator in ("uniform", "head_adaptive"):
            print(measure(allocator, slots), flush=True)
            print(measure(allocator, slots, kv_bits=4), flush=True)


if __name__ == "__main__":
    main()
