"""Greedy answers, and what the full cache thinks of them: against everything computed anew, without caches."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from test_job import job_of, model  # noqa: F401
from test_needles import TEXTS

from mlx_kvprune.evals import generation, tables
from mlx_kvprune.evals.asking import prompt
from mlx_kvprune.evals.conditions import SIZES, feed


def log_softmax(x) -> np.ndarray:
    x = np.array(x, np.float64)
    return x - np.log(np.exp(x - x.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)) - x.max(-1, keepdims=True)


@pytest.mark.parametrize("ending", [False, True])
def test_own_words_are_what_the_full_cache_would_have_said(model, ending):  # noqa: F811
    job = job_of(model, "knorm", answer_tokens=40)
    text = TEXTS[0][:600]
    ids = prompt(job.tokenizer, text, generation.QUESTION, "")
    if ending:  # the window's tenth token ends an answer
        plain = dict(generation.measure(job, text, job.conditions(len(ids))[0][:2], lambda n: None))
        said = next(found["said"] for one, found in plain.items() if one.policy == "window")
        job.tokenizer.eos_token_ids = {said[9]}
    ticks: list[int] = []
    conditions = job.conditions(len(ids))[0]
    found = dict(generation.measure(job, text, conditions, ticks.append))
    assert sum(ticks) == generation.work(job, text, conditions) and len(found) == 4
    for condition, result in found.items():
        said = result["said"]
        read = ids + said
        full = log_softmax(model(mx.array([read]))[0])[len(ids) - 1 :][: len(said) + (len(said) < 40)]
        cache = condition.caches(model)
        feed(model, ids[:-1], cache)
        steps = [model(mx.array([[token]]), cache=cache)[0, -1] for token in read[len(ids) - 1 :]]
        bounded = log_softmax(mx.stack(steps))[: len(full)]
        kl = (np.exp(full) * (full - bounded)).sum(axis=-1).mean()
        assert result["own_kl"] == pytest.approx(kl, abs=1e-5)
        assert result["own_agreement"] == pytest.approx((full.argmax(-1) == bounded.argmax(-1)).mean())
        assert bounded.argmax(-1)[: len(said)].tolist() == said
        assert (kl > 1e-4) != condition.is_full, "what is evicted tells"


def test_results_from_before_it_was_measured_have_none():
    held = dict.fromkeys(SIZES, 1)
    setup = {
        "task": "generation",
        "item": 0,
        "policy": "full",
        "allocator": "uniform",
        "budget": "unbounded",
        "seed": 0,
    }
    unit = {**setup, "setup": {}, "result": {"said": [1, 2], "most": 6, "prompt_tokens": 3, **held}}
    (row,) = generation.rows([unit])
    assert row["own_kl"] is None
    assert not any("own" in name for name in tables.table("generation", [row])[0])
