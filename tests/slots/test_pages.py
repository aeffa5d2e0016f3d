"""Pages that change hands, against lists: no slot lost, none used twice, each carries its own token."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvprune.quantize import PAGE, Codec
from mlx_kvprune.slots import Format, PagedPool, Tokens, moves
from mlx_kvprune.slots.moves import NOBODY

HEADS, WIDTH = 3, 32
EXACT = Format(Codec(WIDTH), Codec(WIDTH), mx.float32)
PAGED = Format(Codec(WIDTH, bits=8, scheme="page"), Codec(WIDTH), mx.float32)
at_leisure = settings(deadline=None)  # a busy machine is no failure


# -- what goes where ---------------------------------------------------------------------------------------------------


@at_leisure
@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 9), st.integers(0, 30), st.integers(0, 999))
def test_worst_kept_against_sorting(pages, units, n, room, seed):
    rng = np.random.default_rng(seed)
    keys = rng.permutation(pages * units + n)
    slots, new, live = (
        keys[: pages * units].reshape(pages, units),
        keys[pages * units :],
        rng.random((pages, units)) > 0.3,
    )
    least = moves.worst_kept(np.sort(np.concatenate([slots[live], new]))[::-1], room)
    stay, come = live & (slots >= least), new >= least
    kept = sorted([*slots[stay].tolist(), *new[come].tolist()])
    assert kept == (sorted([*slots[live].tolist(), *new.tolist()])[::-1][:room][::-1])
    assert not (stay & ~live).any()


@st.composite
def plans(draw):
    """Pages with owners, what is kept of them, new units, and targets into which each head's units fit."""
    heads, pages, units, n = (draw(st.integers(1, most)) for most in (4, 9, 4, 6))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    owner = rng.integers(0, heads, pages).astype(np.int32)
    kept, new = rng.random((pages, units)) < rng.random(), rng.random((heads, n)) < rng.random()
    need = [-(-(int(kept[owner == h].sum()) + int(new[h].sum())) // units) for h in range(heads)]
    return owner, kept, new, np.array([x + draw(st.integers(0, 2)) for x in need])


@at_leisure
@given(plans())
def test_plan_places_everything_once(plan):
    owner, kept, new, targets = plan
    before = owner.copy(), kept.copy()
    change, units = moves.plan(owner, kept, new, targets), kept.shape[1]
    assert np.array_equal(before[0], owner) and np.array_equal(before[1], kept), "its arguments are left alone"
    assert [int((change.owner == h).sum()) for h in range(len(targets))] == targets.tolist()
    assert not change.kept[change.owner == NOBODY].any()
    stays = np.flatnonzero(change.kept)
    assert set(stays) <= set(np.flatnonzero(kept)), "what stays does not move"
    places = [*stays.tolist(), *change.new.tolist(), *change.old.tolist()]
    assert len(set(places)) == len(places), "no unit is used twice"
    assert sorted([*stays.tolist(), *change.old_from.tolist()]) == np.flatnonzero(kept).tolist(), "none is lost"
    assert sorted(change.new_from.tolist()) == np.flatnonzero(new).tolist()
    heads_of = lambda at: change.owner[at // units].tolist()
    assert heads_of(change.new) == (change.new_from // new.shape[1]).tolist()
    assert heads_of(change.old) == owner[change.old_from // units].tolist()
    assert len(change.owner) == max(len(owner), int(targets.sum())), "pages are allocated only if none is left"


# -- the pool ----------------------------------------------------------------------------------------------------------


def tokens(start: int, n: int, positions: int | None = None) -> Tokens:
    """Tokens whose keys, values and memory all say which one they are, times the head's number plus one."""
    ids = mx.arange(start, start + n, dtype=mx.float32) * mx.arange(1, HEADS + 1, dtype=mx.float32)[:, None]
    rows = mx.broadcast_to(ids[None, ..., None], (1, HEADS, n, WIDTH))
    at = start if positions is None else positions
    return Tokens(rows, 2 * rows, ids[None], mx.broadcast_to(mx.arange(at, at + n, dtype=mx.int32), (1, HEADS, n)))


class Lists:
    """The same pool as a list of units per head, each a list of ``(position, token)``."""

    def __init__(self, granule: int, seed: int):
        self.granule, self.heads = granule, [[] for _ in range(HEADS)]
        self.scores = np.random.default_rng(seed).integers(-9, 9, (HEADS, 4000)).astype(np.float32)

    def put(self, start: int, n: int, position: int, targets: np.ndarray | None = None) -> None:
        new = [(position + i, start + i) for i in range(n)]
        for head, units in enumerate(self.heads):
            units += [new[i : i + self.granule] for i in range(0, n, self.granule)]
            if targets is not None:
                rank = lambda unit, head=head: self.rank(head, unit)
                room = int(targets[head]) * PAGE // self.granule
                self.heads[head] = sorted(units, key=rank)[-room:]

    def rank(self, head: int, unit: list[tuple[int, int]]) -> tuple[float, int]:
        return (np.float32(np.mean([self.scores[head, token] for _, token in unit])), max(p for p, _ in unit))

    def drop(self, start: int, stop: int, shift: int) -> None:
        move = lambda p: p - shift if p >= stop else p
        for head, units in enumerate(self.heads):
            left = [[(move(p), t) for p, t in unit if not start <= p < stop] for unit in units]
            self.heads[head] = [unit for unit in left if unit]

    def held(self, head: int) -> dict[int, int]:
        return dict(x for unit in self.heads[head] for x in unit)


def check(pool: PagedPool, model: Lists) -> None:
    """The pool holds what the lists hold, and its layout says where."""
    table, positions = np.array(pool.layout.table), np.array(pool.heads_positions())[0]
    assert sorted(table[table < pool.used].tolist()) == list(range(pool.used)), "each page has one owner"
    assert np.array_equal(pool.layout.owner, pool.owner)
    assert np.array_equal(np.array(pool.layout.hot), pool.owner == np.arange(HEADS)[:, None])
    mask = pool.part().mask
    assert np.array_equal(pool.positions >= 0, np.ones((pool.used, PAGE)) if mask is None else np.array(mask)[:, 0])
    assert pool.capacity <= max(pool.limit, pool.used)
    assert pool.held == sum(len(model.held(head)) for head in range(HEADS))
    for head in range(HEADS):
        live, sign = positions[head] >= 0, head + 1
        keys, values = (np.array(pool.heads_rows(name))[0, head][live] / sign for name in ("keys", "values"))
        ids = np.array(pool.heads_memory())[0, head][live] / sign
        np.testing.assert_allclose(keys, np.repeat(ids[:, None], WIDTH, 1), atol=0.2)
        np.testing.assert_allclose(values, np.repeat(2 * ids[:, None], WIDTH, 1), rtol=1e-6)
        found = list(zip(positions[head][live].tolist(), np.round(ids).astype(int).tolist(), strict=True))
        assert sorted(found) == sorted(model.held(head).items())
        assert pool.live_counts()[head] == len(found)


def put(pool: PagedPool, model: Lists, start: int, n: int, position: int, share: np.random.Generator) -> None:
    """Into empty slots while all fit, then by score, with any share of the pages; as the cache does."""
    new = tokens(start, n, position)
    if pool.free >= n:
        pool.fill(new)
        model.put(start, n, position)
        return
    targets = 1 + share.multinomial(pool.limit - HEADS, share.dirichlet(np.ones(HEADS)))
    known, places = [model.held(head) for head in range(HEADS)], np.array(pool.heads_positions())[0].tolist()
    rows = [[model.scores[h, known[h][p]] if p >= 0 else 0.0 for p in places[h]] for h in range(HEADS)]
    scores = mx.array(np.array(rows, np.float32)).reshape(1, HEADS, -1)
    candidates = pool.candidates(new, scores, mx.array(model.scores[None, :, start : start + n]))
    pool.write(pool.choose(new, candidates, targets))
    model.put(start, n, position, targets)
    assert np.bincount(pool.owner, minlength=HEADS).tolist() == targets.tolist()


STEPS = st.tuples(st.sampled_from(["put", "put", "put", "drop", "close"]), st.integers(1, 40), st.integers(0, 99))


@pytest.mark.parametrize("form", [EXACT, PAGED], ids=["exact", "paged"])
@settings(deadline=None, max_examples=60)
@given(st.integers(HEADS, 9), st.lists(STEPS, min_size=1, max_size=14), st.integers(0, 99))
def test_pool_against_lists(form, limit, steps, seed):
    """Filled, shared anew each time, with spans forgotten: never more than its pages."""
    pool, model, share = PagedPool(limit, tokens(0, 0), form), Lists(form.granule, seed), np.random.default_rng(seed)
    start = position = 0
    for what, n, where in steps:
        if what == "put":
            n = n if form.granule == 1 else PAGE * (1 + n // 20)
            put(pool, model, start, n, position, share)
            start, position = start + n, position + n
        elif position:
            first = where % position
            last = min(position, first + n)
            shift = last - first if what == "close" else 0
            pool.vacate(first, last, shift)
            model.drop(first, last, shift)
            position -= shift
        check(pool, model)
        assert pool.used <= limit
        assert pool.capacity <= limit


def test_nothing_is_allocated_once_the_limit_is_reached():
    """Even though pages go from head to head at every step."""
    pool, model, share = PagedPool(12, tokens(0, 0), EXACT), Lists(1, 0), np.random.default_rng(0)
    seen = []
    for start in range(0, 1600, 32):
        put(pool, model, start, 32, start, share)
        seen.append((pool.capacity, pool.nbytes - pool.layout.nbytes - (0 if pool.mask is None else pool.mask.nbytes)))
    check(pool, model)
    assert len(set(seen[10:])) == 1


@at_leisure
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.data())
def test_truncate_takes_back_the_newest(lengths, data):
    total = sum(lengths)
    pool, model, share = PagedPool(99, tokens(0, 0), EXACT), Lists(1, 0), np.random.default_rng(0)
    for n, start in zip(lengths, np.cumsum([0, *lengths]).tolist(), strict=False):
        put(pool, model, start, n, start, share)
    n = data.draw(st.integers(1, total))
    pool.truncate(n)
    model.drop(total - n, total, 0)
    check(pool, model)
    put(pool, model, total, n, total, share)
    check(pool, model)


def test_pages_that_go_to_another_layer_are_given_back():
    pool, model = PagedPool(9, tokens(0, 0), EXACT), Lists(1, 0)
    put(pool, model, 0, 96, 0, np.random.default_rng(0))
    candidates = pool.candidates(
        tokens(96, 32), mx.array(model.scores[None, :, :96]), mx.array(model.scores[None, :, 96:128])
    )
    targets = np.array([1, 3, 2])
    pool.write(pool.choose(tokens(96, 32), candidates, targets))
    model.put(96, 32, 96, targets)
    check(pool, model)
    assert (pool.used, pool.capacity) == (6, 6)


def test_a_copied_pool_does_not_follow():
    pool, model, share = PagedPool(6, tokens(0, 0), EXACT), Lists(1, 0), np.random.default_rng(0)
    put(pool, model, 0, 40, 0, share)
    other, kept = copy.deepcopy(pool), copy.deepcopy(model)
    pool.vacate(3, 20)
    model.drop(3, 20, 0)
    put(pool, model, 40, 60, 40, share)
    check(other, kept)
    check(pool, model)


def test_state_goes_to_another_pool():
    pool, model, share = PagedPool(6, tokens(0, 0), PAGED), Lists(PAGE, 0), np.random.default_rng(0)
    for start in range(0, 256, 32):
        put(pool, model, start, 32, start, share)
    other = PagedPool(6, tokens(0, 0), PAGED)
    other.restore({name: mx.array(x) for name, x in pool.arrays().items()}, pool.numbers())
    check(other, model)
    assert other.nbytes == pool.nbytes
