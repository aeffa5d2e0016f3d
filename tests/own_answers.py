"""Writes conversations that SmolLM2 has about texts, to measure what caches cost while a model speaks (`eval --data`).

    python tests/own_answers.py FOLDER-OF-UNSEEN-TEXTS OUT-FOLDER

Of each text that ``tests/unseen_texts.py`` wrote: 1,024 tokens, then questions, others than those of `fit --answers`, and
answers drawn with the full cache at temperature 0.7, up to 2,200 tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx_kvprune as kvp  # before MLX: it loads a faster BLAS
from mlx_kvprune.training.spoken import spoken

READ, LENGTH, SEED = 1024, 2200, 4711
FIRST = (
    "Tell me in your own words what you have read.",
    "Write a review of this text.",
    "What can be learned from it?",
)
LATER = (
    "Tell me more about that.",
    "How do you know?",
    "Is that all?",
    "Now write it as a short story.",
    "Which question would you ask the author?",
    "Compare that with something else.",
)


def main() -> None:
    """Write all of them."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    model, tokenizer = kvp.load("smollm2-135m", dtype="float32")
    for n, path in enumerate(sorted(Path(sys.argv[1]).glob("*.txt"))):
        text = path.read_text(encoding="utf-8")
        half = text.find("\n", len(text) // 2) + 1
        document = tokenizer.decode(tokenizer.encode(text[half : half + 10 * READ])[:READ])
        tokens = spoken(model, tokenizer, document, LENGTH, (SEED, n), FIRST, LATER)
        (Path(sys.argv[2]) / f"answers-{path.name}").write_text(tokenizer.decode(tokens), encoding="utf-8")
        print(f"answers-{path.name}: {len(tokens):,} tokens", flush=True)


if __name__ == "__main__":
    main()
