"""Packing rows that leave the window: ``Codec.encode`` as one launch of ``metal/pack_rows.metal``."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvprune.kernels import checks
from mlx_kvprune.kernels.launch import SIMD, Kernel
from mlx_kvprune.numerics import device
from mlx_kvprune.quantize import PAGE, Codec, Frame, Parts

KERNEL = Kernel("pack_rows", ("rows", "offset", "scale"), ("codes", "scales", "biases"))
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
OCTET = 8  # neighbours of a row in one lane
WIDEST = SIMD * OCTET  # a row lies in one SIMD group
SIMDS = 4  # SIMD groups of a threadgroup that packs rows


def can_run(codec: Codec, rows: mx.array) -> str:
    """Why the kernel cannot pack ``rows`` ``(..., n, D)`` here; empty if it can."""
    return checks.verdict("pack_rows") or why_not(codec, rows)


def why_not(codec: Codec, rows: mx.array) -> str:
    """What keeps the kernel from packing these; empty if nothing does. Whether there is a GPU is not asked."""
    if codec.bits is None:
        return "nothing to pack: rows are kept as they are"
    if codec.width % OCTET or codec.width > WIDEST:
        return f"head dim {codec.width} is not a multiple of {OCTET} up to {WIDEST}"
    if rows.dtype not in DTYPES:
        return f"rows of {rows.dtype}, which are not float32, float16 or bfloat16"
    return "" if rows.size else "no rows"


def reference(codec: Codec, rows: mx.array, frame: Frame | None = None) -> Parts:
    """The same in plain MLX operations: ``Codec.encode``."""
    return codec.encode(rows, frame)


def pack_rows(codec: Codec, rows: mx.array, frame: Frame | None = None, force: bool = False) -> Parts:
    """Pack rows by the kernel where it can run, else by the reference.

    One launch and no host synchronisation, so two launches per layer and upkeep: keys and values. The reference takes
    about 30 launches for either, 80 with 3 or 2 bits. Rows may have any strides; more than two leading axes are
    flattened, which copies what is not contiguous. A frame that is broadcast is written out, by two more launches.

    Args:
        codec: how they are stored.
        rows: ``(..., n, D)`` float32, float16 or bfloat16, n a multiple of ``codec.granule``.
        frame: what ``codec.calibrate`` returned.
        force: raise where the kernel cannot run.

    Returns:
        Codes uint32, scales float16 and biases float16, each ``(..., n / granule, what one granule takes)``.
    """
    if reason := can_run(codec, rows):
        if force:
            raise ValueError(f"[kernels] pack_rows cannot run: {reason}; try force=False")
        return reference(codec, rows, frame)
    error = lambda: _wrong(_launch(codec, rows, frame), reference(codec, rows, frame), rows.size)
    if checks.refuted("pack_rows", (codec, rows.dtype, frame is None), error, LIMIT):
        return reference(codec, rows, frame)
    return _launch(codec, rows, frame)


def _wrong(found: Parts, wanted: Parts, size: int) -> float:
    """How many words, scales and biases differ, beyond one in a thousand values."""
    wrong = sum(int((ours != theirs).sum()) for ours, theirs in zip(found, wanted, strict=True))
    return max(0.0, wrong - size / 1000)


def _launch(codec: Codec, rows: mx.array, frame: Frame | None) -> Parts:
    assert rows.shape[-1] == codec.width and rows.shape[-2] % codec.granule == 0
    assert (frame is not None) == (codec.scheme == "channel"), "scheme 'channel' wants a frame, the others none"
    assert codec.bits is not None
    constants = _constants(codec, rows, framed=frame is not None)
    granules = (*rows.shape[:-2], rows.shape[-2] // codec.granule)
    groups = codec.width if constants["PAGED"] else constants["PADDED"] // constants["GROUP"]
    if constants["PAGED"]:
        threads = -(-codec.width // SIMD) * SIMD
        n_threadgroups = math.prod(granules)
    else:
        threads = SIMDS * SIMD
        n_threadgroups = -(-math.prod(granules) * constants["LANES"] // threads)
    codes, scales, biases = KERNEL(
        [_four_axes(rows), *_frame_rows(rows, frame)],
        template=list(constants.items()),
        grid=(n_threadgroups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*granules, groups * constants["GROUP"] * codec.bits // 8), *[(*granules, groups)] * 2],
        output_dtypes=[mx.uint8, mx.float16, mx.float16],
    )
    return codes.view(mx.uint32), scales, biases


def _constants(codec: Codec, rows: mx.array, framed: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "T": rows.dtype,
        "D": codec.width,
        "BITS": codec.bits,
        "GROUP": codec.group,
        "PADDED": codec.padded,
        "LANES": 1 << (codec.padded // OCTET - 1).bit_length(),
        "BLOCK": codec.width & -codec.width if codec.hadamard else 0,
        "FRAMED": framed,
        "PAGED": codec.granule == PAGE,
    }


def _four_axes(rows: mx.array) -> mx.array:
    """Rows as ``(B, H, n, D)``."""
    lead = rows.shape[:-2]
    if len(lead) <= 2:
        return rows[(None,) * (2 - len(lead))]
    return rows.reshape(math.prod(lead[:-1]), lead[-1], *rows.shape[-2:])


def _frame_rows(rows: mx.array, frame: Frame | None) -> list[mx.array]:
    """Offset and scale ``(B * H, D)``; where there is no frame, something that the kernel does not read."""
    if frame is None:
        return [rows, rows]
    shape = (*rows.shape[:-2], 1, rows.shape[-1])
    wide = [mx.broadcast_to(x, shape) for x in (frame.offset, frame.scale)]
    return [mx.contiguous(x.reshape(-1, rows.shape[-1])) for x in wide]


# -- a case to try a machine with --------------------------------------------------------------------------------------

LIMIT = 0.0


def self_check() -> float:
    """How many codes, scales and biases of 33 rows at 4 bits are not the reference's, beyond one in a thousand."""
    codec = Codec(64, bits=4, hadamard=True)
    rows = device(np.random.default_rng(0).standard_normal((1, 2, 33, 64)).astype(np.float32))
    return _wrong(_launch(codec, rows, None), reference(codec, rows), rows.size)
