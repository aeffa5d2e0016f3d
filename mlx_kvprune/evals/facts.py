"""Facts about invented people: told in one sentence, asked in its own words and in others, answered by one word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_kvprune.evals.asking import Ask
from mlx_kvprune.evals.hay import absent, number


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Marta Boris Celia Dmitri Elena Farid Greta Hugo Ingrid Jorge Keiko Lionel Amara Bruno Carmen Diego Edith Fiona Gustav "
    "Hanna Igor Julia Karim Leonie Magnus Nadia Oskar Paula Quentin Rosa Stefan Tamara Ulrich Vera Walter Yusuf Zoe"
)
DIGITS = ("4", "5")


@dataclass(frozen=True)
class Kind:
    """A kind of fact: ``{name}`` has or does ``{x}``.

    Attributes:
        told: the sentence.
        verbatim: question and opening of the answer in the sentence's words.
        paraphrased: the same in other words; None if there are no good ones.
        words: what ``{x}`` may be; ``DIGITS`` stands for numbers.
    """

    name: str
    told: str
    verbatim: tuple[str, str]
    paraphrased: tuple[str, str]
    words: tuple[str, ...]


CITIES = _words("Lisbon Oslo Cairo Lima Vienna Dublin Tokyo Madrid Prague Nairobi Toronto Boston Berlin Naples Delhi")
TRADES = _words("plumber dentist pilot lawyer nurse carpenter painter chemist librarian journalist electrician")
PLAYED = _words("cello piano violin trumpet guitar flute clarinet saxophone accordion drums")
PETS = _words("parrot rabbit hamster tortoise lizard goldfish kitten poodle canary")
KINDS = (
    Kind(
        "city",
        "{name} lives in {x}.",
        ("Where does {name} live?", "{name} lives in"),
        ("Which city is the home of {name}?", "The home of {name} is in the city of"),
        CITIES,
    ),
    Kind(
        "trade",
        "{name} works as a {x}.",
        ("What does {name} work as?", "{name} works as a"),
        ("What is the profession of {name}?", "By profession, {name} is a"),
        TRADES,
    ),
    Kind(
        "instrument",
        "{name} plays the {x}.",
        ("What does {name} play?", "{name} plays the"),
        ("Which musical instrument has {name} learned?", "The instrument that {name} has learned is the"),
        PLAYED,
    ),
    Kind(
        "pet",
        "{name} keeps a {x} at home.",
        ("What does {name} keep at home?", "{name} keeps a"),
        ("Which animal is the pet of {name}?", "The pet of {name} is a"),
        PETS,
    ),
    Kind(
        "code",
        "The secret number of {name} is {x}.",
        ("What is the secret number of {name}?", "The secret number of {name} is"),
        ("Which number does {name} keep hidden from others?", "The number that {name} keeps hidden is"),
        DIGITS,
    ),
)


@dataclass(frozen=True)
class Fact:
    """One person and what is true of them."""

    kind: Kind
    name: str
    x: str

    @property
    def told(self) -> str:
        return self.kind.told.format(name=self.name, x=self.x)

    def ask(self, paraphrased: bool = False, wording: str = "") -> Ask:
        """The question; ``wording`` names its row if not what it is."""
        question, opening = self.kind.paraphrased if paraphrased else self.kind.verbatim
        wording = wording or ("paraphrased" if paraphrased else "verbatim")
        return Ask(wording, question.format(name=self.name), opening.format(name=self.name), self.x)


def drawn(rng: np.random.Generator, n: int, text: str, kinds: Sequence[Kind] = KINDS) -> list[Fact]:
    """``n`` facts of the kinds in turn, about different people, with different answers that ``text`` does not hold.

    Raises:
        ValueError: there are not as many names or words.
    """
    names = _picked(rng, NAMES, n, text)
    turn = [kinds[i % len(kinds)] for i in range(n)]
    words = {kind: iter(_answers(rng, kind, turn.count(kind), text)) for kind in dict.fromkeys(turn)}
    return [Fact(kind, name, next(words[kind])) for kind, name in zip(turn, names, strict=True)]


def _answers(rng: np.random.Generator, kind: Kind, n: int, text: str) -> list[str]:
    if kind.words is not DIGITS:
        return _picked(rng, kind.words, n, text)
    found: list[str] = []
    for i in range(n):
        found.append(number(rng, 4 + i % 2, text, found))
    return found


def _picked(rng: np.random.Generator, words: Sequence[str], n: int, text: str) -> list[str]:
    free = absent(words, text)
    if len(free) < n:
        raise ValueError(
            f"[facts] too few words that the text does not hold; got {len(free)} for {n}; try other --data"
        )
    return [str(word) for word in rng.permutation(np.array(free))[:n]]
