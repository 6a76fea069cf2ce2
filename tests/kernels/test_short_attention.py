"""short_attention: against float64, whatever the strides and whichever gradients are wanted, in part sums too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from launches import check_replay
from ops import ROUNDOFF, check, error, tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapm.kernels import runtime
from rapm.kernels import short_attention as module
from rapm.kernels.short_attention import (
    _short_attention,
    _short_attention_backward,
    fits,
    short_attention,
    short_attention_ref,
)  # fmt: skip

HALVES = [dtype for dtype in runtime.DTYPES if dtype != torch.float32]
ROUNDINGS = 4  # P or dS, the result of a product before it, the output, and the reference's inputs to them
# B H N D L
SMALL = [(1, 2, 70, 40, 77), (2, 3, 33, 64, 16), (1, 1, 5, 8, 3), (1, 2, 40, 30, 100)]
# SD1.5's and SDXL's over a prompt, and SD2.1's self attention in the middle
REAL = [(1, 8, 4096, 40, 77), (1, 10, 4096, 64, 77), (2, 20, 1024, 64, 77), (1, 20, 64, 64, 64)]


def qkv(case: tuple[int, ...], dtype: torch.dtype, wanted: str = "qkv") -> list[Tensor]:
    """As a UNet makes them: q a view of B N H D, k and v of rows that other layers' lie in too."""
    batch, heads, n, width, length = case
    q = tensor(batch, n, heads * width, dtype=dtype, mean=0.1)
    k, v = (x for x in tensor(2, batch, length, 3 * heads * width, dtype=dtype, mean=0.1)[..., : heads * width])
    views = [x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, k, v)]
    return [x.requires_grad_(name in wanted) for name, x in zip("qkv", views, strict=True)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", SMALL)
def test_against_float64(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(short_attention, short_attention_ref, qkv(case, dtype), dtype, roundings=ROUNDINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(short_attention, short_attention_ref, qkv(case, dtype), dtype, roundings=ROUNDINGS)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.detach() for x in qkv(SMALL[1], torch.bfloat16))
    expected = short_attention_ref(60 * q.double(), 60 * k.double(), v.double())
    assert error(short_attention(60 * q, 60 * k, v), expected) < ROUNDINGS * ROUNDOFF[torch.bfloat16]


@pytest.mark.parametrize("count", [1, 5, 64])
def test_sums_of_any_number_of_programs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processors", lambda device: count)
    case = (1, 2, 300, 16, 20)
    check(short_attention, short_attention_ref, qkv(case, torch.float16), torch.float16, roundings=ROUNDINGS)


@pytest.mark.parametrize("count", [82, 108, 128, 132])
@pytest.mark.parametrize("case", [*REAL, (1, 20, 1024, 64, 77)])
def test_sums_are_a_wave_of_programs(case: tuple[int, ...], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None waits for another's processor, which has registers for one, and few processors are idle."""
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(module, "processors", lambda device: count)
    monkeypatch.setattr(module, "_short_attention_bwd_kernel", Kernel())
    batch, heads, n, width, length = case
    q, k = (torch.empty(batch, heads, rows, width, dtype=torch.bfloat16, device="meta") for rows in (n, length))
    _short_attention_backward._init_fn(q.transpose(1, 2), q, k, k, True, True)
    (grid,) = grids
    assert grid[1:] == (heads, batch) and min(0.6 * count, heads * batch * n / 32) <= math.prod(grid) <= count


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv", "qk"])
def test_only_what_is_wanted(wanted: str) -> None:
    """The same whichever are wanted, but for the order of sums; kept are q, k and v."""
    inputs = qkv(SMALL[0], torch.bfloat16)
    y = short_attention(*inputs)
    dy = torch.randn_like(y)
    expected = dict(zip("qkv", torch.autograd.grad(y, inputs, dy), strict=True))
    some = [x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", inputs, strict=True)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = short_attention(*some)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]
    grads = torch.autograd.grad(y, [x for x in some if x.requires_grad], dy)
    errors = [error(grad, expected[name]) for name, grad in zip(wanted, grads, strict=True)]
    assert max(errors) <= ROUNDOFF[torch.bfloat16]


@pytest.mark.parametrize("case", SMALL[:2])
def test_any_strides_and_its_own_layout(case: tuple[int, ...]) -> None:
    inputs = qkv(case, torch.bfloat16)
    y = short_attention(*inputs)
    assert y.transpose(1, 2).is_contiguous()
    dy = torch.randn_like(y)
    expected = [y, *torch.autograd.grad(y, inputs, dy)]
    assert all(x.transpose(1, 2).is_contiguous() for x in expected)
    for change in (Tensor.contiguous, lambda x: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2)):
        others = [change(x.detach()).requires_grad_() for x in inputs]
        y = short_attention(*others)
        assert all(map(torch.equal, [y, *torch.autograd.grad(y, others, change(dy))], expected))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [((1, 1, 4, 64, 129), torch.bfloat16), ((1, 1, 4, 80, 77), torch.bfloat16), (SMALL[0], torch.float32)],
)
def test_what_it_does_not_take(case: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = qkv(case, dtype)
    with pytest.raises(ValueError, match="takes no"):
        short_attention(*inputs)
    assert fits(128, 64) and not fits(129, 40) and not fits(77, 65)


def test_opcheck() -> None:
    inputs = qkv(SMALL[2], torch.float16)
    torch.library.opcheck(_short_attention, inputs)
    args = [x.detach() for x in inputs]
    g = torch.randn_like(_short_attention(*args))
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(_short_attention_backward, (g, *args, *wants))


def test_compile_and_checkpoint() -> None:
    inputs = qkv(SMALL[1], torch.float16)

    def grads(f) -> list[Tensor]:
        y = f(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    expected = grads(short_attention)
    compiled = torch.compile(short_attention, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, grads(compiled), expected))
    assert all(map(torch.equal, grads(lambda *x: checkpoint(short_attention, *x, use_reentrant=False)), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [REAL[0], REAL[3]])
def test_same_bits_and_captured(case: tuple[int, ...]) -> None:
    inputs = qkv(case, torch.bfloat16)
    dy = torch.randn(case[0], case[2], case[1], case[3], device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    def step() -> tuple[Tensor, ...]:
        y = short_attention(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert all(map(torch.equal, step(), step()))
        check_replay(step)
