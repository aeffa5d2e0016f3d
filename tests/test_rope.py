"""Rows rotated to positions of their own, and which rotations allow it, against the modules of mlx and mlx-lm."""

from __future__ import annotations

import copy
import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.deepseek_v2 import DeepseekV2YarnRotaryEmbedding
from mlx_lm.models.hunyuan import DynamicNTKAlphaRoPE
from mlx_lm.models.internlm3 import DynamicNTKScalingRoPE
from mlx_lm.models.muse_spark import VisionRoPE2D
from mlx_lm.models.rope_utils import SuScaledRoPE, initialize_rope
from mlx_lm.models.smollm3 import NoPE

from mlx_kvprune import rope as rope_module
from mlx_kvprune.rope import LONGEST, check_rankable, position_scale, rotate, rotate_rows, unrotate

D = 32
SCALING = {
    "default": {"type": "default"},
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn, mscale": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "proportional": {"type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
    "mrope, of text": {"type": "mrope", "mrope_section": [4, 6, 6]},
}


def by_config(kind: str, dims: int = D, traditional: bool = False) -> nn.Module:
    return initialize_rope(dims, 10000.0, traditional, SCALING[kind], 2048)


ALLOWED = {
    **{
        f"{kind}, {dims} of {D}, {'neighbours' if traditional else 'halves'}": by_config(kind, dims, traditional)
        for kind in SCALING
        for dims in (D, D // 2)
        for traditional in (False, True)
    },
    "deepseek": DeepseekV2YarnRotaryEmbedding(D, scaling_factor=4.0),
    "deepseek, mscale": DeepseekV2YarnRotaryEmbedding(D, scaling_factor=4.0, mscale=1, mscale_all_dim=0.5),
    "hunyuan": DynamicNTKAlphaRoPE(D, scaling_alpha=1000.0),
    "no positions": NoPE(),
}


class Unknown(nn.RoPE):
    """Behaves well, but nobody looked at it."""


def switched() -> nn.Module:
    """A class of a known name whose rotation depends on the length all the same."""

    class RoPE(nn.RoPE):
        def __call__(self, x, offset=0):
            long = isinstance(offset, int) and offset + x.shape[-2] > 4096
            return mx.fast.rope(x, self.dims, traditional=False, base=1e6 if long else 1e4, scale=1.0, offset=offset)

    return RoPE(D)


REFUSED = {
    "dynamic": (initialize_rope(D, 10000.0, False, {"type": "dynamic", "factor": 2.0}, 2048), "DynamicNTKScalingRoPE"),
    "internlm3": (DynamicNTKScalingRoPE(D), "DynamicNTKScalingRoPE"),
    "longrope": (SuScaledRoPE(D, long_factor=[2.0] * (D // 2)), "SuScaledRoPE"),
    "images": (VisionRoPE2D(head_dim=D), "VisionRoPE2D"),
    "sinusoidal": (nn.SinusoidalPositionalEncoding(D), "SinusoidalPositionalEncoding"),
    "alibi": (nn.ALiBi(), "ALiBi"),
    "unknown": (Unknown(D), "Unknown"),
    "switched": (switched(), "RoPE"),
}
every_type = pytest.mark.parametrize("rope", ALLOWED.values(), ids=ALLOWED)


def rows(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal((*shape, D), key=mx.random.key(seed))


def one_by_one(rope: nn.Module, x: mx.array, at: np.ndarray) -> np.ndarray:
    """What the model computes: each row of ``x (S, D)`` by a call of its own at its position."""
    return np.array(mx.concatenate([rope(x[None, None, i : i + 1], offset=int(p))[0, 0] for i, p in enumerate(at)]))


def close(a: mx.array, b: mx.array | np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(a.astype(mx.float32)), np.array(b), atol=tolerance, rtol=0)


@every_type
def test_each_row_stands_where_it_is_told(rope):
    """Exact, that is to 1e-5, at all positions: the module itself computed the angles."""
    at = np.array([0, 1, 7, 5, 5, 255, 256, 4095, 30000, LONGEST - 1])
    x = rows(len(at))
    close(rotate(rope, x, at), one_by_one(rope, x, at))
    close(rotate(rope, x, mx.array(at)), one_by_one(rope, x, at))


@every_type
def test_beyond_the_longest_table_and_before_zero(rope):
    at = np.array([100_000, 3, LONGEST, 99_999])
    x = rows(len(at))
    close(rotate(rope, x, at), one_by_one(rope, x, at))
    close(rotate(rope, x, -at), one_by_one(rope, x, -at))
    assert not rotate(rope, x[:0], at[:0]).size


@every_type
def test_consecutive_positions_are_the_modules_own_call(rope):
    x = rows(2, 3, 31)
    at = np.arange(90, 121)
    close(rotate(rope, x, at, 128), rope(x, offset=90))
    close(rotate_rows(rope, x, at), rope(x, offset=90))


@every_type
def test_back_again(rope):
    x, at = rows(1, 2, 33), np.arange(1000, 1033)
    close(unrotate(rope, rotate(rope, x, at), 1000), x, 2e-5)
    close(rotate(rope, unrotate(rope, rope(x, offset=1000), 1000), at), rope(x, offset=1000), 2e-5)
    scale = position_scale(rope, D) ** 2
    shuffled = np.random.default_rng(0).permutation(at)
    close(rotate(rope, rotate(rope, x, shuffled), -shuffled) / scale, x, 2e-5)


@every_type
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 3e-3), (mx.bfloat16, 3e-2)])
def test_half_types_are_rounded_once(rope, dtype, tolerance):
    """Nearer to the exact result than the module, which on a CPU rounds the cosines as well."""
    x, at = rows(1, 2, 33).astype(dtype), np.arange(500, 533)
    turned = rotate(rope, x, at)
    assert turned.dtype == dtype
    close(turned, rope(x.astype(mx.float32), offset=500), tolerance)


@every_type
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_shape_and_order(rope, data):
    """Heads that hold different tokens, positions shared by heads, by all, or by none."""
    batch, heads, n = (data.draw(st.integers(1, 3)) for _ in range(3))
    shape = data.draw(st.sampled_from([(batch, heads, n), (batch, 1, n), (heads, n), (n,), (1, 1, 1), ()]))
    at = np.array(data.draw(st.lists(st.integers(0, 3000), min_size=27, max_size=27)))[: int(np.prod(shape))].reshape(
        shape
    )
    x = rows(batch, heads, n, seed=data.draw(st.integers(0, 99)))
    all_at = np.broadcast_to(at, x.shape[:-1]).reshape(-1)
    want = one_by_one(rope, x.reshape(-1, D), all_at).reshape(x.shape)
    close(rotate(rope, x, at), want)
    close(rotate(rope, x, mx.array(at), data.draw(st.integers(3001, 9000))), want)
    close(rotate_rows(rope, x, at), want)


@every_type
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 60_000))
def test_products_depend_on_the_distance_alone(rope, p, q, shift):
    """Up to the rounding of the angles, half a unit in the last place of the position."""
    x = rows(2)
    product = lambda s: mx.prod(rotate(rope, x, np.array([p + s, q + s])), axis=0).sum()
    close(product(shift), product(0), 1e-4 + shift * 2.0**-20)


def test_without_positions_nothing_happens():
    x = rows(5)
    assert rotate(None, x, np.arange(5)) is x
    assert rotate_rows(None, x, np.arange(5)) is x
    check_rankable(None)


@every_type
def test_allowed(rope):
    check_rankable(rope)


@pytest.mark.parametrize(("rope", "name"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(rope, name):
    with pytest.raises(ValueError, match=rf"^\[positions\] .*; got {name}; try --positions text$"):
        check_rankable(rope)


@pytest.mark.parametrize("name", ["dynamic", "internlm3"])
def test_what_depends_on_length_is_also_found_out(name, monkeypatch):
    """A known name is not believed: the same classes, were they in the list."""
    rope, kind = REFUSED[name]
    monkeypatch.setattr(rope_module, "RELATIVE", (*rope_module.RELATIVE, kind))
    with pytest.raises(ValueError, match=kind):
        check_rankable(rope)


def test_layers_share_tables_and_modules_are_let_go():
    rope_module._tables.cache_clear()
    layers = [by_config("llama3") for _ in range(30)]
    for layer in layers * 2:
        rotate(layer, rows(9), np.arange(9), 200)
    assert rope_module._tables.cache_info().misses == 1
    gone = weakref.ref(layers[0])
    del layer, layers
    gc.collect()
    assert gone() is None


def test_tables_follow_a_change_of_the_module():
    rope = copy.deepcopy(by_config("llama3"))
    x, at = rows(9), np.arange(100, 109)
    close(rotate(rope, x, at), rope(x[None, None], offset=100)[0, 0])
    rope._freqs = rope._freqs * 3
    close(rotate(rope, x, at), rope(x[None, None], offset=100)[0, 0])
    rope.traditional = True
    close(rotate(rope, x, at), rope(x[None, None], offset=100)[0, 0])


def test_tables_do_not_pile_up():
    for base in range(100, 120):
        rotate(nn.RoPE(D, base=base), rows(9), np.arange(9))
    assert rope_module._tables.cache_info().currsize <= rope_module.TABLES
