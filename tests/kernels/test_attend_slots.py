"""``attend_slots`` on the emulator of Metal, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from attend_cases import Case, exact, online, plain_operations, recorded, run
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_emulator import unavailable

from mlx_kvprune.attend import View, attend, attend_ops
from mlx_kvprune.kernels import attend_slots as module
from mlx_kvprune.slots import Sight

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")
ROUNDING = {mx.float32: 2.0**-22, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def check(case: Case, weights: bool = False, **emulator):
    with recorded(**emulator) as recorder:
        out, found = run(case, weights)
        out = np.array(out.astype(mx.float32)).astype(np.float64)
    wanted, shares = exact(case)
    assert np.isfinite(out).all()
    rounding = ROUNDING[case.dtype] * max(1.0, np.abs(wanted).max())
    if case.dtype == mx.float32:
        rounding = max(rounding, np.abs(online(case) - wanted).max())
    allowed = 2 if case.bits == (None, None) else 4  # rows that were unpacked for ``exact`` were rounded once, too
    assert np.abs(out - wanted).max() <= allowed * rounding, (np.abs(out - wanted).max(), rounding)
    if case.dtype == mx.float32:
        assert np.abs(np.array(plain_operations(case)) - wanted).max() <= 8 * rounding, "the reference"
    if weights:
        assert found is not None
        for ours, theirs in zip(found, shares, strict=True):
            summed = theirs.sum(axis=2)
            assert np.abs(np.array(ours).sum(axis=2) - summed).max(initial=0) <= 1e-5
    return recorder


@pytest.mark.parametrize("slots", [0, 1, 31, 32, 33, 511, 2049, 9000])
def test_lengths(slots):
    check(Case(slots=slots), weights=True)


@pytest.mark.parametrize("slots", [(0, 0), (1, 0), (0, 33), (5, 511), (2049, 32)])
@pytest.mark.parametrize("bits", [(None, None), (4, 4)])
def test_ragged_heads(slots, bits):
    check(Case(slots=slots, bits=bits, gqa=2), weights=True)


@pytest.mark.parametrize("width", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("bits", [(None, None), (4, 3)])
def test_head_dims(width, bits):
    check(Case(width=width, bits=bits))


def test_values_of_another_width():
    check(Case(width=96, value_width=64, bits=(8, 5)), weights=True)


@pytest.mark.parametrize("gqa", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("n_new", [1, 3, 8])
def test_query_heads_and_new_tokens(gqa, n_new):
    check(Case(gqa=gqa, n_new=n_new, slots=40))


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("scheme", ["token", "channel", "page"])
def test_precisions(bits, scheme):
    check(Case(slots=96, bits=(bits, bits), scheme=scheme))
    check(Case(slots=(70, 20), bits=(bits, None), scheme=scheme, hadamard=False), weights=True)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [(None, None), (8, 4)])
def test_half_types(dtype, bits):
    check(Case(slots=300, dtype=dtype, bits=bits))


@pytest.mark.parametrize(
    "case",
    [
        Case(holes=0.3, slots=100),
        Case(holes=0.99, slots=40, bits=(4, 4)),
        Case(batch=2, slots=50, n_new=2),
        Case(batch=2, slots=(10, 0, 40, 70), bits=(3, 4), scheme="channel"),
        Case(turned=True),
        Case(turned=True, bits=(4, 4), scheme="channel", width=80),
        Case(turned=True, bits=(2, 2), slots=(30, 65)),
        Case(gated=True, slots=(30, 65), n_new=2),
        Case(gated=True, softcap=5.0, sinks=True),
        Case(window=20, n_new=2),  # an edge in the ring: a token as old as the window is not seen
        Case(window=100, n_new=3, sinks=True),
        Case(sinks=True, slots=0, ring=1),
    ],
    ids=str,
)
def test_all_that_acts_on_logits(case):
    check(case, weights=case.n_new == 1)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
def test_order_of_threads_does_not_matter(schedule):
    check(Case(slots=(90, 300), bits=(4, 4), gqa=4), weights=True, schedule=schedule)


SMALL = [
    Case(slots=0, ring=1),
    Case(slots=33, ring=31),
    Case(slots=(0, 33), bits=(4, 4)),
    Case(slots=(33, 1), bits=(3, 5), scheme="channel", n_new=2),
    Case(slots=64, bits=(2, 6), scheme="page", width=80),
    Case(slots=(20, 40), turned=True, bits=(8, 2), width=96),
    Case(slots=40, gated=True, window=200, softcap=4.0, sinks=True, holes=0.3),
    Case(slots=20, gqa=16, n_new=8, width=128, dtype=mx.float16),
    Case(slots=20, dtype=mx.bfloat16, batch=2),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_access_is_in_order(case):
    """Check mode raises for what Metal leaves undefined, and for outputs that were not written."""
    check(case, weights=case.n_new == 1, mode="check")


@pytest.mark.parametrize("bits", [None, 8, 6, 5, 4, 3, 2])
def test_each_byte_is_read_once_for_all_query_heads(bits):
    """At most 3% are read beyond the rows, scales and tables of the slots held; queries and all else counted."""
    case = Case(bits=(bits, bits), slots=(9000,), heads=1, ring=32, gqa=4, dtype=mx.bfloat16)
    recorder = check(case, mode="check")
    buffers, pool = recorder.reports["attend_slots"][0].buffers, case.parts()[0]
    held = sum(x.nbytes for rows in (pool.keys, pool.values) for x in rows.parts) * 9000 // (282 * 32)
    held += pool.layout.table.nbytes + 9000  # the mask is a byte per slot
    read = sum(traffic.read_simd_bytes for name, traffic in buffers.items() if not name.endswith("_strides"))
    assert held * 0.99 <= read <= 1.03 * held, (read, held)


@settings(deadline=None, max_examples=25)
@given(
    slots=st.lists(st.integers(0, 100), min_size=2, max_size=2).map(tuple),
    ring=st.integers(1, 70),
    bits=st.tuples(st.sampled_from([None, 4, 3]), st.sampled_from([None, 4])),
    scheme=st.sampled_from(["token", "channel"]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_view(slots, ring, bits, scheme, sinks, seed):
    check(Case(slots=slots, ring=ring, bits=bits, scheme=scheme, sinks=sinks, seed=seed), weights=True)


SIGHTS = [
    Case(gated=True, n_new=3),
    Case(gated=True, slots=(30, 65), window=20, n_new=2),
    Case(window=20, softcap=5.0, slots=(40, 64), bits=(4, 4), scheme="channel"),
]


@pytest.mark.parametrize("case", SIGHTS, ids=str)
def test_attend_gives_the_same_by_kernel_and_by_plain_operations(case):
    """Also with gates and windows, whose positions come with the sight."""
    view, wanted = View(case.parts()), exact(case)[0]
    plain = attend_ops(case.queries(), view, case.scale, sight=case.sight).out
    with recorded() as recorder:
        out = np.array(attend(case.queries(), view, scale=case.scale, sight=case.sight).out)
    assert recorder.reports["attend_slots"]
    assert np.abs(np.array(plain) - wanted).max() <= 5e-6 and np.abs(out - wanted).max() <= 5e-6


def test_a_window_over_slots_without_positions_is_not_passed_over():
    case = Case()
    with pytest.raises(AssertionError, match="need the positions of slots"), recorded():
        module.attend_slots(case.queries(), case.parts(), 1.0, sight=Sight(newest=9, window=3))


def test_reasons():
    case = Case()
    queries, parts = case.queries(), case.parts()
    assert module.why_not(queries, parts) == ""
    assert "more than 8 new tokens" in module.why_not(mx.zeros((1, 6, 9, 64)), parts)
    assert "float32 for queries of type" in module.why_not(queries.astype(mx.float16), parts)
    assert "weights of more than one" in module.why_not(mx.zeros((1, 6, 2, 64)), parts, weights=True)
    assert "not a multiple of 8" in module.why_not(mx.zeros((1, 6, 1, 20)), Case(width=20).parts())
    paged = Case(turned=True, bits=(4, 4), scheme="page", slots=64)
    assert "scheme 'page'" in module.why_not(paged.queries(), paged.parts())
    with pytest.raises(ValueError, match=r"\[kernels\] attend_slots cannot run: no GPU"):
        module.attend_slots(queries, parts, 1.0, force=True)
