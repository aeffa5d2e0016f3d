"""A model's own forward pass, in the steps that its bounded caches need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_kvprune.allocators import floor_pages, share_pages
from mlx_kvprune.cache import PrunedKVCache, question_of
from mlx_kvprune.scorers import Surprise
from mlx_kvprune.settings import PAGE
from mlx_kvprune.vlm import joined, logits_of

Call = Callable[..., Any]
EMBEDDINGS = ("input_embeddings", "inputs_embeds")  # as mlx-lm and mlx-vlm call them


def leaves(caches: Any) -> Iterator[Any]:
    """The single caches of a (nested) list of caches; of a batch, those of its rows."""
    for cache in caches or ():
        yield from leaves(cache.caches) if hasattr(cache, "caches") else (cache,)


def pruned(caches: Any) -> list[PrunedKVCache]:
    """The bounded ones among ``caches``."""
    return [c for c in leaves(caches) if isinstance(c, PrunedKVCache)]


def pending(caches: Any) -> list[Any]:
    """What there is to evaluate of a (nested) list of caches, so that they can go on in another thread, too."""
    return [c.pending if isinstance(c, PrunedKVCache) else c.state for c in leaves(caches)]


def forward(call: Call, inputs: mx.array, caches: Any, **kwargs: Any) -> Any:
    """``call(inputs, cache=caches)`` so that slots change hands where they should.

    Most policies need nothing: their layers work block by block inside the attention. Policies that need the logits or
    a question, and models that do their own attention, are called in steps that end where slots change hands.

    Args:
        call: the model's own forward pass.
        inputs: token ids ``(B, L)``.
        caches: the model's list of caches.

    Returns:
        Logits ``(B, L, vocab)``, in whatever the model returns them.
    """
    bounded = pruned(caches)
    if not bounded or bounded[0].probing:
        return call(inputs, cache=caches, **kwargs)
    check_whole(bounded)
    before = _progress(caches)
    try:
        if any(c.in_steps for c in bounded):
            return _in_steps(call, inputs, caches, bounded, kwargs)
        moved = settle(bounded)
        output = call(inputs, cache=caches, **kwargs)
        if moved or _length(inputs, kwargs) > 1:  # else what attention does not need waits until slots are chosen again
            with contextlib.suppress(ValueError):  # under a transformation, which evaluates nothing
                mx.async_eval(pending(bounded))
        return output
    except BaseException:
        if _progress(caches) != before:
            for cache in bounded:
                cache.broken = True
        raise
    finally:
        for cache in bounded:
            cache.fetched = cache.staged = None  # layers that share an earlier one's keys stage in vain
        _note_peak(bounded)


def check_whole(bounded: list[PrunedKVCache]) -> None:
    """See that no forward pass over these caches was broken off: layers may then hold different numbers of tokens.

    Raises:
        ValueError: one was.
    """
    if any(c.broken for c in bounded):
        read = sorted(c.held.written for c in bounded)
        raise ValueError(
            f"[cache] a forward pass was broken off, and layers may hold different tokens; got {read[0]} to {read[-1]} of "
            "them; try a fresh cache, or one that was forked before"
        )


def _progress(caches: Any) -> list[Any]:
    """What changes in every single cache when a token comes: of recurrent states, which arrays they are."""
    bounded = lambda c: (c.tokens_seen, c.held.written)
    other = lambda c: (
        c.offset if isinstance(getattr(c, "offset", None), int) else [id(x) for x in getattr(c, "cache", None) or ()]
    )
    return [bounded(c) if isinstance(c, PrunedKVCache) else other(c) for c in leaves(caches)]


def _note_peak(bounded: list[PrunedKVCache]) -> None:
    """Where all layers compete each has its peak at a time of its own, so that their sum is noted after every step."""
    if bounded[0].settings.allocator == "global":
        first = bounded[0]
        first.nbytes_peak_all = max(first.nbytes_peak_all, sum(c.nbytes for c in bounded))


def settle(bounded: list[PrunedKVCache]) -> bool:
    """Before slots are overwritten, choose them and finish what is under way: the writes then happen in place.

    Of a batch, only rows whose ring is full take part. Returns whether slots change hands with the next token.

    The one host synchronisation per ``block`` tokens; a second one where heads may hold differently many slots, for then
    it is decided on the host which of them gets a page.
    """
    due = [c for c in bounded if c.held.full()]
    if not due:
        return False
    for cache in due:
        if cache.planned is None and cache.held.evicts_next():
            cache.planned = cache.contest()
    planned = [c for c in due if c.planned is not None]
    mx.eval([_contest_arrays(c) for c in planned], [c.arrays for c in due])
    open_ones = [c for c in planned if c.planned is not None and c.planned.candidates is not None]
    for cache, pages in zip(open_ones, _shares(open_ones), strict=True):
        assert cache.planned is not None
        cache.planned = cache.held.decide(cache.planned, pages)
    mx.eval([_contest_arrays(c) for c in open_ones])
    return True


def _contest_arrays(cache: PrunedKVCache) -> list[mx.array]:
    assert cache.planned is not None
    return cache.planned.arrays()


def _shares(caches: list[PrunedKVCache]) -> list[Any]:
    """Pages of each head, for every cache whose heads compete: within the layer, or all with all."""
    if not caches or caches[0].settings.allocator != "global":
        return [c.share(c.planned) for c in caches if c.planned is not None]
    rows = [_share_all(caches, row) for row in range(caches[0].ragged_pool.batch)]
    return [np.concatenate(layer) for layer in zip(*rows, strict=True)]


def _share_all(caches: list[PrunedKVCache], row: int) -> list[Any]:
    """Pages of each head of one sequence of a batch, layer by layer, where all of its heads compete."""
    heads = [c.ragged_pool.kv_heads for c in caches]
    ranked = [
        keys
        for c, n in zip(caches, heads, strict=True)
        if c.planned and c.planned.candidates
        for keys in c.planned.candidates.ranked[row * n :][:n]
    ]
    pages = pages_of_all(caches)
    floor = floor_pages(pages, len(ranked), caches[0].settings, caches[0].protected)
    shares = share_pages(ranked, pages, floor, caches[0].ragged_pool.units, caches[0].most_pages)
    return np.split(shares, np.cumsum(heads)[:-1])


def pages_of_all(caches: Iterable[PrunedKVCache]) -> int:
    """Pages for which all layers compete: the slots of all of them, cut into pages once and not in every layer."""
    return sum(c.pool_slots for c in caches) // PAGE


def leading(bounded: list[PrunedKVCache]) -> PrunedKVCache:
    """The first layer whose tokens compete for slots: local ones do not wait for anybody."""
    return next((c for c in bounded if not c.local), bounded[0])


def _in_steps(call: Call, inputs: mx.array, caches: Any, bounded: list[PrunedKVCache], kwargs: dict) -> Any:
    out, start, total = [], 0, _length(inputs, kwargs)
    lead = leading(bounded)
    if total != inputs.shape[1] and isinstance(lead.scorer, Surprise):
        raise ValueError(f"[policy] surprise reads tokens by their ids; got embeddings of {total} without; try snapkv")
    while start < total:
        asked = bool(lead.settings.question) and any(c.held.evicts_next() for c in bounded if not c.local or c is lead)
        if asked:
            probe(call, caches, bounded)
        moved = settle(bounded)
        for cache in bounded if asked else ():
            cache.forget_heard()
        span = slice(start, min(total, start + lead.step_room()))
        output = call(inputs[:, span], cache=caches, **_cut(kwargs, span, total))
        if isinstance(bounded[0].scorer, Surprise):
            note_surprise(bounded, inputs[:, span], logits_of(output))
        waits = moved or lead.dense or isinstance(lead.scorer, Surprise)  # which would hold the logits meanwhile
        if total > 1:
            mx.eval(pending(caches))
        elif waits:
            mx.async_eval(pending(bounded))
        _note_peak(bounded)
        out.append(output)
        start = span.stop
    return joined(out)


def _length(inputs: mx.array, kwargs: dict) -> int:
    """Tokens of a call, which may bring their embeddings ``(B, L, width)`` alone."""
    given = (kwargs[name] for name in EMBEDDINGS if kwargs.get(name) is not None)
    return inputs.shape[1] or next((x.shape[1] for x in given), 0)


def _cut(kwargs: dict, span: slice, total: int) -> dict:
    """What belongs to a span of ``total`` tokens: arrays ``(B, total, ...)`` are cut, others are left as they are."""
    by_token = lambda x: isinstance(x, mx.array) and x.ndim > 1 and x.shape[1] == total
    return {name: x[:, span] if by_token(x) else x for name, x in kwargs.items()}


def note_surprise(bounded: list[PrunedKVCache], tokens: mx.array, logits: mx.array) -> None:
    """Write the surprise of ``tokens`` ``(B, L)`` into every layer's memory; keep what the next token needs.

    The surprisal of a token is read off the logits of the token before it: the last row of the last call's logits is
    kept (once, in the first layer's cache).
    """
    first = bounded[0]
    assert isinstance(first.scorer, Surprise)
    batch, n = tokens.shape
    before = first.signals.get("logits")
    previous = logits[:, :1] if before is None else before[:, None]
    earlier = mx.concatenate([previous, logits[:, :-1]], axis=1).astype(mx.float32)
    picked = mx.take_along_axis(earlier, tokens[..., None].astype(mx.int32), axis=-1)[..., 0]
    surprisal = mx.logsumexp(earlier, axis=-1) - picked
    if before is None:  # nothing foretold the first token of the text
        surprisal = mx.where(mx.arange(n) > 0, surprisal, 0.0)
    carried = first.scorer.carried(surprisal, first.signals.get("past", mx.zeros((batch,))))
    first.signals = {"logits": mx.contiguous(logits[:, -1]), "past": carried[:, -1]}
    for cache in bounded:
        cache.held.remember_newest(carried)


def listen(model: Call, caches: Any) -> None:
    """Let the question, if there is one, be heard of everything that an attached model's caches hold, the window, too."""
    bounded = pruned(caches)
    if bounded and bounded[0].settings.question:
        probe(model, caches, bounded, newest_too=True)


def probe(call: Call, caches: Any, bounded: list[PrunedKVCache], newest_too: bool = False) -> None:
    """Run the question's tokens as temporary queries over what is held; only the memory of the slots changes.

    Args:
        newest_too: whether what it hears of the window's tokens counts, though they cannot be evicted.
    """
    question = mx.array(bounded[0].settings.question)[None]
    batch = bounded[0].held.ring.keys.shape[0]
    others = [c for c in leaves(caches) if not isinstance(c, PrunedKVCache)]
    before = [_copied(c.state) for c in others]
    _set_probing(bounded, True)
    try:
        call(mx.broadcast_to(question, (batch, question.shape[1])), cache=caches)
        positions, evictable = [c.held.positions() for c in bounded], [c.evictable(newest_too) for c in bounded]
        now = bounded[0].held.written
        memories = question_of(bounded[0].scorer).combined(
            [c.heard for c in bounded if c.heard is not None], positions, evictable, now
        )
        for cache, memory in zip(bounded, memories, strict=True):
            cache.hear(memory)
        mx.eval([c.arrays for c in bounded])
    finally:
        _set_probing(bounded, False)
        for cache, state in zip(others, before, strict=True):
            if state:
                cache.state = state


def _set_probing(bounded: Iterable[PrunedKVCache], on: bool) -> None:
    for cache in bounded:
        cache.probing, cache.heard, cache.fetched = on, None, None  # a handle that stays would hold its cache


def _copied(state: Any) -> Any:
    """A state whose arrays are objects of their own: caches write into theirs."""
    return tree_map(lambda x: mx.array(x) if isinstance(x, mx.array) else x, state)
