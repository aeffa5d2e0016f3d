"""Runs Metal kernels on a CPU, and checks them: see emulator.py. No Mac is needed, only g++ on x86-64 Linux."""

from .address_spaces import address_space_errors, address_spaces_unavailable
from .compiler import unavailable
from .emulator import Emulator, Kernel
from .report import MetalError, Report, Traffic
from .wrapper import Definition, exported_text, mlx_text

__all__ = [
    "Definition",
    "Emulator",
    "Kernel",
    "MetalError",
    "Report",
    "Traffic",
    "address_space_errors",
    "address_spaces_unavailable",
    "exported_text",
    "mlx_text",
    "unavailable",
]
