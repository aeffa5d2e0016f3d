"""Learned gates on the command line: ``--gates``, thresholds, what ``policies`` says of them."""

from __future__ import annotations

import json

import pytest
from tiny_gates import random_gates

import mlx_kvprune as kvp
from mlx_kvprune.cli import main as cli
from mlx_kvprune.cli.cache_options import CacheOptions, decided, policy_options, settings_of, side_by_side
from mlx_kvprune.gates import files
from mlx_kvprune.gates.files import Card
from mlx_kvprune.places import shipped
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
        ("--gates g.safetensors", "[gates] no such file or repository; got 'g.safetensors'"),
        (
            "--policy window --gates g.safetensors",
            "[gates] would have no effect; got g.safetensors; try it with --policy retention or",
        ),
        ("--policy spkv --allocator uniform", "got allocator uniform; try --allocator head_adaptive or global, or"),
        ("--policy spkv --kv-bits 4 --kv-fine-tokens 32", "got 32 fine tokens; try --kv-fine-tokens 0, or"),
        ("--policy spkv --policy-option threshold=high", "threshold must be a number; got 'high'; try threshold=0.5"),
        ("--policy spkv --policy-option threshold=2", "threshold makes no sense; got 2.0; try 0.5"),
        ("--policy kvzap --policy-option threshold=[1]", "threshold makes no sense; got [1]; try null"),
        (
            "--threshold 0.5",
            "[threshold] retention has none; got '0.5'; try it with --policy spkv or kvzap or fastkvzip or dms",
        ),
        ("--policy spkv --threshold much", "[threshold] neither a number nor a share; got 'much'; try 0.5, or 1/4"),
        (
            "--policy kvzap --threshold 1/4",
            "[threshold] a share is looked up in a gate file; got '1/4' without --gates",
        ),
        (
            "--policy spkv --threshold 1 --policy-option threshold=1",
            "[threshold] given twice; got '1' and a --policy-op",
        ),
        ("--policy spkv --threshold 2", "threshold makes no sense; got 2.0; try 0.5"),
        ("--policy spkv --policy-option bias=nan", "bias makes no sense; got nan; try 0.0"),
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


def test_a_threshold_is_a_number_or_what_the_card_knows(tiny, tmp_path):
    assert settings_of(CacheOptions("dms", threshold="-0.25")).options == (("threshold", -0.25),)
    model = kvp.load(str(tiny))[0]
    gates = random_gates("mlp", [2] * len(model.layers), width=model.args.hidden_size)
    path = str(files.save(tmp_path / "gates", gates, model, Card("kvzap", thresholds={"1/4": -6.5, "1/8": -5.0})))
    assert settings_of(CacheOptions("kvzap", gates=path, threshold="1/8")).options == (("threshold", -5.0),)
    with pytest.raises(ValueError, match=r"\[threshold\] not a share that .* knows; got '1/3'; try one of: 1/4, 1/8"):
        settings_of(CacheOptions("kvzap", gates=path, threshold="1/3"))
    options = side_by_side(CacheOptions(gates=path, threshold="1/8"), ["kvzap", "tova"])
    assert [one.threshold for one in options] == ["1/8", ""]


def test_the_policy_shares_its_own_way_unless_told():
    assert settings_of(CacheOptions("full")).allocator == "uniform"
    assert settings_of(CacheOptions("window")).allocator == "uniform"
    assert settings_of(CacheOptions("retention")).allocator == "global"
    assert settings_of(CacheOptions("retention", allocator="uniform")).allocator == "uniform"


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [
        ({}, "smollm2-135m", "retention"),  # its gates come along
        ({"budget": "8MB", "kv_bits": 4}, "smollm2-135m", "retention"),
        ({}, "gemma3-270m", "window"),
        ({}, "/no/such/model", "window"),
        ({}, "../models/smollm2-135m", "window"),
        ({}, str(shipped("models") / "smollm2-135m"), "window"),  # nobody would look for gates there
        ({"budget": "48"}, "smollm2-135m", "window"),  # too small for gates
        ({"policy": "knorm"}, "smollm2-135m", "knorm"),
    ],
)
def test_the_policy_follows_from_what_there_is(options, model, expected):
    assert decided(CacheOptions(**options), model).policy == expected


def test_the_policy_is_that_of_the_gates_that_are_given(tiny, tmp_path):
    model = kvp.load(str(tiny))[0]
    gates = random_gates("mlp", [2] * len(model.layers), width=model.args.hidden_size)
    one = files.save(tmp_path / "kvzap", gates, model, Card("kvzap"))
    assert decided(CacheOptions(gates=str(one)), "gemma3-270m").policy == "kvzap"
    assert decided(CacheOptions(gates=str(tmp_path)), "gemma3-270m").policy == "kvzap"
    files.save(tmp_path / "again", gates, model, Card("kvzap"))
    assert decided(CacheOptions(gates=str(tmp_path)), "gemma3-270m").policy == "kvzap"
    files.save(tmp_path / "spkv", gates, model, Card("spkv"))
    with pytest.raises(ValueError, match=r"\[policy\] .* has gates of several; got none; try --policy kvzap or spkv"):
        decided(CacheOptions(gates=str(tmp_path)), "gemma3-270m")
    files.save(tmp_path / "retention", gates, model, Card("retention"))
    assert decided(CacheOptions(gates=str(tmp_path)), "gemma3-270m").policy == "retention"


def test_a_typo_is_not_a_reason_for_another_policy():
    with pytest.raises(ValueError, match="retention has no such option; got 'kernel'"):
        decided(CacheOptions(policy_option=["kernel=7"]), "smollm2-135m")
    with pytest.raises(ValueError, match=r"\[policy\] auto is for generate, chat and ask"):
        settings_of(CacheOptions("auto"))


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
