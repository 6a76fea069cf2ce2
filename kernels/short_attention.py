"""Softmax attention over few keys, those of a prompt: o = softmax(q k^T / sqrt(d)) v.

All L keys are one tile, so a row's softmax P is whole in registers: nothing runs along, and backward needs no
statistics. With g the gradient of o:  dP = g v^T,  dS = P (dP - sum_L P dP) / sqrt(d),  dq = dS k,  dk = dS^T q,
dv = P^T g. Kept for backward: q, k and v, not o. A program has one head and some rows; where k and v want gradients (a
LoRA's do, a frozen text's do not) it adds up dk and dv over its rows in fp32, and PyTorch the programs' sums, in order.

One of the candidates of `attention`, which times it. bf16 and fp16 only: fp32 products would have no tensor cores.

Shapes: B batch, H heads, N rows, L keys, D of a head; q: B H N D and k, v: B H L D by any strides; o and all gradients
lie in memory as B N H D. A tile is BN rows, BL keys and BD of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapm.kernels.runtime import enabled, jit, processors, tensor_cores, tl, triton

KEYS = 128  # at most
TILE = 128 * 64  # numbers in a tile of k, at most
# Rows and warps of a program. Backward's tiles of k, v, q, g, P and dS are 76 KB of shared memory, 104 KB at 64 rows;
# its sums dk and dv are 64 registers a thread in 8 warps.
FORWARD, BACKWARD = dict(BN=64, num_warps=4), dict(BN=32, num_warps=8)
LOG2E = 1.4426950408889634


def short_attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return p @ v


# The width of a head and the strides between heads are constants: 40 is no multiple of 16, and as an argument it would
# leave loads and stores of two bytes each.
@jit
def _at(x, b, h, i, d, x_b, x_h, x_n):
    """Pointers to rows i (a column) and d (a row) of head h."""
    return x + b * x_b + h * x_h + i.to(tl.int64) * x_n + d


@jit
def _softmax(q, k, scale, j, L):
    """P of a tile, BN BL in fp32; scale has log2(e) in it. 0 where there is no key."""
    s = tl.where(j < L, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    p = tl.exp2(s - tl.max(s, axis=1, keep_dims=True))
    return p / tl.sum(p, axis=1, keep_dims=True)


@jit
def _short_attention_fwd_kernel(
    q, q_b, q_h: tl.constexpr, q_n, k, k_b, k_h: tl.constexpr, k_n, v, v_b, v_h: tl.constexpr, v_n, o,
    N, H, L, D: tl.constexpr, scale, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n, j = tl.program_id(0) * BN + tl.arange(0, BN)[:, None], tl.arange(0, BL)[:, None]
    d = tl.arange(0, BD)[None, :]
    kt = tl.load(_at(k, b, h, j, d, k_b, k_h, k_n), mask=(j < L) & (d < D), other=0.0)
    vt = tl.load(_at(v, b, h, j, d, v_b, v_h, v_n), mask=(j < L) & (d < D), other=0.0)
    qt = tl.load(_at(q, b, h, n, d, q_b, q_h, q_n), mask=(n < N) & (d < D), other=0.0)
    p = _softmax(qt, kt, scale, tl.arange(0, BL)[None, :], L)
    y = tl.dot(p.to(vt.dtype), vt).to(o.dtype.element_ty)
    tl.store(_at(o, b, h, n, d, N * H * D, D, H * D), y, mask=(n < N) & (d < D))


@jit
def _short_attention_bwd_kernel(
    g, g_b, g_h: tl.constexpr, g_n, q, q_b, q_h: tl.constexpr, q_n, k, k_b, k_h: tl.constexpr, k_n,
    v, v_b, v_h: tl.constexpr, v_n, dq, parts, N, H, L, D: tl.constexpr, scale, natural, SPAN,
    BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    j, d = tl.arange(0, BL)[:, None], tl.arange(0, BD)[None, :]
    kt = tl.load(_at(k, b, h, j, d, k_b, k_h, k_n), mask=(j < L) & (d < D), other=0.0)
    vt = tl.load(_at(v, b, h, j, d, v_b, v_h, v_n), mask=(j < L) & (d < D), other=0.0)
    if parts is not None:
        dk = tl.zeros((BL, BD), tl.float32)
        dv = tl.zeros((BL, BD), tl.float32)
    begin = tl.program_id(0) * SPAN
    for start in range(begin, tl.minimum(begin + SPAN, N), BN):
        n = start + tl.arange(0, BN)[:, None]
        mask = (n < N) & (d < D)
        qt = tl.load(_at(q, b, h, n, d, q_b, q_h, q_n), mask=mask, other=0.0)
        gt = tl.load(_at(g, b, h, n, d, g_b, g_h, g_n), mask=mask, other=0.0)  # 0 in rows that are not there
        p = _softmax(qt, kt, scale, tl.arange(0, BL)[None, :], L)
        dp = tl.dot(gt, tl.trans(vt))
        ds = (p * (dp - tl.sum(p * dp, axis=1, keep_dims=True)) * natural).to(qt.dtype)
        if dq is not None:
            tl.store(_at(dq, b, h, n, d, N * H * D, D, H * D), tl.dot(ds, kt).to(dq.dtype.element_ty), mask=mask)
        if parts is not None:
            dk = tl.dot(tl.trans(ds), qt, dk)
            dv = tl.dot(tl.trans(p.to(gt.dtype)), gt, dv)
    if parts is not None:  # 2 (programs) B L H D
        size = tl.num_programs(2).to(tl.int64) * L * H * D
        parts = _at(parts + tl.program_id(0) * size, b, h, j, d, L * H * D, D, H * D)
        tl.store(parts, dk, mask=(j < L) & (d < D))
        tl.store(parts + tl.num_programs(0) * size, dv, mask=(j < L) & (d < D))


def _power(n: int) -> int:
    """A tile's side that holds n: tensor cores want 16."""
    return max(16, 1 << (n - 1).bit_length())


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def fits(keys: int, width: int) -> bool:
    """Whether so many keys of that width are one tile."""
    return keys <= KEYS and _power(keys) * _power(width) <= TILE


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel takes these: bf16 or fp16, keys that fit, a card with tensor cores that Triton uses."""
    return q.dtype.itemsize == 2 and fits(k.shape[2], q.shape[3]) and tensor_cores(q.device)


@torch.library.custom_op("rapm::short_attention", mutates_args=())
def _short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # B N H D
    q, k, v = (_inner(x) for x in (q, k, v))
    batch, heads, n, width = q.shape
    o, tile = q.new_empty(batch, n, heads, width), dict(FORWARD, BL=_power(k.shape[2]), BD=_power(width))
    inputs = [part for x in (q, k, v) for part in (x, *x.stride()[:3])]
    sizes = n, heads, k.shape[2], width, width**-0.5 * LOG2E
    _short_attention_fwd_kernel[(triton.cdiv(n, tile["BN"]), heads, batch)](*inputs, o, *sizes, **tile)
    return o


@torch.library.custom_op("rapm::short_attention_backward", mutates_args=())
def _short_attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, wants_q: bool, wants_kv: bool
) -> tuple[Tensor, Tensor]:
    """dq (B N H D), and dk and dv (2 B L H D); empty where not wanted."""
    g, q, k, v = (_inner(x) for x in (g.transpose(1, 2), q, k, v))
    batch, heads, n, width = q.shape
    length = k.shape[2]
    tile = dict(BACKWARD, BL=_power(length), BD=_power(width))
    blocks = triton.cdiv(n, tile["BN"])
    # As many programs as blocks, unless each leaves sums behind: then no more than processors, of which each has
    # registers for one, so that the first over would take as long again as all the others
    programs = min(blocks, max(1, processors(q.device) // (heads * batch))) if wants_kv else blocks
    span = triton.cdiv(blocks, programs) * tile["BN"]
    programs = triton.cdiv(n, span)
    dq = q.new_empty(batch, n, heads, width) if wants_q else None
    parts = g.new_empty(2, programs, batch, length, heads, width, dtype=torch.float32) if wants_kv else None
    inputs = [part for x in (g, q, k, v) for part in (x, *x.stride()[:3])]
    sizes = n, heads, length, width, width**-0.5 * LOG2E, width**-0.5, span
    _short_attention_bwd_kernel[(programs, heads, batch)](*inputs, dq, parts, *sizes, **tile)
    sums = q.new_empty(0) if parts is None else parts.sum(1).to(q.dtype)
    return q.new_empty(0) if dq is None else dq, sums


@_short_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)


@_short_attention_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, wants_q: bool, wants_kv: bool) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = k.shape
    return q.new_empty(g.shape if wants_q else 0), q.new_empty((2, batch, length, heads, width) if wants_kv else 0)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad
    dq, dkv = _short_attention_backward(g, *ctx.saved_tensors, wants[0], wants[1] or wants[2])
    dq = dq.transpose(1, 2) if wants[0] else None
    dk, dv = (dkv[i].transpose(1, 2) if wants[1 + i] else None for i in (0, 1))
    return dq, dk, dv


_short_attention.register_autograd(_backward, setup_context=_setup_context)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B H N D) and at most KEYS keys k, v (B H L D): B H N D over memory B N H D.

    ValueError for what it does not take: fp32, more keys, heads over 64 wide, cards before Ampere.
    """
    if not enabled(q):
        return short_attention_ref(q, k, v)
    if not takes(q, k):
        raise ValueError(f"short_attention takes no {q.dtype}, {tuple(q.shape)} over {k.shape[2]} keys")
    return _short_attention(q, k, v).transpose(1, 2)
