"""The text handed to the compiler is the text that MLX builds, byte for byte."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest

from metal_emulator import Definition, exported_text, mlx_text
from metal_emulator.attend_body import definition, problem
from metal_emulator.wrapper import METAL_TYPES, PARAMETERS

N_CONFIGURATIONS = 150


def configuration(seed: int):
    """A random definition with inputs, template and output dtypes."""
    rng = random.Random(seed)
    dtypes = list(METAL_TYPES)
    names = ["a", "bb", "x_s", "q"][: rng.randint(1, 4)]
    outputs = [f"o{i}" for i in range(rng.randint(1, 3))]
    mentioned = rng.sample([name for name, _ in PARAMETERS], rng.randint(1, 5))
    mentioned += rng.sample([f"{n}_{kind}" for n in names for kind in ("shape", "strides", "ndim")], rng.randint(0, 3))
    values = [lambda: rng.choice(dtypes), lambda: rng.randint(-5, 300), lambda: rng.random() < 0.5]
    kernel = Definition(
        name=f"kernel{seed}",
        input_names=names,
        output_names=outputs,
        source=f"// {' '.join(mentioned)}\n  int z = 0;\n",
        header="// header\n" if seed % 2 else "",
        atomic_outputs=seed % 3 == 0,
    )
    inputs = [mx.zeros([rng.randint(1, 4) for _ in range(rng.randint(0, 3))], rng.choice(dtypes)) for _ in names]
    template = [(f"T{i}", rng.choice(values)()) for i in range(rng.randint(0, 3))]
    return kernel, inputs, template, [rng.choice(dtypes) for _ in outputs]


def test_random_configurations():
    for seed in range(N_CONFIGURATIONS):
        arguments = configuration(seed)
        assert mlx_text(*arguments) == exported_text(*arguments), f"configuration {seed}"


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("n_keys", [1, 37])
def test_attention(dtype, n_keys):
    call, _ = problem(n_keys, 64, dtype)
    arguments = (definition(), call["inputs"], call["template"], call["output_dtypes"])
    assert mlx_text(*arguments) == exported_text(*arguments)


def test_no_attributes():
    arguments = (Definition("none", ["x"], ["out"], "out[0] = x[0];"), [mx.zeros(9)], (), [mx.float32])
    assert mlx_text(*arguments) == exported_text(*arguments)


def test_python_scalars_and_strided_inputs():
    kernel = Definition("mixed", ["x", "n", "b"], ["out"], "out[0] = x[x_strides[0]] * n; // threads_per_grid")
    arguments = (kernel, [mx.zeros((4, 4)).T, 3, True], [("T", mx.float32)], [mx.float32])
    assert mlx_text(*arguments) == exported_text(*arguments)
