"""The benchmark of kernels, as far as it can be run without a GPU."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvprune.bench import kernels


def test_every_way_attends_to_what_it_holds():
    steps = kernels._steps(heads=2, gqa=2, slots=128, width=64)
    queries = mx.random.normal((1, 4, 1, 64)).astype(mx.bfloat16)
    outs = {name: np.array(step(queries).astype(mx.float32)) for name, (step, _) in steps.items()}
    assert all(out.shape == (1, 4, 1, 64) and np.isfinite(out).all() for out in outs.values())
    nbytes = {name: n for name, (_, n) in steps.items()}
    assert nbytes["ours, bfloat16"] == nbytes["mx.fast, full cache"] == 2 * 2 * 128 * 64 * 2
    assert nbytes["ours, 4 bits"] == nbytes["mlx-lm, 4 bits"] == 2 * 2 * 128 * (32 + 4)
    assert nbytes["ours, 4 bits, ragged pages"] == nbytes["ours, 4 bits"]
    assert np.abs(outs["mlx-lm, 8 bits"] - outs["mx.fast, full cache"]).max() < 0.1


def test_needs_a_gpu():
    with pytest.raises(ValueError, match="measures a GPU; got MLX on the CPU"):
        kernels.kernel_table([4096], print)
