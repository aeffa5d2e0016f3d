"""What a user asks of a cache: ``CacheSettings``, and how a budget is written."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """The most that is held at any moment: ``tokens`` per KV head, or ``nbytes`` for all bounded layers together."""

    tokens: int | None = None
    nbytes: int | None = None

    @classmethod
    def parse(cls, text: int | str | Budget | None) -> Budget:
        """Read ``512`` or ``"512"`` (tokens per KV head), ``"64MB"`` or ``"8MiB"`` (bytes), or None (no bound).

        Raises:
            ValueError: not a positive number with an optional unit.
        """
        if isinstance(text, Budget):
            return text
        if text is None:
            return cls()
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
        unit = match[2].upper() if match else ""
        if match is None or (unit and unit not in UNITS) or (not unit and "." in match[1]) or float(match[1]) <= 0:
            raise ValueError(f"[budget] not a budget; got {text!r}; try 512 (tokens per KV head) or 64MB (bytes)")
        return cls(nbytes=int(float(match[1]) * UNITS[unit])) if unit else cls(tokens=int(match[1]))

    def __str__(self) -> str:
        if self.nbytes is not None:
            return f"{self.nbytes / 1e6:g}MB"
        return "unbounded" if self.tokens is None else str(self.tokens)


@dataclass(frozen=True)
class CacheSettings:
    """Settings of one bounded cache; the same for all its layers.

    Attributes:
        policy: a name from ``mlx-kvprune policies``.
        allocator: how the budget is shared over layers and heads (``uniform``).
        budget: the most that is held at any moment (see ``Budget``); sinks, window and ring are inside it.
        n_sink: first tokens of the text that are never evicted.
        window: newest tokens that are never evicted. None lets the policy choose.
        block: tokens between two upkeeps; the hot ring holds ``window + block`` tokens. None lets the policy choose.
        positions: ``text``: keys stay as the model rotated them.
        store: ``kv``: keys and values are stored.
        kv_bits: bits of stored keys and values; None stores them in the model's own type.
        seed: for policies that draw random numbers.
        question: token ids of the question, for policies that probe with it.
        options: hyper-parameters of the policy, by name, over its defaults.
    """

    policy: str = "window"
    allocator: str = "uniform"
    budget: Budget = field(default_factory=Budget)
    n_sink: int = 4
    window: int | None = None
    block: int | None = None
    positions: str = "text"
    store: str = "kv"
    kv_bits: int | None = None
    seed: int = 0
    question: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.parse(self.budget))
        if isinstance(self.question, str):
            raise ValueError(f"[question] must be token ids; got {self.question!r}; try tokenizer.encode(question)")
        object.__setattr__(self, "question", tuple(int(token) for token in self.question))
        _at_least("sinks", self.n_sink, 0)
        for name in ("window", "block"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _one_of("allocator", self.allocator, ("uniform",))
        _one_of("positions", self.positions, ("text",))
        _one_of("store", self.store, ("kv",))
        if self.kv_bits is not None:
            raise ValueError(
                f"[kv-bits] quantized storage is not in this version; got {self.kv_bits}; "
                "try without it, or a smaller budget"
            )

    @property
    def ring_size(self) -> int:
        """Tokens that the hot ring holds when full."""
        return (self.window or DEFAULT_WINDOW) + (self.block or DEFAULT_BLOCK)

    @property
    def smallest_budget(self) -> int:
        """The smallest budget in tokens per KV head that has room for sinks, window, ring and one pool slot."""
        return self.ring_size + self.n_sink + 1

    def check_tokens(self, tokens: int) -> int:
        """Return ``tokens`` if sinks, window and ring fit into it.

        Raises:
            ValueError: the cap is too small.
        """
        if tokens < self.smallest_budget:
            parts = f"{self.n_sink} sinks + a ring of {self.ring_size} (window {self.window or DEFAULT_WINDOW}, "
            parts += f"block {self.block or DEFAULT_BLOCK}) + 1"
            raise ValueError(
                f"[budget] too small for {parts}; got {tokens} tokens per KV head; try {self.smallest_budget} or more, "
                "or a smaller --window, or fewer --sinks"
            )
        return tokens

    def but(self, **changes: Any) -> CacheSettings:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """One line that ``from_json`` reads back; stored in saved caches."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CacheSettings:
        """The settings that ``to_json`` wrote."""
        fields = json.loads(text)
        fields["budget"] = Budget(**fields["budget"])
        fields["options"] = tuple((name, value) for name, value in fields["options"])
        return cls(**fields)


DEFAULT_WINDOW, DEFAULT_BLOCK = 64, 32


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"[{name}] must be a whole number of at least {least}; got {value!r}; try {least}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"[{name}] not in this version; got {value!r}; try one of: {', '.join(known)}")
