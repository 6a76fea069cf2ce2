"""A feed-forward's up-projection and its GEGLU in one launch: y = value * gelu(gate), [value, gate] = x W^T + b.

For passes without a gradient, of which trajectories are made: the product alone would be written and read again, M 2F
numbers beside the M F that are wanted. A program multiplies its rows of x by BN rows of W's value half and the same of
its gate half, laid below one another as one operand, so that a thread ends with both of a pair and no sum is exchanged.
Sums, bias and GEGLU (the exact gelu, by a fit of its own) are fp32, rounded once: the two steps round the product too.

On Hopper the tiles are TMA's and the products wgmma's, m64n256. There a program takes one tile after another, with the
next one's operands on their way while it ends one. Elsewhere a program has one tile and loads by pointers.

Shapes: M rows of x (all its leading dimensions), K inputs, F outputs; x: ... K, W: 2F K, b: 2F, y: ... F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.geglu import geglu_ref
from rapm.kernels.low_rank import matrix
from rapm.kernels.runtime import enabled, jit, processors, tl, triton

if triton:
    from triton.tools.tensor_descriptor import TensorDescriptor

# A tile is BM rows and BN columns of y, BK deep at a time. Hopper's takes 48 KiB of shared memory a stage and 32 for y,
# of 227; the others' 32 for each stage but one, of 99.
HOPPER = dict(BM=128, BN=128, BK=64, STAGES=4, num_warps=8)
OTHERS = dict(BM=128, BN=64, BK=64, STAGES=3, num_warps=8)
GROUP = 8  # blocks of rows that share columns of W while they are in the cache
# Architecture -> (K, F) -> rows from which on this takes the place of cuBLAS and geglu. On an H100 it is 1.30 times as
# fast at 65536 rows of 640, 1.12 at 16384 of 1280, as at 4096 and 1024. More are asked for than training has: its
# features of real positions are to round as those of fake ones do, which have a gradient.
FASTER: dict[int, dict[tuple[int, int], int]] = {90: {(640, 2560): 16384, (1280, 5120): 16384}}


def geglu_linear_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # ... K -> ... F
    return geglu_ref(F.linear(x, weight, bias))


@jit
def _gelu(g):
    """g Phi(g), of which Phi(-a) = exp2(-Q(a)), a >= 0: Q fitted to a relative error of 4e-6 of Phi for a < 6.

    In fp32 that is 7e-6; beyond, Phi is below 1e-9, and Q goes on growing. No product goes on while a tile ends, so it
    has half the instructions of geglu's, which has fp32's precision to keep.
    """
    a = tl.abs(g)
    q = a * -1.83473453e-6 + 6.15966739e-5
    q = q * a - 9.30511346e-4
    q = q * a + 0.00850783394
    q = q * a - 0.0539599420
    q = q * a - 0.458464537
    q = q * a - 1.15125097
    q = q * a - 0.999995304
    return tl.maximum(g, 0.0) - a * tl.exp2(q)


@jit
def _place(tile, M, F, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP blocks of rows go through the columns together."""
    wide = tl.cdiv(F, BN) * GROUP
    first = tile // wide * GROUP
    group = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    return (first + tile % wide % group) * BM, tile % wide // group * BN


@jit
def _geglu_linear_kernel(
    x, x_row, w, bias, y, M, F, K, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x (M K), w (2 F K) and y (M F) are descriptors if TMA, else pointers."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        m, f = _place(tile, M, F, BM, BN, GROUP)
        n = f + tl.arange(0, BN)
        total = tl.zeros((BM, 2 * BN), tl.float32)
        if TMA:
            for k in tl.range(0, K, BK, num_stages=STAGES):
                b = w.load([0, f, k]).reshape(2 * BN, BK)
                total = tl.dot(x.load([m, k]), b.T, total)
        else:
            row, column, k = m + tl.arange(0, BM)[:, None], tl.arange(0, 2 * BN)[None, :], tl.arange(0, BK)
            at_x = x + row.to(tl.int64) * x_row + k[None, :]
            at_w = w + (f + column % BN + column // BN * F).to(tl.int64) * K + k[:, None]
            for start in tl.range(0, K, BK, num_stages=STAGES):
                left = K - start
                a = tl.load(at_x + start, mask=(row < M) & (k < left)[None, :], other=0.0)
                b = tl.load(at_w + start, mask=(k < left)[:, None] & (f + column % BN < F), other=0.0)
                total = tl.dot(a, b, total)
        value, gate = total.reshape(BM, 2, BN).permute(0, 2, 1).split()
        value += tl.load(bias + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + F + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
        out = value * _gelu(gate)
        if TMA:
            y.store([m, f], out.to(y.dtype))
        else:
            mask = (row < M) & (n < F)[None, :]
            tl.store(y + row.to(tl.int64) * F + n[None, :], out.to(y.dtype.element_ty), mask=mask)


def architecture(device: torch.device) -> int:
    """Compute capability, 90 on Hopper; 0 off CUDA."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these: bf16 or fp16, whose rows are whole words of 16 bytes."""
    return x.dtype.itemsize == 2 and weight.shape[1] % 8 == 0 and weight.shape[0] % 16 == 0


def faster(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `geglu_linear` is the faster way, by shape and card alone, and no gradient is wanted."""
    if not FASTER or not enabled(x) or not takes(x, weight) or _wanted(x, weight, bias):
        return False
    f, k = len(weight) // 2, weight.shape[1]
    least = FASTER.get(architecture(x.device), {}).get((k, f))
    return least is not None and x.numel() >= least * k


def _wanted(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _words(x: Tensor) -> Tensor:
    """x (M K), each row from a multiple of 16 bytes on: a view wherever it is one."""
    return x.clone() if x.stride(0) % 8 or x.data_ptr() % 16 else x


@torch.library.custom_op("rapm::geglu_linear", mutates_args=())
def _geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    f, k = len(weight) // 2, weight.shape[1]
    y = x.new_empty(*x.shape[:-1], f)
    rows, halves, out = _words(matrix(x)), _words(weight.contiguous()).view(2, f, k), y.view(-1, f)
    m, row = len(rows), rows.stride(0)
    tma = architecture(x.device) // 10 == 9
    tile = HOPPER if tma else OTHERS
    bm, bn, bk = (tile[name] for name in ("BM", "BN", "BK"))
    programs = triton.cdiv(m, bm) * triton.cdiv(f, bn)
    if tma:
        programs = min(programs, processors(x.device))
        blocks = (rows, [bm, bk]), (halves, [2, bn, bk]), (out, [bm, bn])
        rows, halves, out = (TensorDescriptor.from_tensor(*block) for block in blocks)
    _geglu_linear_kernel[(programs,)](rows, row, halves, bias, out, m, f, k, TMA=tma, GROUP=GROUP, **tile)
    return y


@_geglu_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """value * gelu(gate) for x (... K), W (2F K) and b (2F), [value, gate] = x W^T + b: ... F in x's dtype.

    TypeError where a gradient is wanted: it has none. ValueError for what it does not take: fp32, rows that are no
    multiple of 16 bytes.
    """
    if _wanted(x, weight, bias):
        raise TypeError(f"geglu_linear of {tuple(x.shape)}: has no gradient: use geglu of the product, or no_grad()")
    if not enabled(x):
        return geglu_linear_ref(x, weight, bias)
    if not takes(x, weight):
        raise ValueError(f"geglu_linear takes no {x.dtype}, {tuple(x.shape)} by {tuple(weight.shape)}")
    return _geglu_linear(x, weight, bias)
