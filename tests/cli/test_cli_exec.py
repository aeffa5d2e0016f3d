"""``exec``: mlx-lm's own verbs, every model that they load bounded."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from cli_helpers import ENVIRONMENT, run

from mlx_kvprune import rebind
from mlx_kvprune.attach import attachment_of, settings_from
from mlx_kvprune.cli import exec_


@pytest.mark.parametrize(
    "words",
    [
        "mlx_lm.server --port 1",
        "mlx_lm server --port 1",
        "python -m mlx_lm.server --port 1",
        "python3.11 -m mlx_lm server --port 1",
        "/usr/bin/python3 -m mlx_lm server --port 1",
        "mlx-lm server --port 1",
    ],
)
def test_spellings(words):
    assert exec_.parse(words.split()) == ("server", ["--port", "1"])


@pytest.mark.parametrize("words", ["server", "mlx_lm", "mlx_lm.convert", "python -m http.server", "python x.py", "ls"])
def test_other_commands_are_refused(words):
    with pytest.raises(ValueError, match=r"\[exec\] not a verb .*; try mlx_lm\."):
        exec_.parse(words.split())


@pytest.mark.parametrize(
    "flag", ["--kv-bits", "--kv-bits=4", "--max-kv-size", "--max-kv", "--draft-model=x", "--draft"]
)
def test_flags_that_would_be_ignored(flag):
    with pytest.raises(ValueError, match=r"has no effect on bounded caches; got '--"):
        exec_.refuse_ignored(["--model", "m", "--max-tokens", "3", flag])


def test_other_flags_pass():
    exec_.refuse_ignored(["--model", "m", "--max-tokens", "3", "-m", "4", "--prompt", "a", "--max", "--port"])


def test_names_become_directories(monkeypatch):
    monkeypatch.setattr("mlx_kvprune.models.pull", lambda name, dtype=None: f"/models/{name}-{dtype}")
    words = ["--model", "smollm2-135m", "--prompt", "smollm2-135m", "--model=smollm2-135m", "--model", "other/repo"]
    expected = ["--model", "/models/smollm2-135m-None", "--prompt", "smollm2-135m", "--model=/models/smollm2-135m-None"]
    assert list(exec_.resolved(words, None)) == [*expected, "--model", "other/repo"]


def test_hook_comes_and_goes(tiny):
    import mlx_lm
    import mlx_lm.generate
    import mlx_lm.utils

    generate = sys.modules["mlx_lm.generate"]
    original = mlx_lm.utils.load
    with exec_.hooked(settings_from(policy="snapkv", budget=128)):
        assert mlx_lm.load is mlx_lm.utils.load is generate.load is not original
        model, _ = mlx_lm.load(str(tiny))
        assert [c.settings.policy for c in model.make_cache()] == ["snapkv", "snapkv"]
    assert mlx_lm.load is mlx_lm.utils.load is generate.load is original
    assert attachment_of(mlx_lm.load(str(tiny))[0]) is None


def test_generate(tiny):
    """The same text as our own ``generate``, and the ladder on standard error."""
    options = ("--policy", "window", "--budget", "128")
    words = ("--model", str(tiny), "--prompt", "a" * 200, "--max-tokens", "100")
    done = run("exec", *options, "--", "mlx_lm.generate", *words, "--verbose", "F")
    assert done.returncode == 0, done.stderr
    assert "llama: ragged (2 layers bounded); policy window, budget 128" in done.stderr
    ours = run("generate", *options, *words, "--json")
    assert done.stdout.strip("\n") == json.loads(ours.stdout)["text"].strip("\n")


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--kv-bits 4",
        "--kv-bits 3 --allocator head_adaptive --policy knorm --positions cache",
        "--kv-bits 4 --kv-scheme page --allocator global",
        "--kv-bits 4 --kv-fine-tokens 16 --policy snapkv",
    ],
)
def test_prompt_cache_goes_from_one_verb_to_another(options, tiny, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache

    cache, given = str(tmp_path / "cache.safetensors"), ("--budget", "160", *options.split())
    words = ("--model", str(tiny), "--prompt-cache-file", cache)
    made = run("exec", *given, "--", "mlx_lm.cache_prompt", *words, "--prompt", "b" * 300)
    assert made.returncode == 0, made.stderr
    used = run("exec", *given, "--", "mlx_lm.generate", *words, "--prompt", "c", "-m", "20")
    assert used.returncode == 0, used.stderr
    assert "Generation: 20 tokens" in used.stdout
    assert "keeps its own settings" not in used.stderr
    rebind.register()
    held = load_prompt_cache(cache)
    assert all(c.settings.key_bits == (int(given[3]) if options else None) for c in held)
    assert sum(c.held.held() for c in held) <= 160 * 2 * 2


def test_prompt_cache_with_other_settings_is_told(tiny, tmp_path):
    words = ("--model", str(tiny), "--prompt-cache-file", str(tmp_path / "cache.safetensors"))
    assert run("exec", "--budget", "160", "--", "mlx_lm.cache_prompt", *words, "--prompt", "b" * 300).returncode == 0
    used = run("exec", "--budget", "200", "--", "mlx_lm.generate", *words, "--prompt", "c", "-m", "4")
    assert used.returncode == 0, used.stderr
    assert "keeps its own settings: policy window, budget 160. Those of this command are not used." in used.stderr


def test_prompt_cache_without_bounds_is_refused(tiny, tmp_path):
    words = ("--model", str(tiny), "--prompt-cache-file", str(tmp_path / "cache.safetensors"))
    made = run("exec", "--policy", "full", "--", "mlx_lm.cache_prompt", *words, "--prompt", "b" * 30)
    assert made.returncode == 0, made.stderr
    used = run("exec", "--budget", "200", "--", "mlx_lm.generate", *words, "--prompt", "c", "-m", "4")
    assert used.returncode == 2
    assert "[exec] a cache without bounds" in used.stderr and "Traceback" not in used.stderr


def test_quantized_generate(tiny):
    """Our options before the ``--`` reach the caches of mlx-lm's verb: the same text as our own ``generate``."""
    options = ("--budget", "160", "--kv-bits", "2", "--allocator", "head_adaptive", "--policy", "knorm")
    words = ("--model", str(tiny), "--prompt", "a" * 300, "--max-tokens", "40")
    texts = {run("exec", *options, "--", "mlx_lm.generate", *words, "--verbose", "F").stdout.strip("\n")}
    texts |= {json.loads(run("generate", *options, *words, "--json").stdout)["text"].strip("\n")}
    assert len(texts) == 1
    assert texts != {json.loads(run("generate", *options[:2], *words, "--json").stdout)["text"].strip("\n")}


def test_usage_error_of_mlx_lm(tiny):
    done = run("exec", "--", "mlx_lm.generate", "--nonsense")
    assert done.returncode == 2
    assert "unrecognized arguments: --nonsense" in done.stderr
    assert "Traceback" not in done.stderr


# -- the server --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """mlx-lm's server behind ``exec``."""

    def __init__(self, *arguments: str):
        self.port = free_port()
        command = [sys.executable, "-m", "mlx_kvprune", "exec", *arguments, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.wait()

    def wait(self) -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.1)
        raise TimeoutError

    def chat(self, *messages: str, **more) -> dict:
        roles = ("user", "assistant")
        content = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        body = json.dumps({"messages": content, "temperature": 0, **more}).encode()
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def stop(self) -> str:
        self.process.terminate()
        return self.process.communicate(timeout=30)[1]


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


@pytest.fixture
def server(tiny) -> Iterator[Server]:
    started = Server("--policy", "window", "--budget", "128", "--", "mlx_lm.server", "--model", str(tiny))
    yield started
    started.process.kill()
    started.process.communicate()


def test_server(server):
    first = server.chat("Hello", max_tokens=60)
    assert first["usage"]["completion_tokens"] == 60
    assert text_of(server.chat("Hello", max_tokens=60)) == text_of(first)

    fresh = server.chat("Hello", text_of(first), "And? " * 60, max_tokens=60)
    again = server.chat("Hello", text_of(first), "And? " * 60, max_tokens=60)
    assert text_of(again) == text_of(fresh)
    third = server.chat("Hello", text_of(first), "And? " * 60, text_of(fresh), "So?", max_tokens=60)
    assert third["usage"]["completion_tokens"] == 60
    assert third["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0) > 0
    log = server.stop()
    assert "2 layers bounded); policy window, budget 128" in log
    assert "Traceback" not in log


@pytest.mark.model
def test_server_with_a_real_model():
    server = Server("--budget", "512", "--", "mlx_lm.server", "--model", "smollm2-135m")
    try:
        first = server.chat("What is the capital of France?", max_tokens=12)
        assert "Paris" in text_of(first)
        second = server.chat("What is the capital of France?", text_of(first), "Of which country?", max_tokens=12)
        assert "France" in text_of(second)
    finally:
        assert "Traceback" not in server.stop()
