"""``policies``: what may be kept when the cache is full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from mlx_kvprune.cli.options import Json, spread

EPILOG = """Examples:

  mlx-kvprune policies

  mlx-kvprune policies snapkv

  mlx-kvprune generate --policy snapkv --policy-option kernel=9 --budget 512 --prompt "Hello"
"""


Name = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="Of this one: its formula, its source, what its options mean."),
]


@spread
def policies(name: Name = None, json: Json = False) -> None:
    """List the policies: how each shares the budget, whether it needs learned gates, its options (--policy-option)."""
    from mlx_kvprune.cli import output
    from mlx_kvprune.policy import POLICIES, find

    chosen = [*POLICIES.values()] if name is None else [find(name)]
    if json:
        output.write_json({"policies": [_fields_of(policy) for policy in chosen]})
        return
    if name is not None:
        output.write("\n\n".join(_told(*chosen)).replace("``", "`") + "\n")
        return
    rows = [("NAME", "KEEPS", "WINDOW", "ALLOCATOR", "GATES", "OPTIONS")]
    for p in chosen:
        window = str(p.window) if p.scorer is not None else ""
        rows.append((p.name, p.summary, window, p.allocator, "needed" if p.gates else "", _row_of(_options(p))))
    output.table(rows)


def _told(policy: Any) -> Iterator[str]:
    """One policy in paragraphs: what it keeps, how the score is made, defaults, options."""
    from mlx_kvprune.cli import output
    from mlx_kvprune.scorers.base import meanings_of, story_of

    yield f"{policy.name}: {policy.summary}"
    if policy.scorer is None:
        return
    yield story_of(policy.scorer)
    gates = f"; needs gates of method {policy.gates} (--gates)" if policy.gates else ""
    yield f"By default: --window {policy.window} --allocator {policy.allocator}{gates}"
    meanings = meanings_of(policy.scorer)
    rows = [(f"  {name}={_spelled(value)}", meanings.get(name, "")) for name, value in _options(policy).items()]
    if rows:
        yield "Options (--policy-option NAME=VALUE):\n" + "\n".join(output.aligned(rows))


def _spelled(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _row_of(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={_spelled(value)}" for name, value in options.items())


def _fields_of(policy: Any) -> dict[str, Any]:
    from mlx_kvprune.scorers.base import meanings_of

    more = {
        "window": policy.window,
        "allocator": policy.allocator,
        "needs_gates": bool(policy.gates),
        "options": _options(policy),
        "meanings": meanings_of(policy.scorer) if policy.scorer is not None else {},
    }
    return {"name": policy.name, "summary": policy.summary, **more}


def _options(policy: Any) -> dict[str, Any]:
    """Hyper-parameters that --policy-option takes; those that have an option of their own are left out."""
    return {name: value for name, value in policy.hyperparameters.items() if name not in ("seed", "n_sink")}
