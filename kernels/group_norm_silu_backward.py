"""Backward kernels of group_norm_silu: see there."""

from __future__ import annotations

from rapm.kernels.group_norm_silu_tiles import (
    across,
    act_gradient,
    add2,
    add3,
    load,
    owned,
    place,
    spread,
    sums_of_runs,
    wide,
)
from rapm.kernels.runtime import apart, jit, tl


@jit
def _gradient_sums_kernel(
    dy, dy_row, dy_batch, x, x_row, x_batch, shift, weight, bias, stats, partial, sums, positions, splits, span,
    C: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OWN_PAD: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, SILU: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """Of a run: each group's sums of dy' w and dy' w xhat, and of each channel those of dy', dy' xhat and xhat."""
    GROUPS: tl.constexpr = C // WIDTH
    c, in_c, group, in_g = place(C, WIDTH, OWN, OWN_PAD, TILE)
    b, start = tl.program_id(2).to(tl.int64), tl.program_id(1) * span
    lane, k, in_k, column = across(c, in_c, LANES)
    count = tl.minimum(span, positions - start)
    dy += b * dy_batch + start.to(tl.int64) * dy_row
    x += b * x_batch + start.to(tl.int64) * x_row
    stats += b * (2 * GROUPS) + group
    add = load(shift + b * C + column, in_k) if shift is not None else 0.0
    w, offset = load(weight + column, in_k), load(bias + column, in_k)
    rstd = wide(load(stats + GROUPS, in_g), TILE, WIDTH)
    center = (wide(load(stats, in_g), TILE, WIDTH) - add) * rstd
    s_d, s_product = tl.zeros((LANES, TILE), tl.float32), tl.zeros((LANES, TILE), tl.float32)
    s_xhat = tl.zeros((LANES, TILE), tl.float32)
    for i in tl.range(0, count, ROWS, num_stages=STAGES):
        for j in tl.static_range(0, ROWS, LANES):
            r = i + j + lane
            mask = in_k if EVEN else (r < count) & in_k
            xhat = load(x + (r * x_row + k), mask) * rstd - center
            d = act_gradient(load(dy + (r * dy_row + k), mask), xhat, w, offset, SILU, SHORT)
            s_d += d
            s_product += d * xhat
            if sums is not None:
                s_xhat += xhat if EVEN else tl.where(mask, xhat, 0.0)
    if sums is None:
        s_d, s_product = tl.reduce((s_d, s_product), 0, add2)
    else:
        s_d, s_product, s_xhat = tl.reduce((s_d, s_product, s_xhat), 0, add3)
    if SILU and SHORT:
        s_d, s_product = 0.5 * s_d, 0.5 * s_product
    if sums is not None:
        at = sums + (b * 3 * splits + tl.program_id(1)) * C + c
        tl.store(at, s_d, mask=in_c)
        tl.store(at + splits * C, s_product, mask=in_c)
        tl.store(at + 2 * splits * C, s_xhat, mask=in_c)
    w, own = load(weight + c, in_c), owned(TILE, WIDTH, OWN_PAD)
    a, product = tl.where(own, (s_d * w)[None, :], 0.0), tl.where(own, (s_product * w)[None, :], 0.0)
    a, product = tl.reduce((a, product), 1, add2)
    partial += (b * (2 * GROUPS) + group) * splits + tl.program_id(1)
    tl.store(partial, a, mask=in_g)
    tl.store(partial + GROUPS * splits, product, mask=in_g)


@jit
def _gradient_kernel(
    dy, dy_row, dy_batch, x, x_row, x_batch, dv, dv_row, dv_batch, shift, weight, bias, stats, partial, sums, dx,
    dshift, positions, splits, span, C: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OWN_PAD: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, SILU: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """dx = rstd (dy' w - mean(dy' w) - xhat mean(dy' w xhat)) + dv, and its sums as dshift, of what the runs have."""
    GROUPS: tl.constexpr = C // WIDTH
    c, in_c, group, in_g = place(C, WIDTH, OWN, OWN_PAD, TILE)
    b, split = tl.program_id(2).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)
    start = split * span
    count, n = tl.minimum(span, positions - start), positions * WIDTH
    stats, partial = stats + b * (2 * GROUPS), partial + b * (2 * GROUPS * splits)
    a, product = sums_of_runs(partial, splits, group, in_g, GROUPS, SPLITS)
    a, product = tl.reduce((a, product), 1, add2)
    a, product = a / n, product / n
    if dx is not None:
        lane, k, in_k, column = across(c, in_c, LANES)
        dy += b * dy_batch + start.to(tl.int64) * dy_row
        x += b * x_batch + start.to(tl.int64) * x_row
        dx += (b * positions + start) * C
        if dv is not None:
            dv += b * dv_batch + start.to(tl.int64) * dv_row
        add = load(shift + b * C + column, in_k) if shift is not None else 0.0
        w, offset = load(weight + column, in_k), load(bias + column, in_k)
        rstd = wide(load(stats + GROUPS + group, in_g), TILE, WIDTH)
        center = (wide(load(stats + group, in_g), TILE, WIDTH) - add) * rstd
        of_d = rstd * w * (0.5 if SILU and SHORT else 1.0)
        of_xhat, of_one = wide(product, TILE, WIDTH) * rstd, wide(a, TILE, WIDTH) * rstd
        for i in tl.range(0, count, ROWS, num_stages=STAGES):
            for j in tl.static_range(0, ROWS, LANES):
                r = i + j + lane
                mask = in_k if EVEN else (r < count) & in_k
                xhat = load(x + (r * x_row + k), mask) * rstd - center
                d = act_gradient(load(dy + (r * dy_row + k), mask), xhat, w, offset, SILU, SHORT)
                gradient = d * of_d - (xhat * of_xhat + of_one)
                if dv is not None:
                    gradient += load(dv + (r * dv_row + k), mask)
                tl.store(dx + (r * C + k), gradient, mask=mask)
    if dshift is not None:  # a block's channels are dealt out to its programs, 16 at a time
        s = tl.arange(0, SPLITS)[None, :]
        for first in range(split * 16, OWN * WIDTH, tl.num_programs(1) * 16):
            own = first + tl.arange(0, 16)
            j = tl.program_id(0) * (OWN * WIDTH) + own
            in_j = (own < OWN * WIDTH) & (j < C)
            at, some = sums + (b * 3 * splits + s) * C + j[:, None], in_j[:, None] & (s < splits)
            s_d, s_xhat = tl.reduce((load(at, some), load(at + 2 * splits * C, some)), 1, add2)
            total = load(weight + j, in_j) * s_d - spread(product, own, WIDTH) * s_xhat
            total = (total - positions * spread(a, own, WIDTH)) * load(stats + GROUPS + j // WIDTH, in_j)
            tl.store(dshift + b * C + j, total, mask=in_j)


@jit
def _whole_backward_kernel(
    dy, dy_row, dy_batch, x, x_row, x_batch, dv, dv_row, dv_batch, shift, weight, bias, stats, sums, dx, dshift,
    positions, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """All gradients of one group."""
    group, b, n = tl.program_id(0), tl.program_id(1).to(tl.int64), positions * WIDTH
    r, k = tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :]
    c, in_k, mask = group * WIDTH + k, k < WIDTH, (r < positions) & (k < WIDTH)
    stats += b * (2 * C // WIDTH) + group
    mean, rstd = tl.load(stats), tl.load(stats + C // WIDTH)
    w, offset = load(weight + c, in_k), load(bias + c, in_k)
    add = load(shift + b * C + c, in_k) if shift is not None else 0.0
    d = load(dy + b * dy_batch + (r * dy_row + c), mask)
    xhat = load(x + b * x_batch + (r * x_row + c), mask) * rstd - (mean - add) * rstd
    d, half = act_gradient(d, xhat, w, offset, SILU, SHORT), 0.5 if SILU and SHORT else 1.0
    s_d = half * tl.sum(apart(d), axis=0, keep_dims=True)
    s_product = half * tl.sum(apart(d * xhat), axis=0, keep_dims=True)
    s_xhat = tl.sum(tl.where(mask, xhat, 0.0), axis=0, keep_dims=True)
    a, product = rstd * (tl.sum(apart(s_d * w)) / n), rstd * (tl.sum(apart(s_product * w)) / n)
    if sums is not None:
        at = sums + b * 3 * C + c
        tl.store(at, s_d, mask=in_k)
        tl.store(at + C, s_product, mask=in_k)
        tl.store(at + 2 * C, s_xhat, mask=in_k)
    if dx is not None:
        gradient = d * (half * rstd * w) - (xhat * product + a)
        if dv is not None:
            gradient += load(dv + b * dv_batch + (r * dv_row + c), mask)
        tl.store(dx + b * positions * C + (r * C + c), gradient, mask=mask)
    if dshift is not None:
        tl.store(dshift + b * C + c, rstd * w * s_d - positions * a - product * s_xhat, mask=in_k)
