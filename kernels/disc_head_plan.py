"""What `disc_head`'s programs do: a table for every launch, made once for the shapes. Legend: disc_head.py."""

from __future__ import annotations

import functools
import math
from collections import defaultdict, namedtuple
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapm.kernels.runtime import processors, tl

# Products: M N K of a tile, warps, stages, registers. LARGE, where its tiles would fill the chip twice, takes 96 KB of
# shared memory; its epilogue would like 168 registers, but with 128 two programs share a processor of sm_90.
LARGE = (128, 128, 64, 8, 3, 128)
SMALL = (64, 64, 64, 4, 4, None)
FP32 = (64, 64, 32, 4, 2, None)
PRECISION = "ieee"  # of fp32 products
LANES = 128  # channels of a strip: as many whole groups as fit
ROWS, STEP, WARPS = 128, 32, 4  # positions of a strip, and at a time in registers: 8 KB of half precision
CHUNK = 32  # rows of partial results that are read at a time


def _numbers(count: int, first: int = 0) -> list:
    """`first` and on, as kernels take numbers from a module."""
    return [tl.constexpr(first + i) if tl else first + i for i in range(count)]


# The rows of each table: sizes, and offsets in numbers. A kernel reads column CONV_ROWS where `Conv.rows` was written.
# Conv: `rows` rows by N channels from n0 on, of h; x is in `sources[source]`.
Conv = namedtuple("Conv", "C rows n0 pitch source x head h partial")
CONV_C, CONV_ROWS, CONV_N0, CONV_PITCH, CONV_SOURCE, CONV_X, CONV_HEAD, CONV_H, CONV_PARTIAL = _numbers(9)
# Input: the same of a gradient in `outputs[output]`; `matrix` of each side, whose d are `step` apart.
Input = namedtuple("Input", "C rows n0 output at d step divisor matrix")
INPUT_C, INPUT_ROWS, INPUT_N0, INPUT_OUTPUT, INPUT_AT, INPUT_D, INPUT_STEP, INPUT_DIVISOR, INPUT_MATRIX = _numbers(9)
# Weight: M by N channels from m0 and n0 on, summed over `length` positions of each kind.
Weight = namedtuple("Weight", "C length m0 n0 source x pitch kinds d matrix divisor")
WEIGHT_C, WEIGHT_LENGTH, WEIGHT_M0, WEIGHT_N0, WEIGHT_SOURCE, WEIGHT_X = _numbers(6)
WEIGHT_PITCH, WEIGHT_KINDS, WEIGHT_D, WEIGHT_MATRIX, WEIGHT_DIVISOR = _numbers(5, 6)
# A strip: `span` channels from c0 on in groups of `width`, ROWS positions from r0 on; of an image or a chain.
STRIP = "C P c0 span width r0 map head stats shares"
Activate = namedtuple("Activate", f"{STRIP} partial")
Chain = namedtuple("Chain", f"{STRIP} d dlogit role s blocks sums bias ends terms divisor logits")
STRIP_C, STRIP_P, STRIP_C0, STRIP_SPAN, STRIP_WIDTH, STRIP_R0 = _numbers(6)
STRIP_MAP, STRIP_HEAD, STRIP_STATS, STRIP_SHARES = _numbers(4, 6)
(ACTIVATE_PARTIAL,) = _numbers(1, 10)
CHAIN_D, CHAIN_DLOGIT, CHAIN_ROLE, CHAIN_S, CHAIN_BLOCKS, CHAIN_SUMS = _numbers(6, 10)
CHAIN_BIAS, CHAIN_ENDS, CHAIN_TERMS, CHAIN_DIVISOR, CHAIN_LOGITS = _numbers(5, 16)
FAKE, REAL, GENERATOR = _numbers(3)  # roles: the generator's chain goes through a fake
# Reduce: `width` columns of n rows, `stride` apart, in `sources[source]`, into `targets[target]`.
Reduce = namedtuple("Reduce", "width n stride source at target out divisor")
REDUCE_WIDTH, REDUCE_N, REDUCE_STRIDE, REDUCE_SOURCE, REDUCE_AT = _numbers(5)
REDUCE_TARGET, REDUCE_OUT, REDUCE_DIVISOR = _numbers(3, 5)
SUMS1, BIAS1, SUMS2, BIAS2, ENDS, TERMS = range(6)  # its sources
GRADIENT, LOSSES = range(2)  # its targets


def parameters(head, C, second: tl.constexpr):
    """Where the matrix, bias, gamma and beta of a head's first or second layer, w_out and b_out lie; see `layout`."""
    size = C * C + 3 * C
    matrix, out = head, head + 2 * size
    if second:
        matrix += size
    return matrix, matrix + C * C, matrix + C * C + C, matrix + C * C + 2 * C, out, out + C


class Tap(NamedTuple):
    """Channels, positions, where its parameters start in a row, x's strides between positions and between kinds."""

    C: int
    P: int
    start: int
    pitch: int
    kinds: int


class Plan(NamedTuple):
    """Everything that depends on shapes alone."""

    tables: dict[str, Tensor]  # int64, a row a program
    sizes: dict[str, int]  # numbers in each buffer
    conv: dict  # constants of the products over channels
    weight: dict  # constants of those over positions
    strip: dict  # constants of the kernels that go over strips
    blocks: int  # of channels, the most that a tap has, rounded up to a power of two


@functools.cache
def plan(
    taps: tuple[Tap, ...], J: int, sides: tuple[int, ...], row: int, dtype: torch.dtype, device: torch.device
) -> Plan:
    """`row`: numbers of a discriminator. Kept for ever, as captured graphs read the tables.

    Copies from the host, so not inside a capture: run the step once before, with the same shapes.
    """
    large, S = [-(-tap.C // LARGE[1]) for tap in taps], len(sides)
    tiles = S * 2 * J * sum(n * -(-tap.P // LARGE[0]) for n, tap in zip(large, taps, strict=True))
    conv = _product(dtype, device, tiles, [tap.C for tap in taps])
    weight = _product(dtype, device, 2 * S * sum(n * n for n in large), [J * tap.P for tap in taps])
    work = _Work(taps, J, sides, row, conv, weight)
    for t in sorted(range(len(taps)), key=lambda t: -taps[t].C):  # the longest sums first
        work.add_tap(t)
    work.add_losses()
    work.tables["weight"].sort(key=lambda row: -row.length)
    on_device = {name: torch.tensor(rows, dtype=torch.int64, device=device) for name, rows in work.tables.items()}
    spans = [(tap.C, *_strip(tap.C)) for tap in taps]
    lanes = max(LANES, *(_power_of_two(span) for _, _, span in spans))
    groups = max(_power_of_two(span // width) for _, width, span in spans)
    strip = {"LANES": lanes, "GROUPS": groups, "ROWS": ROWS, "STEP": STEP, "num_warps": WARPS}
    blocks = max(_power_of_two(-(-C // span)) for C, _, span in spans)
    return Plan(on_device, dict(work.sizes), conv, weight, strip, blocks)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _product(dtype: torch.dtype, device: torch.device, tiles: int, lengths: Sequence[int]) -> dict:
    """Constants of products over sums of these lengths; `tiles` is how many there are of the large ones."""
    half = LARGE if tiles >= 2 * processors(device) else SMALL
    m, n, k, warps, stages, registers = FP32 if dtype == torch.float32 else half
    constants = {"M": m, "N": n, "K": k, "EVEN": all(length % k == 0 for length in lengths), "PRECISION": PRECISION}
    return constants | {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


def _strip(C: int) -> tuple[int, int]:
    """Channels of a group, and of a strip."""
    width = C // math.gcd(32, C)
    unit = math.lcm(width, 8)
    return width, max(1, LANES // unit) * unit


class _Head(NamedTuple):
    """Where the parameters of one tap's head lie, and its part of each buffer, by image or by chain."""

    s: int  # its discriminator is `sides[s]`
    start: int
    x: list[int]
    maps: list[int]
    stats: list[int]
    partial: list[int]
    shares: list[int]
    d: list[int]
    dlogit: list[int]
    sums: list[int]
    bias: list[int]
    ends: list[int]
    terms: list[int]
    logits: int


class _Work:
    """The tables' rows, and the sizes of the buffers that they point into.

    Image i is fake where i < J; chain `images` is the generator's.
    """

    def __init__(self, taps: Sequence[Tap], J: int, sides: Sequence[int], row: int, conv: dict, weight: dict) -> None:
        self.taps, self.J, self.sides, self.row, self.conv, self.weight = taps, J, sides, row, conv, weight
        self.images = 2 * J
        self.chains = [0, self.images, *range(1, self.images)]  # two go through image 0: side by side, for the cache
        self.strips = [-(-tap.P // ROWS) for tap in taps]
        self.tables: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        terms, logits = (self.images + 1) * sum(self.strips), self.images * sum(tap.P for tap in taps)
        self.sizes = defaultdict(int, losses=len(sides) * terms, logits=len(sides) * logits)

    def add_tap(self, t: int) -> None:
        """All that is done for a tap, under each discriminator and then for the sum over them."""
        heads = [self._head(t, s) for s in range(len(self.sides))]
        for head in heads:
            self._forward(t, head)
            self._backward(t, head)
            self._gradients(t, head)
        C, P, *_ = self.taps[t]
        matrices, generator = [head.start for head in heads], [head.d[self.images] for head in heads]
        step = (generator[-1] - generator[0]) // max(1, len(generator) - 1)
        self.tables["feature"] += [
            Input(C, rows, n0, t, at=m * C, d=generator[0] + m * C, step=step, divisor=len(self.taps) * P,
                  matrix=matrices[0]) + tuple(matrices[1:])
            for n0 in self._columns(C) for m, rows in self._tiles(P)
        ]  # fmt: skip

    def add_losses(self) -> None:
        """A side's terms: of all taps the discriminator's, then of all taps the generator's."""
        strips, S = sum(self.strips), len(self.sides)
        for s in range(S):
            first = s * (self.images + 1) * strips
            middle = first + self.images * strips
            self.tables["reduce"] += [
                Reduce(1, self.images * strips, 1, TERMS, first, LOSSES, S + s, divisor=1),
                Reduce(1, strips, 1, TERMS, middle, LOSSES, s, divisor=1),
            ]

    def _columns(self, C: int) -> range:
        return range(0, C, self.conv["N"])

    def _tiles(self, P: int) -> list[tuple[int, int]]:
        """The first position of each tile, and how many it has."""
        return [(m, min(self.conv["M"], P - m)) for m in range(0, P, self.conv["M"])]

    def _take(self, buffer: str, count: int, size: int) -> list[int]:
        """Room for `count` images or chains, from a multiple of 16 on: the offset of each."""
        first = self.sizes[buffer]
        self.sizes[buffer] += -(-count * size // 16) * 16
        return [first + i * size for i in range(count)]

    def _head(self, t: int, s: int) -> _Head:
        C, P, start, pitch, kinds = self.taps[t]
        side, images, chains, strips = self.sides[s], self.images, self.images + 1, self.strips[t]
        total, before = sum(self.strips), sum(self.strips[:t])
        term = s * chains * total  # see `add_losses`
        terms = [term + images * before + i * strips for i in range(images)]
        return _Head(
            s=s,
            start=side * self.row + start,
            x=[i % self.J * P * pitch + (i >= self.J) * (1 + side) * kinds for i in range(images)],
            maps=self._take("maps", images, P * C),
            stats=self._take("stats", images, 2 * C),
            partial=self._take("partial", images, len(self._tiles(P)) * 2 * C),
            shares=self._take("shares", images, -(-C // _strip(C)[1]) * P),
            d=self._take("d", chains, P * C),
            dlogit=self._take("dlogit", chains, P),
            sums=self._take("sums", chains, strips * 3 * C),
            bias=self._take("bias", chains, strips * C),
            ends=self._take("ends", chains, strips * 16),
            terms=[*terms, term + images * total + before],
            logits=images * (len(self.sides) * sum(tap.P for tap in self.taps[:t]) + s * P),
        )

    def _strips(self, t: int) -> list[tuple[int, ...]]:
        """The first six columns of a strip."""
        C, P, *_ = self.taps[t]
        width, span = _strip(C)
        return [(C, P, c, min(span, C - c), width, r) for c in range(0, C, span) for r in range(0, P, ROWS)]

    def _forward(self, t: int, head: _Head) -> None:
        C, P, _, pitch, _ = self.taps[t]
        span = _strip(C)[1]
        self.tables["conv"] += [
            Conv(C, rows, n0, pitch, source=1 + t, x=head.x[i] + m * pitch, head=head.start, h=head.maps[i] + m * C,
                 partial=head.partial[i] + m // self.conv["M"] * 2 * C)
            for n0 in self._columns(C) for i in range(self.images) for m, rows in self._tiles(P)
        ]  # fmt: skip
        self.tables["activate"] += [
            Activate(*strip, head.maps[i], head.start, head.stats[i], shares=head.shares[i] + strip[2] // span * P,
                     partial=head.partial[i])
            for strip in self._strips(t) for i in range(self.images)
        ]  # fmt: skip

    def _backward(self, t: int, head: _Head) -> None:
        C, P, *_ = self.taps[t]
        n, roles = self.images, [FAKE] * self.J + [REAL] * self.J + [GENERATOR]
        self.tables["chain"] += [
            Chain(*strip, head.maps[c % n], head.start, head.stats[c % n], head.shares[c % n], d=head.d[c],
                  dlogit=head.dlogit[c], role=int(roles[c]), s=head.s, blocks=-(-C // _strip(C)[1]), sums=head.sums[c],
                  bias=head.bias[c], ends=head.ends[c], terms=head.terms[c],
                  divisor=len(self.taps) * P * (1 if c == n else self.J), logits=head.logits + c * P)
            for strip in self._strips(t) for c in self.chains
        ]  # fmt: skip
        matrix = parameters(head.start, C, True)[0]
        self.tables["hidden"] += [
            Input(C, rows, n0, 0, at=head.d[c] + m * C, d=head.d[c] + m * C, step=0, divisor=1, matrix=matrix)
            for n0 in self._columns(C) for c in self.chains for m, rows in self._tiles(P)
        ]  # fmt: skip

    def _gradients(self, t: int, head: _Head) -> None:
        C, P, _, pitch, kinds = self.taps[t]
        divisor, rows = len(self.taps) * self.J * P, self.images * self.strips[t]
        matrix1, bias1, gamma1, beta1, *_ = parameters(head.start, C, False)
        matrix2, bias2, gamma2, beta2, w_out, b_out = parameters(head.start, C, True)
        operands = [  # source, x, pitch, kinds, d, matrix
            (0, head.maps[0], C, self.J * P * C, head.d[0], matrix2),  # a1 with dh2
            (1 + t, 0, pitch, (1 + self.sides[head.s]) * kinds, head.d[0], matrix1),  # x with dh1
        ]
        self.tables["weight"] += [
            Weight(C, self.J * P, m0, n0, *operand, divisor)
            for operand in operands for m0 in range(0, C, self.weight["M"]) for n0 in range(0, C, self.weight["N"])
        ]  # fmt: skip
        sums, bias = head.sums[0], head.bias[0]
        vectors = [  # a partial result, its offset, numbers in a row of it, and where the sum of its rows goes
            (SUMS1, sums, 3 * C, beta1), (SUMS1, sums + C, 3 * C, gamma1), (BIAS1, bias, C, bias1),
            (SUMS2, sums, 3 * C, beta2), (SUMS2, sums + C, 3 * C, gamma2), (BIAS2, bias, C, bias2),
            (SUMS2, sums + 2 * C, 3 * C, w_out),
        ]  # fmt: skip
        self.tables["reduce"] += [
            Reduce(min(LANES, C - c), rows, stride, source, at + c, GRADIENT, out + c, divisor)
            for source, at, stride, out in vectors for c in range(0, C, LANES)
        ]  # fmt: skip
        self.tables["reduce"].append(Reduce(16, rows, 16, ENDS, head.ends[0], GRADIENT, b_out, divisor))
