"""The most that a machine allows: a decode step has to read every weight and every held row once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlx_kvprune.bench.bandwidth import copy_bandwidth
from mlx_kvprune.bench.candidates import Candidate
from mlx_kvprune.bench.rows import ceiling_tps

Row = dict[str, Any]


def weight_nbytes(model: Any) -> int:
    """Bytes of the weights that a decode step reads; of a mixture of experts all of them, which is too many.

    An embedding is looked up, one row of it; it counts where the logits are computed with it, too.
    """
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    parameters: Any = tree_flatten(model.parameters())
    total = sum(x.nbytes for _, x in parameters)
    if any("lm_head" in name or "output.weight" in name for name, _ in parameters):
        tables = (m for _, m in model.named_modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding))
        found: Any = [tree_flatten(m.parameters()) for m in tables]
        total -= sum(x.nbytes for pairs in found for _, x in pairs)
    return total


def ceilings(
    weights: int, contexts: Sequence[int], known: Iterable[Candidate], copy: list[float] | None = None
) -> dict[str, Any]:
    """The measured bandwidth of a copy, and for every context and candidate bytes to read and tokens a second at most."""
    copy = copy or copy_bandwidth()
    rows: list[Row] = []
    known = list(known)
    for context in contexts:
        for c in known:
            nbytes = c.nbytes(context)
            most = round(ceiling_tps(copy[0], weights, nbytes), 2)
            rows.append({"context": context, "candidate": c.name, "kv_bytes": int(nbytes), "ceiling_tps": most})
    return {"copy_gb_s": copy, "weight_bytes": weights, "rows": rows}
