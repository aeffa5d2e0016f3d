"""All ten questions of the demo, for the full cache, ``window`` and the default: writes docs/demo.md."""

import json
import sys
from pathlib import Path

from mlx_kvprune import attach, load
from mlx_kvprune.attach import settings_from
from mlx_kvprune.documents import answer, read_into_cache
from mlx_kvprune.report import report

ROOT = Path(__file__).parent.parent
BUDGET = 432
POLICIES = ("full", "window", "probe")
HEAD = """# The ten questions of the demo

`python tests/demo_table.py`: SmolLM2-135M-Instruct in float32, `examples/documents/aesop-fables.txt` (3,489 tokens),
{budget} slots per KV head (less than 1/8 of the document), greedy, at most 40 new tokens. Every policy reads the same prompt,
with the question before the document (pinned) and after it. An answer is right if it contains one of the accepted words of
`questions.json`.

The questions were chosen before any bounded cache was run, by what the full cache could answer: they show the demo at work,
they are not a benchmark. All answers stand in the first half of the document.
"""


def ask(model, tokenizer, text: str, question: str, policy: str):
    settings = settings_from(policy=policy, budget=BUDGET)
    reading = read_into_cache(model, tokenizer, text, question, settings, pinned=True)
    said = "".join(part.text for part in answer(model, tokenizer, reading, max_tokens=40))
    return " ".join(said.split()), report(reading.cache)


def page(rows: list[dict]) -> str:
    """docs/demo.md."""
    lines = [
        HEAD.format(budget=BUDGET),
        "| question (where the answer stands) |" + "".join(f" {p} |" for p in POLICIES),
    ]
    lines.append("|---|" + "---|" * len(POLICIES))
    for start in range(0, len(rows), len(POLICIES)):
        same = rows[start : start + len(POLICIES)]
        cells = "".join(f" {'**right**' if r['right'] else 'wrong'}: {r['said']} |" for r in same)
        lines.append(f"| {same[0]['question']} ({same[0]['position']:.0%}) |{cells}")
    right = [sum(r["right"] for r in rows if r["policy"] == p) for p in POLICIES]
    held = [max(r["kv_bytes"] for r in rows if r["policy"] == p) for p in POLICIES]
    lines.append("| **right, of ten** |" + "".join(f" {n} |" for n in right))
    lines.append("| most bytes held |" + "".join(f" {n / 1e6:.1f} MB |" for n in held))
    return "\n".join(lines) + "\n"


def main() -> None:
    model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    attach(model, quiet=True)
    text = (ROOT / "examples/documents/aesop-fables.txt").read_text().strip()
    rows = []
    for case in json.loads((ROOT / "examples/documents/questions.json").read_text()):
        for policy in POLICIES:
            said, r = ask(model, tokenizer, text, case["question"], policy)
            right = any(a in said.lower() for a in case["answers"])
            rows.append({**case, "policy": policy, "said": said, "right": right, "kv_bytes": r.kv_bytes_peak})
            print(json.dumps(rows[-1]), flush=True)
    (ROOT / "docs/demo.md").write_text(page(rows))


if __name__ == "__main__":
    main()
