"""mlx-lm's server under ``exec`` with many clients at once: each gets what it would get alone."""

from __future__ import annotations

import random
import string
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from test_cli_exec import Server, text_of

import mlx_kvprune as kvp


def ask(server: Server, text: str, n: int) -> str:
    """An answer; asked again where the server's backlog of five connections was full."""
    for wait in (0.1, 0.3, 1, 3, 10):
        try:
            return text_of(server.chat(text, max_tokens=n))
        except (ConnectionResetError, urllib.error.URLError):
            assert server.process.poll() is None
            time.sleep(wait)
    raise TimeoutError


def together(server: Server, texts: list[str], n: int) -> list[str]:
    """Answers of a server that all clients ask at once."""
    with ThreadPoolExecutor(len(texts)) as clients:
        return list(clients.map(lambda text: ask(server, text, n), texts))


def alone(model, tokenizer, text: str, n: int) -> str:
    """The answer of ``n`` greedy tokens in a process without a server."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    caches, tokens = model.make_cache(), []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=caches):
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(int(token))
    return tokenizer.decode(tokens)


def check(path: str, policy: str, budget: int, texts: list[str], n: int, rounds: int) -> None:
    server = Server("--policy", policy, "--budget", str(budget), "--", "mlx_lm.server", "--model", path)
    try:
        answers = [together(server, texts, n) for _ in range(rounds)]
    finally:
        log = server.stop()
    assert "Traceback" not in log
    model, tokenizer = mlx_lm.load(path) if "/" in path else kvp.load(path)
    kvp.attach(model, policy, budget, quiet=True)
    expected = [alone(model, tokenizer, text, n) for text in texts]
    kvp.detach(model)
    for told in answers:
        wrong = [(len(text), a, b) for text, a, b in zip(texts, told, expected, strict=True) if a.strip() != b.strip()]
        assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[0]}"


def texts_of(lengths: list[int]) -> list[str]:
    letters = random.Random(0)
    return ["".join(letters.choices(string.ascii_letters + string.digits, k=n)) for n in lengths]


def test_server_batches(tiny):
    check(str(tiny), "window", 128, texts_of([20, 300, 150, 75]), 40, rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["window", "snapkv", "h2o"])
def test_32_clients(tiny, policy):
    """The second time most of each prompt may come from the server's own store of prompts."""
    lengths = [50 + 95 * i for i in range(32)]
    random.Random(1).shuffle(lengths)
    check(str(tiny), policy, 256, texts_of(lengths), 60, rounds=2)


@pytest.mark.model
def test_8_clients_of_a_real_model():
    words = __doc__.split() * 40
    check("smollm2-135m", "snapkv", 256, [" ".join(words[i : i + 30 + 40 * i]) for i in range(8)], 24, rounds=1)
