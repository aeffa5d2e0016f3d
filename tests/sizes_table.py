"""What `spkv` holds of texts at one threshold, and how near it is to the full cache: a line for each text.

    OPENBLAS_NUM_THREADS=1 python tests/sizes_table.py mansfield-park.txt networkx-code.txt [--tokens 8192] [--shuffled FILE]

As `mlx-kvprune eval --policies spkv --threshold 0.5 --equal slots` does, but without its controls, which hold everything at
that budget and take most of the time: 8,192 tokens are read in five minutes on one core. ``--shuffled``: the words of a
file in another order, a text that holds no phrase which another could recall.
"""

import argparse
import json
import random
from pathlib import Path

from mlx_kvprune import load
from mlx_kvprune.attach import hooked
from mlx_kvprune.evals import fidelity
from mlx_kvprune.evals.conditions import Condition
from mlx_kvprune.settings import Budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--shuffled", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threshold", type=float, default=0.5)
    asked = parser.parse_args()

    texts = {path.name: path.read_text(encoding="utf-8") for path in asked.files}
    if asked.shuffled:
        words = asked.shuffled.read_text(encoding="utf-8").split()
        random.Random(0).shuffle(words)
        texts[f"words of {asked.shuffled.name}, shuffled"] = " ".join(words)
    model, tokenizer = load(asked.model, dtype="float32")
    hooked(model)
    roomy = Budget(tokens=asked.tokens - 192)  # the threshold decides, not the budget
    condition = Condition("spkv", roomy, more=(("options", (("threshold", asked.threshold),)),))
    for name, text in texts.items():
        tokens = list(tokenizer.encode(text[: 10 * asked.tokens]))[: asked.tokens]
        if len(tokens) < asked.tokens:
            raise SystemExit(f"[tokens] {name} is too short; got {len(tokens)} of {asked.tokens}; try a longer text")
        one = fidelity.trace(model, tokens, [condition])[condition]
        found = fidelity.summary(one, len(tokens) // 2)
        kl = {key: round(found[key], 4) for key in ("kl", "kl_low", "kl_high")}
        print(
            json.dumps({"text": name, "tokens": len(tokens), "MB": round(one.held["kv_bytes"] / 1e6, 2), **kl}),
            flush=True,
        )


if __name__ == "__main__":
    main()
