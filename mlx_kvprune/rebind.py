"""The names in mlx-lm's and mlx-vlm's modules that lead into ours while a model is attached.

``scaled_dot_product_attention`` is imported by name into each model file, so that it is replaced in every module that holds
the original. Calls that have nothing to do with a bounded cache go on to the original unchanged.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_kvprune.batch import BatchHandle
from mlx_kvprune.cache import Handle, PrunedKVCache
from mlx_kvprune.forward import pruned
from mlx_kvprune.vlm import check_mask

_users = 0  # attached models; the names are ours while there is one


def register() -> None:
    """Let mlx-lm's ``load_prompt_cache`` find our class: it looks names up in its own module."""
    importlib.import_module("mlx_lm.models.cache").PrunedKVCache = PrunedKVCache  # type: ignore[attr-defined]


def acquire() -> None:
    """Put our functions in; also in modules that were imported since the last time."""
    global _users
    register()
    for name, original, ours in _bound():
        _replace(name, original, ours)
    _users += 1


def release() -> None:
    """Take them out again after the last attached model."""
    global _users
    _users = max(0, _users - 1)
    if _users == 0:
        for name, original, ours in _bound():
            _replace(name, ours, original)


def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function; keys that are a ``Handle`` are attended to where they lie."""
    if isinstance(keys, Handle | BatchHandle):
        owner: Any = keys.cache
        return owner.attend(queries, keys, scale, mask, sinks)
    return _original("scaled_dot_product_attention")(
        queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
    )


def speculative_generate_step(prompt: mx.array, model: Any, draft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """mlx-lm's function; refused where a cache cannot take tokens back."""
    cache = kwargs.get("prompt_cache")
    bounded = pruned(cache) if cache is not None else pruned(_made(model)) + pruned(_made(draft_model))
    if bounded:
        raise _no_drafts(bounded[0])
    return _original("speculative_generate_step")(prompt, model, draft_model, *args, **kwargs)


def _no_drafts(cache: PrunedKVCache) -> ValueError:
    return ValueError(
        f"[speculative] a bounded cache cannot take back rejected draft tokens; got policy {cache.settings.policy!r}; "
        "try without a draft model, or policy 'full'"
    )


def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
    """mlx-lm's function; it would ignore ``max_kv_size`` without a word, as the model makes its own caches."""
    cache = _original("make_prompt_cache")(model, max_kv_size)
    _check_size(cache, max_kv_size)
    return cache


def maybe_quantize_kv_cache(
    prompt_cache: Any, quantized_kv_start: int, kv_group_size: int, kv_bits: int | None
) -> None:
    """mlx-lm's function; it would leave bounded caches as they are without a word."""
    _check_bits(prompt_cache, kv_bits)
    _original("maybe_quantize_kv_cache")(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)


def batch_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """mlx-lm's function; refused where bounded caches cannot be merged into batches."""
    if reason := next(filter(None, (c.unbatched() for c in pruned(_made(model)))), None):
        raise ValueError(f"[batch] {reason}; got batch_generate; try one request at a time")
    return _original("batch_generate")(model, *args, **kwargs)


def _made(model: Any) -> list[Any]:
    return _original("make_prompt_cache")(model)


def _check_size(cache: Any, max_kv_size: int | None) -> None:
    if max_kv_size is not None and pruned(cache):
        raise ValueError(
            f"[max-kv-size] a bounded cache has a budget; got {max_kv_size}; try attach(model, budget=...)"
        )


def _check_bits(cache: Any, kv_bits: float | None) -> None:
    if kv_bits is not None and pruned(cache):
        raise ValueError(
            f"[kv-bits] a bounded cache is not quantized later; got {kv_bits}; try attach(model, kv_bits=...)"
        )


# -- the same of mlx-vlm -----------------------------------------------------------------------------------------------


def _vlm_attention(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None
) -> mx.array:
    if isinstance(keys, Handle):
        check_mask(mask)
        return keys.cache.attend(queries, keys, scale, mask, sinks)
    return _original("scaled_dot_product_attention", VLM)(queries, keys, values, cache, scale, mask, sinks)


def _vlm_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
    cache = _original("make_prompt_cache", VLM)(model, max_kv_size)
    _check_size(cache, max_kv_size)
    return cache


def _vlm_quantize(prompt_cache: Any, quantized_kv_start: int, kv_group_size: int, kv_bits: Any, **more: Any) -> None:
    _check_bits(prompt_cache, kv_bits)
    _original("maybe_quantize_kv_cache", VLM)(prompt_cache, quantized_kv_start, kv_group_size, kv_bits, **more)


def _vlm_speculative(model: Any, draft_model: Any, prompt_cache: Any, *args: Any, **kwargs: Any) -> Any:
    if bounded := pruned(prompt_cache):
        raise _no_drafts(bounded[0])
    return _original("run_speculative_rounds", VLM)(model, draft_model, prompt_cache, *args, **kwargs)


VLM = {
    "scaled_dot_product_attention": "mlx_vlm.models.base",
    "make_prompt_cache": "mlx_vlm.models.cache",
    "maybe_quantize_kv_cache": "mlx_vlm.generate.common",
    "run_speculative_rounds": "mlx_vlm.speculative.utils",
}
_VLM_OURS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _vlm_attention,
    "make_prompt_cache": _vlm_prompt_cache,
    "maybe_quantize_kv_cache": _vlm_quantize,
    "run_speculative_rounds": _vlm_speculative,
}

# -- binding -----------------------------------------------------------------------------------------------------------

_SOURCES = {
    "scaled_dot_product_attention": "mlx_lm.models.base",
    "speculative_generate_step": "mlx_lm.generate",
    "batch_generate": "mlx_lm.generate",
    "make_prompt_cache": "mlx_lm.models.cache",
    "maybe_quantize_kv_cache": "mlx_lm.generate",
}
_originals: dict[tuple[str, str], Callable[..., Any]] = {}


def _original(name: str, sources: dict[str, str] = _SOURCES) -> Callable[..., Any]:
    key = (sources[name], name)
    if key not in _originals:
        _originals[key] = getattr(importlib.import_module(sources[name]), name)
    return _originals[key]


def _bound() -> list[tuple[str, Any, Any]]:
    """Names, what they stand for, and ours; mlx-vlm's as far as somebody imported it."""
    theirs = [name for name, module in VLM.items() if module in sys.modules]
    return [(name, _original(name), globals()[name]) for name in _SOURCES] + [
        (name, _original(name, VLM), _VLM_OURS[name]) for name in theirs
    ]


def _replace(name: str, old: Any, new: Any) -> None:
    for module in list(sys.modules.values()):
        space = getattr(module, "__dict__", {})  # a module may be None, which forbids its import
        if space.get(name) is old and module.__name__ != __name__:
            space[name] = new
