"""Runs: all tasks on a tiny model; a killed one goes on and ends with the same rows."""

from __future__ import annotations

import json

import pytest
from test_needles import TEXTS, Bytes
from tiny_models import tiny_model

from mlx_kvprune import detach
from mlx_kvprune.evals import job as jobs
from mlx_kvprune.evals.conditions import FULL
from mlx_kvprune.evals.job import Grid, Job
from mlx_kvprune.evals.store import Store, key
from mlx_kvprune.evals.tasks import TASKS, named
from mlx_kvprune.evals.texts import Document

DATA = [Document(TEXTS[0], "weather", "What does it speak of?", ("the weather", "rain"))]


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    yield made
    detach(made)


def job_of(model, *policies: str, **more) -> Job:
    grid = Grid(policies, more.pop("budgets", ("1/2",)))
    known = {"tokens": 400, "haystack": 450, "trials": 2, "texts": 1, "about": {"model": "tiny"}}
    return Job(model, Bytes(), DATA, grid, **{**known, **more})


def done(job: Job, names: list[str], store: Store, stop_at: int | None = None) -> list[list[dict]]:
    """The rows of tasks; ``stop_at``: a kill after as many units."""
    ticks = []
    tasks, add = named(names), store.add
    left = jobs.left(job, tasks, store)

    def counted(unit):
        if stop_at is not None and len(store.units) >= stop_at:
            raise KeyboardInterrupt
        add(unit)

    store.add = counted
    jobs.run(job, tasks, store, ticks.append)
    assert sum(ticks) == left
    assert jobs.left(job, tasks, store) == 0
    return [jobs.rows(job, task, store) for task in tasks]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "turns"])
def test_every_task_gives_rows_for_every_condition(model, name):
    job, task = job_of(model, "knorm", "probe"), TASKS[name]
    (rows,) = done(job, [name], Store())
    policies = ["full", "window", "random", "knorm", *(["probe"] if task.question else [])]
    assert list(dict.fromkeys(row["policy"] for row in rows)) == policies
    assert all(row.get("bound", "") == task.bound for row in rows)
    assert all(row["kv_bytes_peak"] > 0 and row["task"] == name for row in rows)


def test_turns_tells_and_asks_back(model, monkeypatch):
    from mlx_kvprune.evals import turns

    monkeypatch.setattr(turns, "TURNS", 3)
    monkeypatch.setattr(turns, "TOLD", 2)
    monkeypatch.setattr(turns, "length", lambda job: len(turns.rendered(job.tokenizer, turns.items(job)[0].turns)))
    rows = turns.TASK.rows(
        [
            turns.TASK.unit(job_of(model), 0, 1, condition, result)
            for condition, result in turns.measure(
                job_of(model), turns.items(job_of(model))[0], job_of(model).conditions(400)[0], lambda n: None
            )
        ]
    )
    assert [(row["policy"], row["trials"]) for row in rows] == [("full", 2), ("window", 2), ("random", 2)]
    assert all(outcome["never_told"] < 0 for row in rows for outcome in row["outcomes"])


@pytest.mark.parametrize("stop_at", [1, 4, 9])
def test_a_killed_run_goes_on_and_ends_with_the_same_rows(model, tmp_path, stop_at):
    names = ["fidelity", "multikey"]
    expected = done(job_of(model, "knorm"), names, Store())
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        done(job_of(model, "knorm"), names, Store(path, {"command": "first"}), stop_at)
    with path.open("a") as file:
        file.write('{"task": "fidel')  # torn by the kill
    before = path.read_text().splitlines()[:-1]
    assert len(before) == stop_at + 1
    store = Store(path, {"command": "second"})
    assert len(store.units) == stop_at
    assert done(job_of(model, "knorm"), names, store) == expected
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text().splitlines()[: stop_at + 1] == before  # what stood there is untouched
    units = [line for line in lines if "run" not in line]
    assert [line["run"]["command"] for line in lines if "run" in line] == ["first", "second"]
    assert len({key(unit) for unit in units}) == len(units) == 4 + 2 * 4
    again = Store(path, {"command": "third"})
    assert done(job_of(model, "knorm"), names, again) == expected
    assert "third" not in path.read_text()  # nothing was left to do


def test_other_settings_are_other_work(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    done(job_of(model), ["needles"], Store(path))
    for other in ({"seed": 1}, {"trials": 3}, {"haystack": 460}, {"about": {"model": "other"}}, {"budgets": ("1/3",)}):
        assert jobs.left(job_of(model, **other), named(["needles"]), Store(path)) > 0, other
    assert jobs.left(job_of(model, "knorm"), named(["needles"]), Store(path)) == 2 * 450  # the new policy's alone
    assert jobs.left(job_of(model), named(["needles"]), Store(path)) == 0


def test_seeds_and_settings_stand_in_each_row(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    done(job_of(model, seed=3), ["fidelity"], Store(path, {"command": "x"}))
    run, *units = [json.loads(line) for line in path.read_text().splitlines()]
    assert run == {"run": {"command": "x"}}
    for unit in units:
        assert unit["seed"] == (0 if unit["policy"] == "full" else 3)  # the full cache draws nothing
        assert unit["setup"] == {"model": "tiny", "tokens": 400, "seed": 3, "of": 1}


def test_excerpts_of_another_seed_are_known_by_how_many_there_are(model):
    """Their first is another one if there are two; seed 0 begins at the beginning, however many there are."""
    first = lambda seed, texts: key(TASKS["fidelity"].unit(job_of(model, seed=seed, texts=texts), 0, texts, FULL))
    assert first(0, 1) == first(0, 2)
    assert first(1, 1) != first(1, 2)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "fidelity", "policy": "full"}\n')
    with pytest.raises(ValueError, match=r"not a row of eval; got line 1"):
        Store(path)


def test_texts_are_pooled(model):
    (rows,) = done(job_of(model, tokens=240, texts=3), ["fidelity"], Store())
    assert [row["texts"] for row in rows] == [3, 3, 3]
    assert rows[1]["kl_low"] <= rows[1]["kl"] <= rows[1]["kl_high"]
    (rows,) = done(job_of(model, tokens=240, texts=3), ["regret"], Store())
    assert rows[1]["regret"] == pytest.approx(sum(x["regret"] for x in rows[1]["by_age"]))
    assert len(rows[1]["by_layer"]) == 2


def test_what_a_later_task_refuses_is_refused_before_the_first_is_measured(model):
    job = job_of(model, "knorm", haystack=90_000)
    with pytest.raises(ValueError, match=r"\[haystack\] no text of 90000 tokens"):
        jobs.check(job, named(["fidelity", "needles"]))
