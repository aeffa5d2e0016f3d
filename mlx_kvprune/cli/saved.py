"""Conversations on disk: a file of ``session_file``, the caches as ``session`` packs them, the messages beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_kvprune import session_file
from mlx_kvprune.attach import model_id
from mlx_kvprune.cli.conversation import Conversation
from mlx_kvprune.places import expand
from mlx_kvprune.session import pack, unpack
from mlx_kvprune.settings import CacheSettings

KEY, VERSION, SUFFIX = "chat", 1, ".safetensors"
KEPT = ("messages", "tokens", "marks", "seen")  # of a Conversation, as they are


def save(talk: Conversation, path: str) -> Path:
    """Write the conversation; what stood there is whole until then. Returns the place.

    Raises:
        ValueError: there is nothing to save, or it cannot be written.
    """
    if not talk.tokens:
        raise ValueError("[save] nothing to save; got an empty conversation; try after the first answer")
    with _named("save"):
        place = _place(path)
    if not talk.seen:  # an answer that was stopped at once took the cache with it
        talk.replay()
    arrays, meta = pack(talk.cache)
    content = {"version": VERSION, "settings": talk.settings.to_json(), **{name: getattr(talk, name) for name in KEPT}}
    with _named("save"):
        session_file.write(place, arrays, {**meta, "model": model_id(talk.model), KEY: content})
    return place


def load(talk: Conversation, path: str) -> Path:
    """Replace what is in ``talk`` by a saved conversation; returns its place.

    Raises:
        ValueError: missing, damaged, or of another model; ``talk`` is as it was.
    """
    with _named("load"):
        place = _place(path)
        arrays, meta = session_file.read(place)
        content = _content(meta, place)
        settings = CacheSettings.from_json(content["settings"])
        cache = unpack(arrays, meta, talk.model)
    talk.cache, talk.settings = cache, settings
    for name in KEPT:
        setattr(talk, name, content[name])
    return place


def _content(meta: dict[str, Any], place: Path) -> dict[str, Any]:
    """What a file says of a conversation."""
    content = meta.get(KEY)
    if not isinstance(content, dict):
        raise ValueError(
            f"[load] a saved cache without a conversation; got {str(place)!r}; try a file that /save wrote"
        )
    if content.get("version") != VERSION:
        raise ValueError(f"[load] of another version; got {content.get('version')}; try to save it again with this one")
    return content


def _place(path: str) -> Path:
    place = expand(path)
    if os.path.isdir(place):  # asks nothing of a name that is too long
        raise ValueError(f"[cache-file] a folder; got {path!r}; try a file in it")
    return place if place.suffix == SUFFIX else place.with_name(place.name + SUFFIX)


@contextmanager
def _named(command: str) -> Iterator[None]:
    """Errors of files are errors of a command here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("[cache-file]", f"[{command}]", 1)) from error
