"""Linear layer of a frozen int8 weight, multiplied in int8 (W8A8), with an optional low-rank update.

y = s[m] scale[n] (X W^T)[m, n] + b + h up^T, where W are the weight's codes and X those of x with a scale for each row:
s[m] = max |x[m]| / 127, X = round(x / s) (as LLM.int8, arXiv 2208.07339, without its outliers); h = x down^T. The
integers' sums are exact. Backward, straight through the rounding: dx = r[m] (D W)[m, k] + g down, D and r[m] being the
rows of dy scale[n] in int8, so that the same codes serve, g = dy up, ddown = g^T x, dup = dy^T h. It keeps x (for
ddown), h (M R, for dup) and the codes; neither rounded numbers nor a weight in another type.

Tensor cores read 8-bit operands along the dimension that is summed over, which is W's outputs in the backward: there
the codes are turned first, in a launch and a buffer that live as long as the product (W's bytes, beside 2 M times as
many operations). Launches: forward two (X and s; the product), backward three, and low_rank's where there is a LoRA.
fp8 was weighed and left out: e4m3 keeps three bits after the first, which puts normal numbers off by 2.6%, int8 with a
scale for each row by 0.8%; and by the data sheets of Ampere, Ada and Hopper int8 is nowhere the slower of the two.
G layers of one size that share x are one, as in lora_linear.

Shapes: M rows of x (all leading dimensions), K inputs, N outputs, R rank; x: ... K, codes: N K, scale and b: N,
down: GR K, up: N R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapm.kernels.frozen_conv import require_frozen
from rapm.kernels.lora_linear import groups, lora_linear_ref
from rapm.kernels.low_rank import blocks, matrix, rows, small, sums
from rapm.kernels.runtime import enabled, jit, multiplies, processors, tl, triton

# Rows, columns and depth of a program's tile, warps: the first that gives every processor one. 128 codes are a line of
# memory and the widest shared-memory swizzle; three stages of the largest are 96 KiB.
TILES = ((128, 128, 8), (64, 128, 4), (64, 64, 4))
DEPTH, STAGES = 128, 3
GROUP = 8  # blocks of rows that share columns of W while they are in the cache
TURNED = 128  # codes a side that one program turns


def quantise_rows_ref(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    v = x.float() if columns is None else x.float() * columns
    scale = v.abs().amax(1) / 127
    return torch.floor(v / scale.where(scale != 0, 1.0)[:, None] + 0.5).to(torch.int8), scale


def int8_linear_ref(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, down: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """The forward; its gradient is not that of the operator, since rounding has none."""
    rounded, s = quantise_rows_ref(x.flatten(0, -2))
    y = (s[:, None] * scale * (rounded.float() @ codes.float().t())).view(*x.shape[:-1], -1)
    y = y if bias is None else y + bias
    if down is not None and up is not None:
        y = y + lora_linear_ref(x.float(), down.new_zeros(codes.shape).float(), None, down.float(), up.float())
    return y.to(x.dtype)


@jit
def _quantise_rows_kernel(x, x_row, columns, codes, scale, M, K, BM: tl.constexpr, BK: tl.constexpr):
    """BM whole rows of x (M K), times `columns`, to int8 with a scale each."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    k = tl.arange(0, BK)[None, :]
    mask = (m < M) & (k < K)
    v = tl.load(x + m.to(tl.int64) * x_row + k, mask=mask, other=0.0).to(tl.float32)
    if columns is not None:
        v *= tl.load(columns + k, mask=k < K, other=0.0)
    # As integers the bits of positive numbers have their order, and NaN is the largest: it is not lost
    bits = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    s = bits.to(tl.float32, bitcast=True) / 127
    q = tl.floor(v / tl.where(s != 0, s, 1.0) + 0.5).to(tl.int8)
    tl.store(codes + m.to(tl.int64) * K + k, q, mask=mask)
    tl.store(scale + m, s, mask=m < M)


@jit
def _turn_kernel(w, t, N, K, SIDE: tl.constexpr):
    """t (K N) from w (N K)."""
    n = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    k = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    tile = tl.load(w + n.to(tl.int64)[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
    out = t + k.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, tl.trans(tile), mask=(k < K)[:, None] & (n < N)[None, :])


@jit
def _product_kernel(
    x, w, row_scale, column_scale, bias, y, M, N, K,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y (M N) = [y if ADD] + [bias] + row_scale [column_scale] x w^T, for codes x (M K) and w (N K)."""
    wide = tl.cdiv(N, BN) * GROUP
    first = tl.program_id(0) // wide * GROUP
    group = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    m = (first + tl.program_id(0) % wide % group) * BM + tl.arange(0, BM)
    n = tl.program_id(0) % wide // group * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x += m.to(tl.int64)[:, None] * K + k[None, :]
    w += n.to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        left = K - start
        a = tl.load(x + start, mask=(m < M)[:, None] & (k < left)[None, :], other=0)
        b = tl.load(w + start, mask=(k < left)[:, None] & (n < N)[None, :], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    mask = (m < M)[:, None] & (n < N)[None, :]
    tile = total.to(tl.float32) * tl.load(row_scale + m, mask=m < M, other=0.0)[:, None]
    if column_scale is not None:
        tile *= tl.load(column_scale + n, mask=n < N, other=0.0)[None, :]
    if bias is not None:
        tile += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y += m.to(tl.int64)[:, None] * N + n[None, :]
    if ADD:
        tile += tl.load(y, mask=mask, other=0.0).to(tl.float32)
    tl.store(y, tile.to(y.dtype.element_ty), mask=mask)


def quantise_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (M K) and scale (M) of x (M K), times `columns` (K) in fp32 where given."""
    if not enabled(x):
        return quantise_rows_ref(x, columns)
    m, k = x.shape
    codes, scale = x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    wide = triton.next_power_of_2(k)
    tall = max(1, min(8, 4096 // wide))
    _quantise_rows_kernel[(triton.cdiv(m, tall),)](
        x, x.stride(0), columns, codes, scale, m, k, BM=tall, BK=wide, num_warps=4 if wide <= 4096 else 8
    )
    return codes, scale


def _turned(codes: Tensor) -> Tensor:
    """The codes (N K) as K N, in memory too."""
    n, k = codes.shape
    out = codes.new_empty(k, n)
    _turn_kernel[(triton.cdiv(n, TURNED), triton.cdiv(k, TURNED))](codes, out, n, k, SIDE=TURNED, num_warps=8)
    return out


def _multiply(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor | None, backward: bool) -> Tensor:
    """[y] + x W^T + bias for x (M K); `backward`: [y] + x W for x (M N). In y's memory where it is given."""
    rounded, s = quantise_rows(x, scale if backward else None)
    if not multiplies(x):
        product = s[:, None] * (rounded.float() @ (codes.float() if backward else codes.float().t()))
        product = product if backward else product * scale
        return sum((t.float() for t in (y, bias) if t is not None), product).to(x.dtype)
    w = _turned(codes) if backward else codes
    (m, k), n, add = x.shape, len(w), y is not None
    y = x.new_empty(m, n) if y is None else y
    count = [triton.cdiv(m, bm) * triton.cdiv(n, bn) for bm, bn, _ in TILES]
    place = next((i for i, programs in enumerate(count) if programs >= processors(x.device)), len(TILES) - 1)
    bm, bn, warps = TILES[place]
    _product_kernel[(count[place],)](
        rounded, w, s, None if backward else scale, bias, y, m, n, k,
        ADD=add, BM=bm, BN=bn, BK=DEPTH, GROUP=GROUP, STAGES=STAGES, num_warps=warps,
    )  # fmt: skip
    return y


def _begin(x: Tensor, a: Tensor, b: Tensor, groups_a: int = 1, groups_b: int = 1) -> tuple[Tensor, Tensor]:
    """y = t b and t = x a, for x (M K), a (K R) and b (R N), either the blocks of a diagonal where grouped."""
    if enabled(x) and small(x, a.shape[1] * groups_a):
        y = x.new_empty(len(x), b.shape[1])
        return y, rows(x, a, b, None, y, groups_a=groups_a, groups_b=groups_b)
    t = blocks(x, a, groups_a, 0)
    return blocks(t, b, groups_b, 1), t


@torch.library.custom_op("rapm::int8_linear", mutates_args=())
def _int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None
) -> tuple[Tensor, Tensor]:  # y, h
    shape, x = (*x.shape[:-1], len(codes)), matrix(x)
    y, h = None, x.new_empty(0)
    if down is not None and up is not None:
        y, h = _begin(x, down.t(), up.t(), groups_b=groups(down, up))
    return _multiply(x, codes, scale, bias, y, False).view(shape), h


@torch.library.custom_op("rapm::int8_linear_backward", mutates_args=())
def _int8_linear_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, codes: Tensor, scale: Tensor, down: Tensor | None,
    up: Tensor | None, wants_x: bool,
) -> list[Tensor]:  # fmt: skip
    """dx if it is wanted, ddown if x is given, dup if h is given."""
    shape, dy = (*dy.shape[:-1], codes.shape[1]), matrix(dy)
    if down is None or up is None:
        return [_multiply(dy, codes, scale, None, None, True).view(shape)]
    kernels, x, dx = enabled(dy) and small(dy, len(down)), None if x is None else matrix(x), []
    g, count = None, groups(down, up)
    if wants_x:
        y, g = _begin(dy, up, down, groups_a=count)
        dx = [_multiply(dy, codes, scale, None, y, True).view(shape)]
    elif x is not None:
        g = rows(dy, up, groups_a=count) if kernels else blocks(dy, up, count, 0)
    return dx + sums(g, x, h, dy, groups=count, kernels=enabled(dy))


@_int8_linear.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    h = x.new_empty(0) if down is None else x.new_empty(lead.numel(), down.shape[0])
    return x.new_empty((*lead, codes.shape[0])), h


@_int8_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor | None, h: Tensor | None, codes: Tensor, scale: Tensor, down: Tensor | None,
    up: Tensor | None, wants_x: bool,
) -> list[Tensor]:  # fmt: skip
    grads = [dy.new_empty((*dy.shape[:-1], codes.shape[1]))] if wants_x else []
    return grads + [dy.new_empty(t.shape) for t, kept in ((down, x), (up, h)) if t is not None and kept is not None]


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, codes, scale, _, down, up = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # no zeros for h
    wants = ctx.needs_input_grad
    ctx.save_for_backward(x if wants[4] else None, h if wants[5] else None, codes, scale, down, up)


def _backward(ctx, dy: Tensor | None, _) -> tuple:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    wants = ctx.needs_input_grad
    wants_x, wants_down, wants_up = wants[0], wants[4], wants[5]
    x, h, *weights = ctx.saved_tensors
    grads = iter(_int8_linear_backward(dy, x if wants_down else None, h if wants_up else None, *weights, wants_x))
    dx, ddown, dup = (next(grads) if want else None for want in (wants_x, wants_down, wants_up))
    return dx, None, None, None, ddown, dup


_int8_linear.register_autograd(_backward, setup_context=_setup_context)


def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, down: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """x W^T + b [+ (x down^T) up^T] in int8: ... N.

    For x (... K), codes (N K) and scale (N) of a frozen W (dequantise.int8), b (N or None), down (R K; GR K of G layers
    in one) and up (N R). Gradients for x, down and up. TypeError where b requires one.
    """
    require_frozen("int8_linear", scale, bias)
    return _int8_linear(x, codes, scale, bias, down, up)[0]
