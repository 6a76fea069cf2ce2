"""GroupNorm and SiLU of a feature map, after an optional time-embedding shift and an optional residual.

    v = x + shift[:, :, None, None] + residual,  y = act(w (v - mean) rstd + b),  act = SiLU or the identity

mean and rstd are a group's (arXiv 1803.08494). Kept for backward: they, and v where there is a residual (then it is an
output), else x and shift. A program owns a tile in registers: a run of an image's positions by groups of channels that
fill a power of two well (12 of width 10, 3 of 80). Launch FIRST writes mean and M2 (squared deviations) of each group
and run; SECOND combines them in a fixed order (Chan et al. 1979) and normalises what FIRST left in L2: batch 1 fills
the chip, and no result depends on timing. Backward is alike, with the sums of dy' w and dy' w xhat, dy' = dy act', and
shift's gradient in the same launches. On a small map a tile is a whole group, and one launch is both. Of v (or x and
shift) and the statistics y can be made again, the same bits, by SECOND alone: nothing is added up.

Shapes: B C H W; a tile is ROWS positions by TILE channels, OWN groups of WIDTH channels and padding. In a kernel r are
rows (ROWS 1), c channels (1 TILE), group (OWN_PAD) and s runs, that is splits of the positions (1 SPLITS).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.runtime import enabled, jit, processors, tl, triton

TILE_VALUES, THREAD_VALUES = 4096, 64  # numbers of a tile, and of a thread
MAX_SPLITS = 256  # runs of a map, of which every program of SECOND reads the results; larger maps have larger tiles
FILL = 1  # programs a processor: with fewer, runs are shorter
WHOLE = 16384  # the tile of one group up to which one launch does both stages


def group_norm_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    *, silu: bool = True, shift: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    v = x if shift is None else x + shift[:, :, None, None]
    v = v if residual is None else v + residual
    y = F.group_norm(v, groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return y if residual is None else (y, v)


@jit
def _load(x, mask):
    return tl.load(x, mask=mask, other=0.0).to(tl.float32)


@jit
def _partial(x, splits, group, in_g, GROUPS: tl.constexpr, SPLITS: tl.constexpr):
    """Both partial results of every group and run, each (OWN_PAD SPLITS), 0 where nothing exists."""
    tl.debug_barrier()  # what follows waits for loads: by now those of the tile are on their way
    s = tl.arange(0, SPLITS)[None, :]
    at, mask = x + group[:, None] * splits + s, in_g[:, None] & (s < splits)
    return _load(at, mask), _load(at + GROUPS * splits, mask)


@jit
def _gather(x, WIDTH: tl.constexpr, OWN_PAD: tl.constexpr):
    """Sums over each group's channels, from (1 TILE) to (OWN_PAD)."""
    k, g = tl.arange(0, x.shape[1])[None, :], tl.arange(0, OWN_PAD)[:, None]
    return tl.sum(tl.where(k // WIDTH == g, x, 0.0), axis=1)


@jit
def _spread(x, k, WIDTH: tl.constexpr):
    """Each channel's value of its group, from (OWN_PAD) to k's shape. One exchange, and each side keeps its layout."""
    return tl.gather(x, tl.minimum(k // WIDTH, x.shape[0] - 1), axis=0)


@jit
def _sigmoid(u):
    """1 / (1 + exp(-u)) in five instructions, where tl.sigmoid has some fifteen; below 5e-20 it is 0."""
    v = 1.0 + tl.exp2(u * -1.4426950408889634)
    return tl.rsqrt(v * v)


@jit
def _forward_kernel(
    x, x_row, x_batch, residual, r_row, r_batch, shift, weight, bias, v, y, y_batch, stats, partial, eps, positions,
    splits, C: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OWN_PAD: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = C // WIDTH
    b, block, k, g = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.arange(0, TILE), tl.arange(0, OWN_PAD)
    split = tl.program_id(1) if FIRST else splits - 1 - tl.program_id(1)  # from the end, where L2 is surest to have it
    r, start = tl.arange(0, ROWS)[:, None], split.to(tl.int64) * ROWS  # int64 to a tile's corner, int32 inside
    c, in_c = (block * (OWN * WIDTH) + k)[None, :], ((k < OWN * WIDTH) & (block * (OWN * WIDTH) + k < C))[None, :]
    group, in_g, mask = block * OWN + g, (g < OWN) & (block * OWN + g < GROUPS), in_c
    if not EVEN:
        mask = (r < positions - start) & in_c
    partial = partial + b * (2 * GROUPS * splits) if partial is not None else None  # None: y again, of v and stats
    out = b * y_batch + start * C
    # the compiler takes the layout of the last of these loads for the tile: let it be the tile's own
    scale, offset = _load(weight + c, in_c), _load(bias + c, in_c)
    add = _load(shift + b * C + c, in_c) if shift is not None else None
    z = tl.load(x + (b * x_batch + start * x_row) + (r * x_row + c), mask=mask, other=0.0)
    if not FIRST and partial is not None:
        s_mean, s_m2 = _partial(partial, splits, group, in_g, GROUPS, SPLITS)
    z = z.to(tl.float32)  # 0 where nothing exists, in padding channels as the loads left it
    if shift is not None:
        z += add
    if not EVEN:
        z = tl.where(mask, z, 0.0)
    if residual is not None:
        z += _load(residual + (b * r_batch + start * r_row) + (r * r_row + c), mask)
        z = z.to(v.dtype.element_ty).to(tl.float32)
        tl.store(v + out + (r * C + c), z, mask=mask)
    if FIRST:
        n = tl.minimum(positions - start, ROWS).to(tl.float32) * WIDTH
        mean = _gather(tl.sum(z, axis=0, keep_dims=True), WIDTH, OWN_PAD) / n
        deviation = z - tl.where(in_c, _spread(mean, k, WIDTH)[None, :], 0.0)
        if not EVEN:
            deviation = tl.where(mask, deviation, 0.0)
        m2 = _gather(tl.sum(deviation * deviation, axis=0, keep_dims=True), WIDTH, OWN_PAD)
    elif partial is None:
        mean = _load(stats + b * (2 * GROUPS) + group, in_g)
    else:
        n = tl.minimum(tl.maximum(positions - tl.arange(0, SPLITS)[None, :] * ROWS, 0), ROWS).to(tl.float32) * WIDTH
        mean = tl.sum(s_mean * (n / (positions * WIDTH)), axis=1)
        s_mean -= mean[:, None]
        m2 = tl.sum(s_m2 + s_mean * s_mean * n, axis=1)
    if SECOND:
        if partial is None:
            rstd = _load(stats + b * (2 * GROUPS) + GROUPS + group, in_g)
        else:
            rstd = tl.rsqrt(m2 / (positions * WIDTH) + eps)
        u = (z - _spread(mean, k, WIDTH)[None, :]) * (_spread(rstd, k, WIDTH)[None, :] * scale) + offset
        if SILU:
            u *= _sigmoid(u)
        tl.store(y + out + (r * C + c), u, mask=mask)
        if partial is not None and split == 0:
            tl.store(stats + b * (2 * GROUPS) + group, mean, mask=in_g)
            tl.store(stats + b * (2 * GROUPS) + GROUPS + group, rstd, mask=in_g)
    else:
        tl.store(partial + group * splits + split, mean, mask=in_g)
        tl.store(partial + (GROUPS + group) * splits + split, m2, mask=in_g)


@jit
def _backward_kernel(
    dy, dy_row, dy_batch, dv, dv_row, dv_batch, x, x_row, x_batch, shift, weight, bias, stats, partial, sums,
    dx, dx_batch, dshift, positions, splits, C: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr,
    OWN_PAD: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, SILU: tl.constexpr,
    EVEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = C // WIDTH
    b, block, k, g = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.arange(0, TILE), tl.arange(0, OWN_PAD)
    split = tl.program_id(1) if FIRST else splits - 1 - tl.program_id(1)
    r, start = tl.arange(0, ROWS)[:, None], split.to(tl.int64) * ROWS
    c, in_c = (block * (OWN * WIDTH) + k)[None, :], ((k < OWN * WIDTH) & (block * (OWN * WIDTH) + k < C))[None, :]
    group, in_g, mask = block * OWN + g, (g < OWN) & (block * OWN + g < GROUPS), in_c
    if not EVEN:
        mask = (r < positions - start) & in_c
    stats, partial = stats + b * (2 * GROUPS), partial + b * (2 * GROUPS * splits)
    center, rstd = _load(stats + c // WIDTH, in_c), _load(stats + GROUPS + c // WIDTH, in_c)
    scale, offset = _load(weight + c, in_c), _load(bias + c, in_c)
    center -= _load(shift + b * C + c, in_c) if shift is not None else 0.0
    xhat = tl.load(x + (b * x_batch + start * x_row) + (r * x_row + c), mask=mask, other=0.0)
    d = tl.load(dy + (b * dy_batch + start * dy_row) + (r * dy_row + c), mask=mask, other=0.0)
    if SECOND and dv is not None:
        stream = tl.load(dv + (b * dv_batch + start * dv_row) + (r * dv_row + c), mask=mask, other=0.0)
    if not FIRST:
        s_a, s_b = _partial(partial, splits, group, in_g, GROUPS, SPLITS)
        sum_a, sum_b = tl.sum(s_a, axis=1), tl.sum(s_b, axis=1)
    xhat, d = (xhat.to(tl.float32) - center) * rstd, d.to(tl.float32)  # 0 in padding channels, as center and rstd
    if not EVEN:
        xhat = tl.where(mask, xhat, 0.0)
    if SILU:
        u = xhat * scale + offset
        sigmoid = _sigmoid(u)
        d *= sigmoid * (1.0 + u * (1.0 - sigmoid))
    if FIRST:
        sum_d, sum_product = tl.sum(d, axis=0, keep_dims=True), tl.sum(d * xhat, axis=0, keep_dims=True)
        sum_xhat = tl.sum(xhat, axis=0, keep_dims=True)
        sum_a, sum_b = _gather(sum_d * scale, WIDTH, OWN_PAD), _gather(sum_product * scale, WIDTH, OWN_PAD)
        if sums is not None:
            at = sums + (b * 3 * splits + split) * C + c
            tl.store(at, sum_d, mask=in_c)
            tl.store(at + splits * C, sum_product, mask=in_c)
            tl.store(at + 2 * splits * C, sum_xhat, mask=in_c)
    if SECOND:
        mean_a, mean_b = sum_a / (positions * WIDTH), sum_b / (positions * WIDTH)
        to_a, to_b = _spread(mean_a, k, WIDTH)[None, :], _spread(mean_b, k, WIDTH)[None, :]
        if dx is not None:
            gradient = d * (rstd * scale) - (xhat * (rstd * to_b) + rstd * to_a)
            if dv is not None:
                gradient += stream.to(tl.float32)
            tl.store(dx + (b * dx_batch + start * C) + (r * C + c), gradient, mask=mask)
        if FIRST and dshift is not None:
            tl.store(dshift + b * C + c, rstd * (scale * sum_d - positions * to_a - to_b * sum_xhat), mask=in_c)
        elif dshift is not None:  # a block's channels are dealt out to its programs, 16 at a time
            for first in range(split * 16, OWN * WIDTH, splits * 16):
                i, s = first + tl.arange(0, 16), tl.arange(0, SPLITS)[None, :]
                j = block * (OWN * WIDTH) + i
                in_j = (i < OWN * WIDTH) & (j < C)
                at, some = sums + b * (3 * splits * C) + s * C + j[:, None], in_j[:, None] & (s < splits)
                total = _load(weight + j, in_j) * tl.sum(_load(at, some), axis=1)
                total -= _spread(mean_b, i, WIDTH) * tl.sum(_load(at + 2 * splits * C, some), axis=1)
                total = (total - positions * _spread(mean_a, i, WIDTH)) * _load(stats + GROUPS + j // WIDTH, in_j)
                tl.store(dshift + b * C + j, total, mask=in_j)
    else:
        tl.store(partial + group * splits + split, sum_a, mask=in_g)
        tl.store(partial + (GROUPS + group) * splits + split, sum_b, mask=in_g)


def _rows(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """x, its strides between positions and images. Copied only where channels or positions lie in no one stride."""
    if x is None:
        return None, 0, 0
    _, channels, height, width = x.shape
    if (channels > 1 and x.stride(1) != 1) or (min(height, width) > 1 and x.stride(2) != width * x.stride(3)):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, x.stride(3 if width > 1 else 2), x.stride(0)


def _plan(x: Tensor, groups: int, whole: int) -> tuple[tuple[int, int, int], list[dict[str, int]]]:
    """The grid (blocks of channels, runs, B) and the options of each launch."""
    batch, channels, height, width = x.shape
    cdiv, power = triton.cdiv, triton.next_power_of_2
    positions, width = height * width, channels // groups
    own, rows, tile = 1, power(positions), power(width)
    if rows * tile > whole:  # several groups: three quarters of 128 channels or more and mostly from 16 bytes on, or of
        # 64 for longer runs, or twice as many
        fill = 128 if positions <= TILE_VALUES // 128 * (MAX_SPLITS // 2) else 64
        own = min(groups, max(1, fill // width if fill % width <= fill // 4 else 2 * fill // width))
        rows, tile = min(rows, max(1, TILE_VALUES // power(own * width))), power(own * width)
        while cdiv(positions, rows) > MAX_SPLITS:
            rows *= 2
        while rows > 8 and cdiv(groups, own) * cdiv(positions, rows) * batch < FILL * processors(x.device):
            rows //= 2
    splits = cdiv(positions, rows)
    options = dict(C=channels, WIDTH=width, OWN=own, OWN_PAD=power(own), TILE=tile, ROWS=rows, SPLITS=power(splits))
    options["EVEN"] = positions % rows == 0
    options["num_warps"] = max(4 if splits == 1 else 2, rows * tile // (32 * THREAD_VALUES))
    stages = [(True, True)] if splits == 1 else [(True, False), (False, True)]
    return (cdiv(groups, own), splits, batch), [options | dict(FIRST=a, SECOND=b) for a, b in stages]


def _outputs(x: Tensor, groups: int, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, v (empty without a residual), and mean and rstd (B 2 groups)."""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    v = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, v, x.new_empty((x.shape[0], 2, groups), dtype=torch.float32)


@torch.library.custom_op("rapm::group_norm_silu", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, shift: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, v, stats = _outputs(x, groups, residual)
    grid, launches = _plan(x, groups, WHOLE)
    partial = stats.new_empty((*stats.shape, grid[1]))
    results = weight, bias, None if residual is None else v, y, y.stride(0), stats, partial, eps
    inputs = *_rows(x), *_rows(residual), None if shift is None else shift.contiguous()
    for options in launches:
        if residual is not None and not options["FIRST"]:
            inputs = *_rows(v), None, 0, 0, None
        _forward_kernel[grid](*inputs, *results, x.shape[2] * x.shape[3], grid[1], SILU=silu, **options)
    return y, v, stats


@torch.library.custom_op("rapm::group_norm_silu_again", mutates_args=())
def _again_op(v: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, silu: bool, shift: Tensor | None) -> Tensor:
    y = torch.empty_like(v, memory_format=torch.channels_last)
    grid, launches = _plan(v, stats.shape[2], 0)
    inputs = *_rows(v), None, 0, 0, None if shift is None else shift.contiguous(), weight, bias
    options = launches[-1] | dict(FIRST=False, SECOND=True, SILU=silu)
    results = None, y, y.stride(0), stats, None, 0.0
    _forward_kernel[grid](*inputs, *results, v.shape[2] * v.shape[3], grid[1], **options)
    return y


def _gradients(v: Tensor, of_v: bool, of_shift: bool, of_affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dv, dshift, and (3 C, fp32) dbias, dweight and a row without use; empty where not asked for."""
    dx = torch.empty_like(v, memory_format=torch.channels_last) if of_v else v.new_empty(0)
    dshift = v.new_empty(v.shape[:2] if of_shift else 0)
    return dx, dshift, v.new_empty((3, v.shape[1] if of_affine else 0), dtype=torch.float32)


@torch.library.custom_op("rapm::group_norm_silu_backward", mutates_args=())
def _backward_op(
    dy: Tensor, dv: Tensor | None, v: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, stats: Tensor,
    silu: bool, of_v: bool, of_shift: bool, of_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dshift, affine = _gradients(v, of_v, of_shift, of_affine)
    grid, launches = _plan(v, stats.shape[2], WHOLE)
    sums = stats.new_empty((grid[2], 3, grid[1], v.shape[1])) if of_affine or (of_shift and grid[1] > 1) else None
    inputs = *_rows(dy), *_rows(dv), *_rows(v), None if shift is None else shift.contiguous(), weight, bias, stats
    results = sums, dx if of_v else None, v[0].numel(), dshift if of_shift else None, v.shape[2] * v.shape[3], grid[1]
    partial = stats.new_empty((*stats.shape, grid[1]))
    for options in launches:
        _backward_kernel[grid](*inputs, partial, *results, SILU=silu, **options)
    if of_shift and dv is not None:
        dshift += dv.sum((2, 3))
    if of_affine and sums is not None:
        torch.sum(sums, (0, 2), out=affine)
    return dx, dshift, affine


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, ctx.silu, shift, residual = inputs
    kept = (x, shift) if residual is None else (output[1], None)
    ctx.save_for_backward(*kept, weight, bias, output[2])
    ctx.mark_non_differentiable(*output[1 if residual is None else 2 :])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor | None, dv: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    v, shift, weight, bias, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of = needs[0] or needs[7], needs[6], needs[1] or needs[2]
    dy = torch.zeros_like(v) if dy is None else dy
    dx, dshift, affine = _backward_op(dy, dv, v, shift, weight, bias, stats, ctx.silu, *of)
    every = dx, affine[1].to(weight.dtype), affine[0].to(bias.dtype), None, None, None, dshift, dx
    return tuple(gradient if need else None for gradient, need in zip(every, needs, strict=True))


_op.register_fake(lambda x, weight, bias, groups, eps, silu, shift, residual: _outputs(x, groups, residual))
_again_op.register_fake(lambda v, *_: torch.empty_like(v, memory_format=torch.channels_last))
_backward_op.register_fake(lambda dy, dv, v, shift, weight, bias, stats, silu, *of: _gradients(v, *of))
_op.register_autograd(_backward, setup_context=_setup_context)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    *, silu: bool = True, shift: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """y = act(GroupNorm(v)), v = x (B C H W) + shift (B C) + residual, channels-last; with a residual (y, v)."""
    options = dict(silu=silu, shift=shift, residual=residual)
    y, v, _ = group_norm_silu_with_stats(x, weight, bias, groups, eps, **options)
    return y if residual is None else (y, v)


def group_norm_silu_with_stats(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    *, silu: bool = True, shift: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`group_norm_silu`'s y, v (x itself without a residual), and the statistics kept: B 2 groups, fp32; or None."""
    if not enabled(x):
        y = group_norm_silu_ref(x, weight, bias, groups, eps, silu=silu, shift=shift, residual=residual)
        return (y, x, None) if residual is None else (*y, None)
    y, v, stats = _op(x, weight, bias, groups, eps, silu, shift, residual)
    return y, x if residual is None else v, stats


def group_norm_silu_again(
    v: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, stats: Tensor | None,
    *, silu: bool = True, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y, the same bits, from `group_norm_silu_with_stats`'s v (B C H W) and `stats`; `shift` if there was no residual.

    It has no gradient.
    """
    if stats is None:
        return group_norm_silu_ref(v, weight, bias, groups, eps, silu=silu, shift=shift)
    return _again_op(v, weight, bias, stats, silu, shift)
