"""The recorder against positions that are read off the caches after each step; and it changes nothing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, tiny_model
from traces import BUDGET, CASES, NAMES, TEXT, T, caches

from mlx_kvprune import detach, make_cache
from mlx_kvprune.evals import regret
from mlx_kvprune.report.trace import UNRANKED, Recorder, follow


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    yield made
    detach(made)


def steps(sizes: list[int]) -> list[tuple[int, int]]:
    """Start and stop of calls of these sizes, over and over."""
    found, start, i = [], 0, 0
    while start < T:
        stop = min(T, start + sizes[i % len(sizes)])
        found.append((start, stop))
        start, i = stop, i + 1
    return found


def held_sets(cache) -> list[set[int]]:
    """The positions that each KV head holds."""
    return [{int(x) for x in head if x >= 0} for head in np.array(cache.held.positions())[0]]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_dates_and_counts_are_those_of_the_positions_after_each_step(model, case):
    cache = caches(model, case)
    recorder, seen = Recorder(cache, T), []
    with recorder.listening():
        for start, stop in steps([32, 7, 96, 1]):
            model(mx.array([TEXT[start:stop]]), cache=cache)
            recorder.note()
            seen.append((stop, [head for c in cache for head in held_sets(c)]))
    trace = recorder.trace()
    assert trace.rows.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for row in range(4):
        expected = np.full(T, len(seen))
        for step in reversed(range(len(seen))):  # the first step after which a token that was read is not held
            stop, heads = seen[step]
            gone = [i for i in range(stop) if i not in heads[row]]
            expected[gone] = step
        np.testing.assert_array_equal(trace.gone[row], expected)
    assert trace.held.tolist() == [[len(head) for head in heads] for _, heads in seen]
    assert trace.starts.tolist() == [start for start, _ in steps([32, 7, 96, 1])]
    assert trace.nbytes[-1] == sum(c.nbytes for c in cache)
    assert (trace.gone < len(seen)).any(), "something was evicted"


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_nothing_changes(model, case):
    plain, watched = caches(model, case), caches(model, case)
    recorder = Recorder(watched, T)
    with recorder.listening():
        for start, stop in steps([50, 1, 120]):
            tokens = mx.array([TEXT[start:stop]])
            expected = model(tokens, cache=plain)
            got = model(tokens, cache=watched)
            recorder.note()
            assert mx.array_equal(got, expected)
    assert [held_sets(c) for c in plain] == [held_sets(c) for c in watched]
    assert [c.nbytes_peak for c in plain] == [c.nbytes_peak for c in watched]
    assert not any("contest" in c.held.__dict__ for c in watched)


@settings(max_examples=12, deadline=None)
@given(
    case=st.sampled_from(CASES),
    budget=st.integers(150, 300),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3).filter(lambda x: sum(x) > 20 * len(x)),
)
def test_counts_never_exceed_the_cap(model, case, budget, sizes):
    cache = caches(model, case, budget)
    trace = record(model, cache, sizes)
    by_layer = trace.held.reshape(len(trace.starts), 2, 2).sum(axis=2)
    allocator, caps = trace.settings.allocator, trace.caps.astype(int)
    if allocator == "global":
        assert (by_layer.sum(axis=1) <= caps.sum()).all()
    elif allocator == "head_adaptive":
        assert (by_layer <= caps.reshape(2, 2).sum(axis=1)).all()
    else:
        assert (trace.held <= caps).all()
    assert (trace.held[-1] == trace.is_held().sum(axis=1)).all()
    assert (trace.nbytes <= trace.report.kv_bytes_peak).all()


def record(model, cache, sizes):
    recorder = Recorder(cache, T)
    with recorder.listening():
        for start, stop in steps(sizes):
            model(mx.array([TEXT[start:stop]]), cache=cache)
            recorder.note()
    return recorder.trace()


@pytest.mark.parametrize("policy", ["window", "snapkv", "surprise"])
def test_steps_of_its_own_date_evictions_as_regret_does(model, policy):
    expected = regret.evictions(model, TEXT, make_cache(model, policy, BUDGET))
    progress = []
    trace = follow(model, TEXT, make_cache(model, policy, BUDGET), progress=lambda done, total: progress.append(done))
    ends = np.where(trace.is_held(), regret.NEVER, trace.ends)
    np.testing.assert_array_equal(ends, expected[:, 0].reshape(4, T))
    assert progress == [*trace.starts[1:].tolist(), T]
    assert trace.gone.dtype == np.uint16
    assert trace.report.tokens_seen == T


def test_scores_of_the_window_are_positions_and_ranks_their_order(model):
    trace = follow(model, TEXT, make_cache(model, "window", BUDGET))
    known = ~np.isnan(trace.scores)
    where = np.nonzero(known)
    np.testing.assert_array_equal(trace.scores[where], where[1])
    assert ((trace.ranks == UNRANKED) == ~known).all()
    assert known[~trace.is_held()].all(), "what was evicted had a score"
    assert not known[:, : trace.settings.n_sink].any()
    assert not known[:, -trace.settings.window :].any()
    last = trace.gone.max(axis=1, where=~trace.is_held(), initial=0)
    for row in range(4):
        evicted_last = trace.gone[row] == last[row]
        rest = trace.is_held()[row] & known[row]
        assert trace.ranks[row][evicted_last].max() < trace.ranks[row][rest].min()
        assert trace.ranks[row][rest].max() == 254


@pytest.mark.parametrize("case", [CASES[2], CASES[7], CASES[8]], ids=[NAMES[2], NAMES[7], NAMES[8]])
def test_the_last_evicted_scored_lower_than_what_stayed(model, case):
    trace = follow(model, TEXT, caches(model, case))
    known = ~np.isnan(trace.scores)
    assert known[~trace.is_held()].all()
    for row in range(4):
        gone = ~trace.is_held()[row] & (trace.gone[row] == trace.gone[row][~trace.is_held()[row]].max())
        rest = trace.is_held()[row] & known[row]
        assert trace.scores[row][gone].max() <= trace.scores[row][rest].min()


def test_layers_that_are_left_alone_are_counted():
    model = tiny_model("gemma3_text")
    cache = make_cache(model, "window", BUDGET)
    trace = follow(model, TEXT[:300], cache)
    bounded = [i for i, c in enumerate(cache) if hasattr(c, "held")]
    assert 0 < len(bounded) < len(cache)
    assert sorted(set(trace.rows[:, 0].tolist())) == bounded
    detach(model)


def test_what_cannot_be_followed_is_refused(model):
    with pytest.raises(ValueError, match=r"\[trace\] no bounded cache"):
        Recorder(make_cache(model, "full", None), T)
    used = make_cache(model, "window", BUDGET)
    model(mx.array([TEXT[:8]]), cache=used)
    with pytest.raises(ValueError, match="seen 8; try fresh ones"):
        Recorder(used, T)
    pair = Recorder(make_cache(model, "window", BUDGET), T)
    model(mx.zeros((2, 8), mx.int32) % VOCAB, cache=pair.caches)
    with pytest.raises(ValueError, match="got a batch of 2"):
        pair.note()
    short = Recorder(make_cache(model, "window", BUDGET), 4)
    model(mx.array([TEXT[:8]]), cache=short.caches)
    with pytest.raises(ValueError, match="more tokens than were announced; got 8"):
        short.note()
