"""The choice of slots, the pool and the ring against lists and sorting: no slot lost, none used twice."""

from __future__ import annotations

import copy
import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_kvprune.quantize import PAGE, Codec
from mlx_kvprune.slots import Format, Pool, Ring, Tokens, best_of_spans, exchange, order_key

FLOATS = st.floats(width=32, allow_nan=False)
FEW_SCORES = st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1e-45, 1.0, np.inf])  # so that ties are the rule
at_leisure = settings(deadline=None)  # a busy machine is no failure
POSITIONS = st.integers(-(2**30), 2**30)


def as_key(score: float, position: int) -> int:
    return order_key(mx.array([score], mx.float32), mx.array([position], mx.int32)).item()


@at_leisure
@given(FLOATS | FEW_SCORES, FLOATS | FEW_SCORES, POSITIONS, POSITIONS)
def test_order_key_compares_score_then_position(a, b, at_a, at_b):
    """Also negative scores, infinities, denormals, and zeros of both signs, which are equal."""
    left, right = (a, at_a), (b, at_b)
    assert (as_key(*left) < as_key(*right)) == (left < right)
    assert (as_key(*left) == as_key(*right)) == (left == right)


@st.composite
def contests(draw):
    """Scores of a pool's slots and of leaving tokens, two rows of each: ``(2, P)`` and ``(2, n)``."""
    n_slots, n_leaving = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rows = lambda n: draw(st.lists(st.lists(FEW_SCORES, min_size=n, max_size=n), min_size=2, max_size=2))
    return rows(n_slots), rows(n_leaving)


@at_leisure
@given(contests())
def test_exchange_keeps_the_top_of_both(contest):
    slots, leaving = (np.array(rows, np.float32)[None] for rows in contest)
    n_slots, n_leaving = slots.shape[2], leaving.shape[2]
    scores, positions = np.concatenate([slots, leaving], axis=2), np.arange(n_slots + n_leaving)
    keys = order_key(mx.array(scores), mx.broadcast_to(mx.array(positions, mx.int32), scores.shape))
    pairs = exchange(keys[..., :n_slots], keys[..., n_slots:])

    for head in range(2):
        taken = list(range(n_slots))
        slots_of, leaving_of, replace = (np.array(x)[0, head] for x in (pairs.slots, pairs.leaving, pairs.replace))
        for i in np.flatnonzero(replace):
            taken[slots_of[i]] = n_slots + leaving_of[i]
        ranked = sorted(positions, key=lambda i: (scores[0, head, i], i), reverse=True)
        assert sorted(taken) == sorted(ranked[:n_slots])
        stayed = [i for i, token in enumerate(taken) if token == i]
        assert set(stayed) == set(ranked[:n_slots]) & set(range(n_slots)), "a slot that stays is not moved"


@st.composite
def spans(draw):
    """Scores and positions of slots, some of them empty, and where spans start."""
    n = draw(st.integers(1, 24))
    positions = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n, unique=True))
    positions = [-1 - i if draw(st.booleans()) and draw(st.booleans()) else p for i, p in enumerate(positions)]
    starts = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=5)))
    scores = draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=n, max_size=n))
    return scores, positions, tuple(starts), draw(st.integers(1, 6))


@at_leisure
@given(spans())
def test_best_of_spans_against_sorting(case):
    scores, positions, starts, n = case
    at = mx.array(positions, mx.int32)[None, None]
    got = np.array(best_of_spans(order_key(mx.array(scores)[None, None], at), at, starts, n))[0, 0]
    expected = set()
    for start, stop in itertools.pairwise(starts):
        inside = [i for i, p in enumerate(positions) if start <= p < stop]
        expected |= set(sorted(inside, key=lambda i: (scores[i], positions[i]))[-n:])
    assert set(np.flatnonzero(got)) == expected


# -- the pool ---------------------------------------------------------------------------------------------------------

HEADS, WIDTH = 2, 32
PAGED = Format(Codec(WIDTH, bits=8, scheme="page"), Codec(WIDTH), mx.float32)
EXACT = Format(Codec(WIDTH), Codec(WIDTH), mx.float32)


def tokens(start: int, n: int, positions: int | None = None) -> Tokens:
    """Tokens whose keys, values and memory all say which one they are: ``start ..``, negated in the second head."""
    ids = mx.arange(start, start + n, dtype=mx.float32) * mx.array([[1.0], [-1.0]])
    rows = mx.broadcast_to(ids[None, ..., None], (1, HEADS, n, WIDTH))
    at = start if positions is None else positions
    return Tokens(rows, 2 * rows, ids[None], mx.broadcast_to(mx.arange(at, at + n, dtype=mx.int32), (1, HEADS, n)))


class Lists:
    """The same pool as a list of pages per head, each a list of ``(position, token)``."""

    def __init__(self, pages: int, granule: int, seed: int):
        self.pages, self.granule, self.heads = pages, granule, [[] for _ in range(HEADS)]
        self.scores = np.random.default_rng(seed).integers(-9, 9, (HEADS, 4000)).astype(np.float32)

    def put(self, start: int, n: int, position: int) -> None:
        new = [(position + i, start + i) for i in range(n)]
        for head, pages in enumerate(self.heads):
            pages += [new[i : i + self.granule] for i in range(0, n, self.granule)]
            rank = lambda page, head=head: self.rank(head, page)
            self.heads[head] = sorted((p for p in pages if p), key=rank)[-self.pages :]

    def rank(self, head: int, page: list[tuple[int, int]]) -> tuple[float, int]:
        return (np.float32(np.mean([self.scores[head, token] for _, token in page])), max(p for p, _ in page))

    def drop(self, start: int, stop: int, shift: int) -> None:
        move = lambda p: p - shift if p >= stop else p
        for head, pages in enumerate(self.heads):
            left = [[(move(p), t) for p, t in page if not start <= p < stop] for page in pages]
            self.heads[head] = [page for page in left if page]

    def held(self, head: int) -> dict[int, int]:
        return dict(x for page in self.heads[head] for x in page)


def held_by(pool: Pool, head: int) -> dict[int, int]:
    """Which token the pool holds at which position, as keys, values and memory agree on it."""
    positions, sign = np.array(pool.heads_positions())[0, head], (1, -1)[head]
    keys, values = (np.array(pool.heads_rows(name))[0, head] for name in ("keys", "values"))
    live = positions >= 0
    ids = np.round(sign * keys[live].mean(axis=1))
    np.testing.assert_allclose(sign * keys[live], np.repeat(ids[:, None], WIDTH, 1), atol=0.2)
    np.testing.assert_array_equal(sign * values[live], np.repeat(2 * ids[:, None], WIDTH, 1))
    np.testing.assert_array_equal(sign * np.array(pool.heads_memory())[0, head][live], ids)
    return dict(zip(positions[live].tolist(), ids.astype(int).tolist(), strict=True))


def check(pool: Pool, model: Lists) -> None:
    """The pool holds what the lists hold, no position twice, and masks exactly the empty slots."""
    positions, mask = np.array(pool.heads_positions())[0], pool.part().mask
    assert pool.count <= pool.capacity <= pool.limit
    assert np.array_equal(positions >= 0, np.ones_like(positions) if mask is None else np.array(mask)[0, :, 0])
    assert (np.array(pool.positions)[0, :, pool.count :] < 0).all()
    for head in range(HEADS):
        assert len(set(positions[head].tolist())) == pool.count
        assert held_by(pool, head) == model.held(head)


def put(pool: Pool, model: Lists, start: int, n: int, position: int) -> None:
    """Into empty slots while all fit, then by score; as the cache does."""
    new = tokens(start, n, position)
    if pool.free >= n:
        pool.fill(new)
    else:
        known = [model.held(head) for head in range(HEADS)]
        places = np.array(pool.heads_positions())[0].tolist()
        rows = [[model.scores[h, known[h][p]] if p >= 0 else 0.0 for p in places[h]] for h in range(HEADS)]
        pool.write(
            pool.choose(
                new, mx.array(np.array(rows, np.float32))[None], mx.array(model.scores[None, :, start : start + n])
            )
        )
        if pool.holes:
            pool.count_holes()
    model.put(start, n, position)


STEPS = st.tuples(st.sampled_from(["put", "put", "put", "drop", "close"]), st.integers(1, 9), st.integers(0, 99))


@pytest.mark.parametrize("granule", [1, PAGE])
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.lists(STEPS, min_size=1, max_size=14), st.integers(0, 99))
def test_pool_against_lists(granule, room, steps, seed):
    """Fill, overwrite, forget a span, fill again: the best are held, and gaps are never attended to."""
    pages = -(-room // 6) if granule > 1 else room
    pool = Pool(pages * granule, tokens(0, 0), EXACT if granule == 1 else PAGED)
    model, start, position = Lists(pages, granule, seed), 0, 0
    for what, n, where in steps:
        if what == "put":
            n = n if granule == 1 else PAGE * (1 + n // 5)
            put(pool, model, start, n, position)
            start, position = start + n, position + n
        elif position:
            first = where % position
            last = min(position, first + n * (1 if granule == 1 else 7))
            shift = last - first if what == "close" else 0
            pool.vacate(first, last, shift)
            model.drop(first, last, shift)
            position -= shift
        check(pool, model)


@at_leisure
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 99))
def test_losers_are_the_lowest(limit, n, seed):
    """What a pool does not keep goes on to the next one: exactly the ``n`` lowest of both, whole."""
    pool, model = Pool(limit, tokens(0, 0), EXACT), Lists(limit, 1, seed)
    pool.fill(tokens(0, limit))
    slots, new = (mx.array(model.scores[None, :, span]) for span in (slice(0, limit), slice(limit, limit + n)))
    writes = pool.choose(tokens(limit, n), slots, new, want_losers=True)
    pool.write(writes)
    assert writes.losers is not None and writes.losers.n == n
    for head, sign in enumerate((1, -1)):
        ranked = sorted(range(limit + n), key=lambda i: (model.scores[head, i], i))
        lost = np.array(writes.losers.positions)[0, head].tolist()
        assert (sorted(lost), sorted(held_by(pool, head))) == (sorted(ranked[:n]), sorted(ranked[n:]))
        for rows, factor in ((writes.losers.keys, 1), (writes.losers.values, 2)):
            np.testing.assert_array_equal(np.array(rows)[0, head, :, 0] * sign, np.array(lost) * factor)
        np.testing.assert_array_equal(np.array(writes.losers.memory)[0, head] * sign, lost)
        np.testing.assert_array_equal(np.array(writes.scores)[0, head], model.scores[head, lost])


@at_leisure
@given(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_pool_truncates_what_was_filled_last(more, lengths, data):
    total = sum(lengths)
    pool, model, start = Pool(total + more, tokens(0, 0), EXACT), Lists(total + more, 1, 0), 0
    for n in lengths:
        put(pool, model, start, n, start)
        start += n
    n = data.draw(st.integers(1, total))
    pool.truncate(n)
    model.drop(total - n, total, 0)
    check(pool, model)
    assert pool.count == total - n
    put(pool, model, total, n + more, total)
    check(pool, model)


def test_pool_doubles_up_to_its_limit_and_then_stays():
    pool, model, capacities = Pool(700, tokens(0, 0), EXACT), Lists(700, 1, 0), []
    for start in range(0, 960, 32):
        put(pool, model, start, 32, start)
        capacities.append(pool.capacity)
    check(pool, model)
    assert sorted(set(capacities)) == [256, 512, 700]
    assert pool.count == 700
    assert pool.nbytes == HEADS * 700 * (4 * 2 * WIDTH + 4 + 4)


@pytest.mark.parametrize("form", [EXACT, PAGED], ids=["exact", "paged"])
def test_a_copied_pool_does_not_follow(form):
    """MLX writes into array objects in place; a copy has objects of its own."""
    pool, model = Pool(64, tokens(0, 0), form), Lists(64 // form.granule, form.granule, 0)
    put(pool, model, 0, 32, 0)
    other, kept = copy.deepcopy(pool), copy.deepcopy(model)
    pool.vacate(2, 6)
    model.drop(2, 6, 0)
    put(pool, model, 50, 64, 50)
    check(other, kept)
    check(pool, model)


# -- the ring ---------------------------------------------------------------------------------------------------------


def ring_of(n: int) -> Ring:
    ring = Ring(*(getattr(tokens(0, 0), name) for name in ("keys", "values", "memory")), np.zeros(0, np.int32))
    new = tokens(0, n)
    ring.append(new.keys, new.values, new.memory, 0)
    return ring


def is_ring_of(ring: Ring, positions: list[int]) -> bool:
    rows = mx.array(positions, mx.float32)
    ids = np.array(ring.keys)[0, 0, :, 0].tolist(), np.array(ring.values)[0, 1, :, 5].tolist()
    return ids == (rows.tolist(), (-2 * rows).tolist()) and ring.positions.tolist() == positions


@at_leisure
@given(st.integers(1, 20), st.lists(st.tuples(st.sampled_from(["append", "oldest", "some"]), st.integers(1, 9))))
def test_ring_against_a_list(n, steps):
    ring, model, start = ring_of(n), list(range(n)), n
    for what, m in steps:
        if what == "append":
            new = tokens(start, m)
            ring.append(new.keys, new.values, new.memory, start)
            model, start = [*model, *range(start, start + m)], start + m
        elif what == "oldest":
            assume(m <= len(model))
            before = copy.copy(ring)
            old = ring.span(0, m)
            ring.keep(slice(m, None))
            assert np.array(old.positions)[0, 1].tolist() == np.array(old.keys)[0, 0, :, 0].tolist() == model[:m]
            assert is_ring_of(before, model), "who still reads the ring is not disturbed"
            model = model[m:]
        else:
            ring.keep(np.flatnonzero(ring.positions % (m + 1)))
            model = [p for p in model if p % (m + 1)]
        assert is_ring_of(ring, model)
        assert ring.nbytes == HEADS * len(model) * 4 * (2 * WIDTH + 1) + 4 * len(model)
