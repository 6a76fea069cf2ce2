"""position_loss and position_gradient: the step's algebra, values and gradients in one launch each."""

from __future__ import annotations

import pytest
import torch
from launches import check_replay, launched
from ops import DEVICE, ROUNDOFF, error, tensor
from torch import Tensor

from rapm.kernels import position_loss as module
from rapm.kernels.position_loss import position_gradient, position_loss, position_loss_ref
from rapm.losses import pseudo_huber

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 4, 8, 8), (3, 5, 7, 9), (2, 3, 1, 1), (1, 4, 20, 30)]
REAL = [(1, 4, 64, 64), (1, 4, 128, 128), (3, 4, 128, 128)]
WEIGHTS = 1.0, 0.75
FP32 = ROUNDOFF[torch.float32]


def latents(*shape: int) -> Tensor:
    return (0.5 + torch.randn(shape)).to(DEVICE)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """z, out, coefficients, zhat, ztilde."""
    coefficients = torch.tensor([1.1, -0.3], device=DEVICE)
    return [latents(*shape), tensor(*shape, dtype=dtype), coefficients, latents(*shape), latents(*shape)]


def number(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def plain(z: Tensor, out: Tensor, coefficients: Tensor, zhat: Tensor, ztilde: Tensor, c: float) -> list[Tensor]:
    """z_n, losses and gradient as the step computes them: pseudo_huber and autograd, in float64."""
    z, out, coefficients, *targets = (x.double() for x in (z, out, coefficients, zhat, ztilde))
    z_n = (coefficients[0] * z + coefficients[1] * out).requires_grad_()
    losses = [pseudo_huber(z_n, target, c) for target in targets]
    distance = WEIGHTS[0] * losses[0] + WEIGHTS[1] * losses[1]
    return [z_n.detach(), torch.stack(losses).detach(), torch.autograd.grad(distance, z_n)[0]]


def compare(arguments: list[Tensor], c: float) -> None:
    """Against float64. A few operations round, all in fp32, and z_n's rounding reaches the gradient through d / c.

    |d| = |z_n - target| has an error of |z_n| / c roundoffs in units of c, and the gradient bends only where |d| < c.
    """
    actual, expected = position_loss(*arguments, WEIGHTS, c), plain(*arguments, c)
    assert all(x.dtype == torch.float32 and x.is_contiguous() and not x.requires_grad for x in actual)
    bent = max(float(((expected[0] - t).abs() < 4 * c).double().mean()) for t in arguments[3:])
    spread = float(expected[0].abs().max()) / c * bent**0.5
    for a, e, roundoffs in zip(actual, expected, (4, 16 + spread, 8 + spread), strict=True):
        assert error(a, e) < roundoffs * FP32, (error(a, e) / FP32, roundoffs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradient(dtype, shape):
    compare(inputs(shape, dtype), c=1e-3)
    compare(inputs(shape, dtype), c=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype, shape):
    compare(inputs(shape, dtype), c=1e-3)


def test_close_to_the_targets():
    """Where |d| is about c, and far below it: the loss does not cancel there."""
    z, out, coefficients, *_ = inputs((2, 4, 8, 8), torch.float32)
    z_n = position_loss_ref(z, out, coefficients, z, z, WEIGHTS, 1.0)[0]
    compare([z, out, coefficients, z_n + 1e-3 * torch.randn_like(z), z_n - 1e-3 * torch.randn_like(z)], c=1e-3)
    nothing = torch.zeros_like(z)
    small = position_loss(nothing, nothing, coefficients, nothing + 1e-6, nothing + 1e-7, WEIGHTS, 1e-3)[1]
    assert torch.allclose(small.double().cpu(), torch.tensor([5e-10, 5e-12], dtype=torch.float64), rtol=1e-5, atol=0)
    # on the target itself: no loss, no gradient
    _, losses, gradient = position_loss(z, nothing, torch.tensor([1.0, 0.5], device=DEVICE), z, z, WEIGHTS, 1e-3)
    assert not losses.any() and not gradient.any()


def test_any_strides_give_the_same_bits():
    z, out, coefficients, zhat, ztilde = inputs((2, 4, 6, 10), torch.bfloat16)
    expected = position_loss(z, out, coefficients, zhat, ztilde, WEIGHTS, 1e-3)
    wide = torch.randn(5, 12, 6, 10, device=DEVICE).bfloat16().to(memory_format=torch.channels_last)
    wide[2:4, 3:7] = out
    for view in (out.contiguous(), wide[2:4, 3:7], wide.contiguous()[2:4, 3:7].copy_(out), out.mT.contiguous().mT):
        both = torch.stack([zhat, ztilde], dim=1)
        table = torch.stack([coefficients, coefficients])
        actual = position_loss(z, view, table[1], both[:, 0], both[:, 1], WEIGHTS, 1e-3)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (65, 4, 1, 1)])  # the latter: more programs than one reads at once
def test_the_counter_ends_as_it_began(shape):
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    arguments = inputs(shape, torch.float32)
    first = position_loss(*arguments, WEIGHTS, 1e-3)
    assert error(first[1], plain(*arguments, 1e-3)[1]) < 32 * FP32
    again = position_loss(*arguments, WEIGHTS, 1e-3, counter)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert int(counter) == 0


def test_a_number_that_is_not_finite_shows_in_the_losses():
    arguments = inputs((1, 4, 20, 30), torch.bfloat16)
    arguments[1][0, 3, 19, 29] = torch.nan
    assert position_loss(*arguments, WEIGHTS, 1e-3)[1].isnan().all()
    arguments = inputs((1, 4, 20, 30), torch.bfloat16)
    arguments[4][0, 0, 0, 0] = torch.inf
    assert position_loss(*arguments, WEIGHTS, 1e-3)[1].isfinite().tolist() == [True, False]


@pytest.mark.parametrize("adversarial", [None, 0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 256.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_on_out_is_that_of_the_step(dtype, scale, adversarial):
    """Step.__call__ and _adversarial, line by line, with a linear function in place of the discriminators."""
    z, out, coefficients, *targets = inputs((2, 4, 7, 9), dtype)
    keep, add, xi = number(0.8), number(0.6), torch.randn_like(z)
    x_gradient = tensor(6, 4, 7, 9, dtype=dtype)[2:4]  # as it comes from one backward for all three inputs
    leaf_out = out.float().requires_grad_()  # so that the expected gradient is not rounded to dtype
    z_n = coefficients[0] * z + coefficients[1] * leaf_out
    leaf = z_n.detach().requires_grad_()
    distances = [pseudo_huber(leaf, target, 1e-3) for target in targets]
    (gradient,) = torch.autograd.grad(WEIGHTS[0] * distances[0] + WEIGHTS[1] * distances[1], leaf)
    if adversarial is not None:
        weighted = ((keep * leaf + add * xi).to(dtype) * (x_gradient / scale)).sum()
        (part,) = torch.autograd.grad(scale * weighted, leaf)
        gradient += number(adversarial) / scale * part
    (expected,) = torch.autograd.grad(z_n, leaf_out, scale * gradient)

    out.requires_grad_()
    mine = position_loss(z, out, coefficients, *targets, WEIGHTS, 1e-3)[2]
    extra = () if adversarial is None else (keep, x_gradient, number(adversarial))
    actual = position_gradient(mine, out, coefficients[1], *extra, scale=scale)
    assert actual.dtype == dtype and actual.stride() == out.stride() and not actual.requires_grad
    # One rounding to dtype, at its worst since most values are one of a few (2), which the interpreter truncates (4);
    # and z_n's rounding, where |d| is below c.
    assert error(actual, expected) < 4 * ROUNDOFF[dtype] + 256 * FP32


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_the_gradient(dtype):
    gradient, x = latents(2, 3, 5, 6), tensor(2, 3, 5, 6, dtype=dtype)
    for out in (x, x.contiguous(), tensor(4, 7, 5, 6, dtype=dtype)[1:3, 2:5]):
        for x_gradient in (x, x.contiguous(), x[:1, :1, :1, :1].expand_as(x)):
            actual = position_gradient(gradient, out, number(0.5), number(0.8), x_gradient, number(1.0), 2.0)
            expected = 0.5 * (2 * gradient.double() + 0.8 * x_gradient.double())
            assert actual.stride() == torch.empty_like(out).stride()
            assert error(actual, expected) < 2 * ROUNDOFF[dtype] + 8 * FP32


def test_opcheck():
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    arguments = inputs((2, 3, 4, 5), torch.bfloat16)
    torch.library.opcheck(module._op, (*arguments, counter, *WEIGHTS, 1e-3))
    z, out = arguments[:2]
    torch.library.opcheck(module._gradient_op, (z, out, number(0.5), number(0.8), out, number(1.0), 2.0))
    torch.library.opcheck(module._gradient_op, (z, out, number(0.5), None, None, None, 1.0))


def test_compile_gives_the_same_bits():
    arguments = inputs((2, 4, 6, 10), torch.bfloat16)

    def both(counter: Tensor | None) -> list[Tensor]:
        z_n, losses, gradient = position_loss(*arguments, WEIGHTS, 1e-3, counter)
        return [z_n, losses, gradient, position_gradient(gradient, arguments[1], arguments[2][1], scale=2.0)]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for counter in (torch.zeros(1, dtype=torch.int32, device=DEVICE), None):
        assert all(torch.equal(a, b) for a, b in zip(compiled(counter), both(counter), strict=True))


def test_one_launch_each(monkeypatch):
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    arguments = inputs((1, 4, 8, 8), torch.bfloat16)
    names = launched(monkeypatch, module, lambda: module._op._init_fn(*arguments, counter, *WEIGHTS, 1e-3))
    assert names == ["_position_loss_kernel"]
    z, out, coefficients = arguments[:3]
    values = (z, out, coefficients[1], coefficients[:1], out, coefficients[0], 2.0)
    assert launched(monkeypatch, module, lambda: module._gradient_op._init_fn(*values)) == ["_position_gradient_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
def test_capture_equals_eager_and_every_run_gives_the_same_bits(shape):
    arguments, counter = inputs(shape, torch.bfloat16), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out, one = arguments[1], number(1.0)

    def call() -> tuple[Tensor, ...]:
        outputs = position_loss(*arguments, WEIGHTS, 1e-3, counter)
        return (*outputs, position_gradient(outputs[2], out, one, one, out, one, 2.0))

    check_replay(call, replays=200)  # whichever program comes last
    assert int(counter) == 0
    assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))
