"""Facts woven into texts, and asked for later on: what a gate must keep although nothing near it says so.

Natural text seldom comes back to a number or a name that it told once a thousand tokens ago, and gates trained on it alone
let such things go. Here sentences about invented people and things are put between those of a text, and each comes back one
to three times, at a random distance: as a question with its answer, or as the sentence begun again. Many are told of several
people in the same words, so that each must be held and none stands for the others. The full cache foretells most of the
answers, and a cache that let the fact go pays for each of their tokens.

The kinds, names and wordings are others than those of ``evals``, so that what is measured there was not trained for here.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

EVERY = 200  # tokens of text to a fact
ALIKE = 5  # facts in the same words, at most
NEAREST = 0.08  # share of the text between a fact and its first return
LAST = 0.95  # share of the text within which facts come back: a little of its end may not be read
BREAK = re.compile(r"(?<=[.!?;:])\s+|\n+")
CHARS = 3.3  # of a token of a fact, about: numbers and names
ROOM = 1.05  # an excerpt is cut to its length: a little more is made than is read


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SURNAMES = _words(
    "Abbott Barlow Cavendish Draper Ellison Fairfax Gallagher Hargreaves Ibsen Jessop Kettering Lockwood Mercer Norwood "
    "Ogilvie Pemberton Quigley Redfern Stanhope Thackeray Underhill Vance Whitlock Yardley Zimmer Ashdown Blythe Crowther "
    "Dunmore Everard Finch Gresham Holloway Irving Juniper Kirby Langdon Marlowe Nesbitt Overton"
)
TITLES = _words("Mr. Mrs. Dr. Captain Professor Judge Colonel Lady Sergeant Aunt")
OBJECTS = _words(
    "lantern ledger compass teapot violin-case telescope hatbox sextant barometer music-box toolbox clock trunk"
)
COLOURS = _words("amber crimson turquoise ivory violet scarlet olive indigo maroon silver copper lilac")
PLACES = _words("attic cellar pantry stable orchard chapel workshop library boathouse greenhouse kitchen barn tower")
DISHES = _words("porridge dumplings lasagne goulash pancakes chowder paella ramen borscht risotto trifle stew")
COUNTRIES = _words("Norway Peru Kenya Iceland Morocco Vietnam Chile Finland Nepal Cuba Greece Jordan Ghana Ireland")
MONTHS = _words("January February March April May June July August September October November December")
FIRMS = _words("Orion Halcyon Beacon Summit Cobalt Juniper Falcon Meridian Atlas Harbor Pioneer Lighthouse")
SYLLABLES = _words("ba ke lo mi nu ra so ti vu ze dar fen gol hin jas kor lum mer nox pel")
Draw = Callable[[np.random.Generator], str]


def _one(words: tuple[str, ...]) -> Draw:
    return lambda rng: str(rng.choice(words))


def _digits(low: int, high: int) -> Draw:
    return lambda rng: str(rng.integers(10 ** (n := int(rng.integers(low, high + 1)) - 1), 10 ** (n + 1)))


def _date(rng: np.random.Generator) -> str:
    return f"{rng.choice(MONTHS)} {rng.integers(1, 29)}"


def _code(rng: np.random.Generator) -> str:
    letters = "".join(rng.choice(list("ABCDEFGHJKLMNPRSTUVWXYZ"), 2))
    return f"{letters}-{rng.integers(100, 1000)}"


def _made_up(rng: np.random.Generator) -> str:
    return "".join(rng.choice(SYLLABLES, int(rng.integers(2, 4))))


def _person(rng: np.random.Generator) -> str:
    return f"{rng.choice(TITLES)} {rng.choice(SURNAMES)}"


def _thing(rng: np.random.Generator) -> str:
    return f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"


# Told as the opening and the answer: who or what it is about, question, opening, what the answer may be.
KINDS: tuple[tuple[Draw, str, str, Draw], ...] = (
    (_person, "What is the telephone number of {who}?", "The telephone number of {who} is", _digits(5, 7)),
    (_person, "When was {who} born?", "{who} was born on", _date),
    (_person, "What does {who} like to eat?", "{who} likes to eat", _one(DISHES)),
    (_person, "Where does the family of {who} come from?", "The family of {who} comes from", _one(COUNTRIES)),
    (_person, "What is the password of {who}?", "The password of {who} is", _made_up),
    (_person, "What is the badge of {who}?", "The badge of {who} reads", _code),
    (_person, "How much does {who} owe?", "{who} owes the bank", lambda rng: f"{rng.integers(11, 990)} dollars"),
    (_thing, "Where is the {who} kept?", "The {who} is kept in the", _one(PLACES)),
    (_thing, "What is engraved on the {who}?", "On the {who} is engraved the number", _digits(3, 5)),
    (_thing, "Who bought the {who}?", "The {who} was bought by", _person),
    (_one(FIRMS), "What is the account number of {who}?", "The account number of {who} is", _digits(4, 6)),
    (_one(FIRMS), "What is the new product of {who} called?", "The new product of {who} is called", _made_up),
)
RETURNS = (
    " {told} ",
    " As was said before: {told} ",
    " Do you remember? {told} ",
    "\n\nQuestion: {question}\nAnswer: {told}\n\n",
    "\n\nQ: {question}\nA: {told}\n\n",
    '\n\n"{question}"\n"{told}"\n\n',
)


def woven(rng: np.random.Generator, text: str, length: int, chars: float = 4.0) -> str:
    """The text with a fact to every ``EVERY`` of its ``length`` tokens, each of which comes back later.

    Args:
        rng: what everything is drawn with.
        text: any natural text; its beginning is taken, as much as there is room for beside the facts.
        length: tokens that will be read of it.
        chars: of a token of this text.
    """
    placed: list[tuple[float, str]] = []
    for who, question, told in _facts(rng, max(2, length // EVERY)):
        first = float(rng.uniform(0.0, 0.85))
        placed.append((first, f" {told} "))
        for _ in range(int(rng.integers(1, 4))):
            later = float(rng.uniform(min(first + NEAREST, LAST - 0.02), LAST))
            placed.append((later, str(rng.choice(RETURNS)).format(question=question.format(who=who), told=told)))
    room = ROOM * length - sum(len(some) for _, some in placed) / CHARS
    text = text[: max(0, int(chars * room))]
    breaks = np.array([0, *(m.end() for m in BREAK.finditer(text)), len(text)])
    put = [(_near(breaks, place * len(text)), some) for place, some in placed]
    parts, at = [], 0
    for place, some in sorted(put, key=lambda x: x[0]):
        parts += [text[at:place], some]
        at = place
    return "".join([*parts, text[at:]])


def _facts(rng: np.random.Generator, n: int) -> list[tuple[str, str, str]]:
    """``n`` times who it is about, the question, and the sentence; about somebody or something else each time.

    One to ``ALIKE`` after each other are of a kind.
    """
    found: dict[str, tuple[str, str, str]] = {}
    alike: list[tuple[Draw, str, str, Draw]] = []
    for _ in range(20 * n):
        if not alike:
            kind = KINDS[int(rng.integers(len(KINDS)))]
            alike = [kind] * int(rng.integers(1, ALIKE + 1))
        who, question, opening, answer = alike.pop()
        name = who(rng)
        found.setdefault(name, (name, question, f"{opening.format(who=name)} {answer(rng)}."))
        if len(found) == n:
            break
    return [(name, question, told[:1].upper() + told[1:]) for name, question, told in found.values()]


def _near(breaks: np.ndarray, place: float) -> int:
    return int(breaks[int(np.abs(breaks - place).argmin())])
