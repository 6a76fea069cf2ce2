"""int8_linear: exact integer sums, the straight-through gradients, what is kept, and how far it is from the layer."""

from __future__ import annotations

import pytest
import torch
from launches import launched
from ops import DEVICE, ROUNDOFF, SUMS, Silent, error, tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapm.kernels import int8_linear, low_rank, runtime
from rapm.kernels.dequantise import int8
from rapm.kernels.int8_linear import _int8_linear, _int8_linear_backward, int8_linear_ref, quantise_rows
from rapm.kernels.int8_linear import quantise_rows_ref as rows_ref

op = int8_linear.int8_linear
# The low-rank update, its sum with the product, and g or h, an operand of a product; ddown and dup have no more.
ROUNDINGS = 4
# Rounding to 127 steps of a row's largest, some 3 deviations: 3.2 / 127 / sqrt(12) = 0.7% of x, as much of W, and with
# the offset mean of these tests less of the sum.
QUANTISED = 0.012
# leading shape, K, N, R; R 0 is no LoRA
SMALL = [((2, 3), 12, 7, 1), ((70,), 160, 96, 1), ((5, 7), 40, 24, 0), ((66,), 96, 140, 16), ((9,), 32, 72, 20)]
REAL = [
    ((1, 1024), 1280, 1280), ((1, 1024), 1280, 10240), ((1, 1024), 5120, 1280), ((1, 4096), 640, 640),
    ((1, 4096), 2560, 640), ((1, 77), 2048, 1280), ((2, 77), 768, 320), ((1, 4096), 320, 2560), ((1, 64), 1280, 1280),
]  # fmt: skip


def inputs(case: tuple, dtype: torch.dtype, *, bias: bool = True, wanted: str = "xdu") -> tuple:
    """x, codes, scale, b, down and up."""
    lead, k, n, rank = case
    low = int8(tensor(n, k))
    pair = (tensor(rank, k, dtype=dtype), tensor(n, rank, dtype=dtype)) if rank else (None, None)
    x = tensor(*lead, k, dtype=dtype)
    for name, t in zip("xdu", (x, *pair), strict=True):
        if t is not None:
            t.requires_grad_(name in wanted)
    return x, low.codes, low.scale, tensor(n, dtype=dtype) if bias else None, *pair


def cotangent(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)


def step(args: tuple, layer=op) -> list[Tensor]:
    """y and the gradients that are wanted."""
    y = layer(*args)
    wanted = [t for t in args if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, cotangent(y))]


def expected(args: tuple) -> list[Tensor]:
    """The same in float64, from the codes that the operator itself makes of x and dy."""
    x, codes, scale, bias, down, up = args
    flat, w = x.detach().flatten(0, -2), codes.double()
    rounded, s = rows_ref(flat)
    y = s.double()[:, None] * (rounded.double() @ w.t()) * scale.double()
    y = y if bias is None else y + bias.double()
    h = None if down is None else flat.double() @ down.detach().double().t()
    y = y if down is None else y + h @ up.detach().double().t()
    dy = cotangent(y.view(*x.shape[:-1], -1)).to(x.dtype).flatten(0, -2)
    rounded, s = rows_ref(dy, scale)
    dx, grads = s.double()[:, None] * (rounded.double() @ w), []
    if down is not None:
        g = dy.double() @ up.detach().double()
        dx = dx + g @ down.detach().double()
        grads = [g.t() @ flat.double(), dy.double().t() @ h]
    return [y.view(*x.shape[:-1], -1), dx.view(x.shape), *grads]


def same(actual: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, wanted, strict=True))


def check(args: tuple, dtype: torch.dtype) -> None:
    limit = ROUNDINGS * ROUNDOFF[dtype] + SUMS * ROUNDOFF[torch.float32]
    # On a GPU a division rounds otherwise, and some of the codes differ by one.
    limit += 0.0 if DEVICE == "cpu" else 1e-4
    for name, a, e in zip(("y", "dx", "ddown", "dup"), step(args), expected(args), strict=False):
        assert a.shape == e.shape and error(a, e) <= limit, f"{name}: {error(a, e):.2e} > {limit:.2e}"


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("dtype", runtime.DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_against_float64(case: tuple, dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MODE", mode)
    check(inputs(case, dtype), dtype)
    check(inputs(case, dtype, bias=False), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 1, 16, 64])
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case: tuple, rank: int) -> None:
    check(inputs((*case, rank), torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("case", SMALL)
def test_near_the_whole_layer(case: tuple) -> None:
    """Forward and gradients against the layer whose weight is not quantised."""
    torch.manual_seed(1)
    _, k, n, _ = case
    weight, args = tensor(n, k), inputs(case, torch.float32)
    args = (args[0], *int8(weight)[:2], *args[3:])

    def layer(x, codes, scale, bias, down, up):
        y = torch.nn.functional.linear(x, weight, bias)
        return y if down is None else y + x @ down.t() @ up.t()

    assert all(error(a, e) < 2 * QUANTISED for a, e in zip(step(args), step(args, layer), strict=True))
    assert error(int8_linear_ref(*args), layer(*args)) < 2 * QUANTISED


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("count", [2, 3])
def test_layers_side_by_side(count: int, rank: int) -> None:
    """G layers in one give each one's y and low-rank gradients; dx is their sum, but dy is rounded by other steps."""
    case = (33,), 96, 40, rank
    each = [inputs(case, torch.float32) for _ in range(count)]
    x = each[0][0]
    together = (x, *(torch.cat([args[i] for args in each]).detach() for i in range(1, 6)))
    for t in together[4:]:
        t.requires_grad_()
    y, dx, ddown, dup = step(together)
    dy = cotangent(y)
    alone = []
    for i, args in enumerate(each):
        out = op(x, *args[1:])
        part = dy[:, i * 40 : (i + 1) * 40].contiguous()
        alone.append([out.detach(), *torch.autograd.grad(out, (x, *args[4:]), part)])
    ys, dxs, ddowns, dups = zip(*alone, strict=True)
    for a, e in ((y, torch.cat(ys, 1)), (ddown, torch.cat(ddowns)), (dup, torch.cat(dups))):
        assert a.shape == e.shape and error(a, e) <= SUMS * ROUNDOFF[torch.float32]
    assert error(dx, sum(dxs)) < 2 * QUANTISED


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (9, 320), (3, 5000)])
def test_rows(shape: tuple[int, int], columns: bool) -> None:
    x = tensor(*shape, dtype=torch.bfloat16)
    x[1] = 0
    factor = torch.rand(shape[1], device=DEVICE) if columns else None
    (codes, scale), (codes_ref, scale_ref) = quantise_rows(x, factor), rows_ref(x, factor)
    assert not codes[1].any() and codes.abs().amax(1)[0] == 127
    assert error(scale, scale_ref) < SUMS * ROUNDOFF[torch.float32]
    assert (codes.int() - codes_ref.int()).abs().max() <= (0 if DEVICE == "cpu" else 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """A slot that is lost must be seen to be lost."""
    x, *rest = inputs(SMALL[2], torch.float32)
    x = x.detach()
    x[2, 3, 5] = value
    y = op(x, *rest)
    assert not y[2, 3].isfinite().any() and y[:2].isfinite().all()


def test_where_no_gradient_comes_in() -> None:
    args = inputs(SMALL[1], torch.float32)
    Silent.apply(op(*args)).sum().backward()
    assert all(t.grad is None for t in args if torch.is_tensor(t))


@pytest.mark.parametrize("wanted", ["x", "d", "u", "xd", "xu", "du"])
@pytest.mark.parametrize("case", [SMALL[1], SMALL[4]])
def test_only_what_is_wanted(case: tuple, wanted: str) -> None:
    """The same gradients, whichever are wanted; x is kept for down's alone, h for up's, and no weight but the codes."""
    args = inputs(case, torch.float32)
    whole = dict(zip("yxdu", step(args), strict=True))
    x, codes, scale, bias, down, up = (t.detach() for t in args)
    for name, t in zip("xdu", (x, down, up), strict=True):
        t.requires_grad_(name in wanted)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        actual = step((x, codes, scale, bias, down, up))
    for a, e in zip(actual, [whole[name] for name in "y" + wanted], strict=True):
        assert error(a, e) <= SUMS * ROUNDOFF[torch.float32]  # in as many parts as fill the chip
    there = {t.untyped_storage().data_ptr() for t in (codes, scale, down, up)}
    fresh = [t for t in kept if t.untyped_storage().data_ptr() not in there]
    assert sum(t.numel() for t in fresh) == x.numel() * ("d" in wanted) + x[..., 0].numel() * case[3] * ("u" in wanted)


def test_frozen_only_keeps_nothing() -> None:
    args, kept = inputs(SMALL[2], torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op(*args)
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in args[1:3]}


def test_refuses_a_trained_weight() -> None:
    x, codes, scale, *rest = inputs(SMALL[0], torch.float32)
    with pytest.raises(TypeError, match="requires_grad_"):
        op(x, codes, scale.requires_grad_(), *rest)


@pytest.mark.parametrize("case", [SMALL[1], SMALL[2], SMALL[4]])
def test_opcheck(case: tuple) -> None:
    args = inputs(case, torch.float32)
    torch.library.opcheck(_int8_linear, args)
    x, codes, scale, _, down, up = (None if t is None else t.detach() for t in args)
    y, h = _int8_linear(x, codes, scale, None, down, up)
    given = ((x, h, True), (None, h, True), (x, None, False)) if down is not None else ((None, None, True),)
    for kept_x, kept_h, wants in given:
        torch.library.opcheck(_int8_linear_backward, (y, kept_x, kept_h, codes, scale, down, up, wants))


@pytest.mark.parametrize("case", SMALL[1:3])
def test_compile_checkpoint_and_any_layout(case: tuple) -> None:
    x, *rest = inputs(case, torch.float32)
    wanted = step((x, *rest))
    assert same(step((x, *rest), torch.compile(op, fullgraph=True, backend="aot_eager")), wanted)
    assert same(step((x, *rest), lambda *args: checkpoint(op, *args, use_reentrant=False)), wanted)
    wide = torch.cat([x, x], -1)[..., x.shape[-1] :].detach().requires_grad_()
    assert same(step((wide, *rest)), wanted)


@pytest.mark.parametrize("case", [SMALL[1], SMALL[2]])
def test_launches(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    args = tuple(None if t is None else t.detach() for t in inputs(case, torch.float32))
    x, codes, scale, _, down, up = args
    dy, h = x.new_ones(*x.shape[:-1], len(codes)), None if down is None else x.new_ones(x[..., 0].numel(), case[3])
    kept, low = (x if case[3] else None, h), ["_rows_kernel"] if case[3] else []
    monkeypatch.setattr(low_rank, "processors", lambda device: 4)

    def names(call) -> list[str]:
        with monkeypatch.context() as patch:
            found = launched(patch, int8_linear, call)
        return [name for name in found if name.startswith("_")]

    if DEVICE == "cuda":  # there all launches are seen, here those of one file
        assert names(lambda: _int8_linear._init_fn(*args))[: len(low)] == low
    ours = [name for name in names(lambda: _int8_linear._init_fn(*args)) if name != "_rows_kernel"]
    assert ours == ["_quantise_rows_kernel", "_product_kernel"]
    backward = names(lambda: _int8_linear_backward._init_fn(dy, *kept, codes, scale, down, up, True))
    ours = [name for name in backward if name not in ("_rows_kernel", "_sums_kernel", "_total_kernel")]
    assert ours == ["_quantise_rows_kernel", "_turn_kernel", "_product_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 1, 64])
@pytest.mark.parametrize("case", [REAL[0], REAL[1], REAL[5]])
def test_same_bits_and_captured(case: tuple, rank: int) -> None:
    args = inputs((*case, rank), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wanted, again = step(args), step(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(args)
    graph.replay()
    torch.cuda.synchronize()
    assert same(again, wanted) and same(captured, wanted)
