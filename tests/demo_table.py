"""The demo's questions, for the fable alone, ``window``, ``retention`` and ``probe``: writes docs/demo.md.

    OPENBLAS_NUM_THREADS=1 python tests/demo_table.py [--rows FILE] [--settings NAMES] [--questions NUMBERS]

Reading the whole document takes minutes, so every answer goes to FILE at once, and what stands there is not asked again:
interrupt it and go on later, or ask only some questions (from 1) under some settings. The page shows what FILE holds.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_kvprune import attach, load
from mlx_kvprune.attach import settings_from
from mlx_kvprune.documents import answer, read_into_cache
from mlx_kvprune.reread import read_again

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "examples/documents/aesop-fables.txt"
QUESTIONS = ROOT / "examples/documents/questions.json"
ALONE = "the fable alone"
BUDGET = "24.05MB"  # 512 slots per KV head of what ``probe`` holds
MAIN: dict[str, dict[str, Any]] = {  # all questions
    ALONE: {"policy": "full", "budget": None},
    "window": {"policy": "window", "budget": BUDGET, "once": True},
    "retention": {"policy": "retention", "budget": BUDGET, "once": True},
    "probe (`make demo`)": {"policy": "probe", "budget": BUDGET},
}
MORE: dict[str, dict[str, Any]] = {  # a few questions
    "window, 1,260 slots of 8 bits": {"policy": "window", "budget": "21MB", "kv_bits": 8, "once": True},
    "probe, 1,024 slots of 8 bits": {"policy": "probe", "budget": 1024, "kv_bits": 8},
    "probe, 432 slots": {"policy": "probe", "budget": 432},
    "probe, 1,024 slots of 4 bits": {"policy": "probe", "budget": 1024, "kv_bits": 4},
    "probe, 1,024 slots of 8 bits, head_adaptive": {
        "policy": "probe",
        "budget": 1024,
        "kv_bits": 8,
        "allocator": "head_adaptive",
    },
}
HEAD = """# The ten questions of the demo

`python tests/demo_table.py` (all of it takes about {hours:.1f} hours on two busy cores): SmolLM2-135M-Instruct in
float32, `examples/documents/aesop-fables.txt`, {tokens:,} tokens with the prompt, greedy, at most 40 new tokens. An
answer is right if one of the accepted words of `questions.json` stands in it. Every cell is one run; a cell that says
so was not run.

The model was trained on 8,192 tokens, so a full cache cannot read this document. The ceiling is **the fable alone**:
the full cache and the same prompt, but of the document only the fable that has the answer. `probe` reads everything
for each question, which probes. `window` and `retention` read everything once, and each question is asked of a copy: what
they keep does not depend on the question. All hold the same bytes, have positions in the cache (`--positions auto`), and what
they kept is read again before they answer (`--reread`).

The questions were chosen by what the model answers from the fable alone, and to spread over the document, before any
bounded cache was run on it. They show the demo at work, they are not a benchmark.
"""


def fable(text: str, title: str) -> str:
    """One fable of the document, with its title."""
    parts = re.split(r"\n\n(?=[A-Z][A-Z ,'-]+\n\n)", text)
    return next(part for part in parts if part.split("\n")[0] == title)


def is_right(said: str, accepted: list[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", said.lower()) for a in accepted)


def ask(model, tokenizer, text: str, cases: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One read; one answer, or with several questions an answer to each, from a copy of the cache."""
    chosen = settings_from(**settings, positions="auto")
    reading = read_into_cache(model, tokenizer, text, cases[0]["question"], chosen, pinned=False, max_tokens=40)
    n_tokens = reading.prompt.n_tokens
    reading = read_again(model, tokenizer, reading, max_tokens=40)
    for case in cases:
        again = None if len(cases) == 1 else case["question"]
        said = "".join(part.text for part in answer(model, tokenizer, reading, again, max_tokens=40))
        r = reading.report(reading.cache)
        yield {
            "question": case["question"],
            "said": " ".join(said.split()),
            "right": is_right(said, case["answers"]),
            "seconds": round(reading.seconds / len(cases), 1),
            "tokens": n_tokens,
            "kv_bytes": r.kv_bytes_peak,
            "kv_bytes_full": r.kv_bytes_full,
        }


def page(rows: list[dict[str, Any]], cases: list[dict[str, Any]]) -> str:
    """docs/demo.md."""
    by = {(row["setting"], row["question"]): row for row in rows}
    of = lambda setting: [by[setting, c["question"]] for c in cases if (setting, c["question"]) in by]
    reads = [row for name in [*MAIN][1:] for row in of(name)]
    tokens = max((row["tokens"] for row in reads), default=0)
    mean = lambda name: sum(row["seconds"] for row in of(name)) / max(1, len(of(name)))
    lines = [HEAD.format(hours=sum(map(mean, MAIN)) * len(cases) / 3600, tokens=tokens)]
    lines.append("| question (where the answer stands) |" + "".join(f" {name} |" for name in MAIN))
    lines.append("|---|" + "---|" * len(MAIN))
    for case in cases:
        cells = [_cell(by.get((name, case["question"]))) for name in MAIN]
        lines.append(f"| {case['question']} ({case['position']:.0%}) |" + "".join(f" {x} |" for x in cells))
    lines.append("| **right** |" + "".join(f" {sum(r['right'] for r in of(n))} of {len(of(n))} |" for n in MAIN))
    lines.append("| most bytes held |" + "".join(f" {_most(of(n))} |" for n in MAIN))
    full = max((row["kv_bytes_full"] for row in reads), default=0)
    lines.append(f"\nA full cache for the whole document would take {full / 1e6:.1f} MB.")
    tried = [name for name in MORE if of(name)]
    if tried:
        lines.append("\n## Other settings\n\nAsked a few of the questions each; one run a cell.\n")
        lines.append("| setting | right | most bytes held | answers |\n|---|---|---|---|")
    for name in tried:
        number = {c["question"]: i + 1 for i, c in enumerate(cases)}
        cells = "; ".join(f"{number[r['question']]} {_cell(r)}" for r in of(name))
        lines.append(
            f"| {name} | {sum(r['right'] for r in of(name))} of {len(of(name))} | {_most(of(name))} | {cells} |"
        )
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    return f"{'**right**' if row['right'] else 'wrong'}: {row['said']}" if row else "not run"


def _most(rows: list[dict[str, Any]]) -> str:
    return f"{max(row['kv_bytes'] for row in rows) / 1e6:.1f} MB" if rows else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=Path, default=Path("demo_rows.jsonl"), help="answers so far")
    parser.add_argument(
        "--settings", default=";".join(MAIN), help="names from MAIN and MORE in this file, with ; between"
    )
    parser.add_argument("--questions", help="numbers, from 1")
    args = parser.parse_args()

    cases = json.loads(QUESTIONS.read_text())
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    done = {(row["setting"], row["question"]) for row in rows}
    numbers = [int(n) for n in args.questions.split(",")] if args.questions else range(1, len(cases) + 1)
    wanted: list[tuple[str, list[Any]]] = []  # one read each
    for name in filter(None, args.settings.split(";")):
        asked = [cases[n - 1] for n in numbers if (name, cases[n - 1]["question"]) not in done]
        once = {**MAIN, **MORE}[name].get("once")
        wanted += [(name, asked)] if once and asked else [(name, [case]) for case in asked]
    if wanted:
        model, tokenizer = load(args.model)
        attach(model, quiet=True)
        text = DOCUMENT.read_text().strip()
    for name, asked in wanted:
        settings = {k: v for k, v in {**MAIN, **MORE}[name].items() if k != "once"}
        part = fable(text, asked[0]["fable"]) if name == ALONE else text
        for row in ask(model, tokenizer, part, asked, settings):
            rows.append({"setting": name, **row})
            print(json.dumps(rows[-1]), flush=True)
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    (ROOT / "docs/demo.md").write_text(page(rows, cases))


if __name__ == "__main__":
    main()
