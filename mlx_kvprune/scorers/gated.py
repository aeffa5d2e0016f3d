"""Scores of learned gates: what a gate's number means for a slot that is held."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_kvprune.numerics import log_sigmoid
from mlx_kvprune.scorers.base import HEARD, Held, Scorer, State, require
from mlx_kvprune.scorers.probe import Probe

FIRST = 1.0  # decay scores are negative: above all of them


@dataclass(frozen=True)
class Retention(Scorer):
    """``score_i(t) = (t + 1 - i) log beta_i`` with ``beta_i = sigmoid(gate(h_i))``: what is left of token i after decay.

    Decay is geometric; ``t`` is the next token's position. Bui et al. 2025, "Cache What Lasts: Token Retention for
    Memory-Bounded KV Cache in LLMs" (arXiv 2512.03324); with allocator ``global`` all heads of all layers compete, as in its
    successor. Scores with different slopes cross as time
    passes, so that they are computed anew at every upkeep.
    """

    needs = frozenset({"hidden"})
    memory = True

    def gated(self, raw: mx.array) -> mx.array:
        return log_sigmoid(raw)

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        age = (held.now + 1 - held.positions).astype(mx.float32)
        return age * held.memory


@dataclass(frozen=True)
class RetentionProbe(Retention):
    """``Retention``, but what a known question attends to comes first: a head's ``share`` of slots go by the ``Probe``'s score.

    The probe gives a token one score for all heads, the gates tell what each head needs whatever is asked. Their units
    cannot be added, so the question has a part of the slots to itself, whose order is the probe's; the rest are ranked by
    decay as always, and compete for the budget. Slots are counted, not the tokens of the text.

    Attributes:
        share: of the slots that a head holds, up to which the question decides, 0 to 1.
        span: width of the probe's pooling, odd.
    """

    share: float = 0.5
    span: int = 17

    needs = frozenset({"hidden", "attention", "question"})

    def check(self) -> None:
        good = isinstance(self.share, int | float) and not isinstance(self.share, bool) and 0 <= self.share <= 1
        require("share", self.share, good, "0.5")
        self.probe.check()

    @property
    def probe(self) -> Probe:
        """How the question listens."""
        return Probe(self.span)

    def score(self, held: Held, state: State) -> mx.array:
        kept = super().score(held, state)
        if HEARD not in state or not self.share:
            return kept
        asked = self.probe.score(replace(held, memory=mx.where(held.live, state[HEARD], 0.0)), {})
        asked = mx.where(held.live, asked, 0.0)  # pooling reaches empty slots
        place = mx.argsort(mx.argsort(-asked, axis=-1), axis=-1)  # 0 for the highest
        first = place < self.share * held.live.sum(axis=-1, keepdims=True)
        return mx.where(first & (asked > 0), FIRST + asked, kept)


@dataclass(frozen=True)
class WriteGate(Scorer):
    """A score that does not change: the gate's number, and below ``threshold`` a token is dropped when it leaves the ring.

    Attributes:
        threshold: the least number that is kept, in the method's own unit; null drops nothing, so that only the budget decides.
    """

    threshold: float | None = None

    needs = frozenset({"hidden"})
    memory = True

    def check(self) -> None:
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        require(
            "threshold", self.threshold, self.threshold is None or (number and math.isfinite(self.threshold)), "null"
        )

    def gated(self, raw: mx.array) -> mx.array:
        return raw.astype(mx.float32)

    def score(self, held: Held, state: State) -> mx.array:
        assert held.memory is not None
        return held.memory

    @property
    def least(self) -> float | None:
        return self.threshold


@dataclass(frozen=True)
class SPKV(WriteGate):
    """``u_i = sigmoid(gate(h_i))``: the chance that a token is of use beyond the window; kept iff ``u_i >= threshold``.

    The SP-KV write gate: inside the window everything is visible, what leaves it is written to the long-term store or never.
    How much is held depends on the text; the budget stays a hard cap, within which larger ``u`` win.

    Attributes:
        threshold: the least chance that is kept, 0 to 1: smaller holds more; null drops nothing, only the budget decides.
        bias: added to the gate's number before the sigmoid: above 0 holds more of every text.
    """

    threshold: float | None = 0.5
    bias: float = 0.0

    def check(self) -> None:
        super().check()
        good = self.threshold is None or 0 <= self.threshold < 1
        require("threshold", self.threshold, good, "0.5")
        number = isinstance(self.bias, int | float) and not isinstance(self.bias, bool)
        require("bias", self.bias, number and math.isfinite(self.bias), "0.0")

    def gated(self, raw: mx.array) -> mx.array:
        return mx.sigmoid(raw.astype(mx.float32) + self.bias)


@dataclass(frozen=True)
class KVzap(WriteGate):
    """The gate's number is ``log max_j a_ji |W_o v_i| / |h_j|``, what a second reading of the text would attend to.

    "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning" (NVIDIA 2026, arXiv 2601.07891). The threshold belongs to the
    model: gate files hold calibrated ones.
    """


@dataclass(frozen=True)
class FastKVzip(WriteGate):
    """The gate's number is the log of a score in 0 to 1 that was distilled from KVzip's (arXiv 2601.17668)."""


@dataclass(frozen=True)
class DMS(WriteGate):
    """Evicted where the gate's logit is positive, but only ``window`` tokens later: delayed eviction (arXiv 2506.05345).

    Attributes:
        threshold: the least ``-logit`` that is kept: smaller holds more; null drops nothing, so that only the budget decides.
    """

    threshold: float | None = 0.0

    def gated(self, raw: mx.array) -> mx.array:
        return -raw.astype(mx.float32)
