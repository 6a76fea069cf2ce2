"""All heads of all discriminators at once: both hinge losses and every gradient, as a value-and-gradient function.

A head on a map x of C channels (docs/METHOD.md, stage 2, 5), groups = gcd(32, C), statistics by image, slope 0.2:

    h1 = W1 x + b1, a1 = lrelu(GroupNorm(h1)), h2 = W2 a1 + b2, a2 = a1 + lrelu(GroupNorm(h2)), D = w_out a2 + b_out
    discriminator_s = mean over taps of [mean relu(1 - D_s(real_s)) + mean relu(1 + D_s(fake))],  over all J slots
    generator_s     = mean over taps of  mean relu(1 - D_s(fake)),  of the current slot, j = 0

Legend: T taps, S sides (discriminators) used, J slots shown, C channels and P = H W positions of a tap. An image is one
map under one discriminator: 2J for each tap and side. A chain is one gradient on its way back through an image: the
discriminator's through each, and the generator's through the current fake.

One cast of the weights, then twelve launches over all taps, sides and images. A table says what each program does:
   1 conv           x -> h1 and its statistics by tile       7 input          dh2 -> da1 = dh2 W2
   2 activate       h1 -> a1                                 8 sums           of dy1 = lrelu'(y1) (da1 + dlogit w_out)
   3 conv           a1 -> h2 and its statistics by tile      9 norm backward  dy1 -> dh1
   4 activate       a1, h2 -> logits by block of channels   10 input          dh1 -> the generator's gradient of x
   5 sums           logits -> losses, dlogit, sums of dy2   11 weight         dh^T x of both layers
   6 norm backward  dy2 -> dh2                              12 reduce         the vectors' gradients, the losses
Products read operands from memory: made in a prologue, they would be made again for every block of output columns,
which costs more than writing them once. Statistics and sums leave a kernel by tile or strip, and the programs that need
them add them up in order: no launch in between, no atomics. Workspace: 3 maps an image and 2 a chain, in x's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.disc_head_backward import (
    _hinge_kernel,
    _input_kernel,
    _norm_backward_kernel,
    _reduce_kernel,
    _weight_kernel,
)  # fmt: skip
from rapm.kernels.disc_head_forward import _activate_kernel, _conv_kernel
from rapm.kernels.disc_head_plan import CHUNK, LANES, Tap, plan
from rapm.kernels.runtime import multiplies


def layout(channels: Sequence[int]) -> tuple[list[tuple[str, int, tuple[int, ...]]], int]:
    """([(name, offset, shape)], P): where a discriminator's parameters lie in its row of P numbers.

    Tap i's are "i.conv1.weight" and so on, with the shapes of `torch.nn`, in the order of a head and without gaps; each
    tap begins at a multiple of 16, so for C a multiple of 16 every tensor is aligned to 32 bytes in bf16.
    """
    entries, offset = [], 0
    for i, c in enumerate(channels):
        layer = {"conv{}.weight": (c, c, 1, 1), "conv{}.bias": (c,), "norm{}.weight": (c,), "norm{}.bias": (c,)}
        shapes = {name.format(k): shape for k in (1, 2) for name, shape in layer.items()}
        for name, shape in (shapes | {"out.weight": (1, c, 1, 1), "out.bias": (1,)}).items():
            entries.append((f"{i}.{name}", offset, shape))
            offset += math.prod(shape)
        offset = -(-offset // 16) * 16
    return entries, offset


def views(row: Tensor, channels: Sequence[int]) -> dict[str, Tensor]:
    """The named parameters of one discriminator in its row of `weights`."""
    return {name: row[at : at + math.prod(shape)].view(shape) for name, at, shape in layout(channels)[0]}


def logits_ref(features: Sequence[Tensor], row: Tensor) -> list[Tensor]:
    """One discriminator, B C H W a tap to B 1 H W, in the weights' dtype."""
    p = views(row, [x.shape[1] for x in features])
    out = []
    for i, x in enumerate(features):
        a, groups = x.to(row.dtype), math.gcd(32, x.shape[1])
        for k in (1, 2):
            h = F.conv2d(a, p[f"{i}.conv{k}.weight"], p[f"{i}.conv{k}.bias"])
            y = F.leaky_relu(F.group_norm(h, groups, p[f"{i}.norm{k}.weight"], p[f"{i}.norm{k}.bias"], 1e-5), 0.2)
            a = y if k == 1 else a + y
        out.append(F.conv2d(a, p[f"{i}.out.weight"], p[f"{i}.out.bias"]))
    return out


def disc_head_ref(
    features: Sequence[Tensor], weights: Tensor, weight_generator: Sequence[float],
    *, sides: Sequence[int] = (0, 1), scale: float = 1.0, logits: bool = False,
) -> tuple:  # fmt: skip
    """As `disc_head`, by autograd, in the weights' dtype (fp32 or fp64)."""
    rows = weights.detach().requires_grad_()
    leaves = [x[0, :1].detach().requires_grad_() for x in features]
    generator, discriminator, seen = [], [], []
    with torch.enable_grad():
        for side in sides:
            fake = logits_ref(leaves, rows[side].detach())
            generator.append(torch.stack([F.relu(1 - x).mean() for x in fake]).mean())
            pairs = logits_ref([torch.cat([x[0], x[1 + side]]).detach() for x in features], rows[side])
            halves = [x.chunk(2) for x in pairs]  # fake, real
            discriminator.append(torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for f, r in halves]).mean())
            seen.append([x.detach().squeeze(1).unflatten(0, (2, -1)) for x in pairs])
        total = torch.stack([w * g for w, g in zip(weight_generator, generator, strict=True)]).sum()
        grad_fake = torch.autograd.grad(scale * total, leaves)
        (grad_weights,) = torch.autograd.grad(torch.stack(discriminator).sum(), rows)
    out = (torch.stack(generator).detach(), torch.stack(discriminator).detach(), list(grad_fake), grad_weights)
    return (*out, [torch.stack(x) for x in zip(*seen, strict=True)]) if logits else out


def _maps(x: Tensor) -> Tensor:
    """x with contiguous channels and one stride over the positions of all slots, aligned; a copy where it is not so."""
    _, j, _, h, w = x.shape
    pitch = _pitch(x)
    even = (h == 1 or x.stride(3) == w * pitch) and (j == 1 or x.stride(1) == h * w * pitch)
    if x.stride(2) == 1 and even and pitch % 16 == 0 and x.stride(0) % 16 == 0:
        return x
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def _pitch(x: Tensor) -> int:
    """The stride between two positions."""
    return x.stride(4) if x.shape[4] > 1 else x.stride(3) if x.shape[3] > 1 else x.shape[2]


def _like_fake(x: Tensor) -> Tensor:
    return torch.empty((1, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("rapm::disc_head", mutates_args=())
def _disc_head(
    features: Sequence[Tensor], weights: Tensor, weight_generator: Sequence[float], sides: Sequence[int], scale: float,
    logits: bool,
) -> list[Tensor]:  # fmt: skip
    """[losses 2 S, gradient of weights, all logits one after another, gradient of each tap's current fake]"""
    xs, weights, sides = tuple(_maps(x) for x in features), weights.contiguous(), tuple(sides)
    dtype, device, J = xs[0].dtype, weights.device, xs[0].shape[1]
    channels = [x.shape[2] for x in xs]
    if any(c % 16 for c in channels):
        raise ValueError(f"disc_head's kernels take channels in sixteens, not {channels}: set RAPM_KERNELS=reference")
    starts = [at for name, at, _ in layout(channels)[0] if name.endswith("conv1.weight")]
    taps = [
        Tap(x.shape[2], x.shape[3] * x.shape[4], at, _pitch(x), x.stride(0)) for x, at in zip(xs, starts, strict=True)
    ]
    p = plan(tuple(taps), J, sides, weights.shape[1], dtype, device)

    def new(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(p.sizes[name], dtype=dtype, device=device)

    def launch(kernel, table: str, *arguments, **constants) -> None:
        rows = p.tables[table]
        kernel[(len(rows),)](*arguments, rows, COLUMNS=rows.shape[1], **constants)

    losses, gradient = torch.empty((2, len(sides)), dtype=torch.float32, device=device), torch.empty_like(weights)
    for other in set(range(len(weights))).difference(sides):
        gradient[other].zero_()
    fakes, seen = [_like_fake(x) for x in xs], new("logits") if logits else None
    matrices, factors = weights.to(dtype), tuple(weight_generator)
    h1, a1, h2, dh1, dh2 = (new(name, dtype) for name in ("maps", "maps", "maps", "d", "d"))
    partial, shares, dlogit, ends, terms = (new(name) for name in ("partial", "shares", "dlogit", "ends", "losses"))
    stats1, stats2, sums1, sums2 = (new(name) for name in ("stats", "stats", "sums", "sums"))
    bias1, bias2, sources = new("bias"), new("bias"), (a1, *xs)

    for second, h, stats in ((False, h1, stats1), (True, h2, stats2)):
        launch(_conv_kernel, "conv", sources, weights, matrices, h, partial, SECOND=second, **p.conv)
        launch(_activate_kernel, "activate", weights, h, partial, a1, shares, stats,
               SECOND=second, M=p.conv["M"], CHUNK=CHUNK, **p.strip)  # fmt: skip
    layers = ((True, h2, stats2, dh2, sums2, bias2), (False, h1, stats1, dh1, sums1, bias1))
    for second, h, stats, d, sums, bias in layers:
        launch(_hinge_kernel, "chain", weights, a1, h, d, stats, shares, dlogit, sums, ends, terms, seen,
               factors, SECOND=second, BLOCKS=p.blocks, **p.strip)  # fmt: skip
        launch(_norm_backward_kernel, "chain", weights, h, d, stats, dlogit, sums, bias,
               SECOND=second, CHUNK=CHUNK, **p.strip)  # fmt: skip
        if second:
            launch(_input_kernel, "hidden", dh2, matrices, (dh1,), 1.0, SIDES=1, **p.conv)
    launch(_input_kernel, "feature", dh1, matrices, tuple(fakes), scale, SIDES=len(sides), **p.conv)
    launch(_weight_kernel, "weight", sources, dh1, dh2, gradient, **p.weight)
    launch(_reduce_kernel, "reduce", (sums1, bias1, sums2, bias2, ends, terms), (gradient, losses),
           LANES=LANES, CHUNK=CHUNK)  # fmt: skip
    return [losses, gradient, *fakes, *([] if seen is None else [seen])]


@_disc_head.register_fake
def _(features, weights, weight_generator, sides, scale, logits) -> list[Tensor]:
    losses = weights.new_empty((2, len(sides)))
    fakes = [_like_fake(x) for x in features]
    count = sum(2 * len(sides) * x.shape[1] * x.shape[3] * x.shape[4] for x in features)
    seen = [weights.new_empty(count)] if logits else []
    return [losses, torch.empty_like(weights, memory_format=torch.contiguous_format), *fakes, *seen]


def disc_head(
    features: Sequence[Tensor], weights: Tensor, weight_generator: Sequence[float],
    *, sides: Sequence[int] = (0, 1), scale: float = 1.0, logits: bool = False,
) -> tuple:  # fmt: skip
    """(generator S, discriminator S, grad_fake, grad_weights[, logits]): the losses of `sides` and their gradients.

    features: kinds J C H W for each tap: fake, then a real for every discriminator; slot 0 is the current one. What is
    not kinds J H W C in memory is copied. weights: fp32, a discriminator a row, see `layout`. grad_fake: 1 C H W for
    each tap, scale times the gradient of sum_s weight_generator[s] generator[s] for features[tap][0, :1]. grad_weights:
    the gradient of the sum of `discriminator`; 0 for those not in `sides`. logits: S 2 J H W a tap, fake and real.
    ValueError for channels that the kernels do not take. Not differentiable. The first call for a set of shapes copies
    tables from the host, so it must not be inside a CUDA-graph capture.
    """
    with torch.no_grad():
        if not multiplies(features[0]):
            return disc_head_ref(features, weights, weight_generator, sides=sides, scale=scale, logits=logits)
        losses, gradient, *rest = _disc_head(features, weights, weight_generator, sides, scale, logits)
        out = (losses[0], losses[1], rest[: len(features)], gradient)
        if not logits:
            return out
        shapes = [(len(sides), 2, x.shape[1], *x.shape[3:]) for x in features]
        flat = rest[-1].split([math.prod(shape) for shape in shapes])
        return (*out, [x.view(shape) for x, shape in zip(flat, shapes, strict=True)])
