"""Threadgroup variables and literals are found in Metal text, and nothing else is changed."""

from __future__ import annotations

import pytest

from mlx_kvprune.kernels.metal_text import Shared, rewrite


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("threadgroup float* p = tile;", []),
        ("threadgroup const T* p = tile;", []),
        ("const threadgroup float* p = tile;", []),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);", []),
        ("void f(threadgroup float* x, threadgroup float& y);", []),
        ("for (threadgroup float* p = a; p < b; p++) ;", []),
        ("threadgroup float a;", [Shared("float", "a", "")]),
        ("threadgroup float a, b[4];", [Shared("float", "a", ""), Shared("float", "b", "[4]")]),
        ("threadgroup uchar tile[2][A < B ? 1 : 2];", [Shared("uchar", "tile", "[2][A<B?1:2]")]),
        ("threadgroup vec<float, 4> t[8];", [Shared("vec < float , 4 >", "t", "[8]")]),
        ("threadgroup metal::vec<half, 2> u;", [Shared("metal :: vec < half , 2 >", "u", "")]),
        ("threadgroup alignas(16) unsigned int w[4];", [Shared("alignas ( 16 ) unsigned int", "w", "[4]")]),
        ("if (x) { threadgroup float z[1]; }", [Shared("float", "z", "[1]")]),
        ("x = 1; // threadgroup float z;", []),
    ],
)
def test_threadgroup_variables_are_found(declared, expected):
    found = []
    rewrite(declared, lambda shared: found.append(shared) or "")
    assert found == expected


def test_literals_are_floats():
    text = "x = 1.5 * 2. + 1e-3 + 0x1F + 3 + 1.f + 2.0h + 2h + a1.x; // 0.5\n#define C 0.5\n"
    expected = "x = 1.5f * 2.f + 1e-3f + 0x1F + 3 + 1.f + half(2.0f) + half(2.0f) + a1.x; // 0.5\n#define C 0.5f\n"
    assert rewrite(text, lambda shared: "") == expected


def test_lines_are_kept():
    assert rewrite("a;\nthreadgroup float x[\n4];\nb;", lambda shared: shared.name) == "a;\nx\n\nb;"
