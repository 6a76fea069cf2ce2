"""What `disc_head`'s programs do: a table for every launch, made once for the shapes. Legend: disc_head.py."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapm.kernels.runtime import processors

# Products: M N K of a tile, warps, stages, registers. LARGE, where its tiles would fill the chip twice, takes 96 KB of
# shared memory; its epilogue would like 168 registers, but with 128 two programs share a processor of sm_90.
LARGE = (128, 128, 64, 8, 3, 128)
SMALL = (64, 64, 64, 4, 4, None)
FP32 = (64, 64, 32, 4, 2, None)
PRECISION = "ieee"  # of fp32 products
LANES = 128  # channels of a strip: as many whole groups as fit
ROWS, STEP, WARPS = 128, 32, 4  # positions of a strip, and at a time in registers: 8 KB of half precision
CHUNK = 32  # rows of partial results that are read at a time


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


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _product(dtype: torch.dtype, device: torch.device, tiles: int, lengths: Sequence[int]) -> dict:
    """Constants of products over sums of these lengths; `tiles` is how many there are of the large ones."""
    half = LARGE if tiles >= 2 * processors(device) else SMALL
    m, n, k, warps, stages, registers = FP32 if dtype == torch.float32 else half
    constants = {"M": m, "N": n, "K": k, "EVEN": all(length % k == 0 for length in lengths), "PRECISION": PRECISION}
    return constants | {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


@functools.cache
def plan(
    taps: tuple[Tap, ...], J: int, sides: tuple[int, ...], row: int, dtype: torch.dtype, device: torch.device
) -> Plan:
    """`row`: numbers of a discriminator. Kept for ever, as captured graphs read the tables.

    Copies from the host, so not inside a capture: run the step once before, with the same shapes.
    """
    T, S, images = len(taps), len(sides), 2 * J  # image i is fake where i < J; chain `images` is the generator's
    chains = [0, images, *range(1, images)]  # two go through image 0: side by side, for the cache
    large = [-(-tap.C // LARGE[1]) for tap in taps]
    tiles = S * images * sum(n * -(-tap.P // LARGE[0]) for n, tap in zip(large, taps, strict=True))
    conv = _product(dtype, device, tiles, [tap.C for tap in taps])
    weight = _product(dtype, device, 2 * S * sum(n * n for n in large), [J * tap.P for tap in taps])
    M, N = conv["M"], conv["N"]
    strips = [-(-tap.P // ROWS) for tap in taps]
    tables: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    lanes, groups, blocks = LANES, 1, 1

    def take(buffer: str, count: int, size: int) -> list[int]:
        """Room for `count` images or chains, from a multiple of 16 on: the offset of each."""
        first = sizes[buffer]
        sizes[buffer] += -(-count * size // 16) * 16
        return [first + i * size for i in range(count)]

    for t in sorted(range(T), key=lambda t: -taps[t].C):  # the longest sums first
        C, P, start, pitch, kinds = taps[t]
        width = C // math.gcd(32, C)
        unit = math.lcm(width, 8)
        span = max(1, LANES // unit) * unit
        firsts, n_tiles, m_tiles = range(0, C, span), range(0, C, N), range(0, P, M)
        lanes, groups = max(lanes, _power_of_two(span)), max(groups, _power_of_two(span // width))
        blocks = max(blocks, _power_of_two(len(firsts)))
        strip = [(C, P, c, min(span, C - c), width, r) for c in firsts for r in range(0, P, ROWS)]
        layers, generator = [side * row + start for side in sides], []
        for s, (side, layer) in enumerate(zip(sides, layers, strict=True)):
            second = layer + C * C + 3 * C  # a layer: matrix, bias, gamma, beta; behind the second w_out, b_out
            bias1, bias2 = layer + C * C, second + C * C
            x = [i % J * P * pitch + (i >= J) * (1 + side) * kinds for i in range(images)]
            maps, stats = take("maps", images, P * C), take("stats", images, 2 * C)
            partial, shares = take("partial", images, len(m_tiles) * 2 * C), take("shares", images, len(firsts) * P)
            d, dlogit = take("d", images + 1, P * C), take("dlogit", images + 1, P)
            sums, bias = take("sums", images + 1, strips[t] * 3 * C), take("bias", images + 1, strips[t] * C)
            ends = take("ends", images + 1, strips[t] * 16)
            # a side's terms of the losses: of all taps the discriminator's, then of all taps the generator's
            term, before = s * (images + 1) * sum(strips), sum(strips[:t])
            terms = [term + images * before + i * strips[t] for i in range(images)]
            terms.append(term + images * sum(strips) + before)
            logits = images * (S * sum(tap.P for tap in taps[:t]) + s * P)
            generator.append(d[images])

            tables["conv"] += [
                (C, min(M, P - m), n, pitch, 1 + t, x[i] + m * pitch, layer, maps[i] + m * C,
                 partial[i] + m // M * 2 * C)
                for n in n_tiles for i in range(images) for m in m_tiles
            ]  # fmt: skip
            tables["activate"] += [
                (*place, maps[i], layer, partial[i], stats[i], shares[i] + place[2] // span * P)
                for place in strip for i in range(images)
            ]  # fmt: skip
            tables["chain"] += [
                (*place, maps[c % images], layer, d[c], stats[c % images], shares[c % images], dlogit[c],
                 2 if c == images else int(c >= J), s, len(firsts), sums[c], bias[c], ends[c], terms[c],
                 T * P * (1 if c == images else J), logits + c * P)
                for place in strip for c in chains
            ]  # fmt: skip
            tables["hidden"] += [
                (C, min(M, P - m), n, 0, d[c] + m * C, d[c] + m * C, 0, 1, second)
                for n in n_tiles for c in chains for m in m_tiles
            ]  # fmt: skip
            operands = [
                (0, maps[0], C, J * P * C, d[0], second),  # a1 with dh2
                (1 + t, 0, pitch, (1 + side) * kinds, d[0], layer),  # x with dh1
            ]
            tables["weight"] += [
                (C, J * P, m, n, *operand, T * J * P)
                for operand in operands for m in range(0, C, weight["M"]) for n in range(0, C, weight["N"])
            ]  # fmt: skip
            vectors = [  # a partial result, its offset, numbers in a row of it, and where the sum of its rows goes
                (0, sums[0], 3 * C, bias1 + 2 * C), (0, sums[0] + C, 3 * C, bias1 + C), (1, bias[0], C, bias1),
                (2, sums[0], 3 * C, bias2 + 2 * C), (2, sums[0] + C, 3 * C, bias2 + C), (3, bias[0], C, bias2),
                (2, sums[0] + 2 * C, 3 * C, bias2 + 3 * C),
            ]  # fmt: skip
            tables["reduce"] += [
                (min(LANES, C - c), images * strips[t], stride, source, at + c, 0, out + c, T * J * P)
                for source, at, stride, out in vectors for c in range(0, C, LANES)
            ]  # fmt: skip
            tables["reduce"].append((16, images * strips[t], 16, 4, ends[0], 0, bias2 + 4 * C, T * J * P))
        tables["feature"] += [
            (C, min(M, P - m), n, t, m * C, generator[0] + m * C, generator[-1] - generator[0], T * P, *layers)
            for n in n_tiles for m in m_tiles
        ]  # fmt: skip
    for s in range(S):
        first, middle = s * (images + 1) * sum(strips), (s * (images + 1) + images) * sum(strips)
        tables["reduce"].append((1, images * sum(strips), 1, 5, first, 1, S + s, 1))
        tables["reduce"].append((1, sum(strips), 1, 5, middle, 1, s, 1))
    sizes["losses"], sizes["logits"] = S * (images + 1) * sum(strips), S * images * sum(tap.P for tap in taps)
    tables["weight"].sort(key=lambda work: -work[1])  # the longest sums first
    on_device = {name: torch.tensor(rows, dtype=torch.int64, device=device) for name, rows in tables.items()}
    constants = {"LANES": lanes, "GROUPS": groups, "ROWS": ROWS, "STEP": STEP, "num_warps": WARPS}
    return Plan(on_device, dict(sizes), conv, weight, constants, blocks)
