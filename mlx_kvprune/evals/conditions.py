"""What is compared: a policy with a budget, and the controls that are always there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvprune.attach import make_cache
from mlx_kvprune.forward import leaves, pruned
from mlx_kvprune.policy import POLICIES, find
from mlx_kvprune.settings import Budget

CONTROLS = ("full", "window", "random")
CHUNK = 256  # tokens of one forward call; which tokens are evicted does not depend on it


@dataclass(frozen=True)
class Condition:
    """One row of a table: a policy, its budget, the seed of what it draws. Other settings are the policy's own.

    Attributes:
        more: further fields of ``CacheSettings`` by name (``kv_bits`` ...).
    """

    policy: str
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether it is mlx-lm's own cache, which everything is compared with."""
        return find(self.policy).scorer is None

    @property
    def needs_question(self) -> bool:
        """Whether the policy must know the question while it reads."""
        scorer = find(self.policy).scorer
        return scorer is not None and "question" in scorer.needs

    def caches(self, model: nn.Module, question: Sequence[int] = ()) -> list[Any]:
        """Fresh caches for one text; ``question`` (token ids) is for policies that probe with it."""
        known = {"question": tuple(question)} if self.needs_question else {}
        return make_cache(model, self.policy, self.budget, seed=self.seed, **known, **dict(self.more))

    def describe(self) -> dict[str, Any]:
        """The fields that name a row."""
        named = {"policy": self.policy, "allocator": "uniform", "budget": str(self.budget), "seed": self.seed}
        return {**named, **dict(self.more)}

    def __str__(self) -> str:
        more = "".join(f" {name}={value}" for name, value in self.more)
        return self.policy if self.is_full else f"{self.policy} {self.budget}{more}"


FULL = Condition("full")


def grid(policies: Iterable[str], budgets: Iterable[int | str | Budget], seed: int = 0) -> list[Condition]:
    """``full`` once, then for every budget the controls and the ``policies``: all of them at equal slots.

    Args:
        policies: names, or ``all``.
        budgets: as a user writes them.

    Raises:
        ValueError: an unknown policy, or no budget.
    """
    named = [find(name).name for name in _expanded(policies)]
    bounded = [name for name in dict.fromkeys((*CONTROLS, *named)) if find(name).scorer is not None]
    parsed = list(dict.fromkeys(Budget.parse(budget) for budget in budgets))
    if not parsed:
        raise ValueError("[budgets] none; got an empty list; try --budgets 256")
    return [FULL, *(Condition(name, budget, seed) for budget in parsed for name in bounded)]


def _expanded(policies: Iterable[str]) -> list[str]:
    names = [name.strip() for name in policies if name.strip()]
    return list(POLICIES) if "all" in names else names


def possible(model: nn.Module, conditions: Iterable[Condition]) -> tuple[list[Condition], list[str]]:
    """The conditions that this model can run, and a note for each of the others.

    Raises:
        ValueError: a control cannot run: the budget is too small, or the model cannot be bounded.
    """
    runnable, notes = [], []
    for condition in conditions:
        try:
            condition.caches(model, question=(0,))
        except ValueError as error:
            if condition.policy in CONTROLS:
                raise
            notes.append(f"{condition} skipped: {error}")
        else:
            runnable.append(condition)
    return runnable, notes


def without_question(conditions: Iterable[Condition]) -> tuple[list[Condition], list[str]]:
    """The conditions that need no question, and a note for each of the others."""
    split: dict[bool, list[Condition]] = {True: [], False: []}
    for condition in conditions:
        split[condition.needs_question].append(condition)
    return split[False], [f"{c} skipped: this task has no question" for c in split[True]]


def held(caches: list[Any]) -> dict[str, int]:
    """What the caches of one text hold, everything counted: ``slots_held, kv_bytes, kv_bytes_peak, kv_bytes_full``.

    Layers that are left alone (sliding window, recurrent) hold the same for every policy, and are not counted.
    """
    from mlx_lm.models.cache import KVCache

    bounded = pruned(caches)
    if bounded:
        return {
            "slots_held": max(c.size() for c in bounded),
            "kv_bytes": sum(c.nbytes for c in bounded),
            "kv_bytes_peak": sum(max(c.nbytes_peak, c.nbytes) for c in bounded),
            "kv_bytes_full": sum(c.nbytes_full for c in bounded),
        }
    plain = [c for c in leaves(caches) if type(c) is KVCache]
    nbytes = sum(c.nbytes for c in plain)
    used = sum(c.nbytes * c.offset // c.keys.shape[2] for c in plain if c.keys is not None)
    seen = max((c.offset for c in plain), default=0)
    return {"slots_held": seen, "kv_bytes": nbytes, "kv_bytes_peak": nbytes, "kv_bytes_full": used}


def settle(caches: list[Any]) -> None:
    """Finish a forward call: evaluate everything that the caches hold."""
    mx.eval([c.state for c in leaves(caches)])


def feed(model: nn.Module, tokens: Sequence[int], caches: list[Any], chunk: int = CHUNK) -> None:
    """Prefill ``tokens`` in chunks; no logits are computed unless the policy needs them."""
    for start in range(0, len(tokens), chunk):
        model(mx.array([list(tokens[start : start + chunk])]), cache=caches)
        settle(caches)
