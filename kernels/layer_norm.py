"""LayerNorm over the last dimension, with the residual add in front of it: s = x + residual, y = LN(s) weight + bias.

LN(s) = (s - mean(s)) / sqrt(var(s) + eps), var the biased one (arXiv 1607.06450). With r = 1 / sqrt(var + eps),
h = (s - mean) r and g = dy weight, the gradient of x and of residual alike is ds + r (g - mean(g) - h mean(g h)), where
ds is what s itself got. For backward s (or x) is kept, and per row mean and r; of them y can be made again, to the bit:
a row's sums may differ in the last bits between variants of the kernel, whose threads share a row as Triton sees fit.

One launch forward; one backward, and where weight or bias require a gradient their sums besides. Rows stay in
registers, so that the statistics take two passes and memory is read once. A row is a program of 64 numbers a thread;
up to WARP_ROW columns a warp holds a row, and a program four. (640 columns in a warp took ten times as long: H200.)

Where a residual is added, a LoRA's update h up^T of x may be too (lora_linear_deferred): x in memory is without it.

Shapes: ... C in and out; N rows, the product of the leading dimensions; P programs; K rank, h: ... K, up: C K. A tile
is R rows x W columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.low_rank import matrix
from rapm.kernels.runtime import apart, enabled, jit, processors, tl, triton

WARP_ROW = 256  # columns that one warp holds: a 16-byte load a thread
ROWS = 4  # rows, and warps, of a program whose warps hold rows
WAVES = 4  # programs for each processor where each adds up its rows' gradients of weight and bias


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, h: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    x = x if h is None else x + F.linear(h, up).detach()
    s = x if residual is None else x + residual
    y = F.layer_norm(s, weight.shape, weight, bias, eps)
    return y if residual is None else (s, y)


@jit
def _mean(x, c):
    """Over the columns of a tile whose absent ones are 0: R W to R 1."""
    return tl.sum(apart(x), axis=1, keep_dims=True) / c


@jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, h_ptr, up_ptr, weight_ptr, bias_ptr, s_ptr, y_ptr, stats_ptr, n, c, x_stride, residual_stride,
    up_c, up_k, eps, K: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = line[:, None], tl.arange(0, WIDTH)[None, :]
    mask = (row < n) & (column < c)
    s = tl.load(x_ptr + row * x_stride + column, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + row * residual_stride + column, mask, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        h = tl.load(h_ptr + line * K + k, line < n, other=0.0).to(tl.float32)[:, None]  # once a row, see geglu
        up = tl.load(up_ptr + column * up_c + k * up_k, column < c, other=0.0).to(tl.float32)
        s += tl.where(mask, h * up, 0.0)
    weight = tl.load(weight_ptr + column, column < c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, column < c, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row * c + column, rounded, mask)
        s = rounded.to(tl.float32)  # what backward reads
    mean = tl.load(stats_ptr + row, row < n, other=0.0) if AGAIN else _mean(s, c)
    d = s - mean
    square = tl.where(mask, d * d, 0.0)
    rstd = tl.load(stats_ptr + n + row, row < n, other=0.0) if AGAIN else tl.rsqrt(_mean(square, c) + eps)
    tl.store(y_ptr + row * c + column, (d * rstd * weight + bias).to(y_ptr.dtype.element_ty), mask)
    if not AGAIN:
        tl.store(stats_ptr + row, mean, row < n)
        tl.store(stats_ptr + n + row, rstd, row < n)


@jit
def _layer_norm_bwd_kernel(
    dy_ptr, ds_ptr, s_ptr, stats_ptr, weight_ptr, dx_ptr, partial_ptr, n, c, dy_stride, ds_stride, s_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, column < c, other=0.0).to(tl.float32)
    if partial_ptr is not None:
        dweight = tl.zeros([ROWS, WIDTH], tl.float32)
        dbias = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):  # one, where there are no partial sums
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < n) & (column < c)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * s_stride + column, mask, other=0.0).to(tl.float32)
        if ds_ptr is not None:
            ds = tl.load(ds_ptr + row * ds_stride + column, mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row, row < n, other=0.0)
        rstd = tl.load(stats_ptr + n + row, row < n, other=0.0)
        h = (s - mean) * rstd
        g = dy * weight  # 0 where the mask is
        dx = rstd * (g - _mean(g, c) - h * _mean(g * h, c))
        if ds_ptr is not None:
            dx += ds
        tl.store(dx_ptr + row * c + column, dx.to(dx_ptr.dtype.element_ty), mask)
        if partial_ptr is not None:
            dweight += dy * h
            dbias += dy
    if partial_ptr is not None:  # P 2 C
        partial_ptr += tl.program_id(0).to(tl.int64) * 2 * c + column
        tl.store(partial_ptr, tl.sum(dweight, axis=0, keep_dims=True), column < c)
        tl.store(partial_ptr + c, tl.sum(dbias, axis=0, keep_dims=True), column < c)


def _launch(n: int, c: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """Programs and launch options."""
    block = triton.next_power_of_2(c)
    if block <= WARP_ROW and triton.cdiv(n, ROWS) >= processors(device):
        return triton.cdiv(n, ROWS), dict(ROWS=ROWS, WIDTH=block, num_warps=ROWS)
    return n, dict(ROWS=1, WIDTH=block, num_warps=max(1, min(16, block // 2048)))


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    h: Tensor | None = None,
    up: Tensor | None = None,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """s (x itself without a residual), y, and 2 N: the rows' means and reciprocal deviations, `stats` where given."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = matrix(x)
    n, c = rows.shape
    again = stats is not None
    stats = stats if again else torch.empty((2, n), dtype=torch.float32, device=x.device)
    residual = residual if residual is None else matrix(residual)
    programs, options = _launch(n, c, x.device)
    _layer_norm_fwd_kernel[(programs,)](
        rows, residual, rows if h is None else matrix(h).contiguous(), rows if up is None else up, weight, bias, s, y,
        stats, n, c, rows.stride(0), 0 if residual is None else residual.stride(0),
        *((0, 0) if up is None else up.stride()), eps, K=0 if up is None else up.shape[1], AGAIN=again, **options,
    )  # fmt: skip
    return s, y, stats


@torch.library.custom_op("rapm::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, y, stats = _forward(x, None, weight, bias, eps)
    return y, stats


@torch.library.custom_op("rapm::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, h: Tensor | None, up: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, weight, bias, eps, h, up)


@torch.library.custom_op("rapm::layer_norm_again", mutates_args=())
def _layer_norm_again(s: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
    return _forward(s, None, weight, bias, 0.0, stats=stats)[1]


@torch.library.custom_op("rapm::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, stats: Tensor, weight: Tensor, affine: bool
) -> list[Tensor]:
    """[dx], or with `affine` [dx, dweight, dbias]."""
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dy, s = matrix(dy), matrix(s)
    ds = ds if ds is None else matrix(ds)
    n, c = s.shape
    programs, options = _launch(n, c, s.device)
    partial = None
    if affine:
        programs = min(programs, WAVES * processors(s.device))
        partial = torch.empty((programs, 2, c), dtype=torch.float32, device=s.device)
    _layer_norm_bwd_kernel[(programs,)](
        dy, ds, s, stats, weight, dx, partial, n, c, dy.stride(0), 0 if ds is None else ds.stride(0), s.stride(0),
        **options,
    )  # fmt: skip
    return [dx] if partial is None else [dx, *(partial[:, i].sum(0).to(weight.dtype) for i in range(2))]


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty(x), _stats(x)


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, h: Tensor | None, up: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x), _empty(x), _stats(x)


@_layer_norm_again.register_fake
def _(s: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
    return _empty(s)


@_layer_norm_backward.register_fake
def _(dy: Tensor, ds: Tensor | None, s: Tensor, stats: Tensor, weight: Tensor, affine: bool) -> list[Tensor]:
    return [_empty(s), *(_empty(weight) for _ in range(2 * affine))]


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    added = len(output) == 3
    ctx.affine = slice(2, 4) if added else slice(1, 3)
    ctx.save_for_backward(output[0] if added else inputs[0], output[-1], inputs[ctx.affine.start])
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of s, weight and bias."""
    if dy is None:  # only s was used
        return ds, None, None
    s, stats, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[ctx.affine]
    dx, *affine = _layer_norm_backward(dy, ds, s, stats, weight, any(needs))
    return dx, *(affine[i] if needs[i] else None for i in range(2))


def _backward(ctx, dy: Tensor | None, _: None) -> tuple:
    return *_gradients(ctx, dy, None), None


def _add_backward(ctx, ds: Tensor | None, dy: Tensor | None, _: None) -> tuple:
    dx, dweight, dbias = _gradients(ctx, dy, ds)
    return dx, dx, dweight, dbias, None, None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
_add_layer_norm.register_autograd(_add_backward, setup_context=_setup_context)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, h: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """LayerNorm of x (... C) with weight and bias (C). With `residual`, of x's shape: s = x + residual, and LN of s.

    With h (... K) and up (C K), which take a residual, s = x + h up^T + residual; x's gradient is all that there is.
    """
    s, y, _ = layer_norm_with_stats(x, weight, bias, eps, residual, h, up)
    return y if residual is None else (s, y)


def layer_norm_with_stats(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, h: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`layer_norm`'s s (x itself without a residual) and y, and the statistics that it keeps: 2 N, fp32; or None."""
    if not enabled(x):
        y = layer_norm_ref(x, weight, bias, eps, residual, h, up)
        return (x, y, None) if residual is None else (*y, None)
    if residual is None:
        return x, *_layer_norm(x, weight, bias, eps)
    return _add_layer_norm(x, residual, weight, bias, eps, h, up)


def layer_norm_again(s: Tensor, weight: Tensor, bias: Tensor, eps: float, stats: Tensor | None) -> Tensor:
    """y (... C), the same bits, from what `layer_norm_with_stats` gave: s (... C) and `stats`. It has no gradient."""
    if stats is None:
        return layer_norm_ref(s, weight, bias, eps)
    return _layer_norm_again(s, weight, bias, stats)
