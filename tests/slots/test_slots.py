"""The choice of slots against sorting, and the pool's bookkeeping: no slot lost, none used twice."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvprune.slots import Pool, Ring, exchange, order_key

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


def tokens(start: int, n: int, heads: int = 2) -> Ring:
    """Tokens whose keys, values and memory all say which one they are."""
    rows = mx.arange(start, start + n, dtype=mx.float32) + 1000 * mx.arange(heads, dtype=mx.float32)[:, None]
    rows = rows[None]
    return Ring(mx.repeat(rows[..., None], 3, -1), mx.repeat(rows[..., None], 2, -1), rows)


def positions_of(start: int, n: int, heads: int = 2) -> mx.array:
    return mx.broadcast_to(mx.arange(start, start + n, dtype=mx.int32), (1, heads, n))


def put(pool: Pool, start: int, n: int, held: mx.array, new: mx.array) -> None:
    """Into empty slots while all fit, then by score; as the cache does."""
    if pool.free >= n:
        pool.fill(tokens(start, n), positions_of(start, n))
    else:
        pool.write(pool.choose(tokens(start, n), positions_of(start, n), held, new))


def consistent(pool: Pool) -> None:
    """Each slot holds one token's own rows, no token is held twice, slots in use come first."""
    positions, offsets = np.array(pool.positions)[0], 1000 * np.arange(2)[:, None]
    assert pool.count <= pool.limit
    assert pool.capacity <= pool.limit
    assert (positions[:, : pool.count] >= 0).all()
    assert (positions[:, pool.count :] < 0).all()
    for row in positions:
        assert len(set(row.tolist())) == len(row)
    used = slice(0, pool.count)
    for rows in (np.array(pool.keys)[0, ..., 0], np.array(pool.values)[0, ..., 1], np.array(pool.memory)[0]):
        np.testing.assert_array_equal(rows[:, used], (positions + offsets)[:, used])


@at_leisure
@given(st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_pool_fills_then_overwrites(limit, lengths, random):
    """Against a list per head that keeps the best; scores are of the token and stay."""
    pool, start = Pool.like(tokens(0, 0), limit), 0
    scores = [[float(random.choice([-2, 0, 1, random.randint(-9, 9)])) for _ in range(sum(lengths))] for _ in range(2)]
    kept: list[list[int]] = [[], []]
    for n in lengths:
        table = mx.array(scores)[None]
        old = pool.positions[:, :, : pool.count].astype(mx.int32)
        held = mx.take_along_axis(table, old, axis=2)
        new = table[:, :, start : start + n]
        put(pool, start, n, held, new)
        for head in range(2):
            all_of_them = [*kept[head], *range(start, start + n)]
            kept[head] = sorted(all_of_them, key=lambda i: (scores[head][i], i))[-limit:]
        start += n
        consistent(pool)
        used = np.array(pool.positions)[0, :, : pool.count]
        assert [sorted(row) for row in used.tolist()] == [sorted(row) for row in kept]


def test_pool_doubles_up_to_its_limit_and_then_stays():
    pool, start, capacities = Pool.like(tokens(0, 0), 700), 0, []
    for _ in range(30):
        n = 32
        scores = mx.broadcast_to(mx.arange(start + n, dtype=mx.float32), (1, 2, start + n))
        held = pool.positions[:, :, : pool.count].astype(mx.float32)
        put(pool, start, n, held, scores[:, :, start:])
        start += n
        capacities.append(pool.capacity)
        consistent(pool)
    assert sorted(set(capacities)) == [256, 512, 700]
    assert pool.count == 700
    assert pool.nbytes == 2 * 700 * (4 * (3 + 2) + 4 + 4)


def test_pool_cleared_slots_are_filled_again():
    pool = Pool.like(tokens(0, 0), 20)
    pool.fill(tokens(0, 12), positions_of(0, 12))
    pool.clear(slice(5, 12))
    consistent(pool)
    pool.fill(tokens(5, 9), positions_of(5, 9))
    consistent(pool)
    assert np.array(pool.positions)[0, 0, :14].tolist() == list(range(14))


def test_ring_gives_its_oldest_and_keeps_the_rest():
    ring = tokens(0, 5)
    ring.append(*(getattr(tokens(5, 4), name) for name in ("keys", "values", "memory")))
    kept = copy.copy(ring)
    oldest = ring.oldest(3)
    ring.drop_oldest(3)
    assert (kept.count, oldest.count, ring.count) == (9, 3, 6)
    for part, start in ((oldest, 0), (ring, 3)):
        expected = tokens(start, part.count)
        for name in ("keys", "values", "memory"):
            assert mx.array_equal(getattr(part, name), getattr(expected, name))
    assert ring.nbytes == 2 * 6 * 4 * (3 + 2 + 1)


def test_a_copied_pool_does_not_follow():
    """MLX writes into array objects in place; a copy has objects of its own."""
    pool = Pool.like(tokens(0, 0), 20)
    pool.fill(tokens(0, 6), positions_of(0, 6))
    other = copy.deepcopy(pool)
    pool.clear(slice(2, 6))
    pool.fill(tokens(50, 3), positions_of(50, 3))
    assert np.array(other.positions)[0, 1, :6].tolist() == list(range(6))
    consistent(other)
