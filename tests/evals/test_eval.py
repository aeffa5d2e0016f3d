"""The verb: tables, JSON, files; and the real model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from test_needles import TEXTS, Bytes
from tiny_models import tiny_model
from typer.testing import CliRunner

from mlx_kvprune import detach
from mlx_kvprune.cli import eval as verb
from mlx_kvprune.cli.options import ModelOptions
from mlx_kvprune.evals import presets
from mlx_kvprune.evals.tasks import named


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


def test_tasks_as_json_markdown_rows_and_a_picture(run, tmp_path):
    out, picture = tmp_path / "rows.jsonl", tmp_path / "kl.png"
    args = ("--policies", "snapkv,probe", "--budgets", "224", "--json", "--markdown", "--out", str(out))
    done = run(*args, "--plot", str(picture))
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    fields = json.loads(done.stdout)
    assert [(row["task"], row["policy"]) for row in fields["rows"] if row["task"] != "needles"] == [
        (task, policy) for task in ("fidelity", "regret") for policy in ("full", "window", "random", "snapkv")
    ]
    assert {row["policy"] for row in fields["rows"] if row["task"] == "needles"} >= {"full", "probe"}
    first, *units = [json.loads(line) for line in out.read_text().splitlines()]
    assert set(first["run"]) == {"command", "date", "machine", "versions", "notes"}
    assert len(units) == 4 + 4 + 2 * 5
    assert [note[:18] for note in fields["notes"]] == ["fidelity: probe 22", "regret: probe 224 "]
    assert first["run"]["notes"] == fields["notes"]
    for text in ("**fidelity**", "**needles (dilution-bound", "**regret**", "| full | unbounded |", "does not count"):
        assert text in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = run(*args)
    assert json.loads(again.stdout)["rows"] == fields["rows"]
    assert len(out.read_text().splitlines()) == 1 + len(units)


def test_fractions_allocators_and_bits(run):
    done = run("--tasks", "fidelity", "--policies", "knorm", "--budgets", "1/2", "--allocators", "uniform,global",
               "--kv-bits", "none,4", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [(row["policy"], row["allocator"], row.get("kv_bits")) for row in rows] == [
        ("full", "uniform", None),
        ("window", "uniform", None),
        ("random", "uniform", None),
        ("knorm", "uniform", None),
        ("knorm", "global", None),
        ("window", "uniform", 4),
        ("random", "uniform", 4),
        ("knorm", "uniform", 4),
        ("knorm", "global", 4),
    ]
    assert rows[0]["budget"] == "unbounded"
    assert {int(row["budget"]) > 200 for row in rows[5:]} == {True}  # in fewer bits more slots fit
    assert {int(row["budget"]) <= 150 for row in rows[1:5]} == {True}
    assert all(row["share"] == "1/2" for row in rows[1:])


KILLED = """
import os, sys, signal
import mlx_kvprune
sys.path[:0] = {paths!r}
from test_needles import TEXTS, Bytes
from tiny_models import tiny_model
import typer
from mlx_kvprune.cli import eval as verb
from mlx_kvprune.evals.store import Store
verb.load = lambda options: (tiny_model("llama"), Bytes())
add, most = Store.add, int(sys.argv.pop(1))
def counted(self, unit):
    add(self, unit)
    if len(self.units) == most:
        os.kill(os.getpid(), signal.SIGKILL)
Store.add = counted
app = typer.Typer()
app.command()(verb.eval_)
app()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_run_killed_by_the_system_goes_on(run, tmp_path):
    args = ["--tokens", "200", "--trials", "2", "--tasks", "fidelity,needles", "--budgets", "128", "--json"]
    out = tmp_path / "killed.jsonl"
    here, data = Path(__file__).parent, ["--data", str(tmp_path / "text.txt")]
    program = KILLED.format(paths=[str(here), str(here.parent)])
    done = subprocess.run([sys.executable, "-c", program, "6", *args, *data, "--out", str(out)], check=False)
    assert done.returncode == -9
    assert len(out.read_text().splitlines()) == 1 + 6
    whole, resumed = run(*args), run(*args, "--out", str(out))
    assert json.loads(resumed.stdout)["rows"] == json.loads(whole.stdout)["rows"]
    assert len(out.read_text().splitlines()) == 2 + 4 + 2 * 4


def test_presets_and_what_goes_before_them():
    quick = presets.chosen("quick", tokens=500, tasks=None)
    assert (quick["tokens"], quick["haystack"], quick["budgets"]) == (500, 500, "1/4,1/8")
    assert presets.chosen("")["haystack"] == presets.DEFAULTS["tokens"] // 2
    assert presets.chosen("standard")["policies"] == "all"
    with pytest.raises(ValueError, match="try one of: quick, standard, frontier"):
        presets.chosen("huge")


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


def test_a_file_has_all_columns_and_a_narrow_terminal_those_that_fit(run, monkeypatch):
    args = ("--tasks", "fidelity", "--policies", "", "--budgets", "104")
    monkeypatch.delenv("COLUMNS", raising=False)  # a parallel run of tests has it
    wide = run(*args).stdout
    assert "KL 0-256" in wide and "…" not in wide
    monkeypatch.setenv("COLUMNS", "110")
    narrow = run(*args).stdout
    assert "KL 0-256" not in narrow and "KL over" in narrow and "…" not in narrow


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--tasks", "fidelty"], "[tasks] not a list of tasks; got 'fidelty'"),
        (["--tasks", ""], "[tasks]"),
        (["--policies", "snapvk"], "try 'snapkv'"),
        (["--budgets", "many"], "[budget] not a budget"),
        (["--budgets", ""], "[budgets] none"),
        (["--budgets", "32"], "[budget] too small"),
        (["--budgets", "3/2"], "[budgets] not a fraction"),
        (["--budgets", "1/64"], "[budget]"),
        (["--allocators", "globl"], "[allocators] not known"),
        (["--kv-bits", "7"], "[kv-bits] not known"),
        (["--equal", "time"], "[equal] not known"),
        (["--grid", "huge"], "[grid] not known"),
        (["--tasks", "qa"], "[qa] no questions in the data"),
        (["--tokens", "9999"], "trained context"),
        (["--data", "/nowhere.txt"], "[data] cannot read"),
        (["--quick", "--grid", "standard"], "[grid] --quick is a grid of its own; got --grid standard as well"),
        (["--plot", "/nowhere/kl.png"], "[plot] no such folder; got '/nowhere'"),
        (["--plot", "kl.png", "--tasks", "regret,density"], "[plot] nothing to draw; got --tasks regret,density"),
        (["--out", "/nowhere/rows.jsonl"], "[out] no such folder; got '/nowhere'"),
        (
            ["--threshold", "1", "--policies", "tova"],
            "[threshold] no policy that has one; got tova; try --policies spkv",
        ),
        (["--threshold", "1/4", "--policies", "kvzap"], "[threshold] a share is looked up in a gate file"),
        (["--out", "/tmp"], "[out] a folder; got '/tmp'"),
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
    job = verb.prepare(options, presets.chosen("", policies="", budgets="128", tokens=320, trials=1), [], seed=0)
    rows, notes = verb.run_tasks(named(["fidelity", "needles", "regret"]), job)
    assert not notes
    by = {(row["task"], row["policy"], row.get("wording")): row for row in rows}
    assert by["fidelity", "full", None]["kl"] == 0.0
    assert 0.01 < by["fidelity", "window", None]["kl"] < 2
    assert 0.3 < by["fidelity", "window", None]["agreement"] < 1
    assert np.isfinite([row["nll"] for row in rows if row["task"] == "fidelity"]).all()
    assert by["needles", "full", "verbatim"]["exact"] == 1
    assert 0 < by["regret", "window", None]["regret"] < 0.5
    assert by["regret", "full", None]["regret"] == 0.0
    detach(job.model)


def test_gates_for_nobody_are_refused_before_the_model_is_loaded(run, tmp_path):
    done = run("--policies", "snapkv", "--gates", str(tmp_path), "--budgets", "224")
    assert done.exit_code and "[gates] no policy that asks some; got snapkv; try" in str(done.exception)
