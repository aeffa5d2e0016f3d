"""Decode with everything held, ours and stock's: what our layout costs where nothing is evicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_kvprune import make_cache
from mlx_kvprune.bench.variants import decode_seconds, made, spread_of, text_of
from mlx_kvprune.forward import leaves, pruned

import mlx.core as mx  # isort: skip

SLICE = 480  # tokens that are put in at a time: a multiple of the block


def equal_length(
    model: Any, slots: int, variants: list[str], rounds: int, say: Callable[[str], None], tokens: int = 8
) -> dict[str, Any]:
    """Milliseconds per decoded token in mlx-lm's own loop with ``slots`` tokens held, in turn; keys are random."""
    widths, dtype = _widths(model), _dtype(model)
    runs: dict[str, list[Any]] = {
        "stock": make_cache(model, "full"),
        **{v: made(model, v, slots + 1024) for v in variants},
    }
    for cache in runs.values():
        _fill(cache, widths, slots, dtype)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, cache in runs.items():
            times[name].append(decode_seconds(model, cache, tokens) / tokens)
    say(f"decode with {slots} slots per KV head held, nothing evicted: ms a token, and times stock's speed")
    out = {}
    for name, seconds in times.items():
        ratio = [a / b for a, b in zip(times["stock"], seconds, strict=True)]
        out[name] = {"ms": spread_of([1e3 * t for t in seconds]), "to_stock": spread_of(ratio)}
        say(f"  {name:34s} {text_of(out[name]['ms'], '6.1f')}   x{text_of(out[name]['to_stock'], '.2f')}")
    return out


def _widths(model: Any) -> list[tuple[int, int, int]]:
    """KV heads and widths of keys and values of each bounded layer."""
    from mlx_kvprune.attach import attachment_of

    attachment = attachment_of(model)
    assert attachment is not None
    shapes = [layer.shape for layer in attachment.rung.layers]
    return [(s.n_kv_heads, s.key_dim, s.value_dim) for s in shapes]


def _dtype(model: Any) -> Any:
    """That of the keys and values that the model makes."""
    cache = make_cache(model, "full")
    model(mx.array([[0]]), cache=cache)
    return next(iter(leaves(cache))).state[0].dtype


def _fill(caches: list[Any], widths: list[tuple[int, int, int]], slots: int, dtype: Any) -> None:
    """Put random keys and values into every layer, as a prompt would."""
    for cache, (heads, key_dim, value_dim) in zip(leaves(caches), widths, strict=True):
        for start in range(0, slots, SLICE):
            n = min(SLICE, slots - start)
            keys, values = (mx.random.normal((1, heads, n, d)).astype(dtype) for d in (key_dim, value_dim))
            handle, _ = cache.update_and_fetch(keys, values)
            if pruned([cache]):
                for _ in cache.write_blocks(handle):
                    pass
                cache.fetched = None
            mx.eval(cache.state)
