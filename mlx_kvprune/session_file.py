"""A checked file of arrays and what describes them: one safetensors file that is whole, or refused in one line.

It is written beside its place and renamed there, so that a save that is killed, interrupted or out of space leaves what
was there before. Header and sizes are checked against the file's size before anything is allocated; MLX's own reader,
which trusts them, is never asked.

    8 bytes   length of the header, little endian
    header    JSON: {"__metadata__": {format, version, checksum, meta}, name: {dtype, shape, data_offsets}, ...}, in exactly
              the bytes that ``_header`` makes
    data      the arrays, one after the other, in the header's order

``checksum`` is the SHA-256 of the header as it is with an empty checksum, and of the data.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import mlx.core as mx
import numpy as np

FORMAT, VERSION = "mlx-kvprune cache", 1
BLOCK = 1 << 22
LONGEST_HEADER = 100_000_000  # as the safetensors library has it
MOST_AXES, LONGEST_AXIS = 16, (1 << 31) - 1
PARTIAL = ".kvprune-{}.partial"  # beside the place while it is written; locked by whoever writes it
DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "U32": mx.uint32,
    "U64": mx.uint64,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "C64": mx.complex64,
}
WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # by size: what all types are moved as
ANOTHER = "try another file"

Entries = dict[str, dict[str, Any]]


def write(path: str | os.PathLike[str], arrays: dict[str, mx.array], meta: dict[str, Any]) -> None:
    """Save ``arrays`` of any shapes and ``meta``, which JSON can hold; what stood at ``path`` is replaced at the end.

    Raises:
        ValueError: it cannot be written, or an array is of a type or name that such a file cannot hold; what was there
            before is as it was.
    """
    place = Path(os.path.realpath(path))  # a link stays one
    entries, meta = _entries(arrays), json.loads(json.dumps(meta))  # as it will be read
    digest = hashlib.sha256(_header(entries, meta, ""))
    for block in _blocks(arrays):
        digest.update(block)
    header = _header(entries, meta, digest.hexdigest())
    if len(header) > LONGEST_HEADER:
        raise ValueError(f"[cache-file] too much beside the arrays; got {len(header) >> 20} MiB; try with less text")
    with _write_errors(place), _replacing(place) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for block in _blocks(arrays):
            file.write(block)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and the meta that ``write`` saved, checked.

    Raises:
        ValueError: there is no such file, it is damaged, of another kind, or of a newer version.
    """
    place = Path(path)
    with _read_errors(place):
        if not place.is_file():
            problem = "not a file" if place.exists() else "no such file"
            raise ValueError(f"[cache-file] {problem}; got {str(place)!r}; try the path of a saved cache")
        with place.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size)
            entries, meta, checksum = _parsed(place, header)
            _check_sizes(place, entries, size - 8 - len(header))
            digest = hashlib.sha256(_header(entries, meta, ""))
            arrays = {name: _read_array(file, entry, digest) for name, entry in entries.items()}
            if digest.hexdigest() != checksum:
                raise _damaged(place, "contents that do not match its checksum")
    return arrays, meta


# -- the format ----------------------------------------------------------------------------------------------------------


def _header(entries: Entries, meta: dict[str, Any], checksum: str) -> bytes:
    """The one header that such a file may have, padded to a multiple of 8 bytes."""
    about = {"format": FORMAT, "version": str(VERSION), "checksum": checksum, "meta": json.dumps(meta)}
    text = json.dumps({"__metadata__": about, **entries}, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _entries(arrays: dict[str, mx.array]) -> Entries:
    """What the header says of each array."""
    names, entries, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, x in arrays.items():
        if name == "__metadata__" or x.dtype not in names:
            raise ValueError(
                f"[cache-file] cannot hold this array; got {name!r} of {x.dtype}; try another name or type"
            )
        entries[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    return entries


def _blocks(arrays: dict[str, mx.array]) -> Iterator[memoryview]:
    """The bytes of all arrays, in pieces: at most one array is copied at a time, and Ctrl-C need not wait long."""
    for x in arrays.values():
        if x.size:
            whole = mx.contiguous(x).reshape(-1).view(WORDS[x.itemsize])
            data = memoryview(cast(Any, whole)).cast("B")
            yield from (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))


def _read_header(file: IO[bytes], size: int) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if size == 0:
        raise ValueError(f"[cache-file] the file is empty; got {file.name!r}; {ANOTHER}")
    if size < 8 or not 0 < length <= min(size - 8, LONGEST_HEADER):
        raise _damaged(file.name, "no header of its length: cut off, or no safetensors file at all")
    return file.read(length)


def _parsed(place: Path, header: bytes) -> tuple[Entries, dict[str, Any], str]:
    """Entries, meta and checksum of a header as ``_header`` makes it; the entries may still be nonsense."""
    try:
        entries = json.loads(header)
        about = entries.pop("__metadata__", None) or {}
        is_ours, version = about.get("format") == FORMAT, str(about.get("version"))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(place, "a header that is not that of a safetensors file") from error
    if not is_ours:
        raise ValueError(f"[cache-file] a safetensors file of something else; got {str(place)!r}; {ANOTHER}")
    if version != str(VERSION):
        what = f"version {version[:20]!r} instead of '{VERSION}'"
        raise ValueError(f"[cache-file] of another version; got {what}; try the mlx-kvprune that saved it")
    try:
        meta, checksum = json.loads(about["meta"]), about["checksum"]
        as_written = isinstance(meta, dict) and header == _header(entries, meta, checksum)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(place, "a header without its parts") from error
    if not as_written:
        raise _damaged(place, "a header that was changed")
    return entries, meta, checksum


def _check_sizes(place: Path, entries: Entries, total: int) -> None:
    """See that the arrays fill the ``total`` bytes of data one after the other, as their types and shapes say."""
    end = 0
    for entry in entries.values():
        nbytes = _nbytes(entry)
        if nbytes is None or entry.get("data_offsets") != [end, end + nbytes]:
            raise _damaged(place, "an array whose place and shape disagree")
        end += nbytes
    if end != total:
        raise _damaged(place, f"{total} bytes of data instead of {end}")


def _nbytes(entry: Any) -> int | None:
    """Bytes of the array that an entry tells of; None if it makes no sense."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) > MOST_AXES or str(entry.get("dtype")) not in DTYPES:
        return None
    if not all(type(n) is int and 0 <= n <= LONGEST_AXIS for n in shape):
        return None
    return math.prod(shape) * DTYPES[entry["dtype"]].size


def _read_array(file: IO[bytes], entry: dict[str, Any], digest: Any) -> mx.array:
    """The next array of a file whose sizes were checked."""
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
    if not math.prod(shape):
        return mx.zeros(shape, dtype)
    data = np.empty(math.prod(shape), f"u{dtype.size}")
    if cast(Any, file).readinto(data) != data.nbytes:
        raise _damaged(file.name, "less data than when it was opened")
    digest.update(data)
    return mx.array(data).view(dtype).reshape(shape)


# -- the disk ------------------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(place: Path) -> Iterator[IO[bytes]]:
    """A new file beside ``place`` that takes its place if the block ends well and is removed if not."""
    _sweep(place.parent)
    work = place.with_name(PARTIAL.format(secrets.token_hex(8)))
    try:
        with work.open("xb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(work, place)
    finally:
        work.unlink(missing_ok=True)
    _sync_folder(place.parent)


def _sweep(folder: Path) -> None:
    """Remove what killed saves left: partial files that nobody holds the lock of.

    One that is empty may belong to a save that is about to lock it, and is left alone for a minute.
    """
    for left in folder.glob(PARTIAL.format("*")):
        with suppress(OSError), left.open("rb") as file:
            state = os.fstat(file.fileno())
            if not state.st_size and time.time() - state.st_mtime < 60:
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _write_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "the disk is full, the old file is kept" if full else "cannot write"
        if not place.parent.is_dir():
            problem = "no such folder"
        raise ValueError(
            f"[cache-file] {problem}; got {error.strerror or type(error).__name__} for {str(place)!r}; try another place"
        ) from error


@contextmanager
def _read_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise ValueError(f"[cache-file] cannot read; got {what} for {str(place)!r}; {ANOTHER}") from error


def _damaged(place: Path | str, what: str) -> ValueError:
    return ValueError(f"[cache-file] damaged, or not a saved cache; got {what}, in {str(place)!r}; {ANOTHER}")
