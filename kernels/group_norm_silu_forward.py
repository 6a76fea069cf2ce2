"""Forward kernels of group_norm_silu: see there."""

from __future__ import annotations

from rapm.kernels.group_norm_silu_tiles import across, act, add3, affine, load, owned, place, sums_of_runs, wide
from rapm.kernels.runtime import jit, tl


@jit
def _value(x, residual, at_x, at_residual, add, mask):
    """Numbers of x, or where there is a residual of v, as it is rounded."""
    z = load(x + at_x, mask)
    if residual is not None:
        z = (z + add + load(residual + at_residual, mask)).to(x.dtype.element_ty).to(tl.float32)
    return z


@jit
def _statistics_kernel(
    x, x_row, x_batch, residual, r_row, r_batch, shift, v, partial, positions, splits, span, C: tl.constexpr,
    WIDTH: tl.constexpr, OWN: tl.constexpr, OWN_PAD: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """mean and M2 of each group over a run, and v where there is a residual.

    Squares are of distances to the channel's first number in the run, then to the group's: a mean far from 0 costs
    nothing. A first number of d deviations costs some d^2 roundoffs.
    """
    c, in_c, group, in_g = place(C, WIDTH, OWN, OWN_PAD, TILE)
    b, start = tl.program_id(2).to(tl.int64), tl.program_id(1) * span  # int64 to a run's corner, int32 inside
    lane, k, in_k, column = across(c, in_c, LANES)
    count = tl.minimum(span, positions - start)
    x += b * x_batch + start.to(tl.int64) * x_row
    if residual is not None:
        residual += b * r_batch + start.to(tl.int64) * r_row
        v += (b * positions + start) * C
    add, add_c, add_g = 0.0, 0.0, 0.0
    if shift is not None:
        shift += b * C
        add, add_c = load(shift + column, in_k), load(shift + c, in_c)
        add_g = load(shift + group * WIDTH, in_g)
    pivot = _value(x, residual, column, column, add, in_k)
    origin = _value(x, residual, group * WIDTH, group * WIDTH, add_g, in_g)
    s, q = tl.zeros((LANES, TILE), tl.float32), tl.zeros((LANES, TILE), tl.float32)
    for i in tl.range(0, count, ROWS, num_stages=STAGES):
        for j in tl.static_range(0, ROWS, LANES):
            r = i + j + lane
            mask = in_k if EVEN else (r < count) & in_k
            z = _value(x, residual, r * x_row + k, r * r_row + k, add, mask)
            if residual is not None:
                tl.store(v + (r * C + k), z, mask=mask)
            z -= pivot
            if not EVEN:
                z = tl.where(mask, z, 0.0)
            s += z
            q += z * z
    n = count.to(tl.float32)
    s, q, pivot = tl.reduce((s, q, tl.where(lane == 0, pivot, 0.0)), 0, add3)
    mean = pivot + s / n
    if residual is None:
        mean += add_c
        origin += add_g
    own = owned(TILE, WIDTH, OWN_PAD)
    e, m2 = mean[None, :] - origin[:, None], (q - s * s / n)[None, :]
    e, m2, square = tl.where(own, e, 0.0), tl.where(own, m2, 0.0), tl.where(own, e * e, 0.0)
    e, m2, square = tl.reduce((e, m2, square), 1, add3)
    partial += (b * (2 * C // WIDTH) + group) * splits + tl.program_id(1)
    tl.store(partial, origin + e / WIDTH, mask=in_g)
    tl.store(partial + C // WIDTH * splits, m2 + n * (square - e * e / WIDTH), mask=in_g)


@jit
def _normalise_kernel(
    x, x_row, x_batch, shift, weight, bias, y, stats, partial, eps, positions, splits, run, span, C: tl.constexpr,
    WIDTH: tl.constexpr, OWN: tl.constexpr, OWN_PAD: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, SILU: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """y of x + shift, and stats, of partial: `splits` runs of `run` positions; without partial y of stats."""
    GROUPS: tl.constexpr = C // WIDTH
    c, in_c, group, in_g = place(C, WIDTH, OWN, OWN_PAD, TILE)
    b, split = tl.program_id(2).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)  # from the end: it is in L2
    start = split * span
    lane, k, in_k, column = across(c, in_c, LANES)
    count = tl.minimum(span, positions - start)
    x += b * x_batch + start.to(tl.int64) * x_row
    y += (b * positions + start) * C
    stats += b * (2 * GROUPS) + group
    add = load(shift + b * C + column, in_k) if shift is not None else 0.0
    w, offset = load(weight + column, in_k), load(bias + column, in_k)
    if partial is None:
        mean, rstd = load(stats, in_g), load(stats + GROUPS, in_g)
    else:
        partial += b * (2 * GROUPS * splits)
        s_mean, s_m2 = sums_of_runs(partial, splits, group, in_g, GROUPS, SPLITS)
        origin = load(partial + group * splits, in_g)
        n = tl.minimum(tl.maximum(positions - tl.arange(0, SPLITS)[None, :] * run, 0), run).to(tl.float32) * WIDTH
        e = s_mean - origin[:, None]
        e, square = tl.where(n > 0, e * (n / (positions * WIDTH)), 0.0), tl.where(n > 0, e * e * n, 0.0)
        e, m2, square = tl.reduce((e, s_m2, square), 1, add3)
        mean = origin + e
        rstd = tl.rsqrt((m2 + square) / (positions * WIDTH) - e * e + eps)
        if split == 0:
            tl.store(stats, mean, mask=in_g)
            tl.store(stats + GROUPS, rstd, mask=in_g)
    scale, offset = affine(wide(mean, TILE, WIDTH) - add, wide(rstd, TILE, WIDTH), w, offset, SILU, SHORT)
    for i in tl.range(0, count, ROWS, num_stages=STAGES):
        for j in tl.static_range(0, ROWS, LANES):
            r = i + j + lane
            mask = in_k if EVEN else (r < count) & in_k
            u = load(x + (r * x_row + k), mask) * scale + offset
            tl.store(y + (r * C + k), act(u, SILU, SHORT), mask=mask)


@jit
def _whole_forward_kernel(
    x, x_row, x_batch, residual, r_row, r_batch, shift, weight, bias, v, y, stats, eps, positions, C: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Statistics and y, and v where there is a residual, of one group."""
    group, b, n = tl.program_id(0), tl.program_id(1).to(tl.int64), positions * WIDTH
    r, k = tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :]
    c, in_k, mask = group * WIDTH + k, k < WIDTH, (r < positions) & (k < WIDTH)
    at = b * positions * C + (r * C + c)
    # the compiler takes the layout of the last of these loads for the tile: let it be the tile's own
    w, offset = load(weight + c, in_k), load(bias + c, in_k)
    add = load(shift + b * C + c, in_k) if shift is not None else 0.0
    if residual is not None:
        residual += b * r_batch
    z = _value(x + b * x_batch, residual, r * x_row + c, r * r_row + c, add, mask)
    if residual is not None:
        tl.store(v + at, z, mask=mask)
        add = 0.0
    mean = tl.sum(tl.where(mask, z + add, 0.0)) / n
    deviation = z + add - mean
    rstd = tl.rsqrt(tl.sum(tl.where(mask, deviation * deviation, 0.0)) / n + eps)
    scale, offset = affine(mean - add, rstd, w, offset, SILU, SHORT)
    tl.store(y + at, act(z * scale + offset, SILU, SHORT), mask=mask)
    stats += b * (2 * C // WIDTH) + group
    tl.store(stats, mean)
    tl.store(stats + C // WIDTH, rstd)
