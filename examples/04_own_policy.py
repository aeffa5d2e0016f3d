"""A policy of one's own: keep tokens whose values are large. ``python examples/04_own_policy.py [model]``"""

import sys
from dataclasses import dataclass

import mlx_kvprune as kvp
from mlx_kvprune.policy import Policy, register
from mlx_kvprune.scorers import Held, Scorer

import mlx.core as mx  # isort: skip
import mlx_lm  # isort: skip


@dataclass(frozen=True)
class ValueNorm(Scorer):
    """``score_i = ||v_i||_p``."""

    p: int = 2

    def score(self, held: Held, state: dict[str, mx.array]) -> mx.array:
        return mx.linalg.norm(held.values.astype(mx.float32), ord=self.p, axis=-1)


register(Policy("value_norm", ValueNorm(), "tokens with large values"))

model, tokenizer = kvp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
kvp.attach(model, policy="value_norm", budget=160, p=1)
print(mlx_lm.generate(model, tokenizer, "The sea was calm that night. " * 40 + "Then", max_tokens=20))
