"""What the verbs print: text and JSON on standard output, everything else on standard error."""

from __future__ import annotations

import functools
import json
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from mlx_kvprune.report import CacheReport

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_kvprune.cli.stream import Run

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@functools.cache
def console() -> Console:
    """The console on standard error; no control codes where that is no terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """A line for the user on standard error."""
    console().print(text, style=style)


def working(what: str) -> AbstractContextManager[Any]:
    """Show on a terminal that something is under way."""
    return console().status(f"{what} ...") if sys.stderr.isatty() else nullcontext()


def write(text: str) -> None:
    """Text of the model on standard output, at once; a terminal is spared the control codes that a model may write."""
    sys.stdout.write(CONTROL.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(fields: dict[str, Any]) -> None:
    """One JSON object on a line of its own, the last of standard output."""
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def fields_of(model: str, report: CacheReport, run: Run) -> dict[str, Any]:
    """The fields of ``--json``."""
    return {
        "model": model,
        "policy": report.policy,
        "allocator": report.allocator,
        "budget": report.budget,
        "prompt_tokens": run.prompt_tokens,
        "generated_tokens": run.generated_tokens,
        "text": run.text,
        "finish_reason": run.finish_reason,
        "tokens_seen": report.tokens_seen,
        "slots_held": report.slots_held,
        "kv_bytes": report.kv_bytes,
        "kv_bytes_peak": report.kv_bytes_peak,
        "kv_bytes_full": report.kv_bytes_full,
        "kv_bytes_other": report.kv_bytes_other,
        "prefill_tps": _rounded(run.prefill_tps),
        "decode_tps": _rounded(run.decode_tps),
        "ttft_s": _rounded(run.ttft_s),
        "peak_memory_bytes": peak_memory(),
        "attend_backend": report.attend_backend,
        "attend_reason": report.attend_reason,
    }


def peak_memory() -> int:
    """The most that MLX had allocated in this process, the model's weights included, in bytes."""
    import mlx.core as mx

    return int(mx.get_peak_memory())


def summary(report: CacheReport, cache: list[Any], run: Run) -> None:
    """What a run cost, in three lines."""
    say(fill_line(report, cache), "dim")
    say(bytes_line(report), "dim")
    say(speed_line(run), "dim")


def fill_line(report: CacheReport, cache: list[Any]) -> str:
    """How full the cache is, as a bar; where layers or heads differ, on average over them."""
    cap, name = capacity(cache), f"policy {report.policy}"
    if cap is None:
        return f"cache  {report.slots_held:,} slots per KV head, no bound; {name}"
    held, even = slots_held(cache), report.allocator == "uniform"
    more = "" if even else f" on average, {report.slots_held:,} at most"
    name += "" if even else f", allocator {report.allocator}"
    return f"cache  [{bar(held, cap)}] {held:,} of {cap:,} slots per KV head{more}; {name}"


def bytes_line(report: CacheReport) -> str:
    """Bytes held, against what an unpruned cache would take."""
    line = f"memory {megabytes(report.kv_bytes)} held"
    if report.policy == "full":
        line += f" for {report.tokens_seen:,} tokens"
    else:
        saved = report.kv_bytes_full / max(1, report.kv_bytes)
        line += f"; the full cache of {report.tokens_seen:,} tokens would take {megabytes(report.kv_bytes_full)}"
        line += f" ({saved:.1f} times as much)" if saved >= 1.05 else ""
    return line + (f"; {megabytes(report.kv_bytes_other)} in layers left alone" if report.kv_bytes_other else "")


def speed_line(run: Run) -> str:
    """Tokens, and tokens per second."""
    line = f"speed  {run.prompt_tokens:,} prompt tokens" + (
        f" at {run.prefill_tps:.0f} tok/s" if run.prefill_tps else ""
    )
    line += f"; {run.generated_tokens:,} generated" + (f" at {run.decode_tps:.1f} tok/s" if run.decode_tps else "")
    return line + (f"; the first after {run.ttft_s:.1f} s" if run.ttft_s is not None else "")


def capacity(cache: list[Any]) -> int | None:
    """The most slots per KV head that the caches may hold, on average over their layers; None without a bound."""
    from mlx_kvprune.forward import pruned

    bounded = pruned(cache)
    if not bounded or any(c.slots is None for c in bounded):
        return None
    return round(sum(c.slots or 0 for c in bounded) / len(bounded))


def slots_held(cache: list[Any]) -> int:
    """Slots per KV head, on average over layers and heads."""
    from mlx_kvprune.forward import pruned

    bounded = [c for c in pruned(cache) if not c.empty()]
    heads = sum(c.held.ring.keys.shape[0] * c.held.ring.keys.shape[1] for c in bounded)
    return round(sum(c.held.held() for c in bounded) / max(1, heads))


def bar(part: int, whole: int, width: int = 24) -> str:
    """``####----``."""
    filled = min(width, round(width * part / max(1, whole)))
    return "#" * filled + "-" * (width - filled)


def megabytes(nbytes: int) -> str:
    """Bytes as people write them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"


def table(rows: list[tuple[str, ...]]) -> None:
    """Rows in aligned columns on standard output."""
    sys.stdout.write("".join(line + "\n" for line in aligned(rows)))
    sys.stdout.flush()


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """A line per row, the cells of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
