"""Gated policies x allocators x bits x positions x saved, forked, taken back, in batches; and put into models and out again."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from gate_helpers import GATED, WORDS, caches_for, gated_model, given_gates, kept, random_gates, read, text
from mlx_lm import generate
from mlx_lm.generate import BatchGenerator, generate_step
from tiny_models import tiny_model

import mlx_kvprune as kvp
from mlx_kvprune.attach import attachment_of, hooked, use_gates
from mlx_kvprune.forward import pruned
from mlx_kvprune.gates import GateShape
from mlx_kvprune.policy import POLICIES

ALLOCATORS = ("uniform", "pyramid", "head_adaptive", "global")
BITS = ({}, {"kv_bits": 8, "kv_group_size": 32}, {"kv_bits": 4, "kv_group_size": 32})
CASES = [
    *(("retention", {"allocator": a, **b, "positions": p}) for a, b, p in product(ALLOCATORS, BITS, ("text", "cache"))),
    *((p, {"positions": w, **b}) for p, w, b in product(GATED[1:], ("text", "cache"), BITS[::2]) if p != "kvzap"),
    *(("kvzap", {"threshold": 0.0, "allocator": a}) for a in ("head_adaptive", "global")),
    ("retention", {"allocator": "uniform", "kv_bits": 4, "kv_fine_tokens": 32, "kv_group_size": 32}),
]


@pytest.fixture(name="model")
def _model():
    made = gated_model()
    given_gates(made)
    yield made
    kvp.detach(made)


def named(case: tuple) -> str:
    return "-".join([case[0], *map(str, case[1].values())])


@pytest.mark.parametrize("case", CASES, ids=named)
def test_saved_forked_and_taken_back(model, case, tmp_path):
    policy, more = case
    caches = caches_for(model, policy, 200, **more)
    read(model, caches, text(430), 90)
    assert any(c.evicted for c in caches)
    assert sum(c.held.held() for c in caches) <= 2 * 2 * 200
    kvp.save_cache(tmp_path / "cache.safetensors", caches)
    loaded = kvp.load_cache(tmp_path / "cache.safetensors", model)
    forked = kvp.fork(caches)
    more_text = text(500)[:, 430:]
    expected = read(model, caches, more_text, 33)
    for twins in (loaded, forked):
        np.testing.assert_array_equal(read(model, twins, more_text, 33), expected)
        assert kept(twins) == kept(caches)
        assert [c.nbytes for c in twins] == [c.nbytes for c in caches]
    since = min(c.held.written - c.held.final for c in caches)
    assert since > 0
    before = kept(caches)
    kvp.rewind(caches, since)
    with pytest.raises(ValueError, match=r"\[rewind\]"):
        kvp.rewind(caches, 500 - since)
    again = read(model, caches, text(500)[:, 500 - since :])
    assert kept(caches) == before
    np.testing.assert_allclose(again, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [c for c in CASES if not c[1].get("kv_bits")], ids=named)
def test_a_span_is_dropped(model, case):
    policy, more = case
    caches = caches_for(model, policy, 200, **more)
    read(model, caches, text(300), 90)
    left = lambda head: [p if p < 100 else p - 180 for p in head if not 100 <= p < 280]
    expected = [[left(head) for head in layer] for layer in kept(caches)]
    kvp.drop(caches, 100, 280, close=True)
    assert kept(caches) == expected
    assert caches[0].held.written == 120
    assert np.isfinite(read(model, caches, text(500)[:, 300:], 50)).all()
    assert sum(c.held.held() for c in caches) <= 2 * 2 * 200


BATCHED = [c for c in CASES if c[1].get("allocator", POLICIES[c[0]].allocator) != "global"]  # which needs all layers


@pytest.mark.parametrize("case", BATCHED[::2], ids=named)
def test_each_row_of_a_batch_gives_what_it_gives_alone(model, case):
    """Prompts of any length, answers too; rows come and go."""
    policy, more = case
    options = {"window": 16, "block": 32, "quiet": True, **more}
    kvp.attach(model, policy, 150, **options)
    within = 1e-3 if more.get("kv_bits") else 2e-4  # a sum in another order may round a number to the next code
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, WORDS, n).tolist() for n in (5, 260, 70, 200)]
    lengths = [9, 20, 3, 12]
    generator, told = BatchGenerator(model, prefill_step_size=48), {}
    uids = generator.insert(texts, lengths)
    while True:
        asked, generated = generator.next()
        for r in generated:
            told.setdefault(r.uid, []).append((r.token, np.array(r.logprobs)))
        if not asked and not generated:
            break
    generator.close()
    for uid, prompt, n in zip(uids, texts, lengths, strict=True):
        alone = generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=model.make_cache())
        for (token, logprobs), (other, expected) in zip(told[uid], alone, strict=True):
            assert token == int(other)
            np.testing.assert_allclose(logprobs, np.array(expected), atol=within)


def test_where_all_layers_compete_nothing_is_batched(model):
    kvp.attach(model, "retention", 200, quiet=True)
    cache = model.make_cache()[0]
    assert cache.settings.allocator == "global"
    assert not hasattr(cache, "merge")
    assert "needs all layers" in cache.unbatched()


# -- in and out of models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gptj", "baichuan_m1", "deepseek_v3"])
def test_classes_are_put_back(name):
    model = tiny_model(name)
    before = [(id(module), type(module)) for _, module in model.named_modules()]
    kvp.attach(model, "window", 200, quiet=True)
    during = [type(module) for _, module in model.named_modules()]
    changed = [a for (_, a), b in zip(before, during, strict=True) if a is not b]
    assert len(changed) > 1
    assert all(b is a or issubclass(b, a) for (_, a), b in zip(before, during, strict=True))
    kvp.attach(model, "knorm", 150, quiet=True)  # not a second time
    assert [type(module) for _, module in model.named_modules()] == during
    kvp.detach(model)
    assert [(id(module), type(module)) for _, module in model.named_modules()] == before


class OneToken:
    """A gate for inputs of any width: sums of some channels; it notes how many tokens each layer showed."""

    def __init__(self, heads: list[int]):
        self.shape, self.seen = GateShape("linear", (8,) * len(heads), tuple(heads)), [0] * len(heads)
        self.nbytes = 0

    def identity(self) -> str:
        return "one token"

    def __call__(self, layer: int, x: mx.array) -> mx.array:
        self.seen[layer] += x.shape[1]
        return mx.stack([x[..., h : h + 4].sum(axis=-1) for h in range(self.shape.heads[layer])], axis=1)


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma2", "gptj", "plamo", "baichuan_m1", "jamba", "deepseek_v3"])
def test_every_kind_of_attention_shows_its_input_once(name):
    """Called by position or by name, inside lists of caches, sharing an earlier layer's keys, or doing its own attention."""
    model = tiny_model(name)
    hooked(model)
    gates = OneToken([layer.shape.n_kv_heads for layer in attachment_of(model).rung.layers])
    use_gates(model, "retention", gates)
    caches = kvp.make_cache(model, "retention", 150, allocator="uniform", window=16, block=32)
    for length in (100, 60, 1):
        mx.eval(model(mx.random.randint(0, 100, (1, length), key=mx.random.key(length)), cache=caches))
        assert all(c.staged is None for c in pruned(caches))
    assert gates.seen[0] == 161
    assert all(n >= 161 for n in gates.seen)
    assert all(c.evicted for c in pruned(caches))
    kvp.detach(model)


def test_an_attention_that_is_never_called_is_named():
    model = tiny_model("iquestloopcoder")
    hooked(model)
    use_gates(model, "retention", OneToken([x.shape.n_kv_heads for x in attachment_of(model).rung.layers]))
    caches = kvp.make_cache(model, "retention", 150, allocator="uniform", window=16, block=32)
    with pytest.raises(ValueError, match=r"^\[gates\] policy 'retention' never saw the attention's input; .*; try"):
        model(mx.array([[1, 2, 3]]), cache=caches)
    kvp.detach(model)


def test_a_cache_that_was_not_told_its_gates():
    cache = kvp.PrunedKVCache(kvp.CacheSettings("retention", "uniform"), 200)
    with pytest.raises(
        ValueError, match=r"^\[gates\] policy 'retention' needs the model's gates, .*; try kvp.make_cache"
    ):
        cache.stage(mx.zeros((1, 1, 128)))
    kvp.PrunedKVCache(kvp.CacheSettings("knorm"), 200).stage(mx.zeros((1, 1, 128)))  # who needs none is not bothered


def test_generate(model):
    """Stock mlx-lm, retention attached; the same as token by token."""
    kvp.attach(model, "retention", 200, window=16, block=32, quiet=True)

    class Tokens:
        """What ``mlx_lm.generate`` asks of a tokenizer."""

        bos_token = eos_token_id = chat_template = None
        clean_up_tokenization_spaces = False

        def encode(self, text: str, **_) -> list[int]:
            return [ord(x) for x in text]

        def decode(self, tokens, **_) -> str:
            return "".join(chr(33 + int(t)) for t in tokens)

        def get_vocab(self) -> dict:
            return {}

        def apply_chat_template(self, messages: list, **_) -> str:
            return messages[0]["content"]

    from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper

    tokenizer = TokenizerWrapper(Tokens(), NaiveStreamingDetokenizer)
    prompt = text(350)[0].tolist()
    said = generate(model, tokenizer, prompt, max_tokens=8)
    caches, expected = caches_for(model, "retention", 200), []
    logits = read(model, caches, mx.array([prompt]), 64)
    for _ in range(8):
        expected.append(int(logits.argmax()))
        logits = read(model, caches, mx.array([expected[-1:]]))
    assert said == Tokens().decode(expected)


def test_gates_of_a_model_outlive_caches_not_the_attachment(model):
    given = random_gates("shared")
    use_gates(model, "retention", given)
    assert kvp.make_cache(model, "retention", 200)[0].gate.func is given
    kvp.detach(model)
    with pytest.raises(ValueError, match=r"\[gates\] policy 'retention' needs gates"):
        kvp.make_cache(model, "retention", 200)
