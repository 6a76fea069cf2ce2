"""Convolution of a frozen weight: y = conv2d(x, W) + b, differentiated by x alone.

Stock autograd keeps x for the gradient of W, whether or not W wants one; this keeps nothing but W, which is there
anyway. A 1x1 convolution is a product of matrices, to which cuBLAS adds the bias, and so is its backward. The others
are cuDNN's: backward is the transposed convolution, which asks for no input (PyTorch's convolution_backward takes its
layout from the input, and for a stand-in without one it turns dy to channels first and back), and their bias is one
launch of ours over y: PyTorch's takes more than twice as long, a number at a time.

Shapes: x: B C H W, W: N C k k, b: N, y: B N H' W', H' = (H + 2 padding - k) // stride + 1. All are channels-last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.kernels.low_rank import matrix
from rapm.kernels.runtime import enabled, jit, tl, triton

LAYOUT = torch.channels_last
ROWS, COLUMNS = 64, 64  # of y in a program: 32 numbers a thread, lines of 128 bytes


def frozen_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Only algorithms that give the same bits every run: some of cuDNN's add up atomically."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before


@jit
def _add_bias_kernel(y, bias, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y (M N) += bias (N)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at, mask = y + row.to(tl.int64) * N + n, (row < M) & (n < N)
    b = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + b).to(y.dtype.element_ty), mask=mask)


def as_matrix(x: Tensor) -> Tensor:
    """x (B C H W) as a matrix (B H W) C: a view where x is channels-last."""
    return matrix(x.permute(0, 2, 3, 1))


def pointwise(weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the convolution is a product of matrices."""
    return weight.shape[2:] == (1, 1) and stride == 1 and padding == 0


def _images(y: Tensor, like: tuple[int, int, int]) -> Tensor:
    """A matrix (B H W) N as B N H W, channels-last, of `like`'s B H W: a view."""
    return y.view(*like, y.shape[1]).permute(0, 3, 1, 2)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """conv2d inside an operator: channels-last, the same bits every run."""
    batch, _, *size = x.shape
    if pointwise(weight, stride, padding):
        return _images(F.linear(as_matrix(x), weight.flatten(1), bias), (batch, *size))
    with _deterministic():
        y = F.conv2d(x.contiguous(memory_format=LAYOUT), weight, None, stride, padding)
    y = y.contiguous(memory_format=LAYOUT)
    if bias is not None:
        m, n = y.numel() // y.shape[1], y.shape[1]
        grid = triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS)
        _add_bias_kernel[grid](y, bias.contiguous(), m, n, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return y


def conv_input_grad(dy: Tensor, weight: Tensor, shape: list[int], stride: int, padding: int) -> Tensor:
    """The gradient of conv2d's input, of `shape`, inside an operator: channels-last, the same bits every run."""
    if pointwise(weight, stride, padding):
        return _images(as_matrix(dy) @ weight.flatten(1), (shape[0], *shape[2:]))
    # Of the input's sizes that give dy's, how far above the smallest it was
    smallest = ((n - 1) * stride - 2 * padding + weight.shape[2] for n in dy.shape[2:])
    output_padding = [size - least for size, least in zip(shape[2:], smallest, strict=True)]
    with _deterministic():
        dx = F.conv_transpose2d(dy.contiguous(memory_format=LAYOUT), weight, None, stride, padding, output_padding)
    return dx.contiguous(memory_format=LAYOUT)


def conv_like(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """What `conv` returns, uninitialised."""
    height, width = ((n + 2 * padding - weight.shape[2]) // stride + 1 for n in x.shape[2:])
    shape = x.shape[0], weight.shape[0], height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)


def require_frozen(name: str, weight: Tensor, bias: Tensor | None) -> None:
    """TypeError for a weight or bias whose gradient is wanted: the operator `name` computes none."""
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise TypeError(f"{name}: weight {tuple(weight.shape)} or its bias requires grad: call requires_grad_(False)")


@torch.library.custom_op("rapm::frozen_conv", mutates_args=())
def _frozen_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    return conv(x, weight, bias, stride, padding)


@torch.library.custom_op("rapm::frozen_conv_backward", mutates_args=())
def _frozen_conv_backward(dy: Tensor, weight: Tensor, shape: list[int], stride: int, padding: int) -> Tensor:
    return conv_input_grad(dy, weight, shape, stride, padding)


@_frozen_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    return conv_like(x, weight, stride, padding)


@_frozen_conv_backward.register_fake
def _(dy: Tensor, weight: Tensor, shape: list[int], stride: int, padding: int) -> Tensor:
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=LAYOUT)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _, ctx.stride, ctx.padding = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(weight)


def _backward(ctx, dy: Tensor) -> tuple:
    (weight,) = ctx.saved_tensors
    return _frozen_conv_backward(dy, weight, ctx.shape, ctx.stride, ctx.padding), None, None, None, None


_frozen_conv.register_autograd(_backward, setup_context=_setup_context)


def frozen_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """conv2d of x (B C H W) and a frozen weight (N C k k) and bias (N or None), keeping no input: B N H' W'.

    TypeError where the weight or the bias requires a gradient.
    """
    if not enabled(x):
        return frozen_conv_ref(x, weight, bias, stride, padding)
    require_frozen("frozen_conv", weight, bias)
    return _frozen_conv(x, weight, bias, stride, padding)
