"""How much of our storage a model can be given: *ragged*, *uniform*, or a refusal with its reason.

``ragged``   attention goes through us, keys and values stay where they lie, heads may hold different numbers of slots.
``uniform``  the model does its own attention: it is handed dense arrays, every head holds the same number of slots.
``refuse``   neither gives the model's own logits.

Which rung holds is not looked up but tried: a few tokens through the model with each kind of cache. The exception are a few
types (``INDEXED``) that would pass the trial and still be wrong.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvprune.cache import PrunedKVCache
from mlx_kvprune.forward import forward, leaves, pruned
from mlx_kvprune.settings import Budget, CacheSettings
from mlx_kvprune.storage import LayerShape
from mlx_kvprune.vlm import logits_of, of_mlx_vlm, why_unbounded

Wrap = Callable[[int], Any]
FAR = 1000  # a position at which a trial text starts
TRAINED = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "n_ctx", "seq_length")

# Types whose layers keep a second list of keys that must name the same slots as the first: they cannot be told apart from
# layers with two attentions by trying.
INDEXED = {
    "deepseek_v32": "its indexer picks positions of the main cache",
    "glm_moe_dsa": "its indexer picks positions of the main cache",
    "deepseek_v41": "its compressed cache indexes positions",
    "minimax_m3_vl": "its indexer picks positions of the main cache",
}


@dataclass(frozen=True)
class Layer:
    """One bounded layer: the module that does its attention, and what it stores."""

    attention: nn.Module
    shape: LayerShape


@dataclass(frozen=True)
class Rung:
    """What was found.

    Attributes:
        name: ``ragged``, ``uniform`` or ``refuse``.
        reason: why not a higher one; empty for ``ragged``.
        layers: the bounded layers in the order of their caches.
        others: how many caches are left as they are (sliding window, recurrent).
        vocab: width of the logits.
        lends: whether later layers ask earlier ones' caches for their keys and values.
        unbatched: why two texts in one batch do not give what each gives alone; empty if they do.
    """

    name: str
    reason: str
    layers: tuple[Layer, ...]
    others: int
    vocab: int = 0
    unbatched: str = ""
    lends: bool = True


class Witness:
    """Stands in front of a cache while a model is tried, and notes who calls."""

    def __init__(self, cache: PrunedKVCache):
        self.cache = cache
        self.caller: nn.Module | None = None
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        if self.caller is None:
            self.caller, self.keys, self.values = _calling_module(), keys, values
        return self.cache.update_and_fetch(keys, values)

    def layer(self) -> Layer:
        """What was noted."""
        assert self.caller is not None and self.keys is not None and self.values is not None
        kv_heads = self.keys.shape[1]
        n_heads = self.cache.n_heads or kv_heads
        widths = self.keys.shape[-1], self.values.shape[-1]
        return Layer(self.caller, LayerShape(n_heads, kv_heads, *widths, self.keys.itemsize))


def _calling_module() -> nn.Module | None:
    """The module whose code called ``update_and_fetch``: the attention."""
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


def find_rung(model: nn.Module, make: Callable[[Wrap], list[Any]]) -> Rung:
    """Try the rungs from the top.

    Args:
        model: a model of mlx-lm, our names bound in its modules.
        make: ``make(fn)`` is the model's own list of caches, every plain ``KVCache`` replaced by ``fn(layer)``.
    """
    untouched = make(lambda layer: None)
    n_bounded = sum(c is None for c in leaves(untouched))
    others = sum(c is not None for c in leaves(untouched))
    if not n_bounded:
        return Rung("refuse", "no layer has a plain KV cache to bound", (), others)
    if reason := INDEXED.get(getattr(model, "model_type", "")) or why_unbounded(model):
        return Rung("refuse", reason, (), others)
    expected = _run(model, make(_stock), settings=None)
    reasons = []
    for name, dense in (("ragged", False), ("uniform", True)):
        try:
            layers, lends = _try(model, make, dense, expected)
            unbatched = "the model does its own attention" if dense else why_unbatched(model, make)
            return Rung(name, "; ".join(reasons), layers, others, expected.shape[-1], unbatched, lends)
        except Exception as error:  # whatever the model's code does with what it is given
            reasons.append(f"{name}: {_one_line(error)}")
    return Rung("refuse", "; ".join(reasons), (), others)


def _try(model: nn.Module, make: Callable, dense: bool, expected: mx.array) -> tuple[tuple[Layer, ...], bool]:
    """The layers, if all is well, and whether they lend their keys to later ones; raises otherwise."""
    roomy = CacheSettings(policy="window", n_sink=1, window=4, block=4)
    witnesses: list[Witness] = []

    def witness(layer: int) -> Witness:
        witnesses.append(Witness(PrunedKVCache(roomy, None, layer, dense)))
        return witnesses[-1]

    difference = _difference(_run(model, make(witness), roomy), expected)
    if difference > _tolerance(expected.dtype):
        raise ValueError(f"logits differ from the model's own by {difference:.2g}")
    layers = tuple(w.layer() for w in witnesses if w.caller is not None)
    if len(layers) < len(witnesses):
        raise ValueError("some caches are never written")
    if not dense and any(w.cache.n_heads is None for w in witnesses):
        raise ValueError("its attention does not pass through scaled_dot_product_attention")
    tight = roomy.but(budget=Budget(tokens=roomy.smallest_budget))
    out = _run(model, make(lambda i: PrunedKVCache(tight, tight.smallest_budget, i, dense)), tight)
    if not mx.isfinite(out).all().item():
        raise ValueError("logits are not finite once slots are evicted")
    return layers, any(w.cache.asked for w in witnesses)


def why_unbatched(model: nn.Module, make: Callable[[Wrap], list[Any]]) -> str:
    """Try two texts of 13 and 5 tokens in one padded batch, as mlx-lm runs them, against each alone.

    The model's other caches are mlx-lm's own, and some of its types do not batch them rightly.
    """
    if of_mlx_vlm(model):
        return "mlx-vlm has batches of its own"
    texts = [mx.arange(1, n + 1)[None] for n in (13, 5)]
    roomy = CacheSettings(policy="window", n_sink=1, window=4, block=4)
    caches = lambda: make(lambda layer: PrunedKVCache(roomy, None, layer))
    try:
        alone = mx.concatenate([model(text, cache=caches())[:, -1] for text in texts])
        batch = [one.merge([one, other]) for one, other in zip(caches(), caches(), strict=True)]
        difference = _difference(_run_padded(model, batch, texts), alone)
    except Exception as error:  # whatever the model's code does with a batch
        return f"the model cannot be batched: {_one_line(error)}"
    if difference > _tolerance(alone.dtype):
        return f"logits of a batch differ from those of each text alone by {difference:.2g}"
    return ""


def why_unranked(model: nn.Module, make: Callable[[Wrap], list[Any]], ropes: list[Any], dense: bool) -> str:
    """Try positions in the cache with room for everything: why the logits are not the model's own; empty if they are.

    Keys that are normed after their rotation, or rotated in part, cannot be turned back; and where positions count for
    more than rotations, the model minds that the first token stands at ``FAR``.
    """
    roomy = CacheSettings(policy="window", n_sink=1, window=4, block=4, positions="cache")

    def bounded(layer: int) -> PrunedKVCache:
        cache = PrunedKVCache(roomy, None, layer, dense)
        cache.rope, cache.offset, cache.frame = ropes[layer], FAR, FAR
        return cache

    try:
        expected = _run(model, make(_stock), settings=None)
        difference = _difference(_run(model, make(bounded), roomy), expected)
    except Exception as error:  # whatever the model's code does
        return _one_line(error)
    return f"logits that differ by {difference:.2g}" if difference > _tolerance(expected.dtype) else ""


def _run_padded(model: nn.Module, batch: list[Any], texts: list[mx.array]) -> mx.array:
    """Last logits ``(B, vocab)`` of texts ``(1, n)`` read as mlx-lm's ``BatchGenerator`` reads them: twice padded."""
    for cut in (lambda n: slice(0, n // 2), lambda n: slice(n // 2, n - 1)):
        parts = [text[:, cut(text.shape[1])] for text in texts]
        lengths = [part.shape[1] for part in parts]
        padding = [max(lengths) - n for n in lengths]
        for cache in batch:
            cache.prepare(lengths=lengths, right_padding=padding)
        padded = [mx.pad(x, [(0, 0), (0, p)]) for x, p in zip(parts, padding, strict=True)]
        model(mx.concatenate(padded), cache=batch)
        for cache in batch:
            cache.finalize()
    return model(mx.concatenate([text[:, -1:] for text in texts]), cache=batch)[:, -1]


def _run(model: nn.Module, caches: list[Any], settings: CacheSettings | None) -> mx.array:
    """Logits of 16 tokens given in calls of 13, 2 and 1."""
    tokens = mx.arange(1, 17)[None]
    out = []
    for start, stop in ((0, 13), (13, 15), (15, 16)):
        call = lambda x, cache: logits_of(model(x, cache=cache))
        bounded = [c.cache if isinstance(c, Witness) else c for c in leaves(caches)]
        if settings is not None and any(c.dense for c in pruned(bounded)):
            out.append(forward(call, tokens[:, start:stop], caches))
        else:
            out.append(call(tokens[:, start:stop], caches))
    out = mx.concatenate(out, axis=1)
    mx.eval(out)
    return out


def _stock(layer: int) -> Any:
    from mlx_lm.models.cache import KVCache

    return KVCache()


def _difference(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    worst = mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-6)
    value = worst.item()
    return value if isinstance(value, float) and value == value else float("inf")


def _tolerance(dtype: mx.Dtype) -> float:
    return 1e-4 if dtype == mx.float32 else 0.1


def _one_line(error: Exception) -> str:
    """What went wrong, for the user: most models that are not ``ragged`` compute with what should have been keys."""
    text = str(error).splitlines()[0]
    if "Handle" in text or "incompatible function arguments" in text:
        what = re.search(r"attribute '(\w+)'|^(\w+)\(\)|for (\S+):", text)
        return f"its own code computes with the keys ({next(filter(None, what.groups())) if what else text[:80]})"
    return (
        text[:160] if isinstance(error, ValueError | NotImplementedError) else f"{type(error).__name__}: {text}"[:160]
    )


def trained_context(model: Any) -> int | None:
    """The longest text in tokens that the model's configuration names, or None if it names none."""
    for config in _configs(model):
        for name in TRAINED:
            value = config.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _configs(model: Any) -> Iterator[dict[str, Any]]:
    for owner in (model, getattr(model, "language_model", None), getattr(model, "model", None)):
        for name in ("args", "config"):
            args = getattr(owner, name, None)
            config = args if isinstance(args, dict) else getattr(args, "__dict__", {})
            yield config
            text = config.get("text_config")
            yield text if isinstance(text, dict) else getattr(text, "__dict__", {})
