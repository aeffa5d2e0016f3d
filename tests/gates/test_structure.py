"""Which layers are local, on gates and texts made by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvprune.gates import Gates, GateShape
from mlx_kvprune.gates.structure import _kept, _structure, structure, worth
from mlx_kvprune.settings import floor_slots
from mlx_kvprune.training.objective import Bounds, thresholds

LAYERS, HEADS, T = 4, 2, 700
BOUNDS = {"window": 32, "block": 32, "n_sink": 4}


def test_floor_first_then_the_best_of_all():
    """Against a loop that gives slot after slot to the head whose next token is worth most."""
    rng = np.random.default_rng(0)
    static, pool, floor = rng.normal(size=(5, 300)) * 2 + rng.normal(size=(5, 1)), 40, 8
    of = np.arange(4, 300 - 32)
    ranked = -np.sort(-(static[:, of] - np.log(300 - of)), axis=1)
    kept = [floor] * 5
    while sum(kept) < 5 * pool:
        kept[max(range(5), key=lambda h: ranked[h][kept[h]])] += 1
    assert _kept(static, pool, floor, 32, 4).tolist() == kept
    assert len(set(kept)) > 2


def test_it_is_what_the_thresholds_of_training_keep():
    """``training.objective`` says which score is just held; so many slots are above it."""
    rng = np.random.default_rng(1)
    raws = [mx.array((rng.normal(size=(HEADS, 512)) * 2 + 3 + i).astype(np.float32)) for i in range(LAYERS)]
    worths, pool, floor = [worth(raw) for raw in raws], 60, floor_slots(60, 0.2)
    bounds = Bounds(60 + 32 + 32 + 4, 32, 32, 4, 0.2)
    now = 448 + 32  # the moment that the last stretch of 64 queries stands for
    taus = thresholds(worths, 448, 64, bounds)[:, 0]
    static = np.concatenate([np.array(x) for x in worths])[:, :now]
    of = np.arange(4, now - 32)
    above = (static[:, of] - np.log(now - of) >= taus[:, None] - 1e-5).sum(axis=1)
    np.testing.assert_array_equal(_kept(static, pool, floor, 32, 4), above)


def gates_of(biases) -> Gates:
    """Gates that say of every token of a layer's heads the same."""
    gates = Gates(GateShape("linear", (8,) * LAYERS, (HEADS,) * LAYERS))
    for layer, bias in zip(gates.layers, biases, strict=True):
        layer.bias = mx.array(bias, mx.float32)
    return gates


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return [mx.array(rng.normal(size=(T, 8)).astype(np.float16)) for _ in range(LAYERS)]


def test_layers_that_win_nothing_are_local():
    found = structure(gates_of([(1, 1), (9, 9), (1, 9), (2, 1)]), inputs(), 168, **BOUNDS)
    assert (found.pool, found.floor) == (100, 32)
    assert found.local == (0, 3)
    assert found.local_layers == "0,3"
    assert [heads[0] for heads in found.kept] == [32, pytest.approx(found.kept[1][1], abs=1), 32, 32]
    assert sum(map(sum, found.shares)) == pytest.approx(1)
    assert sum(float(x.sum()) for x in found.kept) == pytest.approx(100 * LAYERS * HEADS)


def test_gates_that_tell_nothing_apart_have_no_local_layers():
    found = structure(gates_of([(6, 6)] * LAYERS), inputs(), 168, **BOUNDS)
    assert found.local == ()
    assert found.local_layers == ""
    assert np.allclose(found.kept, 100, atol=1)


def test_never_all_of_them():
    """With the whole pool as floor nobody wins anything."""
    assert structure(gates_of([(6, 6)] * LAYERS), inputs(), 168, head_floor=1.0, **BOUNDS).local == ()


def test_layers_with_different_numbers_of_heads():
    worths = [np.zeros((n, 400)) + 3 * (n == 2) for n in (1, 2, 3)]
    found = _structure(worths, 50, 5, 32, 4)
    assert [x.shape for x in found.kept] == [(1,), (2,), (3,)]
    assert found.local == (0, 2)


def test_a_text_that_fits_is_refused():
    with pytest.raises(
        ValueError, match=r"\[structure\] nothing would be chosen; got 800 slots for a text of 700 tokens"
    ):
        structure(gates_of([(6, 6)] * LAYERS), inputs(), 800, **BOUNDS)
    with pytest.raises(ValueError, match=r"\[structure\] nothing would be chosen; got 60 slots"):
        structure(gates_of([(6, 6)] * LAYERS), inputs(), 60, **BOUNDS)
