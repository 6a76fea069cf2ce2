"""disc_head: losses, logits and every gradient against float64, on both sides of both hinges, and how it is launched.

In half precision rounding changes the sign of some y, and with it LeakyReLU's slope: an error of per cents in the
gradients. So the float64 model here rounds what the kernels keep (weights, h1, a1, h2) as they do, and is itself
checked against `disc_head_ref`. The hinges' slopes are safe by construction: no logit is near a margin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import launches
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops import DEVICE, ROUNDOFF, SUMS, error
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rapm.kernels import disc_head as module
from rapm.kernels import disc_head_plan, runtime
from rapm.kernels.disc_head import _disc_head, disc_head, disc_head_ref, layout, logits_ref, views

# Of a gradient: dh2, da1, dh1 and the result, or an operand of the product
ROUNDINGS = 4
TINY = [(16, 3, 3)]
# taps C H W, slots, sides: groups of 1, 3, 4 and 5 channels, several tiles, strips and blocks of channels, and odd ends
CASES = {
    "embedded": ([(48, 5, 7), (96, 9, 10)], 1, (0, 1)),
    "replay": ([(48, 5, 7), (128, 4, 4), (48, 3, 1)], 3, (1,)),
    "tiles": ([(16, 17, 17), (160, 3, 3)], 1, (0,)),
}
REAL = {
    "sd15": [(320, 32, 32), (640, 16, 16), (1280, 8, 8), (1280, 8, 8), (1280, 8, 8)],
    "sdxl": [(320, 64, 64), (640, 32, 32), (1280, 32, 32), (1280, 32, 32)],
}
FACTORS = (0.1, 0.3)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bf16 numbers in tl.dot, and cuts them off where a GPU rounds."""
    if DEVICE == "cpu":
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

        def single(x: TensorHandle) -> TensorHandle:  # fp16 too: numpy's own product of it is slow
            bf16 = x.dtype.scalar == tl.bfloat16
            data = (x.data.astype(np.uint32) << 16).view(np.float32) if bf16 else x.data.astype(np.float32)
            return TensorHandle(data, tl.float32)

        def rounded(self, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
            if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
                return cast(self, x, dtype)
            bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(bits.view(np.uint16).reshape(x.data.shape), dtype.scalar)

        monkeypatch.setattr(
            InterpreterBuilder, "create_dot", lambda self, a, b, *c: dot(self, single(a), single(b), *c)
        )
        for name in ("create_fp_trunc", "cast_impl"):
            monkeypatch.setattr(InterpreterBuilder, name, rounded)
    yield


def data(taps: list, J: int, dtype: torch.dtype, spread: float = 1.5) -> tuple[list[Tensor], Tensor]:
    """Features with an offset mean, and weights under which the logits spread so far."""
    channels = [c for c, *_ in taps]
    weights = torch.zeros(2, layout(channels)[1], device=DEVICE)
    for name, at, shape in layout(channels)[0]:
        size = math.prod(shape)
        values = torch.randn(2, size, device=DEVICE)
        if len(shape) == 4:
            values *= (spread if "out" in name else 1.0) / shape[1] ** 0.5
        else:
            values = 0.2 * values + (1.0 if name.endswith(("norm1.weight", "norm2.weight")) else 0.0)
        weights[:, at : at + size] = values
    features = [(0.5 + torch.randn(3, J, h, w, c, device=DEVICE)).to(dtype).movedim(-1, 2) for c, h, w in taps]
    return features, weights


def kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the kernels keep it, in float64; its gradient passes unchanged."""
    return x if dtype == torch.float64 else x + (x.to(dtype).double() - x).detach()


def model(
    features: list[Tensor], weights: Tensor, factors: tuple[float, ...], sides: tuple[int, ...], dtype: torch.dtype,
    chains: bool = False,
) -> tuple:  # fmt: skip
    """The formula in float64, keeping in `dtype` what the kernels keep; as `disc_head(..., logits=True)`.

    `chains`: also of the gradients, which are dh2, da1 and dh1.
    """

    def chained(x: Tensor, n: int) -> Tensor:
        """x, whose gradient is kept as the kernels do: without the n that the means divide by."""
        x = x.view_as(x)
        if chains and x.requires_grad:
            x.register_hook(lambda g: (n * g).to(dtype).double() / n)
        return x

    def head(x: Tensor, p: dict[str, Tensor], tap: int) -> Tensor:
        a, groups, n = x, math.gcd(32, x.shape[1]), len(features) * len(x) * x[0, 0].numel()
        for k in (1, 2):
            h = F.conv2d(a if k == 1 else chained(a, n), kept(p[f"{tap}.conv{k}.weight"], dtype))
            h = chained(h, n) + p[f"{tap}.conv{k}.bias"][:, None, None]  # its gradient is summed before rounding
            grouped, seen = h.unflatten(1, (groups, -1)), kept(h, dtype).unflatten(1, (groups, -1))
            mean = grouped.mean((2, 3, 4), keepdim=True)
            true, variance = ((v - mean.detach()).square().mean((2, 3, 4), keepdim=True) for v in (grouped, seen))
            variance = variance + (true - variance).detach()  # its gradient is taken from what is kept
            hat = ((seen - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
            gamma, beta = (p[f"{tap}.norm{k}.{name}"][:, None, None] for name in ("weight", "bias"))
            y = hat * gamma + beta
            y = torch.where(y > 0, y, 0.2 * y)
            a = kept(y, dtype) if k == 1 else a + y
        return F.conv2d(a, p[f"{tap}.out.weight"], p[f"{tap}.out.bias"])[:, 0]

    rows = weights.double().requires_grad_()
    leaves = [x[0, :1].double().requires_grad_() for x in features]
    channels = [x.shape[2] for x in features]
    generator, discriminator, logits = [], [], []
    for side in sides:
        trained, frozen = views(rows[side], channels), views(rows[side].detach(), channels)
        fakes = [head(x, frozen, t) for t, x in enumerate(leaves)]
        shown = [[head(x[kind].double(), trained, t) for kind in (0, 1 + side)] for t, x in enumerate(features)]
        generator.append(sum((1 - x).clamp(min=0).mean() for x in fakes) / len(fakes))
        terms = [(1 + f).clamp(min=0).mean() + (1 - r).clamp(min=0).mean() for f, r in shown]
        discriminator.append(sum(terms) / len(terms))
        logits.append([torch.stack(x).detach() for x in shown])
    total = sum(w * g for w, g in zip(factors, generator, strict=True))
    (gradient,) = torch.autograd.grad(sum(discriminator), rows)
    fakes = list(torch.autograd.grad(total, leaves))
    losses = torch.stack(generator).detach(), torch.stack(discriminator).detach()
    return *losses, fakes, gradient, [torch.stack(x) for x in zip(*logits, strict=True)]


def robust(case: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, tuple]:
    """Inputs whose logits keep away from both margins and lie on both sides of each, and what is expected of them."""
    taps, J, sides = CASES[case]
    for seed in itertools.count():
        torch.manual_seed(seed)
        features, weights = data(taps, J, dtype)
        expected = model(features, weights, FACTORS[: len(sides)], sides, dtype)
        fake, real = (torch.cat([x[:, kind].flatten() for x in expected[4]]) for kind in (0, 1))
        nearest = min((x.abs() - 1).abs().min() for x in (fake, real))
        inactive = [float((x > 1).double().mean()) for x in (real, fake, -fake)]
        if nearest > 2e-3 and all(0.05 < share < 0.95 for share in inactive):
            return features, weights, expected


def rounded_results(dtype: torch.dtype) -> float:
    return ROUNDINGS * ROUNDOFF[dtype] + SUMS * ROUNDOFF[torch.float32]


def other_slopes(c: int, h: int, w: int) -> float:
    """Error of a large map's gradients where fp32 sums end on another side of LeakyReLU's kink than those of float64.

    A share of 0.8 times y's error does, and by chance two of a map: their slope is off by 0.8, the slopes' rms is 0.72.
    """
    return 1.1 * (0.8 * SUMS * ROUNDOFF[torch.float32] + 2 / (c * h * w)) ** 0.5


def compare(actual: tuple, expected: tuple, limits: list[float], dtype: torch.dtype, taps: list, sides: tuple) -> None:
    """`limits`: of the gradients' errors, by tap."""
    # forward the model keeps what the kernels keep; where fp32 sums turn a rounding, it differs a little
    forward = (0 if dtype == torch.float32 else ROUNDOFF[dtype]) + SUMS * ROUNDOFF[torch.float32]
    for i in (0, 1):
        assert actual[i].dtype == torch.float32
        assert error(actual[i], expected[i]) <= forward, f"losses {error(actual[i], expected[i]):.2e}"
    if len(actual) == 5:
        for t, (a, e) in enumerate(zip(actual[4], expected[4], strict=True)):
            assert a.shape == e.shape
            assert error(a, e) <= forward, f"logits of tap {t}: {error(a, e):.2e} > {forward:.2e}"
    for t, (a, e) in enumerate(zip(actual[2], expected[2], strict=True)):
        assert a.dtype == dtype and a.shape == e.shape and a.is_contiguous(memory_format=torch.channels_last)
        assert error(a, e) <= limits[t], f"gradient of tap {t}: {error(a, e):.2e} > {limits[t]:.2e}"
    channels = [c for c, *_ in taps]
    for side in range(2):
        if side not in sides:
            assert not actual[3][side].any()
            continue
        mine, theirs = views(actual[3][side], channels), views(expected[3][side], channels)
        for name, e in theirs.items():
            tap, layer, _ = name.split(".")
            scale = float(e.norm())
            if "conv" in layer:  # a bias before a norm has little gradient, with one channel a group none
                scale = max(scale, float(theirs[name.replace("conv", "norm")].norm()))
            elif name.endswith("out.bias"):  # fake and real may cancel
                scale = max(scale, 1 / len(taps))
            off, limit = float((mine[name].double() - e).norm()) / scale, limits[int(tap)]
            assert off <= limit, f"gradient of {side}.{name}: {off:.2e} > {limit:.2e}"
        rest = actual[3][side].clone()
        for name in mine:
            views(rest, channels)[name].zero_()
        assert not rest.any()  # the padding


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case: str):
    taps, J, sides = CASES[case]
    features, weights = data(taps, J, torch.float32)
    features, weights = [x.double() for x in features], weights.double()
    expected = model(features, weights, FACTORS[: len(sides)], sides, torch.float64)
    actual = disc_head_ref(features, weights, FACTORS[: len(sides)], sides=sides, scale=4.0, logits=True)
    for a, e in zip(actual[:2] + (actual[3],), expected[:2] + (expected[3],), strict=True):
        assert error(a, e) < 1e-12
    assert all(error(a, 4 * e) < 1e-12 for a, e in zip(actual[2], expected[2], strict=True))
    assert all(error(a, e) < 1e-12 for a, e in zip(actual[4], expected[4], strict=True))


@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in CASES] + [("embedded", torch.bfloat16), ("embedded", torch.float16)],
)
def test_losses_logits_and_every_gradient(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", 2)  # partial results in several turns
    taps, _, sides = CASES[case]
    features, weights, expected = robust(case, dtype)
    actual = disc_head(features, weights, FACTORS[: len(sides)], sides=sides, logits=case != "replay")
    compare(actual, expected, [rounded_results(dtype)] * len(taps), dtype, taps, sides)


def one_sided(taps: list, J: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs for which all hinges of side 0 are active, and of side 1 the fake's only."""
    features, weights = data(taps, J, dtype, spread=0.1)
    for t in range(len(taps)):
        for side, bias in enumerate((0.0, 3.0)):
            views(weights[side], [c for c, *_ in taps])[f"{t}.out.bias"].fill_(bias)
    return features, weights


def test_what_the_rounding_of_chains_does_to_a_sum_that_cancels():
    """See `test_real_shapes`: the error of norm1.bias's gradient is that of the chains' roundings."""
    taps = [(64, 16, 16)]
    features, weights = one_sided(taps, 1, torch.bfloat16)
    actual = disc_head(features, weights, (0.1,), sides=(0,))[3][0]
    for chains, low, high in ((True, 0.0, 0.5), (False, 0.5, ROUNDINGS)):
        expected = model(features, weights, (0.1,), (0,), torch.bfloat16, chains)[3][0]
        off = error(*(views(row, [64])["0.norm1.bias"] for row in (actual, expected))) / ROUNDOFF[torch.bfloat16]
        assert low <= off <= high, f"{off:.3f} roundoffs"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, J", [("sd15", 1), ("sdxl", 1), ("sd15", 3)])
def test_real_shapes(name: str, J: int, dtype: torch.dtype):
    taps, sides = REAL[name], (0, 1)
    features, weights = one_sided(taps, J, dtype)
    expected, rounded = (model(features, weights, FACTORS, sides, dtype, chains) for chains in (False, True))
    assert all(x[0].abs().max() < 0.99 and x[1].min() > 1.01 for x in expected[4])
    # Side 0's fake and real pull norm1.bias in opposite directions: its gradient is a hundredth of what it sums. In a
    # group whose mean of gamma dy2 hat(h2) is near 0, dh2 takes two values a channel, one for each slope: they round
    # alike, and the errors do not cancel as the numbers do. So this gradient alone is compared with a model that rounds
    # the chains as well. (Eager bf16 rounds at these places too, and more.)
    for t in range(len(taps)):
        mine, theirs = (views(x[3][0], [c for c, *_ in taps])[f"{t}.norm1.bias"] for x in (expected, rounded))
        mine.copy_(theirs)
    actual = disc_head(features, weights, FACTORS, logits=True)
    compare(actual, expected, [rounded_results(dtype) + other_slopes(*tap) for tap in taps], dtype, taps, sides)


def flat(result: tuple) -> list[Tensor]:
    return [x for part in result for x in (part if isinstance(part, list) else [part])]


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_any_strides_and_the_scale():
    (x,), weights = data(TINY, 2, torch.float32)
    only = {"sides": (1,)}
    expected = disc_head([x], weights, (1.0,), **only)
    wide = torch.full((4, 2, 3, 3, 48), torch.nan, device=DEVICE)
    part = wide.movedim(-1, 2)[1:, :, 16:32]  # a slice of kinds and of channels
    part.copy_(x)
    assert module._maps(part) is part
    for other in (part, x.contiguous()):  # the second is channels-first
        assert same(disc_head([other], weights, (1.0,), scale=2.0**10, **only), scaled(expected, 2.0**10))


def scaled(result: tuple, scale: float) -> tuple:
    return *result[:2], [scale * x for x in result[2]], result[3]


def test_more_discriminators_than_two():
    """A real feature and a row of weights for each. Their weights' gradients are each for itself, as with two."""
    torch.manual_seed(0)
    weights, feature = 0.3 * torch.randn(3, layout([32])[1], device=DEVICE), torch.randn(4, 1, 8, 8, 32, device=DEVICE)
    given = [feature.movedim(-1, 2)], weights, [1.0] * 3
    actual, expected = (head(*given, sides=(0, 1, 2)) for head in (disc_head, disc_head_ref))
    for a, e in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
        assert error(a, e) < SUMS * ROUNDOFF[torch.float32]


def test_fp16_keeps_small_gradients():
    """A chain is taken without the divisor of the means, so that only its result meets fp16's smallest numbers."""
    (x,), weights = data(TINY, 1, torch.float16)
    views(weights[1], [16])["0.out.weight"].mul_(1e-2)
    expected = model([x], weights, (1.0,), (1,), torch.float16)
    small, large = (disc_head([x], weights, (1.0,), sides=(1,), scale=scale) for scale in (1e-3, 1e3))
    limit = rounded_results(torch.float16)
    assert error(small[3], expected[3]) < limit and error(large[2][0] / 1e3, expected[2][0]) < limit
    assert error(small[2][0] / 1e-3, expected[2][0]) > 10 * limit


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_the_losses(value: float):
    (x,), weights = data(TINY, 1, torch.float32)
    x[2, 0, 5, 1, 1] = value  # the real of side 1
    generator, discriminator, *_ = disc_head([x], weights, FACTORS)
    assert generator.isfinite().all() and discriminator[0].isfinite() and not discriminator[1].isfinite()


def test_opcheck():
    features, weights = data(TINY, 1, torch.bfloat16)
    torch.library.opcheck(_disc_head, (features, weights, [0.5], [1], 1.0, True))


def test_compiles_and_is_not_differentiable():
    features, weights = data(TINY, 1, torch.float32)
    leaf = weights.clone().requires_grad_()
    packed: list[Tensor] = []

    def call(features: list[Tensor], weights: Tensor) -> tuple:
        return disc_head(features, weights, FACTORS, logits=True)

    with saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(features, leaf)
    assert not packed and not any(x.requires_grad for x in flat(compiled))
    assert same(compiled, call(features, weights))


def test_one_cast_and_twelve_launches(monkeypatch: pytest.MonkeyPatch):
    features, weights = data(TINY, 1, torch.bfloat16)
    taps = (module.Tap(16, 9, 0, 16, 144),)
    module.plan(taps, 1, (0, 1), weights.shape[1], torch.bfloat16, weights.device)  # the tables, as a warm-up would
    arguments = features, weights, FACTORS, (0, 1), 1.0, False
    names = launches.launched(monkeypatch, module, lambda: _disc_head._init_fn(*arguments))
    assert len(names) == 13 and sum(name.endswith("_kernel") for name in names) == 12, names


def test_layout_and_views():
    entries, size = layout([48, 40])
    row = torch.zeros(size)
    for name, at, shape in entries:
        part = views(row, [48, 40])[name]
        assert part.shape == shape and part.storage_offset() == at
        part += 1
    assert row.max() == 1 and size % 16 == 0 and row.sum() == sum(2 * c * c + 7 * c + 1 for c in (48, 40))
    assert [name for name, *_ in entries[10:]] == [name.replace("0.", "1.") for name, *_ in entries[:10]]
    assert all(at % 16 == 0 for name, at, _ in layout([320, 640])[0])
    starts = {name: at for name, at, _ in entries}
    for tap, c in enumerate((48, 40)):
        for k in (1, 2):
            names = [f"conv{k}.weight", f"conv{k}.bias", f"norm{k}.weight", f"norm{k}.bias", "out.weight", "out.bias"]
            places = disc_head_plan.parameters(starts[f"{tap}.conv1.weight"], c, k == 2)
            assert list(places) == [starts[f"{tap}.{name}"] for name in names]


def test_a_kernel_reads_the_columns_that_are_written():
    strip = disc_head_plan.STRIP.split()
    tables = ("Conv", "Input", "Weight", "Activate", "Chain", "Reduce")
    written = {name.upper(): [*enumerate(getattr(disc_head_plan, name)._fields)] for name in tables}
    written["STRIP"] = [*enumerate(strip)]
    for name in ("ACTIVATE", "CHAIN"):
        assert written[name][: len(strip)] == written["STRIP"]
        written[name] = written[name][len(strip) :]
    for name, columns in written.items():
        read = {key: int(at) for key, at in vars(disc_head_plan).items() if key.startswith(f"{name}_")}
        assert read == {f"{name}_{field.upper()}": at for at, field in columns}


def test_the_reference_where_kernels_are_off(monkeypatch: pytest.MonkeyPatch):
    features, weights = data([(40, 2, 3)], 1, torch.bfloat16)
    with pytest.raises(ValueError, match="sixteens, not \\[40\\]"):
        disc_head(features, weights, FACTORS)
    monkeypatch.setattr(runtime, "MODE", "reference")
    result = disc_head(features, weights, FACTORS, logits=True)
    assert same(result, disc_head_ref(features, weights, FACTORS, logits=True))
    logits = logits_ref([features[0][0]], weights[1])
    assert torch.allclose(result[4][0][1, 0], logits[0][:, 0], atol=1e-5)
    assert result[2][0].dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_every_run_and_in_a_graph(dtype: torch.dtype):
    features, weights = data(REAL["sd15"], 2, dtype)

    def call() -> tuple[Tensor, ...]:
        return tuple(flat(disc_head(features, weights, FACTORS, logits=True)))

    first = call()
    assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
    launches.check_replay(call)
