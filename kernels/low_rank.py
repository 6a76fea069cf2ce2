"""What lora_linear and lora_conv share: products with a matrix of few columns, and updates by one of few rows.

rows: t = x a and y = [bias] + t b in one launch: the pass over x that t needs, and a write of y. Each program has all K
of some rows, and a share of the columns of y.
sums: g^T x and dy^T h, the low-rank weights' gradients: each program has some columns of x or dy and all rows, or part
of them, and then a second launch adds up the parts, in fp32 and in a fixed order. With ranks of 1 these are products of
vectors, else tensor cores at 16 columns and more.

Several layers may share x: their groups of t's columns, R each, belong to equal parts of y's. Then the matrix on the
side of y is block diagonal, and only its blocks are in memory, below one another.

Shapes: M rows, K and N columns, R rank in all, RANK that of a group; x: M K, a: K R, b: R N, y: M N, t, g and h: M R.
A grouped a is K RANK, a grouped b RANK N; SEG columns of the long side belong to a group, 0 where there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapm.kernels.runtime import jit, processors, tl, triton

RANKS = 16  # above, cuBLAS is faster
COLUMNS, PARTS, WAVES = 64, 64, 2  # of `sums`: columns of a program, parts of the rows at most, programs a processor
LONGEST = 4096  # rows that a program of `sums` walks down at rank 1, where a second launch costs more than it saves
STAGES = 4  # tiles in flight: 64 KiB of shared memory at most


# Matrices are addressed as pointer + row * stride + column. Offsets into x, y, dy and dx are int64; those into the
# low-rank matrices, at most 128 columns wide, fit in 31 bits. A rank of 1 is BR = 1: products and sums of vectors.
@jit
def _project(
    x, exists, a, a_k, a_r, K, R, RANK, SEG: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows at x (BM 1 pointers) times a (K R): BM BR in fp32."""
    r = tl.arange(0, BR)[None, :]
    t = tl.zeros((BM, BK if BR == 1 else BR), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        tile = tl.load(x + k[None, :], mask=exists & (k < K)[None, :], other=0.0)
        if BR == 1:
            t += tile.to(tl.float32) * tl.load(a + k * a_k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        else:
            mask, column = (k < K)[:, None] & (r < R), r
            if SEG:
                mask, column = mask & (k[:, None] // SEG == r // RANK), r % RANK
            at = tl.load(a + k[:, None] * a_k + column * a_r, mask=mask, other=0.0)
            t = tl.dot(tile, at, t, input_precision="ieee")
    return tl.sum(t, axis=1, keep_dims=True) if BR == 1 else t


@jit
def update(
    t, b, b_r, b_n, bias, y, exists, begin, end, R, RANK, SEG: tl.constexpr,
    ADD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Columns begin..end of rows at y (BM 1 pointers) = [y if ADD] + [bias] + t b, for t (BM BR) and b (R N)."""
    r = tl.arange(0, BR)[:, None]
    for start in range(begin, end, BN):
        n = start + tl.arange(0, BN)[None, :]
        mask = exists & (n < end)
        mask_b, row = (r < R) & (n < end), r
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
    x, x_row, a, a_k, a_r, h, b, b_r, b_n, bias, y, M, K, N, R, RANK, SPAN, SEG_A: tl.constexpr, SEG_B: tl.constexpr,
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
    t, v, v_row, out, out_c, out_r, block, begin, end, C, R, RANK, SEG: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Columns of v (M C) from block * BC on: out[c, r] = sum over rows m in begin..end of v[m, c] t[m, r]."""
    c = block * BC + tl.arange(0, BC)
    r = tl.arange(0, BR)[None, :]
    total = tl.zeros((BM, BC) if BR == 1 else (BC, BR), tl.float32)
    for start in tl.range(begin, end, BM, num_stages=STAGES):
        m = start + tl.arange(0, BM)[:, None]
        vt = tl.load(v + m.to(tl.int64) * v_row + c[None, :], mask=(m < end) & (c < C)[None, :], other=0.0)
        if BR == 1:  # loaded as a vector: a column would be loaded once for each of a thread's columns of vt
            i = start + tl.arange(0, BM)
            total += vt.to(tl.float32) * tl.load(t + i, mask=i < end, other=0.0).to(tl.float32)[:, None]
        else:
            tt = tl.load(t + m * R + r, mask=(m < end) & (r < R), other=0.0)
            total = tl.dot(tl.trans(vt), tt, total, input_precision="ieee")
    if BR == 1:
        tl.store(out + c * out_c, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=c < C)
    else:
        mask, column = (c < C)[:, None] & (r < R), r
        if SEG:
            mask, column = mask & (c[:, None] // SEG == r // RANK), r % RANK
        tl.store(out + c[:, None] * out_c + column * out_r, total.to(out.dtype.element_ty), mask=mask)


@jit
def _sums_kernel(
    g, x, x_row, ddown, MX, ROWS_X, K, RG, h, dy, dy_row, dup, MY, ROWS_Y, N, RH, RANK, SEG: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ddown (RG K) = g^T x and dup (N RANK) = dy^T h over a part of the rows; the parts' results follow one another."""
    part = tl.program_id(1)
    block = tl.program_id(0)
    blocks = tl.cdiv(K, BC)
    if block < blocks:
        end = tl.minimum((part + 1) * ROWS_X, MX)
        _sums(g, x, x_row, ddown + part * RG * K, 1, K, block, part * ROWS_X, end, K, RG, RG, 0, BM, BC, BG, STAGES)
    else:
        end = tl.minimum((part + 1) * ROWS_Y, MY)
        dup += part * RANK * N
        begin = part * ROWS_Y
        _sums(h, dy, dy_row, dup, RANK, 1, block - blocks, begin, end, N, RH, RANK, SEG, BM, BC, BH, STAGES)


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


def small(rank: int) -> bool:
    """Whether these kernels beat cuBLAS at products of `rank`."""
    return rank <= RANKS


def width_of(rank: int) -> int:
    """Columns that a rank takes in a tile: tensor cores want 16."""
    return 1 if rank == 1 else max(16, triton.next_power_of_2(rank))


def tile_of(m: int, rank: int, x: Tensor, k: int | None = None) -> dict[str, int]:
    """Rows, columns read and columns written at a time, for a product of `rank` over m rows, and k columns if any."""
    width, size = width_of(rank), x.element_size()
    if width == 1:  # few or short rows: each of them whole
        tile = dict(BM=8, BK=1024 // size, BN=512) if m >= 2048 else dict(BM=2, BK=4096 // size, BN=1024)
        if m >= 2048 and k is not None and k * size <= 2048:
            tile = dict(BM=4, BK=2048 // size, BN=512)
        return dict(tile, num_warps=4)
    wide = 8192 // (width * size)  # 8 KiB of a or b in each stage, and at most 8 of the rows
    return dict(BM=16 if width == 16 else 32, BK=wide, BN=wide, num_warps=4)


def rows(
    x: Tensor, a: Tensor, b: Tensor | None = None, bias: Tensor | None = None, y: Tensor | None = None, *,
    groups_a: int = 1, groups_b: int = 1,
) -> Tensor:  # fmt: skip
    """h = x a for x (M K) and a (K R), and where y (M N, contiguous) is given, y = [bias] + h b (R N).

    With `groups_a`, a (K R/groups) are the blocks of a diagonal, and with `groups_b` b (R/groups N) are.
    """
    m, k, rank, n = *x.shape, a.shape[1] * groups_a, 0 if y is None else y.shape[1]
    tile = tile_of(m, rank, x, k)
    stages = STAGES if k > tile["BK"] else 1  # one tile waits for nothing: it needs no place in shared memory
    blocks = triton.cdiv(m, tile["BM"])
    # Programs that share rows each compute h: only as many as would be idle, and as y is worth
    share = max(1, min(processors(x.device) // blocks, 2 * n // k))
    span = triton.cdiv(triton.cdiv(max(n, 1), share), tile["BN"]) * tile["BN"]
    h = x.new_empty(m, rank)
    _rows_kernel[(blocks, triton.cdiv(max(n, 1), span))](
        x, x.stride(0), a, *a.stride(), h, b, *((0, 0) if b is None else b.stride()), bias, y, m, k, n, rank,
        rank // max(groups_a, groups_b), span, 0 if groups_a == 1 else k // groups_a,
        0 if groups_b == 1 else n // groups_b, BR=width_of(rank), STAGES=stages, **tile,
    )  # fmt: skip
    return h


def sums(
    g: Tensor | None, x: Tensor | None, h: Tensor | None, dy: Tensor | None, kernels: bool, groups: int = 1
) -> list[Tensor]:
    """g^T x for g (M R) and x (M K), unless x is None, and dy^T h for h (M' R') and dy (M' N), unless h is None.

    With `groups`, the second is that product's diagonal blocks, N R'/groups. By cuBLAS without `kernels`.
    """
    if x is None and h is None:
        return []
    if not kernels:
        out = [] if x is None else [g.t() @ x]
        if h is not None:
            out.append(dy.new_empty(dy.shape[1], h.shape[1] // groups))
            parts = dy.t().chunk(groups), h.chunk(groups, 1), out[-1].chunk(groups)
            for part, columns, place in zip(*parts, strict=True):
                torch.mm(part, columns, out=place)
        return out
    none = (g if h is None else h).new_empty(0, 0)
    (g, x), (h, dy) = (none, none) if x is None else (g, x), (none, none) if h is None else (h, dy)
    widths = width_of(g.shape[1]), width_of(h.shape[1])
    longest, columns = max(len(x), len(dy)), COLUMNS
    if max(widths) == 1:  # few bytes a row rather than few rows: one launch
        while columns > 16 and x.shape[1] + dy.shape[1] < columns * processors(x.device):
            columns //= 2
        tile = dict(BM=16384 // (x.element_size() * columns), BC=columns, num_warps=8)
        wanted = triton.cdiv(longest, LONGEST)
    else:
        tile = dict(BM=8192 // (x.element_size() * max(columns, *widths)), BC=columns, num_warps=4)
        wanted = triton.cdiv(WAVES * processors(x.device) * columns, x.shape[1] + dy.shape[1])
    blocks = triton.cdiv(x.shape[1], columns) + triton.cdiv(dy.shape[1], columns)
    parts = max(1, min(PARTS, triton.cdiv(longest, tile["BM"]), wanted))
    rank = h.shape[1] // groups
    out = found = [x.new_empty(g.shape[1], x.shape[1]), x.new_empty(dy.shape[1], rank)]
    if parts > 1:
        found = [o.new_empty(parts, *o.shape, dtype=torch.float32) for o in out]
    args = []
    for t, v, o in zip((g, h), (x, dy), found, strict=True):
        args += [t, v, v.stride(0), o, len(v), triton.cdiv(len(v), parts), v.shape[1], t.shape[1]]
    seg = 0 if groups == 1 else dy.shape[1] // groups
    stages = min(STAGES, triton.cdiv(triton.cdiv(longest, parts), tile["BM"]))
    _sums_kernel[(blocks, parts)](*args, rank, seg, BG=widths[0], BH=widths[1], STAGES=stages, **tile)
    if parts > 1:
        sizes, pad = [o.numel() for o in out], triton.next_power_of_2(parts)
        grid = (triton.cdiv(sum(sizes), 4096 // pad),)
        _total_kernel[grid](found[0], out[0], found[1], out[1], *sizes, parts, PAD=pad, BLOCK=4096 // pad)
    return [o for o in out if o.numel()]
