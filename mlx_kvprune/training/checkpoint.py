"""A training on the disk: one file, written beside and renamed, which the same command goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_kvprune.places import beside, check_file

KEY = "kvprune_training"
VERSION = "2"  # 1: what the ring holds decayed, too


@dataclass
class Progress:
    """Where a distillation stands.

    Attributes:
        done: steps.
        best: KL of the best gates on held-out texts, geometric mean over shares; infinite before the first look.
        stale: looks since then.
        seconds: that the training took so far.
        curve: KL of each step of training.
        checks: ``[step, {share: KL}]`` on held-out texts.
        pace: seconds that a step took, with all that is done between steps; zero before it is known.
    """

    done: int = 0
    best: float = float("inf")
    stale: int = 0
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)
    checks: list[list[Any]] = field(default_factory=list)
    pace: float = 0.0


def place(out: Path) -> Path:
    """The checkpoint of a gate file."""
    return out.with_name(f"{out.stem}.partial.safetensors")


def save(path: Path, arrays: dict[str, mx.array], plan: dict[str, Any], progress: Progress) -> None:
    """Write a checkpoint."""
    meta = {"version": VERSION, "plan": plan, "progress": vars(progress)}
    with beside(path) as work:
        action = lambda: mx.save_safetensors(str(work), arrays, {KEY: json.dumps(meta)})
        write(action, path, "to make room, and the same command: it goes on from the last checkpoint")


def write(action: Callable[[], Any], path: Path, advice: str = "another --out") -> Any:
    """Do what writes a file; says in one line what went wrong.

    Raises:
        ValueError: no room, or no right to write there.
    """
    try:
        return action()
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"[out] cannot write {path}; got {reason.rstrip('.')}; try {advice}") from error


def load(path: Path, plan: dict[str, Any]) -> tuple[dict[str, mx.array], Progress]:
    """The arrays of a checkpoint, and where it stands.

    Raises:
        ValueError: it is broken, or another command wrote it.
    """
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, meta = loaded
        found = json.loads(meta[KEY])
        progress = Progress(**found["progress"])
        assert found["version"] == VERSION
    except (RuntimeError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"[out] not a checkpoint that can be gone on with; got {path}; try --restart") from error
    for name, wanted in plan.items():
        if (had := found["plan"].get(name)) != wanted:
            raise ValueError(
                f"[{name.replace('_', '-')}] the training in {path.name} had another; got {wanted!r}, it had {had!r}; "
                "try the same command, or --restart"
            )
    return arrays, progress


def check_out(out: Path, restart: bool) -> None:
    """Refuse what could not be written after hours.

    Raises:
        ValueError: no such folder, no right to write, or a file that stands there.
    """
    check_file(out, "out", renamed=True)
    if out.exists() and not restart:
        raise ValueError(f"[out] stands there already; got {str(out)!r}; try another --out, or --restart")
    probe = out.with_name(f".{out.name}.{os.getpid()}")
    write(lambda: probe.write_bytes(b"x" * 4096), out)
    probe.unlink(missing_ok=True)
