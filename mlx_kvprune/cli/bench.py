"""``bench``: speed and memory against stock mlx-lm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_kvprune.cli.bench_run import Amount
from mlx_kvprune.cli.options import Json, ModelOptions, spread

EPILOG = """Examples:

  mlx-kvprune bench --quick

  mlx-kvprune bench --contexts 512,2048,8192 --out rows.jsonl --plot bench.png

  mlx-kvprune bench --policies window,snapkv,knorm:kv_bits=4 --stock full,kv4 --batch none --json | tail -1

  mlx-kvprune bench --contexts 32768 --stock full --policies knorm:kv_bits=4 --batch none --out rows.jsonl

  mlx-kvprune bench --kernels (on a GPU: attention of one decode step, by bytes)
"""
Fields = dict[str, Any]
STANDARD: Fields = {
    "stock": "full,kv8,kv4,rotating",
    "contexts": "512,1024,2048",
    "batch": "1,4,16",
    "batch_context": 512,
    "rounds": 5,
    "decode_tokens": 16,
}
QUICK: Fields = {
    "stock": "full,kv4,rotating",
    "contexts": "512,1024",
    "batch": "1,4",
    "batch_context": 256,
    "rounds": 3,
    "decode_tokens": 8,
}
KERNELS = "4096,32768,131072"


def _option(*flags: str, metavar: str | None = None, help: str, **more: Any) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel="Benchmark", **more)


Contexts = Annotated[
    str | None,
    _option(
        "--contexts", metavar="LENGTHS", help=f"Comma-separated lengths in tokens. Default: {STANDARD['contexts']}."
    ),
]
Policies = Annotated[
    str,
    _option("--policies", metavar="NAMES", help="Comma-separated; settings after a colon: knorm:kv_bits=4;window=32."),
]
Stock = Annotated[
    str | None,
    _option(
        "--stock",
        metavar="NAMES",
        help="mlx-lm's own caches: full, kv8 and kv4 (--kv-bits), rotating; or none. Default: all; with --quick no kv8.",
    ),
]
Budget = Annotated[
    str, _option("--budget", metavar="SIZE", help="The most that is held: 512 (tokens per KV head), or 8MB (in all).")
]
Batch = Annotated[
    str | None,
    _option("--batch", metavar="SIZES", help=f"Requests at a time, or none. Default: {STANDARD['batch']}."),
]
BatchContext = Annotated[
    int | None,
    _option(
        "--batch-context",
        metavar="N",
        min=2,
        help=f"Length of each request's text. Default: {STANDARD['batch_context']}.",
    ),
]
Rounds = Annotated[
    int | None, _option("--rounds", metavar="N", min=1, help=f"Turns of decoding. Default: {STANDARD['rounds']}.")
]
DecodeTokens = Annotated[
    int | None,
    _option("--decode-tokens", metavar="N", min=1, help=f"Tokens of a turn. Default: {STANDARD['decode_tokens']}."),
]
Reps = Annotated[int, _option("--reps", metavar="N", min=1, help="Readings of the text.")]
PrefillStepSize = Annotated[
    int, _option("--prefill-step-size", metavar="N", min=1, help="Prompt tokens that are processed at a time.")
]
Quick = Annotated[bool, _option("--quick", help="Shorter contexts, smaller batches, fewer rounds: two minutes.")]
Out = Annotated[
    Path | None,
    _option("--out", metavar="FILE", help="Keep rows in this JSONL file; what stands there is not measured again."),
]
Plot = Annotated[
    Path | None, _option("--plot", metavar="FILE", help="Draw speed and memory against context: .png or .svg.")
]
Markdown = Annotated[bool, _option("--markdown", help="Print the tables as Markdown.")]
EqualSlots = Annotated[
    int, _option("--equal-slots", metavar="N", min=0, help="Also decode with N slots held and nothing evicted.")
]
Kernels = Annotated[
    bool, _option("--kernels", help=f"Instead, on a GPU: one attention step at --contexts (default {KERNELS}).")
]


@dataclass(frozen=True)
class Size:
    """How much is measured; None means the default, which ``--quick`` lowers."""

    contexts: Contexts = None
    batch: Batch = None
    batch_context: BatchContext = None
    rounds: Rounds = None
    decode_tokens: DecodeTokens = None
    reps: Reps = 1
    prefill_step_size: PrefillStepSize = 512
    quick: Quick = False

    def amount(self) -> Amount:
        """The numbers, with defaults filled in.

        Raises:
            ValueError: a list that is none of whole numbers.
        """
        lengths, sizes = numbers(self._value("contexts"), "contexts"), numbers(self._value("batch"), "batch")
        turns = self._value("rounds"), self._value("decode_tokens")
        return Amount(lengths, sizes, self._value("batch_context"), *turns, self.reps, self.prefill_step_size)

    def _value(self, name: str) -> Any:
        own = getattr(self, name)
        return own if own is not None else (QUICK if self.quick else STANDARD)[name]


@spread
def bench(
    model: ModelOptions,
    size: Size,
    policies: Policies = "window,knorm:kv_bits=4",
    stock: Stock = None,
    budget: Budget = "512",
    out: Out = None,
    plot: Plot = None,
    markdown: Markdown = False,
    equal_slots: EqualSlots = 0,
    kernels: Kernels = False,
    json: Json = False,
) -> None:
    """Measure prefill, first token, decode and memory by context, and throughput by batch, beside stock mlx-lm.

    The ceiling comes first: the bytes that a decode step has to read, over the bandwidth of a copy on this machine.

    All take turns, piece by piece, and a ratio compares times of one round. The defaults take about ten minutes for
    SmolLM2-135M on two quiet CPU cores; a context of 8,192 a quarter of an hour more.

    held: the most that the cache has allocated. resident: what MLX holds more after reading. peak: the most at any moment,
    without the weights.
    """
    from mlx_kvprune.bench import candidates
    from mlx_kvprune.bench import plot as pictures
    from mlx_kvprune.cli import bench_run as runs
    from mlx_kvprune.cli import output

    if kernels:
        _kernels(numbers(size.contexts or KERNELS, "contexts"), json)
        return
    amount = size.amount()
    who = runs.Who(
        tuple(_split(stock or (QUICK if size.quick else STANDARD)["stock"])), tuple(_split(policies)), budget
    )
    candidates.check_names(who.stock, who.policies, budget)
    pictures.check(plot)
    runs.check_out(out)
    run = runs.prepare(model, amount, who, out)
    runs.tell(run, markdown, json)
    with runs.interruptible(run.store):
        runs.measure(run)
        if equal_slots:
            run.fields["equal_length"] = _equal(run.model, equal_slots, list(who.policies), amount.rounds)
    for note in run.notes:
        output.say(f"[bench] {note}")
    runs.finish(run, markdown, json, plot)


def _equal(model: Any, slots: int, variants: list[str], rounds: int) -> Fields:
    from mlx_kvprune.bench.equal import equal_length
    from mlx_kvprune.cli import output

    return equal_length(model, slots, variants, rounds, output.say)


def _kernels(lengths: list[int], json: bool) -> None:
    from mlx_kvprune.bench.kernels import kernel_table
    from mlx_kvprune.cli import output

    found = kernel_table(lengths, output.say)
    if json:
        output.write_json(found)


def numbers(text: str, name: str) -> list[int]:
    """Ascending whole numbers above 0 of a comma-separated list; ``none`` for no batches.

    Raises:
        ValueError: something else.
    """
    if name == "batch" and text.strip() in ("none", "0"):
        return []
    parts = _split(text)
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"[{name}] not whole numbers above 0; got {text!r}; try {STANDARD[name]}")
    return sorted({int(part) for part in parts})


def _split(text: str) -> list[str]:
    return [x for x in dict.fromkeys(part.strip() for part in text.split(",")) if x and x != "none"]
