"""Gated policies in evaluations: rows name the allocator, old rows keep their keys, who lacks gates is left out by one note."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_gates import GATED, given_gates, random_gates
from tiny_models import VOCAB, tiny_model

from mlx_kvprune import detach
from mlx_kvprune.attach import attachment_of
from mlx_kvprune.evals import tables
from mlx_kvprune.evals.conditions import Condition, feed, gate_bytes, grid, held, possible
from mlx_kvprune.evals.equal import levelled, planned_nbytes
from mlx_kvprune.evals.job import Grid, Job, gate_sizes
from mlx_kvprune.evals.store import key
from mlx_kvprune.evals.tasks import TASKS
from mlx_kvprune.forward import pruned
from mlx_kvprune.gates.files import Card, save
from mlx_kvprune.policy import POLICIES
from mlx_kvprune.settings import Budget

ASK = {name for name, policy in POLICIES.items() if policy.gates}
TEXT = np.random.default_rng(0).integers(0, VOCAB, 700).tolist()


@pytest.fixture(name="model")
def _model():
    made = tiny_model("llama")
    yield made
    detach(made)


def test_rows_name_the_allocator_that_is_used():
    named = lambda *allocators: [
        (c.describe()["policy"], c.describe()["allocator"], dict(c.more))
        for c in grid(["knorm", "retention", "spkv"], [300], allocators=allocators)[3:]
    ]
    own = [("knorm", "uniform", {}), ("retention", "global", {}), ("spkv", "head_adaptive", {})]
    assert named("auto") == own
    assert grid(["spkv"], [300])[-1].allocator == "head_adaptive"
    assert named("auto", "global") == [
        *own,
        ("knorm", "global", {"allocator": "global"}),
        ("spkv", "global", {"allocator": "global"}),
    ]
    assert named("uniform")[:2] == [("knorm", "uniform", {}), ("retention", "uniform", {"allocator": "uniform"})]
    assert Condition("retention", more=(("allocator", "auto"),)).describe()["allocator"] == "global"
    for condition in grid(["all"], [300]):
        assert condition.settings().get("allocator", "auto") in ("auto", condition.allocator)


@pytest.mark.parametrize("allocator", ["uniform", "global", "auto"])
def test_rows_that_were_stored_before_are_found_again(allocator):
    """The fields of a unit as they were written when ``uniform`` was everybody's default."""
    old = {"policy": "knorm", "allocator": "uniform", "budget": "256", "seed": 0, "kv_bits": 4}
    old["allocator"] = "uniform" if allocator == "auto" else allocator
    (condition,) = [c for c in grid(["knorm"], [256], allocators=(allocator,), bits=(4,)) if c.policy == "knorm"]
    assert key({"task": "x", **condition.describe()}) == key(json.loads(json.dumps({"task": "x", **old})))


def test_who_lacks_gates_is_left_out_by_one_note(model):
    """``--policies all``: the others run; with several budgets it is still one note for each policy."""
    found, notes = possible(model, grid(["all"], [300, 400]))
    assert {c.policy for c in found} == set(POLICIES) - ASK
    assert sorted(note.split()[0] for note in notes) == sorted(ASK)
    assert all("[gates] policy" in note and "\n" not in note for note in notes)
    job = Job(model, None, [], Grid(("all",), ("1/2", "1/3", "300")))
    found, notes = job.conditions(700)
    assert {c.policy for c in found} == set(POLICIES) - ASK
    assert sorted(note.split()[0] for note in notes) == sorted(ASK)
    given_gates(model, ["retention"])
    found, notes = possible(model, grid(["all"], [300]))
    assert {c.policy for c in found} == set(POLICIES) - ASK | {"retention", "retention_probe"}
    assert len(notes) == len(ASK) - 2


@pytest.mark.parametrize("policy", GATED)
def test_levelled_by_what_is_held_not_by_the_gates(model, policy):
    """At the bytes of ``window``; gates are weights, named beside."""
    given_gates(model)
    (condition,), notes = levelled(model, [Condition(policy, Budget(420))])
    assert not notes
    assert condition.describe()["budget"] != "420"
    target = planned_nbytes(model, Condition("window", Budget(420)))
    caches = condition.caches(model)
    feed(model, TEXT, caches)
    assert held(caches)["kv_bytes_peak"] <= planned_nbytes(model, condition) <= target
    assert planned_nbytes(model, condition) > 0.97 * target
    gates = attachment_of(model).gates[policy, ""]
    assert gate_bytes(model, condition) == gates.nbytes == sum(x.nbytes for x in gates.arrays().values()) > 0
    assert gate_bytes(model, Condition("window")) == 0


def saved(model, place, seed: int):
    """A file of random gates, and what ``--gates`` calls it."""
    given_gates(model, ["retention"], seed=seed)
    gates = attachment_of(model).gates["retention", ""]
    return str(save(place / f"gates-{seed}", gates, model, Card("retention")))


def test_several_places_of_gates_are_compared_and_told_apart(model, tmp_path):
    """Each a condition of its own for those who ask gates; what lies there later is another piece of work."""
    one, other = saved(model, tmp_path, 1), saved(model, tmp_path, 2)
    detach(model)
    job = Job(model, None, [], Grid(("knorm", "retention"), ("300",), gates=(one, other)))
    found, notes = job.conditions(700)
    assert [(c.policy, dict(c.more).get("gates")) for c in found[3:]] == [
        ("knorm", None),
        ("retention", one),
        ("retention", other),
    ]
    assert not notes
    task = TASKS["fidelity"]
    units = [task.unit(job, 0, 1, c) for c in found]
    assert ["gate_id" in unit for unit in units] == [False] * 4 + [True] * 2
    assert gate_sizes(job, found) == {
        u["gate_id"]: gate_bytes(model, c) for u, c in zip(units[4:], found[4:], strict=True)
    }
    assert units[-1]["gate_id"] != units[-2]["gate_id"]
    detach(model)
    Path(one).write_bytes(Path(other).read_bytes())
    again = Job(model, None, [], job.grid)
    assert task.unit(again, 0, 1, found[-2])["gate_id"] == units[-1]["gate_id"]
    missing = Grid(("retention",), ("300",), gates=(str(tmp_path / "none"), other))
    found, notes = Job(model, None, [], missing).conditions(700)
    assert [dict(c.more).get("gates") for c in found] == [None, None, None, other]
    assert len(notes) == 1 and "no such file or repository" in notes[0]


def test_several_files_each_for_one_policy(model, tmp_path):
    """That a file serves another policy is no news; that it serves nobody is."""
    width, heads = model.args.hidden_size, [2] * len(model.layers)
    files = {
        method: str(
            save(tmp_path / method, random_gates("mlp", heads, width=width), model, Card(method, thresholds=sizes))
        )
        for method, sizes in (("retention", {}), ("spkv", {"1/4": 0.7}), ("kvzap", {"1/4": -2.5}), ("fastkvzip", {}))
    }
    three = tuple(files[method] for method in ("retention", "spkv", "kvzap"))
    named = lambda found: {(c.policy, Path(dict(c.more)["gates"]).name[:-12]) for c in found if "gates" in dict(c.more)}
    found, notes = Job(model, None, [], Grid(("retention", "spkv", "kvzap"), ("400",), gates=three)).conditions(700)
    assert named(found) == {("retention", "retention"), ("spkv", "spkv"), ("kvzap", "kvzap")}
    assert notes == []
    four = (*three, files["fastkvzip"])
    found, notes = Job(model, None, [], Grid(("retention", "spkv"), ("400",), gates=four)).conditions(700)
    assert named(found) == {("retention", "retention"), ("spkv", "spkv")}
    assert sorted(note.split(" skipped: ")[0] for note in notes) == sorted(files[x] for x in ("fastkvzip", "kvzap"))
    thresholds = Grid(("retention", "spkv", "kvzap"), ("400",), gates=three, threshold="1/4")
    found, notes = Job(model, None, [], thresholds).conditions(700)
    assert named(found) == {("retention", "retention"), ("spkv", "spkv"), ("kvzap", "kvzap")} and not notes
    assert {dict(c.more).get("threshold") for c in found} == {None, 0.7, -2.5}
    number = Grid(("spkv",), ("400",), gates=(files["spkv"], str(tmp_path / "none")), threshold="0.5")
    found, notes = Job(model, None, [], number).conditions(700)
    assert named(found) == {("spkv", "spkv")} and len(notes) == 1 and "no such file or repository" in notes[0]


def test_a_threshold_is_for_the_policies_that_drop(tmp_path):
    model = tiny_model("llama")
    try:
        gates = random_gates("mlp", [2] * len(model.layers), width=model.args.hidden_size)
        path = save(tmp_path / "g", gates, model, Card("spkv", thresholds={"1/4": 0.75}))
        wanted = Grid(("tova", "spkv"), ("300",), gates=(str(path),), threshold="1/4")
        found = {c.policy: c for c in wanted.conditions(700, 0)}
        assert dict(found["spkv"].more)["threshold"] == 0.75
        assert not any("threshold" in dict(found[name].more) for name in ("window", "random", "tova"))
        (cache, *_) = pruned(found["spkv"].caches(model))
        assert dict(cache.settings.options) == {"threshold": 0.75}
        rows = [{**found[name].describe(), "policy": name} for name in ("tova", "spkv")]
        assert [tables.condition(row, rows)["threshold"] for row in rows] == ["-", "0.75"]
    finally:
        detach(model)


def test_local_layers_are_for_the_policies_alone(model):
    given_gates(model, ["retention"])
    conditions = Grid(("knorm", "retention"), ("300",), local_layers="0").conditions(700, 0)
    assert [dict(c.more).get("local_layers") for c in conditions] == [None, None, None, "0", "0"]
    found, notes = possible(model, Grid(("knorm", "retention"), ("300",), local_layers="auto").conditions(700, 0))
    assert {c.policy for c in found} == {"full", "window", "random"} and len(notes) == 2
    rows = [{**c.describe(), "policy": c.policy, "budget": "300"} for c in conditions]
    assert [tables.condition(row, rows).get("local layers") for row in rows] == ["-", "-", "-", "0", "0"]
