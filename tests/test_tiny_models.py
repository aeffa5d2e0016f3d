"""The zoo covers mlx-lm, its models say something, and stock mlx-lm computes the same in chunks as in one pass."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import numpy as np
import pytest
import tiny_models as zoo
from mlx_lm.models.cache import make_prompt_cache

CHUNKS = (10, 13, 1, *[1] * 6)  # 24 tokens of prefill, 6 of decode


@pytest.fixture(autouse=True)
def uncompiled():
    """Run ``mx.compile``d functions as they are: on a CPU each one costs a second of g++ when it is first called."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def tokens(seed: int = 5) -> mx.array:
    """Random token ids ``(1, sum(CHUNKS))``."""
    return mx.random.randint(0, zoo.VOCAB, (1, sum(CHUNKS)), key=mx.random.key(seed))


def in_chunks(model, ids: mx.array) -> mx.array:
    """Logits ``(B, L, vocab)`` of ``ids (B, L)``, computed as generation does: through one cache, chunk by chunk."""
    cache, parts, start = make_prompt_cache(model), [], 0
    for length in CHUNKS:
        parts.append(model(ids[:, start : start + length], cache=cache))
        mx.eval(parts[-1])
        start += length
    return mx.concatenate(parts, axis=1)


def test_every_model_file_has_an_entry():
    folder = Path(mlx_lm.models.__file__).parent
    text = {path.stem: path.read_text() for path in folder.glob("*.py")}
    models = {
        name for name, source in text.items() if re.search(r"^class Model\b|^from .* import Model\b", source, re.M)
    }
    covered = {zoo.module_name(name) for name in zoo.names()}
    assert models == covered | set(zoo.SKIPPED)
    assert not covered & set(zoo.SKIPPED)
    assert len(zoo.names()) >= 115


def test_lists_name_entries():
    assert set(zoo.REQUIRED_RAGGED) <= set(zoo.names())
    assert set(zoo.CHUNK_SENSITIVE) | set(zoo.FIXES) <= set(zoo.names())


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="got 'lama'"):
        zoo.tiny_model("lama")


def test_seed_decides_the_weights():
    ids = tokens()
    first, again, other = (zoo.tiny_model("gemma4_text", seed=seed)(ids) for seed in (0, 0, 1))
    assert mx.array_equal(first, again)
    assert mx.abs(first - other).max() > 0.1


def test_dtype_and_overrides_reach_the_model():
    model = zoo.tiny_model("qwen3_vl", dtype=mx.bfloat16, num_hidden_layers=3)
    assert len(model.layers) == 3
    assert model(tokens()).dtype == mx.bfloat16


@pytest.mark.parametrize("name", zoo.names())
def test_stock_prefills_in_chunks_as_in_one_pass(name):
    model, ids = zoo.tiny_model(name), tokens()
    whole = model(ids, cache=make_prompt_cache(model))  # gemma3n shares keys only through a cache
    chunked = in_chunks(model, ids)
    assert bool(mx.isfinite(whole).all()), name
    assert bool(mx.isfinite(chunked).all()), name
    assert mx.std(whole, axis=-1).min() > 0.2, "the logits of a token are nearly constant"
    assert mx.std(whole, axis=1).mean() > 0.2, "every token gets the same logits"

    error = float(mx.abs(chunked - whole).max() / mx.abs(whole).max())
    if name in zoo.CHUNK_SENSITIVE:
        assert error > 1e-3, f"no longer true: {zoo.CHUNK_SENSITIVE[name]}"
    else:
        np.testing.assert_array_less(error, 1e-4)


@pytest.mark.parametrize("name", zoo.REQUIRED_RAGGED)
def test_required_types_have_two_kv_heads(name):
    model = zoo.tiny_model(name)
    cache = make_prompt_cache(model)
    mx.eval(model(tokens(), cache=cache))
    heads = {entry.keys.shape[1] for entry in cache if type(entry).__name__ == "KVCache"}
    assert heads == {2}
