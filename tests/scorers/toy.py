"""A toy language model whose numbers are all known: bigram logits, layers with tables of queries, keys and values."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import reference

VOCAB, WIDTH, SCALE = 50, 16, 0.5
LAYERS, KV_HEADS, HEADS = 2, 2, 4


class Toy:
    """Called as a model of mlx-lm; its layers only fill their caches, so that the logits do not depend on them.

    Attributes:
        bigrams: logits of the token after each token ``(VOCAB, VOCAB)``.
        tables: per layer the queries, keys and values of each token ``(VOCAB, H, WIDTH)``.
        outs: per layer the attention outputs, one per call.
    """

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.bigrams = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32) * 2
        draw = lambda n: rng.normal(size=(VOCAB, n, WIDTH)).astype(np.float32)
        self.tables = [[draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)] for _ in range(LAYERS)]
        self.outs: list[list[mx.array]] = [[] for _ in range(LAYERS)]

    def rows(self, layer: int, tokens: np.ndarray, start: int) -> list[np.ndarray]:
        """Queries, keys and values ``(B, H, L, WIDTH)`` of tokens ``(B, L)``; the first two rotated."""
        queries, keys, values = (table[tokens].swapaxes(1, 2) for table in self.tables[layer])
        turns = np.stack([reference.rotation(start + i, WIDTH) for i in range(tokens.shape[1])])
        turned = [np.einsum("lij,bhlj->bhli", turns, x).astype(np.float32) for x in (queries, keys)]
        return [*turned, values]

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        for i, layer in enumerate(cache):
            queries, keys, values = map(mx.array, self.rows(i, np.array(tokens), layer.offset))
            handle, values = layer.update_and_fetch(keys, values)
            out = layer.attend(queries, handle, SCALE, "causal" if tokens.shape[1] > 1 else None)
            if not layer.probing:
                self.outs[i].append(out)
        return mx.array(self.bigrams)[tokens]

    def outputs(self, layer: int) -> np.ndarray:
        """The attention outputs of a layer since the last time ``(B, H, L, WIDTH)``."""
        parts, self.outs[layer] = self.outs[layer], []
        return np.array(mx.concatenate(parts, axis=2))

    def surprisal(self, tokens: np.ndarray) -> np.ndarray:
        """``-log p`` of each token ``(L,)`` after the one before it; zero for the first."""
        rows = self.bigrams.astype(np.float64)
        logs = [np.log(reference.softmax(rows[a])[b]) for a, b in pairwise(tokens)]
        return np.array([0.0, *(-x for x in logs)])
