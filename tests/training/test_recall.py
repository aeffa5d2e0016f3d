"""Facts woven into texts: they come back, they are not those of the evaluation, the same ones every time."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from mlx_kvprune.evals import facts, needles
from mlx_kvprune.evals.texts import Document
from mlx_kvprune.training import recall
from mlx_kvprune.training.texts import Texts

TEXT = " ".join(f"Sentence {i} says nothing new." for i in range(2000))


def told(text: str) -> list[str]:
    """The sentences that were woven in, each as often as it is there."""
    found = re.findall(r"[A-Z][^.?!:\n\"]*\.", text)
    return [sentence for sentence in found if "Sentence" not in sentence]


@pytest.mark.parametrize("length", [512, 2048])
def test_every_fact_comes_back(length):
    found = recall.woven(np.random.default_rng(0), TEXT, length).replace("Mr.", "Mr").replace("Mrs.", "Mrs")
    found = found.replace("Dr.", "Dr")
    counts = Counter(told(found))
    assert len(counts) == length // recall.EVERY
    assert all(2 <= n <= 4 for n in counts.values())
    plain = re.findall(r"Sentence \d+", found)
    assert plain == [f"Sentence {i}" for i in range(len(plain))] and len(plain) > length // 10, "the text is all there"
    first = [found.find(sentence) for sentence in counts]
    again = [found.find(sentence, at + 1) - at for sentence, at in zip(counts, first, strict=True)]
    assert np.median(again) > 0.1 * recall.CHARS * length


def test_the_same_draws_give_the_same_text_and_code_can_be_woven_into():
    one, other = (recall.woven(np.random.default_rng(5), "x = 1\n" * 3000, 512) for _ in range(2))
    assert one == other and "x = 1\n" in one
    assert recall.woven(np.random.default_rng(1), "", 512), "a text without a break is refused by nobody"


def test_nothing_of_the_evaluation_is_trained_for():
    words = {*recall.SURNAMES, *recall.COUNTRIES, *recall.DISHES, *recall.PLACES, *recall.FIRMS}
    assert not words & {*facts.NAMES, *needles.NAMES, *facts.CITIES}
    openings = {opening for _, _, opening, _ in recall.KINDS}
    theirs = {kind.told.split("{name}")[1].split("{x}")[0].strip() for kind in facts.KINDS} - {""}
    assert not any(one in opening for one in theirs for opening in openings if one != "is")
    assert not any("secret" in opening or "hidden" in opening for opening in openings)


class Letters:
    def encode(self, text):
        return [ord(c) for c in text[::4]]


def test_a_share_of_the_excerpts():
    texts = Texts(Letters(), ((Document(TEXT),),), 0, recall=0.5)
    woven = 0
    for n in range(60):
        excerpt = texts.excerpt(n, 512)
        assert excerpt == texts.excerpt(n, 512) and len(excerpt) == 512
        woven += "".join(map(chr, excerpt)) not in TEXT[::4] + TEXT[1::4] + TEXT[2::4] + TEXT[3::4]
    assert 15 <= woven <= 45
    assert texts.split(512)[0].recall == texts.split(512)[1].recall == 0.5


def test_many_are_told_in_the_same_words():
    """Each must be held by itself; who they are about differs."""
    rng, names = np.random.default_rng(2), []
    kinds = {question.split("{who}")[0]: 0 for _, question, _, _ in recall.KINDS}
    for _ in range(50):
        alike: dict[str, list[str]] = {}
        for name, question, told in recall._facts(rng, 10):
            start = next(kind for kind in kinds if question.startswith(kind))
            alike.setdefault(start, []).append(name)
            assert name.lower() in told.lower()
        names.append(sorted(map(len, alike.values())))
        assert all(len(set(same)) == len(same) for same in alike.values())
    assert np.mean([some[-1] for some in names]) > 3.5, "of ten facts"


def test_texts_without_lines_are_not_all_their_beginning():
    """Paragraphs of a corpus that has one a line."""
    texts = Texts(Letters(), ((Document(TEXT),),), 0)
    assert "\n" not in TEXT and len({tuple(texts.excerpt(n, 512)) for n in range(20)}) > 15
    words = {"".join(map(chr, texts.excerpt(n, 512)))[:1] for n in range(20)}
    assert len(words) > 1


@pytest.mark.parametrize("chars", [2, 4, 9])
def test_what_comes_back_does_so_within_what_is_read(chars):
    """However many characters a token of the text has: the excerpt is cut to its length after facts were woven in."""
    length, whole, back = 2048, 0, 0
    for seed in range(10):
        found = recall.woven(np.random.default_rng(seed), TEXT * 2, length, chars)
        end = 0.0
        for part in re.split(r"(Sentence \d+ says nothing new\.)", found):
            end += len(part) / (chars if "Sentence" in part else recall.CHARS)
            if end > length:
                break
        read = found[: found.index(part) if end > length else None].replace("Mr.", "Mr").replace("Mrs.", "Mrs")
        for n in Counter(told(read.replace("Dr.", "Dr"))).values():
            whole, back = whole + 1, back + (n > 1)
    assert back > 0.8 * whole > 0
