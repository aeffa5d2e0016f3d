"""Packing rows by the kernel: the emulator's checks, and the reference's codes."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_texts import texts_of
from metal_emulator import Emulator, address_space_errors, mlx_text, unavailable
from metal_emulator.address_spaces import address_spaces_unavailable
from metal_emulator.cuda import compile_cuda, cuda_text, cuda_unavailable

from mlx_kvprune.kernels import launch
from mlx_kvprune.kernels.pack_rows import can_run, pack_rows, reference
from mlx_kvprune.quantize import BITS, FITTED, PAGE, SCHEMES, Codec, Frame

needs_emulator = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
WIDTHS = (64, 80, 96, 112, 128, 256)
LEADS = ((), (1,), (2, 3), (5,), (2, 1, 3))
SCHEDULES = ("forward", "reverse", "random")
SOME = [  # few, for each is compiled: width, bits, group size, scheme, rotated, dtype
    (64, 4, 64, "token", False, mx.float16),
    (80, 3, 64, "token", True, mx.float32),
    (112, 2, 128, "channel", True, mx.bfloat16),
    (128, 5, 128, "channel", False, mx.float16),
    (256, 6, 128, "token", True, mx.bfloat16),
    (8, 8, 32, "token", True, mx.float32),
    (64, 8, 64, "page", False, mx.float16),
    (80, 3, 64, "page", True, mx.float32),
    (256, 5, 64, "page", True, mx.bfloat16),
]
BY_NAME = {f"{s}-{w}-{b}bit-g{g}{'-rotated' * h}": (Codec(w, b, g, s, h), t) for w, b, g, s, h, t in SOME}
every = pytest.mark.parametrize("name", BY_NAME)


def rows_of(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Rows whose channels differ in place and spread, as keys do, and whose first is an outlier."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.lognormal(size=shape[-1]) + 3 * rng.normal(size=shape[-1])
    x[..., :1, :] *= 5
    return mx.array(x.astype(np.float32)).astype(dtype)


def whole(codec: Codec, n: int) -> int:
    """``n``, rounded up to what is written together."""
    return -(-n // codec.granule) * codec.granule


def packed(emulator: Emulator, codec: Codec, rows: mx.array, frame: Frame | None) -> tuple[mx.array, ...]:
    """What the kernel makes, in one launch."""
    before = emulator.n_launches
    with launch.stand_in(emulator.metal_kernel):
        parts = pack_rows(codec, rows, frame, force=True)
    assert emulator.n_launches == before + 1
    return parts


def codes_of(codec: Codec, parts: tuple[mx.array, ...]) -> np.ndarray:
    """Codes ``(groups, values)`` from their bit stream, lowest bits first."""
    stream = np.unpackbits(np.array(parts[0]).view(np.uint8), bitorder="little").reshape(-1, codec.bits)
    return (stream @ (1 << np.arange(codec.bits))).reshape(parts[1].size, -1)


def steps_apart(a: mx.array, b: mx.array) -> np.ndarray:
    """How many float16 lie between two."""
    a, b = (np.array(x).reshape(-1).view(np.int16).astype(int) for x in (a, b))
    ranked = lambda x: np.where(x < 0, -(x & 0x7FFF), x)
    return np.abs(ranked(a) - ranked(b))


def squared_error(codec: Codec, parts: tuple[mx.array, ...], rows: mx.array, frame: Frame | None) -> float:
    return float(np.square(np.array(codec.decode(parts, mx.float32, frame) - rows.astype(mx.float32), float)).sum())


def few(which: np.ndarray) -> bool:
    """Fewer than one in a thousand, or one."""
    return which.sum() <= max(1, which.size // 1000)


def agree(codec: Codec, got: tuple[mx.array, ...], rows: mx.array, frame: Frame | None) -> None:
    """The kernel's parts are the reference's, up to sums in another order and values between two levels."""
    want = reference(codec, rows, frame)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
    assert all(np.isfinite(np.array(x)).all() for x in got[1:])
    off = np.maximum(*(steps_apart(a, b) for a, b in zip(got[1:], want[1:], strict=True)))
    moved = off > 1
    assert few(moved) if codec.bits in FITTED else not moved.any()  # a value between two levels moves a fitted line
    flips = np.abs(codes_of(codec, got) - codes_of(codec, want))[~moved]
    assert flips.max(initial=0) <= 1 and few(flips > 0)
    error, least = squared_error(codec, got, rows, frame), squared_error(codec, want, rows, frame)
    assert error <= 1.01 * least + 1e-9


# ---- what it computes


@needs_emulator
@every
@pytest.mark.parametrize("n", [1, 31, 33])
def test_small_shapes_in_check_mode(name, n):
    codec, dtype = BY_NAME[name]
    rows = rows_of(n, 1, 2, whole(codec, n), codec.width, dtype=dtype)
    frame = codec.calibrate(rows)
    emulator = Emulator("check", "random", seed=n)
    agree(codec, packed(emulator, codec, rows, frame), rows, frame)
    assert emulator.last is not None and emulator.last.threadgroup_nbytes <= 32 * 1024


@needs_emulator
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_bits(bits, scheme):
    which = BITS.index(bits) + SCHEMES.index(scheme)
    codec = Codec(WIDTHS[which % len(WIDTHS)], bits, 128, scheme, hadamard=which % 2 == 1)
    rows = rows_of(bits, 2, 2, 2 * PAGE, codec.width)
    frame = codec.calibrate(rows)
    agree(codec, packed(Emulator(), codec, rows, frame), rows, frame)


@needs_emulator
@every
def test_the_schedule_does_not_matter(name):
    codec, dtype = BY_NAME[name]
    rows = rows_of(7, 2, 3, whole(codec, 257), codec.width, dtype=dtype)
    frame = codec.calibrate(rows)
    all_parts = [packed(Emulator("fast", schedule, seed=3), codec, rows, frame) for schedule in SCHEDULES]
    agree(codec, all_parts[0], rows, frame)
    for parts in all_parts[1:]:
        assert all(mx.array_equal(a, b) for a, b in zip(parts, all_parts[0], strict=True))


@needs_emulator
@given(
    name=st.sampled_from(sorted(BY_NAME)),
    lead=st.sampled_from(LEADS),
    n=st.integers(1, 70),
    seed=st.integers(0, 2**20),
    size=st.sampled_from((1e-6, 1.0, 1e3)),
)
@settings(deadline=None, max_examples=60)
def test_any_rows(name, lead, n, seed, size):
    codec, dtype = BY_NAME[name]
    rows = mx.clip(rows_of(seed, *lead, whole(codec, n), codec.width) * size, -6e4, 6e4).astype(dtype)
    frame = codec.calibrate(rows)
    agree(codec, packed(Emulator(), codec, rows, frame), rows, frame)


@needs_emulator
@every
@pytest.mark.parametrize("value", [0.0, -3.25, 1e-7, 6e4])
def test_groups_of_one_value(name, value):
    codec, dtype = BY_NAME[name]
    rows = mx.full((1, 2, PAGE, codec.width), value, dtype)
    frame = codec.calibrate(rows)
    parts = packed(Emulator(), codec, rows, frame)
    agree(codec, parts, rows, frame)


@needs_emulator
@every
@pytest.mark.parametrize("value", [3e4, 1e10, float("inf"), float("nan")])
def test_nothing_stored_is_nan(name, value):
    codec, dtype = BY_NAME[name]
    rows = np.array(rows_of(1, 1, 2, PAGE, codec.width))
    rows[..., 3, ::5] = value
    rows[..., 4, ::3] = -value
    rows = mx.array(rows).astype(dtype)
    frame = (
        None if codec.scheme != "channel" else Frame(mx.zeros((1, 2, 1, codec.width)), mx.ones((1, 2, 1, codec.width)))
    )
    parts = packed(Emulator(), codec, rows, frame)
    assert all(np.isfinite(np.array(x)).all() for x in parts[1:])
    if value == 1e10 and dtype != mx.float16:
        assert np.abs(np.array(parts[2])).max() == 65504
    if np.isfinite(value) and value < 65504:
        agree(codec, parts, rows, frame)


@needs_emulator
@pytest.mark.parametrize("cut", ["heads last", "a span", "every second channel", "one head"])
def test_rows_with_strides(cut):
    codec = BY_NAME["token-64-4bit-g64"][0]
    if cut == "heads last":
        rows = rows_of(2, 2, 33, 3, 64).swapaxes(1, 2)
    elif cut == "a span":
        rows = rows_of(2, 2, 3, 50, 64)[:, :, 7:41]
    elif cut == "every second channel":
        rows = rows_of(2, 2, 3, 33, 128)[..., ::2]
    else:
        rows = mx.broadcast_to(rows_of(2, 2, 1, 33, 64), (2, 3, 33, 64))
    agree(codec, packed(Emulator("check"), codec, rows, None), rows, None)


@needs_emulator
def test_a_frame_for_each_head_and_one_for_all():
    codec, dtype = BY_NAME["channel-128-5bit-g128"]
    rows = rows_of(9, 2, 3, 5, codec.width, dtype=dtype)
    for shape in ((2, 3), (1, 3), (1, 1)):
        frame = codec.calibrate(rows_of(sum(shape), *shape, 40, codec.width))
        agree(codec, packed(Emulator(), codec, rows, frame), rows, frame)


# ---- who runs


def test_without_gpu_the_reference_runs():
    codec, rows = Codec(64, 4), rows_of(0, 1, 2, 5, 64)
    assert can_run(codec, rows) == "no GPU: MLX runs on the CPU"
    parts = pack_rows(codec, rows)
    assert all(mx.array_equal(a, b) for a, b in zip(parts, codec.encode(rows), strict=True))
    with pytest.raises(ValueError, match=r"\[kernels\] pack_rows cannot run: no GPU"):
        pack_rows(codec, rows, force=True)


@pytest.mark.parametrize(
    ("codec", "shape", "dtype", "reason"),
    [
        (Codec(64), (1, 2, 5, 64), mx.float32, "kept as they are"),
        (Codec(20, 4), (1, 2, 5, 20), mx.float32, "head dim 20"),
        (Codec(512, 4), (1, 2, 5, 512), mx.float32, "head dim 512"),
        (Codec(64, 4), (1, 2, 5, 64), mx.int32, "int32"),
        (Codec(64, 4), (1, 2, 0, 64), mx.float32, "no rows"),
    ],
)
def test_reasons(codec, shape, dtype, reason):
    refuse = lambda **_: pytest.fail("it was launched")
    with launch.stand_in(refuse):
        rows = mx.zeros(shape, dtype)
        assert reason in can_run(codec, rows)
        with pytest.raises(ValueError, match=reason):
            pack_rows(codec, rows, force=True)
        parts = pack_rows(codec, rows)
    assert [x.shape for x in parts] == [x.shape for x in codec.encode(rows)]


# ---- what other compilers say


def every_text() -> list:
    def launches():
        for codec, dtype in BY_NAME.values():
            rows = mx.zeros((1, 2, PAGE, codec.width), dtype)
            pack_rows(codec, rows, codec.calibrate(rows), force=True)

    return texts_of(launches)


@pytest.mark.skipif(bool(address_spaces_unavailable()), reason=address_spaces_unavailable())
def test_address_spaces():
    assert list(itertools.chain(*(address_space_errors(mlx_text(*text)) for text in every_text()))) == []


@pytest.mark.skipif(bool(cuda_unavailable()), reason=cuda_unavailable())
def test_compiles_for_cuda():
    assert compile_cuda(*cuda_text(*every_text()[-1]))
