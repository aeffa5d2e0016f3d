"""The kernels on a real GPU: ``python -m pytest -m metal -n 0`` on a Mac, ``make test-gpu`` on either.

Nothing of this has run: no Mac and no GPU was at hand.
"""

import mlx.core as mx
import numpy as np
import pytest
from attend_cases import Case, exact, online, run
from tiny_models import tiny_model

import mlx_kvprune as kvp
from mlx_kvprune.kernels import checks, launch

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
pytestmark = [
    pytest.mark.metal,
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU: MLX runs on the CPU"),
]
ROUNDING = {mx.float32: 2.0**-22, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
CASES = [
    *(Case(slots=n) for n in (0, 1, 31, 32, 33, 511, 2049, 9000)),
    *(Case(slots=(n, 33), bits=(bits, bits)) for n in (0, 500) for bits in (8, 6, 5, 4, 3, 2)),
    *(Case(width=width, bits=(4, 4), scheme="channel") for width in (64, 80, 96, 112, 128, 256)),
    *(Case(slots=300, dtype=dtype, gqa=gqa) for dtype in (mx.float16, mx.bfloat16) for gqa in (1, 5, 16)),
    Case(slots=64, bits=(4, 4), scheme="page"),
    Case(slots=(20, 40), turned=True, bits=(4, 4), scheme="channel", n_new=3),
    Case(gated=True, window=200, softcap=4.0, sinks=True, holes=0.3, n_new=2),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(checks.SWITCH, raising=False)
    monkeypatch.setattr(checks, "_known", {})
    assert launch.engine() in ("metal", "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_against_float64(case):
    out = np.array(run(case)[0].astype(mx.float32)).astype(np.float64)
    wanted = exact(case)[0]
    rounding = ROUNDING[case.dtype] * max(1.0, np.abs(wanted).max())
    if case.dtype == mx.float32:
        rounding = max(rounding, np.abs(online(case) - wanted).max())
    assert np.isfinite(out).all() and np.abs(out - wanted).max() <= 4 * rounding


@pytest.mark.parametrize("settings", [{}, {"kv_bits": 4}, {"kv_bits": 3, "allocator": "head_adaptive"}], ids=str)
def test_end_to_end(settings, monkeypatch):
    """Kernels and plain operations give the same logits, also where slots changed hands by kernels."""
    model = tiny_model("llama", head_dim=64)
    kvp.attach(model, quiet=True)
    tokens = mx.random.randint(0, 50, (1, 400), key=mx.random.key(0))

    def logits():
        cache = kvp.make_cache(model, "knorm", budget=192, **settings)
        model(tokens[:, :300], cache=cache)
        return np.array(mx.stack([model(tokens[:, i : i + 1], cache=cache)[0, -1] for i in range(300, 400)]))

    found = logits()
    monkeypatch.setenv(checks.SWITCH, "0")
    assert np.abs(found - logits()).max() < 1e-3


@pytest.mark.parametrize("name", checks.MODULES)
def test_a_kernel_agrees_with_its_reference(name):
    if name not in checks.checks():
        pytest.skip("no such kernel in this version")
    found = checks.outcome(name)
    assert found.reason == ""
    assert found.error is not None and found.error <= checks.checks()[name].limit
    assert found.launches


@pytest.mark.skipif(not mx.metal.is_available(), reason="needs a Mac")
def test_what_does_not_compile_is_turned_off_in_one_line(monkeypatch):
    def run() -> float:
        broken = mx.fast.metal_kernel(name="broken", input_names=["x"], output_names=["y"], source="no code at all;")
        x = mx.ones(8)
        size = {"grid": (8, 1, 1), "threadgroup": (8, 1, 1), "output_shapes": [(8,)], "output_dtypes": [mx.float32]}
        return broken(inputs=[x], **size)[0].sum().item()

    monkeypatch.setattr(checks, "checks", lambda: {"broken": checks.Check("broken", run, 1.0)})
    found = checks.outcome("broken")
    assert found.failed and "\n" not in found.reason
    assert mx.ones(8).sum().item() == 8  # and the GPU goes on
