"""What the rows of one model say: the best policy and allocator at each budget, and how far it is from the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mlx_kvprune.evals.conditions import CONTROLS
from mlx_kvprune.evals.frontier import label
from mlx_kvprune.evals.tables import fixed, interval
from mlx_kvprune.policy import find

Row = dict[str, Any]
ENOUGH = 50  # trials
ALIKE = ("dtype", "gates", "gate_id", "local_layers", "threshold")  # what seeds that are compared have in common
ASKED = {"1/4": 0.95, "1/8": 0.90, "1/16": 0.75}  # of what the full cache answers, ``ask`` is to answer so much


def findings(rows: Sequence[Row]) -> list[str]:
    """Sentences in Markdown; empty if no row was measured at a fraction of the text.

    Args:
        rows: of one model; ``table`` tells apart those of different tables.
    """
    bounded = [row for row in rows if row["policy"] != "full" and row.get("share")]
    shares = sorted({row["share"] for row in bounded}, key=Fraction, reverse=True)
    found = []
    for share in shares:
        mine = [row for row in bounded if row["share"] == share]
        found += [*_predictions(share, mine), *_answers(share, mine), *_asked(share, mine)]
    return [*found, *_not_counted(rows)]


def _predictions(share: str, rows: Sequence[Row]) -> Iterator[str]:
    """Of each length of text, data, precision and seed: the least KL beside ``window``'s on the same tokens, or the least,
    of those that read the most texts.
    """
    rows = [row for row in rows if row["task"] == "fidelity"]
    kind = lambda row: (row["tokens"], row.get("data", ""), row.get("kv_bits") or 0, row.get("seed", 0))
    for tokens, data, bits, seed in sorted({kind(row) for row in rows}):
        mine = [row for row in rows if kind(row) == (tokens, data, bits, seed)]
        named = [row for row in mine if row["policy"] not in CONTROLS]
        if not named:
            continue
        most = max(row["texts"] for row in named)
        named = [row for row in named if row["texts"] == most]
        measure = "over_window" if all("over_window" in row for row in named) else "kl"
        best = min(named, key=lambda row: row[measure])
        read = f"{best['texts']} text{'s' if best['texts'] > 1 else ''}"
        text = f"**{share}** of {tokens:,} tokens ({f'{data}, ' if data else ''}{read}), predictions: `{label(best, mine)}`, "
        text += f"KL {interval(best, 'kl', '.3f')} nats from full, NLL {interval(best, 'nll_change', '+.3f')}"
        untrained = [row for row in named if not find(row["policy"]).gates]
        if untrained and best not in untrained:
            second = min(untrained, key=lambda row: row[measure])
            text += f"; without training `{label(second, mine)}` {interval(second, 'kl', '.3f')}"
        window = _window(mine, best)
        yield text + (f"; {_against(best, window, len(named))}" if window else "")


def _window(rows: Sequence[Row], best: Row) -> Row | None:
    """The control in the precision of the best, of the same table if that has one."""
    controls = [row for row in rows if row["policy"] == "window" and row.get("kv_bits") == best.get("kv_bits")]
    return next((row for row in controls if row.get("table") == best.get("table")), next(iter(controls), None))


def _against(best: Row, window: Row, of: int) -> str:
    """The control beside it; by the difference on the same tokens, where one table has both.

    The best ``of`` so many is told apart if chance would find such a one in fewer than 5% of the cases (Bonferroni).
    """
    said = f"`{label(window)}` {interval(window, 'kl', '.3f')}"
    if "over_window" not in best:
        apart = "intervals apart" if best["kl_high"] < window["kl_low"] else "intervals overlap"
        return f"{'' if best['kl'] < window['kl'] else '**no better than** '}{said} ({apart})"
    apart = of * best["over_window_p"] < 0.05
    better = "**no better than** " if best["over_window"] >= 0 else "" if apart else "**not told apart from** "
    among = f"; the best of {of}" if of > 1 else ""
    return f"{better}{said} (on the same tokens {interval(best, 'over_window', '+.3f')}{among})"


def _answers(share: str, rows: Sequence[Row]) -> Iterator[str]:
    """Of each task, wording and table that counts: the most exact answers of what evicts anything."""
    evicts = lambda row: not (str(row["budget"]).isdigit() and int(row["budget"]) >= row["prompt_tokens"])
    counting = [row for row in rows if row.get("counts") and row["task"] != "ask" and evicts(row)]
    kind = lambda row: (row["task"], row["wording"], row.get("table"))
    for task, wording, table in dict.fromkeys(kind(row) for row in counting):
        mine = [row for row in counting if kind(row) == (task, wording, table)]
        best = max(mine, key=lambda row: (row["score"], row["logprob"]))
        window = _window(mine, best)
        against = "" if window in (None, best) else f"; `{label(window)}` {window['exact']}/{window['trials']}"
        yield (
            f"**{share}**, {task} ({wording}): `{label(best)}` {best['exact']}/{best['trials']} "
            f"[{best['score_low']:.0%}, {best['score_high']:.0%}], full {best['exact_full']}/{best['trials']}{against}"
            + _few(best)
        )


def _gained(row: Row) -> str:
    """Whether answers are likelier or less likely than with the full cache, if their interval leaves out zero."""
    if row.get("gain_low", 0) <= 0 <= row.get("gain_high", 0):
        return ""
    return f"; its answers' log p {interval(row, 'gain', '+.2f')} against full's"


def _few(row: Row) -> str:
    return "" if row["trials"] >= ENOUGH else f"; fewer than {ENOUGH} trials: a direction, not a measure"


def _asked(share: str, rows: Sequence[Row]) -> Iterator[str]:
    """What is left of full's answers when documents are read for one question."""
    for row in rows:
        if row["task"] == "ask" and row["policy"] == "probe" and row["exact_full"]:
            way = f"ask ({row['wording']})"
            kept = row["kept"] / row["exact_full"]
            aim = f", asked for: {ASKED[share]:.0%}" if share in ASKED else ""
            around = f"[{row['kept_low']:.0%}, {row['kept_high']:.0%}]"
            yield (
                f"**{share}**, {way}: `{label(row)}` keeps {row['kept']} of {row['exact_full']} ({kept:.0%} {around}{aim})"
                + _gained(row)
                + _few(row)
            )


def _not_counted(rows: Sequence[Row]) -> list[str]:
    full = [row for row in rows if row["policy"] == "full" and row.get("counts") is False]
    names = dict.fromkeys(f"{row['task']} ({row['wording']}: {row['exact']}/{row['trials']})" for row in full)
    return [f"The full cache itself does not solve, so that nothing follows: {', '.join(names)}"] if names else []


def over_seeds(rows: Sequence[tuple[int, Row]]) -> list[str]:
    """Mean and standard deviation of the headline number of what was measured with several seeds.

    Args:
        rows: each with the seed of its run; those of other data, lengths of text or gates are other rows.
    """
    found: dict[tuple, dict[int, float]] = {}
    for seed, row in rows:
        name = next((name for name in ("kl", "score", "regret") if name in row), None)
        if name and row["policy"] != "full":
            same = tuple(map(row.get, ("wording", "data", "length", *ALIKE)))
            place = (row["task"], label(row), row.get("share") or row["budget"], name, *same)
            found.setdefault(place, {})[seed] = row[name]
    return [
        f"{task}{f' ({wording})' if wording else ''}{f', {data}' if data else ''}{f', {length:,} tokens' if length else ''}, "
        f"`{who}` {budget}: {name} {fixed(float(np.mean(x)), '.3f')} "
        f"+- {fixed(float(np.std(x, ddof=1)), '.3f')} over {len(x)} seeds"
        for (task, who, budget, name, wording, data, length, *_), by_seed in found.items()
        if len(x := list(by_seed.values())) > 1
    ]
