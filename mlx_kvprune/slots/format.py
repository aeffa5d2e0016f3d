"""How the rows of a pool are stored: a codec for keys, one for values, and what was calibrated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_kvprune.quantize import Codec, Frame
from mlx_kvprune.slots.tools import PLAIN, Tools

RowDict = dict[str, mx.array]

# Rows up to which a product with packed rows beats unpacking them for a matrix product. On the CPU ``quantized_matmul``
# takes 65 us per row and 416 slots where the packed matrix is transposed; unpacking them takes 170 us once (LOG.md).
KEYS_AT_ONCE, VALUES_AT_ONCE, GPU_AT_ONCE = 2, 6, 8


@dataclass(frozen=True)
class Rows:
    """Keys or values as they lie, with what is needed to compute with them.

    Attributes:
        codec: how they are stored.
        parts: the codec's arrays, each ``(..., n / codec.granule, row)``.
        frame: what was calibrated, or None.
    """

    codec: Codec
    parts: tuple[mx.array, ...]
    frame: Frame | None = None

    def scores(self, queries: mx.array) -> mx.array:
        """``queries (..., R, D)`` times the keys, ``(..., R, n)``."""
        if self._few(queries, KEYS_AT_ONCE):
            return self.codec.scores(queries, self.parts, self.frame)
        return queries @ self.decoded(queries.dtype).swapaxes(-1, -2)

    def mix(self, weights: mx.array) -> mx.array:
        """``weights (..., R, n)`` times the values, ``(..., R, D)``."""
        if self.codec.bits is None:  # in the values' own type, lest all of them be promoted to that of the weights
            return weights.astype(self.parts[0].dtype) @ self.parts[0]
        if self._few(weights, VALUES_AT_ONCE):
            return self.codec.mix(weights, self.parts, self.frame)
        return weights @ self.decoded(weights.dtype)

    def _few(self, rows: mx.array, most: int) -> bool:
        """Whether rows are few enough to be multiplied with packed rows; many want them unpacked once."""
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        paged = self.codec.scheme == "page"  # stored the way in which the product is quick
        return self.codec.bits is None or rows.shape[-2] <= (GPU_AT_ONCE if on_gpu or paged else most)

    def decoded(self, dtype: mx.Dtype) -> mx.array:
        """``(..., n, D)``."""
        return self.codec.decode(self.parts, dtype, self.frame)


def plain(x: mx.array) -> Rows:
    """An array ``(..., n, D)`` as it is."""
    return Rows(Codec(x.shape[-1]), (x,))


@dataclass(frozen=True)
class Format:
    """Codecs of a pool and the type in which the model speaks.

    Attributes:
        keys: codec of the keys.
        values: codec of the values.
        dtype: of decoded rows.
        frame: of the keys, once calibrated.
        tools: what packs rows and chooses slots.
    """

    keys: Codec
    values: Codec
    dtype: mx.Dtype
    frame: Frame | None = None
    tools: Tools = PLAIN

    def __deepcopy__(self, memo: Any) -> Format:
        return self  # nothing of it is ever written, and MLX's types cannot be copied

    @property
    def granule(self) -> int:
        """Slots that are written together."""
        return max(self.keys.granule, self.values.granule)

    @property
    def exact(self) -> bool:
        """Whether what is stored can be had back as it was."""
        return self.keys.bits is None and self.values.bits is None

    @property
    def frame_nbytes(self) -> int:
        return 0 if self.frame is None else self.frame.offset.nbytes + self.frame.scale.nbytes

    def calibrated(self, keys: mx.array) -> Format:
        """With a frame, if the codec wants one and there is none: from the first keys ``(B, H_kv, n, D)``."""
        frame = self.frame or self.keys.calibrate(keys)
        return self if frame is None else replace(self, frame=frame)

    def encode(self, keys: mx.array, values: mx.array) -> RowDict:
        """Rows of ``n`` tokens, by name, each ``(..., n / granule, row)``."""
        parts = [("keys", self.keys.granule, self.tools.pack(self.keys, keys, self.frame))]
        parts.append(("values", self.values.granule, self.tools.pack(self.values, values, None)))
        return {f"{name}.{i}": self._wide(x, own) for name, own, xs in parts for i, x in enumerate(xs)}

    def no_rows(self, keys: mx.array, values: mx.array) -> RowDict:
        """Rows of no tokens, of the kind of ``keys`` and ``values (..., n, D)``."""
        keys, values = keys[..., :0, :], values[..., :0, :]
        frame = None
        if self.keys.scheme == "channel" and self.keys.bits is not None:
            frame = Frame(mx.zeros((1, keys.shape[-1])), mx.ones((1, keys.shape[-1])))
        return replace(self, frame=frame).encode(keys, values)

    def rows_of(self, rows: RowDict, name: str, owner: mx.array | None = None) -> Rows:
        """Keys or values among rows; ``owner`` says which head each page belongs to."""
        codec = self.keys if name == "keys" else self.values
        parts = [x for part, x in sorted(rows.items()) if part.startswith(f"{name}.")]
        frame = self.frame if name == "keys" else None
        if frame is not None and owner is not None:
            by_page = lambda x: x.reshape(-1, *x.shape[-2:])[owner]
            frame = Frame(by_page(frame.offset), by_page(frame.scale))
        return Rows(codec, tuple(self._narrow(x, codec.granule) for x in parts), frame)

    def _wide(self, x: mx.array, own: int) -> mx.array:
        """From rows of ``own`` tokens to rows of ``granule`` tokens."""
        times = self.granule // own
        return x if times == 1 else x.reshape(*x.shape[:-2], x.shape[-2] // times, times * x.shape[-1])

    def _narrow(self, x: mx.array, own: int) -> mx.array:
        times = self.granule // own
        return x if times == 1 else x.reshape(*x.shape[:-2], x.shape[-2] * times, x.shape[-1] // times)
