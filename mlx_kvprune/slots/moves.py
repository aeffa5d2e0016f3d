"""Which units of which pages are overwritten when heads hold differently much: plain NumPy, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NOBODY = -1


@dataclass(frozen=True)
class Moves:
    """What changes in a pool of pages. A unit is what is written together: a slot, or a whole page.

    Attributes:
        owner: head that owns each page afterwards ``(P',)``; ``NOBODY`` where a page is left over.
        kept: units that stay as they are ``(P', units)`` bool.
        new: where new tokens go ``(k,)``, flat unit indices.
        new_from: and which they are ``(k,)``, flat indices into ``(heads, n)``.
        old: where units of pages that were given up go ``(j,)``.
        old_from: and where they stood ``(j,)``.
    """

    owner: np.ndarray
    kept: np.ndarray
    new: np.ndarray
    new_from: np.ndarray
    old: np.ndarray
    old_from: np.ndarray


def worst_kept(ranked: np.ndarray, room: int) -> int:
    """The order key from which on a head keeps its units: no two are alike.

    Args:
        ranked: order keys of all it could keep, best first.
        room: how many may stay.
    """
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    if room <= 0:
        return most
    return least if len(ranked) <= room else int(ranked[room - 1])


def plan(owner: np.ndarray, kept: np.ndarray, new: np.ndarray, targets: np.ndarray) -> Moves:
    """Give every head its number of pages, with what it keeps in them.

    A head that loses pages gives up those in which it keeps least; what it keeps there moves into its other pages. Pages
    that nobody needs are left to ``NOBODY``.

    Args:
        owner: head of each page ``(P,)``.
        kept: units that are kept ``(P, units)`` bool.
        new: new units that are kept ``(heads, n)`` bool.
        targets: pages of each head afterwards ``(heads,)``; each head's kept units fit into them.
    """
    owner, kept, units = owner.copy(), kept.copy(), kept.shape[1]
    moved = [_give_up(owner, kept, h, t) for h, t in enumerate(targets)]
    spare = np.flatnonzero(owner == NOBODY).tolist()
    missing = sum(max(0, t - int((owner == h).sum())) for h, t in enumerate(targets)) - len(spare)
    if missing > 0:
        spare += range(len(owner), len(owner) + missing)
        owner = np.concatenate([owner, np.full(missing, NOBODY, owner.dtype)])
        kept = np.concatenate([kept, np.zeros((missing, units), bool)])
    lists: list[list[np.ndarray]] = [[], [], [], []]
    for head, target in enumerate(targets):
        take = target - int((owner == head).sum())
        for _ in range(take):
            owner[spare.pop(0)] = head
        pages = np.flatnonzero(owner == head)
        free = (pages[:, None] * units + np.arange(units))[~kept[pages]]
        old_from, new_from = moved[head], head * new.shape[1] + np.flatnonzero(new[head])
        n_old, n_new = len(old_from), len(new_from)
        assert n_old + n_new <= len(free), "a head keeps more than its pages hold"
        for found, x in zip(lists, (free[n_old : n_old + n_new], new_from, free[:n_old], old_from), strict=True):
            found.append(x)
    return Moves(owner, kept, *(np.concatenate(x).astype(np.int64) for x in lists))


def _give_up(owner: np.ndarray, kept: np.ndarray, head: int, target: int) -> np.ndarray:
    """Leave the emptiest pages beyond ``target`` to nobody; returns the flat indices of what was kept there."""
    pages = np.flatnonzero(owner == head)
    if len(pages) <= target:
        return np.zeros(0, np.int64)
    emptiest = pages[np.argsort(kept[pages].sum(axis=1), kind="stable")][: len(pages) - target]
    moved = (emptiest[:, None] * kept.shape[1] + np.arange(kept.shape[1]))[kept[emptiest]]
    owner[emptiest], kept[emptiest] = NOBODY, False
    return moved
