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


def ask(model, tokenizer, text: str, question: str, policy: str):
    settings = settings_from(policy=policy, budget=BUDGET)
    reading = read_into_cache(model, tokenizer, text, question, settings, pinned=True)
    said = "".join(part.text for part in answer(model, tokenizer, reading, max_tokens=40))
    return " ".join(said.split()), report(reading.cache)


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


if __name__ == "__main__":
    main()
