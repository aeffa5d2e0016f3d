"""Documents as ``ask`` reads them: what is shared between questions changes nothing, and both ways of asking are told apart."""

from __future__ import annotations

import pytest
from test_needles import TEXTS, Bytes
from tiny_models import tiny_model

from mlx_kvprune import detach
from mlx_kvprune.documents import Reading, prompt_for
from mlx_kvprune.evals import documents_asked as asked
from mlx_kvprune.evals.asking import Ask
from mlx_kvprune.evals.conditions import FULL, Condition, feed
from mlx_kvprune.evals.job import Grid, Job
from mlx_kvprune.evals.questions import Trial
from mlx_kvprune.reread import read_again
from mlx_kvprune.settings import Budget

ASKS = tuple(
    Ask(kind, f"What is {kind}?", f"{kind} is", word) for kind, word in (("a", "red"), ("b", "blue"), ("c", "x"))
)
TRIAL = Trial(TEXTS[0][:900], ASKS)


@pytest.fixture(scope="module", name="job")
def _job():
    model = tiny_model("llama")
    yield Job(model, Bytes(), [], Grid(), haystack=900)
    detach(model)


def alone(job: Job, ask: Ask, condition: Condition) -> list[dict]:
    """The outcomes of one question that nothing was shared with."""
    prompt = prompt_for(job.tokenizer, TRIAL.text, ask.question, pinned=False)
    found = []
    for again in (False, True):
        caches = condition.caches(job.model, prompt.after, n_sink=len(prompt.before))
        feed(job.model, prompt.before + prompt.document, caches)
        reading = Reading(prompt, caches, 0.0)
        reading = read_again(job.model, job.tokenizer, reading, max_tokens=asked.ANSWER) if again else reading
        found.append(asked._outcome(job, ask, prompt.after, prompt.n_tokens, reading.cache))
    return found


@pytest.mark.parametrize("policy", ["probe", "window", "random", "tova"])
def test_each_question_is_asked_as_if_it_were_alone(job, policy):
    condition = Condition(policy, Budget(tokens=400), 0, (("window", 16), ("block", 32)))
    found = list(asked.read_as_asked(job, TRIAL, condition))
    assert [x["wording"] for x in found] == [asked.AS_HELD, asked.AGAIN] * len(ASKS)
    for i, ask in enumerate(ASKS):
        for mine, theirs in zip(found[2 * i : 2 * i + 2], alone(job, ask, condition), strict=True):
            assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
            assert mine["kind"] == ask.wording
            assert 0 < mine["slots_held"] <= 400
        held, again = found[2 * i], found[2 * i + 1]
        assert held["logprob"] != again["logprob"]
        assert again["kv_bytes_peak"] >= held["kv_bytes_peak"] - held["kv_bytes"] // 10


def test_the_full_cache_has_nothing_to_read_again(job):
    found = list(asked.read_as_asked(job, TRIAL, FULL))
    for held, again in zip(found[::2], found[1::2], strict=True):
        assert {**held, "wording": ""} == {**again, "wording": ""}
    once = list(asked.read_once(job, TRIAL, FULL))
    assert [x["logprob"] for x in found[::2]] == pytest.approx([x["logprob"] for x in once], abs=1e-4)


def test_a_question_that_does_not_fit_is_refused(job):
    small = Condition("probe", Budget(tokens=90), 0, (("window", 16), ("block", 32)))
    with pytest.raises(ValueError, match="budget"):
        asked.fits(asked.as_asked, job, small)
