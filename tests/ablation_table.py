"""What each part of `retention` is worth: gates trained without it, on the same few texts. Prints a table in Markdown.

    python tests/ablation_table.py --data books.jsonl.gz --data code.jsonl.gz --held-out other.jsonl.gz

Each row is trained as `fit` does, utility first and then a short distillation, and measured as `fit` measures: KL of the last
256 tokens of held-out texts over a full cache's context of which the gates leave a quarter, an eighth, a sixteenth. It takes
about 50 minutes. Short trainings on few texts: rows are to be compared with each other, not with the gates that are shipped.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from typing import Any

import mlx_kvprune as kvp  # before MLX: it loads a faster BLAS
from mlx_kvprune.attach import hooked
from mlx_kvprune.gates import Gates
from mlx_kvprune.models import load
from mlx_kvprune.training.distill import Distiller, held_out
from mlx_kvprune.training.fit import LEVELLED
from mlx_kvprune.training.plan import Plan
from mlx_kvprune.training.reading import Reading, read
from mlx_kvprune.training.recipe import Recipe
from mlx_kvprune.training.stages import fit_utility
from mlx_kvprune.training.texts import Texts
from mlx_kvprune.training.whitening import Whitening


@dataclass(frozen=True)
class Variant:
    """One row: what is said of it, and in what its plan and its recipe differ."""

    name: str
    plan: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("`retention`, seed 0"),
    Variant("seed 1", {"seed": 1}),
    Variant("seed 2", {"seed": 2}),
    Variant("without sharing: each layer has its own last projection", {"form": "mlp"}),
    Variant("linear gates", {"form": "linear"}),
    Variant("without decay: scores that do not age, a threshold", {"target": "budget"}, {"ageing": False}),
    Variant("uniform: a budget for each head", {"scope": "head"}),
    Variant("a threshold instead of decay", {"target": "budget"}),
    Variant("decay without capacity loss", {"target": "decay", "capacity": 0.0}),
    Variant("decay without the next token's loss", {"target": "decay", "surprisal": 0.0}),
)


def trained(
    model: Any, variant: Variant, texts: list[Reading], held: list[Reading], asked: argparse.Namespace
) -> list[dict[str, float]]:
    """KL on held-out texts by share: after the first stage, and after both."""
    given = {"form": "shared", "target": asked.target, "seed": asked.seed, **variant.plan}
    plan = Plan(method="retention", steps=asked.steps, **given)
    recipe: Recipe = replace(plan.recipe, **variant.recipe)
    widths = tuple(layer.x.shape[1] for layer in held[0].layers)
    gates = Gates(plan.shape(hooked(model).rung, widths), seed=plan.seed)
    whitening = Whitening.of(texts, gates.shape.form)
    fit_utility(plan, gates, texts, whitening, lambda *_: None)
    found = [held_out(gates, model, held, whitening, recipe)]
    distiller = Distiller(gates, model, whitening, recipe)
    distiller.begin(texts[:LEVELLED])
    for _ in range(asked.steps):
        distiller.step(texts)
    return [*found, distiller.held_out(held)]


def recency(model: Any, held: list[Reading], how: Recipe) -> dict[str, float]:
    """KL of gates that say the same of every token: the newest stay."""
    widths, rung = tuple(layer.x.shape[1] for layer in held[0].layers), hooked(model).rung
    gates = Gates(Plan().shape(rung, widths))
    gates.restore({name: 0 * x for name, x in gates.arrays().items()})
    return held_out(gates, model, held, Whitening.none(widths), how)


def line(name: str, *kls: dict[str, float], minutes: float | None = None) -> str:
    cells = [f"{kl:.4f}" for one in kls for kl in one.values()]
    cells += ["-"] * (6 - len(cells)) + ["-" if minutes is None else f"{minutes:.1f}"]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", action="append", required=True, metavar="FILE", help="texts to train on")
    parser.add_argument("--held-out", action="append", required=True, metavar="FILE", help="texts to measure on")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--held", type=int, default=6, help="texts to measure on")
    parser.add_argument("--tokens", type=int, default=1024, help="of a text")
    parser.add_argument("--steps", type=int, default=50, help="of distillation")
    parser.add_argument("--target", default="decay", help="of distillation, where a row does not say another")
    parser.add_argument("--seed", type=int, default=0, help="of a row's training, where it does not say another")
    parser.add_argument("--only", default="", help="rows that have this in their name")
    asked = parser.parse_args()
    model, tokenizer = load(asked.model, dtype="float32")
    hooked(model)
    how = Plan().recipe
    drawn = lambda paths, n, seed: [
        read(model, Texts.of(tokenizer, paths, seed).excerpt(i, asked.tokens), how.window) for i in range(n)
    ]
    texts, held = drawn(asked.data, asked.texts, 0), drawn(asked.held_out, asked.held, 1)
    print("| | utility: 1/4 | 1/8 | 1/16 | and distilled: 1/4 | 1/8 | 1/16 | minutes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    print(line("recency alone", recency(model, held, how)), flush=True)
    for variant in (v for v in VARIANTS if asked.only in v.name):
        began = time.monotonic()
        kls = trained(model, variant, texts, held, asked)
        print(line(variant.name, *kls, minutes=(time.monotonic() - began) / 60), flush=True)
    kvp.detach(model)


if __name__ == "__main__":
    main()
