"""GEGLU: y = value * gelu(gate), with value and gate the halves of the last dimension and gelu the exact one (erf).

gelu(g) = g Phi(g), gelu'(g) = Phi(g) + g phi(g), Phi and phi the normal distribution and its density (arXiv 2002.05202,
1606.08415). For backward only the pre-activation x is kept. One launch forward, one backward.

Both are bound by memory: a program takes COLUMNS of F, the 512 bytes that a warp reads in one 16-byte load a thread, of
several rows, so that each thread has several such loads in flight. The tail is one exp2, one division and seven
multiply-adds, and its exp(-g^2/2) is what backward's phi needs: cheaper than erf beside exp, and more precise far out.

A LoRA's update h up^T of x may be added on the way (lora_linear_deferred): then x in memory is without it, and the
gradient at the sum is returned as x's.

Shapes: ... 2F in, ... F out; N rows, the product of the leading dimensions; R rank, h: ... R, up: 2F R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.low_rank import matrix
from rapm.kernels.runtime import enabled, jit, processors, tl, triton

# Columns and the most rows of a program; fewer rows while there are not WAVES programs for each processor.
COLUMNS, ROWS, WAVES = 256, 8, 4
NUM_WARPS = 4  # at most: a warp for each row


def geglu_ref(x: Tensor, h: Tensor | None = None, up: Tensor | None = None) -> Tensor:  # ... 2F -> ... F
    value, gate = (x if h is None else x + F.linear(h, up).detach()).chunk(2, dim=-1)
    return value * F.gelu(gate)


@jit
def _tail(g):
    """Phi(-|g|) and exp(-g^2/2).

    Phi(-a) = exp(-a^2/2) t P(t) for a >= 0, t = 1 / (1 + p a): Hastings' form (Abramowitz & Stegun 7.1.26) with two
    more terms, fitted to an absolute error of 8e-9 and, for a < 6, a relative one of 2e-6.
    """
    u = 1.0 + 0.2485 * tl.abs(g)
    t = tl.rsqrt(u * u)  # one instruction, where 1 / u is eight
    p = t * -0.0990985938 + 0.382368616
    p = p * t - 0.337743163
    p = p * t + 0.344868251
    p = p * t - 0.00779611539
    p = p * t + 0.120108152
    p = p * t + 0.0972928446
    e = tl.exp2(g * g * -0.72134752044448)  # log2(e) / 2
    return p * t * e, e


@jit
def _tile(n, f, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's rows, its columns (1 COLUMNS), and the tile's places that exist. int64: 2F N may pass 2^31."""
    tiles = tl.cdiv(f, COLUMNS)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < n)[:, None] & (column < f)


@jit
def _pair(x_ptr, h_ptr, up_ptr, up_n, up_r, row, column, mask, n, f, x_stride, R: tl.constexpr):
    """Value and gate, with their update where R > 0."""
    x_ptr += row[:, None] * x_stride + column
    value = tl.load(x_ptr, mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + f, mask, other=0.0).to(tl.float32)
    for r in tl.static_range(R):
        # As a vector: of a column of the tile each thread would load a number once for each of its columns
        h = tl.load(h_ptr + row * R + r, row < n, other=0.0).to(tl.float32)[:, None]
        up = up_ptr + column.to(tl.int64) * up_n + r * up_r
        value += h * tl.load(up, column < f, other=0.0).to(tl.float32)
        gate += h * tl.load(up + f * up_n, column < f, other=0.0).to(tl.float32)
    return value, gate


@jit
def _geglu_fwd_kernel(
    x_ptr, h_ptr, up_ptr, up_n, up_r, y_ptr, n, f, x_stride, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, mask = _tile(n, f, ROWS, COLUMNS)
    value, gate = _pair(x_ptr, h_ptr, up_ptr, up_n, up_r, row, column, mask, n, f, x_stride, R)
    tail, _ = _tail(gate)
    y = value * (tl.maximum(gate, 0.0) - tl.abs(gate) * tail)
    tl.store(y_ptr + row[:, None] * f + column, y.to(y_ptr.dtype.element_ty), mask)


@jit
def _geglu_bwd_kernel(
    dy_ptr, x_ptr, h_ptr, up_ptr, up_n, up_r, dx_ptr, n, f, dy_stride, x_stride, R: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, mask = _tile(n, f, ROWS, COLUMNS)
    value, gate = _pair(x_ptr, h_ptr, up_ptr, up_n, up_r, row, column, mask, n, f, x_stride, R)
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + column, mask, other=0.0).to(tl.float32)
    tail, e = _tail(gate)
    phi = tl.where(gate < 0, tail, 1.0 - tail)
    dx_ptr += row[:, None] * (2 * f) + column
    tl.store(dx_ptr, (dy * (gate * phi)).to(dx_ptr.dtype.element_ty), mask)
    dgate = dy * value * (phi + gate * e * 0.3989422804014327)  # 1 / sqrt(2 pi)
    tl.store(dx_ptr + f, dgate.to(dx_ptr.dtype.element_ty), mask)


def _launch(n: int, f: int, device: torch.device) -> tuple[tuple[int], dict[str, int]]:
    """Grid and launch options."""
    rows, tiles = ROWS, triton.cdiv(f, COLUMNS)
    while rows > 1 and triton.cdiv(n, rows) * tiles < WAVES * processors(device):
        rows //= 2
    return (triton.cdiv(n, rows) * tiles,), dict(ROWS=rows, COLUMNS=COLUMNS, num_warps=min(NUM_WARPS, rows))


def _update(x: Tensor, h: Tensor | None, up: Tensor | None) -> tuple[tuple, int]:
    """h and up as the kernels take them, and R."""
    if h is None:
        return (x, x, 0, 0), 0
    return (matrix(h).contiguous(), up, *up.stride()), up.shape[1]


@torch.library.custom_op("rapm::geglu", mutates_args=())
def _geglu(x: Tensor, h: Tensor | None, up: Tensor | None) -> Tensor:
    f = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], f), dtype=x.dtype, device=x.device)
    x = matrix(x)
    grid, options = _launch(len(x), f, x.device)
    update, rank = _update(x, h, up)
    _geglu_fwd_kernel[grid](x, *update, y, len(x), f, x.stride(0), R=rank, **options)
    return y


@torch.library.custom_op("rapm::geglu_backward", mutates_args=())
def _geglu_backward(dy: Tensor, x: Tensor, h: Tensor | None, up: Tensor | None) -> Tensor:
    f = x.shape[-1] // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy, x = matrix(dy), matrix(x)
    grid, options = _launch(len(x), f, x.device)
    update, rank = _update(x, h, up)
    _geglu_bwd_kernel[grid](dy, x, *update, dx, len(x), f, dy.stride(0), x.stride(0), R=rank, **options)
    return dx


@_geglu.register_fake
def _(x: Tensor, h: Tensor | None, up: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_geglu_backward.register_fake
def _(dy: Tensor, x: Tensor, h: Tensor | None, up: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
    return _geglu_backward(dy, *ctx.saved_tensors), None, None


_geglu.register_autograd(_backward, setup_context=_setup_context)


def geglu(x: Tensor, h: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """value * gelu(gate) for x (... 2F), its first half the value and its second the gate: ... F in x's dtype.

    With h (... R) and up (2F R), of x + h up^T; all of its gradient goes to x, as lora_linear_deferred expects it.
    """
    return _geglu(x, h, up) if enabled(x) else geglu_ref(x, h, up)
