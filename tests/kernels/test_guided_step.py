"""guided_step: values, gradients, any strides of the network's output, one launch."""

from __future__ import annotations

import pytest
import torch
from launches import check_replay, launched
from ops import DEVICE, ROUNDOFF, check, error, tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapm.kernels import guided_step as module
from rapm.kernels.guided_step import guided_step, guided_step_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 4, 8, 8), (3, 5, 7, 9), (2, 3, 1, 1), (1, 4, 20, 30)]
A, B = 1.1875, -0.28125
REAL = [(1, 4, 64, 64), (1, 4, 128, 128), (3, 4, 128, 128)]


def latents(*shape: int, grad: bool = False) -> Tensor:
    return (0.5 + torch.randn(shape)).to(DEVICE).requires_grad_(grad)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, guidance: float | None, grad: bool = True) -> list:
    rows = shape[0] * (1 if guidance is None else 2)
    return [latents(*shape, grad=grad), tensor(rows, *shape[1:], dtype=dtype, grad=grad)]


def compare(shape: tuple[int, ...], dtype: torch.dtype, guidance: float | None, on_device: bool) -> None:
    coefficients = torch.tensor([A, B], device=DEVICE) if on_device else (A, B)
    arguments = [*inputs(shape, dtype, guidance), coefficients, guidance]
    check(guided_step, guided_step_ref, arguments, dtype)  # one rounding, which for bf16 the interpreter truncates
    z, out = (x.detach() for x in arguments[:2])
    actual = guided_step(z, out, coefficients, guidance)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    # fp32 whatever the dtype of out: its numbers are exact, and a handful of operations round
    assert error(actual, guided_step_ref(z.double(), out.double(), (A, B), guidance)) < 8 * ROUNDOFF[torch.float32]


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("guidance", [None, 7.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, guidance, on_device):
    for shape in SHAPES:
        compare(shape, dtype, guidance, on_device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("guidance", [None, 7.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype, guidance, shape):
    compare(shape, dtype, guidance, on_device=True)


def test_any_strides_give_the_same_bits():
    z, out = inputs((2, 4, 6, 10), torch.bfloat16, 7.5, grad=False)
    expected = guided_step(z, out, (A, B), 7.5)
    wide = torch.randn(9, 12, 6, 10, device=DEVICE).bfloat16().to(memory_format=torch.channels_last)
    wide[2:6, 3:7] = out
    views = [out.contiguous(), wide[2:6, 3:7], wide.contiguous()[2:6, 3:7].copy_(out), out.mT.contiguous().mT]
    assert all(torch.equal(guided_step(z, view, (A, B), 7.5), expected) for view in views)
    z_view = torch.stack([z, z], dim=1)[:, 1]
    assert torch.equal(guided_step(z_view, out, (A, B), 7.5), expected)
    # a gradient without storage of its own: every stride is 0
    z, out = inputs((2, 4, 6, 10), torch.float32, 7.5)
    guided_step(z, out, (A, B), 7.5).sum().backward()
    assert torch.allclose(z.grad, torch.full_like(z, A))
    assert torch.allclose(out.grad[:2], torch.full_like(z, -6.5 * B), rtol=1e-6)
    assert torch.allclose(out.grad[2:], torch.full_like(z, 7.5 * B), rtol=1e-6)


def test_only_what_is_needed():
    """Nothing but a and b is kept; a frozen input gets no gradient, and its gradient costs no launch."""
    coefficients, kept = torch.tensor([A, B], device=DEVICE), []
    z, out = inputs((1, 4, 8, 8), torch.bfloat16, None)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        y = guided_step(z.detach(), out, coefficients)
    assert sum(kept) == 8
    (grad,) = torch.autograd.grad(y.sum(), out)
    assert grad.dtype == torch.bfloat16 and grad.stride() == out.stride()
    out = out.detach()
    guided_step(z, out, coefficients).sum().backward()
    assert torch.equal(z.grad, torch.full_like(z, A))


def test_wrong_batch_is_refused():
    z, out = inputs((1, 4, 8, 8), torch.float32, None, grad=False)
    with pytest.raises(ValueError, match=r"not \(2, 4, 8, 8\), with guidance 7.5"):
        guided_step(z, out, (A, B), 7.5)


@pytest.mark.parametrize("guidance", [None, 7.5])
def test_opcheck(guidance):
    z, out = inputs((2, 3, 4, 5), torch.bfloat16, guidance)
    torch.library.opcheck(module._op, (z, out, torch.tensor([A, B], device=DEVICE), 0.0, 0.0, guidance))
    torch.library.opcheck(module._op, (z, out, None, A, B, guidance))
    for channels_last in (True, False):
        arguments = (z.detach(), None, B, guidance, torch.bfloat16, channels_last)
        torch.library.opcheck(module._backward_op, arguments)


def test_compile_and_checkpoint_give_the_same_bits():
    z, out = inputs((2, 4, 6, 10), torch.bfloat16, 7.5)
    coefficients = torch.tensor([A, B], device=DEVICE)

    def gradients(f):
        return torch.autograd.grad(f(z, out, coefficients, 7.5).square().sum(), (z, out))

    expected = gradients(guided_step)
    compiled = torch.compile(guided_step, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda *xs: checkpoint(guided_step, *xs, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(f), expected, strict=True))


def test_one_launch(monkeypatch):
    z, out = inputs((1, 4, 8, 8), torch.bfloat16, 7.5, grad=False)
    coefficients = torch.tensor([A, B], device=DEVICE)
    forward = launched(monkeypatch, module, lambda: module._op._init_fn(z, out, coefficients, 0.0, 0.0, 7.5))
    assert forward == ["_guided_step_kernel"]
    arguments = (z, coefficients, 0.0, 7.5, torch.bfloat16, True)
    backward = launched(monkeypatch, module, lambda: module._backward_op._init_fn(*arguments))
    assert backward == ["_guided_step_backward_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [None, 7.5])
def test_capture_equals_eager(guidance):
    z, out = inputs((1, 4, 64, 64), torch.bfloat16, guidance, grad=False)
    coefficients = torch.tensor([A, B], device=DEVICE)
    check_replay(lambda: (guided_step(z, out, coefficients, guidance), guided_step(z, out, (A, B), guidance)))
