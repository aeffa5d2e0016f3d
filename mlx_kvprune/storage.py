"""What a layer's storage is made of, and how many bytes that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_kvprune.kernels import TOOLS
from mlx_kvprune.quantize import Codec
from mlx_kvprune.settings import PAGE, CacheSettings
from mlx_kvprune.slots import PoolSpec

UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class LayerShape:
    """What one bounded layer stores.

    Attributes:
        n_heads: query heads.
        n_kv_heads: KV heads.
        key_dim: width of a key.
        value_dim: width of a value.
        itemsize: bytes of one element.
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of one slot's key and value in the model's own type."""
        return (self.key_dim + self.value_dim) * self.itemsize


def pool_specs(settings: CacheSettings, slots: int | None, sifted: bool = False) -> tuple[PoolSpec, ...]:
    """The pools of a layer that holds ``slots`` per KV head with its ring and sinks; None for no bound.

    Args:
        sifted: whether the scorer has a threshold, below which tokens are dropped.
    """
    limit = UNBOUNDED if slots is None else slots - settings.ring_size - settings.n_sink
    fine = settings.kv_fine_tokens
    keys, values = key_codec(settings, settings.key_bits), value_codec(settings, settings.value_bits)
    coarse = PoolSpec(limit - fine, keys, values, settings.ragged, TOOLS, sifted and settings.ragged)
    if not fine:
        return (coarse,)
    bits = settings.kv_fine_bits
    return (PoolSpec(fine, key_codec(settings, bits), value_codec(settings, bits), tools=TOOLS), coarse)


def key_codec(settings: CacheSettings, bits: int | None) -> dict[str, Any]:
    """Arguments of the keys' codec."""
    if bits is None:
        return {}
    auto = "channel" if bits <= AUTO_CHANNEL else "token"
    scheme = auto if settings.kv_scheme == "auto" else settings.kv_scheme
    return {"bits": bits, "group_size": settings.kv_group_size, "scheme": scheme, "hadamard": _hadamard(settings)}


def value_codec(settings: CacheSettings, bits: int | None) -> dict[str, Any]:
    """Arguments of the values' codec."""
    if bits is None:
        return {}
    return {"bits": bits, "group_size": settings.kv_group_size, "hadamard": _hadamard(settings)}


def _hadamard(settings: CacheSettings) -> bool:
    return AUTO_HADAMARD if settings.kv_hadamard is None else settings.kv_hadamard


AUTO_CHANNEL, AUTO_HADAMARD = 4, True  # docs/quantization.md has the table that says so


def layer_nbytes(shape: LayerShape, settings: CacheSettings, tokens: int, memory: bool, state: int) -> float:
    """Bytes that one layer holds at most with ``tokens`` slots per KV head: ring, pools, tables, memory, state."""
    heads, ring = shape.n_kv_heads, settings.ring_size + settings.n_sink
    total = heads * ring * (shape.row_nbytes + 4 * memory) + 4 * ring + state
    if settings.local and tokens <= ring:  # a layer without a pool
        return total
    for spec in pool_specs(settings, max(tokens, ring)):
        total += heads * max(0, spec.limit) * slot_nbytes(shape, spec, memory, settings.positions == "cache")
        total += _fixed_nbytes(shape, spec)
    return total


def slot_nbytes(shape: LayerShape, spec: PoolSpec, memory: bool, ranked: bool) -> float:
    """Bytes of one slot of a pool: key, value, position, what the scorer remembers, rank, its share of page tables."""
    keys, values = Codec(shape.key_dim, **spec.keys), Codec(shape.value_dim, **spec.values)
    total = keys.row_nbytes(shape.itemsize) + values.row_nbytes(shape.itemsize) + 4 + 4 * memory + 4 * ranked
    return total + (_page_nbytes(shape) / PAGE if spec.ragged else 0)


def _page_nbytes(shape: LayerShape) -> int:
    """Owner (twice), place in the table, rows of table and one-hot matrix at their widest, a mask of partly full pages."""
    return 3 * 4 + 2 * 4 * shape.n_kv_heads + PAGE


def _fixed_nbytes(shape: LayerShape, spec: PoolSpec) -> int:
    return Codec(shape.key_dim, **spec.keys).frame_nbytes(shape.n_kv_heads)
