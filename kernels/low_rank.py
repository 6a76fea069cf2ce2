"""What lora_linear and lora_conv share: products with a matrix of few columns, and updates by one of few rows.

rows: t = x a and y = [bias] + t b in one launch: the pass over x that t needs, and a write of y. Each program has all K
of some rows, and a share of the columns of y.
sums: g^T x and dy^T h, the low-rank weights' gradients: each program has some columns of x or dy and all rows, or part
of them, and then a second launch adds up the parts, in fp32 and in a fixed order. With ranks of 1 these are products of
vectors, else tensor cores at 16 columns and more; a program of `sums` has no more than a group's columns of t.

Several layers may share x: their groups of t's columns, R each, belong to equal parts of y's. Then the matrix on the
side of y is block diagonal, and only its blocks are in memory, below one another.

Shapes: M rows, K and N columns, R rank in all, RANK that of a group; x: M K, a: K R, b: R N, y: M N, t, g and h: M R.
A grouped a is K RANK, a grouped b RANK N; SEG columns of the long side belong to a group, 0 where there are none, or NG
of dy's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rapm.kernels.runtime import jit, multiplies, processors, tl, triton

RANKS, SUM_RANKS = 16, 64  # of `rows`, in all, and of `sums`, a group's: above, cuBLAS is faster
STAGES = 4  # tiles of `rows` in flight: 72 KiB of shared memory at most
PARTS = 64  # of the rows that `sums` adds up, at most
LONG = 2048  # rows above which programs for two waves are worth its second launch


class Summing(NamedTuple):
    """How `sums` goes about it: a program's columns, a tile's bytes, tiles in flight; rows of one of several parts."""

    columns: int
    size: int
    stages: int
    shortest: int


VECTORS, MATRICES = Summing(32, 32768, 2, 1024), Summing(64, 8192, 4, 320)


# Matrices are addressed as pointer + row * stride + column. Offsets into x, y, dy and dx are int64; those into the
# low-rank matrices, a few hundred columns wide, fit in 31 bits. A rank of 1 is BR = 1: products and sums of vectors.
@jit
def columns(R: tl.constexpr, BR: tl.constexpr):
    """A low-rank matrix's, to be loaded: by four, unless all are there; by eight rank 8 takes 1.1 to 1.4 times."""
    r = tl.arange(0, BR)
    return r if R % 16 == 0 or BR == 1 else tl.max_contiguous(r, 4)


@jit
def _project(
    x, exists, a, a_k, a_r, K, R: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows at x (BM 1 pointers) times a (K R): BM BR in fp32."""
    r, columns_of_a = tl.arange(0, BR)[None, :], columns(R, BR)[None, :]
    t = tl.zeros((BM, BK if BR == 1 else BR), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        tile = tl.load(x + k[None, :], mask=exists & (k < K)[None, :], other=0.0)
        if BR == 1:
            t += tile.to(tl.float32) * tl.load(a + k * a_k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        else:
            mask, column = (k < K)[:, None] & (r < R), columns_of_a
            if SEG:
                mask, column = mask & (k[:, None] // SEG == r // RANK), r % RANK
            at = tl.load(a + k[:, None] * a_k + column * a_r, mask=mask, other=0.0)
            t = tl.dot(tile, at, t, input_precision="ieee")
    return tl.sum(t, axis=1, keep_dims=True) if BR == 1 else t


@jit
def update(
    t, b, b_r, b_n, bias, y, exists, begin, end, R: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr,
    ADD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Columns begin..end of rows at y (BM 1 pointers) = [y if ADD] + [bias] + t b, for t (BM BR) and b (R N)."""
    r, rows_of_b = tl.arange(0, BR)[:, None], columns(R, BR)[:, None]
    for start in range(begin, end, BN):
        n = start + tl.arange(0, BN)[None, :]
        mask = exists & (n < end)
        mask_b, row = (r < R) & (n < end), rows_of_b
        if SEG:
            mask_b, row = mask_b & (n // SEG == r // RANK), r % RANK
        bt = tl.load(b + row * b_r + n * b_n, mask=mask_b, other=0.0)
        if BR == 1:
            tile = t.to(tl.float32) * bt.to(tl.float32)
        else:
            tile = tl.dot(t, bt, input_precision="ieee")
        if bias is not None:
            tile += tl.load(bias + n, mask=n < end, other=0.0).to(tl.float32)
        if ADD:
            tile += tl.load(y + n, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + n, tile.to(y.dtype.element_ty), mask=mask)


@jit
def _rows_kernel(
    x, x_row, a, a_k, a_r, h, b, b_r, b_n, bias, y, M, K, N, SPAN,
    R: tl.constexpr, RANK: tl.constexpr, SEG_A: tl.constexpr, SEG_B: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h = x a, and y (M N) = [bias] + h b. A program has BM rows and SPAN columns of y: the first of a row stores h."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    exists = m < M
    x += m.to(tl.int64) * x_row
    t = _project(x, exists, a, a_k, a_r, K, R, RANK, SEG_A, BM, BK, BR, STAGES).to(h.dtype.element_ty)
    r = tl.arange(0, BR)[None, :]
    tl.store(h + m * R + r, t, mask=exists & (r < R) & (tl.program_id(1) == 0))
    begin = tl.program_id(1) * SPAN
    if y is not None:
        end = tl.minimum(begin + SPAN, N)
        update(t, b, b_r, b_n, bias, y + m.to(tl.int64) * N, exists, begin, end, R, RANK, SEG_B, False, BN, BR)


@jit
def _sums(
    t, t_row: tl.constexpr, v, v_row, out, out_c, out_r, c, last, R, begin, end,
    BM: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[c, r] = the sum over rows m in begin..end of v[m, c] t[m, r], for columns c below `last` and r below R."""
    r = columns(t_row, BR)
    total = tl.zeros((BM, c.shape[0]) if BR == 1 else (c.shape[0], BR), tl.float32)
    for start in tl.range(begin, end, BM, num_stages=STAGES):
        m = start + tl.arange(0, BM)[:, None]
        vt = tl.load(v + m.to(tl.int64) * v_row + c[None, :], mask=(m < end) & (c < last)[None, :], other=0.0)
        if BR == 1:  # loaded as a vector: a column would be loaded once for each of a thread's columns of vt
            i = start + tl.arange(0, BM)
            total += vt.to(tl.float32) * tl.load(t + i * t_row, mask=i < end, other=0.0).to(tl.float32)[:, None]
        else:
            tt = tl.load(t + m * t_row + r[None, :], mask=(m < end) & (r < R)[None, :], other=0.0)
            total = tl.dot(tl.trans(vt), tt, total, input_precision="ieee")
    if BR == 1:
        tl.store(out + c * out_c, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=c < last)
    else:
        at = out + c[:, None] * out_c + r[None, :] * out_r
        tl.store(at, total.to(out.dtype.element_ty), mask=(c < last)[:, None] & (r < R)[None, :])


@jit
def _sums_kernel(
    g, x, x_row, ddown, MX, ROWS_X, K, h, dy, dy_row, dup, MY, ROWS_Y, N, NG,
    RG: tl.constexpr, RH: tl.constexpr, RANK: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ddown (RG K) = g^T x and dup (N RANK) = dy^T h over a part of the rows; the parts' results follow one another."""
    place, part, chunks = tl.program_id(0), tl.program_id(1), tl.cdiv(RG, BG)
    mine = tl.cdiv(K, BC) * chunks
    if place < mine:
        c, first = place // chunks * BC + tl.arange(0, BC), place % chunks * BG
        begin, end = part * ROWS_X, tl.minimum((part + 1) * ROWS_X, MX)
        ddown += part * RG * K + first * K
        _sums(g + first, RG, x, x_row, ddown, 1, K, c, K, RG - first, begin, end, BM, BG, STAGES)
    else:
        group, block = (place - mine) // tl.cdiv(NG, BC), (place - mine) % tl.cdiv(NG, BC)
        c, last = group * NG + block * BC + tl.arange(0, BC), (group + 1) * NG
        begin, end = part * ROWS_Y, tl.minimum((part + 1) * ROWS_Y, MY)
        dup += part * RANK * N
        _sums(h + group * RANK, RH, dy, dy_row, dup, RANK, 1, c, last, RANK, begin, end, BM, BH, STAGES)


@jit
def _total_kernel(parts_a, a, parts_b, b, A, B, PARTS, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """a (A) = the sum of parts_a (PARTS A) over its first dimension, and b likewise."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = i - A
    part = tl.arange(0, PAD)[:, None]
    total_a = tl.sum(tl.load(parts_a + part * A + i, mask=(part < PARTS) & (i < A), other=0.0), axis=0)
    total_b = tl.sum(tl.load(parts_b + part * B + j, mask=(part < PARTS) & (j >= 0) & (j < B), other=0.0), axis=0)
    tl.store(a + i, total_a.to(a.dtype.element_ty), mask=i < A)
    tl.store(b + j, total_b.to(b.dtype.element_ty), mask=(j >= 0) & (j < B))


def matrix(x: Tensor) -> Tensor:
    """x as rows (M, last dimension), each contiguous: a view wherever its strides allow one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def strides(x: Tensor) -> list[int | tl.constexpr]:
    """Those of a low-rank matrix; its rank as a constant: rows of 4 columns are loaded whole where it is known."""
    return [tl.constexpr(stride) if stride == min(x.shape) else stride for stride in x.stride()]


def small(x: Tensor, rank: int, most: int | None = None) -> bool:
    """Whether kernels beat cuBLAS at products of x with a `rank` up to `most` (RANKS): not without tensor cores."""
    return rank == 1 or (rank <= (RANKS if most is None else most) and multiplies(x))


def width_of(rank: int) -> int:
    """Columns that a rank takes in a tile: tensor cores want 16."""
    return 1 if rank <= 1 else max(16, triton.next_power_of_2(rank))


def _groups(x: Tensor, count: int) -> Tensor:
    """The `count` groups of columns of x (M, count C): count M C, a view."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def blocks(x: Tensor, a: Tensor, count: int, along: int) -> Tensor:
    """x times the block diagonal matrix whose `count` blocks lie in a along its first or its second dimension."""
    if count == 1:
        return x @ a
    parts = _groups(a, count) if along else a.unflatten(0, (count, -1))
    y = x.new_empty(len(x), count * parts.shape[2])
    torch.bmm(_groups(x, count), parts, out=_groups(y, count))  # where it belongs: no copy joins them
    return y


def tile_of(m: int, rank: int, x: Tensor, k: int = 0, n: int = 0) -> dict[str, int]:
    """Rows, columns read and columns written at a time, for an update of `rank` over m rows; `rows` has k and n too."""
    width, size = width_of(rank), x.element_size()
    if width == 1:  # few or short rows: each of them whole
        tile = dict(BM=8, BK=1024 // size, BN=512) if m >= 2048 else dict(BM=2, BK=4096 // size, BN=1024)
        if m >= 2048 and 0 < k * size <= 2048:
            tile = dict(BM=4, BK=2048 // size, BN=512)
        return dict(tile, num_warps=4)
    wide = 8192 // (width * size)  # 8 KiB of a or b in each stage, and at most 16 of the rows
    if n and width == 16:
        return dict(BM=32, BK=(512 if k > 2048 else 256) // size, BN=wide, num_warps=4)
    return dict(BM=16 if width == 16 else 32, BK=wide, BN=wide, num_warps=4)


def rows(
    x: Tensor, a: Tensor, b: Tensor | None = None, bias: Tensor | None = None, y: Tensor | None = None, *,
    groups_a: int = 1, groups_b: int = 1,
) -> Tensor:  # fmt: skip
    """h = x a for x (M K) and a (K R), and where y (M N, contiguous) is given, y = [bias] + h b (R N).

    With `groups_a`, a (K R/groups) are the blocks of a diagonal, and with `groups_b` b (R/groups N) are.
    """
    m, k, rank, n = *x.shape, a.shape[1] * groups_a, 0 if y is None else y.shape[1]
    tile = tile_of(m, rank, x, k, n)
    stages = STAGES if k > tile["BK"] else 1  # one tile waits for nothing: it needs no place in shared memory
    count = triton.cdiv(m, tile["BM"])
    # Programs that share rows each compute h: as many as would be idle, or as a wide y is worth where the card has room
    share = processors(x.device) // count
    if rank == 1:
        share = min(share, 2 * n // k)
    elif share:
        share = max(share * (1 + (n >= 8 * k)), n // (2 * k))
    share = max(1, share)
    span = triton.cdiv(triton.cdiv(max(n, 1), share), tile["BN"]) * tile["BN"]
    h = x.new_empty(m, rank)
    _rows_kernel[(count, triton.cdiv(max(n, 1), span))](
        x, x.stride(0), a, *strides(a), h, b, *((0, 0) if b is None else strides(b)), bias, y, m, k, n, span,
        R=rank, RANK=rank // max(groups_a, groups_b), SEG_A=0 if groups_a == 1 else k // groups_a,
        SEG_B=0 if groups_b == 1 else n // groups_b, BR=width_of(rank), STAGES=stages, **tile,
    )  # fmt: skip
    return h


def sums(
    g: Tensor | None, x: Tensor | None, h: Tensor | None, dy: Tensor | None, *, groups: int = 1, kernels: bool = True
) -> list[Tensor]:  # fmt: skip
    """g^T x for g (M R) and x (M K), unless x is None, and dy^T h for h (M' R') and dy (M' N), unless h is None.

    With `groups`, the second is that product's diagonal blocks, N R'/groups. By cuBLAS without `kernels`, and where it
    is faster.
    """
    if x is None and h is None:
        return []
    given = next(t for t in (x, dy) if t is not None)
    most = RANKS if given.dtype == torch.float32 else SUM_RANKS  # of fp32 there are no tensor cores
    if not kernels or not all(small(given, t.shape[1] // groups, most) for t in (g, h) if t is not None):
        out = [] if x is None else [g.t() @ x]
        if h is not None:
            out.append(torch.bmm(_groups(dy, groups).transpose(1, 2), _groups(h, groups)).flatten(0, 1))
        return out
    none = (g if h is None else h).new_empty(0, 0)
    (g, x), (h, dy) = (none, none) if x is None else (g, x), (none, none) if h is None else (h, dy)
    rank, length, longest = h.shape[1] // groups, dy.shape[1] // groups, max(len(x), len(dy))
    widths = width_of(g.shape[1] // groups), width_of(rank)
    chunks = triton.cdiv(g.shape[1], widths[0])  # of g's columns
    columns, size, stages, shortest = VECTORS if max(widths) == 1 else MATRICES
    deep = size // (x.element_size() * columns)
    count = chunks * triton.cdiv(x.shape[1], columns) + groups * triton.cdiv(length, columns)
    wanted = (1 + (longest > LONG)) * processors(x.device) // count
    parts = max(1, min(PARTS, longest // shortest, wanted))
    out = found = [x.new_empty(g.shape[1], x.shape[1]), x.new_empty(dy.shape[1], rank)]
    if parts > 1:
        found = [o.new_empty(parts, *o.shape, dtype=torch.float32) for o in out]
    args = []
    for t, v, o in zip((g, h), (x, dy), found, strict=True):
        args += [t, v, v.stride(0), o, len(v), triton.cdiv(len(v), parts), v.shape[1]]
    _sums_kernel[(count, parts)](
        *args, length, RG=g.shape[1], RH=h.shape[1], RANK=rank, BM=deep, BC=columns, BG=widths[0], BH=widths[1],
        STAGES=min(stages, triton.cdiv(triton.cdiv(longest, parts), deep)), num_warps=4,
    )  # fmt: skip
    if parts > 1:
        sizes, pad = [o.numel() for o in out], triton.next_power_of_2(parts)
        grid = (triton.cdiv(sum(sizes), 4096 // pad),)
        _total_kernel[grid](found[0], out[0], found[1], out[1], *sizes, parts, PAD=pad, BLOCK=4096 // pad)
    return [o for o in out if o.numel()]
