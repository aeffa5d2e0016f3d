"""Gate modules: what a token is worth to a KV head, read off the input of its attention block.

All of them map ``(B, L, width)`` to ``(B, H_kv, L)`` float32, once per token. What the number means is the method's
business (``scorers/gated.py``): a logit of the decay, of being kept, of being evicted, or the log of an importance.

``linear``  one projection a layer: KVzap's cheapest gate.
``mlp``     ``W2 silu(W1 h + b1) + b2``: Bui et al. 2025, "Cache What Lasts" (TRIM-KV, arXiv 2512.03324).
``shared``  the same with one ``W2`` for all layers, so that scores of different layers are on one scale (its successor,
            global retention gates).
``sink``    each token against a few learned sinks, as attention would: "Fast KVzip" (arXiv 2601.17668).
``dms``     ``100 w . rmsnorm(h) - 5`` from ``w = 0``: Lancucki et al. 2025, "Dynamic Memory Sparsification"
            (arXiv 2506.05345).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

FORMS = ("linear", "mlp", "shared", "sink", "dms")
HIDDEN = 48  # of an MLP; the papers take 512
START = 6.0  # of a bias: everything is kept at first
SINK_DIM, SINKS = 16, 16
LAST = {"linear": "weight", "mlp": "last", "shared": "last"}  # the parameter of a form that its bias is added to

Draw = Callable[..., mx.array]


def drawing(seed: int) -> Draw:
    """What draws normal numbers of a shape; MLX's own state is the user's, and loading gates must not change it."""
    key = mx.random.key(seed)

    def draw(*shape: int) -> mx.array:
        nonlocal key
        key, own = mx.random.split(key)
        return mx.random.normal(shape, key=own)

    return draw


@dataclass(frozen=True)
class GateShape:
    """What the gates of a model look like.

    Attributes:
        form: one of ``FORMS``.
        widths: of each layer's attention input.
        heads: KV heads of each layer.
        groups: query heads per KV head of each layer (only ``sink`` reads it).
        hidden: width of an MLP's hidden layer.
    """

    form: str
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[int, ...] = field(default=())
    hidden: int = HIDDEN

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"[gates] not a form of gate; got {self.form!r}; try one of: {', '.join(FORMS)}")
        assert len(self.widths) == len(self.heads)

    @property
    def layers(self) -> int:
        return len(self.widths)


class Linear(nn.Module):
    """``W h + b``."""

    def __init__(self, width: int, heads: int, start: float = START):
        super().__init__()
        self.weight = mx.zeros((heads, width))
        self.bias = mx.full((heads,), start)

    def __call__(self, x: mx.array, last: mx.array | None = None) -> mx.array:
        return x @ self.weight.T + self.bias


class MLP(nn.Module):
    """``W2 silu(W1 h + b1) + b2``; without a ``W2`` of its own where it is shared."""

    def __init__(self, width: int, hidden: int, heads: int, shared: bool, draw: Draw, start: float = START):
        super().__init__()
        self.weight = draw(hidden, width) / math.sqrt(width)
        self.hidden_bias = mx.zeros((hidden,))
        self.bias = mx.full((heads,), start)
        if not shared:
            self.last = draw(heads, hidden) * 0.1 / math.sqrt(hidden)

    def __call__(self, x: mx.array, last: mx.array | None = None) -> mx.array:
        projected = self.last if last is None else last[: self.bias.shape[0]]
        return nn.silu(x @ self.weight.T + self.hidden_bias) @ projected.T + self.bias


class Sink(nn.Module):
    """``log mean_g 1 / (1 + sum_s exp(q_g . k_s - q_g . k - b_g))``: a token's key against learned sinks."""

    def __init__(self, width: int, heads: int, group: int, draw: Draw, start: float = START):
        super().__init__()
        rows = lambda n: draw(n, width) / math.sqrt(width)
        self.to_queries, self.query_bias = rows(heads * group * SINK_DIM), mx.zeros((heads * group * SINK_DIM,))
        self.to_keys = rows(heads * SINK_DIM)
        self.query_scale, self.key_scale = mx.ones((SINK_DIM,)), mx.ones((SINK_DIM,))
        self.sinks = mx.zeros((heads, SINKS, SINK_DIM))
        self.bias = mx.full((heads, 1, group), start + math.log(SINKS))

    def __call__(self, x: mx.array, last: mx.array | None = None) -> mx.array:
        batch, length, _ = x.shape
        heads, group = self.bias.shape[0], self.bias.shape[2]
        normed = lambda y, scale: mx.fast.rms_norm(y, scale, 1e-6)
        queries = (x @ self.to_queries.T + self.query_bias).reshape(batch, length, heads, group, SINK_DIM)
        queries = normed(queries, self.query_scale)
        keys = normed((x @ self.to_keys.T).reshape(batch, length, heads, 1, SINK_DIM), self.key_scale)
        logits = (queries * keys).sum(axis=-1) / math.sqrt(SINK_DIM) + self.bias[:, 0]  # (B, L, heads, group)
        base = (queries @ self.sinks.swapaxes(-1, -2)) / math.sqrt(SINK_DIM)  # (B, L, heads, group, sinks)
        log_score = -mx.logaddexp(mx.array(0.0), mx.logsumexp(base, axis=-1) - logits)
        return mx.logsumexp(log_score, axis=-1) - math.log(group)


class DMS(nn.Module):
    """``100 w . rmsnorm(h) - 5``; positive where a token is to be evicted."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.weight = mx.zeros((heads, width))

    def __call__(self, x: mx.array, last: mx.array | None = None) -> mx.array:
        normed = mx.fast.rms_norm(x, mx.ones((x.shape[-1],)), 1e-6)
        return 100 * (normed @ self.weight.T) - 5


class Gates(nn.Module):
    """The gates of a model, one per bounded layer.

    Args:
        shape: of them.
        start: of the biases: high, so that everything is kept at first.
        seed: of the first weights.

    Attributes:
        local: the layers whose heads would keep their floor alone (``structure.py``), as ``local_layers`` has them; None if
            nobody looked.
    """

    def __init__(self, shape: GateShape, start: float = START, seed: int = 0):
        super().__init__()
        self._shape = shape
        self.local: str | None = None
        draw = drawing(seed)
        if shape.form == "shared":
            self.last = draw(max(shape.heads), shape.hidden) * 0.1 / math.sqrt(shape.hidden)
        self.layers = [self._layer(i, start, draw) for i in range(shape.layers)]

    def _layer(self, i: int, start: float, draw: Draw) -> nn.Module:
        shape = self._shape
        width, heads = shape.widths[i], shape.heads[i]
        if shape.form == "linear":
            return Linear(width, heads, start)
        if shape.form == "sink":
            return Sink(width, heads, shape.groups[i] if shape.groups else 1, draw, start)
        if shape.form == "dms":
            return DMS(width, heads)
        return MLP(width, shape.hidden, heads, shape.form == "shared", draw, start)

    @property
    def shape(self) -> GateShape:
        return self._shape

    def __call__(self, layer: int, x: mx.array) -> mx.array:
        """The gate of ``layer`` for attention inputs ``(B, L, width)`` -> ``(B, H_kv, L)`` float32."""
        gate: Any = self.layers[layer]
        last = self.last if self._shape.form == "shared" else None
        return gate(x.astype(mx.float32), last).swapaxes(1, 2)

    def all_layers(self, xs: Sequence[mx.array]) -> list[mx.array]:
        """The gates of every layer for its own input."""
        return [self(i, x) for i, x in enumerate(xs)]

    @property
    def numbers(self) -> int:
        """How many numbers they have."""
        return sum(x.size for _, x in tree_flatten(self.parameters()))

    @property
    def nbytes(self) -> int:
        """Bytes that they take, beside the model's weights."""
        return sum(x.nbytes for _, x in tree_flatten(self.parameters()))

    @property
    def flops(self) -> int:
        """Multiplications and additions per token, all layers."""
        flat = tree_flatten(self.parameters())
        matrices = sum(x.size for name, x in flat if x.ndim > 1 and not name.startswith("last"))
        again = self.last.size * self._shape.layers if self._shape.form == "shared" else 0
        return 2 * (matrices + again)

    def arrays(self) -> dict[str, mx.array]:
        """The parameters by name."""
        return dict(tree_flatten(self.parameters()))

    def identity(self) -> str:
        """Tells these numbers apart from others: of a file, of another file, of a further training."""
        known = [np.array(x.astype(mx.float32)).tobytes() for _, x in sorted(self.arrays().items())]
        return hashlib.sha256(b"".join(known)).hexdigest()[:12]

    def move(self, scale: float, added: float) -> None:
        """Make every number that they say ``scale`` times it ``+ added``.

        Raises:
            ValueError: a form whose number is not the sum of a projection and a bias, unless nothing would change.
        """
        if (scale, added) == (1.0, 0.0):
            return
        if self.shape.form not in LAST:
            raise ValueError(
                f"[gates] numbers of this form cannot be moved; got {self.shape.form!r}; try --form linear"
            )
        arrays = self.arrays()
        for name in arrays:
            own = name.rpartition(".")[2]
            if own in (LAST[self.shape.form], "bias"):
                arrays[name] = scale * arrays[name] + (added if own == "bias" else 0.0)
        self.restore(arrays)

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """Set the parameters to those of another of this shape; they are computed with in float32.

        Raises:
            ValueError: they are not of this shape.
        """
        own = self.arrays()
        for name, x in own.items():
            got = tuple(arrays[name].shape) if name in arrays else "nothing"
            if got != tuple(x.shape):
                raise ValueError(f"[gates] {name} must be {tuple(x.shape)}; got {got}; try the file again")
        self.update(tree_unflatten([(name, arrays[name].astype(mx.float32)) for name in own]))
