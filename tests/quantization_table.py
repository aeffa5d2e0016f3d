"""Bits x scheme against the unquantized bounded cache: writes docs/quantization.md.

    python tests/quantization_table.py MODEL NAME=FILE [NAME=FILE ...] > rows.jsonl      (about 15 minutes for three texts;
        TOKENS=768 SCHEMES="8 token;4 token" in the environment for less)
    python tests/quantization_table.py --page rows.jsonl [rows.jsonl ...]                (writes the page)

FILE is whatever ``mlx-kvprune eval --data`` reads. All conditions read a text in lockstep, with the same budget in tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvprune import attach, load
from mlx_kvprune.evals.conditions import Condition
from mlx_kvprune.evals.fidelity import bootstrap_interval, trace
from mlx_kvprune.evals.texts import documents, excerpt
from mlx_kvprune.settings import Budget

ROOT = Path(__file__).parent.parent
BUDGET, TOKENS, START = 512, int(os.environ.get("TOKENS", "1536")), 256
BASE = ("window", Budget(tokens=BUDGET), 0)
PLAIN = {"kv_hadamard": False}
SCHEMES: dict[str, dict[str, Any]] = {
    **{f"{bits} token": {"kv_bits": bits, "kv_scheme": "token"} for bits in (8, 6, 5, 4, 3, 2)},
    **{f"{bits} token, not rotated": {"kv_bits": bits, "kv_scheme": "token", **PLAIN} for bits in (8, 4, 2)},
    **{f"{bits} channel": {"kv_bits": bits, "kv_scheme": "channel"} for bits in (8, 4, 3, 2)},
    "4 channel, not rotated": {"kv_bits": 4, "kv_scheme": "channel", **PLAIN},
    **{f"{bits} page": {"kv_bits": bits, "kv_scheme": "page"} for bits in (8, 4, 3, 2)},
    "keys 8, values 4, token": {"kv_key_bits": 8, "kv_value_bits": 4, "kv_scheme": "token"},
    "4 token, group 32": {"kv_bits": 4, "kv_scheme": "token", "kv_group_size": 32},
    "4 token, best 64 in 8": {"kv_bits": 4, "kv_scheme": "token", "kv_fine_tokens": 64, "kv_fine_bits": 8},
    "2 token, best 64 in 8": {"kv_bits": 2, "kv_scheme": "token", "kv_fine_tokens": 64, "kv_fine_bits": 8},
}
HEAD = f"""# Quantized storage: bits and schemes

`python tests/quantization_table.py` (see its head). Policy `window`, budget {BUDGET} slots per KV head, float32 on a
CPU; everything is compared with **the same bounded cache without quantization**, over
the tokens after the first {START}. Sinks, window and ring are never quantized. NLL: change relative to the
unquantized cache's, with the 95% interval of a block bootstrap. KL: from the unquantized cache's prediction, in
thousandths of a nat. Bytes are those of the bounded layers.

- **token**: each key and value on its own, by groups of `--kv-group-size` numbers with a scale and an offset in float16.
- **channel**: keys also get an offset and a scale per channel, fixed after the first tokens of the text.
- **page**: keys per channel over a page of 32 tokens (KIVI, arXiv 2402.02750); pages are written and evicted whole.
- Keys and values are rotated by a Hadamard matrix before they are quantized, unless it says otherwise.
- **best N in 8**: the N best slots of each head in 8 bits, the others in fewer.

What follows: 8 bits and keys in 8 with values in 4 cost nothing that can be measured, 4 bits two parts in a thousand;
rotating is worth more than smaller groups; at 4 bits and fewer a frame per channel helps keys. That is `--kv-scheme
auto`. 2 bits cost 1 to 12%. `page` evicts 32 neighbours at a time, so that its rows hold other tokens than the
reference: that is why 8 bits do not come to zero there.
"""


def measure(name: str, texts: dict[str, Path]) -> None:
    """One JSON line per text and scheme on standard output."""
    model, tokenizer = load(name, dtype="float32")
    attach(model, quiet=True)
    base = Condition(*BASE)
    wanted = os.environ.get("SCHEMES", ";".join(SCHEMES)).split(";")
    schemes = {Condition(*BASE, tuple(SCHEMES[label].items())): label for label in wanted}
    for text, path in texts.items():
        tokens = excerpt(tokenizer, documents(path), TOKENS)
        traces = trace(model, tokens, [base, *schemes], against=base)
        nbytes = traces[base].held["kv_bytes"]
        for condition, label in schemes.items():
            print(
                json.dumps({"model": name, "text": text, "scheme": label} | row(traces[condition], nbytes)), flush=True
            )


def row(one: Any, nbytes: int) -> dict[str, float]:
    """What is shown of one trace."""
    nll = one.nll_full[START:].mean()
    change = (one.nll - one.nll_full)[START:]
    low, high = bootstrap_interval(change)
    numbers = {"nll": nll, "change": change.mean() / nll, "low": low / nll, "high": high / nll}
    shown = {name: round(float(x), 6) for name, x in numbers.items()}
    return {**shown, "kl": round(float(one.kl[START:].mean()), 6), "bytes": one.held["kv_bytes"], "unquantized": nbytes}


def page(rows: list[dict[str, Any]]) -> str:
    """docs/quantization.md: a table per model, a column per text."""
    out = [HEAD]
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        texts = list(dict.fromkeys(r["text"] for r in mine))
        out += [
            f"## {model}, {mine[0].get('tokens', 1536):,} tokens of each text",
            "",
            "| bits, scheme | MB | " + " | ".join(texts) + " | mean |",
            "|---" * (len(texts) + 3) + "|",
        ]
        for scheme in dict.fromkeys(r["scheme"] for r in mine):
            these = [r for r in mine if r["scheme"] == scheme]
            cells = [f"{cell(r)} ({r['low']:+.2%} to {r['high']:+.2%}), KL {1e3 * r['kl']:.2f}" for r in these]
            mean = np.mean([r["change"] for r in these]), np.mean([r["kl"] for r in these])
            out.append(
                f"| {scheme} | {these[0]['bytes'] / 1e6:.2f} | "
                + " | ".join(cells)
                + f" | **{mean[0]:+.2%}**, {1e3 * mean[1]:.2f} |"
            )
        out += [f"\nUnquantized: {mine[0]['unquantized'] / 1e6:.2f} MB.\n"]
    return "\n".join(out)


def cell(r: dict[str, Any]) -> str:
    return f"{r['change']:+.2%}"


def main() -> None:
    if sys.argv[1] == "--page":
        rows = [json.loads(line) for path in sys.argv[2:] for line in Path(path).read_text().splitlines()]
        (ROOT / "docs/quantization.md").write_text(page(rows))
    else:
        measure(sys.argv[1], {name: Path(path) for name, path in (x.split("=", 1) for x in sys.argv[2:])})


if __name__ == "__main__":
    main()
