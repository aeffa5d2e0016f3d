"""Density: which share of its tokens each head keeps, by kind and length of text, and how much whole caches are compressed.

It is for policies whose size depends on the text: those with a threshold (``spkv``, ``dms``; ``kvzap`` and ``fastkvzip`` if
they are given one). What heads share under ``head_adaptive`` and ``global`` is a fixed sum otherwise, so that only its
distribution over heads depends on the text. ``spread`` is the standard deviation
of heads' densities, ``moves`` how far a head's density differs between texts of one length (mean over heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_kvprune.evals import facts
from mlx_kvprune.evals.conditions import SIZES, Condition, feed, held
from mlx_kvprune.evals.job import Job, Measured, Task, Tick
from mlx_kvprune.evals.store import Unit, by_condition, named
from mlx_kvprune.evals.texts import CHARS_PER_TOKEN
from mlx_kvprune.forward import pruned

LENGTHS = (4, 2, 1)  # parts of the longest
NOTE = "density: sizes depend on the text where a threshold decides (spkv, dms); else only how heads share them"


@dataclass(frozen=True)
class Text:
    """Tokens of a text, and its kind."""

    kind: str
    tokens: tuple[int, ...]


def items(job: Job) -> list[Text]:
    """Every kind at every length: the data's own (one for each file), sentences of facts, and shuffled words."""
    own = {document.name or "text": document.text for document in reversed(job.documents)}
    kinds = {**dict(reversed(own.items())), **generated(job.seed, CHARS_PER_TOKEN * job.tokens, job.plain)}
    encoded = {kind: tuple(job.tokenizer.encode(text[: CHARS_PER_TOKEN * job.tokens])) for kind, text in kinds.items()}
    parts = [job.tokens // part for part in LENGTHS]
    return [Text(kind, ids[:n]) for kind, ids in encoded.items() for n in parts if len(ids) >= n]


def generated(seed: int, n_chars: int, texts: Sequence[str]) -> dict[str, str]:
    """Texts with more to keep than prose (facts, one after the other) and with less (its words, shuffled)."""
    rng = np.random.default_rng(seed)
    told: list[str] = []
    while sum(map(len, told)) < n_chars:
        told += [fact.told for fact in facts.drawn(rng, 2 * len(facts.KINDS), "")]
    words = " ".join(texts)[:n_chars].split()
    return {"facts": " ".join(told), "shuffled words": " ".join(words[i] for i in rng.permutation(len(words)))}


def measure(job: Job, text: Text, conditions: Sequence[Condition], tick: Tick) -> Measured:
    """The densities of each condition; the full cache's are one."""
    for condition in conditions:
        caches = condition.caches(job.model)
        feed(job.model, text.tokens, caches)
        tick(len(text.tokens))
        sizes = held(caches)
        shares = densities(caches, len(text.tokens))
        ratio = 1.0 if condition.is_full else sizes["kv_bytes_full"] / max(1, sizes["kv_bytes"])
        yield (
            condition,
            {"kind": text.kind, "tokens": len(text.tokens), "compression": ratio, "density": shares, **sizes},
        )


def densities(caches: list[Any], n_tokens: int) -> list[list[float]]:
    """Slots that hold a token, as a share of the tokens seen: by layer and KV head."""
    counts = [(np.array(cache.held.positions())[0] >= 0).sum(axis=-1) for cache in pruned(caches)]
    return [[round(float(n) / n_tokens, 5) for n in heads] for heads in counts] or [[1.0]]


def work(job: Job, text: Text, conditions: Sequence[Condition]) -> int:
    """How many tokens ``measure`` sends through the model."""
    return len(text.tokens) * len(conditions)


def rows(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One row per condition: compression of each text, its regression on length, and densities over heads."""
    return [_row(some) for some in by_condition(units)]


def _row(units: Sequence[Unit]) -> dict[str, Any]:
    results = [unit["result"] for unit in units]
    slope, fit = regression([x["tokens"] for x in results], [x["compression"] for x in results])
    longest = max(x["tokens"] for x in results)
    at = np.array([np.ravel(x["density"]) for x in results if x["tokens"] == longest])
    return {
        "task": "density",
        **named(units[0]),
        "texts": len(results),
        "tokens": longest,
        "density": float(at.mean()),
        "density_least": float(at.min()),
        "density_most": float(at.max()),
        "spread": float(at.std(axis=1).mean()),
        "moves": float(at.std(axis=0).mean()),
        "by_text": [{k: x[k] for k in ("kind", "tokens", "compression")} for x in results],
        "slope": slope,
        "r2": fit,
        **{name: max(x[name] for x in results) for name in SIZES},
    }


def regression(lengths: Sequence[float], compression: Sequence[float]) -> tuple[float, float]:
    """Least squares of compression on length: growth for every doubling, and the share of variance it explains."""
    x, y = np.log2(lengths), np.array(compression, float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0, 0.0
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(1 - ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum())


TASK = Task(
    "density",
    "what each head keeps, by kind and length of text",
    items,
    measure,
    work,
    rows,
    length=lambda job: job.tokens,
    question=False,
    notes=lambda job: [NOTE],
)
