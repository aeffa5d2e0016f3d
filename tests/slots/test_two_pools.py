"""A fine pool beside a coarse one, whose size is no multiple of the block that leaves the ring."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_model

import mlx_kvprune as kvp
from mlx_kvprune.forward import pruned

LENGTH = 200


@pytest.mark.parametrize("allocator", ["uniform", "head_adaptive"])
@pytest.mark.parametrize("fine", [0, 8, 20, 32, 48, 100])
def test_nothing_is_held_that_was_never_read(fine, allocator):
    model = tiny_model("llama")
    ids = mx.array(np.random.default_rng(0).integers(0, 128, LENGTH))[None]
    full = model(ids)
    cache = kvp.make_cache(
        model,
        policy="knorm",
        budget=400,
        allocator=allocator,
        window=16,
        kv_bits=8,
        kv_group_size=32,
        kv_fine_tokens=fine,
    )
    logits = mx.concatenate([model(ids[:, at : at + 50], cache=cache) for at in range(0, LENGTH, 50)], axis=1)
    assert mx.abs(logits - full).max() < 0.06  # what 8 bits cost; slots that were never filled cost 0.3 and more
    for one in pruned(cache):
        assert not one.evicted
        for head in np.array(one.held.positions()[0]):
            assert sorted(head[head >= 0]) == list(range(LENGTH))
        assert one.size() == LENGTH
