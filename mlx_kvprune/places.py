"""Where the folders lie that travel with the package, ``metal/`` and ``models/``; and files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def shipped(name: str) -> Path:
    """A folder of the repository: beside the package in a checkout, inside it in an installed wheel."""
    inside = Path(__file__).parent / f"_{name}"
    return inside if inside.is_dir() else Path(__file__).parents[1] / name


def expand(path: str | Path) -> Path:
    """A user's path with ``~`` and ``~name`` replaced; the name of a user that is not known stays as it is."""
    return Path(os.path.expanduser(path))


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path to write to in the same folder, with the same suffix; it takes the place of ``path`` if the block ends well."""
    work = path.with_name(f".{path.stem[:100]}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def check_file(path: Path, what: str, renamed: bool = False) -> None:
    """Refuse what could not be written once the work for it is done.

    Args:
        path: of a file to be.
        what: the option's name, in messages.
        renamed: it is written beside and takes the place of what is there; else what is there is written to.

    Raises:
        ValueError: no such folder, a folder, or no right to write.
    """
    if not path.parent.is_dir():
        raise ValueError(f"[{what}] no such folder; got {str(path.parent)!r}; try another path")
    if path.is_dir():
        raise ValueError(f"[{what}] a folder; got {str(path)!r}; try a file in it")
    if not os.access(path if path.exists() and not renamed else path.parent, os.W_OK):
        raise ValueError(f"[{what}] no right to write; got {str(path)!r}; try another path")
