"""Kernels for the GPU, each beside the reference in plain MLX operations that it is tested against."""

from mlx_kvprune.kernels.choose_slots import choose_slots
from mlx_kvprune.kernels.pack_rows import pack_rows
from mlx_kvprune.slots import Tools

TOOLS = Tools(pack_rows, choose_slots)  # each of them looks whether its kernel can run
