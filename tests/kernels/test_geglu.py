"""GEGLU against float64: the shapes of SD1.5 and SDXL, odd ones, slices, far-out gates."""

from __future__ import annotations

import pytest
import torch
from ops import DEVICE, check, error, tensor
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from rapm.kernels.geglu import _geglu, _geglu_backward, geglu, geglu_ref

# The output's rounding is at most two of ops.ROUNDOFF; the interpreter cuts bf16 off, which is at most twice that
ROUNDINGS = 2 if DEVICE == "cuda" else 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# ... 2F: fewer and more columns than a program takes, odd ones, fewer and more rows, any leading dimensions
SHAPES = [(1, 5, 96), (3, 2, 3, 50), (9, 600), (37, 10), (2,)]
REAL = [(1, 4096, 2560), (1, 1024, 5120), (1, 256, 10240), (1, 64, 10240), (1, 4096, 5120), (1, 1024, 10240)]


def gradient(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    y = geglu(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_and_odd_shapes(shape: tuple[int, ...], dtype: torch.dtype):
    check(geglu, geglu_ref, [tensor(*shape, dtype=dtype, grad=True)], dtype, roundings=ROUNDINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: tuple[int, ...], dtype: torch.dtype):
    check(geglu, geglu_ref, [tensor(*shape, dtype=dtype, grad=True)], dtype, roundings=ROUNDINGS)


def with_update(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> list[Tensor]:
    """x, h and up, which lies unaligned in a larger buffer."""
    flat = tensor(shape[-1] * rank + 1, dtype=dtype)[1:]
    return [tensor(*shape, dtype=dtype, grad=True), tensor(*shape[:-1], rank, dtype=dtype), flat.view(-1, rank)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [(SHAPES[0], 1), (SHAPES[1], 3), (SHAPES[2], 16), (SHAPES[4], 2)])
def test_with_a_low_rank_update(shape: tuple[int, ...], rank: int, dtype: torch.dtype):
    check(geglu, geglu_ref, with_update(shape, rank, dtype), dtype, roundings=ROUNDINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("shape", [REAL[0], REAL[5]])
def test_real_shapes_with_an_update(shape: tuple[int, ...], rank: int):
    check(geglu, geglu_ref, with_update(shape, rank, torch.bfloat16), torch.bfloat16, roundings=ROUNDINGS)


def test_gelu_is_the_exact_one_far_out_too():
    gate = torch.cat([torch.linspace(-6, 12, 1801), torch.tensor([0.0, -0.0, 1e-30, -40.0, 1e4, -1e4, 1e25, -1e25])])
    x = torch.cat([torch.ones_like(gate), gate]).to(DEVICE).requires_grad_()
    y, dx = gradient(x, torch.ones_like(gate, device=DEVICE))
    value_grad, gate_grad = dx.chunk(2)
    exact = gate.double().to(DEVICE)
    phi = 0.5 * torch.erfc(-exact * 0.5**0.5)
    slope = phi + exact * torch.exp(-exact * exact / 2) * 0.3989422804014327
    scale = exact.abs().clamp(min=1)
    for mine, theirs in ((y, exact * phi), (value_grad, exact * phi), (gate_grad, slope)):
        assert ((mine - theirs).abs() / scale).max() < 8 * 2**-24  # roundoffs of fp32: rsqrt, P(t), exp2, the products
    normal = (exact > -6) & (exact.abs() > 1e-3) & (exact.abs() < 13)  # the erf of fp32 has no correct digit below -5.5
    assert ((y - exact * phi).abs() / (exact * phi).abs())[normal].max() < 1e-5


def test_slices_and_any_gradient():
    wide = tensor(4, 6, 120)
    for x in (wide[1:3], wide[..., 8:104], wide[:, ::2, 5:15], wide.transpose(0, 2)[:96]):
        check(geglu, geglu_ref, [x.detach().requires_grad_()], torch.float32)
    x = tensor(4, 6, 96, grad=True)
    expected = torch.autograd.grad(geglu_ref(x), x, torch.ones(4, 6, 48, device=DEVICE))[0]
    geglu(x).sum().backward()  # an expanded gradient
    assert error(x.grad, expected) < 1e-6
    dy = tensor(48, 6, 4).transpose(0, 2)
    assert error(gradient(x, dy)[1], gradient(x, dy.contiguous())[1]) == 0


def test_the_pre_activation_alone_is_kept_and_not_written():
    x = tensor(4, 96, grad=True)
    before, kept = x.detach().clone(), []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = geglu(x)
    assert kept == [x.data_ptr()]
    y.sum().backward()
    assert torch.equal(x, before)


def test_opcheck():
    x = tensor(2, 5, 20)
    torch.library.opcheck(_geglu, (x.clone().requires_grad_(), None, None))
    torch.library.opcheck(_geglu, (x[:, 1:3], None, None))
    torch.library.opcheck(_geglu_backward, (tensor(2, 5, 10), x, None, None))
    update = [t.detach() for t in with_update((2, 5, 20), 3, torch.float32)]
    torch.library.opcheck(_geglu_backward, (tensor(2, 5, 10), *update))
    torch.library.opcheck(_geglu, (update[0].clone().requires_grad_(), *update[1:]))


def test_compiled_and_checkpointed_gradients_are_the_eager_ones():
    x, dy = tensor(3, 5, 20, grad=True), tensor(3, 5, 10)
    y, dx = gradient(x, dy)
    for wrapped in (
        torch.compile(geglu, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(geglu, x, use_reentrant=False),
    ):
        other = wrapped(x)
        assert torch.equal(other, y)
        assert torch.equal(torch.autograd.grad(other, x, dy)[0], dx)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [REAL[0], REAL[3]])
def test_same_bits_eagerly_and_replayed(shape: tuple[int, ...]):
    x = tensor(*shape, dtype=torch.bfloat16, grad=True)
    dy = tensor(*shape[:-1], shape[-1] // 2, dtype=torch.bfloat16)
    eager = gradient(x, dy)
    assert all(map(torch.equal, eager, gradient(x, dy)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient(x, dy)
    graph.replay()
    assert all(map(torch.equal, eager, captured))
