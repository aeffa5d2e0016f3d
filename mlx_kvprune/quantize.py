"""Rows of keys and values in few bits: how they are packed, and attention over them as they lie.

A row is cut into groups, each stored as ``code * scale + bias`` with unsigned codes of ``bits`` bits in the layout of
``mx.quantize`` (codes in uint32, a bit stream with the lowest bits first), so that ``mx.quantized_matmul`` reads it.
The codes are made here and not by ``mx.quantize``: that one bends the range of a group until zero is one of its
levels, which costs up to a whole step at one end, and knows nothing of scales that are kept in float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.settings import BITS, GROUP_SIZES, PAGE

SCHEMES = ("token", "channel", "page")
FITTED = (3, 2)  # bits for which levels are fitted by least squares: from 4 on there is little to gain
FITS = 2
LEAST_SCALE = 0.1  # a channel that stood still while a frame was calibrated may move later
TINY = 1e-20
HALF_MAX = 65504.0  # the largest float16

Parts = tuple[mx.array, ...]


@dataclass(frozen=True)
class Frame:
    """What one pool needs besides its rows: ``(rows - offset) / scale`` is what is quantized. Fixed once calibrated.

    Attributes:
        offset: ``(..., 1, D)`` float32.
        scale: ``(..., 1, D)`` float32, positive.
    """

    offset: mx.array
    scale: mx.array


@dataclass(frozen=True)
class Codec:
    """How rows of one kind (keys or values) of one pool are stored.

    ``token``: each row in groups along D, every row on its own: a slot may be overwritten at any time.
    ``channel``: the same after a frame that is calibrated once per head and channel; for keys, whose channels differ.
    It pays only where the first tokens of a text are kept elsewhere, exact: a frame of ordinary keys does not fit theirs.
    ``page``: each channel in groups of 32 tokens (KIVI, arXiv 2402.02750), written once per page; for keys.

    Rows go through the frame first, then through the Hadamard matrix, then are padded to whole groups and quantized.

    Attributes:
        width: D.
        bits: 8, 6, 5, 4, 3 or 2; None keeps rows as they are.
        group_size: the most values that share a scale along D, 32, 64 or 128; smaller where D needs it. A page's groups
            are always its 32 tokens.
        scheme: ``token``, ``channel`` or ``page``.
        hadamard: rotate rows before they are quantized, and queries or results at use.
    """

    width: int
    bits: int | None = None
    group_size: int = 64
    scheme: str = "token"
    hadamard: bool = False

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(f"[kv-bits] not a number of bits that can be packed; got {self.bits!r}; try {_list(BITS)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"[kv-group-size] no such group size; got {self.group_size!r}; try {_list(GROUP_SIZES)}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"[kv-scheme] unknown scheme; got {self.scheme!r}; try {_list(SCHEMES)}")

    @property
    def granule(self) -> int:
        """Rows that are written together."""
        return PAGE if self._paged else 1

    @property
    def _paged(self) -> bool:
        return self.bits is not None and self.scheme == "page"

    @property
    def _framed(self) -> bool:
        return self.bits is not None and self.scheme == "channel"

    @property
    def group(self) -> int:
        """Values that share a scale: of a row, or of a page's channel."""
        if self._paged:
            return PAGE
        fitting = [g for g in GROUP_SIZES if g <= self.group_size and self.width % g == 0]
        return max(fitting, default=32)

    @property
    def padded(self) -> int:
        """D, or what it is padded to."""
        return self.width if self._paged else -(-self.width // self.group) * self.group

    def row_nbytes(self, itemsize: int) -> int:
        """Bytes of a token: codes, scales and biases; or ``D * itemsize`` where nothing is quantized."""
        if self.bits is None:
            return self.width * itemsize
        bits = self.padded * self.bits + 2 * 16 * self.padded // self.group
        return -(-bits // 8)

    def frame_nbytes(self, heads: int) -> int:
        """Bytes of the frame of a pool with this many heads (times batch rows)."""
        return 2 * 4 * self.width * heads if self._framed else 0

    def calibrate(self, rows: mx.array, valid: mx.array | None = None) -> Frame | None:
        """The frame for a pool whose first rows these are; None where the scheme needs none.

        Args:
            rows: ``(..., n, D)``, n at least 1.
            valid: ``(..., n)`` bool; False for rows that are padding.
        """
        return frame_of(rows, valid) if self._framed else None

    def encode(self, rows: mx.array, frame: Frame | None = None) -> Parts:
        """Pack rows.

        Args:
            rows: ``(..., n, D)``, n a multiple of ``granule``.
            frame: what ``calibrate`` returned.

        Returns:
            ``(rows,)`` where nothing is quantized, else codes uint32, scales float16 and biases float16, each
            ``(..., n / granule, what one granule takes)``.
        """
        assert rows.shape[-1] == self.width and rows.shape[-2] % self.granule == 0
        if self.bits is None:
            return (rows,)
        rows = self._enter(rows.astype(mx.float32), frame)
        if self._paged:
            *lead, n, width = rows.shape
            groups = rows.reshape(*lead, n // PAGE, PAGE, width).swapaxes(-1, -2)
        else:
            rows = _pad(rows, self.padded)
            groups = rows.reshape(*rows.shape[:-1], self.padded // self.group, self.group)
        codes, scales, biases = quantize(groups, self.bits)
        return pack(codes.flatten(-2), self.bits), scales, biases

    def decode(self, parts: Parts, dtype: mx.Dtype, frame: Frame | None = None) -> mx.array:
        """Rows ``(..., n, D)`` of ``dtype``, as they come out of ``parts``."""
        if self.bits is None:
            return parts[0].astype(dtype)
        packed, scales, biases = self._operands(parts, mx.float32)
        if packed.size == 0:
            return mx.zeros((*parts[0].shape[:-1], self.width), dtype)
        rows = mx.dequantize(packed, scales, biases, self.group, self.bits)
        if self._paged:  # (..., pages, D, 32)
            rows = rows.swapaxes(-1, -2).reshape(*rows.shape[:-3], -1, self.width)
        return self._leave(rows, frame).astype(dtype)

    def scores(self, queries: mx.array, parts: Parts, frame: Frame | None = None) -> mx.array:
        """Products of queries ``(..., R, D)`` with the keys in ``parts``: ``(..., R, n)``, of the queries' dtype."""
        if self.bits is None:
            return queries @ parts[0].swapaxes(-1, -2)
        dtype, n = queries.dtype, parts[0].shape[-2] * self.granule
        packed, scales, biases = self._operands(parts, dtype)
        if packed.size == 0:
            return mx.zeros((*queries.shape[:-1], n), dtype)
        turned = self._turn_queries(queries, frame).astype(dtype)
        if self._paged:  # (..., 1, R, D) @ (..., pages, D, 32)
            products = self._product(mx.expand_dims(turned, -3), packed, scales, biases, transpose=False)
            products = products.swapaxes(-3, -2).reshape(*queries.shape[:-1], n)
        else:
            products = self._product(_pad(turned, self.padded), packed, scales, biases, transpose=True)
        if frame is None:
            return products
        return products + (queries * frame.offset).sum(axis=-1, keepdims=True).astype(dtype)

    def mix(self, weights: mx.array, parts: Parts, frame: Frame | None = None) -> mx.array:
        """Weights ``(..., R, n)`` times the values in ``parts``: ``(..., R, D)``, of the weights' dtype."""
        if self.bits is None:
            return weights @ parts[0]
        if self._paged:
            raise ValueError("[kv-scheme] values cannot be kept by pages; got scheme 'page'; try 'token' for values")
        dtype = weights.dtype
        packed, scales, biases = self._operands(parts, dtype)
        if packed.size == 0:
            return mx.zeros((*weights.shape[:-1], self.width), dtype)
        mixed = self._product(weights, packed, scales, biases, transpose=False)[..., : self.width]
        mixed = _rotate(mixed) if self.hadamard else mixed
        if frame is not None:
            total = weights.astype(mx.float32).sum(axis=-1, keepdims=True)
            mixed = mixed * frame.scale + total * frame.offset
        return mixed.astype(dtype)

    def _enter(self, rows: mx.array, frame: Frame | None) -> mx.array:
        """Rows as they are quantized."""
        assert (frame is not None) == self._framed, "scheme 'channel' wants the frame of calibrate, the others none"
        if frame is not None:
            rows = (rows - frame.offset) / frame.scale
        return _rotate(rows) if self.hadamard else rows

    def _leave(self, rows: mx.array, frame: Frame | None) -> mx.array:
        """The inverse of ``_enter``; padding is cut off."""
        rows = rows[..., : self.width]
        rows = _rotate(rows) if self.hadamard else rows
        return rows if frame is None else rows * frame.scale + frame.offset

    def _turn_queries(self, queries: mx.array, frame: Frame | None) -> mx.array:
        """Queries whose product with rows as they are quantized is, up to ``q . offset``, that with the rows."""
        if frame is not None:
            queries = queries * frame.scale
        return _rotate(queries) if self.hadamard else queries

    def _operands(self, parts: Parts, dtype: mx.Dtype) -> Parts:
        """Parts as ``quantized_matmul`` wants them: pages unfolded to ``(..., pages, D, 32)``, scales of ``dtype``."""
        packed, scales, biases = parts
        if self._paged:
            lead = packed.shape[:-1]
            packed = packed.reshape(*lead, self.width, packed.shape[-1] // self.width)
            scales, biases = scales[..., None], biases[..., None]
        return packed, scales.astype(dtype), biases.astype(dtype)

    def _product(self, x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, transpose: bool) -> mx.array:
        return mx.quantized_matmul(x, packed, scales, biases, transpose, self.group, self.bits)


def quantize(groups: mx.array, bits: int) -> Parts:
    """Codes for groups ``(..., g)``: uint32 of the same shape, and scales and biases ``(...)`` float16.

    Levels reach from the least to the greatest value, so that nothing is off by more than half a step. With 3 and 2
    bits that wastes levels on rare values: there the line ``code -> value`` is fitted by least squares and the codes
    chosen anew, in turns; neither raises the squared error. Scale and bias are rounded to float16 first and the codes
    made for what is stored, so that rounding them costs nothing but at the ends of the range.
    """
    levels = (1 << bits) - 1
    groups = mx.clip(groups, -HALF_MAX, HALF_MAX)
    biases = groups.min(axis=-1)
    scales = (groups.max(axis=-1) - biases) / levels
    for _ in range(FITS if bits in FITTED else 0):
        scales, biases = _line(groups, _codes(groups, scales, biases, levels), scales)
    scales, biases = _half(scales), _half(biases)
    codes = _codes(groups, scales.astype(mx.float32), biases.astype(mx.float32), levels)
    return codes.astype(mx.uint32), scales, biases


def _codes(groups: mx.array, scales: mx.array, biases: mx.array, levels: int) -> mx.array:
    """The nearest levels, in float32."""
    steps = mx.where(scales > 0, scales, 1.0)[..., None]  # all alike: any step will do
    return mx.clip(mx.round((groups - biases[..., None]) / steps), 0, levels)


def _line(groups: mx.array, codes: mx.array, scales: mx.array) -> tuple[mx.array, mx.array]:
    """Scale and bias of the least squared error for these codes; groups of one code keep their scale."""
    code, value = codes.mean(axis=-1), groups.mean(axis=-1)
    off = codes - code[..., None]
    spread = (off * off).sum(axis=-1)
    slope = (off * (groups - value[..., None])).sum(axis=-1) / mx.where(spread > 0, spread, 1.0)
    scales = mx.where(spread > 0, slope, scales)
    return scales, value - scales * code


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes ``(..., m)`` uint32 as a bit stream ``(..., m * bits / 32)``, lowest bits first; m a multiple of 32.

    Codes are cut into pieces of ``gcd(bits, 32)`` bits, which do not straddle words.
    """
    piece = math.gcd(bits, 32)
    pieces = (codes[..., None] >> mx.arange(0, bits, piece, dtype=mx.uint32)) & ((1 << piece) - 1)
    words = pieces.reshape(*codes.shape[:-1], codes.shape[-1] * bits // 32, 32 // piece)
    return (words << mx.arange(0, 32, piece, dtype=mx.uint32)).sum(axis=-1)


def frame_of(rows: mx.array, valid: mx.array | None = None) -> Frame:
    """Frame of rows ``(..., n, D)``: medians, and the fourth roots of mean absolute deviations.

    The fourth root: a channel's error is ``scale`` times the row's, and attention weighs it by the queries' channel,
    which is large where the keys' is. The whole deviation as the scale was worse than none. Medians and absolute
    deviations, so that the odd keys of a text's first tokens do not set the frame.

    Args:
        valid: ``(..., n)`` bool; False for rows that do not count. Of a head without any, the frame changes nothing.
    """
    rows = rows.astype(mx.float32)
    valid = mx.ones(rows.shape[:-1], mx.bool_) if valid is None else mx.broadcast_to(valid, rows.shape[:-1])
    count = valid.sum(axis=-1)[..., None, None]
    ranked = mx.sort(mx.where(valid[..., None], rows, mx.inf), axis=-2)
    middle = mx.broadcast_to(mx.maximum(count - 1, 0) // 2, (*rows.shape[:-2], 1, rows.shape[-1]))
    offset = mx.where(count > 0, mx.take_along_axis(ranked, middle, axis=-2), 0.0)
    away = mx.where(valid[..., None], mx.abs(rows - offset), 0.0).sum(axis=-2, keepdims=True) / mx.maximum(count, 1)
    scale = mx.sqrt(mx.sqrt(away / mx.maximum(away.mean(axis=-1, keepdims=True), TINY)))
    return Frame(offset, mx.where(away.max(axis=-1, keepdims=True) > TINY, mx.maximum(scale, LEAST_SCALE), 1.0))


def _rotate(rows: mx.array) -> mx.array:
    """Rows ``(..., D)`` times an orthonormal Hadamard matrix, which is its own inverse; float32.

    Where D is no power of two, the matrix has blocks of the largest one that divides D. ``mx.hadamard_transform`` is
    given powers of two only: on the CPU, MLX 0.32.4 corrupts memory at widths such as 144 and 576, which it should refuse.
    """
    if rows.size == 0:
        return rows
    block = rows.shape[-1] & -rows.shape[-1]
    blocks = rows.astype(mx.float32).reshape(*rows.shape[:-1], rows.shape[-1] // block, block)
    return mx.hadamard_transform(blocks).reshape(rows.shape)


def _pad(rows: mx.array, width: int) -> mx.array:
    """Rows ``(..., D)`` with zeros up to ``width``."""
    missing = width - rows.shape[-1]
    return mx.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]) if missing else rows


def _half(x: mx.array) -> mx.array:
    return mx.clip(x, -HALF_MAX, HALF_MAX).astype(mx.float16)


def _list(choices: tuple) -> str:
    return ", ".join(map(str, choices[:-1])) + f" or {choices[-1]}"
