"""What a bug report has to say about the machine: system, chip, memory, disk, versions."""

from __future__ import annotations

import getpass
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_kvprune import blas

PACKAGES = ("mlx-kvprune", "mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "numpy")
SETTINGS = ("MLX_KVPRUNE_KERNELS", "MLX_KVPRUNE_BLAS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def about() -> dict[str, Any]:
    """The machine; what it does not tell is None."""
    import mlx.core as mx

    return {
        "system": _system(),
        "architecture": platform.machine(),
        "chip": mx.device_info(mx.Device(mx.DeviceType.cpu)).get("device_name") or platform.processor() or None,
        "cores": os.cpu_count(),
        "memory_bytes": memory_total(),
        "memory_available_bytes": memory_available(),
        "disk_free_bytes": disk_free(blas.cache_dir()),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def settings() -> dict[str, str]:
    """Environment variables that change what is measured here."""
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def device() -> dict[str, str | int | float]:
    """What MLX says about the device that it computes on."""
    import mlx.core as mx

    told = mx.device_info(mx.default_device())
    return {name: value for name, value in sorted(told.items()) if isinstance(value, str | int | float)}


def blas_name() -> str:
    """The BLAS that MLX uses on the CPU."""
    if sys.platform == "darwin":
        return "Accelerate"
    library = blas.loaded()
    if library is None:
        return "as shipped with MLX"
    return "OpenBLAS of scipy-openblas32" if Path(library).name.startswith("blas-") else Path(library).name


def memory_total() -> int | None:
    """Bytes of memory; in a container its limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def memory_available() -> int | None:
    """Bytes that a program could still get without swapping, by the system's own estimate."""
    if sys.platform == "darwin":
        return of_vm_stat(_told("vm_stat"))
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    total = memory_total()
    return None if found is None else min(1024 * int(found[1]), total or sys.maxsize)


def of_vm_stat(text: str) -> int | None:
    """Free, inactive and speculative pages of macOS's ``vm_stat``, in bytes."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"Pages (?:free|inactive|speculative):\s+(\d+)", text)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def disk_free(folder: Path) -> int | None:
    """Free bytes where a folder lies, or would lie."""
    here = next((p for p in (folder, *folder.parents) if p.exists()), None)
    return None if here is None else shutil.disk_usage(here).free


def scrubbed(text: str) -> str:
    """A text without home folders and the user's name (``root`` is nobody's, and a word)."""
    text = text.replace(str(Path.home()), "~")
    text = re.sub(r"(/Users|/home)/[^/\s:;,'\"]+", "~", text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        return text
    return text if user == "root" else re.sub(rf"\b{re.escape(user)}\b", "USER", text)


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _told(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
