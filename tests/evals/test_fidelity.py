"""Fidelity: against itself, against NumPy, and intervals against a known variance."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from test_job import done, job_of
from tiny_gates import LIKE_OTHERS, given_gates
from tiny_models import VOCAB, tiny_model

from mlx_kvprune import detach
from mlx_kvprune.evals import fidelity
from mlx_kvprune.evals.conditions import FULL, Condition, grid, possible, without_question
from mlx_kvprune.evals.store import Store
from mlx_kvprune.policy import POLICIES, Policy, register
from mlx_kvprune.settings import Budget

TEXT = np.random.default_rng(0).integers(0, VOCAB, 300).tolist()
TIGHT, ROOMY = Budget(tokens=104), Budget(tokens=1024)


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    given_gates(made)
    yield made
    detach(made)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits_of(model, caches) -> np.ndarray:
    """Token by token: ``(T, vocab)`` float64."""
    return np.concatenate([np.array(model(mx.array([[t]]), cache=caches)[0]) for t in TEXT]).astype(np.float64)


def test_full_against_itself_is_exactly_zero(model, monkeypatch):
    monkeypatch.setitem(POLICIES, "again", None)
    register(Policy("again", None, "a second stock cache"))
    row, again = fidelity.run(model, TEXT, [FULL, Condition("again")])
    for one in (row, again):
        assert (one["kl"], one["nll_change"], one["agreement"]) == (0.0, 0.0, 1.0)
        assert (one["kl_low"], one["kl_high"], one["agreement_low"]) == (0.0, 0.0, 1.0)
        assert all(x["kl"] == 0.0 for x in one["by_distance"])


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"full", "probe", "retention_probe"}))
def test_a_roomy_cache_loses_nothing(model, policy):
    more = {name: x for name, x in LIKE_OTHERS.get(policy, {}).items() if name == "threshold"}  # all pass
    (row,) = fidelity.run(model, TEXT, [Condition(policy, ROOMY, more=tuple(more.items()))])
    assert abs(row["kl"]) < 1e-6
    assert abs(row["nll_change"]) < 1e-5
    assert row["agreement"] == 1.0
    assert row["slots_held"] == len(TEXT)


def test_kl_nll_and_agreement_against_numpy(model):
    condition = Condition("window", TIGHT)
    got = fidelity.trace(model, TEXT, [condition], chunk=77)[condition]
    log_p, log_q = (log_softmax(logits_of(model, c.caches(model))) for c in (FULL, condition))
    log_p, log_q, targets, rows = log_p[:-1], log_q[:-1], np.array(TEXT[1:]), np.arange(len(TEXT) - 1)
    np.testing.assert_allclose(got.kl, (np.exp(log_p) * (log_p - log_q)).sum(-1), atol=2e-5)
    np.testing.assert_allclose(got.nll, -log_q[rows, targets], atol=2e-4)
    np.testing.assert_allclose(got.nll_full, -log_p[rows, targets], atol=2e-4)
    assert (got.agrees == (log_p.argmax(-1) == log_q.argmax(-1))).mean() > 0.99
    assert got.kl[:96].max() < 1e-5 < 1e-3 < got.kl[150:].mean()  # nothing is lost before the ring is full


def test_the_direction_of_kl():
    """KL(full || bounded), not the reverse: of (1/2, 1/2) and (1/4, 3/4)."""
    full, bounded = mx.log(mx.array([[0.5, 0.5]])), mx.log(mx.array([[0.25, 0.75]]))
    kl, nll, nll_full, agrees = fidelity.compare(full, bounded, mx.array([0]))[:, 0]
    assert kl == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), abs=1e-6)
    assert (nll, nll_full) == (pytest.approx(np.log(4), abs=1e-6), pytest.approx(np.log(2), abs=1e-6))
    assert agrees == 0.0


def test_lockstep_does_not_change_what_a_condition_gives(model):
    conditions = [Condition(name, TIGHT) for name in ("window", "snapkv", "surprise")]
    together = fidelity.trace(model, TEXT, conditions)
    for condition in conditions:
        alone = fidelity.trace(model, TEXT, [condition])[condition]
        np.testing.assert_array_equal(together[condition].kl, alone.kl)


def test_means_are_over_the_second_half_and_by_distance():
    ramp = np.arange(1000, dtype=float)
    trace = fidelity.Trace(kl=ramp, nll=ramp + 1, nll_full=ramp, agrees=np.ones(1000), held={})
    row = fidelity.summary(trace, 500)
    assert (row["kl"], row["nll_change"], row["agreement"]) == (749.5, 1.0, 1.0)
    assert [(x["from"], x["to"], x["kl"]) for x in row["by_distance"]] == [
        (0, 256, 127.5),
        (256, 512, 383.5),
        (512, 1000, 755.5),
    ]


def test_blocks_are_means_of_neighbours_from_the_start_that_is_named():
    ramp = np.arange(1000, dtype=float)
    trace = fidelity.Trace(kl=ramp, nll=ramp + 1, nll_full=ramp, agrees=np.ones(1000), held={})
    got = fidelity.blocks(trace, 500)
    assert len(got["kl"]) == 500 // fidelity.BLOCK
    assert (got["kl"][0], got["kl"][1]) == (515.5, 547.5)
    assert set(got["nll_change"]) == set(got["agreement"]) == {1.0}


def test_conditions_are_read_in_groups_that_cover_them():
    conditions = [FULL, *(Condition("window", Budget(100 + i)) for i in range(8))]
    groups = fidelity.batched(conditions, 3)
    assert [len(group) for group in groups] == [4, 3, 2]
    assert [c for group in groups for c in group] == conditions
    assert fidelity.batched([FULL], 3) == [[FULL]]
    assert fidelity.batched([], 3) == []


def test_the_interval_of_independent_values_has_the_known_width():
    x = np.random.default_rng(1).normal(size=4000)
    for block in (1, 32):
        low, high = fidelity.bootstrap_interval(x, block=block, draws=1000)
        assert low < x.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(4000), rel=0.2)


def test_the_interval_of_dependent_values_is_wider():
    """Moving sums of 8: the variance of the mean is 8 times what independent values would have."""
    noise = np.random.default_rng(2).normal(size=4007)
    x = np.convolve(noise, np.ones(8), "valid") / np.sqrt(8)
    widths = [np.diff(fidelity.bootstrap_interval(x, block=block, draws=1000))[0] for block in (1, 64)]
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(8), rel=0.2)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng, hits = np.random.default_rng(3), 0
    for trial in range(200):
        low, high = fidelity.bootstrap_interval(rng.exponential(size=640), draws=300, seed=trial)
        hits += low <= 1.0 <= high
    assert 0.85 < hits / 200 < 0.99


def test_an_interval_of_few_values():
    assert fidelity.bootstrap_interval(np.array([2.0])) == (2.0, 2.0)
    low, high = fidelity.bootstrap_interval(np.array([0.0, 1.0, 0.0]))
    assert 0.0 <= low <= high <= 1.0


def test_the_controls_are_always_in_the_grid():
    assert grid([], [128]) == [FULL, Condition("window", Budget(128)), Condition("random", Budget(128))]
    names = [str(c) for c in grid(["snapkv", "window"], ["128", "1MB", 128], seed=3)]
    assert names == ["full", "window 128", "random 128", "snapkv 128", "window 1MB", "random 1MB", "snapkv 1MB"]
    assert {c.policy for c in grid(["all"], [128])} == set(POLICIES)


def test_conditions_that_cannot_run_are_named():
    model = tiny_model("gemma2")  # does its own attention: nobody sees its queries
    runnable, notes = possible(model, grid(["snapkv", "knorm"], [128]))
    assert [c.policy for c in runnable] == ["full", "window", "random", "knorm"]
    assert len(notes) == 1
    assert notes[0].startswith("snapkv 128 skipped: [policy] snapkv needs the queries")
    with pytest.raises(ValueError, match="too small"):
        possible(model, grid([], [50]))
    detach(model)


def test_conditions_that_need_a_question_are_named():
    left, notes = without_question(grid(["probe"], [256]))
    assert [c.policy for c in left] == ["full", "window", "random"]
    assert notes == ["probe 256 skipped: this task has no question"]


def test_equal_slots_and_everything_counted(model):
    ticks, conditions = [], grid(["snapkv", "h2o"], [104])
    rows = fidelity.run(model, TEXT, conditions, tick=ticks.append)
    assert sum(ticks) == fidelity.work(len(TEXT), conditions) == 5 * len(TEXT)
    full, window, *others = rows
    assert {row["slots_held"] for row in rows[1:]} == {window["slots_held"]}
    assert window["slots_held"] <= 104 < full["slots_held"] == len(TEXT)
    assert full["kv_bytes_full"] == window["kv_bytes_full"] == 2 * 2 * 2 * 32 * 4 * len(TEXT)
    assert all(row["kv_bytes"] >= window["kv_bytes"] for row in others)
    snapkv = next(row for row in rows if row["policy"] == "snapkv")
    assert snapkv["kv_bytes"] - window["kv_bytes"] == 2 * 4 * 64 * 32 * 4  # its last queries, in both layers


def test_texts_are_pooled_by_distance():
    def one(item: int, kl: float) -> dict:
        near = {"from": 0, "to": 256, "kl": kl, "kl_low": kl - 0.1, "kl_high": kl + 0.1}
        measures = {"kl": kl, "nll_change": kl, "agreement": 1 - kl, "nll": 3.0, "nll_full": 3.0}
        blocks = {name: [measures[name]] * 3 for name in fidelity.MEASURES}
        sizes = dict.fromkeys(fidelity.SIZES, 5)
        result = {"tokens": 512, **measures, **sizes, "blocks": blocks, "by_distance": [near]}
        named = {"task": "fidelity", "item": item, "policy": "tova", "allocator": "uniform", "budget": "25", "seed": 0}
        return {**named, "setup": {"tokens": 512}, "result": result}

    (row,) = fidelity.rows([one(0, 0.25), one(1, 0.75)])
    assert row["by_distance"] == [{"from": 0, "to": 256, "kl": 0.5}], "averaged ends of intervals are no interval"
    assert (row["kl"], row["texts"]) == (0.5, 2)


@pytest.mark.parametrize("n", [257, 65])
def test_any_length_can_be_measured(model, n):
    """Also where a last call has one token, which foretells none, and where there is less than a block."""
    (row,) = (x for x in fidelity.run(model, TEXT[:n], [Condition("window", TIGHT)]) if x["policy"] == "window")
    whole = fidelity.trace(model, TEXT[:n], [Condition("window", TIGHT)], chunk=n)
    (one,) = whole.values()
    assert len(one.kl) == n - 1 and row["kl"] == pytest.approx(one.kl[n // 2 :].mean(), abs=1e-4)
    cut = fidelity.blocks(one, n // 2)["kl"]
    assert cut and np.isfinite(cut).all()


def test_a_single_text_is_a_row_of_the_tokens_that_its_difference_is_of(model):
    """KL less ``window``'s KL is what the row says it is over it."""
    job = job_of(model, "knorm", tokens=650, budgets=("1/2",))
    (rows,) = done(job, ["fidelity"], Store())
    by = {row["policy"]: row for row in rows}
    assert by["knorm"]["over_window"] == pytest.approx(by["knorm"]["kl"] - by["window"]["kl"], abs=1e-9)
    assert by["knorm"]["kl_low"] <= by["knorm"]["kl"] <= by["knorm"]["kl_high"]
