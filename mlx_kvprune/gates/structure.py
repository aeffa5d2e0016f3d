"""Which layers are local, by what gates say of a text: the share that each head gets of the slots held in common.

Under ``retention`` with allocator ``global`` token i of a head ranks by ``-log(-log beta_i) - log(t - i)``; every head has its
floor, and all heads compete for the rest. A layer of which no head wins anything beyond its floor spends it on tokens that the
gates hold cheap: it may as well hold sinks and ring alone (``local_layers``), and leave its floor to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_kvprune.gates.modules import Gates
from mlx_kvprune.numerics import log_sigmoid
from mlx_kvprune.settings import floor_slots, layers_text

TIMES = 8  # moments of the second half of a text at which slots are counted


@dataclass(frozen=True)
class Structure:
    """What heads hold of a text beside sinks and window, by their gates.

    Attributes:
        kept: slots of each layer's heads, mean over moments ``(H_kv,)`` float64.
        floor: slots that every head keeps whatever its gates say.
        pool: slots that a head would hold if all held the same.
    """

    kept: tuple[np.ndarray, ...]
    floor: int
    pool: int

    @property
    def shares(self) -> list[list[float]]:
        """The share of all slots that each head gets, by layer."""
        total = sum(float(x.sum()) for x in self.kept)
        return [[float(n) / total for n in heads] for heads in self.kept]

    @property
    def local(self) -> tuple[int, ...]:
        """Layers whose every head holds no more than its floor; never all of them."""
        found = tuple(i for i, heads in enumerate(self.kept) if (heads <= self.floor).all())
        return found if len(found) < len(self.kept) else ()

    @property
    def local_layers(self) -> str:
        """The same as ``CacheSettings.local_layers`` has it, and as a card's ``settings["local_layers"]``."""
        return layers_text(self.local)


def structure(
    gates: Gates,
    xs: Sequence[mx.array],
    slots: int,
    *,
    window: int = 64,
    block: int = 128,
    n_sink: int = 4,
    head_floor: float = 0.2,
) -> Structure:
    """What heads would hold of a text under a budget.

    Args:
        gates: of the method ``retention``.
        xs: attention inputs of each bounded layer ``(T, width)``: ``[x.x for x in training.reading.read(...).layers]``.
        slots: the budget, per KV head on average, everything counted.
        window, block, n_sink, head_floor: as in ``CacheSettings``.

    Raises:
        ValueError: the text fits into the budget, or the budget has no room beside window, block and sinks.
    """
    pool, length = slots - window - block - n_sink, xs[0].shape[0]
    if pool < 1 or length - window - n_sink <= pool:
        raise ValueError(
            f"[structure] nothing would be chosen; got {slots} slots for a text of {length} tokens; "
            f"try {window + block + n_sink + 1} to {length - 1} slots, and a longer text"
        )
    worths = [np.array(worth(raw[0])) for raw in gates.all_layers([x[None] for x in xs])]
    return _structure(worths, pool, floor_slots(pool, head_floor), window, n_sink)


def _structure(worths: Sequence[np.ndarray], pool: int, floor: int, window: int, n_sink: int) -> Structure:
    """The same from the static part of scores, of each layer ``(H_kv, T)``."""
    static = np.concatenate(worths)
    last = static.shape[1]
    first = max(last // 2, pool + window + n_sink + 1)  # at which somebody must go
    moments = np.unique(np.linspace(first, last, TIMES).astype(int))
    kept = np.mean([_kept(static[:, :now], pool, floor, window, n_sink) for now in moments], axis=0)
    cuts = np.cumsum([len(x) for x in worths])[:-1]
    return Structure(tuple(np.split(kept, cuts)), floor, pool)


def worth(raw: mx.array) -> mx.array:
    """``-log(-log sigmoid(raw))``: the static part of a retention score's rank; about ``raw`` where that is large."""
    return -mx.log(mx.maximum(-log_sigmoid(raw), 1e-30))


def _kept(static: np.ndarray, pool: int, floor: int, window: int, n_sink: int) -> np.ndarray:
    """Slots of each head when ``T`` tokens were read, from ``(heads, T)``: the floor of each first, then the best of all."""
    heads, now = static.shape
    of = np.arange(n_sink, now - window)
    ranked = -np.sort(np.log(now - of) - static[:, of], axis=1)
    worth = np.where(np.arange(len(of)) < floor, np.inf, ranked).reshape(-1)
    best = np.argsort(-worth, kind="stable")[: heads * pool]
    return np.bincount(best // len(of), minlength=heads)
