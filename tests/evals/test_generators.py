"""Generators: the answer stands in the text once, lengths are right, the same seed gives the same trials."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_needles import Bytes

from mlx_kvprune.evals import (
    documents_asked,
    facts,
    hay,
    multikey,
    multivalue,
    paraphrase,
    qa,
    questions,
    texts,
    tracking,
    turns,
)
from mlx_kvprune.evals.asking import following
from mlx_kvprune.evals.texts import Document

PROSE = "the old king walked slowly over a hill and saw many green trees near some river"
WORDS = PROSE.split()
RNG = np.random.default_rng(5)
TEXTS = [" ".join(" ".join(RNG.choice(WORDS, size=9)).capitalize() + "." for _ in range(120))]
SINGLE = {"paraphrase": paraphrase.make, "multikey": multikey.make, "ask": documents_asked.make}
MAKERS = {**SINGLE, "multivalue": multivalue.make, "tracking": tracking.make}
seeds = st.integers(0, 10_000)


def made(make, seed: int, n_tokens: int = 1500, n: int = 2) -> list[questions.Trial]:
    return questions.trials(make, Bytes(), TEXTS, n, n_tokens, seed)


def times(word: str, text: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, flags=re.I))


@pytest.mark.parametrize("name", SINGLE)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_each_answer_stands_in_the_text_once(name, seed):
    for trial in made(SINGLE[name], seed):
        for ask in trial.asks:
            assert times(ask.answer, trial.text) == 1
            assert times(ask.answer, ask.question + ask.opening) == 0


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=8, deadline=None)
@given(seed=seeds, n_tokens=st.integers(300, 4000))
def test_lengths_and_seeds(name, seed, n_tokens):
    one, two = made(MAKERS[name], seed, n_tokens), made(MAKERS[name], seed, n_tokens)
    assert one == two
    assert one != made(MAKERS[name], seed + 1, n_tokens)
    assert made(MAKERS[name], seed, n_tokens, n=1) == one[:1]  # a trial does not depend on how many there are
    for trial in one:
        assert n_tokens <= len(trial.text) <= n_tokens + 600  # the needles, and the rest of a sentence


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_values_are_told_one_by_one_and_listed_in_order(seed):
    (trial,) = made(multivalue.make, seed, n=1)
    everything, *each = trial.asks
    assert [times(ask.answer, trial.text) for ask in each] == [1] * multivalue.VALUES
    assert [trial.text.index(ask.answer) for ask in each] == sorted(trial.text.index(ask.answer) for ask in each)
    for ask in each:
        said = f"{ask.opening} {ask.answer}"
        assert f"{everything.opening} {everything.answer}".startswith(said)


def test_lists_of_three():
    everything, _, _, last = multivalue.asks("Marta", ["1111", "2222", "3333"])
    assert everything.answer == "1111, 2222 and 3333"
    assert (last.opening[-16:], last.answer) == ("e 1111, 2222 and", "3333")


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_chains_lead_back_to_the_value(seed):
    (trial,) = made(tracking.make, seed, n=1)
    told = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", trial.text))
    names, *values = trial.asks
    assert len(told) == tracking.HOPS + 1
    assert set(told) == set(re.findall(r"\w{3}", names.answer.replace(" and ", " ")))
    for hops, ask in enumerate(values):
        name = re.findall(r"VAR (\w+)", ask.question)[0]
        for _ in range(hops):
            name = told[name]
        assert told[name] == ask.answer == values[0].answer


def test_paraphrases_share_no_word_with_the_fact_but_the_name():
    for kind in paraphrase.KINDS:
        question, opening = kind.paraphrased
        common = set(re.findall(r"\w+", kind.told.lower())) & set(re.findall(r"\w+", (question + opening).lower()))
        assert common <= {"name", "is", "of", "the", "in", "number"}, common
    assert "secret" not in " ".join(facts.KINDS[-1].paraphrased)


def test_words_that_the_text_holds_are_not_used():
    text = "Lisbon and OSLO, said Marta."
    assert hay.absent(("Lisbon", "Oslo", "Cairo", "Marta's"), text) == ["Cairo", "Marta's"]
    for fact in facts.drawn(np.random.default_rng(0), 10, text, facts.KINDS[:1]):
        assert fact.x not in ("Lisbon", "Oslo") and fact.name != "Marta"
    with pytest.raises(ValueError, match=r"\[facts\] too few words"):
        facts.drawn(np.random.default_rng(0), 16, "", facts.KINDS[:1])


def test_numbers_are_new():
    for seed in range(5):
        assert hay.number(np.random.default_rng(seed), 1, "1 2 3 4 5 6", ["7", "8"]) == "9"


def test_needles_lie_where_they_should():
    found, lengths = [f"S{i}." for i in range(10)], [10] * 10
    text = hay.strewn(found, lengths, [("B.", 0.5), ("A.", 0.0), ("C.", 0.5), ("D.", 1.0)])
    assert text == "A. S0. S1. S2. S3. S4. B. C. S5. S6. S7. S8. S9. D."
    depths = hay.spread_depths(np.random.default_rng(1), 4)
    assert [int(4 * depth) for depth in depths] == [0, 1, 2, 3]


def test_a_conversation_asks_back_what_was_told():
    talk = turns.make(np.random.default_rng(3))
    said = " ".join(" ".join(turn) for turn in talk.turns)
    assert (len(talk.turns), len(talk.asks)) == (turns.TURNS, turns.TOLD)
    assert all(times(ask.answer, said) == 1 for ask in talk.asks)
    early = " ".join(asked for asked, _ in talk.turns[: turns.TOLD])
    assert all(times(ask.answer, early) == 1 for ask in talk.asks)
    assert turns.make(np.random.default_rng(3)) == talk


def test_long_texts_are_cut_in_the_middle():
    class Words:
        encode = staticmethod(lambda text, add_special_tokens: text.split())
        decode = staticmethod(lambda tokens: " ".join(tokens) + " ")

    assert qa.middle_cut(Words, "a b c d e f", 4) == "a b e f "
    assert qa.middle_cut(Words, "a b c", 4) == "a b c"
    documents = [texts.Document("x"), texts.Document("y", question="?", answers=("z",))]
    job = type("Job", (), {"documents": documents, "trials": 5})
    assert qa.items(job) == documents[1:]
    long = [texts.Document("a b c d", question="?", answers=("z",)), *documents[1:]]
    about = lambda haystack: type("Job", (), {"documents": long, "trials": 5, "tokenizer": Words, "haystack": haystack})
    assert qa.notes(about(4)) == []
    assert qa.notes(about(2)) == ["qa: 1 of 2 texts are longer than --haystack 2 and are cut in the middle"]


@pytest.mark.parametrize(
    "text", ["".join(f"{i},abc,{i * 7}\n" for i in range(3000)), "\u8fd9\u662f\u6d4b\u8bd5" * 2000, "x" * 9000]
)
def test_what_is_no_sentence_is_cut(text):
    """A table, a language without spaces: a haystack is as long as it was asked for, about."""
    found = hay.measured(Bytes(), [text], 1024)
    assert max(found[1]) <= hay.LONGEST
    assert "".join("".join(found[0]).split()) == "".join(text.split())
    assert 1024 <= sum(hay.window(np.random.default_rng(0), found, 1024)[1]) < 1024 + hay.LONGEST


def test_all_of_rulers_values_can_be_given():
    """Each after those before it: two different ones cannot both come first."""
    document = Document("A text.", "ruler", "Which numbers?", ("12", "34", "56"), every=True)
    assert [(ask.opening, ask.answer) for ask in qa.asked(document)] == [
        ("Answer:", "12"),
        ("Answer: 12,", "34"),
        ("Answer: 12, 34,", "56"),
    ]
    assert {ask.opening for ask in qa.asked(replace(document, every=False))} == {"Answer:"}


class Prefixed:
    """As SentencePiece does with a dummy prefix: whatever is encoded begins with a space."""

    def encode(self, text, add_special_tokens=False):
        return re.findall(r"\u2581[^\u2581]*", "\u2581" + text.replace(" ", "\u2581"))


def test_an_answer_is_what_follows_its_opening_in_a_text():
    whole = Prefixed().encode("Ann lives in Lisbon")
    assert following(Prefixed(), "Ann lives in", "Lisbon") == whole[-1:] == ["\u2581Lisbon"]
    assert Prefixed().encode(" Lisbon") != ["\u2581Lisbon"], "what it would be by itself"
    assert following(Bytes(), "Ann lives in", "Lisbon") == Bytes().encode(" Lisbon")


class Thinking(Bytes):
    """As Qwen3's template: empty thoughts are written into the last answer alone."""

    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        last = -1 if add_generation_prompt else last
        parts = [f"<{m['role']}>{'<think></think>' * (i == last)}{m['content']}</s>\n" for i, m in enumerate(messages)]
        text = "".join(parts) + "<assistant>" * add_generation_prompt
        return self.encode(text) if tokenize else text


def test_a_template_that_writes_earlier_answers_anew_loses_nothing():
    """What is read turn by turn holds all that was said, once, and ends where the question is to be answered."""
    said = turns.make(np.random.default_rng(3))
    tokenizer = Thinking()
    assert turns.rendered(tokenizer, said.turns)[: len(turns.rendered(tokenizer, said.turns[:1]))] != turns.rendered(
        tokenizer, said.turns[:1]
    ), "the template of this test"
    read = [bytes(step).decode() for step in turns.steps(tokenizer, said.turns, said.asks[0].question)]
    assert len(read) == len(said.turns) + 1
    for text, (asked, answer) in zip(read, said.turns, strict=False):
        assert asked in text and text.endswith(answer)
    whole = tokenizer.apply_chat_template(
        [{"role": r, "content": t} for turn in said.turns for r, t in zip(("user", "assistant"), turn, strict=True)]
        + [{"role": "user", "content": said.asks[0].question}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert "".join(read) == whole
