"""Equal resident bytes: what each condition may hold, so that all of them hold what ``window`` holds at that budget.

Policies keep more than slots: the last queries of ``snapkv``, a memory beside each slot, page tables of ragged heads. At
equal slots these are free; at equal bytes they are paid for in slots, and stored in fewer bits more slots fit. Learned gates
are weights of the model and are not counted; rows name their bytes beside (``gate_bytes``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import mlx.nn as nn

from mlx_kvprune.attach import attachment_of, hooked, settings_from, slots_for, state_nbytes
from mlx_kvprune.evals.conditions import Condition
from mlx_kvprune.policy import policy_for
from mlx_kvprune.settings import Budget
from mlx_kvprune.storage import layer_nbytes


def planned_nbytes(model: nn.Module, condition: Condition) -> float:
    """Bytes that a condition's caches hold when they are full, by the formulas that budgets in bytes go by.

    Raises:
        ValueError: the model or the combination refuses, or the budget is too small.
    """
    hooked(model)
    policy, settings = policy_for(settings_from(**condition.settings(question=(0,))))
    slots = slots_for(model, settings)
    attachment = attachment_of(model)
    assert slots is not None and attachment is not None and policy.scorer is not None
    states = state_nbytes(attachment.rung, policy.scorer)
    return sum(
        layer_nbytes(layer.shape, settings, n, policy.scorer.memory, state)
        for layer, n, state in zip(attachment.rung.layers, slots, states, strict=True)
    )


def levelled(model: nn.Module, conditions: Iterable[Condition]) -> tuple[list[Condition], list[str]]:
    """The conditions with budgets (in tokens) that take the bytes of ``window`` at theirs; notes on those that cannot."""
    kept, notes = [], []
    for condition in conditions:
        if condition.is_full or condition.budget.tokens is None:
            kept.append(condition)
            continue
        try:
            kept.append(_levelled(model, condition))
        except ValueError as error:
            notes.append(f"{condition} skipped: {error}")
    return kept, notes


def _levelled(model: nn.Module, condition: Condition) -> Condition:
    target = planned_nbytes(model, _plain_window(condition))
    tokens = most_tokens(model, condition, target)
    return replace(condition, budget=Budget(tokens=tokens))


def _plain_window(condition: Condition) -> Condition:
    """The control whose bytes count: as long a window and as many sinks, uniform, not quantized."""
    shape = tuple((name, value) for name, value in condition.more if name in ("n_sink", "window", "block"))
    return Condition("window", condition.budget, condition.seed, shape)


def most_tokens(model: nn.Module, condition: Condition, nbytes: float) -> int:
    """The largest budget in tokens per KV head whose bytes are at most ``nbytes``.

    Raises:
        ValueError: the model or the combination refuses, or not even the smallest budget fits.
    """
    at = lambda tokens: planned_nbytes(model, replace(condition, budget=Budget(tokens=tokens)))
    below = _smallest(model, condition)
    if at(below) > nbytes:
        raise ValueError(f"[budget] needs {at(below) / 1e6:.2f} MB at least; got {nbytes / 1e6:.2f}; try more")
    above = 2 * below
    while at(above) <= nbytes:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if at(middle) <= nbytes else (below, middle)
    return below


def _smallest(model: nn.Module, condition: Condition) -> int:
    """The smallest budget in tokens that is accepted; blocks grow with budgets, so that it is looked for."""
    hooked(model)
    tokens = 1
    while True:
        settings = settings_from(**replace(condition, budget=Budget(tokens=tokens)).settings(question=(0,)))
        if settings.smallest_budget <= tokens:
            return tokens
        tokens = settings.smallest_budget
