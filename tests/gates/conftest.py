"""A model with gates, the same for every test of a module that asks for it."""

import pytest
from gate_helpers import gated_model, given_gates

import mlx_kvprune as kvp


@pytest.fixture(scope="module", name="model")
def _model():
    made = gated_model("llama")
    given_gates(made)
    yield made
    kvp.detach(made)
