"""How and where a run was measured: what the page of results says above each table."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("mlx-kvprune", "mlx", "mlx-lm")


def origin() -> dict[str, Any]:
    """Command, day, machine and versions; no paths but those that the user typed."""
    return {
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
    }


def command(argv: list[str] | None = None) -> str:
    """What was typed."""
    argv = sys.argv if argv is None else argv
    return shlex.join([Path(argv[0]).name.replace("__main__.py", "mlx-kvprune"), *argv[1:]])


def machine() -> str:
    """Processor, cores, system, and MLX's device."""
    import mlx.core as mx

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = "GPU" if mx.default_device() == mx.Device(mx.gpu) else "CPU"
    return f"{processor()}, {cores} cores, {platform.system()}, MLX on the {device}"


def processor() -> str:
    """The name of the processor, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> str:
    """Of what the numbers depend on."""
    return ", ".join(f"{name} {_version(name)}" for name in PACKAGES) + f", Python {platform.python_version()}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
