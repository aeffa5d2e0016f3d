"""The verb: tables, JSON, files; and the real model."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import typer
from test_needles import TEXTS, Bytes
from tiny_models import tiny_model
from typer.testing import CliRunner

from mlx_kvprune import detach
from mlx_kvprune.cli import eval as verb
from mlx_kvprune.cli.options import ModelOptions


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the verb on a tiny model."""
    model = tiny_model("llama")
    data = tmp_path / "text.txt"
    data.write_text(TEXTS[0])
    monkeypatch.setattr(verb, "load", lambda options: (model, Bytes()))
    app = typer.Typer()
    app.command()(verb.eval_)
    yield lambda *args: CliRunner().invoke(app, ["--tokens", "300", "--trials", "2", "--data", str(data), *args])
    detach(model)


def test_all_tasks_as_json_markdown_and_rows(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run("--policies", "snapkv,probe", "--budgets", "224", "--json", "--markdown", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    fields = json.loads(done.stdout)
    assert [(row["task"], row["policy"]) for row in fields["rows"] if row["task"] != "needles"] == [
        (task, policy) for task in ("fidelity", "regret") for policy in ("full", "window", "random", "snapkv")
    ]
    assert {row["policy"] for row in fields["rows"] if row["task"] == "needles"} >= {"full", "probe"}
    assert [json.loads(line) for line in out.read_text().splitlines()] == fields["rows"]
    assert [note[:18] for note in fields["notes"]] == ["fidelity: probe 22", "regret: probe 224 "]
    for text in ("**fidelity**", "**needles**", "**regret**", "| full | unbounded |", "does not count"):
        assert text in done.stderr


def test_markdown_tables_are_rectangular(run):
    done = run("--tasks", "fidelity,needles,regret", "--budgets", "104,128", "--markdown")
    assert done.exit_code == 0, done.output
    tables = re.findall(r"(?:^\|.*\|\n)+", done.stdout, flags=re.M)
    assert len(tables) == 3
    for table in tables:
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) == 2 + 1 + 2 * 3


def test_a_drawn_table(run):
    done = run("--tasks", "regret", "--policies", "")
    assert done.exit_code == 0, done.output
    assert "regret" in done.stdout
    assert "window" in done.stdout


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--tasks", "fidelty"], "[tasks] not a list of tasks; got 'fidelty'"),
        (["--tasks", ""], "[tasks]"),
        (["--policies", "snapvk"], "try 'snapkv'"),
        (["--budgets", "many"], "[budget] not a budget"),
        (["--budgets", ""], "[budgets] none"),
        (["--budgets", "32"], "[budget] too small"),
        (["--tokens", "9999"], "trained context"),
        (["--data", "/nowhere.txt"], "[data] cannot read"),
    ],
)
def test_wrong_input_is_one_line(run, args, problem):
    done = run(*args)
    assert isinstance(done.exception, ValueError)
    assert problem in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.model
def test_smollm2_smoke():
    """The embedded model: a roomy cache is the full one, a tight one is not, and the needle is found in full."""
    options = ModelOptions("smollm2-135m")
    job, notes = verb.prepare(options, [], ["128"], None, tokens=320, trials=1, seed=0)
    rows, more = verb.run_tasks(["fidelity", "needles", "regret"], job)
    assert not notes + more
    by = {(row["task"], row["policy"], row.get("wording")): row for row in rows}
    assert by["fidelity", "full", None]["kl"] == 0.0
    assert 0.01 < by["fidelity", "window", None]["kl"] < 2
    assert 0.3 < by["fidelity", "window", None]["agreement"] < 1
    assert np.isfinite([row["nll"] for row in rows if row["task"] == "fidelity"]).all()
    assert by["needles", "full", "verbatim"]["exact"] == 1
    assert 0 < by["regret", "window", None]["regret"] < 0.5
    assert by["regret", "full", None]["regret"] == 0.0
    detach(job.model)
