"""Who is compared: mlx-lm's own caches as they are, 8 and 4 bits, rotating; and ours, a policy with settings each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_kvprune.attach import hooked, make_cache, make_from_settings, settings_from, slots_for, with_block
from mlx_kvprune.bench.variants import parsed
from mlx_kvprune.forward import leaves
from mlx_kvprune.policy import policy_for
from mlx_kvprune.settings import CacheSettings
from mlx_kvprune.storage import LayerShape, layer_nbytes

STOCK = ("full", "kv8", "kv4", "rotating")
KEEP = 4  # tokens that mlx-lm's rotating cache never overwrites, as with its --max-kv-size
Bytes = Callable[[int], float]


@dataclass(frozen=True)
class Candidate:
    """One way to hold a text.

    Attributes:
        name: ``stock full``, or a policy with settings: ``knorm:kv_bits=4``.
        make: a new list of caches.
        nbytes: bytes of keys and values after so many tokens, computed: what a decode step has to read.
        full: the same of an unpruned cache in the model's own type.
    """

    name: str
    make: Callable[[], list[Any]]
    nbytes: Bytes
    full: Bytes


def check_names(stock: Sequence[str], policies: Sequence[str], budget: str) -> None:
    """Refuse what makes no sense before a model is loaded.

    Raises:
        ValueError: an unknown stock cache, policy or setting, or nobody to compare.
    """
    if unknown := [name for name in stock if name not in STOCK]:
        raise ValueError(f"[stock] not a cache of mlx-lm; got {unknown[0]!r}; try some of: {','.join(STOCK)}")
    if not [*stock, *policies]:
        raise ValueError("[policies] nothing to measure; got none; try --policies window or --stock full")
    for variant in policies:
        _settings(variant, budget)


def candidates(
    model: Any, stock: Sequence[str], policies: Sequence[str], budget: str
) -> tuple[list[Candidate], list[str]]:
    """Those that this model can be given, and a note on each other one.

    Raises:
        ValueError: the budget is too small, or a policy needs what this model cannot give.
    """
    shapes = [layer.shape for layer in hooked(model).rung.layers]
    found, notes = [], []
    for name in stock:
        one = _stock(model, name, shapes, budget)
        found += [] if isinstance(one, str) else [one]
        notes += [f"stock {name} was left out: {one}"] if isinstance(one, str) else []
    return found + [_ours(model, variant, shapes, budget) for variant in policies], notes


def _settings(variant: str, budget: str) -> CacheSettings:
    policy, settings = parsed(variant)
    return settings_from(policy=policy, budget=budget, **settings)


def _ours(model: Any, variant: str, shapes: Sequence[LayerShape], budget: str) -> Candidate:
    policy, settings = policy_for(with_block(model, _settings(variant, budget)))
    slots, scorer, full = slots_for(model, settings), policy.scorer, _of_rows(shapes)
    make = lambda: make_from_settings(model, settings)
    if scorer is None or slots is None:
        return Candidate(variant, make, full, full)

    def nbytes(tokens: int) -> float:
        states = [scorer.state_nbytes(s.n_heads, s.key_dim) for s in shapes]
        layers = zip(shapes, slots, states, strict=True)
        return sum(layer_nbytes(s, settings, min(tokens, n), scorer.memory, state) for s, n, state in layers)

    make()  # refuses now what it would refuse later
    return Candidate(variant, make, nbytes, full)


def _stock(model: Any, name: str, shapes: Sequence[LayerShape], budget: str) -> Candidate | str:
    """One of mlx-lm's own, or why this model cannot be given it."""
    make, full = lambda: make_cache(model, "full"), _of_rows(shapes)
    if name == "full":
        return Candidate("stock full", make, full, full)
    if name == "rotating":
        slots = slots_for(model, _settings("window", budget)) or []
        size = max(slots)
        return Candidate("stock rotating", lambda: _rotating(make(), size), _of_rows(shapes, size), full)
    bits, group = int(name.removeprefix("kv")), group_size(shapes)
    if group is None:
        return "a head's width is no multiple of 32"
    nbytes = _of_rows(shapes, None, bits, group)
    return Candidate(f"stock {name}", lambda: _quantized(make(), bits, group), nbytes, full)


def group_size(shapes: Sequence[LayerShape]) -> int | None:
    """mlx-lm's 64 numbers per scale, 32 where heads are narrower; None where neither divides them."""
    widths = [width for s in shapes for width in (s.key_dim, s.value_dim)]
    return next((group for group in (64, 32) if all(width % group == 0 for width in widths)), None)


def _quantized(caches: list[Any], bits: int, group: int) -> list[Any]:
    """As ``--kv-bits`` with ``--quantized-kv-start 0``: from the first token on."""
    from mlx_lm.models.cache import KVCache

    return [c.to_quantized(group_size=group, bits=bits) if type(c) is KVCache else c for c in caches]


def _rotating(caches: list[Any], size: int) -> list[Any]:
    """As ``--max-kv-size`` of ``size`` tokens, where a model does not ignore it."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    return [RotatingKVCache(max_size=size, keep=KEEP) if type(c) is KVCache else c for c in caches]


def _of_rows(shapes: Sequence[LayerShape], most: int | None = None, bits: int | None = None, group: int = 64) -> Bytes:
    """Bytes of ``tokens`` rows of every bounded layer, of ``most`` at most; quantized rows have two numbers per group."""

    def row(s: LayerShape) -> float:
        width = s.key_dim + s.value_dim
        return s.row_nbytes if bits is None else width * bits / 8 + 2 * s.itemsize * width / group

    each = sum(s.n_kv_heads * row(s) for s in shapes)
    return lambda tokens: each * (tokens if most is None else min(tokens, most))


def held_nbytes(caches: list[Any]) -> int:
    """Bytes that a list of caches has allocated, those of layers with a cache of their own included."""
    return sum(c.nbytes for c in leaves(caches) if not c.empty())  # mlx-lm's own raise before the first token
