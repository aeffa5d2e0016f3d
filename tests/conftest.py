"""Comes first, so that the fast BLAS is loaded before mlx."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: a BLAS thread each, before the BLAS is loaded
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

import mlx_kvprune  # noqa: F401  # preloads the BLAS

sys.path.insert(0, str(Path(__file__).parent))
