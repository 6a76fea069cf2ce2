"""frozen_conv: the gradient of its input, and nothing kept for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops import DEVICE, check, tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapm.kernels import runtime
from rapm.kernels.frozen_conv import _frozen_conv, _frozen_conv_backward, frozen_conv, frozen_conv_ref

LAYOUT = torch.channels_last
ROUNDINGS = 2  # the product's sum, and the bias added to it, on a CPU after the first
# B C N H W k stride padding
SMALL = [
    (1, 8, 12, 6, 5, 3, 1, 1),
    (2, 5, 7, 7, 9, 3, 2, 1),
    (2, 12, 6, 4, 3, 1, 1, 0),
    (1, 3, 64, 1, 1, 3, 1, 1),
    (3, 4, 4, 6, 6, 2, 2, 0),
]
REAL = [
    (1, 4, 320, 64, 64, 3, 1, 1),
    (1, 320, 320, 64, 64, 3, 1, 1),
    (2, 640, 640, 32, 32, 3, 2, 1),
    (1, 2560, 1280, 8, 8, 3, 1, 1),
    (1, 960, 640, 64, 64, 1, 1, 0),
    (1, 320, 320, 128, 128, 3, 1, 1),
    (1, 2560, 1280, 32, 32, 3, 1, 1),
]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def inputs(case: tuple[int, ...], dtype: torch.dtype, bias: bool = True, grad: bool = True) -> tuple:
    batch, channels, out, height, width, k, stride, padding = case
    x = tensor(batch, channels, height, width, dtype=dtype, grad=grad)
    return x, tensor(out, channels, k, k, dtype=dtype), tensor(out, dtype=dtype) if bias else None, stride, padding


@pytest.mark.parametrize("dtype", runtime.DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_against_float64(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(frozen_conv, frozen_conv_ref, inputs(case, dtype), dtype, roundings=ROUNDINGS)
    check(frozen_conv, frozen_conv_ref, inputs(case, dtype, bias=False), dtype, roundings=ROUNDINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(frozen_conv, frozen_conv_ref, inputs(case, dtype), dtype, roundings=ROUNDINGS)


@pytest.mark.parametrize("case", SMALL[:3])
def test_any_layout_in_channels_last_out(case: tuple[int, ...]) -> None:
    """A channel slice, a batch slice and NCHW give the numbers of their copies; so does an expanded gradient."""
    x, *rest = inputs(case, torch.float32)
    y = frozen_conv(x, *rest)
    dy = torch.randn(y.shape[0], y.shape[1], 1, 1, device=DEVICE).expand(y.shape)
    (dx,) = torch.autograd.grad(y, x, dy.contiguous(memory_format=LAYOUT))
    channel, batch = torch.cat([x, x], 1)[:, x.shape[1] :], torch.cat([x, x])[len(x) :]
    for other in (channel, batch, x.contiguous()):
        other = other.detach().requires_grad_()
        actual = frozen_conv(other, *rest)
        assert actual.is_contiguous(memory_format=LAYOUT) and torch.equal(actual, y)
        (grad,) = torch.autograd.grad(actual, other, dy)
        assert torch.equal(grad, dx)


@pytest.mark.parametrize("case", SMALL[:3])
def test_no_rows_and_a_turned_bias(case: tuple[int, ...]) -> None:
    x, weight, bias, *geometry = inputs(case, torch.float32, grad=False)
    y = frozen_conv(x, weight, bias, *geometry)
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert spread.stride(0) == 2 and torch.equal(frozen_conv(x, weight, spread, *geometry), y)
    assert frozen_conv(x[:0], weight, bias, *geometry).shape == (0, *y.shape[1:])


def test_keeps_only_the_weight() -> None:
    x, weight, bias, *geometry = inputs(SMALL[0], torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_conv(x, weight, bias, *geometry)
        assert [t.data_ptr() for t in kept] == [weight.data_ptr()]
        kept.clear()
        F.conv2d(x, weight, bias, *geometry)
        assert x.data_ptr() in [t.data_ptr() for t in kept]  # what stock autograd does
        kept.clear()
        frozen_conv(x.detach(), weight, bias, *geometry)
        with torch.no_grad():
            frozen_conv(x, weight, bias, *geometry)
        assert not kept


@pytest.mark.parametrize("which", [1, 2])
def test_refuses_a_trained_weight(which: int) -> None:
    args = list(inputs(SMALL[0], torch.float32))
    args[which].requires_grad_()
    with pytest.raises(TypeError, match="requires_grad_"):
        frozen_conv(*args)
    with torch.no_grad():
        frozen_conv(*args)


@pytest.mark.parametrize("case", SMALL[:3])
def test_opcheck(case: tuple[int, ...]) -> None:
    x, weight, bias, *geometry = inputs(case, torch.float32)
    y = frozen_conv(x, weight, bias, *geometry).detach()
    torch.library.opcheck(_frozen_conv, (x, weight, bias, *geometry))
    torch.library.opcheck(_frozen_conv, (x, weight, None, *geometry))
    torch.library.opcheck(_frozen_conv_backward, (y, weight, list(x.shape), *geometry))


def test_compile_and_checkpoint() -> None:
    x, *rest = inputs(SMALL[1], torch.float32)

    def grad(f) -> Tensor:
        return torch.autograd.grad(f(x).square().sum(), x)[0]

    def layer(x: Tensor) -> Tensor:
        return frozen_conv(x, *rest)

    expected = grad(layer)
    assert torch.equal(grad(torch.compile(layer, fullgraph=True, backend="aot_eager")), expected)
    assert torch.equal(grad(lambda x: checkpoint(layer, x, use_reentrant=False)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_changes_no_layout(stride: int) -> None:
    """Of channels-last tensors nothing is copied or turned, by PyTorch's kernels or cuDNN's."""
    x, *rest = inputs((1, 320, 320, 64, 64, 3, stride, 1), torch.bfloat16)
    dy = torch.randn_like(frozen_conv(x, *rest))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(frozen_conv(x, *rest), x, dy)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    turns = "copy_kernel", "nchwtonhwc", "nhwctonchw", "transpose"
    assert names and not [name for name in names if any(turn in name.lower() for turn in turns)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    (1, 320, 320, 64, 64, 3, 1, 1), (1, 2560, 1280, 8, 8, 3, 1, 1), (1, 960, 640, 64, 64, 1, 1, 0),
])  # fmt: skip
def test_same_bits_and_captured(case: tuple[int, ...]) -> None:
    x, *rest = inputs(case, torch.bfloat16)

    def step() -> tuple[Tensor, Tensor]:
        y = frozen_conv(x, *rest)
        return y.detach(), torch.autograd.grad(y, x, y.detach())[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        again = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for e, a, c in zip(expected, again, captured, strict=True):
        assert torch.equal(e, a) and torch.equal(e, c)
