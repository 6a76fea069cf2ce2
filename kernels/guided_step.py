"""Guidance and one DDIM step: z_next = a z + b (un + w (text - un)), or a z + b out without guidance.

out is what the network returns, eps or v (a, b: rapm.schedule.step_coefficients), with the rows of `un` before those of
`text`, as in the stock pipeline. Linear, so nothing but a and b is kept for backward: dz = a g, d un = b (1 - w) g,
d text = b w g.

Shapes: B rows, C channels, H W positions. One launch: a program takes POSITIONS positions of one row and channel, a
thread each: 64 programs for 4x64x64 latents, 256 for 4x128x128. One element a thread and not a vector, since `out` may
be channels-last: so all loads have one layout, and none goes through shared memory to meet the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rapm.kernels.runtime import enabled, jit, tl, triton

POSITIONS = 256
LAUNCH = dict(POSITIONS=POSITIONS, num_warps=POSITIONS // 32)  # an element a thread


def guided_step_ref(
    z: Tensor, out: Tensor, coefficients: Tensor | Sequence[float], guidance: float | None = None
) -> Tensor:
    """`guided_step` in plain PyTorch, in z's dtype."""
    a, b = coefficients
    out = out.to(z.dtype)
    if guidance is not None:
        without, with_text = out.chunk(2)
        out = without + guidance * (with_text - without)
    return a * z + b * out


@jit
def place(size, POSITIONS: tl.constexpr):
    """The program's row, channel, positions and their mask, and where they lie in a contiguous B C H W tensor."""
    row, channel = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    return row, channel, position, position < size, (row * tl.num_programs(1) + channel) * size + position


@jit
def offset(row, channel, position, width, sb, sc, sh, sw):
    """Where an element of a B C H W tensor of any strides lies; int64, so that no product overflows."""
    return row * sb + channel * sc + (position // width).to(tl.int64) * sh + (position % width).to(tl.int64) * sw


@jit
def _guided_step_kernel(
    z, out, coefficients, z_next, a, b, guidance, size, width, sb, sc, sh, sw, POSITIONS: tl.constexpr
):  # fmt: skip
    row, channel, position, mask, there = place(size, POSITIONS)
    if coefficients is not None:
        a, b = tl.load(coefficients), tl.load(coefficients + 1)
    x = tl.load(z + there, mask=mask, other=0.0).to(tl.float32)
    here = offset(row, channel, position, width, sb, sc, sh, sw)
    step = tl.load(out + here, mask=mask, other=0.0).to(tl.float32)
    if guidance is not None:
        text = tl.num_programs(2).to(tl.int64) * sb
        with_text = tl.load(out + here + text, mask=mask, other=0.0).to(tl.float32)
        step += guidance * (with_text - step)
    tl.store(z_next + there, a * x + b * step, mask=mask)


@jit
def _guided_step_backward_kernel(
    grad, coefficients, grad_out, b, guidance, size, width, sb, sc, sh, sw, POSITIONS: tl.constexpr
):  # fmt: skip
    row, channel, position, mask, there = place(size, POSITIONS)
    if coefficients is not None:
        b = tl.load(coefficients + 1)
    g = b * tl.load(grad + there, mask=mask, other=0.0).to(tl.float32)
    here = offset(row, channel, position, width, sb, sc, sh, sw)
    if guidance is not None:
        text = tl.num_programs(2).to(tl.int64) * sb
        tl.store(grad_out + here + text, guidance * g, mask=mask)
        g = g - guidance * g
    tl.store(grad_out + here, g, mask=mask)


def grid(x: Tensor) -> tuple[int, int, int]:
    """Programs for the B C H W of `x`."""
    return triton.cdiv(x.shape[2] * x.shape[3], POSITIONS), x.shape[1], x.shape[0]


@torch.library.custom_op("rapm::guided_step", mutates_args=())
def _op(z: Tensor, out: Tensor, coefficients: Tensor | None, a: float, b: float, guidance: float | None) -> Tensor:
    z = z.contiguous()
    z_next = torch.empty_like(z)
    size, width = z.shape[2] * z.shape[3], z.shape[3]
    _guided_step_kernel[grid(z)](z, out, coefficients, z_next, a, b, guidance, size, width, *out.stride(), **LAUNCH)
    return z_next


@_op.register_fake
def _(z, out, coefficients, a, b, guidance):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.custom_op("rapm::guided_step_backward", mutates_args=())
def _backward_op(
    grad: Tensor, coefficients: Tensor | None, b: float, guidance: float | None, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    grad = grad.contiguous()
    grad_out = _empty_out(grad, guidance, dtype, channels_last)
    size, width = grad.shape[2] * grad.shape[3], grad.shape[3]
    _guided_step_backward_kernel[grid(grad)](
        grad, coefficients, grad_out, b, guidance, size, width, *grad_out.stride(), **LAUNCH
    )
    return grad_out


@_backward_op.register_fake
def _(grad, coefficients, b, guidance, dtype, channels_last):
    return _empty_out(grad, guidance, dtype, channels_last)


def _empty_out(grad: Tensor, guidance: float | None, dtype: torch.dtype, channels_last: bool) -> Tensor:
    shape = (len(grad) * (1 if guidance is None else 2), *grad.shape[1:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=grad.device, memory_format=layout)


def _setup(ctx, inputs, output):
    _, out, coefficients, ctx.a, ctx.b, ctx.guidance = inputs
    ctx.save_for_backward(coefficients)
    ctx.dtype, ctx.channels_last = out.dtype, out.stride(1) == 1


def _backward(ctx, grad):
    (coefficients,) = ctx.saved_tensors
    grad_z = grad_out = None
    if ctx.needs_input_grad[0]:
        grad_z = grad * (ctx.a if coefficients is None else coefficients[0])
    if ctx.needs_input_grad[1]:
        grad_out = _backward_op(grad, coefficients, ctx.b, ctx.guidance, ctx.dtype, ctx.channels_last)
    return grad_z, grad_out, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def guided_step(
    z: Tensor, out: Tensor, coefficients: Tensor | Sequence[float], guidance: float | None = None
) -> Tensor:
    """z_next, contiguous like z: fp32 latents B C H W after a step with the network's output, any dtype and strides.

    `coefficients`: a and b, an fp32 tensor (2,) on z's device (a row of a table, under CUDA graphs) or two floats;
    constants. With `guidance`, `out` is 2B C H W: unconditional, then with text. ValueError for another batch.
    """
    rows = len(z) * (1 if guidance is None else 2)
    if out.shape != (rows, *z.shape[1:]):
        raise ValueError(f"out is {tuple(out.shape)}, not {(rows, *z.shape[1:])}, with guidance {guidance}")
    if not enabled(z):
        return guided_step_ref(z, out, coefficients, guidance)
    if torch.is_tensor(coefficients):
        return _op(z, out, coefficients, 0.0, 0.0, guidance)
    a, b = map(float, coefficients)
    return _op(z, out, None, a, b, None if guidance is None else float(guidance))
