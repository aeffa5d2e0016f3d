"""What is compared: a policy with a budget, and the controls that are always there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvprune.attach import gates_of, hooked, make_cache, settings_from
from mlx_kvprune.documents import prefill
from mlx_kvprune.forward import leaves
from mlx_kvprune.gates import Gates
from mlx_kvprune.gates.files import method_at, threshold_of
from mlx_kvprune.policy import POLICIES, Policy, find, knows_question
from mlx_kvprune.report import CacheReport, report
from mlx_kvprune.settings import Budget

CONTROLS = ("full", "window", "random")
CHUNK = 256  # tokens of one forward call; which tokens are evicted does not depend on it


@dataclass(frozen=True)
class Condition:
    """One row of a table: a policy, its budget, the seed of what it draws. Other settings are the policy's own.

    Attributes:
        more: further fields of ``CacheSettings`` by name (``allocator``, ``kv_bits`` ...); an allocator that is not named
            is the policy's own.
        share: the budget as a fraction of the text (``1/4``), if that is how it was asked for.
    """

    policy: str
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    more: tuple[tuple[str, Any], ...] = ()
    share: str = ""

    @property
    def is_full(self) -> bool:
        """Whether it is mlx-lm's own cache, which everything is compared with."""
        return find(self.policy).scorer is None

    @property
    def needs_question(self) -> bool:
        """Whether the policy must know the question while it reads."""
        return knows_question(self.policy)

    def settings(self, question: Sequence[int] = (), **more: Any) -> dict[str, Any]:
        """Arguments of ``make_cache``; ``question`` (token ids) is for policies that probe with it."""
        known = {"question": tuple(question)} if self.needs_question else {}
        named = {"policy": self.policy, "budget": self.budget, "seed": self.seed}
        return {**named, **known, **dict(self.more), **more}

    def caches(self, model: nn.Module, question: Sequence[int] = (), **more: Any) -> list[Any]:
        """Fresh caches for one text; ``more`` are further settings."""
        return make_cache(model, **self.settings(question, **more))

    def describe(self) -> dict[str, Any]:
        """The fields that name a row."""
        named = {"policy": self.policy, "allocator": self.allocator, "budget": str(self.budget), "seed": self.seed}
        return {**dict(self.more), **named, **({"share": self.share} if self.share else {})}

    @property
    def allocator(self) -> str:
        """How the budget is shared: as said, or the policy's own way."""
        said = dict(self.more).get("allocator", "auto")
        return find(self.policy).allocator if said == "auto" else said

    def __str__(self) -> str:
        more = "".join(f" {name}={value}" for name, value in self.more)
        share = f" ({self.share})" if self.share else ""
        return self.policy if self.is_full else f"{self.policy} {self.budget}{share}{more}"


FULL = Condition("full")


def grid(
    policies: Iterable[str],
    budgets: Iterable[int | str | Budget],
    seed: int = 0,
    *,
    allocators: Iterable[str] = ("auto",),
    bits: Iterable[int | None] = (None,),
    length: int | None = None,
    gates: Iterable[str] = (),
    local_layers: str = "",
    threshold: str = "",
    **more: Any,
) -> list[Condition]:
    """``full`` once, then for every budget the controls and the ``policies``: all of them at equal slots.

    The controls come along at every precision, shared out uniformly; the policies with every allocator.

    Args:
        policies: names, or ``all``.
        allocators: for each policy; ``auto`` is its own.
        budgets: as a user writes them; fractions (``1/4``) are of ``length``.
        bits: of stored keys and values; None for the model's own type.
        length: of the text, in tokens.
        gates: where gates are, for the policies that ask some: one condition for each place.
        local_layers: for the policies, not for the controls.
        threshold: of the policies that drop by one: a number, or a share that the card of ``gates`` knows.
        more: further fields of ``CacheSettings``, for all of them.

    Raises:
        ValueError: an unknown policy, or no budget.
    """
    named = [find(name).name for name in expanded(policies)]
    bounded = [name for name in dict.fromkeys(named) if find(name).scorer is not None]
    parsed = list(dict.fromkeys(_sized(budget, length) for budget in budgets))
    if not parsed:
        raise ValueError("[budgets] none; got an empty list; try --budgets 256")
    for_policies = {"local_layers": local_layers} if local_layers else {}
    places = [{"gates": place} for place in gates] or [{}]

    def least(policy: Policy, place: str) -> dict[str, float]:
        if not threshold or not policy.drops:
            return {}
        if "/" in threshold and len(places) > 1 and method_at(place, policy.gates) != policy.gates:
            return {}  # a share that its card does not know; with gates of another method it is left out later
        return {"threshold": threshold_of(threshold, place, policy.gates)}

    def own(name: str) -> list[dict[str, Any]]:
        local, policy = {} if name in CONTROLS else for_policies, find(name)
        return [
            {**local, **place, **least(policy, place.get("gates", ""))} for place in (places if policy.gates else [{}])
        ]

    wanted = [
        Condition(name, budget, seed, _settings(name, allocator, width, {**more, **mine}), share)
        for budget, share in parsed
        for width in bits
        for allocator, names in _by_allocator(bounded, allocators)
        for name in names
        for mine in own(name)
    ]
    return list(dict.fromkeys([FULL, *wanted]))


def _by_allocator(policies: list[str], allocators: Iterable[str]) -> list[tuple[str, list[str]]]:
    controls = [name for name in CONTROLS if name != "full"]
    return [("uniform", controls), *((allocator, policies) for allocator in allocators)]


def _settings(policy: str, allocator: str, bits: int | None, more: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What differs from the policy's defaults, so that equal conditions are equal."""
    named = {} if allocator in ("auto", find(policy).allocator) else {"allocator": allocator}
    return tuple({**named, **({} if bits is None else {"kv_bits": bits}), **more}.items())


def _sized(budget: int | str | Budget, length: int | None) -> tuple[Budget, str]:
    """A budget, and the fraction that it was written as."""
    share = fraction(budget)
    if share is None:
        return Budget.parse(budget), ""
    if length is None:
        raise ValueError(f"[budgets] a fraction of what; got {budget!r} and no text; try a number of tokens")
    return Budget(tokens=max(1, int(length * share))), str(share)


def fraction(budget: int | str | Budget) -> Fraction | None:
    """The fraction that a budget is written as (``1/4``), or None.

    Raises:
        ValueError: not between 0 and 1.
    """
    if not isinstance(budget, str) or "/" not in budget:
        return None
    try:
        share = Fraction(budget.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ValueError(f"[budgets] not a fraction of the text; got {budget!r}; try 1/4")
    return share


def expanded(policies: Iterable[str]) -> list[str]:
    """Names of policies, where ``all`` stands for all of them."""
    names = [name.strip() for name in policies if name.strip()]
    return list(POLICIES) if "all" in names else names


def possible(model: nn.Module, conditions: Iterable[Condition]) -> tuple[list[Condition], list[str]]:
    """The conditions that this model can run, and a note for each of the others.

    Raises:
        ValueError: no bounded one can run: the budgets are too small, or the model cannot be bounded.
    """
    conditions, notes = with_gates(model, conditions)
    runnable, problem = [], None
    for condition in conditions:
        try:
            condition.caches(model, question=(0,))
        except ValueError as error:
            problem = problem or error
            notes.append(f"{condition} skipped: {error}")
        else:
            runnable.append(condition)
    if problem is not None and all(c.is_full for c in runnable):
        raise problem
    return runnable, notes


def with_gates(model: nn.Module, conditions: Iterable[Condition]) -> tuple[list[Condition], list[str]]:
    """The conditions whose gates, if they need any, this model has; one note for each policy whose gates it lacks,
    and for each file that serves nobody.

    Of several files each is tried with each policy: that one serves another policy, which has what it needs, is no news.
    """
    kept, missing = [], {}
    place = lambda condition: dict(condition.more).get("gates", "")
    for condition in conditions:
        asked = condition.policy, place(condition)
        try:
            if asked not in missing:
                gate_bytes(model, condition)
        except ValueError as error:
            missing[asked] = error
        if asked not in missing:
            kept.append(condition)
    served, used = {c.policy for c in kept}, {place(c) for c in kept}
    lacking = [(policy, error) for (policy, _), error in missing.items() if policy not in served]
    idle = {where: error for (policy, where), error in missing.items() if policy in served and where not in used}
    return kept, [f"{name} skipped: {error}" for name, error in (*lacking, *idle.items())]


def gate_id(model: nn.Module, condition: Condition) -> str:
    """Tells the gates that a condition asks from others that may lie in the same file later; empty if it asks none."""
    gates = _gates(model, condition)
    return "" if gates is None else gates.identity()


def gate_bytes(model: nn.Module, condition: Condition) -> int:
    """Bytes of the learned gates that a condition's policy asks; they belong to the model and are in no budget.

    Raises:
        ValueError: the model has no such gates, or cannot be bounded.
    """
    gates = _gates(model, condition)
    return 0 if gates is None else gates.nbytes


def _gates(model: nn.Module, condition: Condition) -> Gates | None:
    """The gates that a condition asks, if its policy asks any."""
    if not find(condition.policy).gates:
        return None
    hooked(model)
    return gates_of(model, settings_from(policy=condition.policy, gates=dict(condition.more).get("gates", "")))


def without_question(conditions: Iterable[Condition]) -> tuple[list[Condition], list[str]]:
    """The conditions that need no question, and a note for each of the others."""
    split: dict[bool, list[Condition]] = {True: [], False: []}
    for condition in conditions:
        split[condition.needs_question].append(condition)
    return split[False], [f"{c} skipped: this task has no question" for c in split[True]]


SIZES = ("slots_held", "kv_bytes", "kv_bytes_peak", "kv_bytes_full")


def held(caches: list[Any]) -> dict[str, int]:
    """What the caches of one text hold, everything counted: ``slots_held, kv_bytes, kv_bytes_peak, kv_bytes_full``.

    Layers that are left alone (sliding window, recurrent) hold the same for every policy, and are not counted.
    """
    return sizes(report(caches))


def sizes(found: CacheReport) -> dict[str, int]:
    """The fields of ``SIZES``."""
    return {name: getattr(found, name) for name in SIZES}


def finish(caches: list[Any]) -> None:
    """Finish a forward call: evaluate everything that the caches hold."""
    mx.eval([c.state for c in leaves(caches)])


def feed(model: nn.Module, tokens: Sequence[int], caches: list[Any], chunk: int = CHUNK) -> None:
    """Prefill ``tokens`` in chunks; no logits are computed unless the policy needs them."""
    prefill(model, list(tokens), caches, step=chunk)
