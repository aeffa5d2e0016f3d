"""Read a GGUF file: its metadata, and its tensors as float32 or as MLX's affine blocks.

The file is mapped, never loaded whole, and every length in it is checked against the file's size before it is believed:
a damaged file is one ValueError. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Name, values per block and bytes per block of the tensor types that can be read.
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # the types that are MLX affine blocks of 32 under another name
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """One tensor as it lies in the file: ``shape`` with rows first, ``data`` its raw blocks, uint8."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray

    def affine(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes ``(rows, cols)`` uint8, scales and biases ``(rows, cols / 32)`` float16: scale * code + bias."""
        cols = self.shape[-1]
        blocks = self.data.reshape(-1, KIND_BYTES[self.kind])
        scales = blocks[:, :2].copy().view("<f2")
        if self.kind == "Q8_0":
            codes, biases = blocks[:, 2:] ^ 0x80, scales * np.float16(-128)
        else:
            packed = blocks[:, -16:]  # low nibbles are the first 16 values, high nibbles the last 16
            codes = np.concatenate([packed & 15, packed >> 4], axis=1)
            biases = scales * np.float16(-8) if self.kind == "Q4_0" else blocks[:, 2:4].copy().view("<f2")
        return codes.reshape(-1, cols), scales.reshape(-1, cols // 32), biases.reshape(-1, cols // 32)

    def float32(self) -> np.ndarray:
        """The tensor's values, ``shape``, float32. K-quants and Q5 need the ``gguf`` package."""
        if self.kind in DENSE:
            return DENSE[self.kind](self.data).reshape(self.shape)
        if self.kind in AFFINE_BITS:
            codes, scales, biases = (part.astype(np.float32) for part in self.affine())
            blocks = codes.reshape(*scales.shape, 32) * scales[..., None] + biases[..., None]
            return blocks.reshape(self.shape)
        return _dequantize_with_gguf(self)


KIND_BYTES = {name: size for name, _, size in KINDS.values()}
DENSE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda data: data.view("<f4"),
    "F16": lambda data: data.view("<f2").astype(np.float32),
    "BF16": lambda data: (data.view("<u2").astype(np.uint32) << 16).view(np.float32),
}


def _dequantize_with_gguf(tensor: Tensor) -> np.ndarray:
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ValueError(
            f"[gguf] {tensor.name} is stored as {tensor.kind}, which needs the gguf package; got no such package; "
            "try `pip install gguf`"
        ) from error
    rows = tensor.data.reshape(*tensor.shape[:-1], -1)
    return dequantize(rows, GGMLQuantizationType[tensor.kind]).astype(np.float32, copy=False)


@dataclass(frozen=True)
class GGUF:
    """What a GGUF file holds: ``fields`` by their GGUF names, ``tensors`` by theirs."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """The field ``<architecture>.<key>``."""
        return self.fields.get(f"{self.architecture}.{key}", default)


class _Cursor:
    """Walks the mapped bytes; a read beyond the end raises ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes wanted at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind in SCALARS:
            code = SCALARS[kind]
            return np.frombuffer(self.take(count * struct.calcsize("<" + code)), "<" + code).tolist()
        return [self.value(kind) for _ in range(count)]


def read(path: str | Path) -> GGUF:
    """Read the metadata of a GGUF file and map its tensors.

    Raises:
        ValueError: the file is missing, no GGUF, damaged, or holds a tensor type outside ``KINDS``.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise ValueError(f"[gguf] cannot read {path}; got {error}; try the path of a .gguf file") from error
    try:
        return _parse(path, _Cursor(data))
    except (LookupError, ValueError, TypeError, ZeroDivisionError, MemoryError, RecursionError) as error:
        if str(error).startswith("[gguf]"):
            raise
        raise ValueError(f"[gguf] {path.name} is damaged; got {error}; try to download it again") from error


def _parse(path: Path, cursor: _Cursor) -> GGUF:
    magic, version = cursor.take(4), cursor.scalar("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(
            f"[gguf] {path.name} is no GGUF file of version 2 or 3; got magic {magic!r}, version {version}; "
            "try another file"
        )
    n_tensors, n_fields = cursor.scalar("Q"), cursor.scalar("Q")
    fields = {}
    for _ in range(n_fields):
        key = cursor.string()
        fields[key] = cursor.value(cursor.scalar("I"))
    heads = [_tensor_head(cursor) for _ in range(n_tensors)]
    align = fields.get("general.alignment", 32)
    start = -(-cursor.at // align) * align
    whole = np.frombuffer(cursor.data, np.uint8)[start:]
    return GGUF(path, fields, {head[0]: _tensor(whole, *head) for head in heads})


def _tensor_head(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _tensor(whole: np.ndarray, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    if kind not in KINDS:
        have = ", ".join(known for known, _, _ in KINDS.values())
        raise ValueError(f"[gguf] {name} has a tensor type that cannot be read; got type {kind}; try one of {have}")
    label, per_block, block_bytes = KINDS[kind]
    size = math.prod(shape) // per_block * block_bytes
    if not shape or shape[-1] % per_block or offset + size > len(whole):
        raise ValueError(f"tensor {name} of {size} bytes at {offset} of {len(whole)}")
    return Tensor(name, label, shape, whole[offset : offset + size])
