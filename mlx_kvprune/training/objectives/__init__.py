"""What each method asks of its gates: how they become biases of the student's logits, and what they cost beside its output."""

from __future__ import annotations

from mlx_kvprune.training.objectives import dms, retention, spkv
from mlx_kvprune.training.objectives.base import Level, Objective

OBJECTIVES = {
    "budget": Objective(retention.budget),
    "decay": Objective(retention.decay, retention.held, level=retention.level),
    "spkv": Objective(spkv.biases, spkv.written_beyond, spkv.LAST, spkv.level),
    "dms": Objective(dms.biases, dms.held_beyond, dms.LED),
}

__all__ = ["OBJECTIVES", "Level", "Objective"]
