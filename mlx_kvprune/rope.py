"""Rotary position embedding of the model's own, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Rope = Callable[..., mx.array] | None


def find_rope(attention: Any) -> Rope:
    """The rotary module of an attention module, or None if it has none (some layers are without positions)."""
    if not getattr(attention, "use_rope", True):
        return None
    for name in ("rope", "rotary_emb", "rotary", "rope_emb", "pos_emb"):
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module) and callable(module):
            return module
    return None


def position_scale(rope: Rope, width: int) -> mx.array:
    """The factor per channel that a rotary module multiplies in beside the rotation (yarn, longrope) ``(D,)``."""
    if rope is None:
        return mx.ones(width)
    return rope(mx.ones((1, 1, 1, width)), offset=0)[0, 0, 0]


def unrotate(rope: Rope, x: mx.array, start: int) -> mx.array:
    """Undo the rotation of ``x`` ``(B, H, L, D)`` whose tokens stand at ``start .. start + L - 1``.

    A rotation by minus the position undoes one by the position. Read backwards, the tokens stand at consecutive
    negative positions, so that the module itself, of whatever type, can be asked to do it.
    """
    if rope is None:
        return x
    last = start + x.shape[2] - 1
    backwards = rope(x[:, :, ::-1], offset=-last)[:, :, ::-1]
    return backwards / (position_scale(rope, x.shape[-1]) ** 2).astype(x.dtype)
