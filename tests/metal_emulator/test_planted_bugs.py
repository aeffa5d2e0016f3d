"""Bugs planted in a kernel that is right: the checker must name every one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import Emulator, MetalError, unavailable
from metal_emulator.attend_body import BODY, definition, problem

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
BEFORE_LOOP = "float l = 0;"
MISSING = "race: |uninitialised: "


@dataclass(frozen=True)
class Bug:
    """``old`` in the kernel becomes ``new``, its ``nth`` occurrence; the message must start with ``kind`` and say ``about``.

    Where threads run ahead of a barrier that is missing, what they read may have no value yet: that is MISSING too.
    """

    name: str
    old: str
    new: str
    kind: str
    about: str
    nth: int = 0

    def source(self) -> str:
        parts = BODY.split(self.old)
        assert len(parts) > self.nth + 1, self.old
        return self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])


def inserted(name: str, code: str, kind: str, about: str) -> Bug:
    return Bug(name, BEFORE_LOOP, f"{BEFORE_LOOP} {code}", kind, about)


FLOATS = "const device float* p = reinterpret_cast<const device float*>(k);"
BUGS = [
    Bug("one key too many", "t < n; t += BN", "t < n + 1; t += BN", "out of bounds: read", "'k' + "),
    Bug(
        "one element past a key",
        "static_cast<float>(kp[j])",
        "static_cast<float>(kp[j + 1])",
        "out of bounds: read",
        "'k'",
    ),
    Bug(
        "one element before the keys",
        "kv_head * n + sg) * D +",
        "kv_head * n + sg) * D - 1 +",
        "out of bounds",
        "'k' + -",
    ),
    Bug("output too far", "out[head * D + sg", "out[head * D + 2 + sg", "out of bounds: write", "'out' + "),
    Bug("past a threadgroup array", "[lane * BD + sg] = o", "[lane * BD + sg + 1] = o", "undefined: index", "outputs["),
    Bug("past a thread's array", "i < EPT; i++) { qr", "i <= EPT; i++) { qr", "undefined: index", "qr"),
    Bug("past a small constant input", "k_shape[1]", "k_shape[3]", "out of bounds: read", "'k_shape' + 12"),
    Bug("no barrier before the maxima", BARRIER, "", MISSING, "_scores'"),
    Bug("no barrier after the outputs", BARRIER, "", MISSING, "'outputs'", nth=1),
    Bug("no barrier at the loop's end", BARRIER, "", "race: ", "'outputs'", nth=2),
    Bug("a barrier for no memory", BARRIER, "threadgroup_barrier(mem_flags::mem_none);", MISSING, "_scores'"),
    Bug(
        "a barrier for device memory only", BARRIER, "threadgroup_barrier(mem_flags::mem_device);", MISSING, "_scores'"
    ),
    Bug("all lanes write one slot", "if (lane == 0) { max_scores", "{ max_scores", "race: write", "'max_scores'"),
    Bug(
        "two simdgroups write one output",
        "sg * EPT + i] = static",
        "(sg & ~1) * EPT + i] = static",
        "race: write",
        "'out'",
    ),
    Bug("two threadgroups write one output", "out[head * D", "out[(head & ~1) * D", "race: write", "'out'"),
    inserted(
        "lanes of a simdgroup in lockstep",
        f"outputs[sg * BD + lane] = 0; {BARRIER} outputs[sg * BD + lane] = lane; l = 0 * outputs[sg * BD + (lane ^ 1)];",
        "race: ",
        "'outputs'",
    ),
    Bug("barrier in a branch", "sum_scores[sg] = l; }", f"sum_scores[sg] = l; {BARRIER} }}", "divergence: ", "barrier"),
    Bug("barrier in a loop of uneven length", "kp += BN * D;", f"kp += BN * D; {BARRIER}", "divergence: ", "barrier"),
    inserted("early return before a barrier", "if (sg == 31) return;", "divergence: ", "finished"),
    Bug(
        "simd_sum in a branch", "s = simd_sum(s);", "if (lane < 16) s = simd_sum(s);", "divergence: ", "simd operation"
    ),
    inserted("simd operation after lanes returned", "if (lane == 3) return;", "divergence: ", "31 of 32 lanes"),
    inserted("shuffle from lane 40", "l = simd_shuffle(l, 40);", "undefined: simd shuffle", "lane 40"),
    Bug(
        "threadgroup slot never written",
        "(lane == 0) { max",
        "(lane == 0 && sg != 5) { max",
        "uninitialised: read",
        "'max_scores' + 20",
    ),
    inserted(
        "output read before it is written", "l = 0 * static_cast<float>(out[head * D]);", "uninitialised: read", "'out'"
    ),
    Bug(
        "output not wholly written",
        "i < EPT; i++) out[",
        "i < EPT - 1; i++) out[",
        "unwritten: ",
        "128 elements of 'out'",
    ),
    inserted(
        "float4 at an odd address",
        f"{FLOATS} l = 0 * reinterpret_cast<const device float4*>(p + 1)->x;",
        "misaligned",
        "float4",
    ),
    inserted("write to an input", "const_cast<device T*>(q)[0] = T(0.0f);", "read-only: write", "'q' + 0"),
    inserted("shift by the width", "l = 0 * float(1u << (n + 32 - 37));", "undefined: shift", "1u <<"),
    inserted("division by zero", "l = 0 * float(n / (n - 37));", "undefined: integer division", "(n - 37)"),
    inserted(
        "infinity as an integer", "l = 0 * float(int(exp(float(n) * 10.0f)));", "undefined: conversion", "int(exp"
    ),
    inserted("integer overflow", "l = 0 * float((n + 2147483640) / 7);", "undefined: signed addition", "2147483640"),
    inserted("float assigned to bfloat", "bfloat b = 1.0f; l = 0 * float(b);", "compile: ", "bfloat"),
    inserted("too much threadgroup memory", "threadgroup float big[8000]; big[sg] = l;", "limit: 'big'", "32768"),
]
MEMORY_BUGS = [bug for bug in BUGS if bug.kind.startswith(("race", "out of bounds", "uninitialised"))]
N_KEYS = 37  # simdgroups 0 to 4 have two keys each, the others one


def call(emulator: Emulator, source: str, dtype: mx.Dtype = mx.float32) -> tuple[np.ndarray, np.ndarray]:
    arguments, expected = problem(N_KEYS, 64, dtype)
    (out,) = emulator.metal_kernel(**vars(definition(source)))(**arguments)
    return np.array(out.astype(mx.float32)), expected


def test_there_are_enough_bugs():
    assert len(BUGS) >= 20
    assert len({bug.name for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_kernel_without_bugs_passes(dtype, schedule):
    out, expected = call(Emulator("check", schedule), BODY, dtype)
    assert np.abs(out - expected).max() < {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_bug_is_named(bug):
    with pytest.raises(MetalError) as caught:
        call(Emulator("check"), bug.source())
    message = str(caught.value)
    assert re.match(bug.kind, message)
    assert bug.about in message
    assert "\n" not in message


@pytest.mark.parametrize("schedule", ["reverse", "random"])
@pytest.mark.parametrize("bug", MEMORY_BUGS, ids=[bug.name for bug in MEMORY_BUGS])
def test_bug_is_named_in_any_schedule(bug, schedule):
    with pytest.raises(MetalError, match=bug.kind):
        call(Emulator("check", schedule, seed=7), bug.source())


@pytest.mark.parametrize(
    "code",
    [
        f"outputs[sg * BD + lane] = 0; {BARRIER} l = outputs[(sg ^ 1) * BD + lane]; {BARRIER}",
        "outputs[sg * BD + lane] = 0; simdgroup_barrier(mem_flags::mem_threadgroup); l = outputs[sg * BD + (lane ^ 1)];",
        "l = simd_shuffle_xor(l, 31);",
    ],
    ids=["threadgroup barriers", "simdgroup barrier", "shuffle"],
)
def test_right_ways_to_share_pass(code):
    out, expected = call(Emulator("check"), BODY.replace(BEFORE_LOOP, f"{BEFORE_LOOP} {code} {BARRIER}"))
    assert np.abs(out - expected).max() < 1e-5
