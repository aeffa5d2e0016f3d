"""Needles: haystacks hold the needle where they should, and scoring is right."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import VOCAB, tiny_model

from mlx_kvprune import detach
from mlx_kvprune.evals import asking, needles
from mlx_kvprune.evals.conditions import FULL, Condition, feed
from mlx_kvprune.settings import Budget


class Bytes:
    """A tokenizer of bytes, folded into the tiny models' vocabulary; no chat template."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [b % VOCAB for b in text.encode()]

    def decode(self, tokens: list[int]) -> str:
        return bytes(97 + token % 26 for token in tokens).decode()


TEXTS = [" ".join(f"Sentence {i} of this text speaks of the weather." for i in range(60))]


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    yield made
    detach(made)


def test_the_needle_lies_at_its_depth():
    made = needles.trials(Bytes(), TEXTS, 10, 1000, seed=4)
    assert sorted(trial.depth for trial in made) == pytest.approx(np.arange(0.05, 1, 0.1))
    for trial in made:
        needle = trial.fill(needles.NEEDLE)
        assert trial.text.count(needle) == 1
        before, after = trial.text.split(needle)
        total = len(before) + len(after)
        assert total >= 1000
        assert len(before) / total == pytest.approx(trial.depth, abs=50 / total)  # at most half a sentence off
        assert not before or before.endswith(". ")  # between sentences
        assert trial.secret not in before + after


def test_secrets_have_four_or_five_digits_and_differ():
    made = needles.trials(Bytes(), TEXTS, 20, 500)
    assert [len(trial.secret) for trial in made] == [4, 5] * 10
    assert all(re.fullmatch(r"[1-9]\d+", trial.secret) for trial in made)
    assert len({trial.secret for trial in made}) > 15


def test_the_same_seed_gives_the_same_trials():
    one, two, other = (needles.trials(Bytes(), TEXTS, 5, 500, seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert one != other


def test_short_texts_are_refused():
    with pytest.raises(ValueError, match=r"\[haystack\] no text of 5000 tokens.*--haystack \d+ or"):
        needles.trials(Bytes(), TEXTS, 1, 5000)


def test_only_the_paraphrase_avoids_the_needles_words():
    trial = needles.trials(Bytes(), TEXTS, 1, 300)[0]
    needle = trial.fill(needles.NEEDLE)
    verbatim, paraphrased = needles.WORDINGS
    assert needle.startswith(trial.fill(verbatim.opening))
    for text in (paraphrased.question, paraphrased.opening):
        assert "secret" not in text.lower()
        assert needle[:20] not in trial.fill(text)
    assert all(trial.secret not in trial.fill(w.question + w.opening) for w in needles.WORDINGS)


def test_prompts_with_and_without_a_chat_template():
    assert bytes(asking.prompt(Bytes(), "Text.", "Why?", "Because")) == b"Text.\n\nWhy?\nBecause"
    chat = SimpleNamespace(
        chat_template="yes",
        apply_chat_template=lambda messages, **_: f"<user>{messages[0]['content']}<assistant>",
        encode=lambda text, add_special_tokens: [text, add_special_tokens],
    )
    assert asking.prompt(chat, "Text.", "Why?", "Because") == ["<user>Text.\n\nWhy?<assistant>Because", False]


def test_scoring():
    logits = mx.log(mx.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3]]))
    good, bad = asking.score(logits, [0, 1, 1]), asking.score(logits, [0, 1, 2])
    assert (good["exact"], good["right"]) == (True, 3)
    assert (bad["exact"], bad["right"]) == (False, 2)
    assert good["logprob"] == pytest.approx(np.log(0.7 * 0.6 * 0.5), abs=1e-5)
    assert bad["logprob"] == pytest.approx(np.log(0.7 * 0.6 * 0.3), abs=1e-5)
    assert asking.score(logits, [1, 1, 1])["right"] == 0


@pytest.mark.parametrize(
    "condition", [FULL, Condition("window", Budget(128)), Condition("snapkv", Budget(128))], ids=str
)
def test_exact_is_what_greedy_decoding_says(model, condition):
    prompt, caches = [5, 9, 77, 31] * 40, condition.caches(model)
    feed(model, prompt[:-1], caches)
    token, said, decoding = prompt[-1], [], copy.deepcopy(caches)
    for _ in range(5):
        token = model(mx.array([[token]]), cache=decoding)[0, -1].argmax().item()
        said.append(token)
    assert asking.forced(model, prompt, said, condition.caches(model))["exact"]
    wrong = [*said[:3], (said[3] + 1) % VOCAB, said[4]]
    outcome = asking.forced(model, prompt, wrong, condition.caches(model))
    assert (outcome["exact"], outcome["right"]) == (False, 3)


@pytest.mark.parametrize("condition", [FULL, Condition("window", Budget(128)), Condition("h2o", Budget(128))], ids=str)
def test_sharing_the_read_changes_nothing(model, condition):
    trial = needles.trials(Bytes(), TEXTS, 1, 400)[0]
    together = asking.outcomes(model, Bytes(), trial.text, trial.asks, condition)
    for wording, outcome in zip(needles.WORDINGS, together, strict=True):
        ids = asking.prompt(Bytes(), trial.text, trial.fill(wording.question), trial.fill(wording.opening))
        answer = Bytes().encode(" " + trial.secret)
        alone = asking.forced(model, ids, answer, condition.caches(model))
        assert outcome["prompt_tokens"] == len(ids)
        assert outcome["logprob"] == pytest.approx(alone["logprob"], abs=1e-3)


def test_the_common_start_leaves_a_token_of_each():
    assert asking.shared([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert asking.shared([[1, 2, 3], [1, 2, 3]]) == 2
    assert asking.shared([[1, 2], [1, 2, 3]]) == 1
