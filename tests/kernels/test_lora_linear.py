"""lora_linear, low_rank's kernels: outputs, gradients, what is kept, and every way they are launched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from launches import launched
from ops import DEVICE, ROUNDOFF, SUMS, Silent, check, error, tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapm.kernels import lora_linear, low_rank, runtime
from rapm.kernels.lora_linear import _addmm, _lora_linear, _lora_linear_backward, lora_linear_ref

op = lora_linear.lora_linear
# A gradient of down: g, its operand in a product, and the sum; y: h, the update alone and the sum; and one more, since
# a few numbers' roundings do not average out.
ROUNDINGS = 4
MANY_PARTS = dict(
    VECTORS=low_rank.VECTORS._replace(shortest=16), MATRICES=low_rank.MATRICES._replace(shortest=16),
    processors=lambda device: 64,
)  # fmt: skip
# leading shape, K, N, R, and G of more than one layer
SMALL = [((2, 3), 12, 7, 1), ((70,), 48, 96, 1), ((5, 7), 40, 24, 3), ((66,), 96, 40, 16), ((9,), 32, 72, 20)]
SMALL += [((6,), 4, 4, 4)]  # strides that tell nothing of what they are
GROUPED = [((70,), 48, 96, 1, 3), ((2, 3), 12, 15, 1, 3), ((5, 7), 40, 24, 3, 2), ((66,), 96, 60, 10, 3)]
REAL = [
    ((1, 1024), 1280, 1280), ((1, 1024), 1280, 10240), ((1, 1024), 5120, 1280), ((1, 4096), 640, 640),
    ((1, 4096), 640, 5120), ((1, 4096), 2560, 640), ((1, 77), 2048, 1280), ((2, 77), 768, 320), ((1, 4096), 320, 2560),
    ((1,), 1280, 320), ((1, 16384), 640, 320),
]  # fmt: skip


def inputs(case: tuple, dtype: torch.dtype, *, bias: bool = True, wanted: str = "xdu") -> tuple:
    """x, W, b, down and up; down and up lie in one flat buffer, as in the LoRA, and up is not aligned there."""
    lead, k, n, rank, *groups = case
    ranks = rank * (groups[0] if groups else 1)
    flat = tensor(ranks * k + n * rank + 1, dtype=dtype)
    down, up = flat[: ranks * k].view(ranks, k), flat[ranks * k + 1 :].view(n, rank)
    x, weight = tensor(*lead, k, dtype=dtype), tensor(n, k, dtype=dtype)
    for name, t in zip("xdu", (x, down, up), strict=True):
        t.requires_grad_(name in wanted)
    return x, weight, tensor(n, dtype=dtype) if bias else None, down, up


def step(args: tuple, layer=op) -> list[Tensor]:
    """y and the gradients that are wanted."""
    y = layer(*args)
    dy = torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
    wanted = [t for t in args if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Equal but for the order of fp32 sums: a library may choose another kernel for another stride."""
    return all(error(a, e) <= SUMS * ROUNDOFF[torch.float32] for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", GROUPED)
def test_layers_in_one(case: tuple) -> None:
    """The same as each layer on its own."""
    args = inputs(case, torch.float64)
    x, weight, bias, down, up = args
    layers = zip(*(t.chunk(case[4]) for t in (weight, bias, down, up)), strict=True)
    expected = torch.cat([lora_linear_ref(x, *layer) for layer in layers], -1)
    assert torch.allclose(lora_linear_ref(*args), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", runtime.DTYPES)
@pytest.mark.parametrize("case", SMALL + GROUPED)
def test_against_float64(case: tuple, dtype: torch.dtype) -> None:
    check(op, lora_linear_ref, inputs(case, dtype), dtype, roundings=ROUNDINGS)
    check(op, lora_linear_ref, inputs(case, dtype, bias=False), dtype, roundings=ROUNDINGS)


@pytest.mark.parametrize("dtype", runtime.DTYPES)
@pytest.mark.parametrize(("m", "n", "rank"), [(130, 720, 20), (9, 129, 64), (5, 7, 65)])
def test_addmm(m: int, n: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles, one or four a program, for either layout of b; not PyTorch's where tensor cores multiply a low rank."""
    bias, t, up = tensor(n, dtype=dtype), tensor(m, rank, dtype=dtype), tensor(n, rank, dtype=dtype)
    expected = bias.double() + t.double() @ up.t().double()
    if rank <= low_rank.SUM_RANKS and dtype != torch.float32:
        monkeypatch.setattr(torch, "addmm", None)
    for b in (up.t(), up.t().contiguous()):
        assert error(_addmm(bias, t, b), expected) <= ROUNDOFF[dtype] + SUMS * ROUNDOFF[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case: tuple, rank: int) -> None:
    check(op, lora_linear_ref, inputs((*case, rank), torch.bfloat16), torch.bfloat16, roundings=ROUNDINGS)


@pytest.mark.parametrize("case", [*SMALL[1:4], GROUPED[0], ((70,), 24, 270, 10, 3)])
def test_every_way_of_computing(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor cores; matrices in one part and in many; ranks whose products are cuBLAS's, some or all."""
    (lead, k, n, rank, *groups), dtype = case, torch.float32
    for way in (dict(multiplies=lambda x: False), MANY_PARTS, dict(processors=lambda device: 64)):
        with monkeypatch.context() as patch:
            for name, value in way.items():
                patch.setattr(low_rank, name, value)
            check(op, lora_linear_ref, inputs(case, dtype), dtype, roundings=ROUNDINGS)
    for more in (40, 64):
        check(op, lora_linear_ref, inputs((lead, k, n, more + rank, *groups), dtype), dtype, roundings=ROUNDINGS)


@pytest.mark.parametrize("wanted", ["x", "d", "u", "xd", "xu", "du"])
@pytest.mark.parametrize("case", [SMALL[1], SMALL[2], ((5,), 16, 24, 200), GROUPED[2]])
def test_only_what_is_wanted(case: tuple, wanted: str) -> None:
    """The same gradients, whichever are wanted; x is kept for down's alone, and h for up's."""
    args = inputs(case, torch.float32)
    expected = dict(zip("yxdu", step(args), strict=True))
    x, weight, bias, down, up = (None if t is None else t.detach() for t in args)
    for name, t in zip("xdu", (x, down, up), strict=True):
        t.requires_grad_(name in wanted)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        actual = step((x, weight, bias, down, up))
    assert close(actual, [expected[name] for name in "y" + wanted])  # in as many parts as fill the chip
    there = {t.untyped_storage().data_ptr() for t in (weight, down, up)}
    fresh = [t for t in kept if t.untyped_storage().data_ptr() not in there]
    assert sum(t.numel() for t in fresh) == x.numel() * ("d" in wanted) + x[..., 0].numel() * len(down) * (
        "u" in wanted
    )


@pytest.mark.parametrize("dtype", runtime.DTYPES)
@pytest.mark.parametrize("case", SMALL[:4])
def test_deferred(case: tuple, dtype: torch.dtype) -> None:
    """What is left out is h up^T, and the gradients at the sum are lora_linear's."""
    args = inputs(case, dtype)

    def whole(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
        y, h = lora_linear.lora_linear_deferred(x, weight, bias, down, up)
        assert not h.requires_grad
        return y + (h @ up.t()).detach()

    check(whole, lora_linear_ref, args, dtype, roundings=ROUNDINGS)
    assert lora_linear.deferrable(args[0], args[4]) and not lora_linear.deferrable(args[0], args[4].repeat(1, 17))
    wide = args[4].repeat(257, 1)
    assert lora_linear.deferrable(args[0], wide) == (wide.shape[1] == 1)


def test_where_no_gradient_comes_in() -> None:
    args = inputs(SMALL[1], torch.float32)
    Silent.apply(op(*args)).sum().backward()
    assert all(t.grad is None for t in args if torch.is_tensor(t))


def test_nothing_kept_without_gradients() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            op(*inputs(SMALL[1], torch.float32))
        y = op(*inputs(SMALL[1], torch.float32, wanted=""))
    assert not kept and not y.requires_grad


@pytest.mark.parametrize("case", SMALL[1:4])
def test_any_layout(case: tuple) -> None:
    """Rows of a wider matrix, a transposed x and an expanded gradient give the numbers of their copies."""
    x, *rest = inputs(case, torch.float32)
    wide = torch.cat([x, x], -1)[..., x.shape[-1] :].detach().requires_grad_()
    turned = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    expected = step((x, *rest))
    assert close(step((wide, *rest)), expected) and close(step((turned, *rest)), expected)
    y = op(x, *rest)
    leaves = x, rest[2], rest[3]
    for dy in (torch.randn(y.shape[-1], device=DEVICE), torch.ones(1, device=DEVICE)):
        expanded = torch.autograd.grad(y, leaves, dy.expand(y.shape), retain_graph=True)
        copied = torch.autograd.grad(y, leaves, dy.expand(y.shape).contiguous(), retain_graph=True)
        assert close(expanded, copied)


def test_refuses_a_trained_weight() -> None:
    x, weight, *rest = inputs(SMALL[0], torch.float32)
    with pytest.raises(TypeError, match="requires_grad_"):
        op(x, weight.requires_grad_(), *rest)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("case", [((1, 1024), 1280, 3840), ((1, 4096), 640, 1920), ((2, 64), 1280, 3840)])
def test_real_shapes_of_q_k_v(case: tuple, rank: int) -> None:
    check(op, lora_linear_ref, inputs((*case, rank, 3), torch.bfloat16), torch.bfloat16, roundings=ROUNDINGS)


@pytest.mark.parametrize("case", [SMALL[1], SMALL[2], SMALL[4], GROUPED[2], GROUPED[3]])
def test_opcheck(case: tuple) -> None:
    args = inputs(case, torch.float32)
    for deferred in (False, True)[: 1 + lora_linear.deferrable(args[0], args[4])]:
        torch.library.opcheck(_lora_linear, (*args, deferred))
    x, weight, _, down, up = (t.detach() for t in args)
    y, h = _lora_linear(x, weight, None, down, up, False)
    for given in ((x, h, True), (None, h, True), (x, None, False)):
        torch.library.opcheck(_lora_linear_backward, (y, *given[:2], weight, down, up, given[2]))


@pytest.mark.parametrize("case", SMALL[1:3])
def test_compile_and_checkpoint(case: tuple) -> None:
    args = inputs(case, torch.float32)
    expected = step(args)
    assert same(step(args, torch.compile(op, fullgraph=True, backend="aot_eager")), expected)
    assert same(step(args, lambda *args: checkpoint(op, *args, use_reentrant=False)), expected)


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel beside the frozen product forward, two backward, and nothing else but that product."""
    x, weight, bias, down, up = (t.detach() for t in inputs(SMALL[1], torch.float32))
    dy, h = x.new_ones(len(x), len(weight)), x.new_ones(len(x), 1)
    ours = "_rows_kernel", "_sums_kernel", "_total_kernel"
    forward = launched(monkeypatch, low_rank, lambda: _lora_linear._init_fn(x, weight, bias, down, up, False))
    backward = launched(monkeypatch, low_rank, lambda: _lora_linear_backward._init_fn(dy, x, h, weight, down, up, True))
    for names, kernels in ((forward, ["_rows_kernel"]), (backward, ["_rows_kernel", "_sums_kernel"])):
        assert [name for name in names if name in ours] == kernels
        if DEVICE == "cpu":  # a library may need two kernels for a product
            assert [name for name in names if name not in ours] == ["aten::addmm_"]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("case", [REAL[0], REAL[3], REAL[6], REAL[-1]])
def test_same_bits_and_captured(case: tuple, rank: int) -> None:
    args = inputs((*case, rank), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected, again = step(args), step(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(args)
    graph.replay()
    torch.cuda.synchronize()
    assert same(again, expected) and same(captured, expected)
