"""The kernels on a real GPU of Apple's: ``python -m pytest -m metal -n 0`` on a Mac."""

import mlx.core as mx
import pytest

from mlx_kvprune.kernels import checks, launch

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(not mx.metal.is_available(), reason="needs a Mac: mx.metal.is_available() is false"),
]


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    monkeypatch.delenv(checks.SWITCH, raising=False)
    monkeypatch.setattr(checks, "_known", {})
    assert launch.engine() == "metal"


@pytest.mark.parametrize("name", checks.MODULES)
def test_a_kernel_agrees_with_its_reference(name):
    if name not in checks.checks():
        pytest.skip("no such kernel in this version")
    found = checks.outcome(name)
    assert found.reason == ""
    assert found.error is not None and found.error <= checks.checks()[name].limit
    assert found.launches


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
