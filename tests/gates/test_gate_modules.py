"""Gate modules against their formulas in NumPy float64, and the cache that shows them each token once."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from gate_helpers import FORM, GATED, caches_for, gated_model, given_gates, kept, random_gates, raw_of, read, text
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import mlx_kvprune as kvp
from mlx_kvprune.attach import use_gates
from mlx_kvprune.gates import FORMS, Gates, GateShape
from mlx_kvprune.gates.modules import SINK_DIM
from mlx_kvprune.numerics import log_sigmoid

INPUTS = np.random.default_rng(5).normal(size=(2, 7, 24)).astype(np.float32)
Named = dict[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rms(x: np.ndarray, scale: np.ndarray | float = 1.0) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def linear(p: Named, i: int, x: np.ndarray) -> np.ndarray:
    return x @ p[f"layers.{i}.weight"].T + p[f"layers.{i}.bias"]


def mlp(p: Named, i: int, x: np.ndarray) -> np.ndarray:
    """Each layer has a last matrix of its own, or all share the first rows of one."""
    bias = p[f"layers.{i}.bias"]
    last = p[f"layers.{i}.last"] if f"layers.{i}.last" in p else p["last"][: len(bias)]
    return silu(x @ p[f"layers.{i}.weight"].T + p[f"layers.{i}.hidden_bias"]) @ last.T + bias


def sink(p: Named, i: int, x: np.ndarray) -> np.ndarray:
    """Token by token, head by head, query by query: what the token's own key gets beside the sinks."""
    own = {name.removeprefix(f"layers.{i}."): y for name, y in p.items()}
    heads, _, group = own["bias"].shape
    out = np.zeros((*x.shape[:2], heads))
    for b, t, h in np.ndindex(*out.shape):
        queries = (own["to_queries"] @ x[b, t] + own["query_bias"]).reshape(heads, group, SINK_DIM)[h]
        key = rms((own["to_keys"] @ x[b, t]).reshape(heads, SINK_DIM)[h], own["key_scale"])
        shares = []
        for g in range(group):
            query = rms(queries[g], own["query_scale"])
            self_logit = query @ key / math.sqrt(SINK_DIM) + own["bias"][h, 0, g]
            others = own["sinks"][h] @ query / math.sqrt(SINK_DIM)
            shares.append(np.exp(self_logit) / (np.exp(self_logit) + np.exp(others).sum()))
        out[b, t, h] = math.log(np.mean(shares))
    return out


def dms(p: Named, i: int, x: np.ndarray) -> np.ndarray:
    return 100 * (rms(x) @ p[f"layers.{i}.weight"].T) - 5


FORMULAS = {"linear": linear, "mlp": mlp, "shared": mlp, "sink": sink, "dms": dms}


@pytest.mark.parametrize("form", FORMS)
def test_modules_are_their_formulas(form):
    """Also with layers of different numbers of heads."""
    gates = random_gates(form, heads=(2, 3), width=24)
    named = {name: np.array(x, np.float64) for name, x in gates.arrays().items()}
    for i, heads in enumerate((2, 3)):
        got = np.array(gates(i, mx.array(INPUTS)))
        assert got.shape == (2, heads, 7)
        assert got.dtype == np.float32
        expected = FORMULAS[form](named, i, INPUTS.astype(np.float64)).swapaxes(1, 2)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
        half = np.array(gates(i, mx.array(INPUTS).astype(mx.float16)))
        np.testing.assert_allclose(half, expected, rtol=0.03, atol=0.3 if form == "dms" else 0.03)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_moved(form):
    """Those of forms that end in a projection and a bias; of the others none are, and they are left as they were."""
    gates = random_gates(form, heads=(1, 2), width=24)
    before = [np.array(gates(i, mx.array(INPUTS))) for i in range(2)]
    if form in ("sink", "dms"):
        with pytest.raises(ValueError, match="cannot be moved; got '" + form):
            gates.move(2.0, -1.0)
        gates.move(1.0, 0.0)
    else:
        gates.move(2.0, -1.0)
        before = [2 * x - 1 for x in before]
    for i in range(2):
        np.testing.assert_allclose(np.array(gates(i, mx.array(INPUTS))), before[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_at_first_everything_is_kept(form):
    gates = Gates(GateShape(form, (24,), (2,), (2,)))
    raw = np.array(gates(0, mx.array(INPUTS)))
    if form == "dms":
        np.testing.assert_array_equal(raw, -5)
    elif form == "sink":
        assert raw.min() > math.log(0.97)
    else:
        np.testing.assert_allclose(raw, 6, atol=0.5)


@pytest.mark.parametrize("form", FORMS)
def test_making_gates_leaves_random_numbers_alone(form):
    """What a user samples does not depend on whether gates were loaded before."""
    mx.random.seed(7)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(7)
    one, other = (Gates(GateShape(form, (24,), (2,), (2,)), seed=3) for _ in range(2))
    assert mx.random.normal((4,)).tolist() == expected
    assert all(mx.array_equal(x, other.arrays()[name]) for name, x in one.arrays().items())


def test_what_gates_cost():
    shared = Gates(GateShape("shared", (24, 24), (2, 2), hidden=8))
    assert shared.numbers == 2 * 8 + 2 * (8 * 24 + 8 + 2)
    assert shared.nbytes == 4 * shared.numbers
    assert shared.flops == 2 * (2 * 8 * 24 + 2 * 2 * 8)


@hypothesis_settings(deadline=None)
@given(st.floats(-100, 100, width=32))
def test_log_sigmoid(x):
    expected = -np.logaddexp(0.0, -np.float64(x))
    assert float(log_sigmoid(mx.array(x))) == pytest.approx(expected, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("policy", GATED)
def test_each_token_is_seen_once_however_a_prompt_is_cut(policy):
    """In calls of any length, and row by row in steps of the whole model: each gate reads each token once, in order."""
    model = gated_model("llama")
    given_gates(model, [policy])
    heards, helds = [], []
    for step in (300, 77, 1):
        caches = caches_for(model, policy, 150)
        heard = raw_of(caches)
        read(model, caches, text(300), step)
        heards.append([np.concatenate(x, axis=1) for x in heard])
        helds.append(kept(caches))
    assert helds[0] == helds[1] == helds[2]
    for layers in heards:
        for x, expected in zip(layers, heards[0], strict=True):
            assert x.shape == (2, 300)
            np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-2 if FORM[policy] == "dms" else 1e-3)
    kvp.detach(model)


def test_what_is_remembered_is_what_the_gate_said():
    model = gated_model("llama")
    given_gates(model, ["kvzap"])
    caches = caches_for(model, "kvzap", 150)
    heard = raw_of(caches)
    read(model, caches, text(260), 50)
    for cache, parts in zip(caches, heard, strict=True):
        raw = np.concatenate(parts, axis=1)
        positions, memory = np.array(cache.held.positions())[0], np.array(cache.held.memory())[0]
        for h in range(2):
            live = positions[h] >= 0
            np.testing.assert_array_equal(memory[h][live], raw[h][positions[h][live]])
    kvp.detach(model)


def test_gates_for_other_heads_are_refused():
    model = gated_model("llama")
    with pytest.raises(ValueError, match=r"^\[gates\] of other KV heads .* 2 x 2; got 3 x 2; try"):
        use_gates(model, "retention", random_gates("shared", heads=(2, 2, 2)))
    with pytest.raises(ValueError, match=r"\[gates\] not a form of gate; got 'mpl'; try one of: linear"):
        GateShape("mpl", (8,), (2,))
    kvp.detach(model)


def test_without_gates_it_is_said_where_to_get_them():
    model = gated_model("llama")
    with pytest.raises(
        ValueError, match=r"^\[gates\] policy 'retention' needs gates .*; got none; try `mlx-kvprune fit"
    ):
        kvp.make_cache(model, "retention", 200)
    kvp.detach(model)
