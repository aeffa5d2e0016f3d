"""Whether a kernel may be used here: at its first use it is compared with its reference, once.

The modules of ``MODULES`` have ``self_check()``, which runs their kernel and its reference and returns the largest error, and
``LIMIT``, the most that it may be; their wrappers ask ``verdict(name)``. A self-check draws no numbers from MLX's global
random stream: it runs in the middle of somebody's inference.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from importlib import import_module

from mlx_kvprune.kernels import launch

MODULES = ("attend_slots", "pack_rows", "choose_slots")
SWITCH = "MLX_KVPRUNE_KERNELS"
NO_GPU = "no GPU: MLX runs on the CPU"
LONGEST = 300  # characters of an error that are worth a line


@dataclass(frozen=True)
class Check:
    """How a kernel is compared with its reference.

    Attributes:
        name: of the kernel.
        run: runs both; returns the largest error.
        limit: the most that it may be.
    """

    name: str
    run: Callable[[], float]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """What is known of a kernel.

    Attributes:
        reason: why it may not be used, in one line; empty if it may.
        failed: whether it was tried and found wrong; False where it cannot run at all, or is switched off.
        error: the largest error against the reference; None if it was not tried, or raised.
        launches: calls of kernels in the check; without any, it has compared the reference with itself.
    """

    reason: str = ""
    failed: bool = False
    error: float | None = None
    launches: int = 0


_known: dict[tuple[str, str], Outcome] = {}  # by name and engine
_proven: set[tuple[str, str, Hashable]] = set()  # variants that agreed
_warned: set[tuple[str, str]] = set()
_running: set[str] = set()
_lock = threading.RLock()


def checks() -> dict[str, Check]:
    """The self-checks of the kernels that this version has, by name."""
    found = {}
    for name in MODULES:
        try:
            module = import_module(f"{__package__}.{name}")
        except ModuleNotFoundError as missing:
            if missing.name != f"{__package__}.{name}":
                raise
            continue
        found[name] = Check(name, module.self_check, module.LIMIT)
    return found


def verdict(name: str) -> str:
    """Empty if the kernel may be used; else why not. One that fails its self-check is warned of, once."""
    found = outcome(name)
    if found.failed:
        _warn(name, found.reason)
    return found.reason


def outcome(name: str) -> Outcome:
    """What is known of a kernel on the present engine; its first use there runs its self-check. Warns of nothing."""
    engine = launch.engine()
    if off := _switched_off() or ("" if engine else NO_GPU):
        return Outcome(off)
    return _known.get((name, engine)) or _first_use(name, engine)


def refuted(name: str, variant: Hashable, run: Callable[[], float], limit: float) -> bool:
    """Whether a variant of a kernel (its constants) is wrong where it is first used; then all of the kernel is off.

    The self-check compiles one variant. Others may not compile, or need more registers than a threadgroup can have.

    Args:
        name: of the kernel.
        variant: what it is compiled for.
        run: runs it and its reference on what it is to be used for; returns the largest error. Called once.
        limit: the most that it may be.
    """
    key = (name, launch.engine(), variant)
    if key in _proven or name in _running:
        return False
    with _lock:
        if key not in _proven:
            found = _tried(Check(name, run, limit))
            if found.failed:
                _known[name, key[1]] = found
                _warn(name, found.reason)
                return True
            _proven.add(key)
    return False


def _switched_off() -> str:
    chosen = os.environ.get(SWITCH, "")
    return f"{SWITCH}={chosen} turns kernels off" if chosen.lower() in ("0", "off") else ""


def _first_use(name: str, engine: str) -> Outcome:
    with _lock:
        if name in _running:  # the self-check itself, through the kernel's own wrapper
            return Outcome()
        if (name, engine) not in _known:  # else another thread was first
            _running.add(name)
            try:
                _known[name, engine] = _tried(checks()[name])
            finally:
                _running.remove(name)
        return _known[name, engine]


def _tried(check: Check) -> Outcome:
    before = launch.launches.total()
    try:
        error = float(check.run())
    except Exception as failure:  # whatever a compiler or a driver may say; the reference still answers
        return Outcome(f"its self-check raised {_line(failure)}", True, None, launch.launches.total() - before)
    launches = launch.launches.total() - before
    if error <= check.limit:
        return Outcome("", False, error, launches)
    reason = f"its self-check found an error of {error:.3g}, not within the limit of {check.limit:.3g}"
    return Outcome(reason, True, error, launches)


def _line(failure: Exception) -> str:
    """An exception in one line."""
    text = " ".join(f"{type(failure).__name__}: {failure}".split())
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


def _warn(name: str, reason: str) -> None:
    """``warnings.warn``, without the line of source code that Python would print below it."""
    key = (name, launch.engine())
    if key in _warned:
        return
    _warned.add(key)
    text = f"kernel {name} is off: {reason}; plain MLX operations are used instead (see `mlx-kvprune doctor`)"
    warnings.warn_explicit(text, RuntimeWarning, filename="mlx-kvprune", lineno=1)
