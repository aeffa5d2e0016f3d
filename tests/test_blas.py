"""The BLAS shim is built, loaded before MLX, and used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_kvprune import blas

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS has Accelerate")


def run(code: str, **environment: str) -> str:
    env = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    ).stdout.strip()


@pytest.mark.skipif(blas.wheel_library() is None, reason="needs scipy-openblas32")
def test_build_and_load(tmp_path):
    code = "from mlx_kvprune import blas; print(blas.build())"
    path = run(code, MLX_KVPRUNE_CACHE=str(tmp_path))
    assert path.startswith(str(tmp_path))
    assert run("import mlx_kvprune as k; print(k.blas.loaded())", MLX_KVPRUNE_CACHE=str(tmp_path)) == path
    used = "import mlx_kvprune, mlx.core as mx; a = mx.ones((64, 64)); print((a @ a).sum().item())"
    assert run(used, MLX_KVPRUNE_CACHE=str(tmp_path)) == str(64.0**3)


def test_off_and_wrong_choices_do_not_break_the_import(tmp_path):
    code = "import mlx_kvprune as k; print(k.blas.loaded())"
    assert run(code, MLX_KVPRUNE_BLAS="off") == "None"
    assert run(code, MLX_KVPRUNE_BLAS=str(tmp_path / "no.so")) == "None"


def test_no_compiler_gives_none(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("MLX_KVPRUNE_CACHE", str(tmp_path))
    assert blas.build() is None


def test_no_home_folder(monkeypatch):
    """A user without one, as in some containers: the import works, and what needs a folder says how to name one."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MLX_KVPRUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(blas.Path, "home", none)
    assert blas._candidates() == ["libopenblas.so.0"]
    with pytest.raises(ValueError, match=r"no home folder; got a user without one; try MLX_KVPRUNE_CACHE=/a/folder"):
        blas.cache_dir()
