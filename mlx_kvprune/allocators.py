"""Scores to budgets: how much each layer and head keeps.

``uniform``        every head of every layer the same.
``pyramid``        less with depth: Cai et al. 2024, "PyramidKV" (arXiv 2406.02069), linear from the first layer to the last.
``head_adaptive``  the heads of a layer compete: Feng et al. 2024, "Ada-KV" (arXiv 2407.11550), with its safeguard.
``global``         all heads of all layers compete, each with a floor.

The first two are settled before the first token (``slots_per_layer``), the others at every upkeep (``share_pages``).
Local layers (``settings.local``) hold sinks and ring alone, and take no part; what they leave free goes to the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlx_kvprune.settings import PAGE, CacheSettings, layers_text
from mlx_kvprune.storage import LayerShape, layer_nbytes

STEEPNESS = 20  # PyramidKV's beta: the last layer's pool is 1/20 of the mean


def slots_per_layer(
    shapes: Sequence[LayerShape], settings: CacheSettings, memory: bool, states: Sequence[int]
) -> list[int] | None:
    """Slots per KV head of each layer, everything counted; None if the budget is unbounded.

    Args:
        shapes: of the bounded layers.
        memory: whether the scorer remembers a number per slot.
        states: bytes of each layer's scorer state.

    Raises:
        ValueError: the budget has no room for sinks, window and ring, or all layers are to be local.
    """
    budget = settings.budget
    check_local(settings, len(shapes))
    if budget.nbytes is None and budget.tokens is None:
        return None
    if budget.nbytes is None:
        assert budget.tokens is not None
        mean, more = _freed(settings.check_tokens(budget.tokens), shapes, settings)
        return _with_local(_handed_out(mean, more, shapes, settings), len(shapes), settings)
    by_layer = lambda mean: _with_local(
        _by_layer(mean, len(shapes) - len(settings.local), settings), len(shapes), settings
    )
    nbytes = lambda mean: sum(
        layer_nbytes(s, settings, slots, memory, n) for s, n, slots in zip(shapes, states, by_layer(mean), strict=True)
    )
    least = settings.smallest_budget
    if nbytes(least) > budget.nbytes:
        raise ValueError(
            f"[budget] too small for {len(shapes)} layers of {settings.n_sink} sinks + a ring of {settings.ring_size}; "
            f"got {budget.nbytes} bytes; try {nbytes(least) / 1e6 + 0.05:.1f}MB or more, or a smaller --window"
        )
    most = least
    while nbytes(2 * most) <= budget.nbytes:
        most *= 2
    below, above = most, 2 * most  # nbytes(below) fits, nbytes(above) does not
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if nbytes(middle) <= budget.nbytes else (below, middle)
    return by_layer(below)


def check_local(settings: CacheSettings, n_layers: int) -> None:
    """Raise ``ValueError`` where local layers are not there, or nothing but local ones is."""
    unknown = sorted(layer for layer in settings.local if layer >= n_layers)
    if unknown:
        raise ValueError(
            f"[local-layers] no such layer; got {layers_text(unknown)} of {n_layers} bounded layers; "
            f"try numbers up to {n_layers - 1}"
        )
    if len(settings.local) == n_layers:
        raise ValueError(
            f"[local-layers] all {n_layers} layers would be local, so that nothing is left to choose; got "
            f"{settings.local_layers}; try --policy window"
        )


def _freed(tokens: int, shapes: Sequence[LayerShape], settings: CacheSettings) -> tuple[int, int]:
    """Slots per KV head of the layers that are not local, so that all heads together hold ``tokens`` on average; and slots
    left over."""
    heads = [s.n_kv_heads for s in shapes]
    local = sum(heads[layer] for layer in settings.local)
    total = tokens * sum(heads) - local * (settings.ring_size + settings.n_sink)
    return divmod(total, sum(heads) - local)


def _handed_out(mean: int, more: int, shapes: Sequence[LayerShape], settings: CacheSettings) -> list[int]:
    """Slots of the layers that are not local; the first of them take what is left over, where pages do not come alike."""
    others = [s.n_kv_heads for layer, s in enumerate(shapes) if layer not in settings.local]
    slots = _by_layer(mean, len(others), settings)
    for i, heads in enumerate(others):
        if heads <= more and not settings.ragged:  # pages of all layers must be full at one time
            slots[i], more = slots[i] + 1, more - heads
    return slots


def _with_local(others: list[int], n_layers: int, settings: CacheSettings) -> list[int]:
    """Slots of all layers, from those that are not local."""
    left, fixed = iter(others), settings.ring_size + settings.n_sink
    return [fixed if layer in settings.local else next(left) for layer in range(n_layers)]


def _by_layer(mean: int, n_layers: int, settings: CacheSettings) -> list[int]:
    if settings.allocator == "pyramid":
        return pyramid(mean, n_layers, settings)
    return [mean] * n_layers


def pyramid(mean: int, n_layers: int, settings: CacheSettings) -> list[int]:
    """Slots per KV head that fall linearly with depth, ``mean`` on average."""
    if n_layers == 1:
        return [mean]
    fixed = settings.ring_size + settings.n_sink
    pool = mean - fixed
    least = min(pool, max(settings.smallest_pool, pool // STEEPNESS))
    falling = np.linspace(2 * pool - least, least, n_layers)
    ends = np.floor(np.cumsum(falling) + 1e-6).astype(int)  # whole numbers with the same sum
    return [int(x) + fixed for x in np.diff(ends, prepend=0)]


def floor_pages(pages: int, heads: int, settings: CacheSettings, protected: int = 0) -> int:
    """Pages that every head keeps, of ``pages`` for ``heads``: the safeguard, and room for ``protected`` slots.

    Rounded up: at small budgets a fifth of a share is less than a page, and a head with nothing loses what it is for.
    """
    safeguard, wanted = math.ceil(settings.head_floor * pages / heads), -(-protected // PAGE)
    return min(max(safeguard, wanted), pages // heads)


def share_pages(
    ranked: Sequence[np.ndarray], pages: int, floor: int, units: int, most: int | None = None
) -> np.ndarray:
    """Pages to heads, so that the pages with the best middle slots are held.

    The flat top-k of Ada-KV in whole pages: a head's candidates, best first, are cut into pages; a page is worth its
    middle candidate; the best ``pages`` are given out, the first ``floor`` of every head before all others.

    Args:
        ranked: order keys of each head's candidates, best first.
        pages: how many there are.
        floor: pages of every head that are not up for competition.
        units: candidates that fill a page.
        most: pages that one head may have; None for any number.

    Returns:
        Pages of each head, ``pages`` in all, or fewer if the candidates do not fill them.
    """
    heads, worth, first = [], [], []
    for head, keys in enumerate(ranked):
        n = -(-len(keys) // units) if most is None else min(most, -(-len(keys) // units))
        middle = np.minimum(np.arange(n) * units + units // 2, max(0, len(keys) - 1))
        heads.append(np.full(n, head))
        worth.append(keys[middle])
        first.append(np.arange(n) < floor)
    owner, worth_of, is_floor = (np.concatenate(x) for x in (heads, worth, first))
    best = np.lexsort((worth_of, is_floor))[::-1][:pages]
    return np.bincount(owner[best], minlength=len(ranked))
