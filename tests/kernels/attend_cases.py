"""Views to attend to, and what comes of them in float64."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from metal_emulator import Emulator

from mlx_kvprune.attend import View, attend_ops
from mlx_kvprune.kernels import launch
from mlx_kvprune.kernels.attend_slots import attend_slots
from mlx_kvprune.numerics import device
from mlx_kvprune.quantize import Codec, Frame
from mlx_kvprune.rope import Turning
from mlx_kvprune.slots import EVERYTHING, Gate, PagedPart, Part, Ranks, Rows, Sight, plain
from mlx_kvprune.slots.parts import Layout

PAGE = 32
POISON = 3e4  # finite in every type


class Recorder:
    """Builds kernels on an emulator and keeps the report of each launch by the kernel's name."""

    def __init__(self, **options):
        self.emulator, self.reports = Emulator(**options), {}

    def metal_kernel(self, **kwargs):
        kernel = self.emulator.metal_kernel(**kwargs)

        def call(**arguments):
            outs = kernel(**arguments)
            self.reports.setdefault(kwargs["name"], []).append(self.emulator.last)
            return outs

        return call


@contextmanager
def recorded(**options):
    recorder = Recorder(**options)
    with launch.stand_in(recorder.metal_kernel):
        yield recorder


@dataclass(frozen=True)
class Case:
    """What is attended to; the pool comes first, then a ring of ``ring`` tokens.

    Attributes:
        slots: of the pool: of each head, or of each of ``B * H_kv`` heads where they differ.
        bits: of keys and values, None for as they are.
        scheme: of the keys.
    """

    slots: int | tuple[int, ...] = 70
    ring: int = 33
    bits: tuple[int | None, int | None] = (None, None)
    scheme: str = "token"
    hadamard: bool = True
    heads: int = 2
    gqa: int = 3
    width: int = 64
    value_width: int | None = None
    n_new: int = 1
    batch: int = 1
    dtype: mx.Dtype = mx.float32
    turned: bool = False
    gated: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    holes: float = 0.0
    seed: int = 0

    def parts(self) -> tuple[Part | PagedPart, ...]:
        random = np.random.default_rng(self.seed)
        pool = self._paged(random) if isinstance(self.slots, tuple) else self._dense(random)
        ring = Part(*(plain(self._rows(random, self.ring, w)) for w in self._widths))
        if self.turned:
            at = np.arange(self.ring) + 500 - self.ring
            ring = replace(ring, ranks=Ranks(self._turning, self._heads(at)))
        if self.gated or self.window:
            ring = replace(ring, gate=self._gate(random, (self.batch, self.heads, self.ring), 400))
        return (pool, ring) if pool else (ring,)

    @property
    def sight(self) -> Sight:
        if not (self.gated or self.window or self.softcap):
            return EVERYTHING
        return Sight(newest=599, window=self.window, softcap=self.softcap)

    @property
    def sink_logits(self) -> mx.array | None:
        return device(np.linspace(-1, 2, self.heads * self.gqa).astype(np.float32)) if self.sinks else None

    def queries(self) -> mx.array:
        random = np.random.default_rng(self.seed + 1)
        shape = (self.batch, self.heads * self.gqa, self.n_new, self.width)
        return device(random.standard_normal(shape).astype(np.float32)).astype(self.dtype)

    @property
    def scale(self) -> float:
        return 1.3 * self.width**-0.5

    @property
    def _widths(self):
        return self.width, self.value_width or self.width

    @property
    def _turning(self):
        return Turning(nn.RoPE(self.width), 600)

    def _heads(self, x):
        return device(np.broadcast_to(x, (self.batch, self.heads, *x.shape)).astype(np.int32))

    def _rows(self, random, n, width):
        rows = random.standard_normal((self.batch, self.heads, n, width)).astype(np.float32)
        return device(rows).astype(self.dtype)

    def _gate(self, random, shape, before):
        bias, decay = -random.exponential(1, shape), -random.exponential(0.01, shape)
        positions = (
            random.integers(0, before, shape)
            if before < 400
            else np.broadcast_to(np.arange(600 - shape[-1], 600), shape)
        )
        bias, decay = (device(x.astype(np.float32)) for x in (bias, decay))
        return Gate(bias if self.gated else None, decay if self.gated else None, device(positions.astype(np.int32)))

    def _codecs(self):
        make = lambda width, bits, scheme: (
            Codec(width) if bits is None else Codec(width, bits=bits, scheme=scheme, hadamard=self.hadamard)
        )
        return make(self._widths[0], self.bits[0], self.scheme), make(self._widths[1], self.bits[1], "token")

    def _stored(self, codec, rows):
        frame = codec.calibrate(rows) if rows.shape[-2] else None
        return Rows(codec, codec.encode(rows, frame), frame)

    def _dense(self, random) -> Part | None:
        n = self.slots
        if not n:
            return None
        capacity = n if self.scheme == "page" else n + 5  # what is not in use is poisoned
        stored = []
        for codec, width in zip(self._codecs(), self._widths, strict=True):
            rows = self._stored(codec, self._rows(random, capacity, width))
            stored.append(replace(rows, parts=tuple(_poisoned(x, n // codec.granule) for x in rows.parts)))
        part = Part(*stored)
        if self.holes:  # what was freed there is poisoned, too, where rows are stored as they are
            there = random.random((self.batch, self.heads, 1, n)) > self.holes
            lost = device(~there[:, :, 0, :, None])
            if part.keys.codec.bits is None:
                part = replace(part, keys=plain(mx.where(lost, POISON, part.keys.parts[0])))
            if part.values.codec.bits is None:
                part = replace(part, values=plain(mx.where(lost, POISON, part.values.parts[0])))
            part = replace(part, mask=device(there))
        if self.turned:
            ranks = random.permuted(np.broadcast_to(np.arange(n), (self.batch, self.heads, n)), axis=-1)
            part = replace(part, ranks=Ranks(self._turning, device(ranks.astype(np.int32)), 20))
        if self.gated or self.window:
            part = replace(part, gate=self._gate(random, (self.batch, self.heads, n), 300))
        return part

    def _paged(self, random) -> PagedPart | None:
        counts = tuple(-(-n // PAGE) for n in self.slots)
        pages = sum(counts)
        if not pages:
            return None
        owner = random.permutation(np.repeat(np.arange(len(counts)), counts))
        table = np.full((len(counts), max(counts)), pages, np.int32)
        back, used = np.zeros(pages, np.int32), np.zeros((pages, PAGE), bool)
        for head, n in enumerate(self.slots):
            mine = np.flatnonzero(owner == head)
            table[head, : len(mine)] = mine
            back[mine] = head * table.shape[1] + np.arange(len(mine))
            for i, page in enumerate(mine):
                used[page, random.permutation(PAGE)[: min(PAGE, n - i * PAGE)]] = True
        hot = (owner[None] == np.arange(len(counts))[:, None]).astype(np.float32)
        layout = Layout(device(owner.astype(np.uint32)), device(table), device(back), device(hot), self.batch, counts)
        stored, frames = [], []
        for codec, width in zip(self._codecs(), self._widths, strict=True):
            rows = random.standard_normal((pages, PAGE, width)).astype(np.float32)
            rows[~used] = 0 if codec.bits else POISON
            rows = device(rows).astype(self.dtype)
            frame = codec.calibrate(self._rows(random, 40, width))  # of each head, as a pool has it
            frames.append(frame)
            if frame is not None:
                frame = Frame(*(x.reshape(-1, 1, width)[device(owner)] for x in (frame.offset, frame.scale)))
            stored.append(Rows(codec, codec.encode(rows, frame), frame))
        part = PagedPart(*stored, layout, None if used.all() else device(used[:, None]), frame=frames[0])
        if self.turned:
            ranks = random.integers(0, 400, (pages, PAGE)).astype(np.int32)
            part = replace(part, ranks=Ranks(self._turning, device(ranks), 20))
        if self.gated or self.window:
            part = replace(part, gate=self._gate(random, (pages, PAGE), 300))
        return part


def _poisoned(x: mx.array, n: int) -> mx.array:
    """The first ``n`` rows of an array whose others would be noticed."""
    if x.shape[2] == n:
        return x
    values = np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)
    values[:, :, n:] = np.iinfo(values.dtype).max if values.dtype.kind == "u" else np.nan
    return device(values).astype(x.dtype)[:, :, :n]


def run(case: Case, weights: bool = False):
    """The kernel's output and weights."""
    return attend_slots(case.queries(), case.parts(), case.scale, case.sink_logits, weights, case.sight)


def plain_operations(case: Case):
    """The output of the reference in plain MLX operations."""
    return attend_ops(case.queries(), View(case.parts()), case.scale, "causal", case.sink_logits, False, case.sight).out


def exact(case: Case):
    """Output ``(B, H_q, L, D_v)`` and weights per part ``(B, H_kv, G, L, S)`` in float64, from rows as they are stored."""
    logits, values, sinks = _logits(case)
    peak = np.maximum(np.concatenate(logits, axis=-1).max(axis=-1), sinks)
    shares = [np.exp(x - peak[..., None]) for x in logits]
    total = sum(x.sum(axis=-1) for x in shares) + np.exp(sinks - peak)
    shares = [x / total[..., None] for x in shares]
    out = sum(np.einsum("bhgls,bhsd->bhgld", w, v) for w, v in zip(shares, values, strict=True))
    return out.reshape(case.batch, -1, case.n_new, out.shape[-1]), shares


def online(case: Case) -> np.ndarray:
    """The same output by an online softmax in float32, 32 slots at a time."""
    logits, values, sinks = _logits(case, np.float32)
    logits, values = np.concatenate(logits, axis=-1), np.concatenate(values, axis=2)
    peak = np.broadcast_to(sinks, logits.shape[:-1]).astype(np.float32)
    total, mixed = np.where(np.isfinite(peak), 1, 0).astype(np.float32), np.float32(0)
    for start in range(0, logits.shape[-1], 32):
        x, v = logits[..., start : start + 32], values[:, :, start : start + 32]
        new = np.maximum(peak, x.max(axis=-1))
        base = np.where(np.isfinite(new), new, np.float32(0))
        alpha, p = np.exp(peak - base), np.exp(x - base[..., None])
        total, mixed = total * alpha + p.sum(axis=-1), mixed * alpha[..., None] + np.einsum("bhgls,bhsd->bhgld", p, v)
        peak = new
    out = mixed / total[..., None]
    return out.reshape(case.batch, -1, case.n_new, out.shape[-1])


def _logits(case: Case, dtype=np.float64):
    """Logits of each part ``(B, H_kv, G, L, S)``, minus infinity where hidden, values, and logits of sinks."""
    shape = (case.batch, case.heads, case.gqa, case.n_new)
    queries = (_float64(case.queries()).reshape(*shape, case.width) * case.scale).astype(dtype)
    logits, values = [], []
    parts = case.parts()
    for part in parts:
        dense = _by_head(part, case)
        x = np.einsum("bhgld,bhsd->bhgls", queries, dense["keys"].astype(dtype))
        if case.softcap:
            x = case.softcap * np.tanh(x / case.softcap)
        age = 600 - case.n_new + np.arange(case.n_new)[:, None] - dense["positions"][:, :, None, None]
        if case.gated:
            x = x + dense["bias"][:, :, None, None] + age * dense["decay"][:, :, None, None]
        hidden = ~dense["used"][:, :, None, None] | np.zeros_like(x, bool)
        if case.window:
            hidden |= age >= case.window
        if part is parts[-1]:
            hidden |= np.arange(x.shape[-1]) > np.arange(x.shape[-1] - case.n_new, x.shape[-1])[:, None]
        logits.append(np.where(hidden, -np.inf, x))
        values.append(dense["values"].astype(dtype))
    sinks = np.full((case.heads, case.gqa), -np.inf)
    if case.sinks:
        sinks = _float64(case.sink_logits).reshape(case.heads, case.gqa)
    return [x.astype(dtype) for x in logits], values, sinks[None, :, :, None].astype(dtype)


def _by_head(part, case: Case):
    """A part's arrays by head, in float64; keys where they stand."""
    lead = (case.batch, case.heads)
    paged = isinstance(part, PagedPart)
    keys, values = (_float64(rows.decoded(mx.float32)) for rows in (part.keys, part.values))
    n = keys.shape[-2]
    used = np.ones((*keys.shape[:-2], n), bool) if part.mask is None else np.array(part.mask)[..., 0, :]
    if part.ranks:
        at = np.array(part.ranks.ranks) + part.ranks.shift
        keys = _float64(case._turning(device(keys.astype(np.float32)), device(at)))
    gate = part.gate or Gate()
    own = lambda x: np.zeros(used.shape) if x is None else np.array(x).astype(np.float64)
    named = {"keys": keys, "values": values, "used": used, "bias": own(gate.bias), "decay": own(gate.decay)}
    named["positions"] = own(gate.positions)
    if paged:
        table = np.array(part.layout.table)
        empty = lambda x: np.concatenate([x, np.zeros((1, *x.shape[1:]), x.dtype)])[table]
        named = {k: empty(x).reshape(*lead, table.shape[1] * PAGE, *x.shape[2:]) for k, x in named.items()}
    named["keys"], named["values"] = (np.where(named["used"][..., None], named[k], 0.0) for k in ("keys", "values"))
    return named


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)
