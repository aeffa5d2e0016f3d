"""mlx-kvprune: long documents and long reasoning with mlx-lm inside a KV cache of fixed size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_kvprune import blas

blas.preload()  # must come before the first import of mlx.core; does nothing on macOS

from mlx_kvprune.attach import attach, detach, make_cache  # noqa: E402
from mlx_kvprune.cache import PrunedKVCache  # noqa: E402
from mlx_kvprune.report import CacheReport, report  # noqa: E402
from mlx_kvprune.session import drop, end_turn, fork, load_cache, rewind, save_cache  # noqa: E402
from mlx_kvprune.settings import CacheSettings  # noqa: E402

if TYPE_CHECKING:
    from mlx_kvprune.models import known_models, load, pull

__version__ = "0.1.0"
__all__ = [
    "CacheReport",
    "CacheSettings",
    "PrunedKVCache",
    "__version__",
    "attach",
    "detach",
    "drop",
    "end_turn",
    "fork",
    "known_models",
    "load",
    "load_cache",
    "make_cache",
    "pull",
    "report",
    "rewind",
    "save_cache",
]


def __getattr__(name: str) -> Any:
    """What reads and converts models is imported on first use: ``mlx-kvprune --help`` should not wait for it."""
    if name not in ("known_models", "load", "pull"):
        raise AttributeError(f"module 'mlx_kvprune' has no attribute {name!r}")
    from mlx_kvprune import models

    return getattr(models, name)
