"""Runs a compiled kernel on memory laid out as a GPU's: buffers far apart, nothing known in what was not written."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .compiler import Module, source_line
from .report import MetalError, Report, Traffic

GAP = 1 << 20  # bytes between buffers, so that an overrun is known to be one
POISON = 0xFF  # fills outputs and the gaps' edges: NaN in every float type
POISONED_EDGE = 4096
WRITABLE, STARTS_UNWRITTEN = 1, 2
SCHEDULES = ("forward", "reverse", "random")
MAX_THREADS, MAX_BUFFERS = 1024, 31

_lock = threading.Lock()  # a compiled kernel's runtime has one state


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("nbytes", ctypes.c_uint64),
        ("cell", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("unwritten", ctypes.c_uint64),
        ("read_bytes", ctypes.c_uint64),
        ("read_once_bytes", ctypes.c_uint64),
        ("read_simd_bytes", ctypes.c_uint64),
        ("written_bytes", ctypes.c_uint64),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("schedule", ctypes.c_uint32),
        ("n_buffers", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_uint64),
        ("message_pc", ctypes.c_uint64),
        ("message_line", ctypes.c_int64),
        ("n_switches", ctypes.c_uint64),
        ("n_simd_operations", ctypes.c_uint64),
        ("n_barriers", ctypes.c_uint64),
        ("threadgroup_nbytes", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Argument:
    """A buffer of a kernel.

    Attributes:
        name: as the kernel calls it.
        data: its contents, with strides; an output's are used only where ``is_initialised``.
        is_output: whether the kernel may write to it.
        is_initialised: whether it has contents before the launch.
    """

    name: str
    data: np.ndarray
    is_output: bool = False
    is_initialised: bool = True

    def storage(self) -> tuple[np.ndarray, int]:
        """The bytes that the array lies in, strides and all, and at which of them its first element is."""
        if self.data.flags.c_contiguous:
            return self.data.reshape(-1).view(np.uint8), 0
        low, high = np.lib.array_utils.byte_bounds(self.data)
        span = (ctypes.c_uint8 * (high - low)).from_address(low)
        return np.frombuffer(span, np.uint8), self.data.ctypes.data - low


def run(
    module: Module,
    arguments: Sequence[Argument],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    name: str,
    schedule: str = "forward",
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], Report]:
    """Run a kernel; returns its outputs by name and a report. Raises MetalError for whatever goes wrong in it."""
    _check_limits(name, len(arguments), grid, threadgroup)
    storages = [argument.storage() for argument in arguments]
    starts, arena_nbytes = _layout([s.nbytes for s, _ in storages])
    message = ctypes.create_string_buffer(4096)
    with mmap.mmap(-1, arena_nbytes) as arena:
        memory = np.frombuffer(arena, np.uint8)
        base = memory.ctypes.data
        buffers = (_Buffer * len(arguments))()
        pointers = (ctypes.c_void_p * len(arguments))()
        for i, (argument, (storage, first), start) in enumerate(zip(arguments, storages, starts, strict=True)):
            end = start + storage.nbytes
            memory[start - POISONED_EDGE : end + POISONED_EDGE] = POISON
            if argument.is_initialised:
                memory[start:end] = storage
            flags = WRITABLE * argument.is_output + STARTS_UNWRITTEN * (not argument.is_initialised)
            itemsize = argument.data.itemsize
            buffers[i] = _Buffer(base + start, storage.nbytes, itemsize, flags, argument.name.encode())
            pointers[i] = base + start + first
        launch = _Launch((*grid,), (*threadgroup,), SCHEDULES.index(schedule), len(arguments), seed, buffers, pointers)
        launch.message, launch.message_size = ctypes.addressof(message), len(message)
        began = time.perf_counter()
        with _lock:
            failed = module.library.msl_launch(module.library.msl_entry, ctypes.byref(launch))
        seconds = time.perf_counter() - began
        if failed:
            del memory
            raise MetalError(_message(module, name, message.value.decode(), launch))
        outputs = {a.name: _contents(memory, s, a) for a, s in zip(arguments, starts, strict=True) if a.is_output}
        del memory
    report = Report(
        kernel=name,
        buffers={a.name: _traffic(b) for a, b in zip(arguments, buffers, strict=True)},
        unwritten={a.name: b.unwritten for a, b in zip(arguments, buffers, strict=True) if not a.is_initialised},
        threadgroup_nbytes=launch.threadgroup_nbytes,
        n_threads=grid[0] * grid[1] * grid[2],
        n_simd_operations=launch.n_simd_operations,
        n_barriers=launch.n_barriers,
        run_s=seconds,
    )
    return outputs, report


def _check_limits(name: str, n_buffers: int, grid: tuple[int, int, int], threadgroup: tuple[int, int, int]) -> None:
    if min(*grid, *threadgroup) < 1:
        raise MetalError(f"limit: '{name}' needs sizes of at least 1; got grid {grid}, threadgroup {threadgroup}")
    n_threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if n_threads > MAX_THREADS:
        raise MetalError(f"limit: '{name}' has {n_threads} threads in a threadgroup, of {MAX_THREADS}")
    if n_buffers > MAX_BUFFERS:
        raise MetalError(f"limit: '{name}' has {n_buffers} buffers, of {MAX_BUFFERS}")


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where buffers of these sizes begin, and the size of the whole; pages that nobody touches cost nothing."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end + GAP)
        end = (starts[-1] + size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    return starts, end + GAP


def _contents(memory: np.ndarray, start: int, argument: Argument) -> np.ndarray:
    data = memory[start : start + argument.data.nbytes].view(argument.data.dtype)
    return data.reshape(argument.data.shape).copy()


def _traffic(buffer: _Buffer) -> Traffic:
    names = ("nbytes", "read_bytes", "read_simd_bytes", "read_once_bytes", "written_bytes")
    return Traffic(**{name: getattr(buffer, name) for name in names})


def _message(module: Module, name: str, message: str, launch: _Launch) -> str:
    line = launch.message_line or (source_line(module, launch.message_pc) if launch.message_pc else None)
    lines = module.text.split("\n")
    where = f" at {name}:{line}: {lines[line - 1].strip()}" if line and line <= len(lines) else f" in {name}"
    return message + where
