"""Models of mlx-vlm: where their decoder is, what it is given and returns, and what bounded caches cannot take.

mlx-vlm's generation turns images and text into embeddings and calls ``model.language_model`` with them and the caches. There
an image token is a token like any other. Nothing here imports mlx-vlm: who has such a model has imported it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

CACHE = "mlx_vlm.models.cache"
MROPE = ("_rope_deltas", "_position_ids")  # what a decoder remembers that numbers image tokens by row and column
GIVEN = ("mask", "position_ids", "rope_deltas", "pos_hw", "cross_attention_states", "encoder_outputs")
BESIDE = (
    "per_layer_inputs",
    "visual_pos_masks",
    "deepstack_visual_embeds",
)  # which it cuts by the cache's offset itself


def of_mlx_vlm(model: Any) -> bool:
    """Whether a model, or a part of one, is defined in mlx-vlm."""
    return type(model).__module__.startswith("mlx_vlm.")


def decoder(model: Any) -> Any:
    """What is called with caches: the ``language_model`` of a model of mlx-vlm, any other model itself."""
    return getattr(model, "language_model", model) if of_mlx_vlm(model) else model


def plain_caches(model: Any) -> tuple[type, ...]:
    """The classes of unbounded caches that a model may make, its own library's first."""
    from mlx_lm.models.cache import KVCache

    return (sys.modules[CACHE].KVCache, KVCache) if of_mlx_vlm(model) else (KVCache,)


def why_unbounded(model: Any) -> str:
    """Why a decoder of mlx-vlm cannot be bounded, where trying it with text would not show; empty if it may."""
    if of_mlx_vlm(model) and any(hasattr(model, name) for name in MROPE):
        return "positions of image tokens that are rows and columns (M-RoPE), which no cache here carries"
    return ""


def check_call(model: Any, given: Mapping[str, Any], in_steps: bool) -> None:
    """See that a decoder's call leaves masks and positions to the caches.

    Args:
        model: the decoder.
        given: its arguments by name.
        in_steps: whether the call will be cut.

    Raises:
        ValueError: it brings its own, or what cannot be cut with the tokens.
    """
    if not of_mlx_vlm(model):
        return
    wrong = [name for name in GIVEN + (BESIDE if in_steps else ()) if given.get(name) is not None]
    wrong += [name for name in MROPE if getattr(model, name, None) is not None]
    if wrong:
        tries = "another policy with allocator uniform" if wrong[0] in BESIDE else "it without, or another model type"
        raise ValueError(f"[vlm] a bounded cache cannot follow what the decoder is given; got {wrong[0]}; try {tries}")


def check_mask(mask: Any) -> None:
    """See that no new token sees a later one: a bounded cache takes tokens block by block.

    Args:
        mask: None, ``"causal"`` or an array ``(..., L, S)``, bool or additive.

    Raises:
        ValueError: some do, as in models whose images are read as a whole.
    """
    if not isinstance(mask, mx.array) or mask.shape[-2] == 1:
        return
    n_new = mask.shape[-2]
    newest = mask[..., -n_new:]
    visible = newest if newest.dtype == mx.bool_ else newest > -1e3
    if mx.triu(visible.astype(mx.int32), k=1).any().item():
        raise ValueError(
            "[vlm] a bounded cache is causal; got image tokens that see later ones; try another model type"
        )


def logits_of(output: Any) -> mx.array:
    """The logits ``(B, L, vocab)`` that a model returned, bare or in mlx-vlm's ``LanguageModelOutput``."""
    return getattr(output, "logits", output)


def joined(outputs: list[Any]) -> Any:
    """One output for those of the steps of a call, of the kind that the model returns."""
    if len(outputs) == 1:
        return outputs[0]
    logits = mx.concatenate([logits_of(x) for x in outputs], axis=1)
    return logits if isinstance(outputs[-1], mx.array) else dataclasses.replace(outputs[-1], logits=logits)
