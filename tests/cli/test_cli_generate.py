"""``generate``, ``models``, ``policies`` and ``pull`` as a user runs them."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import pytest
from cli_helpers import run

from mlx_kvprune.cli import main as cli

FIELDS = {
    *("model", "policy", "allocator", "budget", "prompt_tokens", "generated_tokens", "text", "tokens_seen"),
    *("slots_held", "kv_bytes", "kv_bytes_peak", "kv_bytes_full", "prefill_tps", "decode_tps", "ttft_s"),
    *("peak_memory_bytes", "attend_backend"),
}


def test_text_on_stdout_and_the_rest_on_stderr(tiny):
    done = run("generate", "--model", str(tiny), "--prompt", "Hello", "-m", "30", "--budget", "128")
    assert done.returncode == 0
    assert len(done.stdout.rstrip("\n")) == 30
    assert done.stdout.endswith("\n")
    assert "\x1b" not in done.stdout + done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["cache", "memory", "speed"]
    assert "of 128 slots" in done.stderr


def test_json_and_a_piped_prompt(tiny, capsys):
    done = run("generate", "--model", str(tiny), "-m", "200", "--budget", "128", "--json", stdin="a" * 400)
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) >= FIELDS
    assert (found["policy"], found["budget"], found["generated_tokens"]) == ("window", "128", 200)
    assert found["tokens_seen"] == found["prompt_tokens"] + 200
    assert found["slots_held"] <= 128
    assert 0 < found["kv_bytes"] <= found["kv_bytes_peak"] < found["kv_bytes_full"]
    assert found["decode_tps"] > 0
    assert found["ttft_s"] > 0

    assert cli.main(["generate", "--model", str(tiny), "-m", "200", "--budget", "128", "--json", "-p", "a" * 400]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["text"] == found["text"]


@pytest.fixture
def uncompiled():
    """Samplers are ``mx.compile``d: on a CPU each costs seconds of g++ when it is first called."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "extra",
    [
        ["--policy", "full"],
        ["--budget", "64KB"],
        ["--policy", "snapkv", "--policy-option", "kernel=3", "--policy-option", "pooling=max"],
        ["--ignore-chat-template"],
        ["--system-prompt", "Be brief."],
        ["--temp", "0.8", "--top-p", "0.9", "--min-p", "0.01", "--top-k", "20", "--seed", "3"],
        ["--prefill-step-size", "7", "--sinks", "2", "--window", "32"],
        ["--dtype", "float32"],
        ["--allocator", "pyramid"],
        ["--allocator", "head_adaptive", "--policy", "knorm"],
        ["--allocator", "global", "--policy", "knorm", "--head-floor", "0.5"],
        ["--positions", "cache"],
        ["--turn-floor", "0.9", "--store", "kv"],
        ["--kv-bits", "4", "--kv-group-size", "32"],
        ["--kv-key-bits", "8", "--kv-value-bits", "2"],
        ["--kv-value-bits", "5", "--kv-hadamard"],
        ["--kv-bits", "3", "--no-kv-hadamard", "--kv-scheme", "token"],
        ["--kv-bits", "6", "--kv-scheme", "page"],
        ["--kv-bits", "4", "--kv-fine-tokens", "16"],
        ["--kv-bits", "2", "--kv-scheme", "channel", "--kv-fine-tokens", "16", "--kv-fine-bits", "8"],
        ["--kv-bits", "4", "--allocator", "head_adaptive", "--positions", "cache"],
        [
            "--kv-bits",
            "4",
            "--allocator",
            "global",
            "--policy",
            "snapkv",
            "--positions",
            "cache",
            "--kv-scheme",
            "page",
        ],
        ["--kv-bits", "4", "--allocator", "pyramid", "--policy", "h2o", "--kv-fine-tokens", "16"],
        ["--kv-bits", "8", "--policy", "surprise", "--allocator", "head_adaptive", "--kv-fine-tokens", "16"],
    ],
)
def test_options(extra, tiny, capsys):
    words = ["generate", "--model", str(tiny), "--prompt", "b" * 300, "-m", "8", "--budget", "160", "--json", *extra]
    assert cli.main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["generated_tokens"] == 8
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["text"] == first["text"]


def test_policy_that_keeps_everything_answers_as_mlx_lm_does(tiny, capsys):
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=60)
    for extra in (["--policy", "full"], ["--budget", "4096"]):
        assert cli.main(["generate", "--model", str(tiny), "-p", "Hello", "-m", "60", *extra]) == 0
        assert capsys.readouterr().out == expected + "\n"


SMALL = ["--prompt", "b" * 400, "-m", "8", "--budget", "160", "--json"]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (
            "--kv-key-bits 8 --kv-value-bits 2 --kv-group-size 32",
            {"kv_key_bits": 8, "kv_value_bits": 2, "kv_group_size": 32},
        ),
        ("--kv-bits 4 --kv-scheme page --kv-hadamard", {"kv_bits": 4, "kv_scheme": "page", "kv_hadamard": True}),
        ("--kv-bits 2 --kv-fine-tokens 9 --kv-fine-bits 8", {"kv_bits": 2, "kv_fine_tokens": 9, "kv_fine_bits": 8}),
        (
            "--allocator global --head-floor 0.1 --turn-floor 0",
            {"allocator": "global", "head_floor": 0.1, "turn_floor": 0},
        ),
        (
            "--positions cache --store kv --sinks 2 --seed 3",
            {"positions": "cache", "store": "kv", "n_sink": 2, "seed": 3},
        ),
    ],
)
def test_options_reach_the_cache(options, settings, tiny, capsys, monkeypatch):
    from mlx_kvprune.cli import generate

    made = []
    original = generate.caches
    monkeypatch.setattr(generate, "caches", lambda *given: made.append(original(*given)) or made[-1])
    assert cli.main(["generate", "--model", str(tiny), *SMALL, *options.split()]) == 0
    assert len(made[0]) == 2
    for cache in made[0]:
        assert {name: getattr(cache.settings, name) for name in settings} == settings


def test_fewer_bits_hold_fewer_bytes_in_as_many_slots(tiny, capsys):
    held = []
    for bits in ([], ["--kv-bits", "8"], ["--kv-bits", "2"]):
        assert cli.main(["generate", "--model", str(tiny), *SMALL, *bits]) == 0
        held.append(json.loads(capsys.readouterr().out))
    assert held[0]["kv_bytes"] > held[1]["kv_bytes"] > held[2]["kv_bytes"]
    assert len({found["slots_held"] for found in held}) == 1
    assert len({found["kv_bytes_full"] for found in held}) == 1


def test_heads_that_differ_are_told_on_average(tiny, capsys):
    options = ["--allocator", "global", "--policy", "knorm", "--head-floor", "0", "--budget", "224"]
    assert cli.main(["generate", "--model", str(tiny), "-p", "b" * 900, "-m", "8", *options]) == 0
    line = capsys.readouterr().err.splitlines()[0]
    found = re.search(r"(\d+) of (\d+) slots per KV head on average, (\d+) at most", line)
    assert found is not None
    held, cap, most = map(int, found.groups())
    assert held <= cap == 224
    assert most >= held


def test_positions_in_the_cache_read_past_the_trained_context(short, capsys):
    words = ["generate", "--model", str(short), "--prompt", "b" * 400, "-m", "8", "--json"]
    for extra in (["--positions", "text"], ["--policy", "full"]):
        assert cli.main([*words, *extra]) == 2
        assert "the limit is 300" in capsys.readouterr().err
    for budget in ("128", "1000", "64MB"):  # of which no more is used than the model has positions
        assert cli.main([*words, "--policy", "window", "--budget", budget]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["tokens_seen"] > 400 and told["slots_held"] <= min(300, 128 if budget == "128" else 300)


def test_policies(capsys):
    from mlx_kvprune.policy import POLICIES

    assert cli.main(["policies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(POLICIES)
    assert "kernel=5" in next(line for line in lines if line.startswith("snapkv"))
    assert cli.main(["policies", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["policies"]
    assert found[0]["name"] == "full"
    for policy in found:
        assert set(policy["options"]) <= set(policy["meanings"]), policy["name"]


def test_one_policy_with_its_formula_and_what_its_options_mean(capsys):
    assert cli.main(["policies", "snapkv"]) == 0
    out = capsys.readouterr().out
    assert "arXiv 2404.14469" in out and "Attributes" not in out and "--window 64" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == [
        "last=64",
        "kernel=5",
        "pooling=mean",
    ]
    assert cli.main(["policies", "full"]) == 0
    assert cli.main(["policies", "snapk"]) == 2
    assert "try 'snapkv'" in capsys.readouterr().err


def test_models(capsys):
    assert cli.main(["models"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert cli.main(["models", "--json"]) == 0
    names = {model["name"] for model in json.loads(capsys.readouterr().out)["models"]}
    assert "smollm2-135m" in names


def test_pull_prints_the_directory(capsys, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("mlx_kvprune.models.pull", lambda name, **named: calls.append((name, named)) or tmp_path)
    assert cli.main(["pull", "smollm2-135m", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert cli.main(["pull", "smollm2-135m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "smollm2-135m", "path": str(tmp_path)}
    assert calls == [("smollm2-135m", {"dtype": "float32"}), ("smollm2-135m", {"dtype": None})]


@pytest.mark.model
def test_a_real_model_answers():
    done = run("generate", "--prompt", "What is the capital of France?", "-m", "12", "--budget", "256")
    assert done.returncode == 0
    assert "Paris" in done.stdout
