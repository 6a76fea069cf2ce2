"""Convolution with a low-rank update: y = conv(x, W) + b + up h, h = conv(x, down), up a 1x1 convolution.

W and b are frozen. The frozen product is cuDNN's, and keeps no input. A convolution to R channels is a poor fit for
it, so here it is one product with all T = k k taps at once, P = x D^T (one pass over x), and a sum of T neighbours of
P, out of cache: h[m, r] = sum_t P[m + offset(t), t, r]. Backward, with g = dy up: S[m, t, r] = g[m - offset(t), r],
dx = conv_transposed(dy, W) + S D, ddown = S^T x, dup = dy^T h. So all products are lora_linear's, at rank Q = T R.
It keeps x (for ddown), h (M' R, for dup) and the weights, and of these only what a wanted gradient needs.

Launches beside the frozen products: forward two (P; h and y += b + up h), backward three (g; S and dx += S D; both
weights), four for long matrices. Over TRITON_COLUMNS the products of P, S, g and the weights are cuBLAS's.
A 1x1 convolution of stride 1 is lora_linear.

Shapes: x: B C H W, W: N C k k, b: N, down: R C k k, up: N R 1 1, y: B N H' W', all channels-last but down, which lies
as k k R C in memory, so that it is D (Q C) and a tap's ranks are neighbours; M = B H W positions in, M' = B H' W' out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.frozen_conv import as_matrix, conv, conv_input_grad, conv_like, pointwise, require_frozen
from rapm.kernels.lora_linear import lora_linear
from rapm.kernels.low_rank import rows, small, sums, tile_of, update, width_of
from rapm.kernels.runtime import enabled, jit, processors, tl, triton

TRITON_COLUMNS = 64  # Q up to here: kernels, above: cuBLAS


def lora_conv_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, stride: int, padding: int
) -> Tensor:
    down = down.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, stride, padding) + F.conv2d(F.conv2d(x, down, None, stride, padding), up)


@jit
def _taps(
    p, m, exists, tap, r, H, W, HO, WO,
    R: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """P at output positions m, taps and ranks, each a column or a row, in fp32; zero outside the input."""
    i, j = m // WO % HO * STRIDE - PADDING + tap // SIDE, m % WO * STRIDE - PADDING + tap % SIDE
    inside = exists & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    at = ((m // (HO * WO) * H + i) * W + j).to(tl.int64) * (R * SIDE * SIDE) + tap * R + r
    return tl.load(p + at, mask=inside & (r < R) & (tap < SIDE * SIDE), other=0.0).to(tl.float32)


@jit
def _gather_kernel(
    p, up, bias, h, y, M, N, H, W, HO, WO, SPAN,
    R: tl.constexpr, SIDE: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """h (M R) from P, and y (M N) += [bias] + h up^T: BM positions of the output and SPAN columns of y."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    r = tl.arange(0, BR)[None, :]
    exists = m < M
    if BR == 1:  # all taps, a power of two of them, in one tile: otherwise a thread would load the same over and over
        tile = _taps(p, m, exists, tl.arange(0, TAPS)[None, :], 0, H, W, HO, WO, R, SIDE, STRIDE, PADDING)
        t = tl.sum(tile, axis=1, keep_dims=True)
    else:
        t = tl.zeros((BM, BR), tl.float32)
        for tap in tl.static_range(SIDE * SIDE):
            t += _taps(p, m, exists, tap, r, H, W, HO, WO, R, SIDE, STRIDE, PADDING)
    t = t.to(h.dtype.element_ty)
    tl.store(h + m * R + r, t, mask=exists & (r < R) & (tl.program_id(1) == 0))
    begin = tl.program_id(1) * SPAN
    y += m.to(tl.int64) * N
    update(t, up, 1, R, bias, y, exists, begin, tl.minimum(begin + SPAN, N), R, R, 0, True, BN, BR)


@jit
def _spread_kernel(
    g, d, s, dx, M, C, H, W, HO, WO, SPAN,
    R: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """S from g, and where dx (M C) is given, dx += S d: BM positions of the input, and SPAN columns of dx.

    S is M BR, its last columns zero. Without dx, it is M Q, and the second index of a program counts BR columns of S.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    q = tl.arange(0, BR)[None, :]
    if dx is None:
        q += tl.program_id(1) * BR
    tap = q // R
    i, j = m // W % H + PADDING - tap // SIDE, m % W + PADDING - tap % SIDE
    met = (i >= 0) & (i < HO * STRIDE) & (i % STRIDE == 0) & (j >= 0) & (j < WO * STRIDE) & (j % STRIDE == 0)
    exists = (m < M) & (q < R * SIDE * SIDE)
    at = (m // (H * W) * HO + i // STRIDE) * WO + j // STRIDE
    t = tl.load(g + at * R + q % R, mask=exists & met, other=0.0)
    if dx is None:
        tl.store(s + m.to(tl.int64) * (R * SIDE * SIDE) + q, t, mask=exists)
    else:
        if s is not None:
            tl.store(s + m.to(tl.int64) * BR + q, t, mask=(m < M) & (tl.program_id(1) == 0))
        begin = tl.program_id(1) * SPAN
        dx += m.to(tl.int64) * C
        end = tl.minimum(begin + SPAN, C)
        update(t, d, C, 1, None, dx, m < M, begin, end, R * SIDE * SIDE, R, 0, True, BN, BR)


def _flat(down: Tensor) -> Tensor:
    """down (R C k k) as D (Q C), a view where it lies in memory as k k R C."""
    return down.permute(2, 3, 0, 1).contiguous().flatten(0, 2)


def _launch(m: int, n: int, rank: int, x: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, columns of a program, and tile of an update of M N by a product of `rank`."""
    tile = tile_of(m, rank, x)
    blocks = triton.cdiv(m, tile["BM"])
    del tile["BK"]
    span = triton.cdiv(triton.cdiv(n, max(1, processors(x.device) // blocks)), tile["BN"]) * tile["BN"]
    return (blocks, triton.cdiv(n, span)), span, dict(tile, BR=width_of(rank))


def _gather(
    p: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, size: torch.Size, geometry: tuple[int, int, int]
) -> Tensor:
    """h, from P of an input of H W; y (B N H' W') += bias + up h."""
    batch, n, *out = y.shape
    m, rank = batch * out[0] * out[1], up.shape[1]
    h = p.new_empty(m, rank)
    grid, span, tile = _launch(m, n, rank, p)
    side, stride, padding = geometry
    taps = triton.next_power_of_2(side**2)
    _gather_kernel[grid](
        p, up, bias, h, y, m, n, *size, *out, span,
        R=rank, SIDE=side, TAPS=taps, STRIDE=stride, PADDING=padding, **tile,
    )  # fmt: skip
    return h


def _spread(
    g: Tensor, d: Tensor, dx: Tensor | None, shape: tuple[int, ...], out: tuple[int, int], geometry: tuple, keep: bool
) -> Tensor | None:
    """S of an input of `shape` (B H W) from g of an output of `out` (H' W'), if `keep`; dx (M C) += S D, if given.

    With dx, S has as many columns as a tile, a power of two, the last of them zero.
    """
    m, (q, c), (side, stride, padding) = shape[0] * shape[1] * shape[2], d.shape, geometry
    s = g.new_empty(m, q if dx is None else width_of(q)) if keep else None
    if dx is None:
        (blocks, _), span, tile = _launch(m, 1, TRITON_COLUMNS, g)
        grid = blocks, triton.cdiv(q, TRITON_COLUMNS)
    else:
        grid, span, tile = _launch(m, c, q, g)
    _spread_kernel[grid](
        g, d, s, dx, m, c, *shape[1:], *out, span, R=q // side**2, SIDE=side, STRIDE=stride, PADDING=padding, **tile
    )
    return s


@torch.library.custom_op("rapm::lora_conv", mutates_args=())
def _lora_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor]:  # y, h
    y = conv(x, weight, None, stride, padding)  # a bias would be one more launch
    d, positions = _flat(down), as_matrix(x)
    p = rows(positions, d.t()) if small(x, len(d), TRITON_COLUMNS) else positions @ d.t()
    return y, _gather(p, up.flatten(1), bias, y, x.shape[2:], (down.shape[2], stride, padding))


@torch.library.custom_op("rapm::lora_conv_backward", mutates_args=())
def _lora_conv_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, down: Tensor, up: Tensor, stride: int,
    padding: int, shape: list[int], wants_x: bool,
) -> list[Tensor]:  # fmt: skip
    """dx (of `shape`) if it is wanted, ddown if x is given, dup if h is given."""
    rank, inputs, side, _ = down.shape
    d, u = _flat(down), up.flatten(1)
    kernels, grads, s = small(dy, len(d), TRITON_COLUMNS), [], None
    dy = dy.contiguous(memory_format=torch.channels_last)
    x, dys = None if x is None else as_matrix(x), as_matrix(dy)
    if wants_x or x is not None:
        g, dx = rows(dys, u) if kernels else dys @ u, None
        if wants_x:
            grads = [conv_input_grad(dy, weight, shape, stride, padding)]
            dx = as_matrix(grads[0])
        size, geometry = (shape[0], *shape[2:]), (side, stride, padding)
        s = _spread(g, d, dx if kernels else None, size, dy.shape[2:], geometry, x is not None or not kernels)
        if wants_x and not kernels:
            dx.addmm_(s, d)
    grads += sums(s, x, h, dys, kernels=kernels)
    if x is not None:
        grads[int(wants_x)] = grads[int(wants_x)][: len(d)].view(side, side, rank, inputs).permute(2, 3, 0, 1)
    if h is not None:
        grads[-1] = grads[-1][:, :, None, None]
    return grads


@_lora_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    y = conv_like(x, weight, stride, padding)
    return y, x.new_empty(y[:, 0].numel(), down.shape[0])


@_lora_conv_backward.register_fake
def _(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, down: Tensor, up: Tensor, stride: int,
    padding: int, shape: list[int], wants_x: bool,
) -> list[Tensor]:  # fmt: skip
    rank, inputs, side, _ = down.shape
    batch, _, height, width = shape
    dx = dy.new_empty(batch, height, width, inputs).permute(0, 3, 1, 2)
    ddown = dy.new_empty(side, side, rank, inputs).permute(2, 3, 0, 1)
    wanted = (wants_x, dx), (x is not None, ddown), (h is not None, dy.new_empty(up.shape))
    return [grad for want, grad in wanted if want]


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, weight, _, down, up, *ctx.geometry = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # no zeros for h
    ctx.shape, wants = x.shape, ctx.needs_input_grad
    ctx.save_for_backward(x if wants[3] else None, h if wants[4] else None, weight, down, up)


def _backward(ctx, dy: Tensor | None, _) -> tuple:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    wants_x, _, _, wants_down, wants_up, _, _ = ctx.needs_input_grad
    x, h, *weights = ctx.saved_tensors
    x, h = x if wants_down else None, h if wants_up else None
    grads = iter(_lora_conv_backward(dy, x, h, *weights, *ctx.geometry, ctx.shape, wants_x))
    dx, ddown, dup = (next(grads) if want else None for want in (wants_x, wants_down, wants_up))
    return dx, None, None, ddown, dup, None, None


_lora_conv.register_autograd(_backward, setup_context=_setup_context)


def lora_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, stride: int = 1, padding: int = 0
) -> Tensor:
    """conv(x, W) + b + up conv(x, down), for x (B C H W), frozen W (N C k k) and b (N or None), down (R C k k) and
    up (N R 1 1): B N H' W'. Gradients for x, down and up. TypeError where W or b requires one.
    """
    if not enabled(x):
        return lora_conv_ref(x, weight, bias, down, up, stride, padding)
    require_frozen("lora_conv", weight, bias)
    if pointwise(weight, stride, padding):
        weight, down, up = (w.flatten(1) for w in (weight, down, up))
        return lora_linear(x.permute(0, 2, 3, 1), weight, bias, down, up).permute(0, 3, 1, 2)
    return _lora_conv(x, weight, bias, down, up, stride, padding)[0]
