"""One layer's bounded cache by definition: NumPy in float64, one token at a time, lists in text order.

Slow on purpose, and nothing in here comes from the package. A token enters the ring; when the ring holds ``window +
block`` tokens and the next one comes, its oldest ``block`` tokens move out; per KV head the pool keeps the best
``slots - ring - sinks`` of what it has and what moves out, by (score, newer position). Sinks stand
aside. Each score is computed anew from everything the layer was ever given, by the definition of the paper or
repository named beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Score = Callable[..., np.ndarray]


@dataclass
class Past:
    """Everything that one layer was given for one sequence.

    Attributes:
        scale: factor of the attention logits.
        n_sink: first tokens that are never evicted.
        queries: per token ``(H_q, D)``.
        keys: per token ``(H_kv, D)``.
        values: per token ``(H_kv, D_v)``.
        given: per token the attention that its queries gave ``{(query head, position): weight}`` to what they saw.
    """

    scale: float
    n_sink: int
    queries: list[np.ndarray] = field(default_factory=list)
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    given: list[dict[tuple[int, int], float]] = field(default_factory=list)

    @property
    def now(self) -> int:
        return len(self.keys)

    def group(self, head: int) -> range:
        """The query heads of a KV head."""
        gqa_factor = len(self.queries[0]) // len(self.keys[0])
        return range(head * gqa_factor, (head + 1) * gqa_factor)

    def key_rows(self, head: int, held: list[int]) -> np.ndarray:
        """The keys of held positions ``(S, D)``."""
        return np.array([self.keys[p][head] for p in held])

    def value_rows(self, head: int, held: list[int]) -> np.ndarray:
        """The values of held positions ``(S, D_v)``."""
        return np.array([self.values[p][head] for p in held])

    def logits(self, t: int, query_head: int, head: int, held: list[int]) -> np.ndarray:
        """Attention logits of the query at position ``t`` over held positions ``(S,)``; later ones are hidden."""
        row = self.scale * (self.key_rows(head, held) @ self.queries[t][query_head])
        return np.where(np.array(held) <= t, row, -np.inf)


class Sequence:
    """The ring and the pools of one sequence."""

    def __init__(self, score: Score, slots: int, window: int, block: int, n_sink: int, scale: float):
        self.score, self.slots, self.window, self.block = score, slots, window, block
        self.past = Past(scale, n_sink)
        self.sinks: list[int] = []
        self.ring: list[int] = []
        self.pools: list[list[int]] = []
        self.smallest_gap = np.inf  # between the worst token ever kept and the best one dropped beside it

    def read(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Take new tokens ``(H, L, D)``; the attention output ``(H_q, L, D_v)``."""
        self.pools = self.pools or [[] for _ in keys]
        outs = []
        for t in range(keys.shape[1]):
            if len(self.ring) == self.window + self.block:
                self.move_oldest()
            (self.sinks if self.past.now < self.past.n_sink else self.ring).append(self.past.now)
            self.past.queries.append(queries[:, t])
            self.past.keys.append(keys[:, t])
            self.past.values.append(values[:, t])
            outs.append(self.attend())
        return np.stack(outs, axis=1)

    def held(self, head: int) -> list[int]:
        return self.sinks + self.pools[head] + self.ring

    def attend(self) -> np.ndarray:
        """Plain softmax attention of the newest token over what each head holds ``(H_q, D_v)``."""
        past, out, given = self.past, [], {}
        for head in range(len(self.pools)):
            held = self.held(head)
            for query_head in past.group(head):
                weights = softmax(past.logits(past.now - 1, query_head, head, held))
                out.append(weights @ past.value_rows(head, held))
                given |= {(query_head, p): w for p, w in zip(held, weights, strict=True)}
        past.given.append(given)
        return np.array(out)

    def move_oldest(self) -> None:
        """The oldest tokens of the ring leave it; each head's pool keeps the best."""
        leaving, room = self.ring[: self.block], self.slots - self.window - self.block - self.past.n_sink
        for head, pool in enumerate(self.pools):
            candidates = pool + leaving
            if len(candidates) > room:
                candidates = self.best(head, candidates, room)
            self.pools[head] = sorted(candidates)
        self.ring = self.ring[self.block :]

    def best(self, head: int, candidates: list[int], room: int) -> list[int]:
        held = self.held(head)
        scores = dict(zip(held, self.score(self.past, head, held), strict=True))
        rank = lambda p: (scores[p], p)
        ranked = sorted(candidates, key=rank, reverse=True)
        self.smallest_gap = min(self.smallest_gap, abs(scores[ranked[room - 1]] - scores[ranked[room]]))
        return ranked[:room]


class ReferenceLayer:
    """A batch of ``Sequence``; arguments as there."""

    def __init__(self, score: Score, **settings: Any):
        self.make = lambda: Sequence(score, **settings)
        self.rows: list[Sequence] = []

    def read(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Take new tokens ``(B, H, L, D)``; the attention output ``(B, H_q, L, D_v)``."""
        arrays = [np.asarray(x, np.float64) for x in (queries, keys, values)]
        self.rows = self.rows or [self.make() for _ in arrays[0]]
        return np.stack([row.read(*x) for row, *x in zip(self.rows, *arrays, strict=True)])

    def kept(self) -> np.ndarray:
        """Positions held, in text order ``(B, H_kv, S)``."""
        return np.array([[row.held(head) for head in range(len(row.pools))] for row in self.rows])

    @property
    def smallest_gap(self) -> float:
        return min(row.smallest_gap for row in self.rows)


# -- small things ----------------------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def pooled(x: np.ndarray, width: int, reduce: Callable, beyond: float) -> np.ndarray:
    """``reduce`` over ``width`` neighbours of each entry; ``beyond`` stands past both ends."""
    half = width // 2
    padded = np.concatenate([np.full(half, beyond), x, np.full(half, beyond)])
    return np.array([reduce(padded[i : i + width]) for i in range(len(x))])


def rotation(position: int, width: int, base: float = 10000.0) -> np.ndarray:
    """The matrix that RoPE (Su et al. 2021; halves, not pairs) applies to a column at a position."""
    half = width // 2
    angles = position * base ** (-np.arange(half) / half)
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[cos, -sin], [sin, cos]])


# -- the policies ----------------------------------------------------------------------------------------------------


def window(past: Past, head: int, held: list[int]) -> np.ndarray:
    """StreamingLLM (arXiv 2309.17453): the newest tokens."""
    return np.array(held, float)


def random(past: Past, head: int, held: list[int], seed: int, layer: int) -> np.ndarray:
    """24 bits of MurmurHash3's 32-bit finalizer over (seed, layer, head, position)."""
    salt = seed * 0x9E3779B9 + layer * 0x85EBCA6B + head * 0x165667B1
    return np.array([fmix32((p * 0x27D4EB2F + salt) % 2**32) >> 8 for p in held]) / 2**24


def fmix32(x: int) -> int:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


def knorm(past: Past, head: int, held: list[int]) -> np.ndarray:
    """kvpress, KnormPress (arXiv 2406.11430): minus the norm of the key.

    To half precision: rotation keeps norms, so that repeats of a token are to tie, and the newer one to win.
    """
    return -np.linalg.norm(past.key_rows(head, held), axis=-1).astype(np.float16)


def keydiff(past: Past, head: int, held: list[int]) -> np.ndarray:
    """kvpress, KeyDiffPress (arXiv 2504.15364): minus the cosine between a key and the mean of all unit keys."""
    keys = unit(past.key_rows(head, held))
    return -keys @ unit(keys.mean(axis=0))


def tova(past: Past, head: int, held: list[int]) -> np.ndarray:
    """kvpress, TOVAPress (arXiv 2401.06104): attention of the last query, mean over all heads of the layer."""
    heads = range(len(past.queries[0]))
    return np.array([np.mean([past.given[-1][h, p] for h in heads]) for p in held])


def h2o(past: Past, head: int, held: list[int]) -> np.ndarray:
    """FMInference/H2O (arXiv 2306.14048): all attention ever received, here from the query heads of the KV head."""
    return np.array([sum(given.get((h, p), 0.0) for given in past.given for h in past.group(head)) for p in held])


def snapkv(past: Past, head: int, held: list[int], last: int, kernel: int, pooling: str = "mean") -> np.ndarray:
    """kvpress, SnapKVPress, and FasterDecoding/SnapKV (arXiv 2404.14469).

    The last queries' mean attention to the tokens before them, pooled over neighbours, mean over the group. The
    observation window itself is not pooled: zeros stand there, and it is never evicted.
    """
    reduce, beyond = (np.max, -np.inf) if pooling == "max" else (np.mean, 0.0)
    observed = range(past.now - last, past.now)
    n_old = sum(p < observed.start for p in held)
    total = np.zeros(n_old)
    for query_head in past.group(head):
        weights = np.mean([softmax(past.logits(t, query_head, head, held)) for t in observed], axis=0)
        total += pooled(weights[:n_old], kernel, reduce, beyond)
    return np.concatenate([total / len(past.group(head)), np.full(len(held) - n_old, np.inf)])


def expected_attention(past: Past, head: int, held: list[int], future: int) -> np.ndarray:
    """kvpress, ExpectedAttentionPress (Devoto et al. 2025), with covariance and norms of values.

    Mean and covariance of the un-rotated queries without the sinks', turned by the mean rotation of the next ``future``
    positions; softmax over everything but the sinks.
    """
    width, old = past.queries[0].shape[-1], [p for p in held if p >= past.n_sink]
    turn = np.mean([rotation(past.now + i, width) for i in range(future)], axis=0)
    keys = past.key_rows(head, old)
    rows = []
    for query_head in past.group(head):
        plain = [rotation(-t, width) @ past.queries[t][query_head] for t in range(past.n_sink, past.now)]
        mean, spread = turn @ np.mean(plain, axis=0), turn @ np.cov(np.array(plain).T, bias=True) @ turn.T
        second = np.einsum("si,ij,sj->s", keys, spread, keys)
        rows.append(softmax(past.scale * keys @ mean + past.scale**2 / 2 * second))
    scores = np.mean(rows, axis=0) * np.linalg.norm(past.value_rows(head, old), axis=-1)
    return np.concatenate([np.full(len(held) - len(old), np.inf), scores])


def rkv(past: Past, head: int, held: list[int], last: int, kernel: int, mix: float, threshold: float) -> np.ndarray:
    """Zefan-Cai/R-KV (arXiv 2505.24133): importance minus redundancy.

    Importance: the largest logits of the group, softmax over the tokens before the last ``last`` ones, mean over their
    queries, max-pooled. Redundancy: see ``redundancy``. The observation window is never evicted.
    """
    observed = range(past.now - last, past.now)
    old = [p for p in held if p < observed.start]
    logits = [np.max([past.logits(t, h, head, old) for h in past.group(head)], axis=0) for t in observed]
    importance = pooled(np.mean([softmax(x) for x in logits], axis=0), kernel, np.max, -np.inf)
    repeated = redundancy(past.key_rows(head, held), threshold)[: len(old)]
    scores = mix * importance - (1 - mix) * repeated
    return np.concatenate([scores, np.full(len(held) - len(old), np.inf)])


def redundancy(keys: np.ndarray, threshold: float) -> np.ndarray:
    """Softmax of the mean cosine between a key and the others; the latest near-duplicate of each key is let off."""
    cosines = unit(keys) @ unit(keys).T
    np.fill_diagonal(cosines, 0.0)
    for row in cosines:
        near = np.flatnonzero(row > threshold)
        if len(near):
            row[near[-1]] = 0.0
    return softmax(cosines.mean(axis=0))


def surprise(past: Past, head: int, held: list[int], surprisal: list[float], momentum: float, forget: float):
    """Titans' momentary and past surprise with forgetting (arXiv 2501.00663), surprisal in the gradient's place."""
    carried = [0.0]
    for x in surprisal[: past.now]:
        carried.append(momentum * carried[-1] + x)
    return np.array([carried[p + 1] * (1 - forget) ** (past.now - p) for p in held])


def probe(
    past: Past, head: int, held: list[int], pasts: Callable, question: Callable, window: int, span: int, share: str
) -> np.ndarray:
    """What the question attends to, the largest of ``span`` neighbours: this project's own definition.

    Args:
        pasts: gives the ``Past`` of every layer.
        question: gives queries and keys ``(H, L, D)`` of the question in a layer when it is read at a position.
        share: ``model``: the largest share over all layers and heads, ``head``: the head's own.
    """
    layers = list(enumerate(pasts()))
    everyone = [(i, other, h) for i, other in layers for h in range(len(past.keys[0]))]
    mine = [(i, other, head) for i, other in layers if other is past]
    evictable = [past.n_sink <= p < past.now - window for p in held]
    shares = []
    for i, other, h in everyone if share == "model" else mine:
        heard = np.where(evictable, heard_by(other, h, held, *question(i, past.now)), 0.0)
        shares.append(heard / heard.sum())
    return pooled(np.max(shares, axis=0), span, np.max, -np.inf)


def heard_by(past: Past, head: int, held: list[int], queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The largest weight that one of the question's tokens gives to each held token, mean over the group ``(S,)``."""
    rows = []
    for query_head in past.group(head):
        seen = [np.concatenate([past.key_rows(head, held), keys[head][: i + 1]]) for i in range(len(keys[head]))]
        weights = [softmax(past.scale * x @ query) for x, query in zip(seen, queries[query_head], strict=True)]
        rows.append(np.max([w[: len(held)] for w in weights], axis=0))
    return np.mean(rows, axis=0)


# -- how the package's caches are read -------------------------------------------------------------------------------


def kept_positions(cache: Any) -> np.ndarray:
    """Positions that a ``PrunedKVCache`` holds, in text order ``(B, H_kv, S)``; negative ones are empty slots."""
    return np.sort(np.array(cache.held.positions()), axis=2)
