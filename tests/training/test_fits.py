"""Readings, gates that are fitted to them, and scales folded into gates."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from training_helpers import WINDOW, gates_for, shaken, text

from mlx_kvprune.gates import Gates, GateShape
from mlx_kvprune.gates.structure import worth
from mlx_kvprune.training.descent import Descent
from mlx_kvprune.training.fit import typical
from mlx_kvprune.training.methods import RATES
from mlx_kvprune.training.objectives import rereading
from mlx_kvprune.training.plan import Plan
from mlx_kvprune.training.reading import LayerReading, Reading, gram, projections, read
from mlx_kvprune.training.utility import SHIFT, exposure, fit_poisson
from mlx_kvprune.training.whitening import Whitening


def invented(seed: int, length: int = 1024, width: int = 6, heads: int = 2) -> tuple[Reading, np.ndarray]:
    """A reading whose masses were drawn with known log rates, linear in its inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (length, width))
    rates = (0.5 * x @ rng.normal(0, 1, (width, heads)) - 2).T  # log
    mass = rng.poisson(exposure(length, 8) * np.exp(rates)).astype(np.float32)
    none = mx.zeros((0,))
    layer = LayerReading(mx.array(x, mx.float16), none, none, mx.array(mass), mx.array(np.exp(rates), mx.float32))
    return Reading(np.zeros(length), [layer], none, none), rates


def test_poisson_fit_recovers_the_rates():
    reading, rates = invented(0, 4096)
    gates, whitening = Gates(GateShape("linear", (6,), (2,))), Whitening.of([reading], "linear")
    fit_poisson(gates, [reading], whitening, 8, 0, Descent(epochs=60, rate=5e-2))
    found = np.array(worth(gates(0, whitening(0, reading.layers[0].x[None]))[0])) - SHIFT
    assert np.corrcoef(found.reshape(-1), rates.reshape(-1))[0, 1] > 0.98
    assert np.abs(found - rates).mean() < 0.2


def test_ridge_is_the_closed_form():
    rng = np.random.default_rng(0)
    x, w = rng.normal(0, 1, (500, 4)), rng.normal(0, 1, (4, 3))
    found, bias, error = rereading.ridge(x, x @ w + 7, 1e-9)
    np.testing.assert_allclose(found, w, atol=1e-6)
    np.testing.assert_allclose(bias, 7, atol=1e-6)
    assert error < 1e-9
    tight, _, _ = rereading.ridge(x, x @ w + 7, 10.0)
    assert np.linalg.norm(tight) < 0.5 * np.linalg.norm(found)


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_kvzap_learns_its_target(form):
    reading, rates = invented(1)
    gates, whitening = Gates(GateShape(form, (6,), (2,), hidden=16)), Whitening.of([reading], form)
    if form == "linear":
        rereading.fit_ridge(gates, [reading], whitening, 4, lambda n, loss: None)
    else:
        rereading.fit_squared(gates, [reading], whitening, 4, Descent(60, 1e-2, 256), lambda n, loss: None)
    found = np.array(gates(0, whitening(0, reading.layers[0].x[None]))[0])
    assert np.square(found - rates).mean() < 0.1 * rates.var()


def test_fastkvzip_lowers_its_cross_entropy(model):
    twice = [read(model, text(1, 256), WINDOW, twice=True)]
    losses = []
    gates, whitening = gates_for(model, "sink"), Whitening.of(twice, "sink")
    rereading.fit_score(gates, twice, whitening, 4, Descent(25, 3e-3, 128), lambda n, loss: losses.append(loss))
    assert np.mean(losses[-4:]) < 0.97 * np.mean(losses[:2])
    scores = np.exp(np.array(gates(0, twice[0].layers[0].x[None])))
    assert ((scores >= 0) & (scores <= 1)).all()


def test_cross_entropy_is_its_formula():
    p, y = np.array([0.2, 0.7, 0.99]), np.array([0.0, 0.5, 1.0])
    found = np.array(rereading.cross_entropy(mx.array(np.log(p), mx.float32), mx.array(y, mx.float32)))
    np.testing.assert_allclose(found, -(y * np.log(p) + (1 - y) * np.log(1 - p)), rtol=1e-4)


def attention_of(model, tokens: list[int], layer: int) -> np.ndarray:
    """What stock mlx-lm's first layer gives: weights ``(H_q, T, T)``, by hand."""
    attention = model.model.layers[layer].self_attn
    x = model.model.layers[layer].input_layernorm(model.model.embed_tokens(mx.array(tokens)[None]))
    shape = lambda y, n: y.reshape(1, len(tokens), n, -1).transpose(0, 2, 1, 3)
    queries = attention.rope(shape(attention.q_proj(x), 4))
    keys = mx.repeat(attention.rope(shape(attention.k_proj(x), 2)), 2, axis=1)
    logits = np.array(queries @ keys.swapaxes(-1, -2))[0] * attention.scale
    logits = np.where(np.tril(np.ones((len(tokens), len(tokens)))) > 0, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_mass_is_what_later_tokens_attended_to(model):
    tokens = text(0, 96)
    reading = read(model, tokens, 16, segment=40)
    weights = attention_of(model, tokens, 0)
    age = np.arange(96)[:, None] - np.arange(96)
    expected = np.where(age >= 16, weights, 0).sum(axis=1).reshape(2, 2, 96).mean(axis=1)
    np.testing.assert_allclose(np.array(reading.layers[0].mass), expected, atol=1e-5)


@pytest.mark.parametrize("segment", [96, 40])  # the second reading starts in the middle of a segment of 40
def test_peak_is_what_the_second_reading_attends_to_most(model, segment):
    tokens = text(0, 96)
    weights = attention_of(model, [*tokens, *tokens], 0)
    far = np.arange(192)[:, None] - np.arange(192) >= 16
    again = np.where(far, weights, 0)[:, 96:, :96]
    plain = read(model, tokens, 16, twice=True, segment=segment).layers[0]
    np.testing.assert_allclose(np.array(plain.peak), again.max(axis=1).reshape(2, 2, 96).max(axis=1), atol=1e-5)

    reading = read(model, tokens, 16, twice=True, segment=segment, grams=projections(model))
    layer, attention = reading.layers[0], model.model.layers[0].self_attn
    assert layer.x.shape[0] == layer.keys.shape[1] == reading.top.shape[0] == 96
    block = model.model.layers[0]
    x = np.array(block.input_layernorm(model.model.embed_tokens(mx.array(tokens))))
    values = np.repeat(np.array(attention.v_proj(mx.array(x))).reshape(96, 2, 32), 2, axis=1)
    outputs = np.array(attention.o_proj.weight).reshape(128, 4, 32)
    added = np.linalg.norm(np.einsum("tnd,ond->nto", values, outputs), axis=-1)  # (H_q, T)
    effect = again * added[:, None] / np.linalg.norm(x, axis=1)[None, :, None]
    np.testing.assert_allclose(np.array(layer.peak), effect.max(axis=1).reshape(2, 2, 96).max(axis=1), rtol=1e-2)


def test_without_outputs_everything_else_is_the_same(model):
    whole, part = (read(model, text(3), 16, outputs=wanted) for wanted in (True, False))
    for one, other in zip(whole.layers, part.layers, strict=True):
        for name, x in vars(one).items():
            np.testing.assert_allclose(np.array(x), np.array(vars(other)[name]), atol=1e-6, err_msg=name)
    assert whole.top.shape == (512, 64) and part.top.size == part.top_ids.size == 0


def test_gram_reads_quantized_projections_and_gives_up_on_unknown_names(model):
    class Attention(nn.Module):
        def __init__(self, name: str, linear: nn.Module):
            super().__init__()
            setattr(self, name, linear)

    linear = nn.Linear(128, 64)
    found = gram(Attention("wo", nn.QuantizedLinear.from_linear(linear, 32, 8)), 4, 32)
    weight = np.array(linear.weight).reshape(64, 4, 32)
    np.testing.assert_allclose(np.array(found), np.einsum("ona,onb->nab", weight, weight), atol=2e-2)
    assert gram(Attention("other", linear), 4, 32) is None
    assert gram(Attention("wo", linear), 3, 32) is None  # another width


@pytest.mark.parametrize("form", ["linear", "mlp", "shared", "sink", "dms"])
def test_folded_gates_say_the_same_of_raw_inputs(model, pool, form):
    gates, whitening = shaken(gates_for(model, form)), Whitening.of(pool, form)
    folded = whitening.folded(gates)
    x = pool[0].layers[1].x[None]
    np.testing.assert_allclose(np.array(folded(1, x)), np.array(gates(1, whitening(1, x))), rtol=1e-3, atol=1e-3)
    again = whitening.unfolded(folded)
    np.testing.assert_allclose(
        np.array(again(1, whitening(1, x))), np.array(gates(1, whitening(1, x))), rtol=1e-3, atol=1e-3
    )
    back = Whitening.restored(whitening.arrays())
    assert mx.array_equal(back(1, x), whitening(1, x))


def test_whitened_inputs_have_one_scale(pool):
    whitening = Whitening.of(pool, "mlp")
    x = np.concatenate([np.array(whitening(0, r.layers[0].x)) for r in pool])
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-2)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-2)


def test_the_model_learns_no_faster_than_it_was_asked_to():
    """Gates' biases have a rate of their own; a model that learns with them may have biases, too."""
    assert Plan(method="retention").recipe.bias_rate > 0
    assert Plan(method="spkv", full=True).recipe.bias_rate == Plan(method="spkv", lora=8).recipe.bias_rate == 0
    assert Plan(method="retention").recipe.rate < RATES["shared"], "distillation at the first stage's rate undoes it"


def test_a_share_without_room_does_not_choose_the_gates():
    """Seen: at 1/16 of 1,024 tokens hardly more than the ring fits, and its noise outweighed what was learned at 1/8."""
    before, after = (0.0171, 0.1008, 0.8338), (0.0176, 0.0961, 0.8408)
    assert typical(after) < typical(before)
    assert typical((0.0, 1.0)) < 1, "a cache that is as good as the full one"
