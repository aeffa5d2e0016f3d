"""Reading with random gates, and the cache that gates decide about by brute force: NumPy, one block at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tiny_gates import FORM, GATED, given_gates, random_gates
from tiny_models import tiny_model

import mlx_kvprune as kvp
from mlx_kvprune.forward import pruned
from mlx_kvprune.settings import PAGE

__all__ = ["FORM", "GATED", "given_gates", "random_gates"]
WORDS, WINDOW, BLOCK, SINKS = 1024, 16, 32, 4


def gated_model(name: str = "llama", **more) -> nn.Module:
    """With enough words that no text needs one twice: equal tokens would have equal scores in the first layer."""
    return tiny_model(name, vocab_size=WORDS, **more)


def text(length: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).permutation(WORDS)[None, :length].astype(np.int32))


def caches_for(model: nn.Module, policy: str, budget: int | None, **more) -> list:
    return kvp.make_cache(model, policy, budget, **{"window": WINDOW, "block": BLOCK, "n_sink": SINKS, **more})


def read(model: nn.Module, caches: list, tokens: mx.array, step: int | None = None) -> np.ndarray:
    """Logits of the last token."""
    for start in range(0, tokens.shape[1], step or tokens.shape[1]):
        logits = model(tokens[:, start : start + (step or tokens.shape[1])], cache=caches)[:, -1]
        mx.eval(logits)
    return np.array(logits.astype(mx.float32))


def kept(caches: list) -> list[list[list[int]]]:
    """Positions held by each head of each layer, in order."""
    rows = lambda cache: np.array(cache.held.positions())[0]
    return [[sorted(p for p in row.tolist() if p >= 0) for row in rows(cache)] for cache in pruned(caches)]


def raw_of(caches: list) -> list[np.ndarray]:
    """Note what the gates say of every token from now on: per layer ``(H_kv, tokens)``, filled while the model reads."""
    heard: list[list[np.ndarray]] = []
    for cache in pruned(caches):
        mine: list[np.ndarray] = []
        cache.gate = _listening(cache.gate, mine)
        heard.append(mine)
    return heard  # type: ignore[return-value]


def _listening(gate: Callable[[mx.array], mx.array], heard: list[np.ndarray]) -> Callable[[mx.array], mx.array]:
    def listen(x: mx.array) -> mx.array:
        out = gate(x)
        heard.append(np.array(out)[0])
        return out

    return listen


class Simulated:
    """What ring and pools of all layers hold: lists of positions, computed anew from the numbers of the gates.

    Args:
        raw: what the gates said, per layer ``(H_kv, tokens)`` float64.
        score: of the raw numbers ``(tokens,)`` of positions ``(tokens,)`` at time ``now``.
        slots: per KV head, everything counted.
        allocator: ``uniform``, ``head_adaptive`` or ``global``.
        least: the threshold on the score; None for none.
    """

    def __init__(
        self,
        raw: list[np.ndarray],
        score: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
        slots: int | None,
        allocator: str,
        least: float | None = None,
        head_floor: float = 0.2,
    ):
        self.raw, self.score, self.allocator, self.least = raw, score, allocator, least
        self.room = 1 << 20 if slots is None else slots - WINDOW - BLOCK - SINKS
        self.pools = {(i, h): [] for i, x in enumerate(raw) for h in range(len(x))}
        self.ring: list[int] = []
        self.smallest_gap, self.head_floor, self.contested = np.inf, head_floor, False

    def read(self, n: int) -> None:
        for t in range(n):
            if t < SINKS:
                continue
            if len(self.ring) == WINDOW + BLOCK:
                self.move(t)
            self.ring.append(t)

    def move(self, now: int) -> None:
        """The oldest tokens of the ring leave it: what passes the threshold competes for the pools."""
        leaving, self.ring = self.ring[:BLOCK], self.ring[BLOCK:]
        ranked = {}
        for (layer, head), pool in self.pools.items():
            mine = np.array(pool + leaving)
            scores = self.score(self.raw[layer][head][mine], mine, now).astype(np.float32)
            passing = [(s, p) for s, p in zip(scores.tolist(), mine.tolist(), strict=True) if self.passes(s)]
            ranked[layer, head] = sorted(passing, reverse=True)
        for group in self.groups():
            self.share(group, ranked)

    def passes(self, score: float) -> bool:
        if self.least is not None:
            self.smallest_gap = min(self.smallest_gap, abs(score - self.least))
        return self.least is None or score >= self.least

    def groups(self) -> list[list[tuple[int, int]]]:
        """Heads that compete with one another."""
        if self.allocator == "global":
            return [list(self.pools)]
        by = (lambda key: key) if self.allocator == "uniform" else (lambda key: key[0])
        return [[key for key in self.pools if by(key) == name] for name in dict.fromkeys(map(by, self.pools))]

    def share(self, group: list[tuple[int, int]], ranked: dict) -> None:
        """Ada-KV in pages: floors first, then page by page to the head whose next page has the best middle slot."""
        if self.allocator == "uniform":
            rooms = dict.fromkeys(group, self.room)
        else:
            pages = dict.fromkeys(group, 0)
            has = {key: -(-len(ranked[key]) // PAGE) for key in group}
            most = max(len(group), len(group) * self.room // PAGE)
            floor = min(math.ceil(self.head_floor * most / len(group)), most // len(group))
            pages = {key: min(floor, has[key]) for key in group}
            worth = lambda key: ranked[key][min(pages[key] * PAGE + PAGE // 2, len(ranked[key]) - 1)]
            while sum(pages.values()) < most and (open_ones := [key for key in group if pages[key] < has[key]]):
                best, *others = sorted(open_ones, key=worth, reverse=True)
                if others:
                    self.smallest_gap = min(self.smallest_gap, worth(best)[0] - worth(others[0])[0])
                pages[best] += 1
            rooms = {key: PAGE * n for key, n in pages.items()}
        for key in group:
            if len(ranked[key]) > rooms[key] > 0:
                self.smallest_gap = min(self.smallest_gap, ranked[key][rooms[key] - 1][0] - ranked[key][rooms[key]][0])
            self.pools[key] = [p for _, p in ranked[key][: rooms[key]]]

    def kept(self) -> list[list[list[int]]]:
        held = lambda layer, head: sorted([*range(SINKS), *self.pools[layer, head], *self.ring])
        return [[held(i, h) for h in range(len(x))] for i, x in enumerate(self.raw)]
