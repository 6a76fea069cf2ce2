"""A student's step and its distances to both targets, with the gradient: values and derivatives in one launch.

z_n = a z + b out; L(y) = mean(sqrt((z_n - y)^2 + c^2) - c) for y = zhat, ztilde (docs/METHOD.md, stage 2, 4), as
d^2 / (sqrt(d^2 + c^2) + c), which does not cancel; gradient = d(w_r L(zhat) + w_a L(ztilde)) / d z_n, so there is no
backward launch and nothing to keep. `position_gradient` adds the discriminators' part and goes on to the network's
output: d out = scale b (gradient + adversarial / scale keep x_gradient), with x_u = keep z_n + add xi.

Shapes: B C H W; the programs are those of guided_step (64 for 4x64x64 latents, 256 for 4x128x128). Each leaves its
partial sums in a workspace and takes a ticket from `counter`; the last one adds them up, in a fixed order whoever it
is, and puts the counter back to 0 for the next call or replay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rapm.kernels.guided_step import LAUNCH, grid, offset, place
from rapm.kernels.runtime import enabled, jit, tl


def position_loss_ref(
    z: Tensor, out: Tensor, coefficients: Tensor, zhat: Tensor, ztilde: Tensor, weights: Sequence[float], c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`position_loss` in plain PyTorch, in z's dtype."""
    a, b = coefficients
    z_n = a * z + b * out.to(z.dtype)
    losses, gradients = [], []
    for weight, target in zip(weights, (zhat, ztilde), strict=True):
        d = z_n - target
        root = (d.square() + c * c).sqrt()
        losses.append((root - c).mean())
        gradients.append(weight / d.numel() * (d / root))
    return z_n, torch.stack(losses), gradients[0] + gradients[1]


def position_gradient_ref(
    gradient: Tensor, out: Tensor, b: Tensor, keep: Tensor | None, x_gradient: Tensor | None,
    adversarial: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """`position_gradient` in plain PyTorch, in gradient's dtype."""
    if x_gradient is not None:
        assert keep is not None and adversarial is not None
        gradient = gradient + adversarial / scale * (keep * x_gradient.to(gradient.dtype))
    return torch.empty_like(out).copy_(b * (scale * gradient))


@jit
def _pull(z_n, target, weight, c):
    """Every element's distance and its weighted gradient; 0 where z_n is the target, as outside the mask."""
    d = z_n - target
    root = tl.sqrt(d * d + c * c)
    return d * d / (root + c), weight * (d / root)


@jit
def _position_loss_kernel(
    z, out, coefficients, zhat, ztilde, z_n, losses, gradient, partials, counter, w_r, w_a, c, count,
    size, width, sb, sc, sh, sw, POSITIONS: tl.constexpr,
):  # fmt: skip
    row, channel, position, mask, there = place(size, POSITIONS)
    here = offset(row, channel, position, width, sb, sc, sh, sw)
    a, b = tl.load(coefficients), tl.load(coefficients + 1)
    x = tl.load(z + there, mask=mask, other=0.0).to(tl.float32)
    relative = tl.load(zhat + there, mask=mask, other=0.0).to(tl.float32)
    absolute = tl.load(ztilde + there, mask=mask, other=0.0).to(tl.float32)
    step = tl.load(out + here, mask=mask, other=0.0).to(tl.float32)

    x = a * x + b * step  # 0 outside the mask, like both targets
    loss_r, pull_r = _pull(x, relative, w_r, c)
    loss_a, pull_a = _pull(x, absolute, w_a, c)
    tl.store(z_n + there, x, mask=mask)
    tl.store(gradient + there, pull_r + pull_a, mask=mask)

    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(2) * tl.num_programs(1) * tl.num_programs(0)
    tl.store(partials + program, tl.sum(loss_r))
    tl.store(partials + programs + program, tl.sum(loss_a))
    tl.debug_barrier()  # the partial sums come before the ticket, whichever threads write them
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        sum_r, sum_a = tl.zeros([POSITIONS], tl.float32), tl.zeros([POSITIONS], tl.float32)
        for start in range(0, programs, POSITIONS):
            i = start + tl.arange(0, POSITIONS)
            # other processors wrote them: from L2
            sum_r += tl.load(partials + i, mask=i < programs, other=0.0, cache_modifier=".cg")
            sum_a += tl.load(partials + programs + i, mask=i < programs, other=0.0, cache_modifier=".cg")
        tl.store(losses, tl.sum(sum_r) / count)
        tl.store(losses + 1, tl.sum(sum_a) / count)
        tl.store(counter, 0)


@jit
def _position_gradient_kernel(
    gradient, grad_out, b, keep, x_gradient, adversarial, scale, size, width,
    ob, oc, oh, ow, xb, xc, xh, xw, POSITIONS: tl.constexpr,
):  # fmt: skip
    row, channel, position, mask, there = place(size, POSITIONS)
    g = tl.load(gradient + there, mask=mask, other=0.0).to(tl.float32)
    if x_gradient is not None:
        at = offset(row, channel, position, width, xb, xc, xh, xw)
        part = tl.load(x_gradient + at, mask=mask, other=0.0).to(tl.float32)
        g += tl.load(adversarial) / scale * (tl.load(keep) * part)
    at = offset(row, channel, position, width, ob, oc, oh, ow)
    tl.store(grad_out + at, tl.load(b) * (scale * g), mask=mask)


@torch.library.custom_op("rapm::position_loss", mutates_args=("counter",))
def _op(
    z: Tensor, out: Tensor, coefficients: Tensor, zhat: Tensor, ztilde: Tensor, counter: Tensor,
    w_r: float, w_a: float, c: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    z, zhat, ztilde = z.contiguous(), zhat.contiguous(), ztilde.contiguous()
    z_n, losses, gradient = torch.empty_like(z), z.new_empty(2), torch.empty_like(z)
    partials, count = z.new_empty(2 * math.prod(grid(z))), z.numel()
    _position_loss_kernel[grid(z)](
        z, out, coefficients, zhat, ztilde, z_n, losses, gradient, partials, counter, w_r / count, w_a / count, c,
        float(count), z.shape[2] * z.shape[3], z.shape[3], *out.stride(), **LAUNCH,
    )  # fmt: skip
    return z_n, losses, gradient


@_op.register_fake
def _(z, out, coefficients, zhat, ztilde, counter, w_r, w_a, c):
    z_n, gradient = (torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(2))
    return z_n, z.new_empty(2), gradient


@torch.library.custom_op("rapm::position_gradient", mutates_args=())
def _gradient_op(
    gradient: Tensor, out: Tensor, b: Tensor, keep: Tensor | None, x_gradient: Tensor | None,
    adversarial: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    gradient, grad_out = gradient.contiguous(), torch.empty_like(out)
    strides = (0, 0, 0, 0) if x_gradient is None else x_gradient.stride()
    _position_gradient_kernel[grid(gradient)](
        gradient, grad_out, b, keep, x_gradient, adversarial, scale, gradient.shape[2] * gradient.shape[3],
        gradient.shape[3], *grad_out.stride(), *strides, **LAUNCH,
    )  # fmt: skip
    return grad_out


@_gradient_op.register_fake
def _(gradient, out, b, keep, x_gradient, adversarial, scale):
    return torch.empty_like(out)


def position_loss(
    z: Tensor, out: Tensor, coefficients: Tensor, zhat: Tensor, ztilde: Tensor, weights: Sequence[float], c: float,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(z_n, losses, gradient): fp32 B C H W like z, (2,) without their weights, B C H W; none of them carries a graph.

    z, zhat, ztilde: fp32 latents. out: the network's output, any dtype and strides. coefficients: a and b, (2,) fp32 on
    the device. weights: w_r and w_a. c > 0, in units of the latents. counter: int32 zeros (1,), the caller's own and
    for one stream at a time; without it every call makes one, which costs a memset.
    """
    z, out = z.detach(), out.detach()
    if not enabled(z):
        return position_loss_ref(z, out, coefficients, zhat, ztilde, weights, c)
    if counter is None:
        counter = torch.zeros(1, dtype=torch.int32, device=z.device)
    w_r, w_a = map(float, weights)
    return _op(z, out, coefficients, zhat, ztilde, counter, w_r, w_a, float(c))


def position_gradient(
    gradient: Tensor, out: Tensor, b: Tensor, keep: Tensor | None = None, x_gradient: Tensor | None = None,
    adversarial: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The gradient on `out`, in its dtype and layout, `scale` times too large: scale b (gradient + adversarial part).

    gradient: `position_loss`'s. x_gradient: `scale` times the generator terms' gradient at x_u, B C H W of any dtype
    and strides, or None without discriminators. b, keep, adversarial: one fp32 number each, on the device.
    """
    out = out.detach()
    f = _gradient_op if enabled(gradient) else position_gradient_ref
    return f(gradient, out, b, keep, x_gradient, adversarial, float(scale))
