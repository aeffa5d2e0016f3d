"""Random gates for tiny models, and settings under which gated policies are compared with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvprune.attach import attachment_of, hooked, use_gates
from mlx_kvprune.gates import Gates, GateShape

FORM = {"retention": "shared", "spkv": "mlp", "kvzap": "linear", "fastkvzip": "sink", "dms": "dms"}
GATED = tuple(FORM)


def random_gates(
    form: str, heads: Sequence[int] = (2, 2), seed: int = 0, start: float = 0.0, width: int = 128
) -> Gates:
    """Gates whose answers vary from token to token and from head to head."""
    gates = Gates(GateShape(form, (width,) * len(heads), tuple(heads), (2,) * len(heads), hidden=8), start)
    rng = np.random.default_rng(seed)
    moved = lambda x: mx.array((np.array(x) + 0.1 * rng.normal(size=x.shape)).astype(np.float32))
    gates.restore({name: moved(x) for name, x in gates.arrays().items()})
    return gates


def given_gates(model: nn.Module, policies: Sequence[str] = GATED, **more) -> None:
    """Random gates for a model of any shape, in the form that each policy was published with."""
    hooked(model)
    attachment = attachment_of(model)
    assert attachment is not None
    heads = [layer.shape.n_kv_heads for layer in attachment.rung.layers]
    for policy in policies:
        use_gates(model, policy, random_gates(FORM[policy], heads, **more))


# As the policies without gates are: the same number of slots for every head, ring and window as theirs, and all slots used.
LIKE_OTHERS: dict[str, dict[str, Any]] = {
    policy: {
        "allocator": "uniform",
        "window": 64,
        "block": 32,
        **({} if policy == "retention" else {"threshold": None}),
    }
    for policy in GATED
}
