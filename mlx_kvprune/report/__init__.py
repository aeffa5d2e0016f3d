"""What a cache holds, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlx_kvprune.cache import PrunedKVCache
from mlx_kvprune.forward import leaves, pruned


@dataclass(frozen=True)
class CacheReport:
    """State of a list of caches.

    Attributes:
        policy: its name; ``full`` for mlx-lm's own caches.
        allocator: how the budget is shared.
        budget: as the user wrote it: tokens per KV head, or bytes with a unit.
        tokens_seen: tokens of the text so far; of the longest in a batch.
        slots_held: the most that any KV head holds.
        kv_bytes: bytes held now by the layers that the budget is about, everything counted.
        kv_bytes_peak: the most that was held after any forward call.
        kv_bytes_full: what an unpruned cache in the model's own type would hold for the same tokens.
        kv_bytes_other: bytes of the layers that are left alone (sliding window, recurrent).
        layers: how many layers are bounded.
        attend_backend: how a decode step attends.
        attend_reason: why.
    """

    policy: str
    allocator: str
    budget: str
    tokens_seen: int
    slots_held: int
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_full: int
    kv_bytes_other: int
    layers: int
    attend_backend: str
    attend_reason: str

    def to_dict(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)


def report(cache: list[Any]) -> CacheReport:
    """What the caches of one conversation, or of a batch of them, hold; bounded ones, or mlx-lm's own.

    Args:
        cache: the list that ``model.make_cache()`` or ``make_cache(model)`` returned.

    Raises:
        ValueError: not a list of caches.
    """
    if not isinstance(cache, list | tuple) or not cache:
        raise ValueError(f"[report] not a list of caches; got {type(cache).__name__}; try report(model.make_cache())")
    if not all(hasattr(c, "nbytes") for c in leaves(cache)):
        raise ValueError(f"[report] not a list of caches; got {cache[0]!r}; try report(model.make_cache())")
    bounded = pruned(cache)
    if not bounded:
        return _report_stock(cache)
    first = bounded[0]
    backend, reason = ("model", "the model does its own attention") if first.dense else first.backend()
    return CacheReport(
        policy=first.settings.policy,
        allocator=first.settings.allocator,
        budget=str(first.settings.budget),
        tokens_seen=max(c.tokens_seen for c in bounded),
        slots_held=max(c.size() for c in bounded),
        kv_bytes=sum(c.nbytes for c in bounded),
        kv_bytes_peak=max(first.nbytes_peak_all, sum(c.nbytes for c in bounded))
        if first.nbytes_peak_all
        else sum(max(c.nbytes_peak, c.nbytes) for c in bounded),
        kv_bytes_full=sum(c.nbytes_full for c in bounded),
        kv_bytes_other=sum(c.nbytes for c in leaves(cache) if not isinstance(c, PrunedKVCache)),
        layers=len({c.layer for c in bounded}),
        attend_backend=backend,
        attend_reason=reason,
    )


def _report_stock(cache: list[Any]) -> CacheReport:
    from mlx_lm.models.cache import KVCache

    plain = [c for c in leaves(cache) if type(c) is KVCache]
    nbytes = sum(c.nbytes for c in plain)
    used = sum(c.nbytes * c.offset // c.keys.shape[2] for c in plain if c.keys is not None)
    seen = max((c.offset for c in plain), default=0)
    other = sum(c.nbytes for c in leaves(cache)) - nbytes
    reason = "mlx-lm's own cache"
    return CacheReport(
        "full", "uniform", "unbounded", seen, seen, nbytes, nbytes, used, other, len(plain), "fused", reason
    )
