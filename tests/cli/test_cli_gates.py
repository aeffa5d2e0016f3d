"""``gates show`` in a process of its own, and bad input to all three."""

from __future__ import annotations

import json
import re

import pytest
from cli_helpers import run
from tiny_models import tiny_model

from mlx_kvprune.gates import Gates, GateShape, files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, model = tmp_path_factory.mktemp("gates"), tiny_model("llama")
    gates = Gates(GateShape("linear", (128, 128), (2, 2)))
    quality = ({"budget": "1/8", "kl": 0.25}, {"budget": "1/4", "kl": 0.125})
    card = files.Card("retention", tokens=12345, thresholds={"1/4": 0.5}, quality=quality, limits="Few.\x1b[31m")
    files.save(place / "gates-a", gates, model, card)
    files.save(place / "gates-b", gates, model, files.Card("kvzap"))
    (place / "other.safetensors").write_text("not gates")
    return place


def test_show_a_file_and_a_folder(folder):
    one = run("gates", "show", str(folder / "gates-a.safetensors"))
    assert one.returncode == 0, one.stderr
    lines = one.stdout.splitlines()
    assert lines[0] == str(folder / "gates-a.safetensors")
    for line in (
        "  method     retention",
        "  tokens     12,345",
        "  threshold  0.5 keeps 1/4",
        "  budget  kl",
        "  cost       516 numbers, 2,064 bytes in memory, 1,024 FLOP a token",
    ):
        assert line in lines, one.stdout
    both = json.loads(run("gates", "show", str(folder), "--json").stdout)["gates"]
    assert [card["method"] for card in both] == ["retention", "kvzap"]
    assert both[0]["cost"] == {"numbers": 516, "bytes": 2064, "flops": 1024}
    assert both[0]["quality"][1] == {"budget": "1/4", "kl": 0.125}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none.safetensors"], r"\[gates\] no such file or repository; got 'none.safetensors'"),
        (["show", "some/Model-1.7B-gates"], r"\[gates\] cannot fetch some/Model-1.7B-gates"),
        (["pull", "none"], r"\[gates\] not a repository on the hub; got 'none'; try OWNER/NAME"),
        (["push", "none.safetensors", "a/b"], r"\[gates\] cannot read none.safetensors"),
        (["push", "none.safetensors"], "missing argument"),
        (["shwo"], "no such verb; got 'shwo'; try show"),
    ],
)
def test_bad_input(arguments, message):
    result = run("gates", *arguments)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr


def test_a_folder_without_gates(tmp_path):
    result = run("gates", "show", str(tmp_path))
    assert result.returncode == 2
    assert "no gate files there" in result.stderr
