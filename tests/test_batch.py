"""Requests in one batch: each gives what it gives alone, whoever is beside it, comes or goes."""

from __future__ import annotations

import copy
import gc
import importlib
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import tiny_models as zoo
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache, LRUPromptCache, make_prompt_cache
from test_cache_properties import SCALE, Case, cases, part, read, tensors

import mlx_kvprune as kvp
from mlx_kvprune import CacheSettings, PrunedKVCache
from mlx_kvprune.batch import BatchPrunedKVCache
from mlx_kvprune.forward import pruned, settle

POLICIES = ("window", "knorm", "h2o", "snapkv", "keydiff", "tova", "rkv", "expected_attention")
SMALL = {"budget": 60, "window": 8, "block": 8, "quiet": True}
LENGTHS = (5, 150, 33, 71, 1, 64)
WRONG_IN_STOCK = ("afm7", "jamba", "nemotron_h", "olmo_hybrid", "gpt_bigcode", "llama4", "baichuan_m1")


@cache
def model_of(name: str) -> nn.Module:
    return zoo.tiny_model(name)


@pytest.fixture(autouse=True)
def _detached():
    yield
    for name in ("llama", "gemma3_text", "gpt_oss", "gemma3n", "gemma4_text", "falcon_h1", *WRONG_IN_STOCK):
        kvp.detach(model_of(name))


# -- through mlx-lm's BatchGenerator ---------------------------------------------------------------------------------


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, zoo.VOCAB, n).tolist() for n in lengths]


Told = list[tuple[int, np.ndarray]]  # token, log-probabilities of the vocabulary


def alone(model: nn.Module, prompt: list[int], n: int, caches: list | None = None) -> Told:
    caches = model.make_cache() if caches is None else caches
    steps = generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=caches)
    return [(int(token), np.array(logprobs)) for token, logprobs in steps]


class Generator:
    """mlx-lm's, with what it told by request."""

    def __init__(self, model: nn.Module, step: int = 48, **options):
        self.told: dict[int, Told] = {}
        self.caches: dict[int, list] = {}
        self.generator = BatchGenerator(model, prefill_step_size=step, **options)

    def insert(self, texts: list[list[int]], max_tokens: list[int] | int = 20, **more) -> list[int]:
        most = [max_tokens] * len(texts) if isinstance(max_tokens, int) else max_tokens
        return self.generator.insert(texts, most, **more)

    def step(self) -> bool:
        asked, generated = self.generator.next()
        for r in generated:
            self.told.setdefault(r.uid, []).append((r.token, np.array(r.logprobs)))
            if r.finish_reason:
                self.caches[r.uid] = r.prompt_cache
        return bool(asked or generated)

    def finish(self) -> dict[int, Told]:
        while self.step():
            pass
        self.generator.close()
        return self.told


def same(told: Told, expected: Told) -> None:
    assert [token for token, _ in told] == [token for token, _ in expected]
    worst = max(np.abs(one - other).max() for (_, one), (_, other) in zip(told, expected, strict=True))
    assert worst < 1e-4, f"difference {worst:.1e}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_each_gives_what_it_gives_alone(name, policy):
    """Ragged prompts, and answers of different lengths: rows leave one after the other."""
    model, texts = model_of(name), prompts()
    kvp.attach(model, policy, **SMALL)
    lengths = [20, 3, 45, 30, 1, 12]
    generator = Generator(model)
    uids = generator.insert(texts, lengths)
    told = generator.finish()
    for uid, text, n in zip(uids, texts, lengths, strict=True):
        same(told[uid], alone(model, text, n))
    assert any(c.evicted for c in pruned(generator.caches[uids[1]]))


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_text", "falcon_h1"])
def test_layers_that_share_keys_and_lists_of_caches(name):
    model, texts = model_of(name), prompts()
    kvp.attach(model, "h2o", **SMALL)
    generator = Generator(model)
    uids = generator.insert(texts, 12)
    told = generator.finish()
    for uid, text in zip(uids, texts, strict=True):
        same(told[uid], alone(model, text, 12))


@pytest.mark.parametrize("policy", ["window", "snapkv", "tova"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_requests_come_while_others_run(name, policy):
    model, texts = model_of(name), prompts((90, 7, 130, 40, 66, 21), seed=3)
    kvp.attach(model, policy, **SMALL)
    generator, uids = Generator(model, completion_batch_size=4, prefill_batch_size=2), []
    for text in texts:
        uids += generator.insert([text], 25)
        for _ in range(4):
            generator.step()
    told = generator.finish()
    for uid, text in zip(uids, texts, strict=True):
        same(told[uid], alone(model, text, 25))


@pytest.mark.parametrize("policy", ["knorm", "h2o"])
def test_a_request_that_is_removed_leaves_the_others_alone(policy):
    model, texts = model_of("llama"), prompts((80, 30, 120))
    kvp.attach(model, policy, **SMALL)
    generator = Generator(model)
    uids = generator.insert(texts, 40)
    for _ in range(15):
        generator.step()
    generator.generator.remove([uids[0]])
    told = generator.finish()
    for uid, text in list(zip(uids, texts, strict=True))[1:]:
        same(told[uid], alone(model, text, 40))


@pytest.mark.parametrize("policy", ["window", "snapkv", "expected_attention"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_histories_go_on_in_a_batch_and_stay_as_they_were(name, policy):
    """Second turns on caches of first turns; the caches that were handed in can be used again."""
    model, first, second = model_of(name), prompts((70, 12, 140)), prompts((20, 45, 3), seed=1)
    kvp.attach(model, policy, **SMALL)
    generator = Generator(model)
    uids = generator.insert(first, 15)
    before = generator.finish()
    histories = [generator.caches[uid] for uid in uids]
    for _ in range(2):
        again = Generator(model)
        more = again.insert(second, 15, caches=histories)
        told = again.finish()
        for i, uid in enumerate(more):
            text = [*first[i], *(token for token, _ in before[uids[i]]), *second[i]]
            same(told[uid], alone(model, text, 15))


class Served:
    """What mlx-lm's server does: requests in segments, whose ends are stored; a later request fetches the nearest."""

    def __init__(self, model: nn.Module):
        self.model, self.store, self.cached = model, LRUPromptCache(10), []

    def ask(self, texts: list[list[int]], n: int) -> list[Told]:
        generator = BatchGenerator(self.model, prefill_step_size=48)
        fetched = [self.store.fetch_nearest_cache("m", text) for text in texts]
        self.cached = [len(text) - len(rest) for text, (_, rest) in zip(texts, fetched, strict=True)]
        segments = [[rest[: len(rest) // 2], rest[len(rest) // 2 :]] for _, rest in fetched]
        read = [text[:n] for text, n in zip(texts, self.cached, strict=True)]
        uids = generator.insert_segments(segments, [n] * len(texts), [found for found, _ in fetched], read)
        told: dict[int, Told] = {uid: [] for uid in uids}
        while any(len(one) < n for one in told.values()):
            asked, generated = generator.next()
            ends = [r.uid for r in asked if r.end_of_segment and not r.end_of_prompt]
            for found, key in generator.extract_cache(ends).values():
                self.store.insert_cache("m", key[:], found, cache_type="user")
            for r in generated:
                told[r.uid].append((r.token, np.array(r.logprobs)))
                if r.finish_reason:
                    self.store.insert_cache("m", r.all_tokens[:], r.prompt_cache)
        generator.close()
        return list(told.values())


@pytest.mark.parametrize("policy", ["window", "snapkv"])
@pytest.mark.parametrize("budget", [60, 1000])
def test_the_servers_store_of_prompts(policy, budget):
    """The same requests three times, then each with a second turn: stored caches give what no cache gives."""
    model, texts = model_of("llama"), prompts((30, 90, 6, 55))
    kvp.attach(model, policy, **SMALL | {"budget": budget})
    served = Served(model)
    for i in range(3):
        for text, told in zip(texts, served.ask(texts, 20), strict=True):
            same(told, alone(model, text, 20))
        assert all(served.cached) == (i > 0)
    turns = [
        [*text, *(t for t, _ in alone(model, text, 20)), *more] for text, more in zip(texts, texts[::-1], strict=True)
    ]
    for text, told in zip(turns, served.ask(turns, 20), strict=True):
        same(told, alone(model, text, 20))
    assert all(n >= len(text) + 19 for n, text in zip(served.cached, texts, strict=True))


def test_memory_returns_to_where_it_was():
    model, texts = model_of("llama"), prompts((400, 30, 250))
    kvp.attach(model, "h2o", **SMALL)

    def one_round() -> int:
        generator = Generator(model, step=512)
        uids = generator.insert(texts, 30)
        generator.finish()
        kept = generator.caches[uids[1]]
        del generator
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory() - sum(c.nbytes for c in kept)

    one_round()
    assert abs(one_round() - one_round()) < 8192


def test_a_row_keeps_nothing_of_the_batch_alive():
    """An extracted cache holds its own bytes, not the batch's keys of which its own are a part."""
    model = model_of("llama")
    kvp.attach(model, "window", **SMALL)
    generator = Generator(model)
    uids = generator.insert(prompts((600,) * 8), 2)
    generator.finish()
    kept = generator.caches[uids[0]]
    del generator
    gc.collect()
    mx.clear_cache()
    before, held = mx.get_active_memory(), sum(c.nbytes for c in kept)
    del kept
    gc.collect()
    assert before - mx.get_active_memory() < held + 65536


def test_batch_generate():
    generate = importlib.import_module("mlx_lm.generate")
    model, texts = model_of("llama"), prompts()
    kvp.attach(model, "snapkv", **SMALL)
    tokenizer = SimpleNamespace(eos_token_ids=set(), decode=str)
    answer = generate.batch_generate(model, tokenizer, texts, max_tokens=20, return_token_ids=True)
    assert answer.token_ids == [[token for token, _ in alone(model, text, 20)] for text in texts]


def test_batch_generate_says_why_not():
    generate = importlib.import_module("mlx_lm.generate")
    model = model_of("llama")
    for policy, more in (("surprise", {}), ("probe", {"question": (3, 4)})):
        kvp.attach(model, policy, **SMALL | {"budget": 300} | more)
        with pytest.raises(ValueError, match=rf"\[batch\] policy '{policy}' needs the .*; got batch_generate; try one"):
            generate.batch_generate(model, None, prompts())


@pytest.mark.parametrize("name", WRONG_IN_STOCK)
def test_models_that_mlx_lm_batches_wrongly_are_not_batched(name):
    model = model_of(name)
    rung = kvp.attach(model, "window", **SMALL).rung
    assert rung.unbatched
    assert not all(hasattr(c, "merge") for c in make_prompt_cache(model))


def test_a_list_of_caches_says_whether_it_can_be_batched():
    model = model_of("falcon_h1")
    for policy, can in (("window", True), ("surprise", False)):
        kvp.attach(model, policy, **SMALL)
        assert [hasattr(c, "merge") for c in model.make_cache()] == [can] * 2
        assert {type(c).__name__ for c in copy.deepcopy(model.make_cache())} == {"CacheList"}


def test_upkeep_is_chosen_ahead_for_the_rows_that_are_full():
    model = model_of("llama")
    kvp.attach(model, "knorm", **SMALL)
    singles = [model.make_cache() for _ in range(3)]
    for caches, n in zip(singles, (60, 63, 16), strict=True):
        model(mx.array(prompts((n,))), cache=caches)
    batch = [one.merge([one, *others]) for one, *others in zip(*singles, strict=True)]
    full = [c.held.evicts_next() for c in batch[0].caches]
    assert full == [True, False, False]
    settle(pruned(batch))
    assert [[c.planned is not None for c in layer.caches] for layer in batch] == [full] * 2


def test_bytes_and_report_of_a_batch():
    """A budget in bytes is each sequence's own, and the report sums up."""
    model, texts = model_of("llama"), prompts((300, 200))
    kvp.attach(model, "snapkv", "300KB", quiet=True, window=16)
    generator = Generator(model)
    uids = generator.insert(texts, 30)
    for _ in range(20):
        generator.step()
        batch = generator.generator._generation_batch.prompt_cache or generator.generator._prompt_batch.prompt_cache
        for row in range(len(batch[0].caches)):
            assert sum(layer.caches[row].nbytes for layer in batch) <= 300_000
    told = kvp.report(batch)
    assert len(batch[0].caches) == 2
    assert told.kv_bytes == sum(c.nbytes for c in batch) > 500_000
    assert told.layers == 2
    assert told.tokens_seen == max(c.offset.max().item() for c in batch) > 300
    generator.finish()
    for uid in uids:
        assert kvp.report(generator.caches[uid]).kv_bytes_peak <= 300_000


# -- one layer's batch -----------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A row's twin that stands alone, and the text that both read."""

    alone: PrunedKVCache
    arrays: list[mx.array]
    seen: int = 0

    def take(self, n: int) -> list[mx.array]:
        self.seen += n
        return part(self.arrays, self.seen - n, self.seen)


def request(case: Case, seed: int, seen: int) -> Request:
    new = Request(case.cache(), tensors(case, 400, seed))
    if seen:
        read(new.alone, new.take(seen), (seen,))
    return new


def batch_of(requests: list[Request]) -> BatchPrunedKVCache:
    return requests[0].alone.merge([r.alone for r in requests])


def attended(batch: BatchPrunedKVCache, arrays: list[mx.array], mask="causal") -> mx.array:
    """One forward pass of the layer over ``(B, H, L, D)``."""
    queries, keys, values = arrays
    handle, _ = batch.update_and_fetch(keys, values)
    out = batch.attend(queries, handle, SCALE, mask if queries.shape[2] > 1 else None)
    for one in batch.caches:
        one.fetched = None  # as a model's hook does after its forward pass
    return out


def padded(arrays: list[mx.array], before: int, after: int) -> list[mx.array]:
    """Padding that would be seen wherever it got to."""
    return [mx.pad(x, [(0, 0), (0, 0), (before, after), (0, 0)], constant_values=mx.array(mx.nan)) for x in arrays]


def feed(batch: BatchPrunedKVCache, requests: list[Request], lengths: list[int], step: int, left: bool = False) -> None:
    """Read ``lengths`` tokens, padded to one width, in calls of ``step``; check every row against its twin."""
    width, rows = max(lengths), [r.take(n) for r, n in zip(requests, lengths, strict=True)]
    gaps = [width - n for n in lengths]
    whole = [padded(row, *((gap, 0) if left else (0, gap))) for row, gap in zip(rows, gaps, strict=True)]
    arrays = [mx.concatenate(list(x)) for x in zip(*whole, strict=True)]
    if any(gaps):
        batch.prepare(**({"left_padding": gaps} if left else {"lengths": lengths, "right_padding": gaps}))
    out = np.concatenate([attended(batch, part(arrays, i, i + step)) for i in range(0, width, step)], axis=2)
    if any(gaps):
        batch.finalize()
    assert batch.offset.tolist() == [r.seen for r in requests]
    for i, (r, row, n) in enumerate(zip(requests, rows, lengths, strict=True)):
        own, rest = (slice(width - n, width), slice(0, width - n)) if left else (slice(0, n), slice(n, width))
        if n:
            np.testing.assert_allclose(out[i : i + 1, :, own], read(r.alone, row, (n,)), rtol=1e-4, atol=1e-5)
        assert not out[i, :, rest].any(), "padding gets zeros"
        same_slots(batch.caches[i], r.alone)


def same_slots(one: PrunedKVCache, other: PrunedKVCache) -> None:
    assert (one.offset, one.size(), one.evicted) == (other.offset, other.size(), other.evicted)
    if not one.empty():
        np.testing.assert_array_equal(reference.kept_positions(one), reference.kept_positions(other))
        np.testing.assert_array_equal(one.everything().keys, other.everything().keys)


def one_by_one(case: Case) -> Case:
    return replace(case, batch=1)


ACTS = ("read", "read", "decode", "decode", "filter", "extend", "split", "extract", "left")


@hypothesis_settings(deadline=None, max_examples=60)
@given(cases(room=40).map(one_by_one), st.data())
def test_whatever_happens_to_the_batch(case, data):
    """Requests are read, decoded, dropped, reordered, joined, split off and taken out, in any order."""
    draw = data.draw
    seeds = iter(range(1000))
    new = lambda: [request(case, next(seeds), n) for n in draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))]
    requests = new()
    batch = batch_of(requests)
    for act in draw(st.lists(st.sampled_from(ACTS), min_size=2, max_size=8)):
        if act in ("read", "left"):
            few = st.lists(st.integers(0, 30), min_size=len(requests), max_size=len(requests)).filter(any)
            feed(batch, requests, draw(few), draw(st.integers(1, 30)), left=act == "left")
        elif act == "decode":
            feed(batch, requests, [1] * len(requests), 1)
        elif act == "filter":
            keep = draw(st.permutations(range(len(requests))))[: draw(st.integers(1, len(requests)))]
            batch.filter(mx.array(keep) if len(keep) > 1 else keep)
            requests = [requests[i] for i in keep]
        elif act == "extend" and len(requests) < 6:
            more = new()
            batch.extend(batch_of(more))
            requests = requests + more
        elif act == "split" and len(requests) > 1:
            other, cut = copy.deepcopy(batch), draw(st.integers(1, len(requests) - 1))
            batch.filter(list(range(cut)))
            other.filter(list(range(cut, len(requests))))
            feed(other, requests[cut:], [3] * (len(requests) - cut), 3)
            feed(batch, requests[:cut], [2] * cut, 1)
            other.extend(batch)
            batch, requests = other, requests[cut:] + requests[:cut]
        elif act == "extract":
            i = draw(st.integers(0, len(requests) - 1))
            taken, twin = batch.extract(i), copy.deepcopy(requests[i])
            row = twin.take(draw(st.integers(1, 40)))
            n = row[0].shape[2]
            np.testing.assert_array_equal(read(taken, row, (n,)), read(twin.alone, row, (n,)))
            same_slots(taken, twin.alone)
    feed(batch, requests, [2] * len(requests), 1)
    assert batch.size() == max(c.size() for c in batch.caches)
    assert batch.nbytes == sum(r.alone.nbytes for r in requests)


CASE = Case(CacheSettings("h2o", window=4, block=3, n_sink=2), 20, (1,))


def test_merging_copies():
    """The caches that were merged go on alone; so do two deep copies of a batch."""
    requests = [request(CASE, seed, n) for seed, n in enumerate((0, 9, 31))]
    batch = batch_of(requests)
    twin, others = copy.deepcopy(batch), copy.deepcopy(requests)
    feed(batch, requests, [7, 3, 12], 4)
    for r in others:
        r.arrays = tensors(CASE, 400, 77 + r.seen)
    feed(twin, others, [2, 11, 5], 3)
    feed(batch, requests, [1, 1, 1], 1)


def test_an_extracted_cache_does_not_wait_for_the_batchs_graph():
    """What was not evaluated yet is, lest it keep the keys of all rows."""
    gc.collect()
    before = mx.get_active_memory()
    arrays = tensors(replace(CASE, batch=8), 4000)
    mx.eval(arrays)
    batch = BatchPrunedKVCache(CASE.cache() for _ in range(8))
    attended(batch, arrays)
    taken = batch.extract(3)
    del batch, arrays
    gc.collect()
    mx.synchronize()
    assert mx.get_active_memory() - before < taken.nbytes + 100_000


def test_later_layers_replay_the_handle():
    """A layer that is handed another's keys attends to what that layer saw, and changes nothing."""
    requests = [request(CASE, seed, n) for seed, n in enumerate((0, 9, 31))]
    batch, twins = batch_of(requests), [copy.deepcopy(r.alone) for r in requests]
    rows = [r.take(6) for r in requests]
    queries, keys, values = (mx.concatenate(list(x)) for x in zip(*rows, strict=True))
    batch.prepare(lengths=[6, 2, 4], right_padding=[0, 4, 2])
    handle, same_handle = batch.update_and_fetch(keys, values)
    assert handle is same_handle
    assert (handle.shape, handle.ndim, handle.dtype) == ((3, 2, 35, 4), 4, keys.dtype)
    batch.attend(queries, handle, SCALE, "causal")
    shared, _ = batch.keys_and_values()
    outs = [np.array(batch.attend(-queries, h, SCALE, "causal")) for h in (handle, shared)]
    np.testing.assert_array_equal(*outs)
    for i, (n, twin) in enumerate(zip((6, 2, 4), twins, strict=True)):
        query, key, value = part(rows[i], 0, n)
        own, _ = twin.update_and_fetch(key, value)
        twin.attend(query, own, SCALE, "causal")
        np.testing.assert_allclose(outs[0][i : i + 1, :, :n], twin.attend(-query, own, SCALE, "causal"), rtol=1e-5)
        same_slots(batch.caches[i], twin)


@pytest.mark.parametrize("kind", ["all rows", "per row", "causal"])
def test_masks_that_are_arrays(kind):
    requests = [request(CASE, seed, n) for seed, n in enumerate((0, 9, 31))]
    batch, twins = batch_of(requests), copy.deepcopy(requests)
    rows = [r.take(5) for r in requests]
    arrays = [mx.concatenate(list(x)) for x in zip(*rows, strict=True)]
    masks = mx.tril(mx.random.uniform(shape=(3, 1, 5, 5)) < 0.5) | mx.eye(5, dtype=mx.bool_)
    if kind == "causal":
        masks = mx.broadcast_to(batch.make_mask(5, return_array=True), (3, 1, 5, 5))
    elif kind == "all rows":
        masks = mx.broadcast_to(masks[:1], masks.shape)
    batch.prepare(lengths=[5, 2, 3], right_padding=[0, 3, 2])
    out = attended(batch, arrays, masks if kind == "per row" else masks[0, 0])
    for i, (n, twin) in enumerate(zip((5, 2, 3), twins, strict=True)):
        query, key, value = part(twin.take(n), 0)
        handle, _ = twin.alone.update_and_fetch(key, value)
        expected = twin.alone.attend(query, handle, SCALE, masks[i : i + 1, :, :n, :n])
        np.testing.assert_allclose(out[i : i + 1, :, :n], expected, rtol=1e-4, atol=1e-6)


def test_masks_by_name():
    batch = batch_of([request(CASE, 0, 5), request(CASE, 1, 30)])
    assert batch.make_mask(1) is batch.make_mask(1, return_array=True) is None
    assert batch.make_mask(3) == "causal"
    assert mx.array_equal(batch.make_mask(3, return_array=True), mx.tril(mx.ones((3, 3), mx.bool_)))
    with pytest.raises(NotImplementedError):
        batch.make_mask(3, window_size=2)


def test_trim():
    case = Case(CacheSettings("window", window=4, block=3, n_sink=2), 20, (1,))
    batch = batch_of([request(case, 0, 5), request(case, 1, 12)])
    assert batch.is_trimmable()
    assert batch.trim(7) == 7
    assert batch.offset.tolist() == [0, 5]
    batch.extend(batch_of([request(case, 2, 40)]))
    assert not batch.is_trimmable()
    with pytest.raises(ValueError, match=r"\[trim\]"):
        batch.trim(30)


def test_what_cannot_be_batched_has_no_merge():
    for policy, more in (("surprise", {}), ("probe", {"question": (1,)})):
        cache = PrunedKVCache(CacheSettings(policy, **more), 400)
        assert not hasattr(cache, "merge")
        with pytest.raises(AttributeError, match=rf"\[batch\] policy '{policy}' needs the"):
            _ = cache.merge
    assert not hasattr(PrunedKVCache(CASE.settings, 20, dense=True), "merge")
    bounded = CASE.cache()
    for other in (KVCache(), PrunedKVCache(CacheSettings("surprise"), 400)):
        with pytest.raises(ValueError, match=r"\[batch\] these caches cannot be batched; got .*; try one request"):
            bounded.merge([bounded, other])


def test_an_empty_batch_of_new_requests():
    batch = batch_of([request(CASE, 0, 0), request(CASE, 1, 0)])
    assert batch.empty()
    assert (batch.size(), batch.nbytes, batch.offset.tolist()) == (0, 0, [0, 0])
    mx.eval(batch.state)
