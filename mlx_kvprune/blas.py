"""A fast BLAS for MLX's CPU backend on Linux.

The ``mlx-cpu`` wheel links the reference BLAS (1 to 4 GFLOP/s). Whatever exports ``cblas_sgemm`` into the global
symbol scope *before* ``mlx.core`` is first imported is used instead. Two libraries can do that:

* a system OpenBLAS (``libopenblas.so.0``), used as it is;
* the OpenBLAS inside the PyPI wheel ``scipy-openblas32``, whose symbols carry the prefix ``scipy_``: a shim of two
  forwarding functions, compiled once into the user's cache, gives them their plain names.

``preload()`` runs when ``mlx_kvprune`` is imported and only loads what is there; ``build()`` compiles the shim.
``MLX_KVPRUNE_BLAS=off`` (or the path of a library) overrides the choice.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_kvprune.places import expand

SHIM = """
#define ARGS(T) int o, int ta, int tb, int m, int n, int k, T a, const T *A, int lda, const T *B, int ldb, T b, T *C, int ldc
#define PASS o, ta, tb, m, n, k, a, A, lda, B, ldb, b, C, ldc
extern "C" { void scipy_cblas_sgemm(ARGS(float)); void scipy_cblas_dgemm(ARGS(double));
void cblas_sgemm(ARGS(float)) { scipy_cblas_sgemm(PASS); }
void cblas_dgemm(ARGS(double)) { scipy_cblas_dgemm(PASS); } }
"""

_loaded: str | None = None  # what preload() found; a process can only choose once


def cache_dir() -> Path:
    """Where this package keeps what it can make again: ``$MLX_KVPRUNE_CACHE`` or ``~/.cache/mlx-kvprune``.

    Raises:
        ValueError: neither is known.
    """
    if chosen := os.environ.get("MLX_KVPRUNE_CACHE"):
        return expand(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-kvprune"
    except RuntimeError as error:
        raise ValueError("[cache] no home folder; got a user without one; try MLX_KVPRUNE_CACHE=/a/folder") from error


def wheel_library() -> Path | None:
    """The OpenBLAS inside the ``scipy-openblas32`` wheel, if that is installed."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    return library if library.exists() else None


def shim_path(library: Path) -> Path:
    """Where the shim for ``library`` lies once built; the name changes with the library and the shim's text."""
    text = f"{library.resolve()}:{library.stat().st_mtime_ns}:{SHIM}"
    return cache_dir() / f"blas-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"


def build() -> Path | None:
    """Compile the shim (0.3 s, once). Returns its path, or None where there is no wheel or no C++ compiler."""
    library = wheel_library()
    if not sys.platform.startswith("linux") or library is None:
        return None
    shim = shim_path(library)
    if shim.exists():
        return shim
    try:
        shim.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=shim.parent) as folder:
            source, made = Path(folder, "shim.cpp"), Path(folder, "shim.so")
            source.write_text(SHIM)
            compiler = os.environ.get("CXX", "c++")
            command = [compiler, "-O2", "-shared", "-fPIC", str(source), str(library)]
            command += [f"-Wl,-rpath,{library.parent}", "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True)
            made.replace(shim)
    except (OSError, subprocess.CalledProcessError):
        return None
    return shim


def preload() -> str | None:
    """Load a fast BLAS into the global scope if one is at hand; returns its path, or None.

    Does nothing on macOS (Accelerate is linked), after ``mlx.core`` was imported, or with ``MLX_KVPRUNE_BLAS=off``.
    """
    global _loaded
    choice = os.environ.get("MLX_KVPRUNE_BLAS", "")
    if _loaded or not sys.platform.startswith("linux") or choice == "off" or "mlx.core" in sys.modules:
        return _loaded
    for candidate in [choice] if choice else _candidates():
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = candidate
        break
    return _loaded


def _candidates() -> list[str]:
    library, shim = wheel_library(), []
    with contextlib.suppress(ValueError):  # who has no home folder has no shim either
        shim = [str(shim_path(library))] if library else []
    return [*shim, "libopenblas.so.0"]


def loaded() -> str | None:
    """The library that ``preload()`` put in front of MLX's own, or None."""
    return _loaded


if __name__ == "__main__":
    print(
        build()
        or preload()
        or "no fast BLAS: pip install scipy-openblas32 (and a C++ compiler), or libopenblas0-pthread"
    )
