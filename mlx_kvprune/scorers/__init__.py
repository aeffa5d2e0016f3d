"""Signals that say which slots matter: one file each."""

from mlx_kvprune.scorers.base import Held, Scorer, Seen
from mlx_kvprune.scorers.expected_attention import ExpectedAttention
from mlx_kvprune.scorers.gated import DMS, SPKV, FastKVzip, KVzap, Retention, RetentionProbe
from mlx_kvprune.scorers.h2o import H2O
from mlx_kvprune.scorers.keydiff import KeyDiff
from mlx_kvprune.scorers.knorm import KNorm
from mlx_kvprune.scorers.probe import Probe
from mlx_kvprune.scorers.random import Random
from mlx_kvprune.scorers.rkv import RKV
from mlx_kvprune.scorers.snapkv import SnapKV
from mlx_kvprune.scorers.surprise import Surprise
from mlx_kvprune.scorers.tova import Tova
from mlx_kvprune.scorers.window import Window

__all__ = [
    "DMS",
    "H2O",
    "RKV",
    "SPKV",
    "ExpectedAttention",
    "FastKVzip",
    "Held",
    "KNorm",
    "KVzap",
    "KeyDiff",
    "Probe",
    "Random",
    "Retention",
    "RetentionProbe",
    "Scorer",
    "Seen",
    "SnapKV",
    "Surprise",
    "Tova",
    "Window",
]
