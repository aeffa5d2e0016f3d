"""Learned gates: modules that score each new token, and the files that hold them."""

from mlx_kvprune.gates.modules import FORMS, GateShape, Gates

__all__ = ["FORMS", "GateShape", "Gates"]
