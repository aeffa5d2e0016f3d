"""Writes docs/models.md: what each model type of mlx-lm can be given. ``python tests/ladder_table.py``."""

import importlib.metadata
from pathlib import Path

import mlx_kvprune as kvp

import mlx.core as mx  # isort: skip
import tiny_models as zoo  # isort: skip

HEAD = """# Model types

What each model type of mlx-lm {version} is given, found by trying a tiny random configuration of it (`python
tests/ladder_table.py`); `attach` tries again on the real model and prints what it found.

- **ragged**: attention goes through us; keys and values stay where they lie; every policy works.
- **uniform**: the model does its own attention and is handed dense arrays; policies that need queries or attention weights
  (tova, h2o, snapkv, expected_attention, rkv, probe) are refused.
- **refuse**: `attach` raises an error with the reason.

A name with a colon is a second configuration of a type. "left alone" counts layers with a cache of their own: sliding windows,
recurrent states.

| model type | rung | layers bounded | left alone | why not ragged |
|---|---|---|---|---|
"""


def row(name: str) -> str:
    model = zoo.tiny_model(name)
    try:
        rung = kvp.attach(model, budget=200, quiet=True).rung
    except ValueError as error:
        reason = str(error).split("; got ")[1].split("; try ")[0]
        return f"| {name} | refuse | | | {reason.split('; uniform: ')[0].removeprefix('ragged: ')} |"
    kvp.detach(model)
    reason = rung.reason.removeprefix("ragged: ")
    return f"| {name} | {rung.name} | {len(rung.layers)} | {rung.others or ''} | {reason} |"


def main() -> None:
    mx.disable_compile()
    head = HEAD.format(version=importlib.metadata.version("mlx-lm"))
    rows = [row(name) for name in sorted(zoo.names())]
    rows += [f"| {name} | not tried | | | {reason} |" for name, reason in sorted(zoo.SKIPPED.items())]
    Path(__file__).parent.parent.joinpath("docs", "models.md").write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
