"""What a launch did: errors, and the memory that a kernel touched."""

from __future__ import annotations

from dataclasses import dataclass, field


class MetalError(RuntimeError):
    """A kernel did something that Metal forbids or leaves undefined; one line."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer; all but ``nbytes`` are counted in check mode only.

    Attributes:
        nbytes: the buffer's size.
        read_bytes: sizes of all read accesses, added up.
        read_simd_bytes: distinct bytes that a simdgroup read, added over simdgroups.
        read_once_bytes: distinct bytes that the launch read.
        written_bytes: sizes of all write accesses, added up.
    """

    nbytes: int
    read_bytes: int = 0
    read_simd_bytes: int = 0
    read_once_bytes: int = 0
    written_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """One launch of a kernel.

    Attributes:
        kernel: the kernel's name.
        buffers: what was read and written, by the argument's name; ``x_shape`` and the like are buffers of their own.
        unwritten: elements of outputs that no thread wrote, by name (check mode, without ``init_value``).
        threadgroup_nbytes: the most threadgroup memory that a threadgroup declared.
        n_threads: threads of the grid.
        n_launches: launches of the emulator so far, this one included.
        n_simd_operations: simd operations, counted once per thread.
        n_barriers: threadgroup barriers, counted once per thread.
        compile_s: seconds to compile, or to find the compiled kernel.
        run_s: seconds in the kernel.
    """

    kernel: str
    buffers: dict[str, Traffic] = field(default_factory=dict)
    unwritten: dict[str, int] = field(default_factory=dict)
    threadgroup_nbytes: int = 0
    n_threads: int = 0
    n_launches: int = 0
    n_simd_operations: int = 0
    n_barriers: int = 0
    compile_s: float = 0.0
    run_s: float = 0.0

    @property
    def read_simd_bytes(self) -> int:
        """``read_simd_bytes`` of all buffers."""
        return sum(t.read_simd_bytes for t in self.buffers.values())

    @property
    def written_bytes(self) -> int:
        """``written_bytes`` of all buffers."""
        return sum(t.written_bytes for t in self.buffers.values())
