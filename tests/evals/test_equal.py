"""Equal bytes: what caches then hold, to within one slot; fractions; combinations that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import VOCAB, tiny_model

from mlx_kvprune import detach
from mlx_kvprune.evals.conditions import FULL, Condition, feed, grid, held
from mlx_kvprune.evals.equal import levelled, most_tokens, planned_nbytes
from mlx_kvprune.evals.job import Grid, Job
from mlx_kvprune.settings import Budget

TEXT = np.random.default_rng(0).integers(0, VOCAB, 512).tolist()
SLOT = 2 * 2 * (2 * 32 * 4 + 8)  # two layers of two heads: key, value, position, memory


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    yield made
    detach(made)


def peak(model, condition: Condition) -> int:
    caches = condition.caches(model, (1, 2, 3))
    feed(model, TEXT, caches)
    return held(caches)["kv_bytes_peak"]


@pytest.mark.parametrize(
    "policy", ["random", "knorm", "h2o", "snapkv", "expected_attention", "rkv", "surprise", "probe"]
)
def test_what_is_held_is_what_window_holds_to_within_one_slot(model, policy):
    (condition,), notes = levelled(model, [Condition(policy, Budget(200))])
    window = peak(model, Condition("window", Budget(200)))
    assert not notes
    assert window - SLOT < peak(model, condition) <= window


@pytest.mark.parametrize("more", [{"allocator": "pyramid"}, {"allocator": "head_adaptive"}, {"kv_bits": 4}], ids=str)
def test_the_plan_fills_the_bytes(model, more):
    wanted = Condition("knorm", Budget(160), more=tuple(more.items()))
    (condition,), _ = levelled(model, [wanted])
    target = planned_nbytes(model, Condition("window", Budget(160)))
    assert planned_nbytes(model, condition) <= target
    bigger = Condition("knorm", Budget(condition.budget.tokens + 1), more=wanted.more)
    assert planned_nbytes(model, bigger) > target
    assert peak(model, condition) <= target
    if "kv_bits" in more:
        assert condition.budget.tokens > 160 * 2


def test_the_plan_is_what_is_held(model):
    for name in ("window", "snapkv", "probe"):
        condition = Condition(name, Budget(200))
        assert peak(model, condition) == planned_nbytes(model, condition)


def test_what_has_no_room_is_named(model):
    kept, notes = levelled(model, [FULL, *grid(["snapkv"], [110])[1:]])
    assert [c.policy for c in kept] == ["full", "window", "random"]
    assert len(notes) == 1
    assert notes[0].startswith("snapkv 110 skipped: [budget] needs")
    with pytest.raises(ValueError, match="needs"):
        most_tokens(model, Condition("snapkv"), 1000)


def test_fractions_are_of_the_text():
    found = grid(["snapkv"], ["1/4", "1/8", 77], length=1000, bits=(None, 4))
    assert [(c.budget.tokens, c.share) for c in found if c.policy == "window"] == [
        (250, "1/4"),
        (250, "1/4"),
        (125, "1/8"),
        (125, "1/8"),
        (77, ""),
        (77, ""),
    ]
    for wrong in ("3/2", "0/4", "1/0", "a/b", "-1/4"):
        with pytest.raises(ValueError, match="not a fraction"):
            grid([], [wrong], length=1000)


def test_the_grid_is_a_product_and_controls_come_along():
    found = grid(["knorm", "window"], ["1/4"], length=1000, allocators=("uniform", "global"), bits=(None, 4))
    assert [str(c) for c in found] == [
        "full",
        "window 250 (1/4)",
        "random 250 (1/4)",
        "knorm 250 (1/4)",
        "knorm 250 (1/4) allocator=global",
        "window 250 (1/4) allocator=global",
        "window 250 (1/4) kv_bits=4",
        "random 250 (1/4) kv_bits=4",
        "knorm 250 (1/4) kv_bits=4",
        "knorm 250 (1/4) allocator=global kv_bits=4",
        "window 250 (1/4) allocator=global kv_bits=4",
    ]


def test_refused_combinations_are_named_and_the_rest_runs():
    model = tiny_model("gemma2")  # does its own attention: heads cannot be ragged, queries are not seen
    job = Job(model, None, [], Grid(("knorm", "snapkv"), ("1/2", "1/64"), ("uniform", "global")))
    found, notes = job.conditions(400)
    assert [c.policy for c in found] == ["full", "window", "random", "knorm"]
    assert len(notes) == 9  # snapkv, and both with global; and everything at 1/64
    assert any("snapkv needs the queries" in note for note in notes)
    assert any("global lets heads hold" in note for note in notes)
    with pytest.raises(ValueError, match=r"too small|needs"):
        Job(model, None, [], Grid((), ("1/64",))).conditions(400)
    detach(model)
