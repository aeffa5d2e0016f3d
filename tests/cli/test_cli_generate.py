"""``generate``, ``models``, ``policies`` and ``pull`` as a user runs them."""

from __future__ import annotations

import json

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


def test_policies(capsys):
    from mlx_kvprune.policy import POLICIES

    assert cli.main(["policies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(POLICIES)
    assert "kernel=5" in next(line for line in lines if line.startswith("snapkv"))
    assert cli.main(["policies", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policies"][0]["name"] == "full"


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
