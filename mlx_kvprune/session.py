"""Caches that outlive a process or are taken apart: save, load, fork, rewind, drop.

All of them work on a list of caches, as ``model.make_cache()`` gives it; mlx-lm's own caches in it (sliding windows) come
along where that is possible.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_kvprune import session_file
from mlx_kvprune.attach import attachment_of, check_saved_with, hooked, tell_ropes
from mlx_kvprune.batch import BatchPrunedKVCache
from mlx_kvprune.cache import PrunedKVCache
from mlx_kvprune.forward import check_whole, leaves, pending, pruned
from mlx_kvprune.vlm import decoder, of_mlx_vlm

Path = str | os.PathLike[str]


def save_cache(path: Path, cache: list[Any], **notes: Any) -> None:
    """Write caches to one ``.safetensors`` file: beside its place, then renamed; the old file is whole until then.

    Args:
        path: of the file.
        cache: list of caches.
        notes: whatever JSON can hold, given back by ``load_notes``.

    Raises:
        ValueError: nothing to save, or the file cannot be written.
    """
    _bounded(cache, "save")
    arrays, meta = pack(cache)
    session_file.write(path, arrays, {**meta, "notes": notes})


def load_cache(path: Path, model: nn.Module) -> list[Any]:
    """Caches that ``save_cache`` wrote, to go on with: the next token's logits are the same.

    Args:
        path: of the file.
        model: the model that they were made with; the hook is put in if it is not.

    Raises:
        ValueError: no such file, damaged, foreign, of a newer version, or of another model.
    """
    arrays, meta = session_file.read(path)
    return unpack(arrays, meta, model)


def load_notes(path: Path) -> dict[str, Any]:
    """The notes that ``save_cache`` was given."""
    return session_file.read(path)[1].get("notes", {})


def fork(cache: list[Any]) -> list[Any]:
    """A second list of caches that goes its own way from here; nothing is shared that is written."""
    _bounded(cache, "fork")
    twin = copy.deepcopy(cache)
    mx.eval(pending(twin))  # now, for another thread could not
    return twin


def rewind(cache: list[Any], n: int) -> None:
    """Take back the newest ``n`` tokens, exactly as if they had never been read.

    Raises:
        ValueError: slots changed hands meanwhile, or a policy saw the tokens' queries; nothing is changed then.
    """
    bounded = _bounded(cache, "rewind")
    others = [c for c in leaves(cache) if not isinstance(c, PrunedKVCache)]
    if not isinstance(n, int) or not 0 <= n <= bounded[0].tokens_seen:
        raise ValueError(f"[rewind] not so many tokens were read; got {n}; try 0 to {bounded[0].tokens_seen}")
    if n and any(not c.is_trimmable() for c in others):
        raise ValueError(
            f"[rewind] the model's sliding windows have moved on; got {n}; try a cache that was forked before"
        )
    for c in bounded:
        c.check_rewind(n, "rewind")
    for c in (*bounded, *others):
        c.trim(n)


def drop(cache: list[Any], start: int, stop: int, *, close: bool = False) -> None:
    """Forget the tokens at the positions ``start .. stop - 1``: a finished subtask, a tool's long answer.

    What later tokens took from them stays in their keys and values.

    Args:
        cache: list of caches.
        start: first position.
        stop: one past the last.
        close: later tokens move up by ``stop - start`` positions; else a gap stays.

    Raises:
        ValueError: no such span; or keys would have to be turned that are quantized.
    """
    bounded = _bounded(cache, "drop")
    written = min(c.held.written for c in bounded)
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= written):
        raise ValueError(f"[drop] no such span of positions; got {start} to {stop}; try within 0 to {written}")
    if any(not isinstance(c, PrunedKVCache) for c in leaves(cache)):
        raise ValueError(
            "[drop] the model has layers whose caches cannot forget a span; got sliding windows or states; "
            "try a model whose layers are all bounded"
        )
    for c in bounded:
        c.check_drop(close)
    if close and bounded[0].settings.positions == "text":
        _check_turning(bounded[0])
    for c in bounded:
        c.drop(start, stop, close)


def _check_turning(cache: PrunedKVCache) -> None:
    """Raise ``ValueError`` where a model's cached keys are not what its rotary module put out, so that it cannot turn them."""
    from mlx_kvprune.attach import attachment_of, cannot_rank

    model = cache.model() if cache.model is not None else None
    if model is not None and attachment_of(model) is not None and (reason := cannot_rank(model)):
        raise ValueError(
            f"[drop] closing a gap turns keys, which this model's are not made for; got {reason}; try close=False"
        )


def end_turn(cache: list[Any]) -> None:
    """Say that a turn of a conversation ends here.

    From now on the tokens of each finished turn keep a floor of their own: ``turn_floor`` of the pool, in equal parts. Later
    turns cannot squeeze them below it.
    """
    if not isinstance(cache, list | tuple):
        raise ValueError(f"[end-turn] not a list of caches; got {type(cache).__name__}; try model.make_cache()")
    for c in pruned(cache):  # caches that keep everything need no floor
        c.end_turn()


# -- lists of caches as arrays and JSON ------------------------------------------------------------------------------


def pack(cache: list[Any]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Arrays by name, and everything else.

    Raises:
        ValueError: a batch, or caches of mlx-vlm among them, whose states do not say all.
    """
    if any(isinstance(c, BatchPrunedKVCache) for c in cache):
        raise ValueError("[save] a batch is not saved; got several requests; try [c.extract(i) for c in cache]")
    if foreign := next((type(c).__name__ for c in leaves(cache) if of_mlx_vlm(c)), ""):
        raise ValueError(
            f"[save] mlx-vlm's own caches are not saved; got {foreign}; try a model whose layers are all bounded"
        )
    arrays, others = {}, {}
    for name, leaf in tree_flatten([c.state for c in cache]):
        (arrays if isinstance(leaf, mx.array) else others)[name] = leaf
    bounded = pruned(cache)
    meta = {"classes": [type(c).__name__ for c in cache], "others": others}
    return arrays, {**meta, "model": bounded[0].model_id if bounded else ""}


def unpack(arrays: dict[str, mx.array], meta: dict[str, Any], model: nn.Module) -> list[Any]:
    """The list of caches that ``pack`` took apart.

    Raises:
        ValueError: of another model, or not what ``pack`` gave.
    """
    model = decoder(model)
    hooked(model)
    if meta.get("model"):  # caches of policy full, all mlx-lm's own, do not say whose they are
        check_saved_with(model, meta["model"])
    from mlx_lm.models import cache as theirs

    try:
        states: Any = tree_unflatten([*arrays.items(), *meta["others"].items()])
        cache = [getattr(theirs, c).from_state(s) for c, s in zip(meta["classes"], states, strict=True)]
        bounded = pruned(cache)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"[load] whole, but not a list of caches; got {type(error).__name__}: {str(error)[:80]}; try another file"
        ) from error
    attachment = attachment_of(model)
    if attachment is None or (bounded and len(bounded) != len(attachment.rung.layers)):
        raise ValueError(f"[load] not the caches of this model; got {len(bounded)} bounded layers; try its own file")
    tell_ropes(model, bounded)
    mx.eval(pending(cache))
    return cache


def _bounded(cache: list[Any], where: str) -> list[PrunedKVCache]:
    bounded = pruned(cache) if isinstance(cache, list | tuple) else []
    if not bounded:
        raise ValueError(
            f"[{where}] not a list of bounded caches; got {type(cache).__name__}; try model.make_cache() after attach"
        )
    check_whole(bounded)
    return bounded
