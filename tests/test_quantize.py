"""Packed rows against NumPy in float64: what the stream holds, how far off it is, and attention over it as it lies."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvprune.quantize import BITS, FITTED, GROUP_SIZES, PAGE, SCHEMES, Codec, Frame, frame_of, pack, quantize

at_leisure = settings(deadline=None, max_examples=60)  # a busy machine is no failure
WIDTHS = (64, 80, 96, 128, 256, 20)
LEADS = ((), (1,), (2, 3), (5,), (2, 1, 3))
DTYPES = {"float32": 2.0**-18, "float16": 2.0**-9, "bfloat16": 2.0**-6}  # what a product may be off, relative
VARIANTS = list(itertools.product(BITS, SCHEMES, (False, True)))
HALF_ULP = 2.0**-11  # of float16, relative
LEAST_HALF = 2.0**-25  # half of the smallest float16


def hadamard(width: int) -> np.ndarray:
    """Orthonormal, in blocks of the largest power of two that divides ``width``."""
    block = width & -width
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    return np.kron(np.eye(width // block), matrix)


def entered(codec: Codec, rows: np.ndarray, frame: Frame | None) -> np.ndarray:
    """Rows as they are quantized ``(..., n, D)``, float64."""
    if frame is not None:
        rows = (rows - as64(frame.offset)) / as64(frame.scale)
    return rows @ hadamard(codec.width) if codec.hadamard else rows


def left(codec: Codec, rows: np.ndarray, frame: Frame | None) -> np.ndarray:
    """The inverse of ``entered``."""
    rows = rows @ hadamard(codec.width).T if codec.hadamard else rows
    return rows if frame is None else rows * as64(frame.scale) + as64(frame.offset)


def in_groups(codec: Codec, rows: np.ndarray) -> np.ndarray:
    """``(..., n, D)`` to ``(..., groups, group)``: along D padded with zeros, or 32 tokens of a channel."""
    *lead, n, width = rows.shape
    if codec.scheme == "page":
        return rows.reshape(*lead, n // PAGE, PAGE, width).swapaxes(-1, -2)
    group = group_of(codec)
    rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -width % group)])
    return rows.reshape(*lead, n, -1, group)


def group_of(codec: Codec) -> int:
    fitting = [g for g in (128, 64, 32) if g <= codec.group_size and codec.width % g == 0]
    return PAGE if codec.scheme == "page" or not fitting else fitting[0]


def from_groups(codec: Codec, groups: np.ndarray) -> np.ndarray:
    if codec.scheme == "page":
        groups = groups.swapaxes(-1, -2)
        return groups.reshape(*groups.shape[:-3], -1, codec.width)
    return groups.reshape(*groups.shape[:-2], -1)[..., : codec.width]


def unpacked(codec: Codec, parts: tuple[mx.array, ...], frame: Frame | None) -> np.ndarray:
    """Rows in float64, read from the bytes: a bit stream, lowest bits first."""
    packed, scales, biases = (np.array(x) for x in parts)
    stream = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(*packed.shape[:-1], -1, codec.bits) @ (1 << np.arange(codec.bits))
    codes = codes.reshape(*scales.shape, group_of(codec))
    groups = codes * scales.astype(np.float64)[..., None] + biases.astype(np.float64)[..., None]
    return left(codec, from_groups(codec, groups), frame)


def bound(codec: Codec, groups: np.ndarray) -> np.ndarray:
    """How far a value of each group may be off: half a step, and what the ends lose to float16."""
    levels = 2**codec.bits - 1
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    ends = HALF_ULP * (np.abs(low) + high - low) + LEAST_HALF * (levels + 1)
    computed = 2.0**-20 * np.abs(groups).max(axis=-1)  # in float32
    return ((high - low) / levels * 0.5 * (1 + HALF_ULP) + ends + computed)[..., None]


def within_bound(codec: Codec, got: np.ndarray, want: np.ndarray) -> bool:
    """Every value of a group; where levels are fitted by least squares, the group's root mean square."""
    error = np.abs(got - want)
    if codec.bits in FITTED:
        error = np.sqrt(np.square(error).mean(axis=-1, keepdims=True))
    return bool(np.all(error <= bound(codec, want)))


def as64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def rows_of(seed: int, *shape: int, dtype: str = "float32") -> mx.array:
    """Rows whose channels differ in place and spread, as keys do, and whose first is an outlier."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.lognormal(size=shape[-1]) + 3 * rng.normal(size=shape[-1])
    x[..., :1, :] *= 5
    return mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))


def close(got: mx.array, want: np.ndarray, size: np.ndarray, dtype: str) -> bool:
    """Equal up to rounding, where the terms of the sum are ``size`` in all."""
    return bool(np.all(np.abs(as64(got) - want) <= DTYPES[dtype] * size + 1e-6))


@st.composite
def cases(draw, schemes=SCHEMES):
    scheme = draw(st.sampled_from(schemes))
    bits, group = draw(st.sampled_from(BITS)), draw(st.sampled_from(GROUP_SIZES))
    codec = Codec(draw(st.sampled_from(WIDTHS)), bits, group, scheme, draw(st.booleans()))
    n = draw(st.sampled_from((32, 96))) if scheme == "page" else draw(st.sampled_from((1, 31, 32, 33)))
    lead, seed = draw(st.sampled_from(LEADS)), draw(st.integers(0, 2**20))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return codec, rows_of(seed, *lead, n, codec.width, dtype=dtype), seed, dtype


@at_leisure
@given(cases())
def test_decode_is_what_the_bytes_say_and_close_to_the_rows(case):
    codec, rows, _, _ = case
    frame = codec.calibrate(rows)
    parts = codec.encode(rows, frame)
    decoded = codec.decode(parts, mx.float32, frame)
    said, given_rows = unpacked(codec, parts, frame), as64(rows)
    assert decoded.shape == rows.shape
    assert np.allclose(as64(decoded), said, rtol=1e-5, atol=1e-5 * np.abs(said).max())

    want = in_groups(codec, entered(codec, given_rows, frame))
    got = in_groups(codec, entered(codec, said, frame))
    assert within_bound(codec, got, want)


@at_leisure
@given(cases(), st.sampled_from((1, 4, 12)))
def test_scores_are_products_with_the_decoded_keys(case, n_queries):
    codec, keys, seed, dtype = case
    frame = codec.calibrate(keys)
    parts = codec.encode(keys, frame)
    queries = rows_of(seed + 1, *keys.shape[:-2], n_queries, codec.width, dtype=dtype)
    scores = codec.scores(queries, parts, frame)
    assert scores.dtype == queries.dtype and scores.shape == (*queries.shape[:-1], keys.shape[-2])
    exact, asked = unpacked(codec, parts, frame), as64(queries)
    assert close(scores, asked @ exact.swapaxes(-1, -2), magnitude(asked, exact, frame), dtype)


def magnitude(queries: np.ndarray, keys: np.ndarray, frame: Frame | None) -> np.ndarray:
    """Size of the terms of a score ``(..., R, n)``: of the product, and of that with a frame's offset."""
    length = lambda x: np.linalg.norm(x, axis=-1)
    if frame is None:
        return 4 * length(queries)[..., None] * length(keys)[..., None, :]
    offset, scale = as64(frame.offset), as64(frame.scale)
    shifted = np.abs(queries * offset).sum(axis=-1, keepdims=True)
    return 4 * length(queries * scale)[..., None] * length((keys - offset) / scale)[..., None, :] + 4 * shifted


@at_leisure
@given(cases(("token", "channel")), st.sampled_from((1, 4, 12)))
def test_mix_is_the_weighted_sum_of_the_decoded_values(case, n_queries):
    codec, values, seed, dtype = case
    frame = codec.calibrate(values)
    parts = codec.encode(values, frame)
    raw = np.random.default_rng(seed).random((*values.shape[:-2], n_queries, values.shape[-2]))
    weights = mx.array((raw / raw.shape[-1]).astype(np.float32)).astype(getattr(mx, dtype))  # they do not sum to 1
    mixed = codec.mix(weights, parts, frame)
    assert mixed.dtype == weights.dtype and mixed.shape == (*weights.shape[:-1], codec.width)
    exact = unpacked(codec, parts, frame)
    size = 8 * np.abs(exact).max() * as64(weights).sum(axis=-1, keepdims=True) * np.sqrt(codec.width)
    assert close(mixed, as64(weights) @ exact, size, dtype)


@pytest.mark.parametrize(("bits", "scheme", "rotated"), VARIANTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_empty_or_hidden_in_the_bytes(bits, scheme, rotated, width):
    for group in GROUP_SIZES:
        codec = Codec(width, bits, group, scheme, rotated)
        rows = rows_of(1, 2, 3, 2 * PAGE, width)
        frame = codec.calibrate(rows)
        parts = codec.encode(rows, frame)
        assert [x.dtype for x in parts] == [mx.uint32, mx.float16, mx.float16]
        assert {x.shape[:-1] for x in parts} == {(2, 3, 2 * PAGE // codec.granule)}
        row_bits = sum(x.nbytes for x in parts) * 8 / (6 * 2 * PAGE)
        assert codec.row_nbytes(4) == codec.row_nbytes(2) == -(-row_bits // 8)
        held = 0 if frame is None else frame.offset.nbytes + frame.scale.nbytes
        assert codec.frame_nbytes(6) == held


def test_sizes_on_paper():
    assert Codec(64).row_nbytes(4) == 256 and Codec(64).row_nbytes(2) == 128
    assert Codec(64, 4).row_nbytes(4) == 32 + 4
    assert Codec(64, 4, 32).row_nbytes(4) == 32 + 8
    assert Codec(80, 4, 64).row_nbytes(4) == 48 + 3 * 4, "80 is no multiple of 64 or 32: padded to 96, in groups of 32"
    assert Codec(96, 8, 128).row_nbytes(4) == 96 + 3 * 4
    assert Codec(64, 3, scheme="page").row_nbytes(4) == 24 + 64 * 4 // 32
    assert Codec(64, 4, scheme="channel").frame_nbytes(3) == 2 * 3 * 64 * 4
    assert Codec(64, 4).frame_nbytes(3) == Codec(64, scheme="channel").frame_nbytes(3) == 0


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_without_bits_rows_are_kept_as_they_are(dtype):
    codec, rows = Codec(64, scheme="page", hadamard=True), rows_of(2, 2, 3, 33, 64, dtype=dtype)
    (kept,) = parts = codec.encode(rows)
    assert kept is rows and codec.granule == 1 and codec.calibrate(rows) is None
    assert mx.array_equal(codec.decode(parts, rows.dtype), rows)
    queries, weights = rows[..., :4, :], rows_of(3, 2, 3, 4, 33, dtype=dtype)
    assert mx.array_equal(codec.scores(queries, parts), queries @ rows.swapaxes(-1, -2))
    assert mx.array_equal(codec.mix(weights, parts), weights @ rows)


@pytest.mark.parametrize(("bits", "scheme", "rotated"), VARIANTS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_odd_rows_come_back_finite(bits, scheme, rotated, dtype):
    """Zeros and constants exactly (they are float16 numbers), the huge and the tiny up to their step."""
    codec = Codec(64, bits, 64, scheme, rotated)
    frame = Frame(mx.zeros((1, 64)), mx.ones((1, 64))) if scheme == "channel" else None
    ordinary = rows_of(4, PAGE, 64)
    odd = {
        "zeros": mx.zeros((PAGE, 64)),
        "constant": mx.full((PAGE, 64), -3.0),
        "huge": mx.sign(ordinary) * 1e4,
        "tiny": ordinary * 1e-9,
        "one spike": mx.where(mx.arange(64) == 5, 1e4, ordinary),
    }
    for name, rows in odd.items():
        rows = rows.astype(getattr(mx, dtype))
        parts = codec.encode(rows, frame)
        decoded = codec.decode(parts, mx.float32, frame)
        assert all(mx.isfinite(x.astype(mx.float32)).all() for x in (decoded, *parts)), name
        want = in_groups(codec, entered(codec, as64(rows), frame))
        got = in_groups(codec, entered(codec, unpacked(codec, parts, frame), frame))
        assert within_bound(codec, got, want), name
        if name in ("zeros", "constant") and not rotated:
            assert mx.array_equal(decoded, rows.astype(mx.float32)), name
        assert mx.isfinite(codec.calibrate(rows).scale if scheme == "channel" else decoded).all()


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_mlx_packs_them(bits):
    codes = np.random.default_rng(9).integers(0, 2**bits, size=(3, 5, 96))
    packed = pack(mx.array(codes, mx.uint32), bits)
    ones = mx.ones((3, 5, 3))
    assert np.array_equal(as64(mx.dequantize(packed, ones, 0 * ones, 32, bits)), codes)


@pytest.mark.parametrize(("bits", "gain"), [(3, 0.95), (2, 0.75)])
def test_fitted_levels_beat_levels_from_end_to_end(bits, gain):
    x = np.random.default_rng(10).normal(size=(200, 64))
    codes, scales, biases = (as64(y) for y in quantize(mx.array(x.astype(np.float32)), bits))
    fitted = np.square(codes * scales[:, None] + biases[:, None] - x).mean()
    low, step = x.min(axis=1, keepdims=True), np.ptp(x, axis=1, keepdims=True) / (2**bits - 1)
    plain = np.square(np.round((x - low) / step) * step + low - x).mean()
    assert fitted < gain * plain


@pytest.mark.parametrize("size", [1e6, 3e38])
def test_beyond_float16_values_saturate(size):
    for bits in BITS:
        codec = Codec(64, bits)
        signs = mx.array(np.random.default_rng(15).choice([-1.0, 1.0], size=(3, 64)), mx.float32)
        decoded = codec.decode(codec.encode(signs * size), mx.float32)
        assert mx.allclose(decoded, signs * 65504, rtol=0.02)


def frame_by_hand(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower medians and fourth roots of mean absolute deviations, of rows ``(n, D)``."""
    offset = np.sort(rows, axis=0)[(len(rows) - 1) // 2]
    away = np.abs(rows - offset).mean(axis=0)
    return offset, np.maximum((away / away.mean()) ** 0.25, 0.1)


@at_leisure
@given(st.integers(0, 2**20), st.sampled_from((2, 31, 32, 33)), st.booleans())
def test_frame_is_of_the_rows_that_count(seed, n, masked):
    rows = rows_of(seed, 2, 3, n, 20)
    valid = np.random.default_rng(seed).random((2, 3, n)) < 0.5
    valid[..., :2] = True
    frame = Codec(20, 4, scheme="channel").calibrate(rows, mx.array(valid) if masked else None)
    assert frame.offset.shape == frame.scale.shape == (2, 3, 1, 20)
    assert frame.offset.dtype == frame.scale.dtype == mx.float32
    for at in np.ndindex(2, 3):
        offset, scale = frame_by_hand(as64(rows)[at][valid[at] if masked else slice(None)])
        assert np.allclose(as64(frame.offset)[at][0], offset, atol=1e-6)
        assert np.allclose(as64(frame.scale)[at][0], scale, rtol=1e-4)


def test_an_outlier_does_not_set_the_frame():
    plain = np.random.default_rng(11).normal(size=(128, 64)) + np.linspace(-5, 5, 64)
    odd = plain.copy()
    odd[0] = 300 * np.random.default_rng(12).normal(size=64)
    without, with_it = (frame_of(mx.array(x.astype(np.float32))) for x in (plain, odd))
    assert mx.abs(without.offset - with_it.offset).max() < 0.2
    assert mx.max(mx.maximum(without.scale / with_it.scale, with_it.scale / without.scale)) < 1.6


def test_a_frame_of_nothing_changes_nothing():
    for rows, valid in ((mx.ones((2, 4, 32)), mx.zeros((2, 4), mx.bool_)), (mx.zeros((2, 4, 32)), None)):
        frame = frame_of(rows, valid)
        assert mx.array_equal(frame.offset, mx.zeros((2, 1, 32))) and mx.array_equal(frame.scale, mx.ones((2, 1, 32)))


def test_a_channel_that_stood_still_may_move_later():
    """Its scale is not so small that its later values push all others off the levels."""
    rows = np.random.default_rng(13).normal(size=(64, 64))
    rows[:, 7] = 2.0
    codec = Codec(64, 4, scheme="channel")
    frame = codec.calibrate(mx.array(rows.astype(np.float32)))
    rows[:, 7] = np.random.default_rng(14).normal(size=64)
    decoded = codec.decode(codec.encode(mx.array(rows.astype(np.float32)), frame), mx.float32, frame)
    assert np.abs(as64(decoded) - rows).max() < 2


@pytest.mark.parametrize("width", [*WIDTHS, 144, 576, 33])
def test_hadamard_keeps_lengths_and_undoes_itself(width):
    """Quantized in 8 bits, rows come back; a spike is spread, so that the row is nearer than without."""
    spiky = np.random.default_rng(5).normal(size=(4, PAGE, width))
    spiky[..., 0] *= 100
    rows = mx.array(spiky.astype(np.float32))
    turned, plain = Codec(width, 8, hadamard=True), Codec(width, 8)
    error = {c.hadamard: np.square(as64(c.decode(c.encode(rows), mx.float32)) - spiky).mean() for c in (turned, plain)}
    assert error[True] < 1e-3 * np.square(spiky).mean()
    assert error[True] < error[False] or width & -width < 16


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("scheme", ["token", "channel"])
def test_a_slot_does_not_depend_on_its_neighbours(scheme, rotated):
    codec, rows = Codec(64, 4, 64, scheme, rotated), rows_of(6, 2, 33, 64)
    frame = codec.calibrate(rows)
    together = codec.encode(rows, frame)
    for i in (0, 17, 32):
        alone = codec.encode(rows[:, i : i + 1], frame)
        assert all(mx.array_equal(a[:, i : i + 1], b) for a, b in zip(together, alone, strict=True))


def test_a_page_does_not_depend_on_the_others():
    codec, rows = Codec(64, 4, scheme="page"), rows_of(7, 2, 3 * PAGE, 64)
    together, alone = codec.encode(rows), codec.encode(rows[:, PAGE : 2 * PAGE])
    assert all(mx.array_equal(a[:, 1:2], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(("bits", "scheme", "rotated"), VARIANTS)
def test_nothing_held_is_nothing_attended(bits, scheme, rotated):
    codec = Codec(64, bits, 64, scheme, rotated)
    frame = codec.calibrate(rows_of(8, 2, 3, PAGE, 64))
    parts = codec.encode(mx.zeros((2, 3, 0, 64)), frame)
    assert codec.decode(parts, mx.float16, frame).shape == (2, 3, 0, 64)
    assert codec.scores(mx.ones((2, 3, 4, 64)), parts, frame).shape == (2, 3, 4, 0)
    if scheme != "page":
        assert mx.array_equal(codec.mix(mx.ones((2, 3, 4, 0)), parts, frame), mx.zeros((2, 3, 4, 64)))


@pytest.mark.parametrize(
    ("settings", "name", "got"),
    [
        ({"bits": 7}, "kv-bits", "7"),
        ({"bits": 16}, "kv-bits", "16"),
        ({"bits": 0}, "kv-bits", "0"),
        ({"bits": 4, "group_size": 48}, "kv-group-size", "48"),
        ({"bits": 4, "scheme": "chanel"}, "kv-scheme", "'chanel'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, name, got):
    with pytest.raises(ValueError, match=rf"^\[{name}\] .+; got {got}; try .+"):
        Codec(64, **settings)


def test_values_by_pages_are_refused():
    codec = Codec(64, 4, scheme="page")
    with pytest.raises(ValueError, match=r"^\[kv-scheme\] .+; got scheme 'page'; try .+"):
        codec.mix(mx.ones((1, PAGE)), codec.encode(mx.ones((PAGE, 64))))


def test_what_is_our_own_fault_is_asserted():
    rows = mx.ones((33, 64))
    with pytest.raises(AssertionError):
        Codec(64, 4, scheme="page").encode(rows)
    with pytest.raises(AssertionError):
        Codec(64, 4, scheme="channel").encode(rows)
    with pytest.raises(AssertionError):
        Codec(32, 4).encode(rows)
