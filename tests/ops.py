"""How an operator is checked: outputs and every gradient against its reference in float64, from the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The unit roundoff of each dtype, as a relative error of the whole tensor. A result that was rounded k times on its way
# (an intermediate in memory, an operand of a product, the output itself) is within k of them; fp32 sums add a few more.
ROUNDOFF = {torch.float32: 6e-8, torch.bfloat16: 2**-9, torch.float16: 2**-12}
SUMS = 64  # roundoffs of fp32 that accumulation in fp32 may add, in any dtype


def tensor(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.5, grad: bool = False) -> Tensor:
    """Normal numbers with an offset mean (an algorithm that cancels badly shows), channels-last in four dimensions."""
    x = (mean + torch.randn(shape)).to(DEVICE, dtype)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


def error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; infinite where the result is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def check(
    op: Callable, reference: Callable, inputs: Sequence, dtype: torch.dtype, *, roundings: int = 2,
    cancel: Mapping[int, float] | None = None,
) -> None:  # fmt: skip
    """op(*inputs) and its gradients for all inputs that require one, against `reference` in float64.

    `cancel`: input -> how many times as many fp32 roundoffs its gradient may be off, because its sum nearly cancels.
    """
    limit = roundings * ROUNDOFF[dtype] + SUMS * ROUNDOFF[torch.float32]
    doubles = [
        x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
        for x in inputs
    ]
    actual, expected = (f(*xs) for f, xs in ((op, inputs), (reference, doubles)))
    actual, expected = ([x] if torch.is_tensor(x) else list(x) for x in (actual, expected))
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        assert error(a, e) <= limit, f"output {i}: {error(a, e):.2e} > {limit:.2e}"
    wanted = [i for i, x in enumerate(inputs) if torch.is_tensor(x) and x.requires_grad]
    if not wanted:
        return
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e.requires_grad]
    cotangents = [torch.randn_like(a) + 0.5 for a, _ in pairs]
    mine = torch.autograd.grad([a for a, _ in pairs], [inputs[i] for i in wanted], cotangents)
    theirs = torch.autograd.grad([e for _, e in pairs], [doubles[i] for i in wanted], [c.double() for c in cotangents])
    for i, a, e in zip(wanted, mine, theirs, strict=True):
        assert a.shape == e.shape and a.dtype == inputs[i].dtype
        allowed = limit + ((cancel or {}).get(i, 1.0) - 1.0) * SUMS * ROUNDOFF[torch.float32]
        assert error(a, e) <= allowed, f"gradient of input {i}: {error(a, e):.2e} > {allowed:.2e}"


class Silent(torch.autograd.Function):
    """x, whose gradient is none at all."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, _: Tensor) -> None:
        return None
