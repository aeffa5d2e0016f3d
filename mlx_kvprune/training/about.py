"""What a gate file says of itself."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_kvprune.gates.files import Card
from mlx_kvprune.training.methods import DISTILL
from mlx_kvprune.training.plan import Plan

WOVEN = "invented facts woven into them, generated"
SPOKEN = "conversations that the model had about them"


@dataclass(frozen=True)
class Ran:
    """How a training went.

    Attributes:
        plan: what was asked for.
        seconds: that it took.
        steps: of distillation that were taken.
        held: texts that were held at a time.
        read: texts that were read to train on.
        tokens: that these have together.
        measured: texts that were measured on.
        credits: the files that were trained on, with their licences.
        parent: the card of the gates that it went on from.
    """

    plan: Plan
    seconds: float
    steps: int
    held: int
    read: int
    tokens: int
    measured: int
    credits: tuple[str, ...] = ()
    parent: Card | None = None


def card_of(
    ran: Ran,
    thresholds: dict[str, float],
    rows: Sequence[dict[str, Any]],
    without_outputs: bool = False,
    adapters: Path | None = None,
) -> Card:
    """The card of gates.

    Args:
        ran: how they were trained.
        thresholds: by the share that they keep.
        rows: of held-out measurements.
        without_outputs: some layer's output projection was not found.
        adapters: of the model that learned with them.
    """
    plan, (least, most) = ran.plan, ran.plan.recipe.shares
    budgeted = DISTILL in plan.stages and plan.method == "retention"
    own = ran.credits + ((WOVEN,) if plan.recall else ()) + ((SPOKEN,) if plan.answers else ())
    parent = ran.parent or Card(plan.method)
    return Card(
        method=plan.method,
        model=plan.model,
        stage=_then(parent.stage, "+".join(plan.stages)),
        data=tuple(dict.fromkeys(parent.data + own)),
        tokens=parent.tokens + ran.tokens,
        minutes=_then(parent.minutes, f"{ran.seconds / 60:.1f} on {machine()}"),
        budget=f"1/{1 / most:.0f} to 1/{1 / least:.0f}" if budgeted else "",
        thresholds=thresholds,
        quality=tuple(rows),
        limits=" ".join(limits(ran, without_outputs, adapters)),
        settings={**plan.settings(), "texts_held": ran.held, "steps_done": ran.steps},
    )


def limits(ran: Ran, without_outputs: bool, adapters: Path | None) -> list[str]:
    """What the numbers do not say."""
    plan, length = ran.plan, ran.plan.length
    kind = "other files" if plan.held_out else "held-out parts of the same files"
    found = [f"Quality: KL from the full cache, last 256 tokens of texts of {length} ({ran.measured} of them), {kind}."]
    if plan.recall:
        found.append("Some of these have facts woven into them, too.")
    if plan.answers:
        found.append("None of the held-out texts is a conversation.")
    if DISTILL in plan.stages and not plan.quality:
        found.append("The step at which gates were best was chosen on these texts.")
    if plan.how.has_threshold:
        found.append("Thresholds were set on the same held-out texts.")
    if plan.how.norms:
        found.append("|h_j| is that of the attention's input, after the norm.")
    if without_outputs:
        found.append("No output projection was found in some layers: |v_i| stands for |W_o v_i| there.")
    if adapters:
        found.append(f"Only for the model with the adapters in {adapters.name}: mlx_lm.load(..., adapter_path=...).")
        found.append("KL by budget is from the model as it was, by threshold from the model as it is now.")
    return found


def _then(before: str, now: str) -> str:
    return f"{before}, then {now}" if before else now


def machine() -> str:
    """Where the training ran, in words."""
    if mx.default_device() == mx.Device(mx.DeviceType.gpu):
        return str(mx.device_info().get("device_name", "a GPU"))
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
