"""Which gates a method has, and how they can be trained."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import mlx.core as mx

from mlx_kvprune.policy import Policy, find
from mlx_kvprune.scorers.base import Scorer, options_of

UTILITY, DISTILL, BOTH = "utility", "distill", "both"
SCOPES = {"global": "global", "head_adaptive": "layer"}  # by the policy's allocator; else ``head``
RATES = {"linear": 2e-3, "mlp": 2e-3, "shared": 2e-3, "sink": 1e-3}  # of ``utility``, by form
DISTILL_RATES = {
    "linear": 3e-4,
    "mlp": 3e-4,
    "shared": 3e-4,
    "dms": 3e-5,
}  # more destroys what was found; dms times a hundred
JOINT_RATE = 1e-5  # of a whole model; adapters take ten times that


@dataclass(frozen=True)
class Method:
    """How the gates of a policy are trained.

    Attributes:
        name: of the policy.
        forms: that its gates may have, the default first.
        stages: in their order.
        targets: objectives of ``distill``, the default first.
        twice: texts are read again, and what that reading attends to is foretold.
        norms: with the norms of what values add.
        surprised: targets whose loss counts the next token's, too.
        begins: methods whose gates it may go on from, its own aside.
    """

    name: str
    forms: tuple[str, ...]
    stages: tuple[str, ...]
    targets: tuple[str, ...] = ()
    twice: bool = False
    norms: bool = False
    surprised: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()

    @property
    def policy(self) -> Policy:
        return find(self.name)

    @property
    def scorer(self) -> Scorer:
        scorer = self.policy.scorer
        assert scorer is not None
        return scorer

    @property
    def scope(self) -> str:
        """Who competes for the budget, unless the user says otherwise."""
        return SCOPES.get(self.policy.allocator, "head")

    @property
    def ageing(self) -> bool:
        return self.name == "retention"

    @property
    def falling(self) -> bool:
        return self.name == "dms"

    @property
    def has_threshold(self) -> bool:
        return "threshold" in options_of(self.scorer)

    def score(self, raw: mx.array) -> mx.array:
        """What the threshold is compared with."""
        return self.scorer.gated(raw)  # type: ignore[attr-defined]


METHODS = {
    m.name: m
    for m in (
        Method("retention", ("shared", "mlp", "linear"), (UTILITY, DISTILL), ("decay", "budget"), surprised=("decay",)),
        Method(
            "spkv",
            ("mlp", "shared", "linear"),
            (DISTILL,),
            ("spkv",),
            surprised=("spkv",),
            begins=("retention",),
        ),
        Method("kvzap", ("linear", "mlp"), (UTILITY,), twice=True, norms=True),
        Method("fastkvzip", ("sink",), (UTILITY,), twice=True),
        Method("dms", ("dms",), (DISTILL,), ("dms",)),
    )
}


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    raise ValueError(f"[method] not known; got {name!r}; try {near[0] if near else 'one of: ' + ', '.join(METHODS)}")
