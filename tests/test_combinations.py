"""Everything at once: policy x allocator x bits x scheme x two precisions x positions, against plain attention.

The reference is plain softmax attention in NumPy float64 over what the cache says it holds, decoded. What it says it holds
is compared with the tokens that were given, within what the bits allow.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import accumulate, product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_kvprune import PrunedKVCache
from mlx_kvprune.settings import CacheSettings
from mlx_kvprune.storage import LayerShape, layer_nbytes

HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 32, 420
SCALE = WIDTH**-0.5
STORES = {
    "as they are": {},
    "8 bits": {"kv_bits": 8, "kv_group_size": 32, "kv_scheme": "token"},
    "keys 8, values 4": {"kv_key_bits": 8, "kv_value_bits": 4, "kv_group_size": 32},
    "channel 4": {"kv_bits": 4, "kv_scheme": "channel", "kv_group_size": 32},
    "pages 4": {"kv_bits": 4, "kv_scheme": "page", "kv_group_size": 32},
    "hadamard 3": {"kv_bits": 3, "kv_hadamard": True, "kv_group_size": 32},
    "values alone": {"kv_value_bits": 4, "kv_group_size": 32},
    "two precisions": {"kv_bits": 4, "kv_fine_tokens": 32, "kv_fine_bits": 8, "kv_group_size": 32},
    "best as they are": {"kv_bits": 2, "kv_fine_tokens": 32, "kv_group_size": 32},
}
ALLOCATORS = ("uniform", "pyramid", "head_adaptive", "global")
POLICIES = ("window", "random", "knorm", "keydiff", "h2o", "tova", "snapkv", "rkv", "expected_attention")
OPTIONS = {"snapkv": (("last", 8),), "expected_attention": (("future", 16),)}


@dataclass(frozen=True)
class Case:
    policy: str
    allocator: str
    store: str
    positions: str = "text"
    slots: int = 160

    def cache(self) -> PrunedKVCache:
        more = dict(STORES[self.store])
        options = OPTIONS.get(self.policy, ())
        settings = CacheSettings(
            self.policy, self.allocator, None, window=16, block=32, positions=self.positions, options=options, **more
        )
        cache = PrunedKVCache(settings, self.slots)
        cache.rope = nn.RoPE(WIDTH)
        return cache


def tensors(length: int, batch: int = 1, seed: int = 0) -> list[mx.array]:
    """Queries, keys and values ``(B, H, length, WIDTH)``, before rotation; some channels of the keys are far off zero."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(batch, h, length, WIDTH)) for h in (HEADS, KV_HEADS, KV_HEADS))
    k[..., 3] += 5
    k[:, 1] *= 0.5
    return [mx.array(x.astype(np.float32)) for x in (q, k, v)]


def read(cache: PrunedKVCache, arrays: list[mx.array], chunks: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per chunk the output and what plain attention over what is held gives for its last token."""
    outs = []
    for start, length in zip(accumulate((0, *chunks)), chunks, strict=False):
        queries, keys, values = (x[:, :, start : start + length] for x in arrays)
        queries, keys = (cache.rope(mx.array(x), offset=cache.offset) for x in (queries, keys))
        newest = cache.offset + length - 1
        handle, values = cache.update_and_fetch(keys, values)
        out = np.array(cache.attend(queries, handle, SCALE, "causal" if length > 1 else None))
        cache.fetched = None
        outs.append((out[:, :, -1], plain_attention(cache, queries[:, :, -1], newest)))
    return outs


def plain_attention(cache: PrunedKVCache, queries: mx.array, newest: int) -> np.ndarray:
    held = cache.everything(newest)
    keys, values, live = (np.array(x, np.float64) for x in (held.keys, held.values, held.live))
    grouped = np.array(queries, np.float64).reshape(queries.shape[0], KV_HEADS, -1, WIDTH)
    logits = np.einsum("bhgd,bhsd->bhgs", grouped, keys) * SCALE
    logits = np.where(live[:, :, None].astype(bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhgs,bhsd->bhgd", weights, values).reshape(queries.shape)


def every_case() -> list[Case]:
    """Each policy with each allocator, each store with each allocator and both kinds of positions; not all with all."""
    cases = [Case(p, a, s) for p, a, s in product(POLICIES, ALLOCATORS, ("as they are", "channel 4"))]
    cases += [Case("knorm", a, s, w) for a, s, w in product(ALLOCATORS, STORES, ("text", "cache"))]
    cases += [Case(p, "head_adaptive", "two precisions", "cache") for p in POLICIES]
    return sorted(set(cases), key=str)


@pytest.mark.parametrize("case", every_case(), ids=lambda c: f"{c.policy}-{c.allocator}-{c.store}-{c.positions}")
def test_attends_to_what_it_holds_within_its_bytes(case: Case):
    cache, arrays = case.cache(), tensors(LENGTH)
    shape = LayerShape(HEADS, KV_HEADS, WIDTH, WIDTH, 4)
    bound = layer_nbytes(
        shape, cache.settings, case.slots, cache.scorer.memory, cache.scorer.state_nbytes(HEADS, WIDTH)
    )
    seen = 0
    for length in (1, 30, 70, 100, 1, 1, 200, *[1] * 17):
        [(out, expected)] = read(cache, [x[:, :, seen : seen + length] for x in arrays], (length,))
        if length == 1 or case.store == "as they are":  # else tokens were quantized after they were attended to
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        seen += length
        assert cache.nbytes <= cache.nbytes_peak <= bound
        assert cache.held.held() <= KV_HEADS * case.slots
        holds_its_word(cache, seen)
    assert cache.evicted
    if case.allocator == "uniform":
        assert cache.size() > case.slots - 32


def holds_its_word(cache: PrunedKVCache, seen: int) -> None:
    """Sinks and window are there, nothing twice, nothing from elsewhere."""
    settings = cache.settings
    must = {*range(min(settings.n_sink, seen)), *range(max(0, seen - (settings.window or 0)), seen)}
    for row in np.array(cache.held.positions()).reshape(KV_HEADS, -1):
        held = row[row >= 0].tolist()
        assert len(set(held)) == len(held)
        assert must <= set(held) <= set(range(seen))


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("store", STORES)
def test_slots_carry_their_own_token(allocator: str, store: str):
    """Within two steps of the coarsest quantizer; exactly where nothing is quantized."""
    cache, arrays = Case("random", allocator, store).cache(), tensors(LENGTH)
    read(cache, arrays, (LENGTH,))
    held = cache.everything()
    index = mx.maximum(held.positions, 0)[..., None]
    turned = cache.rope(mx.array(arrays[1]), offset=0)
    settings = cache.settings
    for rows, given, bits in ((held.keys, turned, settings.key_bits), (held.values, arrays[2], settings.value_bits)):
        error = mx.abs(rows - mx.take_along_axis(given, index, axis=2)) * held.live[..., None]
        span = (given.max() - given.min()).item()
        assert error.max().item() <= (0 if bits is None else 2 * span / (2**bits - 1))


@pytest.mark.parametrize("case", every_case()[::3], ids=lambda c: f"{c.policy}-{c.allocator}-{c.store}-{c.positions}")
def test_calls_do_not_matter(case: Case):
    """The same tokens in other calls: the same is held, and the same comes out."""
    if case.allocator == "global":
        pytest.skip("heads of all layers compete in the model's hook: tests/test_allocators.py")
    one, other, arrays = case.cache(), case.cache(), tensors(LENGTH)
    a = read(one, arrays, (LENGTH - 3, 3))
    b = read(other, arrays, (*[50] * 8, 17, 3))
    np.testing.assert_array_equal(np.sort(one.held.positions(), axis=2), np.sort(other.held.positions(), axis=2))
    np.testing.assert_allclose(a[-1][0], b[-1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", every_case()[1::3], ids=lambda c: f"{c.policy}-{c.allocator}-{c.store}-{c.positions}")
def test_state_and_copies_go_on_alike(case: Case):
    cache, arrays, more = case.cache(), tensors(LENGTH), tensors(40, seed=1)
    read(cache, arrays, (LENGTH,))
    twins = [copy.deepcopy(cache), PrunedKVCache.from_state(cache.state)]
    twins[1].rope = cache.rope
    expected = read(cache, more, (1, 39))
    for twin in twins:
        outs = read(twin, more, (1, 39))
        np.testing.assert_array_equal(outs[-1][0], expected[-1][0])
        np.testing.assert_array_equal(twin.held.positions(), cache.held.positions())
        assert twin.nbytes == cache.nbytes


@pytest.mark.parametrize("store", ["as they are", "channel 4"])
@pytest.mark.parametrize("allocator", ["uniform", "head_adaptive"])
@pytest.mark.parametrize("policy", ["knorm", "tova"])
def test_batches_of_equal_length(policy: str, store: str, allocator: str):
    """Rows of a batch neither see each other nor compete with each other."""
    arrays, chunks = tensors(LENGTH, batch=2), (LENGTH - 9, *[1] * 9)
    arrays[1] = (
        arrays[1] * mx.array([1.0, 3.0])[:, None, None, None]
    )  # keys of the second row are larger than all others
    together = read(Case(policy, allocator, store).cache(), arrays, chunks)[-1][0]
    for row in range(2):
        alone = read(Case(policy, allocator, store).cache(), [x[row : row + 1] for x in arrays], chunks)[-1][0]
        np.testing.assert_allclose(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
