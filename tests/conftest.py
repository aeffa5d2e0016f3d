"""Comes first, so that the fast BLAS is loaded before mlx."""

import sys
from pathlib import Path

import mlx_kvprune  # noqa: F401  # preloads the BLAS

sys.path.insert(0, str(Path(__file__).parent))
