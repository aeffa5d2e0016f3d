"""The table of named policies: a scorer, an allocator, a trigger."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

from mlx_kvprune import scorers
from mlx_kvprune.scorers.base import Scorer, options_of
from mlx_kvprune.settings import DEFAULT_BLOCK, DEFAULT_WINDOW, CacheSettings

GLOBAL_BLOCK = 128  # where all layers compete, the model is called in steps of a block: short ones are slow
PART_OF_BUDGET, GLOBAL_PART = 4, 8  # a block is at most this part of it: what the ring holds cannot be chosen


@dataclass(frozen=True)
class Policy:
    """A named way to bound a cache.

    Attributes:
        name: what the user types.
        scorer: the signal, with its default hyper-parameters; None keeps everything.
        summary: one line for ``mlx-kvprune policies``.
        window: newest tokens that are never evicted, unless the user says otherwise.
        block: tokens between two upkeeps (the trigger), likewise; more than 32 are at most a quarter of a budget in tokens,
            an eighth where all layers compete.
        allocator: how the budget is shared, likewise.
        gates: the method whose learned gates it needs; empty if it needs none.
    """

    name: str
    scorer: Scorer | None
    summary: str
    window: int = DEFAULT_WINDOW
    block: int = DEFAULT_BLOCK
    allocator: str = "uniform"
    gates: str = ""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The scorer's, by name, with their defaults; none where everything is kept."""
        return options_of(self.scorer) if self.scorer is not None else {}

    @property
    def drops(self) -> bool:
        """Whether its gates have a threshold, below which a token is dropped whatever room there is."""
        return bool(self.gates) and "threshold" in self.hyperparameters

    def completed(self, settings: CacheSettings) -> CacheSettings:
        """The settings with what the user left open filled in; but for the block of a budget in bytes, which is a matter of
        how many slots they are (``attach.with_block``)."""
        if settings.allocator == "auto":
            settings = settings.but(allocator=self.allocator)
        if settings.window is None:
            settings = settings.but(window=self.window)
        if settings.block is None and settings.budget.nbytes is None:
            wanted = self.most_block(settings)
            settings = settings.but(block=self.block_at(settings.budget.tokens or GLOBAL_PART * wanted, settings))
        return settings

    def most_block(self, settings: CacheSettings) -> int:
        """Tokens between two upkeeps, where the budget has room for them."""
        return max(self.block, GLOBAL_BLOCK if settings.allocator == "global" else 0)

    def block_at(self, tokens: int, settings: CacheSettings) -> int:
        """Tokens between two upkeeps with a budget of ``tokens`` per KV head, which has room for them."""
        part = GLOBAL_PART if settings.allocator == "global" else PART_OF_BUDGET
        for block in range(self.most_block(settings), DEFAULT_BLOCK, -DEFAULT_BLOCK):
            if block <= tokens // part and settings.but(block=block).smallest_budget <= tokens:
                return block
        return DEFAULT_BLOCK


POLICIES = {
    p.name: p
    for p in (
        Policy("full", None, "keeps everything: mlx-lm's own cache, the control"),
        Policy("window", scorers.Window(), "sinks and the newest tokens (StreamingLLM), the control to beat"),
        Policy("random", scorers.Random(), "random tokens, the control that says what a signal is worth"),
        Policy("knorm", scorers.KNorm(), "keys of small norm"),
        Policy("keydiff", scorers.KeyDiff(), "keys unlike the others"),
        Policy("tova", scorers.Tova(), "attention of the last query"),
        Policy("h2o", scorers.H2O(), "accumulated attention (heavy hitters)"),
        Policy("snapkv", scorers.SnapKV(), "attention of the last 64 queries, pooled"),
        Policy("expected_attention", scorers.ExpectedAttention(), "attention that future queries are expected to give"),
        Policy("rkv", scorers.RKV(), "attention minus redundancy"),
        Policy("surprise", scorers.Surprise(), "tokens that the model did not expect, with decay (after Titans)"),
        Policy(
            "retention",
            scorers.Retention(),
            "what a learned gate says will last, with decay (TRIM-KV), all heads of all layers in one budget",
            window=16,
            allocator="global",
            gates="retention",
        ),
        Policy(
            "retention_probe",
            scorers.RetentionProbe(),
            "retention gates, but a part of the slots is what a question attends to; needs a question",
            window=32,
            allocator="global",
            gates="retention",
        ),
        Policy(
            "spkv",
            scorers.SPKV(),
            "what a learned gate finds worth writing (SP-KV); holds more of text that needs more, within the budget",
            window=128,
            block=128,
            allocator="head_adaptive",
            gates="spkv",
        ),
        Policy(
            "kvzap",
            scorers.KVzap(),
            "what a gate expects a second reading to attend to (KVzap)",
            allocator="global",
            gates="kvzap",
        ),
        Policy(
            "fastkvzip",
            scorers.FastKVzip(),
            "the same, by a sink-attention gate (Fast KVzip)",
            allocator="global",
            gates="fastkvzip",
        ),
        Policy(
            "dms",
            scorers.DMS(),
            "what a gate does not evict, which it does a window later (DMS)",
            window=256,
            block=128,
            allocator="head_adaptive",
            gates="dms",
        ),
        Policy(
            "probe", scorers.Probe(), "what the question attends to, in spans; needs a question", window=32, block=128
        ),
    )
}


def policy_for(settings: CacheSettings) -> tuple[Policy, CacheSettings]:
    """The policy that ``settings`` name, its hyper-parameters set, and the settings with the policy's trigger filled in.

    Raises:
        ValueError: no such policy, or no such hyper-parameter.
    """
    policy = find(settings.policy)
    settings = policy.completed(settings)
    options: dict[str, Any] = dict(settings.options)
    if policy.scorer is None:
        return policy, settings
    known = policy.hyperparameters
    for name in options:
        if name not in known:
            raise ValueError(f"[policy] {policy.name} has no option {name!r}; try one of: {', '.join(known) or 'none'}")
    if "seed" in known:
        options.setdefault("seed", settings.seed)
    if "n_sink" in known:
        options.setdefault("n_sink", settings.n_sink)
    scorer: Any = policy.scorer
    replace(scorer, **options).check()
    _check_threshold(replace(scorer, **options), settings)
    if "last" in known:  # as published, the observation window is never evicted: its queries find their own time
        options["last"] = min(options.get("last", known["last"]), settings.window)
    return replace(policy, scorer=replace(scorer, **options)), settings


def _check_threshold(scorer: Scorer, settings: CacheSettings) -> None:
    """Refuse what cannot be combined with a scorer that drops tokens of one head and keeps them in another."""
    if scorer.least is None:
        return
    for wrong, got, hint in (
        (not settings.ragged, f"allocator {settings.allocator}", "--allocator head_adaptive or global"),
        (settings.kv_fine_tokens > 0, f"{settings.kv_fine_tokens} fine tokens", "--kv-fine-tokens 0"),
        (settings.paged, "pages that are quantized whole", "another --kv-scheme"),
    ):
        if wrong:
            raise ValueError(
                f"[threshold] policy {settings.policy!r} drops tokens below {scorer.least:g}, each head its own, so that "
                f"heads hold differently many; got {got}; try {hint}, or --policy-option threshold=null"
            )


def find(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name in POLICIES:
        return POLICIES[name]
    if name == "auto":
        raise ValueError(
            f"[policy] auto is for generate, chat and ask; got it elsewhere; try one of: {', '.join(POLICIES)}"
        )
    near = difflib.get_close_matches(name, POLICIES, n=1)
    hint = repr(near[0]) if near else f"one of: {', '.join(POLICIES)}"
    raise ValueError(f"[policy] unknown; got {name!r}; try {hint}")


def knows_question(name: str) -> bool:
    """Whether a policy of that name chooses by a question that it knows while it reads."""
    scorer = find(name).scorer
    return scorer is not None and "question" in scorer.needs


def register(policy: Policy) -> None:
    """Add a policy of your own to the table; it is then known by its name everywhere."""
    POLICIES[policy.name] = policy
