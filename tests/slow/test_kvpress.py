"""Which tokens our scorers keep against kvpress (PyPI, on the CPU build of PyTorch): the same weights, the same text.

kvpress prunes once, after the whole prompt; ours evict as they read. So a text is read with room for all of it, scored once
as it then stands, and the best quarter is compared. What kvpress protects (sinks, the observation window, the last token)
counts as kept on both sides.

    MLX_KVPRUNE_KVPRESS=/path/to/python python -m pytest -m slow -n 0 tests/slow/test_kvpress.py

The variable names a Python that has kvpress and torch. Without it an environment is made in the cache folder, which takes
minutes and 2 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_kvprune as kvp
from mlx_kvprune import models
from mlx_kvprune.blas import cache_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
HERE = Path(__file__).parent
TOKENS = 1200
PROTECTED = {  # first and last tokens that kvpress never lets go
    "window": (4, 0),
    "knorm": (0, 0),
    "keydiff": (0, 0),
    "tova": (0, 1),
    "snapkv": (0, 64),
    "expected_attention": (4, 0),
}


@pytest.fixture(scope="module")
def python() -> str:
    if named := os.environ.get("MLX_KVPRUNE_KVPRESS"):
        return named
    place = cache_dir() / "kvpress"
    binary = place / "bin" / "python"
    if not binary.exists():
        venv.create(place, with_pip=True)
        done = subprocess.run(
            [binary, "-m", "pip", "install", "-q", "torch", "kvpress"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"kvpress cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return str(binary)


@pytest.fixture(scope="module")
def text():
    model, tokenizer = kvp.load("smollm2-135m", dtype="float32")
    document = (HERE.parents[1] / "examples/documents/aesop-fables.txt").read_text()
    return model, tokenizer.encode(document)[:TOKENS]


@pytest.fixture(scope="module")
def theirs(python, text, tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("kvpress")
    (folder / "tokens.json").write_text(json.dumps(text[1]))
    directory = str(models.pull("smollm2-135m", dtype="float32"))
    words = [python, str(HERE / "kvpress_kept.py"), directory, str(folder / "tokens.json"), str(folder / "out.npz")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(folder / "out.npz"))


def kept(model, policy: str, tokens: list[int], n: int) -> np.ndarray:
    """Which tokens the scorer ranks among the best ``n`` ``(layers, KV heads, tokens)``."""
    cache = kvp.make_cache(model, policy, budget=2 * TOKENS)
    model(mx.array(tokens)[None], cache=cache)
    first, last = PROTECTED[policy]
    layers = []
    for layer in cache:
        held = layer.everything()
        assert held.positions.shape[2] == len(tokens), "nothing is evicted"
        scores = np.array(layer.scorer.score(held, layer.signals).astype(mx.float32))[0]
        positions = np.array(held.positions)[0]
        scores[(positions < first) | (positions >= len(tokens) - last)] = np.inf
        best = np.lexsort((positions, scores), axis=-1)[:, -n:]
        mask = np.zeros(scores.shape, bool)
        np.put_along_axis(mask, np.take_along_axis(positions, best, axis=-1), True, axis=-1)
        layers.append(mask)
    return np.stack(layers)


@pytest.mark.parametrize("policy", PROTECTED)
def test_the_same_tokens_are_kept(policy, text, theirs):
    model, tokens = text
    kvp.attach(model, quiet=True)
    wanted = theirs[policy]
    ours = kept(model, policy, tokens, int(wanted[0, 0].sum()))
    share = (ours & wanted).sum() / wanted.sum()
    by_layer = (ours & wanted).sum(axis=(1, 2)) / wanted.sum(axis=(1, 2))
    print(
        f"{policy}: {share:.4f} of kept positions, least in layer {by_layer.argmin()}: {by_layer.min():.4f}",
        file=sys.stderr,
    )
    assert share >= 0.99
