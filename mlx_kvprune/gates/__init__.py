"""Learned gates: modules that score each new token, and the files that hold them."""

from mlx_kvprune.gates.modules import FORMS, Gates, GateShape

__all__ = ["FORMS", "GateShape", "Gates"]
