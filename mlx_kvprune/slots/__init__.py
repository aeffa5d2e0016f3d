"""What is held: a hot ring of the newest tokens and a cold pool of the older ones that were kept."""

from mlx_kvprune.slots.choose import Exchange, exchange, order_key
from mlx_kvprune.slots.layer import LayerSlots
from mlx_kvprune.slots.pool import Pool, Writes
from mlx_kvprune.slots.ring import Ring

__all__ = ["Exchange", "LayerSlots", "Pool", "Ring", "Writes", "exchange", "order_key"]
