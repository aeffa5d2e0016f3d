"""One tiny model for all tests of the command line."""

from pathlib import Path

import pytest
from cli_helpers import tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a trained context of 300 tokens."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "short", context=300)
