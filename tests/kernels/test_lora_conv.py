"""lora_conv: outputs, gradients, what is kept, and every way it is launched."""

from __future__ import annotations

import pytest
import torch
from ops import DEVICE, Silent, check, tensor
from test_lora_linear import MANY_PARTS, close, same, step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapm.kernels import lora_conv, low_rank, runtime
from rapm.kernels.lora_conv import _lora_conv, _lora_conv_backward, lora_conv_ref
from rapm.lora import _shaped

op = lora_conv.lora_conv
LAYOUT = torch.channels_last
# As lora_linear, and nine taps rounded each, which is one of their sum.
ROUNDINGS = 5
# B C N H W k stride padding R
SMALL = [
    (1, 5, 7, 6, 5, 3, 1, 1, 1),
    (2, 12, 10, 7, 9, 3, 2, 1, 3),
    (2, 10, 6, 4, 3, 1, 1, 0, 2),
    (1, 6, 9, 5, 6, 3, 1, 1, 10),
    (2, 4, 24, 6, 7, 2, 2, 0, 1),
]
REAL = [
    (1, 320, 320, 64, 64, 3, 1, 1), (1, 640, 640, 32, 32, 3, 2, 1), (2, 1280, 1280, 16, 16, 3, 1, 1),
    (1, 2560, 1280, 8, 8, 3, 1, 1), (1, 960, 320, 64, 64, 1, 1, 0), (1, 320, 320, 128, 128, 3, 1, 1),
    (1, 320, 320, 128, 128, 3, 2, 1), (1, 2560, 1280, 32, 32, 3, 1, 1), (1, 960, 320, 128, 128, 3, 1, 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def inputs(case: tuple, dtype: torch.dtype, *, bias: bool = True, wanted: str = "xdu") -> tuple:
    """x, W, b, down (seen in a flat buffer, as in the LoRA), up, stride and padding."""
    batch, c, n, height, width, side, stride, padding, rank = case
    x, weight = tensor(batch, c, height, width, dtype=dtype), tensor(n, c, side, side, dtype=dtype)
    flat = tensor(rank * side * side * c + 1, dtype=dtype)[1:]
    down = _shaped(flat, (rank, c, side, side))
    up = tensor(n * rank, dtype=dtype).view(n, 1, 1, rank).permute(0, 3, 1, 2)
    for name, t in zip("xdu", (x, down, up), strict=True):
        t.requires_grad_(name in wanted)
    return x, weight, tensor(n, dtype=dtype) if bias else None, down, up, stride, padding


def run(args: tuple, layer=op) -> list[Tensor]:
    """y and the gradients that are wanted."""
    return step(args[:5], lambda *tensors: layer(*tensors, *args[5:]))


@pytest.mark.parametrize("dtype", runtime.DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_against_float64(case: tuple, dtype: torch.dtype) -> None:
    check(op, lora_conv_ref, inputs(case, dtype), dtype, roundings=ROUNDINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case: tuple, rank: int) -> None:
    check(op, lora_conv_ref, inputs((*case, rank), torch.bfloat16), torch.bfloat16, roundings=ROUNDINGS)


@pytest.mark.parametrize("case", SMALL[:2])
def test_every_way_of_computing(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS's products; matrices split over rows; updates split over columns."""
    for module, way in [
        (lora_conv, dict(TRITON_COLUMNS=4)),
        (low_rank, MANY_PARTS),
        (lora_conv, dict(processors=lambda device: 64)),
    ]:
        with monkeypatch.context() as patch:
            for name, value in way.items():
                patch.setattr(module, name, value)
            check(op, lora_conv_ref, inputs(case, torch.float32, bias=False), torch.float32, roundings=ROUNDINGS)


def test_where_no_gradient_comes_in() -> None:
    args = inputs(SMALL[1], torch.float32)
    Silent.apply(op(*args)).sum().backward()
    assert all(t.grad is None for t in args if torch.is_tensor(t))


@pytest.mark.parametrize("wanted", ["x", "d", "u", "xd", "xu", "du"])
@pytest.mark.parametrize("case", [SMALL[1], SMALL[3]])
def test_only_what_is_wanted(case: tuple, wanted: str) -> None:
    """The same gradients, whichever are wanted; x is kept for down's alone, and h for up's."""
    args = inputs(case, torch.float32)
    expected = dict(zip("yxdu", run(args), strict=True))
    args = tuple(t.detach() if torch.is_tensor(t) else t for t in args)
    for name, t in zip("xdu", (args[0], args[3], args[4]), strict=True):
        t.requires_grad_(name in wanted)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        actual = run(args)
    assert close(actual, [expected[name] for name in "y" + wanted])  # in as many parts as fill the chip
    there = {args[i].untyped_storage().data_ptr() for i in (1, 3, 4)}
    fresh = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in there)
    positions, rank = expected["y"][:, 0].numel(), case[-1]
    assert fresh == args[0].numel() * ("d" in wanted) + positions * rank * ("u" in wanted)


def test_nothing_kept_without_gradients() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            op(*inputs(SMALL[0], torch.float32))
        y = op(*inputs(SMALL[0], torch.float32, wanted=""))
    assert not kept and not y.requires_grad


@pytest.mark.parametrize("case", SMALL[:4])
def test_any_layout_in_channels_last_out(case: tuple) -> None:
    """Slices of channels and of the batch, and NCHW, give the numbers of their copies; so does an expanded gradient."""
    x, *rest = inputs(case, torch.float32)
    expected = run((x, *rest))
    assert all(t.is_contiguous(memory_format=LAYOUT) for t in expected[:2])
    for other in (torch.cat([x, x], 1)[:, x.shape[1] :], torch.cat([x, x])[len(x) :], x.contiguous()):
        assert close(run((other.detach().requires_grad_(), *rest)), expected)
    weight, bias, down, *others = rest
    for layout in (torch.contiguous_format, LAYOUT):
        other = down.detach().clone(memory_format=layout).requires_grad_()
        assert close(run((x, weight, bias, other, *others)), expected)
    y, leaves = op(x, *rest), (x, rest[2], rest[3])
    for dy in (torch.randn(y.shape[1], 1, 1, device=DEVICE).expand(y.shape), torch.randn_like(y).contiguous()):
        actual = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        copy = dy.contiguous(memory_format=LAYOUT)
        assert close(actual, torch.autograd.grad(y, leaves, copy, retain_graph=True))


def test_refuses_a_trained_weight() -> None:
    x, weight, *rest = inputs(SMALL[0], torch.float32)
    with pytest.raises(TypeError, match="requires_grad_"):
        op(x, weight.requires_grad_(), *rest)


@pytest.mark.parametrize("case", [SMALL[1], SMALL[3]])
def test_opcheck(case: tuple) -> None:
    args = inputs(case, torch.float32)
    torch.library.opcheck(_lora_conv, args)
    x, weight, bias, down, up, *geometry = (t.detach() if torch.is_tensor(t) else t for t in args)
    y, h = _lora_conv(x, weight, bias, down, up, *geometry)
    for given in ((x, h, True), (None, h, True), (x, None, False)):
        args = y, *given[:2], weight, down, up, *geometry, list(x.shape), given[2]
        torch.library.opcheck(_lora_conv_backward, args)


@pytest.mark.parametrize("case", SMALL[1:3])
def test_compile_and_checkpoint(case: tuple) -> None:
    args = inputs(case, torch.float32)
    expected = run(args)
    assert same(run(args, torch.compile(op, fullgraph=True, backend="aot_eager")), expected)
    assert same(run(args, lambda *args: checkpoint(op, *args, use_reentrant=False)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("case", [REAL[0], REAL[1], REAL[3], REAL[-1]])
def test_same_bits_and_captured(case: tuple, rank: int) -> None:
    args = inputs((*case, rank), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected, again = run(args), run(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(args)
    graph.replay()
    torch.cuda.synchronize()
    assert same(again, expected) and same(captured, expected)
