"""Blocks of prefill: slots unpacked for MLX's fused attention, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from attend_cases import Case, exact

from mlx_kvprune.attend import View, attend_ops, backend
from mlx_kvprune.kernels import launch
from mlx_kvprune.kernels.attend_block import attend_block, why_not
from mlx_kvprune.slots import Part, plain

CASES = [
    Case(n_new=130, ring=140),
    Case(n_new=40, ring=70, bits=(4, 4), scheme="channel", sinks=True),
    Case(n_new=40, ring=70, slots=(40, 70), bits=(4, 3)),
    Case(n_new=40, ring=70, slots=64, bits=(2, None), scheme="page", gqa=1),
    Case(n_new=40, ring=70, holes=0.5, batch=2),
    Case(n_new=40, ring=70, turned=True, bits=(8, 8)),
    Case(n_new=40, ring=40, slots=0, width=80),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case):
    assert why_not(case.queries(), case.parts()) == ""
    out = np.array(attend_block(case.queries(), case.parts(), case.scale, case.sink_logits)).astype(np.float64)
    assert np.abs(out - exact(case)[0]).max() <= 5e-6


def test_when_it_is_taken():
    case = CASES[1]
    assert backend(case.queries(), View(case.parts())) == ("ops", "no GPU: MLX runs on the CPU")
    with launch.stand_in(mx.fast.metal_kernel):
        assert backend(case.queries(), View(case.parts()))[0] == "block"
        assert backend(case.queries(), View(case.parts()), want_weights=True)[0] == "ops"
        odd = Case(n_new=40, ring=70, width=72)
        assert "no fused attention" in backend(odd.queries(), View(odd.parts()))[1]
        uneven = Case(n_new=40, ring=70, slots=(0, 10, 0, 9000), heads=4)
        assert "padding" in backend(uneven.queries(), View(uneven.parts()))[1]


@pytest.mark.parametrize(("slots", "value"), [(1024, 80.0), (4096, 20.0), (16, 900.0)])
def test_sums_of_many_values_fit_into_float16(slots, value):
    """Alike keys: the output is the values' mean, whatever they sum to."""
    keys, values = mx.zeros((1, 1, slots, 32), mx.float16), mx.full((1, 1, slots, 32), value, mx.float16)
    ring, queries = mx.full((1, 1, 4, 32), value, mx.float16), mx.ones((1, 1, 1, 32), mx.float16)
    view = View((Part(plain(keys), plain(values)), Part(plain(keys[:, :, :4]), plain(ring))))
    out = np.array(attend_ops(queries, view, 0.1).out.astype(mx.float32))
    np.testing.assert_allclose(out, value, rtol=2.0**-9)


@pytest.mark.parametrize("value", [900, 2000, 12_000])
def test_large_float16_values_are_those_of_stock(value):
    """One slot that gets all attention, and in one channel holds a value as outliers do."""
    rng = np.random.default_rng(0)
    keys, values = (rng.normal(size=(1, 1, 300, 64)).astype(np.float32) for _ in range(2))
    values[0, 0, 17, 5] = value
    queries = mx.array(np.broadcast_to(4 * keys[:, :, 17:18], (1, 2, 1, 64))).astype(mx.float16)
    keys, values = mx.array(keys).astype(mx.float16), mx.array(values).astype(mx.float16)
    parts = [Part(plain(keys[:, :, at]), plain(values[:, :, at])) for at in (slice(290), slice(290, 300))]
    found = attend_ops(queries, View(tuple(parts)), 0.125).out
    stock = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.125, mask=None)
    np.testing.assert_allclose(found.astype(mx.float32), stock.astype(mx.float32), rtol=5e-3, atol=5e-3)
