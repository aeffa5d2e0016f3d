"""The hot ring: the newest tokens of one layer and its sinks, dense over heads, in the model's own type."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way from the ring to a pool, or from one pool to the next.

    Attributes:
        keys: ``(B, H_kv, n, D)``.
        values: ``(B, H_kv, n, D_v)``.
        memory: what the scorer remembers of each ``(B, H_kv, n)``, or None.
        positions: ``(B, H_kv, n)`` int32; negative where there is none.
    """

    keys: mx.array
    values: mx.array
    memory: mx.array | None
    positions: mx.array

    @property
    def n(self) -> int:
        return self.keys.shape[2]

    def arrays(self) -> list[mx.array]:
        """Its arrays."""
        return [x for x in (self.keys, self.values, self.memory, self.positions) if x is not None]


@dataclass
class Ring:
    """The sinks and the newest tokens, ``count`` in all, in the order of their positions.

    It is small (``window + block`` tokens), so that every forward call may copy it: an array that a lazy graph still
    reads is never written, and the big pool beside it is only read.

    Attributes:
        keys: ``(B, H_kv, count, D)``.
        values: ``(B, H_kv, count, D_v)``.
        memory: what the scorer remembers of each token ``(B, H_kv, count)``, float32, or None.
        positions: ``(count,)`` int32, the same for all heads.
    """

    keys: mx.array
    values: mx.array
    memory: mx.array | None
    positions: np.ndarray

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        arrays = (self.keys, self.values, self.memory, self.positions)
        return sum(x.nbytes for x in arrays if x is not None)

    def append(self, keys: mx.array, values: mx.array, memory: mx.array | None, start: int) -> None:
        """Add tokens ``(B, H_kv, L, D)`` of the positions ``start ..`` after the newest."""
        self.keys = mx.concatenate([self.keys, keys], axis=2)
        self.values = mx.concatenate([self.values, values], axis=2)
        if self.memory is not None and memory is not None:
            self.memory = mx.concatenate([self.memory, memory], axis=2)
        new = np.arange(start, start + keys.shape[2], dtype=np.int32)
        self.positions = np.concatenate([self.positions, new])

    def heads_positions(self) -> mx.array:
        """Positions for every head ``(B, H_kv, count)`` int32."""
        return mx.broadcast_to(mx.array(self.positions), self.keys.shape[:3])

    def span(self, start: int, stop: int) -> Tokens:
        """Some of the tokens, which stay."""
        old = slice(start, stop)
        memory = None if self.memory is None else self.memory[:, :, old]
        return Tokens(self.keys[:, :, old], self.values[:, :, old], memory, self.heads_positions()[:, :, old])

    def insert(self, at: int, tokens: Tokens) -> None:
        """Put tokens, which stand at the same positions in every head, between others."""
        join = lambda x, new: mx.concatenate([x[:, :, :at], new, x[:, :, at:]], axis=2)
        self.keys, self.values = join(self.keys, tokens.keys), join(self.values, tokens.values)
        if self.memory is not None and tokens.memory is not None:
            self.memory = join(self.memory, tokens.memory)
        self.positions = np.insert(self.positions, at, np.array(tokens.positions)[0, 0])

    def remove(self, start: int, stop: int) -> None:
        """Remove the tokens ``start .. stop - 1``; what stays does not keep the larger buffer alive."""
        join = lambda x: mx.concatenate([x[:, :, :start], x[:, :, stop:]], axis=2)
        self.keys, self.values = join(self.keys), join(self.values)
        self.memory = None if self.memory is None else join(self.memory)
        self.positions = np.concatenate([self.positions[:start], self.positions[stop:]])

    def keep(self, index: slice | np.ndarray) -> None:
        """Keep some tokens; what stays does not keep the larger buffer alive."""
        where = index if isinstance(index, slice) else mx.array(index)
        self.keys, self.values = mx.contiguous(self.keys[:, :, where]), mx.contiguous(self.values[:, :, where])
        self.memory = None if self.memory is None else mx.contiguous(self.memory[:, :, where])
        self.positions = self.positions[index].copy()
