"""Conversations on disk: the caches as mlx-lm saves them, the messages in their metadata."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mlx_kvprune.cli.conversation import Conversation
from mlx_kvprune.settings import CacheSettings

KEY, VERSION, SUFFIX = "kvprune_chat", 1, ".safetensors"


def save(talk: Conversation, path: str) -> Path:
    """Write the conversation beside its place and rename it there; returns the place.

    Raises:
        ValueError: there is nothing to save, or no such folder.
    """
    from mlx_lm.models.cache import save_prompt_cache

    if not talk.seen:
        raise ValueError("[save] nothing to save; got an empty conversation; try after the first answer")
    place = _place(path)
    if not place.parent.is_dir():
        raise ValueError(f"[save] no such folder; got {str(place.parent)!r}; try a folder that exists")
    work = place.with_name(f".{place.stem}.{os.getpid()}{SUFFIX}")
    try:
        save_prompt_cache(str(work), talk.cache, {KEY: json.dumps(_content(talk))})
        os.replace(work, place)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"[save] cannot write {place}; got {_line(error)}; try another place") from error
    finally:
        work.unlink(missing_ok=True)
    return place


def load(talk: Conversation, path: str) -> Path:
    """Replace what is in ``talk`` by a saved conversation; returns its place.

    Raises:
        ValueError: missing, damaged, or of another model; ``talk`` is as it was.
    """
    place = _place(path)
    if not place.is_file():
        raise ValueError(f"[load] no such file; got {str(place)!r}; try a file that /save wrote")
    cache, content = _read(place)
    if content["model"] != fingerprint(talk.model):
        raise ValueError(f"[load] saved with another model; got {content['model']}; try it with that model")
    talk.cache, talk.seen, talk.tokens = cache, content["seen"], content["tokens"]
    talk.messages, talk.marks = content["messages"], content["marks"]
    talk.settings = CacheSettings.from_json(content["settings"])
    return place


def _read(place: Path) -> tuple[list[Any], dict[str, Any]]:
    """Caches and content of a file that was checked."""
    from mlx_lm.models.cache import load_prompt_cache

    try:
        cache, metadata = load_prompt_cache(str(place), return_metadata=True)
        content = json.loads(metadata[KEY])
    except Exception as error:  # whatever a file of any kind does to the reader
        raise ValueError(
            f"[load] damaged, or not a saved conversation; got {place} ({_line(error)}); try a file that /save wrote"
        ) from error
    if content.get("version") != VERSION:
        raise ValueError(f"[load] of another version; got {content.get('version')}; try to save it again with this one")
    if content["digest"] != _digest(cache):
        raise ValueError(f"[load] damaged; got {place}, whose contents do not match its checksum; try another file")
    return cache, content


def _content(talk: Conversation) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": fingerprint(talk.model),
        "settings": talk.settings.to_json(),
        "messages": talk.messages,
        "tokens": talk.tokens,
        "marks": talk.marks,
        "seen": talk.seen,
        "digest": _digest(talk.cache),
    }


def _place(path: str) -> Path:
    place = Path(path).expanduser()
    return place if place.suffix == SUFFIX else place.with_name(place.name + SUFFIX)


def fingerprint(model: Any) -> str:
    """What tells one model from another: its type, the shapes of its weights, and the smallest of them."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights = sorted(tree_flatten(model.parameters()), key=lambda item: (item[1].size, item[0]))
    shapes = [(name, list(array.shape), str(array.dtype)) for name, array in weights]
    digest = hashlib.sha256(json.dumps(shapes).encode())
    for _, array in weights[:8]:
        digest.update(json.dumps(array.astype(mx.float32).flatten()[:4096].tolist()).encode())
    return f"{getattr(model, 'model_type', type(model).__name__)}-{digest.hexdigest()[:12]}"


def _digest(cache: list[Any]) -> str:
    """SHA-256 of everything that the caches hold."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    digest = hashlib.sha256()
    for name, leaf in tree_flatten([c.state for c in cache]):
        digest.update(str(name).encode())
        if isinstance(leaf, mx.array):
            data = np.array(mx.contiguous(leaf).view(mx.uint8)) if leaf.size and leaf.ndim else np.array(leaf.tolist())
            digest.update(data.tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text}".splitlines()[0][:120]
