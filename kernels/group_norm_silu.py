"""GroupNorm and SiLU of a feature map, after an optional time-embedding shift and an optional residual.

    v = x + shift[:, :, None, None] + residual,  y = act(w (v - mean) rstd + b),  act = SiLU or the identity

mean and rstd are a group's (arXiv 1803.08494). Kept for backward: they, and v where there is a residual (then it is an
output), else x and shift. Each way takes two launches, whose programs go through runs of positions of some groups, tile
by tile, while the next tiles are on their way. The first launch writes each run's sums: forward mean and M2 (squared
deviations), backward the sums of dy' w and dy' w xhat, dy' = dy act', and what shift's gradient needs. The second adds
them up in a fixed order (Chan et al. 1979) and makes y or dx, in runs of its own: batch 1 fills the chip, and no result
depends on timing. On a small map one launch does both, its program's tile a whole group. Of v (or x and shift) and the
statistics y can be made again, the same bits, by the second launch alone.

Shapes: B C H W; a tile is ROWS positions by TILE channels, OWN groups of WIDTH channels and padding. A program works on
LANES of its rows at a time, so that a thread has the same channels in all of them, whose columns (LANES TILE) it keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.group_norm_silu_backward import _gradient_kernel, _gradient_sums_kernel, _whole_backward_kernel
from rapm.kernels.group_norm_silu_forward import _normalise_kernel, _statistics_kernel, _whole_forward_kernel
from rapm.kernels.runtime import enabled, processors, triton

WHOLE = 16384  # numbers of a group up to which one launch does both stages
WARPS, STAGES = 4, 3  # of the kernels that go through runs; tiles in flight, that at work among them


class Walk(NamedTuple):
    """How a kernel goes through a map: channels, at most, and bytes of a tile; programs for each processor.

    Of the first launches, whose results each program of the second reads: runs at most, and positions of one at least.
    """

    channels: int
    size: int
    programs: int
    runs: int = 4096
    least: int = 1


STATISTICS, SUMS = Walk(64, 8192, 3, 64, 128), Walk(64, 8192, 3, 64, 128)
NORMALISE, GRADIENT = Walk(256, 8192, 4), Walk(256, 4096, 4)


def group_norm_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    *, silu: bool = True, shift: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    v = x if shift is None else x + shift[:, :, None, None]
    v = v if residual is None else v + residual
    y = F.group_norm(v, groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return y if residual is None else (y, v)


def _map(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """x, its strides between positions and images. Copied only where channels or positions lie in no one stride."""
    if x is None:
        return None, 0, 0
    _, channels, height, width = x.shape
    if (channels > 1 and x.stride(1) != 1) or (min(height, width) > 1 and x.stride(2) != width * x.stride(3)):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, x.stride(3 if width > 1 else 2), x.stride(0)


def _whole(x: Tensor, groups: int, silu: bool) -> dict[str, int] | None:
    """Options of the launch that does both stages, for maps that have one; its grid is groups and B."""
    positions, width = x.shape[2] * x.shape[3], x.shape[1] // groups
    rows, tile = triton.next_power_of_2(positions), triton.next_power_of_2(width)
    if rows * tile > WHOLE:
        return None
    options = dict(C=x.shape[1], WIDTH=width, TILE=tile, ROWS=rows, num_warps=max(4, rows * tile // (32 * 64)))
    return options | dict(SILU=silu, SHORT=_short(x))


def _short(x: Tensor) -> bool:
    """Whether tanh may be short of bits: of bf16, but not in Triton's interpreter, which has no such instruction."""
    return x.dtype == torch.bfloat16 and x.device.type != "cpu"


def _cut(x: Tensor, groups: int, walk: Walk) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """The grid (blocks of channels, runs, B) of a kernel that goes through x, a run's positions, and its options."""
    batch, channels, *sides = x.shape
    cdiv, power = triton.cdiv, triton.next_power_of_2
    positions, width = sides[0] * sides[1], channels // groups
    owns = [min(groups, max(1, wanted // width)) for wanted in (walk.channels, walk.channels // 2)]
    padded = [cdiv(groups, own) * power(own * width) for own in owns]
    own = owns[padded[1] <= 0.8 * padded[0]]  # half as many where a fifth less is padding
    tile, blocks = power(own * width), cdiv(groups, own)
    runs = min(walk.runs, positions // walk.least, round(walk.programs * processors(x.device) / (blocks * batch)))
    span, rows = cdiv(positions, max(1, runs)), max(1, walk.size // (tile * x.element_size()))
    if walk.least > 1:
        rows = min(rows, max(1, power(span + 1) // 8))  # four tiles or more
    span = cdiv(span, rows) * rows
    lanes = max(1, min(rows, WARPS * 32 * 16 // (tile * x.element_size())))  # with 16 bytes a thread, as it loads them
    options = dict(C=channels, WIDTH=width, OWN=own, OWN_PAD=power(own), TILE=tile, ROWS=rows, LANES=lanes)
    fits = tile * rows * x.element_size() <= walk.size  # but for a group of thousands of channels
    options |= dict(EVEN=positions % rows == 0, STAGES=STAGES if fits else 1, num_warps=WARPS)
    return (blocks, cdiv(positions, span), batch), span, options


def _outputs(x: Tensor, groups: int, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, v (empty without a residual), and mean and rstd (B 2 groups)."""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    v = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, v, x.new_empty((x.shape[0], 2, groups), dtype=torch.float32)


def _normalise(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, y: Tensor, stats: Tensor, silu: bool,
    partial: Tensor | None = None, run: int = 0, eps: float = 0.0,
) -> None:  # fmt: skip
    """y of x + shift and of the statistics, which are made first of `partial`, sums of runs of `run` positions."""
    grid, span, options = _cut(x, stats.shape[2], NORMALISE)
    splits = 1 if partial is None else partial.shape[3]
    _normalise_kernel[grid](
        *_map(x), shift, weight, bias, y, stats, partial, eps, x.shape[2] * x.shape[3], splits, run, span, **options,
        SPLITS=triton.next_power_of_2(splits), SILU=silu, SHORT=_short(x),
    )  # fmt: skip


@torch.library.custom_op("rapm::group_norm_silu", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, shift: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, v, stats = _outputs(x, groups, residual)
    shift, kept, positions = None if shift is None else shift.contiguous(), v if v.numel() else None, y[0, 0].numel()
    if whole := _whole(x, groups, silu):
        results = weight, bias, kept, y, stats, eps, positions
        _whole_forward_kernel[groups, len(x)](*_map(x), *_map(residual), shift, *results, **whole)
        return y, v, stats
    grid, run, options = _cut(x, groups, STATISTICS)
    partial = stats.new_empty((*stats.shape, grid[1]))
    _statistics_kernel[grid](*_map(x), *_map(residual), shift, kept, partial, positions, grid[1], run, **options)
    x, shift = (x, shift) if residual is None else (v, None)
    _normalise(x, shift, weight, bias, y, stats, silu, partial, run, eps)
    return y, v, stats


@torch.library.custom_op("rapm::group_norm_silu_again", mutates_args=())
def _again_op(v: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, silu: bool, shift: Tensor | None) -> Tensor:
    y = torch.empty_like(v, memory_format=torch.channels_last)
    _normalise(v, None if shift is None else shift.contiguous(), weight, bias, y, stats, silu)
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
    groups, positions = stats.shape[2], v.shape[2] * v.shape[3]
    inputs = *_map(dy), *_map(v)
    frozen = None if shift is None else shift.contiguous(), weight, bias, stats
    results = dx if of_v else None, dshift if of_shift else None, positions
    if whole := _whole(v, groups, silu):
        sums = stats.new_empty((len(v), 3, 1, v.shape[1])) if of_affine else None
        _whole_backward_kernel[groups, len(v)](*inputs, *_map(dv), *frozen, sums, *results, **whole)
    else:
        grid, span, options = _cut(v, groups, SUMS)
        partial, act = stats.new_empty((*stats.shape, grid[1])), dict(SILU=silu, SHORT=_short(v))
        sums = stats.new_empty((len(v), 3, grid[1], v.shape[1])) if of_affine or of_shift else None
        runs = positions, grid[1], span
        _gradient_sums_kernel[grid](*inputs, *frozen, partial, sums, *runs, **options, **act)
        if of_v or of_shift:
            splits, (grid, span, options) = grid[1], _cut(v, groups, GRADIENT)
            act["SPLITS"] = triton.next_power_of_2(splits)
            _gradient_kernel[grid](*inputs, *_map(dv), *frozen, partial, sums, *results, splits, span, **options, **act)
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
