"""Frozen weights in fewer bits, and back: one launch makes the whole weight, which lives no longer than its product.

int8: W[n, k] = scale[n] codes[n, k], scale[n] = max |W[n]| / 127.
nf4: NormalFloat4 with double quantisation (QLoRA, arXiv 2305.14314): W[n, k] = scale[n] blocks[n, k // 64] / 255
LEVELS[code], the levels being the quantiles of a normal distribution. A block's own scale is a byte, a share of its
row's, rounded up, so that nothing is cut off. Two codes a byte, the even column in the low half: 4.1 bits a weight.

Shapes: N outputs, K inputs (of a convolution all of a row's numbers, in memory's order), B = ceil(K / 64) blocks;
codes: as W in int8, N K/2 in nf4; scale: N in fp32; blocks: N B, bytes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.runtime import enabled, jit, tl, triton

BLOCK = 64  # QLoRA's
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
COLUMNS = 2048  # of a program


class Low(NamedTuple):
    """A weight in fewer bits; `blocks` where it is nf4."""

    codes: Tensor
    scale: Tensor
    blocks: Tensor | None = None


def int8(weight: Tensor) -> Low:
    """W (N K, or N C k k) in int8; a convolution's in its own layout."""
    w = weight.float() if weight.dim() > 2 else weight.float().contiguous()
    scale = w.abs().flatten(1).amax(1) / 127
    codes = w / scale.where(scale > 0, 1.0).view(-1, *(1 for _ in w.shape[1:]))
    return Low(torch.round(codes).to(torch.int8), scale)


def nf4(weight: Tensor) -> Low:
    """W (N K), K even, in nf4. ValueError for an odd K."""
    if weight.shape[1] % 2:
        raise ValueError(f"nf4: two codes a byte: a weight of {tuple(weight.shape)} has an odd width")
    n, k = weight.shape
    w = F.pad(weight.float(), (0, -k % BLOCK)).view(n, -1, BLOCK)
    most = w.abs().amax(2)
    scale = most.amax(1)
    blocks = torch.ceil(most / scale.where(scale > 0, 1.0)[:, None] * 255).clamp(1, 255)
    step = scale[:, None] * blocks / 255
    levels = _levels(w.device)
    codes = torch.bucketize(w / step.where(step > 0, 1.0)[..., None], (levels[1:] + levels[:-1]) / 2)
    codes = codes.view(n, -1)[:, :k].to(torch.uint8)
    return Low(codes[:, ::2] | codes[:, 1::2] << 4, scale, blocks.to(torch.uint8))


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """LEVELS on `device`, once: a graph under capture cannot fetch them."""
    return torch.tensor(LEVELS, device=device)


def dequantise_ref(codes: Tensor, scale: Tensor, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    if blocks is None:
        return (codes.float() * scale.view(-1, *(1 for _ in codes.shape[1:]))).to(dtype)
    both = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).long()
    steps = (scale[:, None] * (blocks.float() / 255)).repeat_interleave(BLOCK, 1)[:, : both.shape[1]]
    return (steps * _levels(codes.device)[both]).to(dtype)


@jit
def _level(code):
    """LEVELS[code], by four halvings: a table in memory would be one more thing to have on every device."""
    one, two, four, eight = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    a = tl.where(one, -0.6961928009986877, -1.0)
    b = tl.where(one, -0.39491748809814453, -0.5250730514526367)
    c = tl.where(one, -0.18477343022823334, -0.28444138169288635)
    d = tl.where(one, 0.0, -0.09105003625154495)
    e = tl.where(one, 0.16093020141124725, 0.07958029955625534)
    f = tl.where(one, 0.33791524171829224, 0.24611230194568634)
    g = tl.where(one, 0.5626170039176941, 0.44070982933044434)
    h = tl.where(one, 1.0, 0.7229568362236023)
    low = tl.where(four, tl.where(two, d, c), tl.where(two, b, a))
    return tl.where(eight, tl.where(four, tl.where(two, h, g), tl.where(two, f, e)), low)


@jit
def _dequantise_kernel(codes, scale, blocks, w, K, B, COLUMNS: tl.constexpr):
    """COLUMNS columns of a row of w (N K); its rows follow one another in memory, and so do those of the codes."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.load(scale + row)
    if blocks is None:
        value = tl.load(codes + row * K + k, mask=k < K, other=0).to(tl.float32)
    else:
        byte = tl.load(codes + row * (K // 2) + k // 2, mask=k < K, other=0).to(tl.int32)
        value = _level((byte >> (k % 2 * 4)) & 15)
        step = step * (tl.load(blocks + row * B + k // 64, mask=k < K, other=0).to(tl.float32) / 255)
    tl.store(w + row * K + k, (step * value).to(w.dtype.element_ty), mask=k < K)


def _like(codes: Tensor, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight, uninitialised, in the codes' layout."""
    if blocks is None:
        return torch.empty_like(codes, dtype=dtype)
    return torch.empty(len(codes), 2 * codes.shape[1], dtype=dtype, device=codes.device)


@torch.library.custom_op("rapm::dequantise", mutates_args=())
def _dequantise(codes: Tensor, scale: Tensor, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    w = _like(codes, blocks, dtype)
    n, k = len(w), w[0].numel()
    _dequantise_kernel[(n, triton.cdiv(k, COLUMNS))](
        codes, scale, blocks, w, k, 0 if blocks is None else blocks.shape[1], COLUMNS=COLUMNS, num_warps=4
    )
    return w


@_dequantise.register_fake
def _(codes: Tensor, scale: Tensor, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _like(codes, blocks, dtype)


def dequantise(codes: Tensor, scale: Tensor, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight of `Low`'s parts in `dtype`: N K, or of an int8 convolution N C k k in the codes' layout.

    No gradient: the weights are frozen.
    """
    if not enabled(scale):
        return dequantise_ref(codes, scale, blocks, dtype)
    return _dequantise(codes, scale, blocks, dtype)
