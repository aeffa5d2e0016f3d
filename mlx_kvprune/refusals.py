"""What goes with which model: combinations that cannot be had are refused here, with the reason and what to try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvprune.ladder import Rung, why_unranked
from mlx_kvprune.policy import Policy
from mlx_kvprune.rope import check_rankable, find_rope, unrotate
from mlx_kvprune.settings import CacheSettings


def check_full(settings: CacheSettings) -> None:
    """Refuse what mlx-lm's own cache would ignore.

    Raises:
        ValueError: there is such a setting.
    """
    default = CacheSettings()
    for name in ("kv_bits", "kv_key_bits", "kv_value_bits", "allocator", "local_layers"):
        if getattr(settings, name) not in (getattr(default, name), "uniform"):
            raise ValueError(
                f"[{name.replace('_', '-')}] policy full is mlx-lm's own cache; got {getattr(settings, name)}; "
                "try another policy"
            )
    if settings.positions == "cache":
        raise ValueError("[positions] policy full is mlx-lm's own cache; got cache; try another policy")


def check_policy(rung: Rung, policy: Policy, settings: CacheSettings) -> None:
    """Refuse what the model's rung cannot give a policy.

    Raises:
        ValueError: it needs queries, a question or a rotary module, or would let layers or heads hold differently many slots.
    """
    assert policy.scorer is not None
    needs = policy.scorer.needs
    if rung.name == "uniform" and policy.scorer.least is not None:
        raise ValueError(
            f"[threshold] policy {policy.name!r} drops tokens of some heads only, which this model cannot take; got "
            f"{rung.reason}; try --policy-option threshold=null with --allocator uniform"
        )
    if rung.name == "uniform" and settings.allocator != "uniform":
        who = "heads" if settings.ragged else "layers"  # whose masks are one array, made for the first layer
        raise ValueError(
            f"[allocator] {settings.allocator} lets {who} hold differently many slots, which this model cannot take; got "
            f"{rung.reason}; try --allocator uniform"
        )
    if rung.name == "uniform" and settings.local_layers:
        raise ValueError(
            f"[local-layers] layers would hold differently many slots, which this model cannot take; got {rung.reason}; "
            "try it without --local-layers"
        )
    if rung.name == "uniform" and needs & {"attention", "queries"}:
        raise ValueError(
            f"[policy] {policy.name} needs the queries, which this model keeps to itself; got {rung.reason}; "
            "try window, knorm, keydiff, random or surprise"
        )
    if "question" in needs and not settings.question:
        raise ValueError(f"[policy] {policy.name} needs a question; got none; try `ask`, or question=<token ids>")
    if "rope" in needs and any(_rotates_unseen(x.attention) or _rotates_a_part(x) for x in rung.layers):
        raise ValueError(
            f"[policy] {policy.name} needs the model's rotary module; got an attention without one; try snapkv"
        )
    if "rope" in needs and (by_length := next(filter(None, map(_rotates_by_length, rung.layers)), "")):
        raise ValueError(
            f"[policy] {policy.name} turns queries back, which a rotation by the length of the text does not allow; got "
            f"{by_length}; try snapkv"
        )


def why_no_ranks(model: nn.Module, rung: Rung, replaced: Callable[[Callable[[int], Any]], list[Any]]) -> str:
    """Why a model cannot have positions in the cache; empty if it can.

    Args:
        replaced: the model's caches, the bounded ones made by a function of the layer.
    """
    ropes = [find_rope(layer.attention) for layer in rung.layers]
    if any(_rotates_unseen(layer.attention) for layer in rung.layers):
        return "cache positions need the model's rotary module; got an attention without one"
    try:
        for rope in ropes:
            check_rankable(rope)
    except ValueError as error:
        return str(error).removeprefix("[positions] ").split("; try")[0]
    reason = why_unranked(model, replaced, ropes, rung.name == "uniform")
    return reason and f"cache positions need keys that come straight from the rotary module; got {reason}"


def _rotates_a_part(layer: Any) -> bool:
    """Whether a rotary module cannot take a whole key: it is meant for a part of it."""
    rope = find_rope(layer.attention)
    if rope is None:
        return False
    try:
        mx.eval(rope(mx.zeros((1, 1, 1, layer.shape.key_dim)), offset=0))
    except ValueError:
        return True
    return False


def _rotates_by_length(layer: Any) -> str:
    """The class of a rotary module that does otherwise beyond the length that it was made for; empty if it does not."""
    rope = find_rope(layer.attention)
    limit = getattr(rope, "max_position_embeddings", None)
    if rope is None or not isinstance(limit, int):
        return ""
    x, start = mx.sin(mx.arange(4 * layer.shape.key_dim, dtype=mx.float32)).reshape(1, 1, 4, -1), limit + 100
    back = unrotate(rope, rope(mx.array(x), offset=start), start)
    return "" if mx.allclose(back, x, atol=0.1).item() else type(rope).__name__


def _rotates_unseen(attention: nn.Module) -> bool:
    """Whether an attention has no rotary module that can be found (layers that say so have no positions at all)."""
    return find_rope(attention) is None and getattr(attention, "use_rope", True)
