"""One tiny model that is read, for all tests of training."""

import pytest
import tiny_models as zoo
from training_helpers import readings

import mlx_kvprune as kvp


@pytest.fixture(scope="module")
def model():
    found = zoo.tiny_model("llama")
    yield found
    kvp.detach(found)


@pytest.fixture(scope="module")
def pool(model):
    return readings(model, 3)


@pytest.fixture(scope="module")
def held(model):
    return readings(model, 2, first=10)
