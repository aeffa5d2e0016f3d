"""Retention gates beside a known question: by definition, and what is left of it at both ends of ``share``."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from gate_helpers import caches_for, kept, read, text
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import mlx_kvprune as kvp
from mlx_kvprune.attach import settings_from
from mlx_kvprune.documents import prompt_for, settings_for
from mlx_kvprune.scorers import Held, RetentionProbe
from mlx_kvprune.scorers.base import HEARD

QUESTION = (7, 3, 944, 3, 21)
LENGTH = 430
TURNS = [(0, 47), (47, 48), (48, 200), (200, 380), (380, 430)]


def what_is_kept(model, policy: str, allocator: str, **more) -> list:
    """Everything that is held after each of the calls that a text is read in."""
    caches, found = caches_for(model, policy, 180, allocator=allocator, **more), []
    for start, stop in TURNS:
        read(model, caches, text(LENGTH)[:, start:stop])
        found.append(kept(caches))
    assert not any(HEARD in c.signals for c in caches), "what a question heard is for one choice"
    return found


@pytest.mark.parametrize("allocator", ["uniform", "head_adaptive", "global"])
def test_without_a_share_the_gates_decide_alone(model, allocator):
    asked = what_is_kept(model, "retention_probe", allocator, question=QUESTION, share=0)
    assert asked == what_is_kept(model, "retention", allocator)


def test_with_all_of_them_the_question_does(model):
    asked = what_is_kept(model, "retention_probe", "uniform", question=QUESTION, share=1.0, span=5)
    assert asked == what_is_kept(model, "probe", "uniform", question=QUESTION, span=5)
    half = what_is_kept(model, "retention_probe", "uniform", question=QUESTION, span=5)
    assert half[-1] not in (asked[-1], what_is_kept(model, "retention", "uniform")[-1])


@pytest.mark.parametrize("more", [{}, {"kv_bits": 4, "kv_group_size": 32}, {"positions": "cache"}], ids=str)
@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_saved_forked_and_read_on(model, allocator, more, tmp_path):
    caches = caches_for(model, "retention_probe", 180, allocator=allocator, question=QUESTION, **more)
    read(model, caches, text(LENGTH)[:, :300])
    kvp.save_cache(str(tmp_path / "c"), caches)
    twins = kvp.load_cache(str(tmp_path / "c"), model)
    rest = text(LENGTH)[:, 300:]
    np.testing.assert_array_equal(read(model, twins, rest), read(model, caches, rest))
    assert all(c.held.held() <= 2 * 180 for c in caches) or allocator == "global"
    assert sum(c.held.held() for c in caches) <= 2 * 2 * 180


def drawn(seed: int, batch: int, slots: int) -> tuple[Held, mx.array]:
    """Held slots of which some are empty, differently many in each head, and what a question heard of them."""
    rng = np.random.default_rng(seed)
    shape = (batch, 3, slots)
    positions = np.stack([rng.permutation(200)[:slots] for _ in range(batch * 3)]).reshape(shape).astype(np.int32)
    positions[rng.random(shape) < 0.2] = -1
    none = mx.zeros((*shape, 1))
    memory = mx.array(-rng.exponential(size=shape).astype(np.float32))
    heard = mx.array((rng.random(shape) * (rng.random(shape) < 0.7)).astype(np.float32))
    return Held(none, none, mx.array(positions), memory, 200, 0, 1.0), heard


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 9999),
    st.integers(1, 2),
    st.integers(1, 40),
    st.sampled_from([0.1, 0.5, 0.77, 1.0]),
    st.sampled_from([1, 3, 9]),
)
def test_the_score_by_definition(seed, batch, slots, share, span):
    """The best ``share`` of the live slots by the pooled probe come first, in its order; the rest by decay."""
    held, heard = drawn(seed, batch, slots)
    found = np.array(RetentionProbe(share, span).score(held, {HEARD: heard}))
    rows = zip(*(np.array(x).reshape(-1, slots) for x in (held.positions, held.memory, heard)), strict=True)
    for (at, memory, said), got in zip(rows, found.reshape(-1, slots), strict=True):
        order = np.argsort(at, kind="stable")
        said = np.where(at >= 0, said, 0.0)
        pooled = np.zeros(slots)
        for i, slot in enumerate(order):
            pooled[slot] = said[order[max(0, i - span // 2) : i + span // 2 + 1]].max()
        live = np.flatnonzero((at >= 0) & (pooled > 0))
        room = int(np.ceil(share * (at >= 0).sum()))
        first = sorted(live, key=lambda slot: -pooled[slot])[:room]
        least = pooled[first[-1]] if first else np.inf
        for slot in np.flatnonzero(at >= 0):
            if pooled[slot] > least:
                assert got[slot] == pytest.approx(1.0 + pooled[slot], rel=1e-6)
            elif pooled[slot] < least:
                assert got[slot] == pytest.approx((201 - at[slot]) * memory[slot], rel=1e-5)


def test_a_question_is_needed_and_documents_hand_it_on(model):
    with pytest.raises(ValueError, match="retention_probe needs a question"):
        caches_for(model, "retention_probe", 180)

    class Words:
        chat_template = None

        def encode(self, words, add_special_tokens=False):
            return [len(word) for word in words.split()]

    prompt = prompt_for(Words(), "A text.", "What is it?", pinned=True)
    chosen = settings_for(settings_from(policy="retention_probe", budget=999), prompt)
    assert chosen.question == tuple(prompt.after) and chosen.n_sink >= len(prompt.before)


@pytest.mark.parametrize(("name", "value"), [("share", 1.5), ("share", "half"), ("share", True), ("span", 4)])
def test_options_that_make_no_sense(model, name, value):
    with pytest.raises(ValueError, match=rf"\[policy-option\] {name} makes no sense"):
        caches_for(model, "retention_probe", 180, question=QUESTION, **{name: value})
