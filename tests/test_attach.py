"""The hook on every model type of mlx-lm that can be built small: the ladder, equality with stock, and clean removal."""

import importlib
import itertools
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models as zoo
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

import mlx_kvprune as kvp
from mlx_kvprune import rebind
from mlx_kvprune.attach import SLOT, attachment_of, settings_from
from mlx_kvprune.forward import leaves, pruned
from mlx_kvprune.storage import layer_nbytes

REFUSED = {
    "deepseek_v32",
    "deepseek_v41",
    "glm_moe_dsa",
    "mamba",
    "mamba2",
    "minimax_m3_vl",
    "mistral3",
    "recurrent_gemma",
    "rwkv7",
}
TOKENS = [3, 17, 99, 41, 5, 88, 23, 64, 2, 110, 7, 35, 90, 12, 56, 77, 31, 8, 101, 45, 19, 62, 28, 73]


@pytest.fixture(autouse=True)
def _without_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def run(model, cache, cuts=(0, 10, 23, 24)):
    x = mx.array(TOKENS)[None]
    out = [model(x[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
    return mx.concatenate(out, axis=1)


def relative(a, b):
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


@pytest.mark.parametrize("name", zoo.names())
def test_rung_and_equality_with_stock(name):
    model = zoo.tiny_model(name)
    expected = run(model, make_prompt_cache(model))
    if name in REFUSED:
        with pytest.raises(ValueError, match=r"\[attach\].*cannot be bounded"):
            kvp.attach(model, quiet=True)
        return
    rung = kvp.attach(model, policy="window", budget=1000, window=8, block=4, quiet=True).rung
    assert rung.name == "ragged" if name in zoo.REQUIRED_RAGGED else rung.name in ("ragged", "uniform")
    cache = model.make_cache()
    stock = make_prompt_cache(zoo.tiny_model(name))
    for ours, theirs in zip(leaves(cache), leaves(stock), strict=True):
        assert (type(ours) is kvp.PrunedKVCache) == (type(theirs) is KVCache)
    assert relative(run(model, cache), expected) < 1e-5
    assert any(c.held.pool_count() for c in pruned(cache)), "the pool took part"


def test_logits_are_bit_identical_while_the_ring_holds_everything():
    model = zoo.tiny_model("llama")
    expected = run(model, make_prompt_cache(model))
    kvp.attach(model, policy="window", budget=1000, quiet=True)
    assert mx.array_equal(run(model, model.make_cache()), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma4_text", "deepseek_v3", "falcon_h1", "gemma2"])
def test_detach_restores_every_object(name):
    model = zoo.tiny_model(name)
    classes = [type(m) for m in model.modules()]
    names = dict(vars(model))
    functions = {
        (module.__name__, key): value
        for module in list(sys.modules.values())
        if module.__name__.startswith("mlx_lm")
        for key, value in vars(module).items()
        if callable(value)
    }
    kvp.attach(model, budget=200, quiet=True)
    assert type(model) is not classes[0]
    kvp.detach(model)
    assert [type(m) for m in model.modules()] == classes
    assert vars(model) == names
    for (module, key), value in functions.items():
        assert vars(sys.modules[module])[key] is value, (module, key)
    assert type(next(leaves(make_prompt_cache(model)))) is not kvp.PrunedKVCache
    kvp.detach(model)  # a second time does nothing


def test_two_models_keep_the_names_until_the_last_is_detached():
    one, two = zoo.tiny_model("llama"), zoo.tiny_model("qwen3")
    kvp.attach(one, budget=200, quiet=True)
    kvp.attach(two, budget=200, quiet=True)
    kvp.detach(one)
    assert mx.isfinite(run(two, two.make_cache())).all()
    kvp.detach(two)


def test_parameters_quantization_and_subclass_survive():
    model = zoo.tiny_model("llama")
    before = {k for k, _ in nn.utils.tree_flatten(model.parameters())}
    kvp.attach(model, budget=200, quiet=True)
    assert {k for k, _ in nn.utils.tree_flatten(model.parameters())} == before
    assert isinstance(model, type(zoo.tiny_model("llama")))
    nn.quantize(model, group_size=32, bits=8)
    assert mx.isfinite(run(model, model.make_cache())).all()
    kvp.detach(model)


def test_attaching_again_changes_the_settings_only():
    model = zoo.tiny_model("llama")
    kvp.attach(model, policy="window", budget=200, quiet=True)
    kvp.attach(model, policy="knorm", budget=300, quiet=True)
    assert pruned(model.make_cache())[0].settings.policy == "knorm"
    assert pruned(model.make_cache())[0].slots == 300
    with pytest.raises(ValueError, match="unknown"):
        kvp.attach(model, policy="nope", quiet=True)
    assert attachment_of(model) is not None, "a mistake leaves what was there"
    assert pruned(model.make_cache())[0].slots == 300
    kvp.detach(model)
    with pytest.raises(ValueError, match="too small"):
        kvp.attach(model, budget=3, quiet=True)
    assert SLOT not in vars(model), "a first mistake leaves nothing behind"


def test_generate_with_stock_mlx_lm_runs_bounded():
    model = zoo.tiny_model("llama")
    kvp.attach(model, policy="knorm", budget=60, window=8, block=8, quiet=True)
    tokens = [t for t, _ in generate_step(mx.array(TOKENS * 5), model, max_tokens=60)]
    assert len(tokens) == 60
    kvp.detach(model)


def test_the_ladder_is_printed(capsys):
    model = zoo.tiny_model("gemma2")
    kvp.attach(model, budget=200)
    line = capsys.readouterr().err
    assert "gemma2" in line
    assert "uniform" in line
    assert "ragged: " in line, "the reason why not ragged"
    kvp.detach(model)


@pytest.mark.parametrize(("allocator", "who"), [("pyramid", "layers"), ("head_adaptive", "heads"), ("global", "heads")])
def test_shares_that_differ_are_refused_on_the_uniform_rung(allocator, who):
    """One mask of dense arrays serves all layers."""
    model = zoo.tiny_model("deepseek_v3")
    with pytest.raises(
        ValueError, match=rf"\[allocator\] {allocator} lets {who} hold differently many.*; try --allocator u"
    ):
        kvp.make_cache(model, "window", 200, allocator=allocator)
    kvp.detach(model)


def test_policies_that_need_queries_are_refused_on_the_uniform_rung():
    model = zoo.tiny_model("gemma2")
    with pytest.raises(ValueError, match="needs the queries"):
        kvp.attach(model, policy="snapkv", budget=200, quiet=True)
    kvp.attach(model, policy="knorm", budget=200, quiet=True)
    kvp.detach(model)


def test_speculative_decoding_is_refused():
    generate = importlib.import_module("mlx_lm.generate")  # the package's attribute of that name is a function
    model, draft = zoo.tiny_model("llama"), zoo.tiny_model("llama")
    kvp.attach(model, budget=200, quiet=True)
    with pytest.raises(ValueError, match="speculative"):
        generate.speculative_generate_step(mx.array(TOKENS), model, draft)
    kvp.detach(model)
    assert generate.speculative_generate_step is speculative_generate_step


def test_caps_of_mlx_lm_are_not_ignored_silently():
    generate = importlib.import_module("mlx_lm.generate")
    model = zoo.tiny_model("llama")
    kvp.attach(model, budget=200, quiet=True)
    for wrong in ({"max_kv_size": 64}, {"kv_bits": 4}):
        with pytest.raises(ValueError, match="a bounded cache"):
            next(generate.generate_step(mx.array(TOKENS), model, **wrong))
    kvp.detach(model)
    assert next(generate.generate_step(mx.array(TOKENS), model, max_kv_size=64))


def test_byte_budgets_are_kept_everything_counted():
    model = zoo.tiny_model("llama")
    for policy in ("window", "h2o", "snapkv", "expected_attention"):
        cache = kvp.make_cache(model, policy=policy, budget="400KB", window=16)
        for start in range(0, 300, 50):
            model(mx.array([TOKENS * 3])[:, :50], cache=cache)
            assert kvp.report(cache).kv_bytes <= 400_000, (policy, start)
        assert kvp.report(cache).kv_bytes > 300_000, "the budget is used"
        with pytest.raises(ValueError, match="too small"):
            kvp.make_cache(model, policy=policy, budget="9KB")
    kvp.detach(model)


@pytest.mark.parametrize("tokens", [150, 300, 600])
@pytest.mark.parametrize(("policy", "more"), [("probe", {"question": (3, 4)}), ("knorm", {"allocator": "global"})])
def test_a_budget_in_bytes_has_the_block_of_as_many_slots(policy, more, tokens):
    model = zoo.tiny_model("llama")
    named = {"policy": policy, "window": 16, **more}
    plain = pruned(kvp.make_cache(model, budget=tokens, **named))
    shapes = [layer.shape for layer in kvp.attach(model, quiet=True).rung.layers]
    memory = plain[0].scorer.memory
    nbytes = sum(layer_nbytes(shape, plain[0].settings, tokens, memory, 0) for shape in shapes)
    same = pruned(kvp.make_cache(model, budget=f"{int(nbytes) + 200}B", **named))
    part = 8 if "allocator" in more else 4
    block = min(128, max(32, tokens // part // 32 * 32))
    assert [c.settings.block for c in same] == [c.settings.block for c in plain] == [block] * 2
    assert [c.slots for c in same] == [c.slots for c in plain]
    kvp.detach(model)


def test_the_block_leaves_room_for_the_window():
    blocks = {tokens: settings_from(policy="dms", budget=tokens).block for tokens in (324, 330, 400, 600)}
    assert blocks == {324: 32, 330: 32, 400: 96, 600: 128}, "dms has a window of 256"


def test_report_of_stock_and_bounded_caches():
    model = zoo.tiny_model("llama")
    stock = kvp.make_cache(model, policy="full")
    bounded = kvp.make_cache(model, policy="window", budget=60, window=8, block=8)
    for cache in (stock, bounded):
        model(mx.array([TOKENS * 4]), cache=cache)
    full, ours = kvp.report(stock), kvp.report(bounded)
    assert (full.tokens_seen, ours.tokens_seen) == (96, 96)
    assert full.kv_bytes_full == ours.kv_bytes_full == 96 * 2 * 2 * 2 * 32 * 4
    assert ours.kv_bytes == sum(c.nbytes for c in bounded) <= ours.kv_bytes_peak
    assert ours.slots_held <= 60 < full.slots_held
    with pytest.raises(ValueError, match=r"\[report\]"):
        kvp.report(model)
    kvp.detach(model)


def test_a_byte_budget_is_for_one_sequence():
    model = zoo.tiny_model("llama")
    cache = kvp.make_cache(model, budget="400KB")
    with pytest.raises(ValueError, match="a batch of 2"):
        model(mx.array([TOKENS, TOKENS]), cache=cache)
    kvp.detach(model)


def test_a_make_cache_of_the_instances_own_is_used_and_put_back():
    model = zoo.tiny_model("llama")
    own = lambda: [KVCache(), KVCache()]
    model.make_cache = own
    kvp.attach(model, budget=200, quiet=True)
    assert [type(c) for c in model.make_cache()] == [kvp.PrunedKVCache] * 2
    kvp.detach(model)
    assert model.make_cache is own


@pytest.mark.parametrize("wrong", [None, "smollm2-135m", nn.Linear(2, 2)])
def test_what_is_not_a_model_is_refused(wrong):
    with pytest.raises(ValueError, match="not a model of mlx-lm"):
        kvp.attach(wrong)


def test_a_module_that_is_none_and_a_trial_that_fails(monkeypatch):
    """``sys.modules`` has None for what must not be imported; a model that cannot even be tried leaves no names bound."""
    monkeypatch.setitem(sys.modules, "nobody_may_import_this", None)
    model, users = zoo.tiny_model("llama"), rebind._users
    monkeypatch.setattr(model, "make_cache", lambda: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        kvp.attach(model, quiet=True)
    assert rebind._users == users
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "nobody_may_import_this", None)
    kvp.attach(model, quiet=True)
    assert rebind._users == users + 1
    kvp.detach(model)
    assert rebind._users == users


def test_a_refused_attach_leaves_caches_in_use():
    model = zoo.tiny_model("llama")
    cache = kvp.make_cache(model, "knorm", 176, window=16)
    tokens = mx.arange(20)[None]
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="budget"):
        kvp.attach(model, "knorm", 10, quiet=True)
    assert model(tokens, cache=cache).shape == (1, 20, 128)
    kvp.detach(model)
