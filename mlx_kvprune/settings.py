"""What a user asks of a cache: ``CacheSettings``, and how a budget is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
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
        allocator: how the budget is shared over layers and heads: ``uniform``, ``pyramid``, ``head_adaptive``, ``global``;
            ``auto`` lets the policy choose.
        budget: the most that is held at any moment (see ``Budget``); sinks, window and ring are inside it.
        n_sink: first tokens of the text that are never evicted.
        window: newest tokens that are never evicted. None lets the policy choose.
        block: tokens between two upkeeps; the hot ring holds ``window + block`` tokens. None lets the policy choose.
        positions: ``text``: keys stay as the model rotated them. ``cache``: a token's position is its rank in the cache,
            so that texts may be longer than the model's trained context. ``auto``: ``text``, unless ``ask`` or
            ``generate`` see that the text becomes longer than that, or ``chat``, which has no end, can have the other
            (``attach`` cannot know: ``text``).
        store: ``kv``: keys and values are stored.
        kv_bits: bits of stored keys and values (8, 6, 5, 4, 3, 2); None stores them in the model's own type.
        kv_key_bits: bits of keys alone, over ``kv_bits``.
        kv_value_bits: bits of values alone, over ``kv_bits``.
        kv_group_size: numbers that share a scale (32, 64, 128).
        kv_scheme: how keys are quantized: ``token``, ``channel``, ``page`` or ``auto`` (see docs/quantization.md).
        kv_hadamard: rotate keys and values by a Hadamard matrix before they are quantized; None is yes.
        kv_fine_tokens: slots per KV head, out of the budget, for the best tokens in a finer precision.
        kv_fine_bits: bits of those; None stores them in the model's own type.
        head_floor: share of an equal budget that every head keeps under ``head_adaptive`` and ``global``.
        turn_floor: share of the pool that finished turns of a conversation keep, in equal parts (see ``end_turn``).
        local_layers: bounded layers, counted from 0, that hold sinks and ring alone (``"0,1,5-7"``; a list of numbers will do);
            the others share what that frees. ``auto``: those that the gates' file names.
        seed: for policies that draw random numbers.
        gates: file or hub repository of learned gates, for policies that need them; empty for those that belong to the model.
        question: token ids of the question, for policies that probe with it.
        options: hyper-parameters of the policy, by name, over its defaults.
    """

    policy: str = "window"
    allocator: str = "auto"
    budget: Budget = field(default_factory=Budget)
    n_sink: int = 4
    window: int | None = None
    block: int | None = None
    positions: str = "text"
    store: str = "kv"
    kv_bits: int | None = None
    kv_key_bits: int | None = None
    kv_value_bits: int | None = None
    kv_group_size: int = 64
    kv_scheme: str = "auto"
    kv_hadamard: bool | None = None
    kv_fine_tokens: int = 0
    kv_fine_bits: int | None = None
    head_floor: float = 0.2
    turn_floor: float = 0.5
    local_layers: str = ""
    seed: int = 0
    gates: str = ""
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
        _one_of("allocator", self.allocator, ALLOCATORS)
        _one_of("positions", self.positions, ("text", "cache", "auto"))
        _one_of("store", self.store, ("kv",))
        object.__setattr__(self, "local_layers", _layers_text(self.local_layers))
        for name in ("head_floor", "turn_floor"):
            if not isinstance(getattr(self, name), int | float) or not 0 <= getattr(self, name) <= 1:
                where = name.replace("_", "-")
                raise ValueError(f"[{where}] must be a share from 0 to 1; got {getattr(self, name)!r}; try 0.2")
        self._check_bits()

    def _check_bits(self) -> None:
        """What can be said of quantization without knowing the model."""
        for name in ("kv_bits", "kv_key_bits", "kv_value_bits", "kv_fine_bits"):
            _one_of(name.replace("_", "-"), getattr(self, name), (None, *BITS))
        _one_of("kv-group-size", self.kv_group_size, GROUP_SIZES)
        _one_of("kv-scheme", self.kv_scheme, SCHEMES)
        _at_least("kv-fine-tokens", self.kv_fine_tokens, 0)
        fine, coarse = self.kv_fine_bits, (self.key_bits or OWN_BITS, self.value_bits or OWN_BITS)
        if self.kv_fine_tokens and fine is not None and not (min(coarse) < fine >= max(coarse)):
            raise ValueError(
                f"[kv-fine-bits] the best tokens would be stored no finer than the others; got {fine}; "
                "try more bits, or none for the model's own type"
            )
        if self.kv_fine_tokens and self.kv_scheme == "page":
            raise ValueError(
                "[kv-scheme] pages are written once and cannot be handed on to a second precision; got 'page' with "
                f"--kv-fine-tokens {self.kv_fine_tokens}; try --kv-scheme channel"
            )
        if self.kv_scheme == "page" and self.block is not None and self.block % PAGE:
            raise ValueError(
                f"[block] pages of {PAGE} tokens leave the ring at a time with --kv-scheme page; got {self.block}; "
                f"try {PAGE}"
            )

    @property
    def key_bits(self) -> int | None:
        """Bits of stored keys."""
        return self.kv_bits if self.kv_key_bits is None else self.kv_key_bits

    @property
    def value_bits(self) -> int | None:
        """Bits of stored values."""
        return self.kv_bits if self.kv_value_bits is None else self.kv_value_bits

    @property
    def ragged(self) -> bool:
        """Whether heads may hold differently many slots."""
        return self.allocator in ("head_adaptive", "global")

    @property
    def paged(self) -> bool:
        """Whether slots are written a page at a time."""
        return self.kv_scheme == "page" and self.key_bits is not None

    @property
    def local(self) -> frozenset[int]:
        """The layers that hold sinks and ring alone; ``auto`` has none until it is known what it means."""
        return frozenset() if self.local_layers in ("", "auto") else frozenset(_layers(self.local_layers))

    @property
    def ring_size(self) -> int:
        """Tokens that the hot ring holds when full."""
        return (self.window or DEFAULT_WINDOW) + (self.block or DEFAULT_BLOCK)

    @property
    def smallest_budget(self) -> int:
        """The smallest budget in tokens per KV head that has room for sinks, window, ring and one pool slot."""
        return self.ring_size + self.n_sink + self.smallest_pool

    @property
    def smallest_pool(self) -> int:
        """The fewest slots that the pool must have: a page where slots come in pages."""
        return (PAGE if self.ragged or self.paged else 1) + self.kv_fine_tokens

    def check_tokens(self, tokens: int) -> int:
        """Return ``tokens`` if sinks, window and ring fit into it.

        Raises:
            ValueError: the cap is too small.
        """
        if tokens < self.smallest_budget:
            parts = f"{self.n_sink} sinks + a ring of {self.ring_size} (window {self.window or DEFAULT_WINDOW}, "
            parts += f"block {self.block or DEFAULT_BLOCK}) + {self.smallest_pool}"
            raise ValueError(
                f"[budget] too small for {parts}; got {tokens} tokens per KV head; try {self.smallest_budget} or more, "
                "or a smaller --window, or fewer --sinks"
            )
        return tokens

    def described(self) -> str:
        """In a few words, for people."""
        text = f"policy {self.policy}" + ("" if self.policy == "full" else f", budget {self.budget}")
        text += "" if self.allocator in ("uniform", "auto") else f", {self.allocator}"
        text += f", local layers {self.local_layers}" if self.local_layers else ""
        bits = dict.fromkeys(str(bits or "all") for bits in (self.key_bits, self.value_bits))
        text += "" if list(bits) == ["all"] else f", {' and '.join(bits)} bits"
        return text + (", positions in the cache" if self.positions == "cache" else "")

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
PAGE = 32  # slots of a page


def floor_slots(pool: int, head_floor: float) -> int:
    """Slots that a head keeps whatever others want, of ``pool`` for each: in whole pages, a page at least."""
    return min(pool, PAGE * math.ceil(head_floor * pool / PAGE))


ALLOCATORS = ("uniform", "pyramid", "head_adaptive", "global", "auto")
BITS = (8, 6, 5, 4, 3, 2)
OWN_BITS = 32  # stands for the model's own type, which is finer than all of them
GROUP_SIZES = (32, 64, 128)
SCHEMES = ("auto", "token", "channel", "page")


def _layers(text: str) -> list[int]:
    """``"0,1,5-7"`` as numbers, in order, each once."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"[local-layers] not a list of layers; got {text!r}; try 0,1,5-7 or auto")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def layers_text(layers: Iterable[int]) -> str:
    """Numbers of layers as ``local_layers`` has them: ``"0-1,5-7"``."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _layers_text(given: Any) -> str:
    """What a user wrote, in one form only."""
    if isinstance(given, str) and given.strip() in ("", "auto"):
        return given.strip()
    text = given if isinstance(given, str) else ",".join(map(str, given)) if isinstance(given, list | tuple) else None
    if text is None:
        raise ValueError(f"[local-layers] not a list of layers; got {given!r}; try 0,1,5-7 or auto")
    return layers_text(_layers(text)) if text else ""


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"[{name}] must be a whole number of at least {least}; got {value!r}; try {least}")


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known or isinstance(value, bool | float):
        hint = ", ".join(str(x) for x in known if x is not None)
        raise ValueError(f"[{name}] not known; got {value!r}; try one of: {hint}")
