"""Speed and memory against stock mlx-lm, in one process, interleaved."""
