"""Bounded grids: what a run measures if the user does not say."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "policies": "snapkv",
    "budgets": "256",
    "allocators": "auto",
    "kv_bits": "none",
    "equal": "auto",
    "gates": "",  # those that come along
    "local_layers": "",
    "threshold": "",
    "tasks": "fidelity,needles,regret",
    "tokens": 2048,
    "haystack": None,  # half of the tokens
    "trials": 10,
    "texts": 1,
    "answer_tokens": 256,
}
LENGTHS = ("tokens", "haystack", "trials", "texts", "answer_tokens")
PRESETS: dict[str, dict[str, Any]] = {
    "": {},
    "quick": {
        "policies": "retention,tova,probe",  # models without gates do without the first, and are told so
        "budgets": "1/4,1/8",
        "tasks": "fidelity,regret,needles,generation",
        "tokens": 1024,
        "haystack": 0,  # as many as tokens
        "trials": 3,
        "answer_tokens": 96,
    },
    "standard": {
        "policies": "all",
        "budgets": "1/4,1/8,1/16",
        "tasks": "fidelity,regret,needles,generation",
        "haystack": 2048,
        "trials": 10,
        "texts": 2,
    },
    "frontier": {
        "policies": "retention,tova,rkv,expected_attention",  # the best of the standard grid
        "budgets": "1/2,1/4,1/8,1/16,1/32",
        "tasks": "fidelity",
        "tokens": 4096,  # 1/32 of 2,048 has no room for sinks, window and ring
    },
}


def chosen(preset: str, **given: Any) -> dict[str, Any]:
    """What a run measures: what was given, else what the preset says, else the defaults.

    Raises:
        ValueError: no such preset.
    """
    if preset not in PRESETS:
        known = ", ".join(name for name in PRESETS if name)
        raise ValueError(f"[grid] not known; got {preset!r}; try one of: {known}")
    said = {name: value for name, value in given.items() if value is not None}
    found = {**DEFAULTS, **PRESETS[preset], **said}
    if found["haystack"] is None:
        found["haystack"] = found["tokens"] // 2
    return {**found, "haystack": found["haystack"] or found["tokens"]}
