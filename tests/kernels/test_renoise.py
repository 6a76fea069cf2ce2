"""renoise: Philox's published answers, the same bits from kernel and reference, the distributions, one launch."""

from __future__ import annotations

import math

import pytest
import torch
from launches import check_replay, launched
from ops import DEVICE, ROUNDOFF, check, error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapm.kernels import renoise as module
from rapm.kernels.renoise import philox, renoise, renoise_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 4, 8, 8), (3, 5, 3, 5), (2, 3, 1, 1), (1, 4, 12, 13)]
REAL = [(1, 4, 64, 64), (1, 4, 128, 128), (3, 4, 128, 128)]
FP32 = ROUNDOFF[torch.float32]
T, SEED = 1000, -0x123456789ABCDEF


def inputs(shape: tuple[int, ...], slot: int = 1, count: int = 7, grad: bool = False) -> list[Tensor]:
    """The tensors that renoise takes, in its order."""
    x = [(0.5 + torch.randn(shape)).to(DEVICE).requires_grad_(grad) for _ in range(3)]
    low, high = torch.tensor([749, 499, 249, 0]), torch.tensor([999, 749, 499, 249])
    keep = torch.rand(4, T)
    table = torch.stack([keep, (1 - keep * keep).sqrt()], dim=-1)
    rest = low, high, table, torch.tensor([slot]), torch.tensor([SEED, count])
    return [*x, *(tensor.to(DEVICE) for tensor in rest)]


def drawn(shape: tuple[int, ...], count: int = 0, f=renoise_ref) -> Tensor:
    """xi alone, 3 B C h w: keep 0, add 1."""
    zeros = torch.zeros(shape, device=DEVICE)
    table = torch.tensor([0.0, 1.0], device=DEVICE).expand(1, T, 2).contiguous()
    low, high = (torch.tensor([n], device=DEVICE) for n in (0, T))
    key = torch.tensor([SEED, count], device=DEVICE)
    x_u, _, _ = f(zeros, zeros, zeros, low, high, table, low, key, 1.0, torch.float32)
    return x_u.unflatten(0, (3, -1))


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, answer):
    """Random123's kat_vectors for philox4x32-10."""
    pairs = [signed(x[0] + (x[1] << 32)) for x in (counter[:2], counter[2:], key)]
    words = philox(torch.tensor([pairs[2], pairs[1]], device=DEVICE), torch.tensor([pairs[0]], device=DEVICE))
    assert " ".join(f"{word:08x}" for word in words[:, 0].tolist()) == answer


def test_known_answer_of_the_kernel():
    """Key and counter 0: time is 0x6627e8 / 2^24."""
    arguments = inputs((1, 4, 2, 2))
    arguments[3], arguments[4] = torch.zeros_like(arguments[3]), torch.full_like(arguments[4], T)
    arguments[7].zero_()
    assert renoise(*arguments, 1.0, torch.float32)[1].tolist() == [0x6627E8 * T >> 24]


def compare(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = inputs(shape)
    actual = renoise(*arguments, 1.0, dtype)
    x, rest = [a.double() for a in arguments[:3]], [arguments[5].double(), *arguments[6:]]
    expected = renoise_ref(*x, *arguments[3:5], *rest, 1.0, torch.float64)
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[2].double(), expected[2])
    assert actual[0].dtype == dtype and actual[0].stride() == expected[0].stride()
    # xi is fp32 in both: a dozen operations, of which the logarithm near 1 and the angle are the worst
    assert error(actual[0], expected[0]) < ROUNDOFF[dtype] * 2 + 16 * FP32
    assert error(renoise_ref(*arguments, 1.0, dtype)[0], expected[0]) < ROUNDOFF[dtype] + 16 * FP32


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype):
    for shape in SHAPES:
        compare(shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype, shape):
    compare(shape, dtype)


def test_u_is_the_references_for_every_slot_and_counter():
    arguments = inputs((1, 1, 1, 2))
    for slot in range(4):
        for count, share in ((0, 1.0), (1, 0.3), (2**32, 1.0), (-1, 0.3)):
            arguments[6].fill_(slot)
            arguments[7][1] = count
            actual, expected = (f(*arguments, share, torch.float32)[1:] for f in (renoise, renoise_ref))
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 4, 16, 24), pytest.param((1, 4, 128, 128), marks=pytest.mark.gpu)])
def test_xi_is_box_mullers(shape):
    """Each number from the words that the docstring gives it, against float64."""
    rows, groups, size = 3, shape[1] // 4, shape[2] * shape[3]
    words = philox(torch.tensor([SEED, 5]), torch.arange(1 + rows * groups * size))[:, 1:]
    uniform = (words[::2].float() * 2**-32 + 2**-33).double()
    radius, angle = (-2 * uniform.log()).sqrt(), 2 * math.pi * (words[1::2].double() * 2**-32)
    xi = (
        torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        .view(4, 3, 1, *shape[2:])
        .permute(1, 2, 0, 3, 4)
    )
    for f in (renoise, renoise_ref):
        # relative to the radius: a few roundoffs each of logarithm, root, angle and cosine
        limit = 8 * FP32 * radius.max()
        assert (drawn(shape, 5, f).double().cpu() - xi).abs().max() < limit


def standard_normal(x: Tensor) -> None:
    """Five standard deviations of the sample's mean, variance, skewness and kurtosis; Kolmogorov-Smirnov at 1e-5."""
    x = x.flatten().double().cpu()
    n = len(x)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - expected) < 5 * (variance / n) ** 0.5, power
    cdf = torch.special.ndtr(x.sort().values)
    assert (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 2.5 / n**0.5


def uncorrelated(x: Tensor, y: Tensor) -> None:
    """Neither the numbers nor their squares."""
    x, y = (t.flatten().double().cpu() for t in (x, y))
    for a, b in ((x, y), ((x * x - 1) / 2**0.5, (y * y - 1) / 2**0.5)):
        assert abs(float((a * b).mean())) < 5 / len(x) ** 0.5


@pytest.mark.parametrize("f", [renoise_ref, pytest.param(renoise, marks=pytest.mark.gpu)])
def test_xi_is_normal_and_independent(f):
    first, later = drawn((2, 4, 128, 128), 3, f), drawn((2, 4, 128, 128), 4, f)
    standard_normal(first)
    for i in range(3):
        standard_normal(first[i])
        uncorrelated(first[i], first[(i + 1) % 3])  # the three inputs
        uncorrelated(first[i], later[i])  # two slots
        uncorrelated(first[i, 0], first[i, 1])  # two rows
    for i in range(4):
        standard_normal(first[:, :, i])
        uncorrelated(first[:, :, i], first[:, :, (i + 1) % 4])  # channels: one counter's four words
    uncorrelated(first[..., 1:], first[..., :-1])
    uncorrelated(first[..., 1:, :], first[..., :-1, :])


def test_u_is_uniform_and_stays_in_the_slot():
    arguments = inputs((1, 1, 1, 1), slot=2)
    for share, top in ((1.0, 499), (0.5, 374)):
        drawn_u = []
        for count in range(1000):
            arguments[7][1] = count
            drawn_u.append(int(renoise_ref(*arguments, share, torch.float32)[1]))
        assert min(drawn_u) >= 249 and max(drawn_u) < top
        bins = torch.histc(torch.tensor(drawn_u, dtype=torch.float64), bins=25, min=249, max=top)
        assert float(((bins - 40) ** 2 / 40).sum()) < 24 + 5 * 48**0.5  # chi squared: 24 degrees of freedom
    u, keep = renoise(*arguments, 0.0, torch.float32)[1:]
    assert int(u) == 249 and torch.equal(keep, arguments[5][2, 249, :1])


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_extreme_words_stay_in_range(monkeypatch, word):
    """The largest time stays below t_{n+1} for every length of a slot, and no xi is infinite."""
    monkeypatch.setattr(module, "philox", lambda key, index: torch.full((4, len(index)), word, device=key.device))
    for high in range(1, T):
        ends = [torch.tensor([n], device=DEVICE) for n in (0, high)]
        arguments = inputs((1, 4, 1, 1), slot=0)
        arguments[3:5] = ends
        x_u, u, _ = renoise_ref(*arguments, 1.0, torch.float32)
        assert 0 <= int(u) < high and x_u.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype):
    arguments = inputs((2, 5, 3, 5), grad=True)

    def reference(*xs: Tensor) -> tuple[Tensor, ...]:
        return renoise_ref(*xs, 1.0, torch.float64)

    check(lambda *xs: renoise(*xs, 1.0, dtype), reference, arguments, dtype)


def test_only_what_is_needed():
    arguments, kept = inputs((2, 4, 3, 5)), []
    arguments[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        x_u, u, keep = renoise(*arguments, 1.0, torch.bfloat16)
    assert sum(kept) == 4 and not u.requires_grad and not keep.requires_grad
    x_u.sum().backward()  # an expanded gradient
    assert torch.equal(arguments[0].grad, keep.expand_as(arguments[0]))
    assert arguments[1].grad is None and arguments[2].grad is None


def test_slices_and_the_same_bits_twice():
    arguments = inputs((2, 4, 6, 5))
    first = renoise(*arguments, 1.0, torch.bfloat16)
    again = renoise(*arguments, 1.0, torch.bfloat16)
    stacked = torch.stack(arguments[:3], dim=2)
    sliced = renoise(*stacked.unbind(2), *arguments[3:], 1.0, torch.bfloat16)
    for other in (again, sliced):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_opcheck():
    for grad in (False, True):
        torch.library.opcheck(module._op, (*inputs((2, 3, 2, 3), grad=grad), 1.0, torch.bfloat16))


def test_compile_and_checkpoint_give_the_same_bits():
    arguments = inputs((1, 4, 3, 5), grad=True)

    def run(f) -> list[Tensor]:
        x_u, u, keep = f(*arguments, 1.0, torch.bfloat16)
        return [x_u, u, keep, *torch.autograd.grad(x_u.float().square().sum(), arguments[:3])]

    expected = run(renoise)
    compiled = torch.compile(renoise, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda *xs: checkpoint(renoise, *xs, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(run(f), expected, strict=True))


def test_one_launch(monkeypatch):
    arguments = inputs((1, 4, 8, 8))
    names = launched(monkeypatch, module, lambda: module._op._init_fn(*arguments, 1.0, torch.bfloat16))
    assert names == ["_renoise_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("f", [renoise, renoise_ref])
def test_capture_equals_eager_and_every_replay_draws_anew(f):
    arguments = inputs((1, 4, 64, 64))
    check_replay(lambda: f(*arguments, 1.0, torch.bfloat16))
    graph, key, start = torch.cuda.CUDAGraph(), arguments[7], arguments[7].clone()
    with torch.cuda.graph(graph):
        x_u, u, _ = f(*arguments, 1.0, torch.bfloat16)
        key[1:].add_(1)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append((x_u.clone(), u.clone()))
    key.copy_(start)
    for x_u, u in seen:
        expected = f(*arguments, 1.0, torch.bfloat16)
        assert torch.equal(x_u, expected[0]) and torch.equal(u, expected[1])
        key[1:].add_(1)
    assert not torch.equal(seen[0][0], seen[1][0])
