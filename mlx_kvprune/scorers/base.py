"""What a scorer sees and what it answers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import numpy as np

from mlx_kvprune.numerics import device, softmax

if TYPE_CHECKING:
    from mlx_kvprune.scorers.probe import Probe

State = dict[str, mx.array]
HEARD = "heard"  # of a layer's state: what a question attended to of each slot (B, H_kv, S), while slots are chosen


@dataclass(frozen=True)
class Held:
    """Everything that one layer holds when slots are chosen: the pool's slots first, then the ring, oldest first.

    Attributes:
        keys: ``(B, H_kv, S, D)`` as the model rotated them.
        values: ``(B, H_kv, S, D_v)``.
        positions: token index of each slot ``(B, H_kv, S)`` int32; negative where a slot is empty (heads may differ).
        memory: what the scorer remembered of each slot ``(B, H_kv, S)`` float32, or None.
        now: tokens seen; the next token's position.
        layer: index of the layer.
        scale: factor of the model's attention logits.
        rope: the layer's rotary module, or None.
        next: the position that the next token's query is rotated to: ``now``, unless positions are those in the cache.
        turned: whether queries that were seen are as the model rotated them.
        ragged: whether heads may hold different tokens in a slot of one number, because they compete for slots.
        sinks: the first positions, which are never evicted, as far as there are such; None for those of the settings.
    """

    keys: mx.array
    values: mx.array
    positions: mx.array
    memory: mx.array | None
    now: int
    layer: int
    scale: float
    rope: Callable[..., mx.array] | None = None
    next: int = 0
    turned: bool = True
    ragged: bool = False
    sinks: int | None = None

    @property
    def live(self) -> mx.array:
        """Which slots hold something ``(B, H_kv, S)`` bool."""
        return self.positions >= 0

    def observed(self, last: int) -> mx.array:
        """Which slots hold one of the ``last`` tokens ``(B, H_kv, S)`` bool: an observation window, never evicted."""
        return self.live & (self.positions >= self.now - last)

    def in_place(self, queries: mx.array) -> mx.array:
        """The newest queries ``(B, H_q, w, D)``, rotated to match ``keys``."""
        if self.turned or self.rope is None:
            return queries
        return self.rope(mx.array(queries), offset=self.next - queries.shape[2])


@dataclass(frozen=True)
class Seen:
    """One attention step: ``L`` new queries.

    Attributes:
        queries: ``(B, H_q, L, D)`` as the model rotated them, or before rotation.
        start: position of the first of them.
        rope: the layer's rotary module, or None.
        turned: whether they are as the model rotated them.
    """

    queries: mx.array
    start: int
    rope: Callable[..., mx.array] | None = None
    turned: bool = True


class Scorer:
    """Gives every held slot a retention score; higher is kept.

    A method is a frozen dataclass of its hyper-parameters and some of these functions. Sinks, window and pinned tokens
    are not its business: they never reach the choice.

    Attributes:
        needs: what must be handed in beside keys and values: ``queries``, ``attention`` (weights), ``logits``,
            ``question``, ``rope``, ``hidden`` (the attention's input, for a learned gate).
        memory: whether a number per slot is remembered between steps.
        remembers_heard: whether that number is what a question heard; else it is told beside it, for one choice.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    memory: ClassVar[bool] = False
    remembers_heard: ClassVar[bool] = False

    @property
    def probe(self) -> Probe | None:
        """How a question that is known listens; None where it does not matter."""
        return None

    @property
    def hears(self) -> bool:
        """Whether later tokens change what is remembered of earlier ones, so that they cannot be taken back."""
        return bool(self.needs - {"hidden"})

    @property
    def least(self) -> float | None:
        """The score below which a token is dropped when it leaves the ring, whatever room there is; None for none."""
        return None

    def check(self) -> None:
        """Raise ``ValueError`` where a hyper-parameter makes no sense."""

    def first(self, keys: mx.array, values: mx.array) -> mx.array:
        """What is remembered of new tokens ``(B, H_kv, L, D)`` -> ``(B, H_kv, L)``; zero unless overridden."""
        return mx.zeros(keys.shape[:3])

    def gated(self, raw: mx.array) -> mx.array:
        """What is remembered of new tokens, from what their layer's gate said ``(B, H_kv, L)``."""
        raise NotImplementedError

    def attended(self, memory: mx.array, weights: mx.array) -> mx.array:
        """The memory after a step's attention weights ``(B, H_kv, gqa_factor, L, S)`` -> ``(B, H_kv, S)``."""
        return memory

    def observe(self, state: State, seen: Seen) -> State:
        """The layer's state after a step's queries."""
        return state

    def score(self, held: Held, state: State) -> mx.array:
        """Retention scores of everything held ``(B, H_kv, S)``, float32."""
        raise NotImplementedError

    def state_nbytes(self, n_heads: int, head_dim: int) -> int:
        """Bytes that ``state`` takes for one layer at most, float32 (``n_heads`` query heads)."""
        return 0

    def shared_nbytes(self, vocab: int) -> int:
        """Bytes that the first layer's ``state`` takes for all of them, float32 (``vocab`` logits)."""
        return 0


def recent(state: State, queries: mx.array, n: int) -> State:
    """Remember the last ``n`` queries ``(B, H_q, <= n, D)`` under ``queries``, oldest first."""
    if "queries" in state and queries.shape[2] < n:
        queries = mx.concatenate([state["queries"], queries], axis=2)
    return {**state, "queries": mx.contiguous(queries[:, :, -n:])}


def recent_without(
    queries: mx.array, written: int, start: int, stop: int, shift: int, turn: Callable[[mx.array, int], mx.array] | None
) -> State:
    """What ``recent`` remembers without the queries of the positions ``start .. stop - 1``; nothing if none are left.

    In front of a gap that stays they are forgotten, too: scorers take what is remembered for neighbours.

    Args:
        queries: the newest ``(B, H_q, w, D)``.
        written: one more than the position of the last of them.
        shift: by how much later positions move back; 0 for a gap that stays.
        turn: rotates rows back by a shift; None where they are not rotated.
    """
    at = np.arange(written - queries.shape[2], written)
    later = queries[:, :, device(np.flatnonzero(at >= stop))]
    earlier = queries[:, :, device(np.flatnonzero(at < start))][:, :, : None if shift else 0]
    kept = mx.concatenate([earlier, turn(later, shift) if turn and later.shape[2] else later], axis=2)
    return {"queries": kept} if kept.shape[2] else {}


def attention_of(queries: mx.array, held: Held) -> mx.array:
    """Causal attention weights of the newest queries over everything held.

    Args:
        queries: ``(B, H_q, w, D)``, the last at position ``held.now - 1``.

    Returns:
        ``(B, H_kv, gqa_factor, w, S)`` float32.
    """
    batch, n_heads, w, width = queries.shape
    kv_heads, slots = held.keys.shape[1], held.keys.shape[2]
    grouped = held.in_place(queries).reshape(batch, kv_heads, -1, width) * held.scale
    logits = (grouped @ held.keys.swapaxes(-1, -2)).reshape(batch, kv_heads, n_heads // kv_heads, w, slots)
    at = mx.arange(held.now - w, held.now)[:, None]
    positions = held.positions[:, :, None, None, :]
    visible = (positions >= 0) & (positions <= at)
    return softmax(mx.where(visible, logits, -mx.inf))


def in_text_order(positions: mx.array, x: mx.array, pool: Callable[[mx.array], mx.array]) -> mx.array:
    """Apply ``pool`` along the slots in the order of their positions, and put the result back in slot order."""
    order = mx.argsort(positions, axis=-1)
    back = mx.argsort(order, axis=-1)
    return mx.take_along_axis(pool(mx.take_along_axis(x, order, axis=-1)), back, axis=-1)


def neighbours(x: mx.array, width: int, fill: float) -> list[mx.array]:
    """``x`` shifted by ``-(width // 2) .. width // 2`` along the last axis, edges filled: what a 1-D pooling sees."""
    half, length = width // 2, x.shape[-1]
    pads = [(0, 0)] * (x.ndim - 1) + [(half, half)]
    padded = mx.pad(x, pads, constant_values=mx.array(fill, x.dtype))
    return [padded[..., i : i + length] for i in range(2 * half + 1)]


def max_pool(x: mx.array, width: int) -> mx.array:
    """Running maximum over ``width`` (odd) neighbours."""
    best, *others = neighbours(x, width, -float("inf"))
    for other in others:
        best = mx.maximum(best, other)
    return best


def mean_pool(x: mx.array, width: int) -> mx.array:
    """Running mean over ``width`` (odd) neighbours; zeros beyond the ends count (torch's ``avg_pool1d``)."""
    total, *others = neighbours(x, width, 0.0)
    for other in others:
        total = total + other
    return total / width


def require(name: str, value: Any, good: bool, hint: str) -> None:
    """Raise ``ValueError`` unless a hyper-parameter is good."""
    if not good:
        raise ValueError(f"[policy-option] {name} makes no sense; got {value!r}; try {hint}")


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def options_of(scorer: Scorer) -> dict[str, Any]:
    """The hyper-parameters of a scorer, by name."""
    return {name: getattr(scorer, name) for name in getattr(scorer, "__dataclass_fields__", {})}


def meanings_of(scorer: Scorer) -> dict[str, str]:
    """What the docstrings of a scorer's class say about its hyper-parameters, by name."""
    found: dict[str, str] = {}
    for kind in reversed(type(scorer).__mro__):
        _, _, told = (kind.__doc__ or "").partition("Attributes:\n")
        for name, meaning in re.findall(r"^ +(\w+): (.*(?:\n {12,}.*)*)", told, re.MULTILINE):
            found[name] = " ".join(meaning.split())
    return {name: found[name] for name in options_of(scorer) if name in found}


def story_of(scorer: Scorer) -> str:
    """The docstring of a scorer's class, without its hyper-parameters: formula and source."""
    return inspect.cleandoc(type(scorer).__doc__ or "").partition("\nAttributes:")[0].strip()
