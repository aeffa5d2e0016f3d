"""Scores and intervals against cases made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_kvprune.evals import density, generation, judge, tables
from mlx_kvprune.evals.conditions import SIZES

HELD = dict.fromkeys(SIZES, 7)


def unit(policy: str, item: int, *exact: bool, wording: str = "a") -> dict:
    outcomes = [{"wording": wording, "exact": x, "logprob": -1.0 - x, "prompt_tokens": 9, **HELD} for x in exact]
    named = {"task": "t", "item": item, "policy": policy, "allocator": "uniform", "budget": "9", "seed": 0}
    return {**named, "setup": {}, "result": {"outcomes": outcomes}}


def test_what_is_left_of_fulls_answers():
    units = [unit("full", 0, True, False), unit("full", 1, True, True)]
    units += [unit("probe", 1, True, False), unit("probe", 0, True, True)]  # in any order
    full, probe = judge.rows("t", units)
    assert (full["exact"], full["kept"], full["exact_full"], full["counts"]) == (3, 3, 3, False)
    assert (probe["exact"], probe["kept"], probe["exact_full"]) == (3, 2, 3)  # one is right where full is wrong
    assert probe["score"] == 0.75
    assert probe["logprob"] == -1.75


def test_how_much_likelier_answers_are_than_fulls():
    def told(policy, item, *logprobs):
        found = unit(policy, item, *[True] * len(logprobs))
        for outcome, x in zip(found["result"]["outcomes"], logprobs, strict=True):
            outcome["logprob"] = x
        return found

    units = [told("full", i, -1.0, -2.0) for i in range(3)] + [told("probe", i, -0.5, -2.0 - i) for i in range(3)]
    full, probe = judge.rows("t", units)
    assert full["gain"] == full["gain_low"] == full["gain_high"] == 0.0
    assert probe["gain"] == pytest.approx((0.5 + 0.0 + 0.5 - 1.0 + 0.5 - 2.0) / 6)
    assert (probe["gain_low"], probe["gain_high"]) == pytest.approx((-0.75, 0.25)), "whole items are drawn"
    assert "gain" not in judge.rows("t", units[3:])[0], "nothing to compare with"


@pytest.mark.parametrize(("solved", "counts"), [(7, False), (8, True)])
def test_a_wording_counts_from_eighty_percent(solved, counts):
    units = [unit("full", i, i < solved) for i in range(10)] + [unit("window", i, False) for i in range(10)]
    assert [row["counts"] for row in judge.rows("t", units)] == [counts, counts]


def test_wordings_are_apart_and_matched_with_their_own():
    both = lambda policy, a, b: {**unit(policy, 0), "result": {"outcomes": outcomes(a, "a") + outcomes(b, "b")}}
    outcomes = lambda exact, wording: unit("x", 0, exact, wording=wording)["result"]["outcomes"]
    rows = judge.rows(
        "t", [both("full", True, False), {**unit("probe", 0), "result": {"outcomes": outcomes(True, "b")}}]
    )
    assert [(row["policy"], row["wording"], row["exact_full"]) for row in rows] == [
        ("full", "a", 1),
        ("full", "b", 0),
        ("probe", "b", 0),
    ]


def test_wilson_intervals():
    assert judge.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)  # the textbook's
    assert judge.wilson(0, 10)[0] == 0.0 < judge.wilson(0, 10)[1]
    assert judge.wilson(0, 0) == (0.0, 1.0)


def test_intervals_of_clusters():
    assert judge.clustered([[True]] * 8 + [[False]] * 2) == judge.wilson(8, 10), "one question to an item: Wilson's"
    assert judge.clustered([[True] * 5] * 4) == judge.wilson(20, 20, 3.182), "Student's, of three degrees of freedom"
    assert judge.clustered([[True] * 5]) == judge.wilson(1, 1), "one document"
    assert judge.clustered([]) == judge.clustered([[]]) == (0.0, 1.0)
    # All five questions of a document alike: they say what one does, but for the n / (n - 1) of a variance.
    alike = judge.clustered([[True] * 5] * 40 + [[False] * 5] * 10)
    assert alike == pytest.approx(judge.wilson(40 * 49 / 50, 49, judge.student(49)))
    # Spread more evenly than by chance: not narrower than independent questions.
    assert judge.clustered([[True] * 4 + [False]] * 10) == judge.wilson(40, 50, 2.262)


@pytest.mark.parametrize(("documents", "most"), [(4, 1.0), (14, 0.985), (30, 0.985)])
def test_clusters_cover_what_they_should(documents, most):
    """Documents that are easier or harder: nineteen of twenty intervals hold the share that is true of all documents."""
    rng, held, naive, n = np.random.default_rng(0), 0, 0, 1000
    for _ in range(n):
        items = [list(rng.random(5) < p) for p in rng.beta(3, 1, size=documents)]  # mean 0.75
        low, high = judge.clustered(items)
        held += low <= 0.75 <= high
        low, high = judge.wilson(sum(map(sum, items)), 5 * documents)
        naive += low <= 0.75 <= high
    assert 0.93 < held / n <= most
    assert naive < held - 0.05 * n


@pytest.mark.parametrize(
    ("degrees", "exact"), [(1, 12.706), (10, 2.228), (11, 2.201), (19, 2.093), (30, 2.042), (500, 1.965)]
)
def test_students_quantiles(degrees, exact):
    assert judge.student(degrees) == pytest.approx(exact, abs=1e-3)


def test_intervals_of_means():
    got = judge.mean_interval("x", [[0.0], [1.0]] * 50)
    assert got["x"] == 0.5
    assert (got["x_low"], got["x_high"]) == pytest.approx((0.4, 0.6), abs=0.03)
    whole = judge.mean_interval("x", [[0.0] * 9, [1.0] * 9] * 50)
    assert (whole["x_low"], whole["x_high"]) == (got["x_low"], got["x_high"])
    assert judge.mean_interval("x", [[1.0, 1.0], [4.0], []])["x"] == 2.0
    alone = judge.mean_interval("x", [[0.0, 1.0] * 50])
    assert (alone["x_low"], alone["x_high"]) == (got["x_low"], got["x_high"]), "of one item, its values are drawn"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], False),
        ([9, 9, 9], True),
        ([9, 9], False),
        ([5, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1, 2, 7], False),
        ([1, 2, 1, 2], False),
        ([7, 8, 1, 2, 1, 2], False),
        (list(range(33)) * 3, False),
        (list(range(32)) * 3, True),
    ],
)
def test_loops(said, expected):
    assert generation.loops(said) is expected


def test_where_answers_part():
    assert generation.diverges([1, 2, 3], [1, 2, 4]) == 2
    assert generation.diverges([1, 2], [1, 2, 4]) == 2
    assert generation.diverges([3], [1]) == 0


def said(policy: str, item: int, tokens: list[int]) -> dict:
    return {**unit(policy, item), "result": {"said": tokens, "most": 6, "prompt_tokens": 3, **HELD}}


def test_lengths_are_compared_where_full_came_to_an_end():
    units = [
        said("full", 0, [1, 2]),
        said("full", 1, [1] * 6),
        said("window", 0, [1, 3, 1, 3]),
        said("window", 1, [1] * 6),
    ]
    full, window = generation.rows(units)
    assert (full["inflation"], full["same"], full["loops"], full["cut"]) == (1.0, 4.0, 1, 1)
    assert (window["inflation"], window["ended_full"], window["same"], window["length"]) == (2.0, 1, 3.5, 5.0)
    assert window["cut_ended"] == 0
    (_, window) = generation.rows(
        [*units[:3], said("window", 1, [1] * 6), said("full", 2, [1]), said("window", 2, [1] * 6)]
    )
    assert (window["inflation"], window["cut_ended"]) == (4.0, 1), "a lower bound"
    header, (_, cells) = tables.table("generation", [full, window])
    assert dict(zip(header, cells, strict=True))["inflation"] == "at least 4.00x of 2"


def test_regression_of_compression_on_length():
    assert density.regression([256, 512, 1024], [1.0, 2.0, 3.0]) == pytest.approx((1.0, 1.0))
    assert density.regression([256, 256], [1.0, 2.0]) == (0.0, 0.0)
    slope, fit = density.regression([256, 256, 512, 512], [1.0, 2.0, 2.0, 3.0])
    assert (slope, fit) == pytest.approx((1.0, 0.5))


def test_densities_over_heads_and_texts():
    text = lambda item, shares, tokens: {
        **unit("h2o", item),
        "result": {"kind": "k", "tokens": tokens, "compression": 2.0, "density": shares, **HELD},
    }
    (row,) = density.rows([text(0, [[0.2, 0.4]], 64), text(1, [[0.2, 0.5]], 64), text(2, [[0.9, 0.9]], 32)])
    assert (row["density"], row["density_least"], row["density_most"]) == pytest.approx((0.325, 0.2, 0.5))
    assert (row["spread"], row["moves"]) == pytest.approx((0.125, 0.025))
