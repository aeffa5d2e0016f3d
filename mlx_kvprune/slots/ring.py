"""The hot ring: the newest tokens of one layer, dense over heads, in the model's own type."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass
class Ring:
    """The newest ``count`` tokens in the order of their positions.

    It is small (``window + block`` tokens), so that every forward call may copy it: an array that a lazy graph still
    reads is never written, and the big pool beside it is only read.

    Attributes:
        keys: ``(B, H_kv, count, D)``.
        values: ``(B, H_kv, count, D_v)``.
        memory: what the scorer remembers of each token ``(B, H_kv, count)``, float32, or None.
    """

    keys: mx.array
    values: mx.array
    memory: mx.array | None

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + (self.memory.nbytes if self.memory is not None else 0)

    def append(self, keys: mx.array, values: mx.array, memory: mx.array | None) -> None:
        """Add tokens ``(B, H_kv, L, D)`` after the newest."""
        self.keys = mx.concatenate([self.keys, keys], axis=2)
        self.values = mx.concatenate([self.values, values], axis=2)
        if self.memory is not None and memory is not None:
            self.memory = mx.concatenate([self.memory, memory], axis=2)

    def oldest(self, n: int) -> Ring:
        """The oldest ``n`` tokens, which stay."""
        return self._part(slice(0, n))

    def drop_oldest(self, n: int) -> None:
        """Remove the oldest ``n`` tokens; what stays does not keep the larger buffer alive."""
        newest = self._part(slice(n, None))
        self.keys, self.values = mx.contiguous(newest.keys), mx.contiguous(newest.values)
        self.memory = None if newest.memory is None else mx.contiguous(newest.memory)

    def _part(self, span: slice) -> Ring:
        memory = None if self.memory is None else self.memory[:, :, span]
        return Ring(self.keys[:, :, span], self.values[:, :, span], memory)
