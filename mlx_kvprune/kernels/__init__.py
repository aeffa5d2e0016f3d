"""Kernels for the GPU, each beside the reference in plain MLX operations that it is tested against."""
