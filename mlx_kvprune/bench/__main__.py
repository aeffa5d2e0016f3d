"""``python -m mlx_kvprune.bench``: prefill, decode and bytes, ours and stock mlx-lm's, interleaved in one process.

``mlx-kvprune bench`` measures more, by context, and can be resumed. This one compares stock's prefill steps, and is what
earlier numbers were measured with.

A machine's speed drifts by the minute. So all candidates read the same piece of text one after the other before any of
them goes on to the next, and a ratio compares times of the same minute. Prints medians, spread and ratios; the last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from mlx_kvprune import attach, blas, make_cache, report  # first: the fast BLAS comes before mlx.core
from mlx_kvprune.bench.equal import equal_length
from mlx_kvprune.bench.variants import decode_seconds, made, spread_of, text_of, text_of_length

import mlx.core as mx  # isort: skip

PIECE = 2048


@dataclass
class Candidate:
    """One way to read a text: a name, a cache, a prefill step, and the seconds of each piece."""

    name: str
    cache: list[Any]
    step: int
    seconds: list[float] = field(default_factory=list)

    def read(self, model: Any, tokens: list[int]) -> None:
        start = time.perf_counter()
        for i in range(0, len(tokens), self.step):
            model(mx.array(tokens[i : i + self.step])[None], cache=self.cache)
            mx.eval([c.state for c in self.cache])
            mx.clear_cache()
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    args = _arguments()
    if args.kernels:
        from mlx_kvprune.bench.kernels import kernel_table

        try:
            print(json.dumps(kernel_table(args.kernels, _say)))
        except ValueError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        return
    from mlx_kvprune.models import load

    model, tokenizer = load(args.model, dtype="float32")
    attach(model, policy="window", budget=args.budget, quiet=True)
    tokens = text_of_length(tokenizer, args.tokens)
    _say(f"{args.model} float32, {mx.default_device()}, BLAS {'fast' if blas.loaded() else 'as shipped'}")
    result: dict[str, Any] = {"model": args.model, "tokens": args.tokens, "budget": args.budget, "reps": args.reps}
    result["prefill"], caches = prefill(model, tokens, args)
    result["decode"] = decode(model, caches, tokens, args)
    result["bytes"] = resident(caches)
    result["memory"] = growth(model, args)
    result["help_s"] = help_seconds()
    if args.equal_slots:
        result["equal_length"] = equal_length(model, args.equal_slots, args.equal, args.decode_rounds, _say)
    print(json.dumps(result))


def prefill(model: Any, tokens: list[int], args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Tokens per second of each candidate over the whole text, and its ratio to stock at stock's best step."""
    rates: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    candidates: list[Candidate] = []
    for rep in range(args.reps):
        candidates = _candidates(model, args)
        for start in range(0, len(tokens), PIECE):
            for c in candidates[rep % len(candidates) :] + candidates[: rep % len(candidates)]:
                c.read(model, tokens[start : start + PIECE])
            _say(f"  repetition {rep + 1}/{args.reps}: {min(start + PIECE, len(tokens))} of {len(tokens)} tokens")
        best = min(sum(c.seconds) for c in candidates if c.name.startswith("stock"))
        for c in candidates:
            rates.setdefault(c.name, []).append(len(tokens) / sum(c.seconds))
            ratios.setdefault(c.name, []).append(best / sum(c.seconds))
    table = {name: {"tps": spread_of(rates[name]), "to_best_stock": spread_of(ratios[name])} for name in rates}
    _say(f"prefill of {len(tokens)} tokens, budget {args.budget}: tok/s, and times stock's best")
    for name, row in table.items():
        _say(f"  {name:34s} {text_of(row['tps'], '7.1f')}   x{text_of(row['to_best_stock'], '.2f')}")
    return table, {c.name: c.cache for c in candidates}


def _candidates(model: Any, args: argparse.Namespace) -> list[Candidate]:
    stock = [Candidate(f"stock, step {s}", make_cache(model, "full"), s) for s in args.stock_steps]
    ours = [Candidate(p, made(model, p, args.budget), args.step) for p in args.policies]
    return [*stock, *ours]


def decode(model: Any, caches: dict[str, list[Any]], tokens: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second after the whole text, stock and ours, and ours after 600 tokens, a few tokens each in turn."""
    stock = next(name for name in caches if name.startswith("stock"))
    runs = {"stock": caches[stock], **{p: caches[p] for p in args.policies}}
    for policy in args.policies:
        short = Candidate(policy, made(model, policy, args.budget), args.step)
        short.read(model, tokens[:600])
        runs[f"{policy}, 600 tokens"] = short.cache
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.decode_rounds):
        for name, cache in runs.items():
            seconds[name].append(decode_seconds(model, cache, args.decode_tokens) / args.decode_tokens)
    table = {}
    _say(f"decode after {len(tokens)} tokens: tok/s, and times stock's")
    for name, times in seconds.items():
        ratio = [a / b for a, b in zip(seconds["stock"], times, strict=True)]
        table[name] = {"tps": spread_of([1 / t for t in times]), "to_stock": spread_of(ratio)}
        _say(f"  {name:34s} {text_of(table[name]['tps'], '7.2f')}   x{text_of(table[name]['to_stock'], '.2f')}")
    for policy in args.policies:
        pairs = zip(seconds[f"{policy}, 600 tokens"], seconds[policy], strict=True)
        table[policy]["to_600"] = spread_of([short / long for short, long in pairs])
        _say(f"  {policy}: speed at {len(tokens)} is x{text_of(table[policy]['to_600'], '.2f')} of that at 600")
    return table


def resident(caches: dict[str, list[Any]]) -> dict[str, Any]:
    """Bytes held against what stock holds for the same tokens."""
    out = {}
    for name, cache in caches.items():
        r = report(cache)
        if r.policy != "full":
            out[name] = {"kv_bytes": r.kv_bytes, "peak": r.kv_bytes_peak, "full": r.kv_bytes_full}
            out[name]["ratio"] = round(r.kv_bytes_full / r.kv_bytes_peak, 2)
            _say(f"  {name}: at most {r.kv_bytes_peak / 1e6:.2f} MB held, full {r.kv_bytes_full / 1e6:.1f} MB: "
                 f"1/{out[name]['ratio']}")  # fmt: skip
    return out


def growth(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Active and peak memory of MLX while a bounded cache decodes."""
    from mlx_lm.generate import generate_step

    cache = made(model, args.policies[0], args.budget)
    marks = {}
    for i, _ in enumerate(generate_step(mx.array([1] * 600), model, max_tokens=args.memory_tokens, prompt_cache=cache)):
        if i in (args.memory_tokens // 10, args.memory_tokens - 1):
            mx.clear_cache()
            marks[i] = mx.get_active_memory() / 1e6, mx.get_peak_memory() / 1e6
            mx.reset_peak_memory()
    (early, _), (late, peak) = marks[args.memory_tokens // 10], marks[args.memory_tokens - 1]
    _say(f"memory over {args.memory_tokens} decoded tokens: active {early:.2f} -> {late:.2f} MB, peak {peak:.2f} MB")
    return {"active_early_mb": early, "active_late_mb": late, "peak_mb": peak}


def help_seconds() -> list[float]:
    """Seconds that ``mlx-kvprune --help`` takes: median, least, most of 7."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mlx_kvprune", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    _say(f"mlx-kvprune --help: {text_of(spread_of(times), '.2f')} s")
    return spread_of(times)


def _say(line: str) -> None:
    print(line, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mlx_kvprune.bench", description=__doc__)
    names = lambda text: [x.strip() for x in text.split(",")]
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument(
        "--policies",
        type=names,
        default=["window", "knorm", "knorm:kv_bits=4"],
        help="names, with settings after a colon: knorm:kv_bits=4;allocator=head_adaptive",
    )
    parser.add_argument(
        "--equal-slots", type=int, default=0, help="also decode with so many slots held, nothing evicted"
    )
    parser.add_argument("--equal", type=names, default=["window", "window:allocator=head_adaptive"])
    parser.add_argument("--step", type=int, default=512, help="our prefill step")
    parser.add_argument("--stock-steps", type=lambda t: [int(x) for x in names(t)], default=[256, 512, 2048])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--decode-rounds", type=int, default=7)
    parser.add_argument("--memory-tokens", type=int, default=2000)
    parser.add_argument(
        "--kernels",
        nargs="?",
        type=lambda t: [int(x) for x in names(t)],
        const=[4096, 32768, 131072],
        help="instead, on a GPU: attention of one step at these lengths, and its share of a copy's bandwidth",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
