"""What is held: a hot ring of the newest tokens and cold pools of the older ones that were kept."""

from mlx_kvprune.slots.choose import Exchange, best_of_spans, exchange, order_key
from mlx_kvprune.slots.format import Format, Rows, plain
from mlx_kvprune.slots.layer import Contest, LayerSlots, PoolSpec, Turn
from mlx_kvprune.slots.pages import Candidates, PagedPool
from mlx_kvprune.slots.parts import PagedPart, Part
from mlx_kvprune.slots.pool import Pool, Writes
from mlx_kvprune.slots.ring import Ring, Tokens

__all__ = [
    "Candidates",
    "Contest",
    "Exchange",
    "Format",
    "LayerSlots",
    "PagedPart",
    "PagedPool",
    "Part",
    "Pool",
    "PoolSpec",
    "Ring",
    "Rows",
    "Tokens",
    "Turn",
    "Writes",
    "best_of_spans",
    "exchange",
    "order_key",
    "plain",
]
