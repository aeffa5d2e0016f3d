"""Learned gates on the command line: ``--gates``, thresholds, what ``policies`` says of them."""

from __future__ import annotations

import json

import pytest
from tiny_gates import random_gates

import mlx_kvprune as kvp
from mlx_kvprune.cli import main as cli
from mlx_kvprune.cli.cache_options import CacheOptions, policy_options, settings_of
from mlx_kvprune.gates import files
from mlx_kvprune.gates.files import Card
from mlx_kvprune.policy import POLICIES


def said(capsys, *words: str) -> dict:
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_policies_say_how_they_share_and_who_needs_gates(capsys):
    assert cli.main(["policies"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "head_adaptive" in lines["spkv"]
    assert "threshold=0.5" in lines["spkv"]
    assert "needed" in lines["retention"]
    assert "needed" not in lines["snapkv"]
    for row in said(capsys, "policies")["policies"]:
        assert row["allocator"] == POLICIES[row["name"]].allocator
        assert row["needs_gates"] == bool(POLICIES[row["name"]].gates)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gates g.safetensors", "[gates] would have no effect; got g.safetensors; try it with --policy retention or"),
        ("--policy spkv --allocator uniform", "got allocator uniform; try --allocator head_adaptive or global, or"),
        ("--policy spkv --kv-bits 4 --kv-fine-tokens 32", "got 32 fine tokens; try --kv-fine-tokens 0, or"),
        ("--policy spkv --policy-option threshold=high", "threshold must be a number; got 'high'; try threshold=0.5"),
        ("--policy spkv --policy-option threshold=2", "threshold makes no sense; got 2.0; try 0.5"),
        ("--policy kvzap --policy-option threshold=[1]", "threshold makes no sense; got [1]; try null"),
        ("--policy full --allocator global", "[allocator] would have no effect; got global; try another policy"),
        ("--allocator equal", "[allocator] not known; got 'equal'; try one of: uniform"),
    ],
)
def test_found_out_before_a_model_is_loaded(words, expected, capsys):
    assert cli.main(["generate", "--prompt", "x", "--budget", "600", *words.split()]) == 2
    assert expected in capsys.readouterr().err


def test_no_threshold_is_spelled_null():
    assert (
        policy_options("spkv", ["threshold=null"]) == policy_options("spkv", ["threshold=none"]) == {"threshold": None}
    )
    assert policy_options("kvzap", ["threshold=null"]) == {"threshold": None}
    assert policy_options("kvzap", ["threshold=-4.5"]) == {"threshold": -4.5}
    with pytest.raises(ValueError, match="kernel must be a whole number"):
        policy_options("snapkv", ["kernel=null"])
    settings = settings_of(CacheOptions("spkv", "600", "uniform", policy_option=["threshold=null"]))
    assert settings.options == (("threshold", None),)


def test_the_policy_shares_its_own_way_unless_told():
    assert settings_of(CacheOptions("full")).allocator == "uniform"
    assert settings_of(CacheOptions("window")).allocator == "uniform"
    assert settings_of(CacheOptions("retention")).allocator == "global"
    assert settings_of(CacheOptions("retention", allocator="uniform")).allocator == "uniform"


def test_generate_with_a_gate_file(tiny, tmp_path, capsys):
    model = kvp.load(str(tiny))[0]
    gates = random_gates("shared", [2] * len(model.layers), width=model.args.hidden_size)
    path = files.save(tmp_path / "gates", gates, model, Card("retention"))
    words = ("generate", "--model", str(tiny), "--prompt", "a" * 400, "--max-tokens", "5", "--policy", "retention")
    words = (*words, "--window", "16", "--budget", "200")
    for where in (path, tmp_path):
        told = said(capsys, *words, "--gates", str(where))
        assert told["allocator"] == "global"
        assert told["policy"] == "retention"
        assert told["tokens_seen"] > 400 > told["slots_held"]
    assert cli.main([*words]) == 2
    assert "[gates] policy 'retention' needs gates that were trained for this model" in capsys.readouterr().err
    assert cli.main([*words[:-5], "spkv", "--budget", "600", "--gates", str(path)]) == 2
    assert "try --policy retention" in capsys.readouterr().err
