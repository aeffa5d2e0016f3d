"""The texts that a training holds, bounded in memory, one of them replaced now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mlx_kvprune.training.reading import Reading

Reader = Callable[[int], Reading]  # the n-th text


class Pool:
    """Readings of the texts ``0 .. size - 1``; then of later ones, which take the places of the oldest.

    Args:
        reader: reads a text.
        size: texts that are held.
        every: steps after which one is replaced; 0 for never.
        memory: bytes that they may take.
        lean: hold only what forward passes alone need.
    """

    def __init__(self, reader: Reader, size: int, every: int, memory: int, lean: bool = False):
        self.reader, self.size, self.every, self.memory, self.lean = reader, size, every, memory, lean
        self.readings: list[Reading] = []

    def fill(self, done: int = 0) -> Iterator[int]:
        """Read the texts that are held after ``done`` steps; yields how many are there."""
        while len(self.readings) < self.size:
            self.readings.append(self._read(self.latest(len(self.readings), done)))
            yield len(self.readings)

    def _read(self, n: int) -> Reading:
        reading = self.reader(n)
        return reading.lean() if self.lean else reading

    def fit_in(self, reading: Reading) -> None:
        """Hold no more texts than fit into memory if they are as large as this one."""
        one = (reading.lean() if self.lean else reading).nbytes
        self.size = max(1, min(self.size, self.memory // one))

    def latest(self, slot: int, done: int) -> int:
        """The text that lies in a slot after ``done`` steps."""
        newest = self.size - 1 + self.replaced(done)
        return newest - (newest - slot) % self.size

    def replaced(self, done: int) -> int:
        """How many texts were replaced in so many steps."""
        return done // self.every if self.every else 0

    def after(self, done: int) -> None:
        """Called after each step: replaces a text when it is time."""
        if self.every and done % self.every == 0:
            n = self.size - 1 + self.replaced(done)
            self.readings[n % self.size] = self._read(n)
