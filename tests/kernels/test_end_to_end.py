"""Models that run through the kernels on the emulator: the same logits as through plain MLX operations."""

from __future__ import annotations

import copy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from attend_cases import recorded
from metal_emulator import Emulator, unavailable
from tiny_models import tiny_model

import mlx_kvprune as kvp
from mlx_kvprune.kernels import checks, launch

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")
SETTINGS = [
    {"policy": "window"},
    {"policy": "h2o"},
    {"policy": "tova", "kv_bits": 4},
    {"policy": "knorm", "kv_bits": 3, "allocator": "head_adaptive"},
    {"policy": "knorm", "kv_bits": 4, "positions": "cache"},
    {"policy": "snapkv", "kv_bits": 2, "kv_fine_tokens": 32, "kv_fine_bits": 8},
    {"policy": "knorm", "kv_key_bits": 4, "kv_scheme": "page", "allocator": "global"},
]


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", head_dim=32)
    kvp.attach(model, quiet=True)
    return model


def logits(model, settings, n_prompt: int = 230, n_decode: int = 40) -> np.ndarray:
    """Of each decoded token, after a prompt that evicts."""
    cache = kvp.make_cache(model, budget=192, **settings)
    tokens = mx.random.randint(0, 50, (1, n_prompt + n_decode), key=mx.random.key(3))
    model(tokens[:, :n_prompt], cache=cache)
    rows = [model(tokens[:, i : i + 1], cache=cache)[0, -1] for i in range(n_prompt, n_prompt + n_decode)]
    return np.array(mx.stack(rows).astype(mx.float32))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_logits_are_those_of_plain_operations(model, settings):
    wanted = logits(model, settings)
    with recorded() as recorder:
        found = logits(model, settings)
    assert np.abs(found - wanted).max() < 2e-4
    used = set(recorder.reports)
    assert {"attend_slots", "merge_slots"} <= used
    assert ("pack_rows" in used) == ("kv_bits" in settings or "kv_key_bits" in settings)
    assert ("choose_slots" in used) == (settings.get("allocator", "uniform") == "uniform")
    assert ("slot_mass" in used) == (settings["policy"] in ("h2o", "tova"))


def test_a_pool_of_few_slots_is_left_to_plain_operations(model):
    """Of which scales are fewer numbers than a kernel can be handed."""
    for budget in (116, 192):
        cache = kvp.make_cache(model, "knorm", budget=budget, kv_bits=4, kv_group_size=32, block=32)
        cache[0].held.specs = tuple(replace(spec, limit=min(spec.limit, 1)) for spec in cache[0].held.specs)
        tokens = mx.random.randint(0, 50, (1, 300), key=mx.random.key(3))
        wanted = np.array(model(tokens, cache=copy.deepcopy(cache)))
        with recorded() as recorder:
            found = np.array(model(tokens, cache=cache))
        assert np.abs(found - wanted).max() < 2e-4
        assert cache[0].held.last.count == 1 and "attend_slots" in recorder.reports


def test_launches_of_a_decoded_token(model):
    """Two of ``attend_slots`` (ring and pool) and one of ``merge_slots`` a layer; none beside while nothing is evicted."""
    with recorded() as recorder:
        cache = kvp.make_cache(model, "knorm", budget=192, kv_bits=4)
        model(mx.zeros((1, 250), mx.int32), cache=cache)
        mx.eval([c.state for c in cache])
        recorder.reports.clear()
        mx.eval(model(mx.zeros((1, 1), mx.int32), cache=cache))
        n = {name: len(reports) for name, reports in recorder.reports.items()}
    layers = len(cache)
    assert n == {"attend_slots": 2 * layers, "merge_slots": layers}


@pytest.mark.parametrize("name", checks.MODULES)
def test_self_checks_pass(name):
    with recorded() as recorder:
        check = checks.checks()[name]
        assert check.run() <= check.limit
    assert recorder.reports


@pytest.mark.parametrize(
    ("name", "bits", "settings"),
    [("slot_mass", None, {"policy": "h2o"}), ("attend_slots", 4, {"policy": "knorm", "kv_bits": 4})],
)
def test_a_variant_that_does_not_compile_costs_a_warning_and_no_answer(model, monkeypatch, name, bits, settings):
    """The self-check compiles one variant only; others fail where they are first used."""
    monkeypatch.setattr(checks, "_proven", set())
    monkeypatch.setattr(checks, "_warned", set())
    wanted, emulator = logits(model, settings, n_decode=3), Emulator()

    def build(**definition):
        kernel = emulator.metal_kernel(**definition)

        def call(template, **launch):
            if definition["name"] == name and bits in (None, dict(template)["KEY_BITS"]):
                raise RuntimeError("Unable to build metal library")
            return kernel(template=template, **launch)

        return call

    with launch.stand_in(build), pytest.warns(RuntimeWarning, match="kernel attend_slots is off"):
        assert np.abs(logits(model, settings, n_decode=3) - wanted).max() < 2e-4


def test_the_report_says_so(model):
    cache = kvp.make_cache(model, "knorm", budget=128)
    model(mx.zeros((1, 200), mx.int32), cache=cache)
    assert (kvp.report(cache).attend_backend, kvp.report(cache).attend_reason) == ("ops", checks.NO_GPU)
    with recorded():
        assert kvp.report(cache).attend_backend == "kernel"
    assert launch.engine() == ""
