"""``doctor``: whether all of it works on this machine."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from mlx_kvprune.cli.options import Json, spread

EPILOG = """Examples:

  mlx-kvprune doctor

  mlx-kvprune doctor > report.txt (the block for a bug report alone)

  mlx-kvprune doctor --json | tail -1

  MLX_KVPRUNE_KERNELS=0 mlx-kvprune doctor (the same without kernels)
"""
SLOW_BLAS = 10  # GFLOP/s; the BLAS in MLX's Linux wheel gives 1 to 4, OpenBLAS 50 and more on one core
LITTLE_DISK = 2 * 10**9  # bytes that a small model takes, converted, with room
WIDTH = 78
Fields = dict[str, Any]


@spread
def doctor(json: Json = False) -> None:
    """Check this machine: versions, memory, BLAS, every kernel against its reference, bandwidth. Takes seconds.

    Ends with a block to paste into a bug report; it names no user and no folder.

    Exit code 1 if a kernel gave wrong results or did not compile, or a measurement failed; 0 if it only cannot run here.

    A kernel that is off costs speed, not answers: plain MLX operations take its place.
    """
    from mlx_kvprune.cli import output

    with output.working("checking kernels, measuring bandwidth"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kernel .* is off", RuntimeWarning)  # a table says so
        found = examine()
    for line, style in sections(found):
        output.say(line, style)
    if json:
        output.write_json(found)
    else:
        output.write(found["block"] + "\n")
    if not found["ok"]:
        raise typer.Exit(1)


def examine() -> Fields:
    """All that is found out, as ``--json`` has it."""
    from mlx_kvprune.cli import machine
    from mlx_kvprune.kernels.launch import engine

    found: Fields = {"backend": engine() or "cpu", "machine": machine.about(), "device": machine.device()}
    found |= {"versions": machine.versions(), "environment": machine.settings(), "kernels": kernels()}
    found["blas"] = blas_speed(machine.blas_name())
    found["bandwidth"] = bandwidth()
    failed = any(kernel["failed"] for kernel in found["kernels"])
    found["ok"] = not failed and found["bandwidth"]["failure"] is None
    found["advice"] = advice(found)
    found["block"] = block(found)
    return found


# -- what is found out -----------------------------------------------------------------------------------------------


def kernels() -> list[Fields]:
    """Every kernel: whether it may be used, and what its self-check found."""
    from mlx_kvprune.kernels.checks import checks, outcome

    return [_kernel(name, check.limit, outcome(name)) for name, check in checks().items()]


def _kernel(name: str, limit: float, found: Any) -> Fields:
    from mlx_kvprune.cli.machine import scrubbed

    error = found.error if found.error is not None and math.isfinite(found.error) else None  # JSON has no NaN
    fields = {"name": name, "works": not found.reason, "failed": found.failed, "reason": scrubbed(found.reason)}
    return {**fields, "error": error, "limit": limit, "launches": found.launches}


def blas_speed(name: str) -> Fields:
    from mlx_kvprune.bench.bandwidth import matmul_speed

    speed = matmul_speed()[0]
    return {"name": name, "gflops": round(speed, 1), "slow": speed < SLOW_BLAS}


def bandwidth() -> Fields:
    """A copy, and attention as a decode step does it; GB/s as median, least, most."""
    from mlx_kvprune.bench.bandwidth import attend_bandwidth, copy_bandwidth, usual_attention, usual_load

    load = usual_load()
    name, run = usual_attention(load)
    copy, failure = _tried(copy_bandwidth)
    reached, other = _tried(lambda: attend_bandwidth(run, load))
    share = round(reached[0] / copy[0], 3) if copy and reached else None
    fields = {"copy_gb_s": copy, "attend_gb_s": reached, "attend_share": share, "attend_backend": name}
    return {**fields, "attend_load": str(load), "failure": failure or other}


def _tried(measure: Callable[[], list[float]]) -> tuple[list[float] | None, str | None]:
    """A measurement, or why there is none: a machine that is ill has to be told so, not shown a traceback."""
    from mlx_kvprune.cli.machine import scrubbed

    try:
        return measure(), None
    except Exception as failure:
        return None, scrubbed(" ".join(f"{type(failure).__name__}: {failure}".split()))


def advice(found: Fields) -> list[str]:
    """What the user can do about what was found."""
    told = []
    if names := [kernel["name"] for kernel in found["kernels"] if kernel["failed"]]:
        one = len(names) == 1
        what = f"{'kernel' if one else 'kernels'} {', '.join(names)} {'is' if one else 'are'} off"
        told.append(f"{what}: answers are right, but slower; please report it with the block below")
    if found["bandwidth"]["failure"]:
        told.append("a measurement failed; please report it with the block below")
    if found["blas"]["slow"] and found["backend"] == "cpu":
        told.append(_blas_advice())
    free = found["machine"]["disk_free_bytes"]
    if free is not None and free < LITTLE_DISK:
        told.append("little room is left for models; MLX_KVPRUNE_CACHE=FOLDER puts them elsewhere")
    return told


def _blas_advice() -> str:
    """How a slow BLAS becomes a fast one; README, "Where it runs"."""
    from mlx_kvprune import blas

    if os.environ.get("MLX_KVPRUNE_BLAS"):
        return "the BLAS is slow: unset MLX_KVPRUNE_BLAS, then run `mlx-kvprune doctor` again"
    if blas.loaded() is not None or sys.platform == "darwin":
        return "the BLAS is slow, though it is a fast one: other programs may keep the cores busy"
    build = 'python -c "from mlx_kvprune import blas; print(blas.build())"'
    if blas.wheel_library() is not None:
        return f"the BLAS is slow: with a C++ compiler installed, run `{build}` once"
    return f"the BLAS is slow: install the extra `cpu` (`pip install '.[cpu]'`) and a C++ compiler, then run `{build}` once"


# -- what is said ----------------------------------------------------------------------------------------------------


def sections(found: Fields) -> list[tuple[str, str | None]]:
    """Lines for people, each with its style."""
    from mlx_kvprune.cli.output import aligned

    rows = aligned([("machine", _machine(found)), *_lines(found)])
    lines: list[tuple[str, str | None]] = [(row, None) for row in rows]
    lines += [("", None), *_kernel_lines(found["kernels"]), ("", None)]
    lines += [(f"! {text}", "yellow" if found["ok"] else "red") for text in found["advice"]]
    return [*lines, (_conclusion(found), "green" if found["ok"] else "red"), ("", None)]


def _lines(found: Fields) -> list[tuple[str, str]]:
    """Name and text of what people and bug reports are told alike."""
    lines = [("versions", _versions(found["versions"])), ("backend", _backend(found))]
    lines.append(("blas", f"{found['blas']['name']}: {found['blas']['gflops']:.0f} GFLOP/s in float32, on the CPU"))
    return [*lines, *_bandwidth_lines(found["bandwidth"])]


def _machine(found: Fields) -> str:
    from mlx_kvprune.cli.output import megabytes

    told = found["machine"]
    size = lambda name: "?" if told[name] is None else megabytes(told[name])
    text = f"{told['system']} {told['architecture']}, {told['chip'] or 'unknown chip'}, {told['cores']} cores"
    text += f"; memory {size('memory_bytes')}, {size('memory_available_bytes')} available"
    return f"{text}; {size('disk_free_bytes')} free in the cache folder"


def _versions(told: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in told.items())


def _backend(found: Fields) -> str:
    told = found["device"]
    text = f"{found['backend']} ({told.get('device_name', 'unnamed')}, {told.get('architecture', '?')}"
    if (most := told.get("max_recommended_working_set_size")) is not None:
        from mlx_kvprune.cli.output import megabytes

        text += f", {megabytes(int(most))} for MLX at most"
    return text + ")"


def _bandwidth_lines(told: Fields) -> list[tuple[str, str]]:
    from mlx_kvprune.bench.variants import text_of

    rate = lambda spread: "not measured" if spread is None else f"{text_of(spread, '.1f')} GB/s"
    share = "" if told["attend_share"] is None else f", {told['attend_share']:.0%} of a copy's"
    name = "reference in plain MLX operations" if told["attend_backend"] == "ops" else told["attend_backend"]
    lines = [("copy", rate(told["copy_gb_s"]))]
    lines.append(("attention", f"{rate(told['attend_gb_s'])}{share}; {name}; {told['attend_load']}"))
    return lines + ([("failure", told["failure"])] if told["failure"] else [])


def _kernel_lines(told: list[Fields]) -> list[tuple[str, str | None]]:
    from mlx_kvprune.cli.output import aligned

    if not told:
        return [("kernels    this version has none", None)]
    table = aligned([("KERNEL", "STATE", "ERROR", "LIMIT", "LAUNCHES"), *map(_cells, told)])
    lines: list[tuple[str, str | None]] = [(table[0], None)]
    for kernel, row in zip(told, table[1:], strict=True):
        lines.append((row, "green" if kernel["works"] else "red" if kernel["failed"] else "dim"))
    return lines + [(line, "dim") for line in _reasons(told)]


def _reasons(told: list[Fields]) -> list[str]:
    """Why kernels are not used; a reason that several share is said once."""
    names: dict[str, list[str]] = {}
    for kernel in told:
        if kernel["reason"]:
            names.setdefault(kernel["reason"], []).append(kernel["name"])
    return [reason if len(those) == len(told) else f"{', '.join(those)}: {reason}" for reason, those in names.items()]


def _cells(kernel: Fields) -> tuple[str, ...]:
    error = "-" if kernel["error"] is None else f"{kernel['error']:.2g}"
    return (kernel["name"], _state(kernel), error, f"{kernel['limit']:.2g}", str(kernel["launches"] or "-"))


def _state(kernel: Fields) -> str:
    return "works" if kernel["works"] else "FAILED" if kernel["failed"] else "unavailable"


def _conclusion(found: Fields) -> str:
    if not found["ok"]:
        return "Not all is well."
    if found["advice"]:
        return "It works; the lines above that begin with ! say what could be better."
    if all(kernel["works"] for kernel in found["kernels"]):
        return "All is well."
    return "All is well; kernels are not used here: plain MLX operations are."


def block(found: Fields) -> str:
    """What to paste into a bug report."""
    lines = ["-- mlx-kvprune doctor ".ljust(WIDTH, "-"), _machine(found)]
    lines += [f"{name}: {text}" for name, text in _lines(found)]
    lines += [f"kernel {' '.join(_of_kernel(kernel))}" for kernel in found["kernels"]]
    lines += [f"{name}={value}" for name, value in found["environment"].items()]
    lines += [f"ok: {found['ok']}", "-" * WIDTH]
    return "\n".join(lines)


def _of_kernel(kernel: Fields) -> list[str]:
    name, state, error, limit, launches = _cells(kernel)
    measured = f" error {error}, limit {limit}, {launches} launches" if kernel["error"] is not None else ""
    return [f"{name}: {state}{measured}", *([f"({kernel['reason']})"] if kernel["reason"] else [])]
