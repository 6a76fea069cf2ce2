"""Linear layer with a low-rank update (LoRA, arXiv 2106.09685, scale 1): y = x W^T + b + h up^T, h = x down^T.

W and b are frozen. Backward: g = dy up, dx = dy W + g down, ddown = g^T x, dup = dy^T h. It keeps x (for ddown), h
(M R, for dup) and the weights, and of these only what a wanted gradient needs.

The frozen product is cuBLAS's in both directions, and adds to what it finds in its output. So one launch
(low_rank.rows) reads x, writes h and begins y = b + h up^T; backward, the same launch reads dy and begins dx = g down.
ddown and dup are one or two more (low_rank.sums). Above rank 16, of all groups, the product is cuBLAS's and so is the
update, but one of a bias too (low_rank.addmm), and above 64, of one, that, ddown and dup are.

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
from rapm.kernels.low_rank import addmm, blocks, matrix, rows, small, sums
from rapm.kernels.runtime import enabled

# Columns of y at most where an update of a rank above 1 is left to who reads y: it has all of `up` in registers, and
# at rank 16 and 1280 columns 2.6 KiB a thread of it did not fit there.
NARROW = 256


def lora_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    parts = zip(F.linear(x, down).split(up.shape[1], -1), up.chunk(groups(down, up)), strict=True)
    return F.linear(x, weight, bias) + torch.cat([F.linear(h, part) for h, part in parts], -1)


def groups(down: Tensor, up: Tensor) -> int:
    """The number of layers in one."""
    return len(down) // up.shape[1]


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
        y = t @ b if bias is None else addmm(bias, t, b)
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


def _backward(ctx, dy: Tensor, _) -> tuple:
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
