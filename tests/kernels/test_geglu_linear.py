"""geglu_linear: against float64, by pointers and by descriptors; what it refuses; where a feed-forward uses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from launches import check_replay
from ops import DEVICE, ROUNDOFF, SUMS, check, error, tensor
from torch import Tensor

from rapm.kernels import geglu_linear as module
from rapm.kernels import runtime
from rapm.kernels.geglu import geglu
from rapm.kernels.geglu_linear import _geglu_linear, faster, geglu_linear, geglu_linear_ref
from rapm.layers import Linear
from rapm.memory.saved import KEEP
from rapm.unet import FeedForward

HALVES = [dtype for dtype in runtime.DTYPES if dtype != torch.float32]
ROUNDINGS = 2  # the output's is at most two of ops.ROUNDOFF, and there is no other
# ... K, F: less than a tile, one and a part of each side, several blocks of rows beyond GROUP's last full one
SMALL = [((5, 8), 8), ((2, 70, 72), 72), ((3, 137, 40), 136)]
# SD1.5's and SDXL's, of one image and of a batch
REAL = [((1, 4096, 320), 1280), ((1, 64, 1280), 5120), ((4, 4096, 640), 2560), ((8, 1024, 1280), 5120)]


# By whose way operands are loaded: Hopper's, where there is one or the interpreter, and the others'
WAYS = [80, 90] if DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9 else [80]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "architecture", lambda device: request.param)


def inputs(shape: tuple[int, ...], f: int, dtype: torch.dtype) -> list[Tensor]:
    """Pre-activations of order 1, with a mean."""
    k = shape[-1]
    weight = tensor(2 * f, k, dtype=torch.float32, mean=0.1) * k**-0.5
    return [tensor(*shape, dtype=dtype, mean=0.1), weight.to(dtype), tensor(2 * f, dtype=dtype)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "f"), SMALL)
def test_against_float64(shape: tuple[int, ...], f: int, dtype: torch.dtype, way: None) -> None:
    check(geglu_linear, geglu_linear_ref, inputs(shape, f, dtype), dtype, roundings=ROUNDINGS)


def test_gelu_is_the_exact_one_far_out_too() -> None:
    """Of every gate that half precision knows by its size: the bias is the gate, and 1 the value."""
    dtype = torch.float16
    gate = torch.cat([torch.linspace(-40, 40, 494), torch.tensor([-65504.0, -1e4, -100.0, 100.0, 1e4, 65504.0])])
    gate = torch.cat([gate, torch.zeros(12)]).to(DEVICE, dtype)
    bias = torch.cat([torch.ones_like(gate), gate])
    y = geglu_linear(torch.zeros(1, 8, device=DEVICE, dtype=dtype), bias.new_zeros(len(bias), 8), bias)[0].double()
    exact = F.gelu(gate.double())
    assert ((y - exact).abs() <= (1.02 * 2**-11) * exact.abs() + 2**-25).all(), (y - exact).abs().max()


@pytest.mark.parametrize(("shape", "f"), SMALL)
def test_several_tiles_a_program(shape: tuple[int, ...], f: int, way: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And groups of rows, the last one not full, in shapes for the interpreter."""
    monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(module, "processors", lambda device: 4)
    for name in ("HOPPER", "OTHERS"):
        monkeypatch.setattr(module, name, dict(getattr(module, name), BM=64, BN=32, BK=32, num_warps=4))
    check(geglu_linear, geglu_linear_ref, inputs(shape, f, torch.float16), torch.float16, roundings=ROUNDINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "f"), REAL)
def test_real_shapes(shape: tuple[int, ...], f: int, dtype: torch.dtype) -> None:
    check(geglu_linear, geglu_linear_ref, inputs(shape, f, dtype), dtype, roundings=ROUNDINGS)


@pytest.mark.parametrize("case", [SMALL[1], pytest.param(REAL[3], marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", HALVES)
def test_no_further_off_than_the_two_steps(case: tuple, dtype: torch.dtype) -> None:
    """The product is not rounded on the way."""
    args = inputs(*case, dtype)
    exact = geglu_linear_ref(*(x.double() for x in args))
    two = error(geglu(F.linear(*args)), exact)
    one = error(geglu_linear(*args), exact)
    assert one <= 1.05 * two and one <= ROUNDINGS * ROUNDOFF[dtype] + SUMS * ROUNDOFF[torch.float32]


@pytest.mark.parametrize("change", [
    lambda x: x[:, 1:], lambda x: x[..., 8:48], lambda x: x[..., 3:43], lambda x: x.transpose(0, 1),
], ids=["rows", "columns", "odd columns", "turned"])  # fmt: skip
def test_slices(change: Callable[[Tensor], Tensor], way: None) -> None:
    x, weight, bias = inputs((3, 7, 56), 24, torch.bfloat16)
    x = change(x)
    weight = weight[:, : x.shape[-1]]
    y = geglu_linear(x, weight, bias)
    assert y.shape == (*x.shape[:-1], 24) and y.is_contiguous()
    assert torch.equal(y, geglu_linear(x.contiguous(), weight.contiguous(), bias))
    if x.numel():
        limit = ROUNDINGS * ROUNDOFF[torch.bfloat16] + SUMS * ROUNDOFF[torch.float32]
        assert error(y, geglu_linear_ref(x.double(), weight.double(), bias.double())) <= limit


def test_what_it_refuses() -> None:
    x, weight, bias = inputs((4, 16), 8, torch.bfloat16)
    for args in ((x.float(), weight.float(), bias.float()), (x[:, :12], weight[:, :12], bias)):
        with pytest.raises(ValueError, match="geglu_linear takes no"):
            geglu_linear(*args)
    for i in range(3):
        args = [y.clone().requires_grad_(i == j) for j, y in enumerate((x, weight, bias))]
        with pytest.raises(TypeError, match="no gradient"):
            geglu_linear(*args)
        with torch.no_grad():
            geglu_linear(*args)


def test_opcheck() -> None:
    torch.library.opcheck(_geglu_linear, tuple(inputs((2, 5, 16), 8, torch.bfloat16)))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "f"), [REAL[1], REAL[3]])
def test_same_bits_eagerly_and_replayed(shape: tuple[int, ...], f: int) -> None:
    args = inputs(shape, f, torch.bfloat16)
    assert torch.equal(geglu_linear(*args), geglu_linear(*args))
    check_replay(lambda: (geglu_linear(*args),))


@pytest.fixture
def feed_forward(monkeypatch: pytest.MonkeyPatch) -> tuple[FeedForward, list[tuple[int, ...]]]:
    """One of 16 channels that the table says to fuse from 6 rows on, and the shapes that were."""
    fused: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "rapm.unet.geglu_linear", lambda *args: fused.append(tuple(args[0].shape)) or geglu_linear(*args)
    )
    monkeypatch.setattr(module, "FASTER", {module.architecture(torch.device(DEVICE)): {(16, 64): 6}})
    layer = FeedForward(16).to(DEVICE, torch.bfloat16).requires_grad_(False)
    layer.net[0]["proj"].name = "proj"
    return layer, fused


def test_a_feed_forward_uses_it_where_the_table_says(
    feed_forward: tuple[FeedForward, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, fused = feed_forward
    x = tensor(2, 3, 16, dtype=torch.bfloat16)
    y = layer(x, None, KEEP)
    assert fused == [(2, 3, 16)] and y.low is None
    monkeypatch.setattr(module, "FASTER", {})
    two = layer(x, None, KEEP).y
    assert len(fused) == 1
    # Both round the activation and the layer's output, the two steps the product as well
    assert error(y.y, two) <= 5 * ROUNDOFF[torch.bfloat16]


def test_a_feed_forward_does_not_use_it_elsewhere(feed_forward: tuple[FeedForward, list]) -> None:
    layer, fused = feed_forward
    x = tensor(2, 3, 16, dtype=torch.bfloat16)
    pair = tensor(2, 16, dtype=torch.bfloat16), tensor(128, 2, dtype=torch.bfloat16)
    layer(x, {"proj": pair}, KEEP)  # a LoRA on it
    layer(x[:1], None, KEEP)  # fewer rows
    layer(x.clone().requires_grad_(), None, KEEP).y.sum().backward()  # a gradient
    assert not fused
    with torch.no_grad():
        layer(x.clone().requires_grad_(), {"another": pair}, KEEP)
    assert fused == [(2, 3, 16)]
    layer.net[0]["proj"].__class__ = type("Packed", (Linear,), {"weight": property(lambda self: pytest.fail("made"))})
    assert not FeedForward.fuses(layer.net[0]["proj"], x, None)  # of fewer bits: its weight is made for one product


def test_training_does_not_choose_it() -> None:
    """Both real positions go through the encoder without a gradient; the fake one, with one, takes the two steps."""
    rows = {640: 2 * 4096, 1280: 2 * 1024}  # of SDXL at 1024x1024, the most by width
    assert all(least > rows[k] for table in module.FASTER.values() for (k, _), least in table.items())
    assert not faster(*inputs((8, 1024, 16), 64, torch.bfloat16))
