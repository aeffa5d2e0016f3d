"""The first layers of SmolLM2-135M through the kernels on the emulator: the logits of plain MLX operations."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from attend_cases import recorded
from metal_emulator import unavailable

import mlx_kvprune as kvp

pytestmark = [pytest.mark.model, pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")]
LAYERS, PROMPT, DECODED = 3, 400, 4


@pytest.fixture(scope="module")
def model():
    model, _ = kvp.load("smollm2-135m", dtype="float32")
    model.model.layers = model.model.layers[:LAYERS]
    kvp.attach(model, quiet=True)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"kv_bits": 4}, {"kv_bits": 4, "allocator": "head_adaptive", "positions": "cache"}], ids=str
)
def test_logits(model, settings):
    tokens = mx.random.randint(0, 40_000, (1, PROMPT + DECODED), key=mx.random.key(0))
    cache = kvp.make_cache(model, "knorm", budget=256, **settings)
    model(tokens[:, :PROMPT], cache=cache)
    mx.eval([c.state for c in cache])

    def decoded(cache) -> np.ndarray:
        return np.array(
            mx.stack([model(tokens[:, i : i + 1], cache=cache)[0, -1] for i in range(PROMPT, PROMPT + DECODED)])
        )

    wanted = decoded(kvp.fork(cache))
    with recorded() as recorder:
        found = decoded(kvp.fork(cache))
    assert recorder.reports["attend_slots"]
    assert np.abs(found - wanted).max() <= 2e-4 * np.abs(wanted).max()
