"""What is held: a hot ring of the newest tokens and cold pools of the older ones that were kept."""

from mlx_kvprune.slots.choose import Exchange, best_of_spans, exchange, order_key
from mlx_kvprune.slots.format import Format, Rows, plain
from mlx_kvprune.slots.layer import Contest, LayerSlots, PoolSpec
from mlx_kvprune.slots.pages import Candidates, PagedPool
from mlx_kvprune.slots.parts import EVERYTHING, Gate, PagedPart, Part, Ranks, Sight
from mlx_kvprune.slots.pool import Pool, Writes
from mlx_kvprune.slots.ring import Ring, Tokens
from mlx_kvprune.slots.tools import Tools

__all__ = [
    "EVERYTHING",
    "Candidates",
    "Contest",
    "Exchange",
    "Format",
    "Gate",
    "LayerSlots",
    "PagedPart",
    "PagedPool",
    "Part",
    "Pool",
    "PoolSpec",
    "Ranks",
    "Ring",
    "Rows",
    "Sight",
    "Tokens",
    "Tools",
    "Writes",
    "best_of_spans",
    "exchange",
    "order_key",
    "plain",
]
