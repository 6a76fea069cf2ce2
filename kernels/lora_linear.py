"""Linear layer with a low-rank update (LoRA, arXiv 2106.09685, scale 1): y = x W^T + b + h up^T, h = x down^T.

W and b are frozen. Backward: g = dy up, dx = dy W + g down, ddown = g^T x, dup = dy^T h. It keeps x (for ddown), h
(M R, for dup) and the weights, and of these only what a wanted gradient needs.

The frozen product is cuBLAS's in both directions, and adds to what it finds in its output. So one launch
(low_rank.rows) reads x, writes h and begins y = b + h up^T; backward, the same launch reads dy and begins dx = g down.
ddown and dup are one or two more (low_rank.sums). Above rank 16, of all groups, h is a product of cuBLAS's, and so is
the update unless it adds a bias; above 64, of one group, ddown, dup and the update with a bias are cuBLAS's too.

G layers of one size that share x are one: their W, b, down and up lie below one another, so down has more rows than up
columns. R columns of h and N / G of y belong to each: the product with up is block diagonal.

Shapes: M rows of x (all its leading dimensions), K inputs, N outputs, R rank; x: ... K, W: N K, b: N, down: GR K,
up: N R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.frozen_conv import require_frozen
from rapm.kernels.low_rank import SUM_RANKS, blocks, columns, matrix, rows, small, strides, sums, update, width_of
from rapm.kernels.runtime import enabled, jit, processors, tl, triton

# Columns of y at most where an update of a rank above 1 is left to who reads y: it has all of `up` in registers, and
# at rank 16 and 1280 columns 2.6 KiB a thread of it did not fit there.
NARROW = 256
UPDATE = dict(BM=64, BN=64, num_warps=4)  # a tile of y = bias + t b, above rank 16


def lora_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    parts = zip(F.linear(x, down).split(up.shape[1], -1), up.chunk(groups(down, up)), strict=True)
    return F.linear(x, weight, bias) + torch.cat([F.linear(h, part) for h, part in parts], -1)


def groups(down: Tensor, up: Tensor) -> int:
    """The number of layers in one."""
    return len(down) // up.shape[1]


@jit
def _addmm_kernel(
    t, b, b_r, b_n, bias, y, M, N, SPAN, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """y (M N) = bias + t b: BM rows and SPAN columns of y."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    r = columns(R, BR)[None, :]
    exists = m < M
    tile = tl.load(t + m * R + r, mask=exists & (r < R), other=0.0)
    begin = tl.program_id(1) * SPAN
    y += m.to(tl.int64) * N
    update(tile, b, b_r, b_n, bias, y, exists, begin, tl.minimum(begin + SPAN, N), R, R, 0, False, BN, BR)


def _addmm(bias: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """bias + t b for bias (N), contiguous t (M R) and b (R N), as torch.addmm, which it is but for low ranks."""
    (m, rank), n = t.shape, b.shape[1]
    if t.dtype == torch.float32 or not small(t, rank, SUM_RANKS):
        return torch.addmm(bias, t, b)
    y = t.new_empty(m, n)
    high, wide = triton.cdiv(m, UPDATE["BM"]), triton.cdiv(n, UPDATE["BN"])
    several = 4 if high * wide >= 8 * processors(t.device) else 1  # tiles of a program, where there are enough for all
    grid, span = (high, triton.cdiv(wide, several)), several * UPDATE["BN"]
    stages = 3 if several > 1 else 1
    _addmm_kernel[grid](t, b, *strides(b), bias, y, m, n, span, R=rank, BR=width_of(rank), num_stages=stages, **UPDATE)
    return y


def _product(
    x: Tensor, frozen: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, groups_a: int = 1, groups_b: int = 1
) -> tuple[Tensor, Tensor]:  # (M K) (K N) (N) (K R) (R N) -> M N, M R
    """y = x frozen + bias + t b, and t = x a."""
    y = x.new_empty(len(x), frozen.shape[1])
    if small(x, a.shape[1] * groups_a):
        t = rows(x, a, b, bias, y, groups_a=groups_a, groups_b=groups_b)
        return y.addmm_(x, frozen), t
    t = blocks(x, a, groups_a, 0)
    if groups_b > 1:
        y = blocks(t, b, groups_b, 1)
        y = y if bias is None else y.add_(bias)
    else:
        y = t @ b if bias is None else _addmm(bias, t, b)
    return y.addmm_(x, frozen), t


@torch.library.custom_op("rapm::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, deferred: bool
) -> tuple[Tensor, Tensor]:  # y, h
    shape, x = (*x.shape[:-1], len(weight)), matrix(x)
    if deferred:
        return F.linear(x, weight, bias).view(shape), rows(x, down.t())
    y, h = _product(x, weight.t(), bias, down.t(), up.t(), groups_b=groups(down, up))
    return y.view(shape), h


@torch.library.custom_op("rapm::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, down: Tensor, up: Tensor, wants_x: bool
) -> list[Tensor]:
    """dx if it is wanted, ddown if x is given, dup if h is given."""
    shape, dy = (*dy.shape[:-1], down.shape[1]), matrix(dy)
    x, g, dx, count = None if x is None else matrix(x), None, [], groups(down, up)
    if wants_x:
        y, g = _product(dy, weight, None, up, down, groups_a=count)
        dx = [y.view(shape)]
    elif x is not None:
        g = rows(dy, up, groups_a=count) if small(dy, len(down)) else blocks(dy, up, count, 0)
    return dx + sums(g, x, h, dy, groups=count)


@_lora_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, deferred: bool
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty((*lead, weight.shape[0])), x.new_empty(lead.numel(), down.shape[0])


@_lora_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, down: Tensor, up: Tensor, wants_x: bool
) -> list[Tensor]:
    shapes = (wants_x, (*dy.shape[:-1], down.shape[1])), (x is not None, down.shape), (h is not None, up.shape)
    return [dy.new_empty(shape) for want, shape in shapes if want]


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, weight, _, down, up, _ = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # no zeros for h
    wants = ctx.needs_input_grad
    ctx.save_for_backward(x if wants[3] else None, h if wants[4] else None, weight, down, up)


def _backward(ctx, dy: Tensor | None, _) -> tuple:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    wants_x, _, _, wants_down, wants_up, _ = ctx.needs_input_grad
    x, h, *weights = ctx.saved_tensors
    grads = iter(_lora_linear_backward(dy, x if wants_down else None, h if wants_up else None, *weights, wants_x))
    dx, ddown, dup = (next(grads) if want else None for want in (wants_x, wants_down, wants_up))
    return dx, None, None, ddown, dup, None


_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """x W^T + b + (x down^T) up^T for x (... K), frozen W (N K) and b (N or None), down (R K), up (N R): ... N.

    G layers of one size in one where down is GR K: the i-th N/G columns are x W_i^T + b_i + (x down_i^T) up_i^T.
    Gradients for x, down and up. TypeError where W or b requires one.
    """
    if not enabled(x):
        return lora_linear_ref(x, weight, bias, down, up)
    require_frozen("lora_linear", weight, bias)
    return _lora_linear(x, weight, bias, down, up, False)[0]


def deferrable(x: Tensor, up: Tensor) -> bool:
    """Whether `lora_linear_deferred` takes these: kernels are on, and who reads y has few numbers of `up` to read."""
    columns, rank = up.shape
    return enabled(x) and (rank == 1 or (small(x, rank) and columns <= NARROW))


def lora_linear_deferred(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """x W^T + b (... N), and h (... R): who reads y adds h up^T on the way, so that y is written and read once less.

    The gradient that comes back at the first counts as y's, all of it; h must get none. One layer, `deferrable`.
    """
    require_frozen("lora_linear", weight, bias)
    y, h = _lora_linear(x, weight, bias, down, up, True)
    return y, h.view(*y.shape[:-1], -1)
