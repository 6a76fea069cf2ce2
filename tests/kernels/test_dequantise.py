"""int8 and nf4 weights: bits that come back, the error of each format, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from launches import launched
from ops import DEVICE, ROUNDOFF, error, tensor
from torch import Tensor

from rapm.kernels import dequantise as module
from rapm.kernels import runtime
from rapm.kernels.dequantise import BLOCK, LEVELS, Low, _dequantise, dequantise, dequantise_ref, int8, nf4

# A normal number's largest of 1,000 is some 3.2 deviations: 127 steps to it, and the error of rounding is a step's
# 12th part's root: 3.2 / 127 / sqrt(12) = 0.73%. NF4 is 9% at a block's largest of 64 (QLoRA, table 2: measured).
ERRORS = {"int8": (0.004, 0.012), "nf4": (0.07, 0.11)}
SHAPES = [(7, 64), (66, 320), (3, 30), (16, 2304)]
CONVS = [(5, 6, 3, 3), (24, 48, 1, 1)]
REAL = [(10240, 1280), (1280, 5120), (640, 2048), (320, 768)]


def normal(*shape: int) -> Tensor:
    return tensor(*shape, mean=0.0)


def packed(name: str, weight: Tensor) -> Low:
    return getattr(module, name)(weight)


@pytest.mark.parametrize("name", ERRORS)
def test_error_of_the_format(name: str) -> None:
    weight = normal(64, 1024)
    low, high = ERRORS[name]
    assert low < error(dequantise(*packed(name, weight), torch.float32), weight) < high
    bits = 8 * sum(x.nbytes for x in packed(name, weight) if x is not None) / weight.numel()
    assert bits < {"int8": 8.1, "nf4": 4.2}[name]


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_comes_back(name: str, shape: tuple[int, int]) -> None:
    """Quantising a second time changes nothing; zeros and rows of any size stay in their place."""
    weight = normal(*shape) * torch.logspace(-3, 3, shape[0], device=DEVICE)[:, None]
    weight[1] = 0
    once = dequantise(*packed(name, weight), torch.float32)
    assert error(once, weight) < 0.2 and not once[1].any()
    assert error(dequantise(*packed(name, once), torch.float32), once) < 1e-2  # a block's byte is rounded up again
    if name == "int8":
        assert torch.equal(int8(once).codes, int8(weight).codes)
        torch.testing.assert_close(once.abs().amax(1), weight.abs().amax(1))


def test_every_level_is_the_nearest() -> None:
    """A block that holds the levels themselves, shuffled, in units of its row's largest."""
    row = torch.tensor(LEVELS, device=DEVICE).repeat(BLOCK // 16)[torch.randperm(BLOCK, device=DEVICE)]
    weight = torch.stack([row, -3 * row])
    assert error(dequantise(*nf4(weight[:1]), torch.float32), weight[:1]) < 1e-6
    between = row + 0.02 * torch.randn(BLOCK, device=DEVICE)
    between = between.clamp(-1, 1).index_fill(0, row.argmax(), 1.0)
    distance = (between[:, None] - torch.tensor(LEVELS, device=DEVICE)).abs()
    found = dequantise(*nf4(between[None]), torch.float32)[0]
    torch.testing.assert_close(found, torch.tensor(LEVELS, device=DEVICE)[distance.argmin(1)])


@pytest.mark.parametrize("dtype", runtime.DTYPES)
@pytest.mark.parametrize("name, shape", [*((n, s) for n in ERRORS for s in SHAPES), *(("int8", s) for s in CONVS)])
def test_kernel_and_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A product and a rounding each: at most the dtype's own. A convolution's weight has its codes' layout."""
    weight = normal(*shape)
    low = packed(name, weight)
    made = dequantise(*low, dtype)
    assert made.shape == weight.shape and made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last if made.dim() == 4 else torch.contiguous_format)
    assert error(made, dequantise_ref(*low, torch.float32)) <= ROUNDOFF[dtype] + 4 * ROUNDOFF[torch.float32]


@pytest.mark.parametrize("name", ERRORS)
def test_a_weight_in_any_layout(name: str) -> None:
    weight = normal(16, 8).t()
    low = packed(name, weight)
    assert error(dequantise(*low, torch.float32), weight) < 2 * ERRORS[name][1]
    assert all(torch.equal(a, b) for a, b in zip(low, packed(name, weight.contiguous()), strict=True) if a is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(name: str, shape: tuple[int, int]) -> None:
    low = packed(name, normal(*shape))
    made = dequantise(*low, torch.bfloat16)
    assert error(made, dequantise_ref(*low, torch.float32)) <= 2 * ROUNDOFF[torch.bfloat16]
    assert torch.equal(made, dequantise(*low, torch.bfloat16))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 33\)"):
        nf4(normal(4, 33))


@pytest.mark.parametrize("name", ERRORS)
def test_opcheck_and_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    low = packed(name, normal(6, 128))
    torch.library.opcheck(_dequantise, (*low, torch.bfloat16))
    names = launched(monkeypatch, module, lambda: _dequantise._init_fn(*low, torch.bfloat16))
    assert names == ["_dequantise_kernel"]
