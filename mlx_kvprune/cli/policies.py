"""``policies``: what may be kept when the cache is full."""

from __future__ import annotations

from typing import Any

from mlx_kvprune.cli.options import Json, spread

EPILOG = """Examples:

  mlx-kvprune policies

  mlx-kvprune generate --policy snapkv --policy-option kernel=9 --budget 512 --prompt "Hello"
"""


@spread
def policies(json: Json = False) -> None:
    """List the policies: how each shares the budget, whether it needs learned gates, its options (--policy-option)."""
    from mlx_kvprune.cli import output
    from mlx_kvprune.policy import POLICIES

    if json:
        output.write_json({"policies": [_fields_of(policy) for policy in POLICIES.values()]})
        return
    rows = [("NAME", "KEEPS", "WINDOW", "ALLOCATOR", "GATES", "OPTIONS")]
    for p in POLICIES.values():
        window = str(p.window) if p.scorer is not None else ""
        rows.append((p.name, p.summary, window, p.allocator, "needed" if p.gates else "", _spelled(p)))
    output.table(rows)


def _spelled(policy: Any) -> str:
    return " ".join(f"{name}={'null' if value is None else value}" for name, value in _options(policy).items())


def _fields_of(policy: Any) -> dict[str, Any]:
    more = {
        "window": policy.window,
        "allocator": policy.allocator,
        "needs_gates": bool(policy.gates),
        "options": _options(policy),
    }
    return {"name": policy.name, "summary": policy.summary, **more}


def _options(policy: Any) -> dict[str, Any]:
    """Hyper-parameters that --policy-option takes; those that have an option of their own are left out."""
    from mlx_kvprune.scorers.base import options_of

    options = options_of(policy.scorer) if policy.scorer is not None else {}
    return {name: value for name, value in options.items() if name not in ("seed", "n_sink")}
