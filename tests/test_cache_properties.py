"""Bookkeeping of one bounded cache, for any sizes and any way to cut a text, with hypothesis."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import numpy as np
import pytest
import reference
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mlx_kvprune import CacheSettings, PrunedKVCache
from mlx_kvprune.storage import LayerShape, layer_nbytes

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 4, 0.7
POLICIES = ("window", "random", "knorm", "keydiff", "tova", "h2o", "snapkv", "rkv")
TRIMMABLE = ("window", "random", "knorm", "keydiff")
OPTIONS = {"snapkv": (("last", 1),), "rkv": (("last", 1),)}  # as many queries as the smallest window


@dataclass(frozen=True)
class Case:
    """A cache and the lengths of the chunks that it is given."""

    settings: CacheSettings
    slots: int
    chunks: tuple[int, ...]
    batch: int = 1

    @property
    def length(self) -> int:
        return sum(self.chunks)

    def cache(self, dense: bool = False) -> PrunedKVCache:
        return PrunedKVCache(self.settings, self.slots, dense=dense)


@st.composite
def cases(draw, policies=POLICIES, room=12):
    policy, window, block = draw(st.sampled_from(policies)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    n_sink = draw(st.integers(0, 3))
    settings = CacheSettings(policy, n_sink=n_sink, window=window, block=block, options=OPTIONS.get(policy, ()))
    slots = settings.smallest_budget + draw(st.integers(0, room))
    chunks = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13, 40]), min_size=1, max_size=8))
    return Case(settings, slots, tuple(chunks), draw(st.integers(1, 2)))


quickly = hypothesis_settings(deadline=None, max_examples=40)


def tensors(case: Case, length: int | None = None, seed: int = 0) -> list[mx.array]:
    """Random queries, keys and values ``(B, H, length, WIDTH)``."""
    rng, length = np.random.default_rng(seed), length or case.length
    shapes = [(case.batch, n, length, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return [mx.array(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def read(cache: PrunedKVCache, arrays: list[mx.array], chunks: tuple[int, ...]) -> np.ndarray:
    """The attention outputs of tokens read in chunks ``(B, H, L, WIDTH)``."""
    outs = []
    for start, length in zip(accumulate((0, *chunks)), chunks, strict=False):
        queries, keys, values = (x[:, :, start : start + length] for x in arrays)
        handle, values = cache.update_and_fetch(keys, values)
        outs.append(np.array(cache.attend(queries, handle, SCALE, "causal" if length > 1 else None)))
        cache.fetched = None  # as a model's hook does after its forward pass
    return np.concatenate(outs, axis=2)


def part(arrays: list[mx.array], start: int, stop: int | None = None) -> list[mx.array]:
    return [x[:, :, start:stop] for x in arrays]


def keeps_its_word(cache: PrunedKVCache, case: Case, seen: int) -> None:
    """What must hold after every forward call."""
    positions = reference.kept_positions(cache)
    assert cache.offset == seen
    assert cache.size() == positions.shape[2] <= min(case.slots, seen)
    must = {*range(min(case.settings.n_sink, seen)), *range(max(0, seen - case.settings.window), seen)}
    for row in positions.reshape(-1, positions.shape[2]):
        assert len(set(row)) == len(row)
        assert must <= set(row) <= set(range(seen))
    if cache.evicted:
        assert cache.size() > case.slots - case.settings.block
    elif seen <= case.slots - case.settings.block:
        assert cache.size() == seen, "nothing is dropped while there is room"


def bytes_are_right(cache: PrunedKVCache, case: Case) -> None:
    arrays = [*cache.held.arrays().values(), *cache.signals.values()]
    assert cache.nbytes == sum(x.size * x.itemsize for x in arrays)
    shape = LayerShape(HEADS, KV_HEADS, WIDTH, WIDTH, 4)
    state = case.batch * cache.scorer.state_nbytes(HEADS, WIDTH)
    bound = case.batch * layer_nbytes(shape, cache.settings, case.slots, cache.scorer.memory, 0) + state
    assert cache.nbytes <= bound
    assert cache.nbytes <= cache.nbytes_peak <= bound
    assert cache.nbytes_full == case.batch * KV_HEADS * 2 * WIDTH * 4 * cache.offset


@quickly
@given(cases())
def test_invariants_hold_after_every_call(case):
    cache, arrays, seen = case.cache(), tensors(case), 0
    assert cache.empty()
    assert (cache.size(), cache.nbytes, cache.offset) == (0, 0, 0)
    for length in case.chunks:
        out = read(cache, part(arrays, seen, seen + length), (length,))
        assert np.isfinite(out).all()
        seen += length
        keeps_its_word(cache, case, seen)
        bytes_are_right(cache, case)


@quickly
@given(cases())
def test_slots_carry_their_own_token(case):
    """The keys and values in a slot are those that came at its position."""
    cache, arrays = case.cache(), tensors(case)
    read(cache, arrays, case.chunks)
    held = cache.everything()
    index = held.positions[..., None]
    assert mx.array_equal(held.keys, mx.take_along_axis(arrays[1], index, axis=2))
    assert mx.array_equal(held.values, mx.take_along_axis(arrays[2], index, axis=2))


@quickly
@given(cases(), st.integers(1, 50))
def test_chunks_do_not_matter(case, step):
    """Against the same tokens in calls of ``step``: outputs and what is held."""
    one, other, arrays = case.cache(), case.cache(), tensors(case)
    steps = (*[step] * (case.length // step), case.length % step)
    outs = [read(one, arrays, case.chunks), read(other, arrays, tuple(n for n in steps if n))]
    np.testing.assert_array_equal(reference.kept_positions(one), reference.kept_positions(other))
    np.testing.assert_allclose(*outs, rtol=1e-4, atol=1e-5)


@quickly
@given(cases(), st.integers(1, 30))
def test_state_and_deepcopy_go_on_alike(case, more):
    cache, arrays = case.cache(), tensors(case, case.length + more)
    read(cache, part(arrays, 0, case.length), case.chunks)
    twins = [copy.deepcopy(cache), PrunedKVCache.from_state(copy.deepcopy(cache.state))]
    expected = read(cache, part(arrays, case.length), (more,))
    for twin in twins:
        assert (twin.offset, twin.settings, twin.slots) == (case.length, cache.settings, cache.slots)
        np.testing.assert_array_equal(read(twin, part(arrays, case.length), (more,)), expected)
        np.testing.assert_array_equal(reference.kept_positions(twin), reference.kept_positions(cache))
        assert twin.nbytes == cache.nbytes
        assert twin.evicted == cache.evicted


@quickly
@given(cases(room=60), st.sampled_from(["deepcopy", "state"]))
@example(Case(CacheSettings("window", window=2, block=2), 60, (20,)), "state")  # the pool is being filled in place
def test_copies_are_independent(case, way):
    """Two continuations from one point, taking turns: neither sees what the other reads."""
    cache, before = case.cache(), tensors(case)
    read(cache, before, case.chunks)
    twin = copy.deepcopy(cache) if way == "deepcopy" else PrunedKVCache.from_state(cache.state)
    texts = [tensors(case, 25, seed) for seed in (1, 2)]
    outs = [
        [read(c, part(text, *span), (span[1] - span[0],)) for c, text in zip((cache, twin), texts, strict=True)]
        for span in ((0, 3), (3, 4), (4, 25))
    ]
    for i, c in enumerate((cache, twin)):
        alone = case.cache()
        read(alone, before, case.chunks)
        expected = read(alone, texts[i], (3, 1, 21))
        np.testing.assert_allclose(np.concatenate([x[i] for x in outs], axis=2), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(reference.kept_positions(c), reference.kept_positions(alone))
        np.testing.assert_array_equal(c.everything().keys, alone.everything().keys)


@quickly
@given(cases(TRIMMABLE), st.integers(0, 60), st.integers(1, 40))
def test_trim_is_exact_or_refused(case, n, more):
    """After a trim, a cache is one that never saw the newest tokens; once something was evicted it refuses."""
    cache, arrays = case.cache(), tensors(case)
    read(cache, arrays, case.chunks)
    evicted = cache.evicted
    assert cache.is_trimmable() == (not evicted)
    if not cache.can_rewind(min(n, case.length)):
        assert evicted
        with pytest.raises(ValueError, match=r"\[trim\]"):
            cache.trim(n)
        return
    gone = cache.trim(n)
    assert gone == min(n, case.length)
    left = case.length - gone
    fresh, after = case.cache(), tensors(case, more, seed=1)
    if left:
        read(fresh, part(arrays, 0, left), (left,))
        assert cache.offset == fresh.offset
        if not evicted:
            np.testing.assert_array_equal(reference.kept_positions(cache), reference.kept_positions(fresh))
            assert cache.size() == fresh.size()
    out, expected = read(cache, after, (more,)), read(fresh, after, (more,))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(reference.kept_positions(cache), reference.kept_positions(fresh))
    keeps_its_word(cache, case, left + more)


@pytest.mark.parametrize("policy", ["tova", "h2o", "snapkv", "rkv"])
def test_trim_is_refused_when_a_signal_saw_the_queries(policy):
    case = Case(CacheSettings(policy, window=4, block=2, n_sink=0, options=OPTIONS.get(policy, ())), 20, (3,))
    cache = case.cache()
    read(cache, tensors(case), case.chunks)
    assert not cache.is_trimmable()
    with pytest.raises(ValueError, match=policy):
        cache.trim(1)


@quickly
@given(cases(TRIMMABLE))
def test_dense_returns_what_the_handle_attends_to(case):
    """For models with their own attention: arrays of what is held and the new tokens, oldest first where it matters."""
    dense, other, arrays, seen = case.cache(dense=True), case.cache(), tensors(case), 0
    while seen < case.length:
        step = min(case.length - seen, dense.step_room())
        queries, new_keys, new_values = part(arrays, seen, seen + step)
        mask = dense.make_mask(step, return_array=True)
        keys, values = dense.update_and_fetch(new_keys, new_values)
        assert mx.array_equal(keys[:, :, -step:], new_keys)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask=mask)
        expected = read(other, [queries, new_keys, new_values], (step,))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        seen += step
        keeps_its_word(dense, case, seen)
        np.testing.assert_array_equal(reference.kept_positions(dense), reference.kept_positions(other))


@quickly
@given(cases())
def test_mask_of_a_dense_model_fits_what_will_be_held(case):
    cache, arrays, seen = case.cache(), tensors(case), 0
    for length in case.chunks:
        step = min(length, cache.step_room())
        mask = cache.make_mask(2, return_array=True)
        held = mask.shape[-1] - 2
        twin = copy.deepcopy(cache)
        handle, _ = twin.update_and_fetch(*part(arrays, seen, seen + 1)[1:])
        _, view = next(iter(twin.write_blocks(handle)))
        assert sum(part.keys.parts[0].shape[2] for part in view.parts) == held + 1
        read(cache, part(arrays, seen, seen + step), (step,))
        seen += step


@quickly
@given(cases())
def test_unbounded_holds_everything(case):
    """No budget: nothing is evicted, and the output is plain attention."""
    cache, arrays = PrunedKVCache(case.settings, None), tensors(case)
    out = read(cache, arrays, case.chunks)
    assert not cache.evicted
    assert cache.size() == case.length
    expected = mx.fast.scaled_dot_product_attention(*arrays, scale=SCALE, mask="causal")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@quickly
@given(cases())
def test_a_budget_below_the_smallest_is_refused(case):
    assume(case.slots >= case.settings.smallest_budget)
    with pytest.raises(ValueError, match=rf"\[budget\].* try {case.settings.smallest_budget} "):
        PrunedKVCache(case.settings, case.settings.smallest_budget - 1)
