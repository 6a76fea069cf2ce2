"""GroupNorm + SiLU with shift and residual: one launch and two, every gradient, strides, what is kept, graphs."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from launches import launched
from ops import DEVICE, ROUNDOFF, check, error, tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapm.kernels import group_norm_silu_tiles as tiles
from rapm.kernels import runtime
from rapm.kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_again,
    group_norm_silu_ref,
    group_norm_silu_with_stats,
)
from rapm.kernels.runtime import jit, tl

module = importlib.import_module("rapm.kernels.group_norm_silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]  # shift, residual
# Channels and size of every map that is normalised at 512x512 and at 1024x1024 pixels.
SD15 = [(320, 64), (640, 64), (960, 64), (320, 32), (640, 32), (960, 32), (1280, 32), (1920, 32), (640, 16),
        (1280, 16), (1920, 16), (2560, 16), (1280, 8), (2560, 8)]  # fmt: skip
SDXL = [(320, 128), (640, 128), (960, 128), (320, 64), (640, 64), (960, 64), (1280, 64), (1920, 64), (640, 32),
        (1280, 32), (1920, 32), (2560, 32)]  # fmt: skip


def make(b: int, c: int, h: int, w: int, dtype: torch.dtype, shift: bool, residual: bool, frozen: bool = False) -> list:
    """x, weight, bias, shift and residual, which all require a gradient but for frozen weight and bias."""
    weight, bias = (tensor(c, dtype=dtype, mean=mean, grad=not frozen) for mean in (1.0, 0.2))
    x, other = (tensor(b, c, h, w, dtype=dtype, mean=mean, grad=True) for mean in (3.0, 0.5))
    return [x, weight, bias, tensor(b, c, dtype=dtype, grad=True) if shift else None, other if residual else None]


def norm(groups: int, silu: bool = True, eps: float = 1e-5, function: Callable = group_norm_silu) -> Callable:
    return lambda x, weight, bias, shift, residual: function(
        x, weight, bias, groups, eps, silu=silu, shift=shift, residual=residual
    )


def compare(
    inputs: list, dtype: torch.dtype, groups: int, silu: bool = True, eps: float = 1e-5, cancel: float = 1.0
) -> None:
    """Outputs and gradients are rounded once: two roundoffs, since Triton's interpreter cuts bf16 off.

    With a residual the norm is of v as rounded: rounding errors of v's mean would count in units of v's deviation.
    """
    kernel, plain = norm(groups, silu, eps), norm(groups, silu, eps, group_norm_silu_ref)
    with torch.no_grad():
        v = kernel(*inputs)[1] if inputs[4] is not None else None

    def reference(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, residual: Tensor | None):
        if residual is not None:
            exact = x + residual if shift is None else x + residual + shift[:, :, None, None]
            assert error(v, exact.detach()) <= 2 * ROUNDOFF[dtype]
            residual = residual + (v - exact).detach()
        return plain(x, weight, bias, shift, residual)

    check(kernel, reference, inputs, dtype, roundings=2, cancel={1: cancel})


def gradients(function: Callable, inputs: list, cotangents: list[Tensor | None]) -> list[Tensor]:
    """Of all inputs that require one; a cotangent of None leaves its output without use."""
    outputs = function(*inputs)
    outputs = [outputs] if torch.is_tensor(outputs) else outputs
    pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return list(torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs]))


@pytest.fixture(params=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Both ways on any map, with tiles so small that a small map has several runs, and a run several tiles."""
    one = request.param == "one launch"
    monkeypatch.setattr(module, "WHOLE", one << 20)
    small_tiles(monkeypatch)
    return 1 if one else 2


def small_tiles(monkeypatch: pytest.MonkeyPatch, programs: int = 4, least: int = 1) -> None:
    """Runs of two launches that differ: at most 32 and 64 channels, 512 and 1024 bytes."""
    monkeypatch.setattr(module, "processors", lambda device: 4)
    for name, channels, size in (
        ("STATISTICS", 32, 512), ("NORMALISE", 64, 1024), ("SUMS", 32, 1024), ("GRADIENT", 64, 512)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, module.Walk(channels, size, programs, 64, least))


@pytest.mark.parametrize(
    ("shift", "residual", "dtype"),
    [*((*variant, dtype) for variant in VARIANTS[1:3] for dtype in DTYPES), *((*v, DTYPES[0]) for v in VARIANTS[::3])],
)
def test_values(launches: int, shift: bool, residual: bool, dtype: torch.dtype) -> None:
    compare(make(2, 40, 9, 7, dtype, shift, residual), dtype, 4)


@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 320, 3, 5), 4), ((1, 48, 8, 8), 16), ((3, 130, 2, 9), 13), ((2, 12, 1, 5), 1)]
)  # widths 80 (three groups a block), 3, 10 (two blocks, the last one part full) and all channels
def test_shapes(launches: int, shape: tuple[int, ...], groups: int) -> None:
    compare(make(*shape, torch.float32, True, False), torch.float32, groups, silu=False, eps=1e-6)


def test_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of several tiles, the last one short; of one; and of four tiles at least."""
    monkeypatch.setattr(module, "WHOLE", 0)
    inputs = make(1, 160, 11, 7, torch.float32, True, False)
    cases = (8, 1, 4, 5, 16), (100, 1, 4, 20, 4), (16, 12, 2, 6, 14), (0, 1, 4, 1, 80)
    for programs, least, rows, runs, span in cases:
        small_tiles(monkeypatch, programs, least)
        (blocks, actual, _), length, options = module._cut(inputs[0], 16, module.STATISTICS)
        assert (blocks, actual, length, options["ROWS"]) == (6, runs, span, rows)
        compare(inputs, torch.float32, 16)


@pytest.mark.parametrize(("channels", "size"), [*SD15, *SDXL, (320, 192), (320, 256)])
@pytest.mark.parametrize("walk", ["STATISTICS", "NORMALISE", "SUMS", "GRADIENT"])
def test_cuts(channels: int, size: int, walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the H200's 132 processors: registers and the runs' sums are bounded, and every channel is covered."""
    monkeypatch.setattr(module, "processors", lambda device: 132)
    x, cut = torch.empty(1, channels, size, size, device="meta", dtype=torch.bfloat16), getattr(module, walk)
    (blocks, runs, _), span, options = module._cut(x, 32, cut)
    own = options["OWN"] * options["WIDTH"]
    assert blocks * own >= channels > (blocks - 1) * own and own <= options["TILE"]
    assert span * runs >= size * size > span * (runs - 1) and span % options["ROWS"] == 0 and runs <= cut.runs
    assert 8 <= options["ROWS"] * options["TILE"] / (32 * module.WARPS) <= 32  # numbers of a thread
    assert options["ROWS"] % options["LANES"] == 0
    assert blocks * options["TILE"] <= (1.25 if cut.channels == 256 else 1.61) * channels  # with padding
    assert blocks * runs <= 1.25 * cut.programs * 132
    assert blocks * runs >= 0.5 * cut.programs * 132 or span < 2 * cut.least or options["ROWS"] == span


def test_launches(launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two launches forward, as many backward, with or without a gradient for the shift."""
    count = []

    class Counted:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple):
            count.append(grid)
            return self.kernel[grid]

    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    inputs = make(1, 40, 5, 9, torch.float32, True, False, frozen=True)
    y = norm(4)(*inputs)
    assert len(count) == launches
    y.backward(torch.ones_like(y))
    assert len(count) == 2 * launches


@jit
def _exact_tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter, which has no short tanh")
@pytest.mark.parametrize(("shift", "residual"), VARIANTS)
def test_the_way_by_tanh(launches: int, shift: bool, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tanh that has all its bits, it is as right as the other."""
    monkeypatch.setattr(module, "_short", lambda x: True)
    monkeypatch.setattr(tiles, "tanh", _exact_tanh)
    compare(make(2, 40, 9, 7, torch.float32, shift, residual), torch.float32, 4)
    check_again(*make(2, 40, 9, 7, torch.float32, shift, residual, frozen=True))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8, 64])
def test_a_short_tanh_is_right_far_from_zero(size: int) -> None:
    """Within |u| 2^-12 and one rounding, on both sides."""
    x, weight, bias, *_ = make(1, 320, size, size, torch.bfloat16, False, False, frozen=True)
    arguments = [x, weight * 8, bias, None, None]
    doubles = [a if a is None else a.detach().double().requires_grad_(a.requires_grad) for a in arguments]
    y, exact = norm(32)(*arguments), norm(32, function=group_norm_silu_ref)(*doubles)
    u = norm(32, silu=False, function=group_norm_silu_ref)(*doubles).detach()
    assert u.min() < -10 and u.max() > 10
    assert ((y - exact).abs() <= u.abs() * 2**-12 + exact.abs() * 2**-8 + 1e-6).all()


def test_a_first_number_far_off(launches: int) -> None:
    """The statistics are taken from it; of 300 deviations it costs less than 1e-4."""
    x, weight, bias, *_ = make(1, 40, 9, 7, torch.float32, False, False, frozen=True)
    x = x.detach().clone()
    x[:, :, 0, 0] += 300
    arguments = [x, weight, bias, None, None]
    exact = norm(4, silu=False, function=group_norm_silu_ref)(*[a if a is None else a.double() for a in arguments])
    assert error(norm(4, silu=False)(*arguments), exact) <= 1e-4


def test_offset_mean(launches: int) -> None:
    """A mean of 100 deviations may cost a few roundoffs of that mean, not of its square."""
    x, weight, bias, *_ = make(1, 40, 9, 7, torch.float32, False, False, frozen=True)
    x = (x + 97).detach().requires_grad_()
    arguments = [x, weight, bias, None, None]
    doubles = [a if a is None else a.detach().double().requires_grad_(a.requires_grad) for a in arguments]
    y, exact = norm(4, silu=False)(*arguments), norm(4, silu=False, function=group_norm_silu_ref)(*doubles)
    limit = 8 * 100 * ROUNDOFF[torch.float32]
    assert error(y.detach(), exact.detach()) <= limit
    g = torch.randn_like(y)
    assert (
        error(*(torch.autograd.grad(a, b, c)[0] for a, b, c in ((y, x, g), (exact, doubles[0], g.double())))) <= limit
    )


def test_strides(launches: int) -> None:
    """Slices of channels, rows and batch as they are; NCHW and columns by a copy; outputs are channels-last."""
    big = tensor(3, 60, 10, 9)
    views = {
        "channels": big[:, 8:48], "rows": big[:, :40, 2:7], "batch": big[1:, :40], "one row": big[:, :40, 4:5],
        "one column": big[:, :40, :, 3:4], "columns": big[:, :40, :, 2:8], "NCHW": big[:, :40].contiguous(),
    }  # fmt: skip
    weight, bias, shift = tensor(40), tensor(40), tensor(1, 40).expand(3, 40)
    for name, x in views.items():
        y, v = group_norm_silu(x, weight, bias, 4, 1e-5, shift=shift[: len(x)], residual=x)
        expected, _ = group_norm_silu_ref(x, weight, bias, 4, 1e-5, shift=shift[: len(x)], residual=x)
        assert error(y, expected) <= 1e-5, name
        assert all(out.is_contiguous(memory_format=torch.channels_last) for out in (y, v)), name


@pytest.mark.parametrize("kind", ["scalar", "per channel", "NCHW", "slice"])
def test_strides_of_gradients(launches: int, kind: str) -> None:
    inputs = make(2, 40, 5, 4, torch.float32, False, True)
    doubles = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    shape = inputs[0].shape
    g = {
        "scalar": lambda: tensor(1, 1, 1, 1).expand(shape), "per channel": lambda: tensor(2, 40, 1, 1).expand(shape),
        "NCHW": lambda: tensor(*shape).contiguous(), "slice": lambda: tensor(2, 50, 5, 4)[:, 4:44],
    }[kind]()  # fmt: skip
    mine = gradients(norm(4), inputs, [g, 2 * g if kind == "NCHW" else g])
    theirs = gradients(
        norm(4, function=group_norm_silu_ref), doubles, [g.double(), (2 if kind == "NCHW" else 1) * g.double()]
    )
    assert all(error(a, b) <= 1e-5 for a, b in zip(mine, theirs, strict=True))


def check_again(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, residual: Tensor | None, groups: int = 4,
    silu: bool = True, eps: float = 1e-5,
) -> None:  # fmt: skip
    """Of v and the statistics comes y to the bit, whichever variant of the kernel has added them up."""
    how = weight, bias, groups, eps
    y, v, stats = group_norm_silu_with_stats(x, *how, silu=silu, shift=shift, residual=residual)
    assert (v is x) == (residual is None) and y.isfinite().all() and stats.shape == (len(x), 2, groups)
    again = group_norm_silu_again(v, *how, stats, silu=silu, shift=shift if residual is None else None)
    assert torch.equal(again, y) and again.stride() == y.stride()


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_again_is_the_same_bits(launches: int, dtype: torch.dtype, silu: bool) -> None:
    for variant in VARIANTS:
        check_again(*make(2, 40, 9, 7, dtype, *variant, frozen=True), silu=silu)


@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 320, 3, 5), 4), ((1, 48, 8, 8), 16), ((3, 130, 2, 9), 13), ((2, 12, 1, 5), 1)]
)
def test_again_of_any_shape(launches: int, shape: tuple[int, ...], groups: int) -> None:
    for variant in VARIANTS:
        check_again(*make(*shape, torch.float32, *variant, frozen=True), groups, eps=1e-6)


def test_again_of_slices() -> None:
    big = tensor(3, 60, 10, 9)
    weight, bias, shift = tensor(40), tensor(40), tensor(3, 80)[:, 7:47]
    for x in (big[:, 8:48], big[:, :40, 2:7], big[:, :40, 4:5], big[:, :40, :, 3:4], big[:, :40].contiguous()):
        check_again(x, weight, bias, shift, None)
        check_again(x, weight, bias, None, x.flip(0))


def test_again_is_one_launch_and_adds_nothing_up(launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics are those that it is given: with a mean of 3 and a deviation of 1/2."""
    x, weight, bias, shift, _ = (t if t is None else t.detach() for t in make(2, 40, 5, 9, DTYPES[0], True, False))
    stats = torch.tensor([3.0, 2.0], device=DEVICE).view(1, 2, 1).expand(2, 2, 4).contiguous()
    y = group_norm_silu_again(x, weight, bias, 4, 1e-5, stats, silu=False, shift=shift)
    expected = (x + shift[:, :, None, None] - 3) * 2 * weight[:, None, None] + bias[:, None, None]
    assert error(y, expected) <= 1e-6
    names = launched(monkeypatch, module, lambda: module._again_op._init_fn(x, weight, bias, stats, True, None))
    assert len(names) == 1 and "_normalise_kernel" in names[0]


def test_one_output_used() -> None:
    inputs = make(2, 40, 5, 4, torch.float32, True, True)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    g = tensor(2, 40, 5, 4)
    mine = gradients(norm(4), inputs, [g, None])
    theirs = gradients(norm(4, function=group_norm_silu_ref), doubles, [g.double(), None])
    assert all(error(a, b) <= 1e-5 for a, b in zip(mine, theirs, strict=True))
    x, _, _, shift, residual = inputs
    _, v = norm(4)(*inputs)
    dx, dshift, dresidual = torch.autograd.grad(v, [x, shift, residual], g)
    assert torch.equal(dx, g) and torch.equal(dresidual, g) and error(dshift, g.sum((2, 3))) <= 1e-5


def test_only_what_needs_a_gradient(launches: int) -> None:
    """Each input alone: the gradient is the one that it has among all, and nothing is computed for the others."""
    inputs = make(2, 40, 5, 4, torch.float32, True, False)
    g = tensor(2, 40, 5, 4)
    every = gradients(norm(4), inputs, [g])
    for i in range(4):
        alone = [x if x is None else x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        assert torch.equal(gradients(norm(4), alone, [g])[0], every[i])
    stats = torch.ones(2, 2, 4, device=DEVICE)
    x, weight, bias, shift, _ = (x if x is None else x.detach() for x in inputs)
    sizes = [t.numel() for t in module._backward_op(g, None, x, shift, weight, bias, stats, True, False, False, False)]
    assert sizes == [0, 0, 0]


@pytest.mark.parametrize(("shift", "residual"), VARIANTS)
def test_kept_for_backward(shift: bool, residual: bool) -> None:
    """Statistics and one map; the map is v with a residual, and no copy of it."""
    inputs = make(1, 40, 5, 4, torch.bfloat16, shift, residual, frozen=True)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = norm(4)(*inputs)
    frozen = sum(kept.pop(x.untyped_storage().data_ptr()) for x in inputs[1:3])
    assert frozen == 2 * 40 * 2
    assert (outputs[1] if residual else inputs[0]).untyped_storage().data_ptr() in kept
    assert sum(kept.values()) == 40 * 5 * 4 * 2 + 2 * 4 * 4 + (40 * 2 if shift and not residual else 0)
    loss = outputs[0].sum() if residual else outputs.sum()
    loss.backward()
    assert all(x.grad is None for x in inputs[1:3])


@pytest.mark.parametrize(("shift", "residual"), VARIANTS[1:3])
def test_registration(shift: bool, residual: bool) -> None:
    """Schema, fake tensors and autograd of both operators."""
    x, weight, bias, s, r = make(2, 12, 3, 2, torch.float32, shift, residual)
    torch.library.opcheck(module._op, (x, weight, bias, 4, 1e-5, True, s, r))
    y, v, stats = (t.detach() for t in module._op(x, weight, bias, 4, 1e-5, True, s, r))
    frozen = [t if t is None else t.detach() for t in (x, s, weight, bias)]
    if residual:
        frozen[:2] = v, None
    arguments = y, v if residual else None, *frozen, stats, True, True, shift, not shift
    torch.library.opcheck(module._backward_op, arguments)
    torch.library.opcheck(module._again_op, (frozen[0], *frozen[2:], stats, True, frozen[1]))


@pytest.mark.parametrize(("shift", "residual"), VARIANTS[1:3])
def test_compile_and_checkpoint(shift: bool, residual: bool) -> None:
    """Traced in one graph, and recomputed in backward: the same bits."""
    inputs = make(2, 12, 4, 3, torch.float32, shift, residual)
    cotangents = [tensor(2, 12, 4, 3) for _ in range(1 + residual)]
    expected = gradients(norm(4), inputs, cotangents)
    torch._dynamo.reset()
    for function in (
        torch.compile(norm(4), fullgraph=True, backend="aot_eager"),
        lambda *xs: checkpoint(norm(4), *xs, use_reentrant=False),
    ):
        assert all(torch.equal(a, b) for a, b in zip(gradients(function, inputs, cotangents), expected, strict=True))


def test_reference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MODE", "reference")
    monkeypatch.setattr(module, "_op", None)
    inputs = make(1, 40, 3, 2, torch.bfloat16, True, True)
    assert all(map(torch.equal, norm(4)(*inputs), norm(4, function=group_norm_silu_ref)(*inputs)))
    x, weight, bias, shift, residual = inputs
    for added in (dict(shift=shift), dict(residual=residual)):
        y, v, stats = group_norm_silu_with_stats(x, weight, bias, 4, 1e-5, **added)
        assert stats is None
        again = group_norm_silu_again(v, weight, bias, 4, 1e-5, stats, shift=added.get("shift"))
        assert torch.equal(again, y)


# As in the UNet: after the time embedding, after a residual, before a transformer. batch, shift, residual, silu, eps
USES = (1, True, False, True, 1e-5), (2, False, True, True, 1e-5), (3, False, False, False, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "size", "dtype", "use"),
    [*((*shape, torch.bfloat16, USES[i % 3]) for i, shape in enumerate(SD15 + SDXL)),
     *((*shape, dtype, use) for shape in (SDXL[2], SD15[0], SD15[12]) for dtype in DTYPES for use in USES)],
)  # fmt: skip
def test_real_shapes(channels: int, size: int, dtype: torch.dtype, use: tuple) -> None:
    batch, shift, residual, silu, eps = use
    inputs = make(batch, channels, size, size, dtype, shift, residual, frozen=batch < 3)
    # A weight's gradient is a sum of size^2 numbers that nearly cancel, to their root; the mean's rounding, which is as
    # large as v's offset makes it, is the same in each of them: it counts in proportion to size.
    compare(inputs, dtype, 32, silu, eps, cancel=max(1.0, size / 16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("channels", "size"), dict.fromkeys(SD15 + SDXL))
def test_again_is_the_same_bits_of_real_shapes(channels: int, size: int, dtype: torch.dtype) -> None:
    for shift, residual in VARIANTS:
        inputs = make(1, channels, size, size, dtype, shift, residual, frozen=True)
        check_again(*inputs, groups=32, silu=not residual)


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "size"), [(960, 128), (1280, 8)])
def test_same_bits_and_graph(channels: int, size: int) -> None:
    """Twice eager and replayed from a CUDA graph, on other data than at capture, are equal bit for bit."""
    for shift, residual in VARIANTS:
        inputs = make(2, channels, size, size, torch.bfloat16, shift, residual)
        cotangents = [tensor(2, channels, size, size, dtype=torch.bfloat16) for _ in range(1 + residual)]

        def work(inputs: list = inputs, cotangents: list = cotangents) -> list[Tensor]:
            outputs = norm(32)(*inputs)
            outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
            wanted = [x for x in inputs if x is not None]
            return [*outputs, *torch.autograd.grad(outputs, wanted, cotangents)]

        check_again(*inputs, groups=32)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        with torch.no_grad():
            for x in (*inputs, *cotangents):
                if x is not None:
                    x.normal_(0.5)
        first, second = ([x.detach().clone() for x in work()] for _ in range(2))
        for _ in range(3):
            graph.replay()
        assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, captured))
