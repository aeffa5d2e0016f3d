"""Choosing slots by the kernel: the emulator's checks, and the reference's choice, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_texts import texts_of
from metal_emulator import Emulator, address_space_errors, mlx_text, unavailable
from metal_emulator.address_spaces import address_spaces_unavailable
from metal_emulator.cuda import compile_cuda, cuda_text, cuda_unavailable

from mlx_kvprune.kernels import launch
from mlx_kvprune.kernels.choose_slots import MOST_TOKENS, can_run, choose_slots, reference
from mlx_kvprune.slots.choose import Exchange, order_key

needs_emulator = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
SCHEDULES = ("forward", "reverse", "random")
SMALL = [(8, 1), (1, 1), (1, 8), (9, 7), (5, 40), (31, 33), (64, 64), (257, 33)]  # P, n
LARGE = [(4096, 256), (16384, 64), (1000, 512), (100, 511)]
ODD = [0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, 3.4e38, -3.4e38, 1.0, -1.0, np.float32(1.0000001)]
FIELDS = ("slots", "leaving", "replace", "beaten")

Case = tuple[mx.array, mx.array, mx.array, mx.array]


def case_of(seed: int, lead: tuple[int, ...], P: int, n: int, levels: int = 0, empty: float = 0.2) -> Case:
    """Scores and positions of slots and of tokens; with ``levels`` scores tie often, by positions they never do.

    Some scores of what is held are then minus infinity, as those of empty slots are. Empty slots carry negative
    positions that rise with the slot, as those of a pool.
    """
    rng = np.random.default_rng(seed)
    shape = (*lead, P + n)
    positions = rng.permuted(np.broadcast_to(np.arange(P + n, dtype=np.int32), shape), axis=-1)
    scores = rng.normal(size=shape).astype(np.float32)
    if levels:
        scores = np.where(scores < -1, np.float32(-np.inf), np.round(scores * levels) / levels)
    gone = np.arange(P + n) < P
    gone = gone & (rng.random(shape) < empty)
    positions = np.where(gone, np.arange(P + n, dtype=np.int32) - (P + n), positions)
    scores = np.where(gone, np.float32(-np.inf), scores)
    return tuple(mx.array(x) for x in (scores[..., :P], positions[..., :P], scores[..., P:], positions[..., P:]))


def chosen(emulator: Emulator, case: Case) -> Exchange:
    """The kernel's choice, in one launch."""
    before = emulator.n_launches
    with launch.stand_in(emulator.metal_kernel):
        pairs = choose_slots(*case, force=True)
    assert emulator.n_launches == before + 1
    return pairs


def same(got: Exchange, want: Exchange) -> bool:
    pairs = [(getattr(got, name), getattr(want, name)) for name in FIELDS]
    return all(a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b) for a, b in pairs)


# ---- what it computes


@needs_emulator
@pytest.mark.parametrize(("P", "n"), SMALL)
def test_small_shapes_in_check_mode(P, n):
    for lead, levels in (((1, 1), 0), ((2, 3), 2)):
        case = case_of(P + n, lead, P, n, levels)
        emulator = Emulator("check", "random", seed=P)
        assert same(chosen(emulator, case), reference(*case))


@needs_emulator
@pytest.mark.parametrize(("P", "n"), LARGE)
def test_the_schedule_does_not_matter(P, n):
    case = case_of(P, (1, 2), P, n, levels=16)
    want = reference(*case)
    for schedule in SCHEDULES:
        assert same(chosen(Emulator("fast", schedule, seed=1), case), want)


@needs_emulator
def test_a_large_pool():
    case = case_of(0, (1, 1), 131072, MOST_TOKENS)
    emulator = Emulator()
    assert same(chosen(emulator, case), reference(*case))


@needs_emulator
@given(
    lead=st.sampled_from(((1, 1), (1, 3), (2, 2))),
    P=st.integers(1, 300),
    n=st.sampled_from((1, 8, 33, 40, 64)),
    levels=st.sampled_from((0, 1, 4)),
    empty=st.sampled_from((0.0, 0.3, 1.0)),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=80)
def test_any_scores(lead, P, n, levels, empty, seed):
    case = case_of(seed, lead, P, n, levels, empty)
    got = chosen(Emulator(), case)
    assert same(got, reference(*case))
    keeps_the_best(got, case)


def keeps_the_best(pairs: Exchange, case: Case) -> None:
    """After the exchange the pool holds the P greatest keys of the union, and every token is named once."""
    pool, new = (np.array(order_key(*x)) for x in (case[:2], case[2:]))
    slots, leaving, replace, beaten = (np.array(getattr(pairs, name)) for name in FIELDS)
    best = np.sort(np.concatenate([pool, new], axis=-1), axis=-1)[..., new.shape[-1] :]
    after = np.where(replace, np.take_along_axis(new, leaving, -1), np.take_along_axis(pool, slots, -1))
    np.put_along_axis(pool, slots.astype(int), after, axis=-1)
    assert np.array_equal(np.sort(pool, axis=-1), best)
    named = np.sort(np.concatenate([leaving, beaten], axis=-1), axis=-1)
    assert np.array_equal(named, np.broadcast_to(np.arange(new.shape[-1]), named.shape))


@needs_emulator
@given(st.lists(st.sampled_from(ODD), min_size=20, max_size=60), st.integers(0, 2**20))
@settings(deadline=None, max_examples=40)
def test_odd_scores(scores, seed):
    n = 8
    positions = np.random.default_rng(seed).permutation(len(scores)).astype(np.int32)
    x, y = (mx.array(np.array(z))[None, None] for z in (np.array(scores, np.float32), positions))
    case = (x[..., n:], y[..., n:], x[..., :n], y[..., :n])
    assert same(chosen(Emulator(), case), reference(*case))


@needs_emulator
@pytest.mark.parametrize("held", [0, 3, 60])
def test_slots_that_are_empty_alike(held):
    P, n = 70, 33
    rng = np.random.default_rng(held)
    at = np.sort(rng.permutation(P)[:held])
    scores, positions = np.full((1, 1, P), -np.inf, np.float32), np.full((1, 1, P), -1, np.int32)
    scores[..., at], positions[..., at] = rng.normal(size=held), at
    tokens = mx.array(rng.normal(size=(1, 1, n)).astype(np.float32)), mx.arange(P, P + n, dtype=mx.int32)[None, None]
    case = (mx.array(scores), mx.array(positions), *tokens)
    pairs = chosen(Emulator(), case)
    keeps_the_best(pairs, case)
    slots = np.array(pairs.slots)[0, 0]
    empty = np.setdiff1d(np.arange(P), at)[:n]
    assert np.array_equal(slots[: len(empty)], empty)
    assert len(set(slots.tolist())) == n


@needs_emulator
def test_tokens_alike_keep_their_order():
    case = (*case_of(3, (1, 1), 20, 1)[:2], mx.full((1, 1, 9), -mx.inf), mx.full((1, 1, 9), -1, mx.int32))
    got = chosen(Emulator(), case)
    assert np.array(got.leaving)[0, 0].tolist() == list(range(9))


@needs_emulator
def test_other_types_and_strides():
    scores, positions, new, new_positions = case_of(5, (2, 3), 64, 33, levels=4)
    half = scores.astype(mx.float16), positions, new.astype(mx.float16), new_positions
    assert same(chosen(Emulator("check"), half), reference(*half))
    cut = scores[..., 3:40], positions[..., 3:40], new[..., ::2], new_positions[..., ::2]
    assert same(chosen(Emulator("check"), cut), reference(*cut))


@needs_emulator
def test_threadgroup_memory():
    emulator = Emulator("check")
    case = case_of(6, (1, 1), 600, MOST_TOKENS, levels=4)
    assert same(chosen(emulator, case), reference(*case))
    assert emulator.last is not None and emulator.last.threadgroup_nbytes <= 32 * 1024


# ---- who runs


def test_without_gpu_the_reference_runs():
    case = case_of(1, (1, 2), 20, 5)
    assert can_run(*case) == "no GPU: MLX runs on the CPU"
    assert same(choose_slots(*case), reference(*case))
    with pytest.raises(ValueError, match=r"\[kernels\] choose_slots cannot run: no GPU"):
        choose_slots(*case, force=True)


def test_reasons():
    refuse = lambda **_: pytest.fail("it was launched")
    case = case_of(1, (1, 1), 20, MOST_TOKENS + 1)
    with launch.stand_in(refuse):
        assert can_run(*case) == f"{MOST_TOKENS + 1} tokens at once, more than {MOST_TOKENS}"
        assert same(choose_slots(*case), reference(*case))
        with pytest.raises(ValueError, match="more than"):
            choose_slots(*case, force=True)
        assert can_run(*case_of(1, (1, 1), 20, 0)) == "no slots or no tokens"


# ---- what other compilers say


def texts() -> list:
    return texts_of(lambda: choose_slots(*case_of(1, (1, 2), 20, 9), force=True))


@pytest.mark.skipif(bool(address_spaces_unavailable()), reason=address_spaces_unavailable())
def test_address_spaces():
    assert address_space_errors(mlx_text(*texts()[0])) == []


@pytest.mark.skipif(bool(cuda_unavailable()), reason=cuda_unavailable())
def test_compiles_for_cuda():
    assert compile_cuda(*cuda_text(*texts()[0]))
