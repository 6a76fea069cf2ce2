"""Kernels of `disc_head` up to the logits, and what all of its kernels share. Legend and launches: disc_head.py.

Every program finds its work in a row of an int64 table (disc_head_plan.py): sizes, and offsets in elements. `_offset`
reads those that are multiples of 16, as 16-byte loads want. Offsets inside the maps of one kind and tap are int32:
J H W C < 2^31.
"""

from __future__ import annotations

from rapm.kernels.disc_head_plan import (
    ACTIVATE_PARTIAL,
    CONV_C,
    CONV_H,
    CONV_HEAD,
    CONV_N0,
    CONV_PARTIAL,
    CONV_PITCH,
    CONV_ROWS,
    CONV_SOURCE,
    CONV_X,
    STRIP_C,
    STRIP_C0,
    STRIP_HEAD,
    STRIP_MAP,
    STRIP_P,
    STRIP_R0,
    STRIP_SHARES,
    STRIP_SPAN,
    STRIP_STATS,
    STRIP_WIDTH,
    parameters,
)
from rapm.kernels.runtime import jit, tl

_parameters = jit(parameters)


@jit
def _size(row, column, unit: tl.constexpr):
    """A size in a row of a table, known to be a multiple of `unit`."""
    return tl.multiple_of(tl.load(row + column), unit).to(tl.int32)


@jit
def _offset(row, column):
    return tl.multiple_of(tl.load(row + column), 16)


@jit
def _pick(values, i):
    """values[i] of a tuple of pointers or numbers, i known at run time."""
    chosen = values[0]
    for k in tl.static_range(1, len(values)):
        if i == k:
            chosen = values[k]
    return chosen


@jit
def _leaky(y, x):
    """x times LeakyReLU's slope at y: with x = y the activation, else the chain rule. NaN stays NaN."""
    return tl.where(y > 0, x, 0.2 * x)


@jit
def _group_sum(v, member):
    """For each lane the sum of v over its group, where `member` (groups lanes) says: widths are no power of two."""
    total = tl.sum(tl.where(member, v[None, :], 0.0), axis=1)
    return tl.sum(tl.where(member, total[:, None], 0.0), axis=0)


@jit
def _strip(row, LANES: tl.constexpr, GROUPS: tl.constexpr):
    """A strip: C, P, its first position; each lane's channel, whether it exists, its group; the groups' width."""
    C, c0, span = _size(row, STRIP_C, 16), _size(row, STRIP_C0, 8), _size(row, STRIP_SPAN, 8)
    P, width, r0 = _size(row, STRIP_P, 1), _size(row, STRIP_WIDTH, 1), _size(row, STRIP_R0, 1)
    lane = tl.arange(0, LANES)
    member = (lane // width)[None, :] == tl.arange(0, GROUPS)[:, None]  # lanes past the span are in groups of their own
    return C, P, r0, c0 + lane, lane < span, member, width


@jit
def _multiply(acc, a, b, step, columns, C, K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """acc + A B over C in steps of K: pointers a (M K), b (K N) with rows `step` apart, of which `columns` exist."""
    k = tl.arange(0, K)
    for start in range(0, C, K):
        if EVEN:
            left = tl.load(a)
            right = tl.load(b, mask=columns[None, :], other=0.0)
        else:
            inside = start + k < C
            left = tl.load(a, mask=inside[None, :], other=0.0)
            right = tl.load(b, mask=inside[:, None] & columns[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a += K
        b += K * step
    return acc


@jit
def _conv_kernel(
    sources, weights, matrices, h, partial, table,
    COLUMNS: tl.constexpr, SECOND: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h = x W^T + b, M rows by N channels of a map, and for each channel the rows' mean and squared deviations."""
    row = table + tl.program_id(0) * COLUMNS
    C, rows, n0 = _size(row, CONV_C, 16), _size(row, CONV_ROWS, 1), _size(row, CONV_N0, 16)
    matrix, bias, _, _, _, _ = _parameters(_offset(row, CONV_HEAD), C, SECOND)
    out = _offset(row, CONV_H)
    if SECOND:  # the input is a1, laid out as h is
        x = sources[0] + out
        pitch = C
    else:
        x = _pick(sources, tl.load(row + CONV_SOURCE)) + _offset(row, CONV_X)
        pitch = _size(row, CONV_PITCH, 16)
    m, n, k = tl.arange(0, M), n0 + tl.arange(0, N), tl.arange(0, K)
    columns, valid = n < C, m < rows
    a = x + tl.minimum(m, rows - 1)[:, None] * pitch + k[None, :]
    b = matrices + matrix + n[None, :] * C + k[:, None]
    acc = _multiply(tl.zeros([M, N], tl.float32), a, b, 1, columns, C, K, EVEN, PRECISION)
    acc += tl.load(weights + bias + n, mask=columns, other=0.0)[None, :]
    mean = tl.sum(tl.where(valid[:, None], acc, 0.0), axis=0) / rows
    deviation = tl.where(valid[:, None], acc - mean[None, :], 0.0)
    partial += _offset(row, CONV_PARTIAL)
    tl.store(partial + n, mean, mask=columns)
    tl.store(partial + C + n, tl.sum(deviation * deviation, axis=0), mask=columns)
    at = h + out + m[:, None] * C + n[None, :]
    tl.store(at, acc.to(h.dtype.element_ty), mask=valid[:, None] & columns[None, :])


@jit
def _statistics(partial, C, P, c, inside, member, width, M: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and 1 / sigma of each lane's group, from tiles of M rows (Chan et al. 1979), CHUNK tiles at a time."""
    total = tl.zeros_like(c).to(tl.float32)
    for start in range(0, tl.cdiv(P, M), CHUNK):
        i = start + tl.arange(0, CHUNK)
        n = tl.minimum(tl.maximum(P - i * M, 0), M).to(tl.float32)[:, None]
        at = partial + i[:, None] * 2 * C + c[None, :]
        total += tl.sum(n * tl.load(at, mask=(n > 0) & inside[None, :], other=0.0), axis=0)
    count = (P * width).to(tl.float32)
    mean = _group_sum(total, member) / count
    square = tl.zeros_like(total)
    for start in range(0, tl.cdiv(P, M), CHUNK):
        i = start + tl.arange(0, CHUNK)
        n = tl.minimum(tl.maximum(P - i * M, 0), M).to(tl.float32)[:, None]
        at, mask = partial + i[:, None] * 2 * C + c[None, :], (n > 0) & inside[None, :]
        delta = tl.load(at, mask=mask, other=0.0) - mean[None, :]
        square += tl.sum(tl.load(at + C, mask=mask, other=0.0) + n * delta * delta, axis=0)
    return mean, tl.rsqrt(_group_sum(square, member) / count + 1e-5)


@jit
def _activate_kernel(
    weights, h, partial, a1, partial_logits, stats, table,
    COLUMNS: tl.constexpr, SECOND: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """GroupNorm and LeakyReLU of a strip. Layer 1: a1. Layer 2: the strip's share of the logits, a2 . w_out."""
    row = table + tl.program_id(0) * COLUMNS
    C, P, r0, c, inside, member, width = _strip(row, LANES, GROUPS)
    _, _, gamma, beta, w_out, _ = _parameters(_offset(row, STRIP_HEAD), C, SECOND)
    at, stat = _offset(row, STRIP_MAP), stats + _offset(row, STRIP_STATS)
    mean, rstd = _statistics(partial + _offset(row, ACTIVATE_PARTIAL), C, P, c, inside, member, width, M, CHUNK)
    tl.store(stat + c, mean, mask=inside & (r0 == 0))
    tl.store(stat + C + c, rstd, mask=inside & (r0 == 0))
    if SECOND:
        w_out = tl.load(weights + w_out + c, mask=inside, other=0.0)
    gamma = tl.load(weights + gamma + c, mask=inside, other=0.0)
    beta = tl.load(weights + beta + c, mask=inside, other=0.0)
    for start in range(r0, tl.minimum(r0 + ROWS, P), STEP):
        r = start + tl.arange(0, STEP)
        tile, mask = at + r[:, None] * C + c[None, :], (r < P)[:, None] & inside[None, :]
        y = (tl.load(h + tile, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * (rstd * gamma)[None, :]
        y += beta[None, :]
        a = _leaky(y, y)
        if SECOND:
            a += tl.load(a1 + tile, mask=mask, other=0.0).to(tl.float32)
            share = tl.sum(tl.where(mask, a * w_out[None, :], 0.0), axis=1)
            tl.store(partial_logits + tl.load(row + STRIP_SHARES) + r, share, mask=r < P)
        else:
            tl.store(a1 + tile, a.to(a1.dtype.element_ty), mask=mask)
