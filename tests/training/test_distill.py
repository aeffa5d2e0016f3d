"""The student, and gates that are trained through it."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models as zoo
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from training_helpers import WINDOW, gates_for, readings, shaken, text

import mlx_kvprune as kvp
from mlx_kvprune.attach import hooked
from mlx_kvprune.gates.structure import worth
from mlx_kvprune.training import student
from mlx_kvprune.training.bias import Bias
from mlx_kvprune.training.calibrate import Quality, as_saved
from mlx_kvprune.training.distill import Distiller, held_out, loss_of, output_loss, raws_of
from mlx_kvprune.training.joint import JointDistiller, check_learns, let_learn
from mlx_kvprune.training.methods import METHODS
from mlx_kvprune.training.objective import budget_biases, decay_biases, divergence
from mlx_kvprune.training.objectives import OBJECTIVES
from mlx_kvprune.training.objectives.dms import noisy
from mlx_kvprune.training.reading import read
from mlx_kvprune.training.recipe import Example, Recipe, bounds_of
from mlx_kvprune.training.student import run, run_live
from mlx_kvprune.training.whitening import Whitening

FORMS = {"budget": "shared", "decay": "mlp", "spkv": "mlp", "dms": "dms"}


def recipe(target: str = "budget", **more) -> Recipe:
    given = {"steps": 40, "rate": 3e-5 if target == "dms" else 1e-2, "shares": (0.2, 0.3), "window": WINDOW}
    given |= {"ageing": target in ("budget", "decay"), "falling": target == "dms"}
    return Recipe(target=target, **{**given, "bias_rate": 0.0, "warm": 1.0, "cold": 0.2, **more})


def nothing(heads: int, start: int, length: int) -> Bias:
    """The bias of gates that do nothing."""
    return Bias(mx.zeros((heads, 1, start + length)), mx.ones((length, start + length), mx.bool_))


def causal(model, start: int, length: int) -> list[Bias]:
    return [nothing(2, start, length) for _ in range(2)]


@pytest.mark.parametrize(
    "kind", ["llama", "mistral:sliding", "gpt_oss", "qwen3", "qwen3_5", "granite", "gemma3n", "afm7"]
)
def test_without_biases_the_student_is_the_model(kind):
    model = zoo.tiny_model(kind)
    try:
        tokens = text(0)
        expected = np.array(
            model(mx.array(tokens)[None], cache=make_prompt_cache(model))[0]
        )  # gemma3n shares keys by it
        reading = readings(model, 1)[0]
        heads = [layer.keys.shape[0] for layer in reading.layers]
        for start in (0, 256):
            biases = [nothing(h, start, 256) for h in heads]
            found = np.array(run(model, reading, start, 256, biases))
            atol = 0.1 if kind == "afm7" else 3e-2  # keys were kept as float16
            np.testing.assert_allclose(found, expected[start : start + 256], atol=atol)
    finally:
        kvp.detach(model)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
@pytest.mark.parametrize(("warmth", "atol"), [(0.0, 1e-5), (0.1, 2e-3)])
def test_what_no_query_sees_is_left_out_of_the_student(kind, warmth, atol, monkeypatch):
    """Its logits, and what they say to the gates, are those of a student over all slots, most of which weigh nothing."""
    model = zoo.tiny_model(kind)
    kvp.detach(model)
    reading = readings(model, 1, length=1024)[0]
    bounds = bounds_of(150, recipe(window=16))
    gates = shaken(gates_for(model, "shared"), scale=1.0)
    plain = Whitening.of([reading], "shared")
    held = []
    monkeypatch.setattr(student.StudentLayer, "__init__", noting(held, student.StudentLayer.__init__))

    def loss(gates) -> mx.array:
        scores = [worth(raw) for raw in raws_of(gates, reading, plain, 1024)]
        logits = run(model, reading, 768, 256, budget_biases(scores, 768, 256, bounds, warmth))
        return divergence(logits, reading.top[768:], reading.top_ids[768:])

    found, gradient = nn.value_and_grad(gates, loss)(gates)
    some = [*held]
    monkeypatch.setattr(student, "LEAST", -np.inf)
    expected, whole = nn.value_and_grad(gates, loss)(gates)
    assert max(some) < 500 and set(held[len(some) :]) == {768}
    np.testing.assert_allclose(found.item(), expected.item(), rtol=atol)
    for (name, a), (_, b) in zip(tree_flatten(gradient), tree_flatten(whole), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=atol * float(mx.abs(b).max()) + 1e-9, err_msg=name)


def noting(sizes: list[int], made):
    """How many slots a student layer has, each time that one is made."""

    def init(self, keys, *rest):
        sizes.append(keys.shape[2])
        made(self, keys, *rest)

    return init


def test_a_reading_takes_what_it_says(model):
    """Nothing hidden behind it: the teacher's logits were once held by the few that were picked."""
    gc.collect()
    before, found = mx.get_active_memory(), []
    for seed in range(4):
        found.append(read(model, text(seed, 1024), WINDOW))
    gc.collect()
    assert mx.get_active_memory() - before <= 1.1 * sum(reading.nbytes for reading in found)


def test_live_student_is_the_model(model):
    hooked(model)
    tokens = mx.array(text(0, 128))
    found = run_live(model, tokens, lambda i, x: nothing(2, 0, 128))
    np.testing.assert_allclose(np.array(found), np.array(model(tokens[None])[0]), atol=1e-4)


@pytest.mark.parametrize("target", list(OBJECTIVES))
def test_every_objective_lowers_its_loss(model, pool, target):
    """The same example before and after, at the same step: what is asked changes as training goes on."""
    how, whitening = recipe(target), Whitening.of(pool, FORMS[target])
    distiller = Distiller(gates_for(model, FORMS[target]), model, whitening, how)
    example = Example(pool[0], 256, bounds_of(110, how))
    loss = lambda: loss_of(distiller.gates, model, example, whitening, how, 39)[0].item()
    before = loss()
    for _ in range(25):
        distiller.step(pool)
    assert loss() < before


@pytest.mark.parametrize("target", ["spkv", "dms"])
def test_what_is_dropped_still_learns(model, pool, target):
    """Through the student: slots that it leaves out of its context would never come back."""
    plan = recipe(target, quality=1e-6 if target == "spkv" else 0.0, steps=40, capacity=0.0)
    gates = shaken(gates_for(model, "mlp"))
    example = Example(pool[0], 256, bounds_of(100, plan))
    length = example.start + example.length
    raws = [x - x.mean() for x in raws_of(gates, pool[0], Whitening.none(gates.shape.widths), length)]

    def loss(raws):
        biases = OBJECTIVES[target].biases(raws, example, plan, 40)
        return output_loss(run(model, pool[0], example.start, example.length, biases), example, plan)[0]

    numbers = [-z for z in noisy(raws, plan, 40)] if target == "dms" else raws
    for number, pulled in zip(numbers, mx.grad(loss)(raws), strict=True):
        dropped = np.array(number)[:, 4 : example.start] < 0
        assert dropped.mean() > 0.2 and (np.abs(np.array(pulled))[:, 4 : example.start][dropped] > 1e-9).mean() > 0.9


def test_a_quality_that_is_kept_costs_nothing(model, pool):
    """Beyond it the loss is how far beyond, as a multiple of it."""
    example = Example(pool[0], 256, bounds_of(200, recipe("spkv")))
    logits = mx.random.normal((example.length, zoo.VOCAB), key=mx.random.key(0))
    plain, kl = output_loss(logits, example, recipe("spkv"))
    assert plain.item() == kl.item() > 0
    for quality in (0.5 * kl.item(), 2 * kl.item()):
        counted, same = output_loss(logits, example, recipe("spkv", quality=quality))
        assert counted.item() == pytest.approx(max(0.0, kl.item() / quality - 1), rel=1e-5) and same.item() == kl.item()


def test_distillation_lowers_the_held_out_kl(model, pool, held):
    how, whitening = recipe(warm=0.5), Whitening.of(pool, "shared")
    gates = shaken(gates_for(model, "shared"), scale=0.05)
    before = held_out(gates, model, held, whitening, how)
    distiller = Distiller(gates, model, whitening, how)
    for _ in range(40):
        distiller.step(pool)
    after = distiller.held_out(held)
    assert np.mean(list(after.values())) < 0.97 * np.mean(list(before.values()))


def test_only_gates_learn(model, pool):
    before = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    how, whitening = recipe(), Whitening.of(pool, "shared")
    distiller = Distiller(gates_for(model, "shared"), model, whitening, how)
    start = {name: np.array(x) for name, x in distiller.gates.arrays().items()}
    distiller.step(pool)
    assert all((np.array(x) == before[name]).all() for name, x in tree_flatten(model.parameters()))
    assert all((np.array(x) != start[name]).any() for name, x in distiller.gates.arrays().items())


@pytest.mark.parametrize("target", list(OBJECTIVES))
def test_gradient_reaches_every_gate(model, pool, target):
    how, whitening = recipe(target), Whitening.of(pool, FORMS[target])
    gates = shaken(gates_for(model, FORMS[target]), scale=1e-3 if target == "dms" else 0.3)
    example = Example(pool[0], 256, bounds_of(110, how))
    gradient = nn.value_and_grad(gates, lambda g: loss_of(g, model, example, whitening, how, 20)[0])(gates)[1]
    for name, x in tree_flatten(gradient):
        assert np.isfinite(np.array(x)).all() and np.abs(np.array(x)).max() > 0, name


@pytest.mark.parametrize("target", ["budget", "dms"])
def test_a_restored_distiller_goes_on_as_if_nothing_had_happened(model, pool, target):
    how, whitening = recipe(target, steps=8), Whitening.of(pool, FORMS[target])
    straight = Distiller(gates_for(model, FORMS[target]), model, whitening, how)
    for _ in range(3):
        straight.step(pool)
    state = straight.state
    for _ in range(3):
        straight.step(pool)
    again = Distiller(gates_for(model, FORMS[target], seed=9), model, whitening, how)
    again.restore(state, 3)
    for _ in range(3):
        again.step(pool)
    for name, x in straight.state.items():
        assert mx.array_equal(x, again.state[name]), name


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("bias_rate", [0.0, 0.02])
def test_a_shortened_distiller_ends_as_a_short_one(pool, joint, bias_rate):
    """Rates are those of a training of as many steps; what the optimizer remembers stays."""
    model = zoo.tiny_model("llama")
    hooked(model)
    if joint:
        let_learn(model, 4, 0)
    made = JointDistiller if joint else Distiller
    start = lambda steps: made(
        gates_for(model, "mlp"), model, Whitening.of(pool, "mlp"), recipe("spkv", steps=steps, bias_rate=bias_rate)
    )
    rates = lambda found: {name: float(x) for name, x in found.state.items() if name.endswith("learning_rate")}
    long, short = start(400), start(12)
    for _ in range(6):
        long.step(pool)
        short.step(pool)
    before = long.state
    long.shorten(12)
    assert all(mx.array_equal(x, before[name]) for name, x in long.state.items() if not name.endswith("rate"))
    for _ in range(5):
        long.step(pool)
        short.step(pool)
    assert rates(long) == pytest.approx(rates(short)) and long.recipe.steps == 12
    fresh = start(400)
    fresh.shorten(12)  # before it has taken a step
    fresh.step(pool)
    kvp.detach(model)


def test_quantized_weights_cannot_learn():
    model = zoo.tiny_model("llama")
    check_learns(model, 0)
    nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(ValueError, match=r"^\[full\] quantized weights cannot learn; got .*; try --lora 8"):
        check_learns(model, 0)
    check_learns(model, 2)


@pytest.mark.parametrize("rank", [2, 0])
def test_joint_training_moves_model_and_gates(pool, tmp_path, rank):
    model = zoo.tiny_model("llama")
    try:
        texts = readings(model, 1)
        how, whitening = recipe("spkv", steps=8, rate=1e-3, surprisal=1.0, capacity=0.0), Whitening.of(texts, "mlp")
        let_learn(model, rank)
        distiller = JointDistiller(gates_for(model, "mlp"), model, whitening, how)
        before = {name: np.array(x) for name, x in distiller.learned.items()}
        losses = [distiller.step(texts)[0] for _ in range(6)]
        moved = [name for name, x in distiller.learned.items() if (np.array(x) != before[name]).any()]
        assert losses[-1] < losses[0]
        assert any(name.startswith("gates.") for name in moved) and any(name.startswith("model.") for name in moved)
        gates = {name: np.array(x) for name, x in distiller.gates.arrays().items()}
        distiller.step(texts)  # the last quarter
        assert all((np.array(x) == gates[name]).all() for name, x in distiller.gates.arrays().items())
        frozen = len(tree_flatten(model.parameters())) - len(tree_flatten(model.trainable_parameters()))
        assert (frozen > 0) == bool(rank)
    finally:
        kvp.detach(model)


@pytest.mark.parametrize("method", ["spkv", "kvzap", "fastkvzip", "dms"])
def test_thresholds_keep_what_they_promise(model, held, method):
    how = METHODS[method]
    gates = as_saved(shaken(gates_for(model, how.forms[0]), scale=0.01))
    quality = Quality(gates, how, recipe(), held)
    found = quality.thresholds()
    assert list(found) == ["1/2", "1/4", "1/8", "1/16"]
    for n, threshold in zip((2, 4, 8, 16), found.values(), strict=True):
        kept = [
            (np.array(how.score(raw))[:, 4 : 512 - WINDOW] >= threshold).mean()
            for reading in held
            for raw in raws_of(gates, reading, quality.plain, 512)
        ]
        assert np.mean(kept) == pytest.approx(1 / n, abs=0.03)  # equal inputs have equal scores
    assert quality.kl_at(model, -1e9) == pytest.approx(0, abs=1e-3)
    assert quality.kl_at(model, found["1/16"]) > quality.kl_at(model, found["1/2"])


def test_retention_has_no_threshold(model, held):
    gates = as_saved(gates_for(model, "shared"))
    assert Quality(gates, METHODS["retention"], recipe(), held).thresholds() == {}


def test_decay_starts_where_a_budget_is_held(model):
    """Gates that never forget are moved until decayed weights sum to the budget, and nothing else is moved."""
    plan, found = recipe("decay", shares=(1 / 16, 1 / 4)), readings(model, 2)
    gates = shaken(gates_for(model, "mlp"), scale=0.1)
    plain = Whitening.of(found, "mlp")
    before = gates.arrays()
    Distiller(gates, model, plain, recipe("budget")).begin(found)
    assert all(mx.array_equal(x, before[name]) for name, x in gates.arrays().items())
    Distiller(gates, model, plain, plan).begin(found)
    moved = {name: np.array(x - before[name]) for name, x in gates.arrays().items()}
    added = moved["layers.0.bias"][0]
    assert abs(added) > 0.5
    for name, x in moved.items():
        np.testing.assert_allclose(x, added if name.endswith(".bias") else 0.0, atol=1e-5, err_msg=name)
    sums = []
    for reading in found:
        for bias in decay_biases(raws_of(gates, reading, plain, 512), 511, 1, bounds_of(64, plan)):
            sums.append(np.exp(np.array(bias.full())).sum(axis=-1).mean())
    np.testing.assert_allclose(np.mean(sums), 512 / 8, rtol=1e-3)
