"""LayerNorm, with and without the residual add, against float64: real widths, odd ones, offsets, frozen parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops import DEVICE, check, error, tensor
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from rapm.kernels import layer_norm as module
from rapm.kernels import runtime
from rapm.kernels.layer_norm import (
    _add_layer_norm,
    _layer_norm,
    _layer_norm_again,
    _layer_norm_backward,
    layer_norm,
    layer_norm_again,
    layer_norm_ref,
    layer_norm_with_stats,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
# ... C: a warp a row (one chunk, several, an odd width), a program a row (few rows; wide ones), any leading dimensions
SHAPES = [(2, 9, 48), (19, 320), (2, 2, 5, 7), (3, 320), (5, 1100), (48,)]
REAL = [(1, n, c) for n, c in ((4096, 320), (1024, 640), (256, 1280), (64, 1280), (4096, 640), (1024, 1280))]
# An output's rounding is at most two of ops.ROUNDOFF; the interpreter cuts bf16 off: at most twice that. With a
# residual there is that of s too, whose magnitude is here about its standard deviation.
ROUNDING = 2 if DEVICE == "cuda" else 4


def case(shape: tuple[int, ...], dtype: torch.dtype, affine: bool, residual: bool, mean: float = 0.5) -> list[Tensor]:
    streams = [tensor(*shape, dtype=dtype, mean=mean, grad=True) for _ in range(1 + residual)]
    return [tensor(shape[-1], dtype=dtype, grad=affine) for _ in range(2)] + streams


def run(weight: Tensor, bias: Tensor, x: Tensor, *added: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, EPS, *added)


def reference(weight: Tensor, bias: Tensor, x: Tensor, *added: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return layer_norm_ref(x, weight, bias, EPS, *added)


def update(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> list[Tensor]:
    """A LoRA's h, and its up, which lies unaligned in a larger buffer."""
    flat = tensor(shape[-1] * rank + 1, dtype=dtype)[1:]
    return [tensor(*shape[:-1], rank, dtype=dtype), flat.view(-1, rank)]


def gradients(f: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of what requires one, for reproducible cotangents."""
    outputs = f(*inputs)
    outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
    cotangents = [
        (i + 1.0) * torch.cos(torch.arange(y.numel(), device=DEVICE)).view(y.shape) for i, y in enumerate(outputs)
    ]
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)])
    return [*(y.detach() for y in outputs), *grads]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_and_odd_shapes(shape: tuple[int, ...], dtype: torch.dtype, residual: bool):
    inputs = case(shape, dtype, not residual, residual)  # all gradients of both: test_many_rows_share...
    check(run, reference, inputs, dtype, roundings=ROUNDING * (1 + residual))


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: tuple[int, ...], dtype: torch.dtype, residual: bool):
    for affine in (False, True):
        check(run, reference, case(shape, dtype, affine, residual), dtype, roundings=ROUNDING * (1 + residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [(SHAPES[0], 1), (SHAPES[1], 3), (SHAPES[-1], 16)])
def test_with_a_low_rank_update(shape: tuple[int, ...], rank: int, dtype: torch.dtype):
    inputs = case(shape, dtype, True, True) + update(shape, rank, dtype)
    check(run, reference, inputs, dtype, roundings=2 * ROUNDING)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes_with_an_update(shape: tuple[int, ...], rank: int):
    inputs = case(shape, torch.bfloat16, False, True) + update(shape, rank, torch.bfloat16)
    check(run, reference, inputs, torch.bfloat16, roundings=2 * ROUNDING)


def test_an_offset_does_not_cancel():
    for rows in (3, 20):
        check(run, reference, case((rows, 320), torch.float32, True, False, mean=30.0), torch.float32)


def test_parameters_in_fp32_beside_a_bf16_stream():
    x, weight, bias = tensor(6, 40, dtype=torch.bfloat16, grad=True), tensor(40, grad=True), tensor(40, grad=True)
    check(run, reference, [weight, bias, x], torch.bfloat16, roundings=ROUNDING)


def test_many_rows_share_a_programs_partial_sums(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "WAVES", 1)
    check(run, reference, case((45, 24), torch.float32, True, True), torch.float32)


def test_slices_and_any_gradient():
    weight, bias = tensor(40, grad=True), tensor(40, grad=True)
    wide = tensor(4, 6, 80)
    for x in (wide[1:3, :, :40], wide[:, ::2, 8:48], wide.transpose(0, 2)[:2].transpose(1, 2).expand(2, 4, 6)):
        weight, bias = tensor(x.shape[-1], grad=True), tensor(x.shape[-1], grad=True)
        check(run, reference, [weight, bias, x.detach().requires_grad_()], torch.float32)
        residual = x.flip(0).detach().requires_grad_()
        check(run, reference, [weight, bias, x.detach().requires_grad_(), residual], torch.float32)
    x, residual = tensor(4, 6, 40, grad=True), tensor(4, 6, 40, grad=True)
    weight, bias = tensor(40), tensor(40)
    for outputs in (lambda s, y: y.sum() + s.sum(), lambda s, y: y.mT.square().sum(), lambda s, y: s.sum()):
        mine = torch.autograd.grad(outputs(*run(weight, bias, x, residual)), (x, residual))
        theirs = torch.autograd.grad(outputs(*reference(weight, bias, x, residual)), (x, residual))
        assert all(error(a, b) < 1e-6 for a, b in zip(mine, theirs, strict=True))


def test_the_sum_that_is_normalised_is_the_rounded_one_that_goes_on():
    weight, bias, x, residual = case((64, 40), torch.bfloat16, False, True, mean=4.0)
    s, y = run(weight, bias, x, residual)
    assert torch.equal(s, x + residual) or DEVICE == "cpu"  # the interpreter cuts off
    assert error(y, run(weight, bias, s)) < 2**-12  # and 2**-9 if it were not


def check_again(x: Tensor, *added: Tensor | None) -> None:
    """Of the sum and the statistics comes y to the bit, whichever variant of the kernel has added them up."""
    weight, bias = (tensor(x.shape[-1], dtype=x.dtype) for _ in range(2))
    s, y, stats = layer_norm_with_stats(x, weight, bias, EPS, *added)
    assert (s is x) == (not added) and y.isfinite().all() and stats.shape == (2, x.numel() // x.shape[-1])
    again = layer_norm_again(s, weight, bias, EPS, stats)
    assert torch.equal(again, y) and again.stride() == y.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_again_is_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype):
    x, residual = (tensor(*shape, dtype=dtype) for _ in range(2))
    check_again(x)
    check_again(x, residual)
    for rank in (1, 3):
        check_again(x, residual, *update(shape, rank, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", REAL)
def test_again_is_the_same_bits_of_real_shapes(shape: tuple[int, ...], dtype: torch.dtype):
    """With an update of rank 3 or 16 Triton 3.6 deals a row out to sm_90's threads in another way than without."""
    x, residual = (tensor(*shape, dtype=dtype, mean=3.0) for _ in range(2))
    check_again(x)
    check_again(x, residual)
    for rank in (1, 3, 16):
        check_again(x, residual, *update(shape, rank, dtype))


def test_again_of_slices():
    wide = tensor(4, 6, 80)
    for x in (wide[1:3, :, :40], wide[:, ::2, 8:48], wide.transpose(0, 2)[:2].transpose(1, 2).expand(2, 4, 6)):
        check_again(x)
        check_again(x, x.flip(0))


def test_again_adds_nothing_up():
    """The statistics are those that it is given."""
    weight, bias, s = case((6, 40), torch.float32, False, False)
    stats = torch.stack([torch.full((6,), 3.0), torch.full((6,), 2.0)]).to(DEVICE)
    assert error(layer_norm_again(s, weight, bias, EPS, stats), (s - 3) * 2 * weight + bias) < 1e-6


def test_without_kernels_again_is_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "MODE", "reference")
    weight, bias, x, residual = case((6, 40), torch.float32, False, True)
    for added in ((), (residual,)):
        s, y, stats = layer_norm_with_stats(x, weight, bias, EPS, *added)
        assert stats is None and torch.equal(layer_norm_again(s, weight, bias, EPS, stats), y)
        assert torch.equal(y, run(weight, bias, x, *added)[1] if added else run(weight, bias, x))


def test_the_two_streams_get_gradients_of_their_own():
    weight, bias, x, residual = case((6, 40), torch.float32, False, True)
    s, y = run(weight, bias, x, residual)
    (s.square().sum() + y.square().sum()).backward()
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.mark.parametrize("residual", [False, True])
def test_frozen_parameters_cost_nothing_and_one_stream_is_kept(residual: bool, monkeypatch: pytest.MonkeyPatch):
    weight, bias, *streams = case((24, 40), torch.float32, False, residual)
    before, kept = [x.detach().clone() for x in streams], []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = run(weight, bias, *streams)
    stream = outputs[0] if residual else streams[0]
    assert {t.data_ptr() for t in kept} - {stream.data_ptr(), weight.data_ptr()} == {kept[1].data_ptr()}
    assert kept[1].shape == (2, 24) and kept[1].dtype == torch.float32
    calls = []
    monkeypatch.setattr(module, "_layer_norm_backward", lambda *a: calls.append(a[-1]) or _layer_norm_backward(*a))
    sum(y.square().sum() for y in (outputs if residual else [outputs])).backward()
    assert calls == [False] and weight.grad is None and bias.grad is None
    assert all(map(torch.equal, streams, before))


def test_one_parameter_alone():
    for i in range(2):
        weight, bias, x = case((24, 40), torch.float32, False, False)
        (weight, bias)[i].requires_grad_()
        check(run, reference, [weight, bias, x], torch.float32)
        check(run, reference, [weight, bias, x.detach()], torch.float32)


def test_opcheck():
    weight, bias, x, residual = case((2, 5, 24), torch.float32, True, True)
    torch.library.opcheck(_layer_norm, (x, weight, bias, EPS))
    for added in ((None, None), update(tuple(x.shape), 3, x.dtype)):
        torch.library.opcheck(_add_layer_norm, (x, residual, weight.detach(), bias.detach(), EPS, *added))
    stats = torch.stack([torch.zeros(10, device=DEVICE), torch.ones(10, device=DEVICE)])
    for ds, affine in ((None, False), (residual.detach(), True)):
        torch.library.opcheck(_layer_norm_backward, (x.detach(), ds, x.detach(), stats, weight.detach(), affine))
    torch.library.opcheck(_layer_norm_again, (x.detach(), weight.detach(), bias.detach(), stats))


@pytest.mark.parametrize("residual", [False, True])
def test_compiled_and_checkpointed_gradients_are_the_eager_ones(residual: bool):
    inputs = case((3, 5, 24), torch.float32, residual, residual)
    eager = gradients(run, inputs)
    for wrapped in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda *inputs: checkpoint(run, *inputs, use_reentrant=False),
    ):
        assert all(map(torch.equal, gradients(wrapped, inputs), eager))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [REAL[0], REAL[3]])
@pytest.mark.parametrize("affine", [False, True])
def test_same_bits_eagerly_and_replayed(shape: tuple[int, ...], affine: bool):
    inputs = case(shape, torch.bfloat16, affine, True)
    eager = gradients(run, inputs)
    assert all(map(torch.equal, eager, gradients(run, inputs)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(run, inputs)
    graph.replay()
    assert all(map(torch.equal, eager, captured))
