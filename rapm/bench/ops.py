"""The operators that `rapm bench` times: their shapes in a UNet pass, arguments, costs, and who else computes them.

Shapes: B = 1, C channels, H W positions of a map, N = H W, F a feed-forward's width, L text tokens, R rank of a LoRA.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapm.stacks import add_low_rank, product

KERNELS = (
    "group_norm_silu", "layer_norm", "geglu", "geglu_linear", "lora_linear", "lora_conv", "frozen_conv", "attention",
    "short_attention", "disc_head", "position_loss", "renoise", "guided_step", "int8_linear", "dequantise",
)  # fmt: skip
RANKS = 1, 64
REFERENCE, COMPILE, RAPM = "reference", "compile", "rapm"  # providers of every operator
WHOLE = "whole weight"  # a quantised layer's baseline: lora_linear with the weight that its codes stand for
TWO_STEPS = "two steps"  # geglu_linear's: cuBLAS's product, and then geglu
FROZEN = "frozen layer"  # a LoRA layer's baseline: the layer alone, forward and the gradient of x
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Shapes = dict[str, Counter]  # kind of operation -> {shape: how often in one pass}, as shapes.unet_shapes finds them


class Provider(NamedTuple):
    """One way to compute an operator: `run(*prepare(*args))`; `prepare` is differentiable and not timed."""

    run: Callable
    prepare: Callable = lambda *args: args
    activations: int = 1  # leading arguments that count where they are kept; weights are there anyway
    checked: bool = True  # False: a baseline, which computes less


class Op(NamedTuple):
    """An operator: `make(*shape)` is one set of arguments, `cost(*shape)` what forward and backward must move or do."""

    shapes: Callable[[Shapes], Counter]
    make: Callable[..., list]
    cost: Callable[..., tuple[float, float]]
    reference: Callable
    rapm: Callable
    others: dict[str, Provider]
    unit: str = "bytes"  # or "flop"
    compiled: Callable[[Callable], Callable] | None = None  # from the reference to its compiled form
    activations: int = 1
    prepare: Callable = lambda *args: args  # for `rapm`, as a Provider's
    slack: float = 2**-8  # errors beyond one and a half times the reference's: another order of rounding


def providers_of(op: Op, compiled: bool) -> dict[str, Provider]:
    """All that are timed for `op`; with torch.compile if `compiled`."""
    out = {REFERENCE: Provider(op.reference, activations=op.activations, checked=False)}  # the measure of the others
    if compiled and op.compiled:
        torch._dynamo.reset()  # a shape is compiled for itself: too many others, and it would run eagerly
        out[COMPILE] = Provider(op.compiled(op.reference), activations=op.activations)
    return {**out, **op.others, RAPM: Provider(op.rapm, op.prepare, activations=op.activations)}


def whole(reference: Callable) -> Callable:
    """torch.compile as one graph, for the shapes at hand."""
    return torch.compile(reference, fullgraph=True, dynamic=False)


def random(*shape: int, scale: float = 1.0, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers, channels-last in four dimensions."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, device=DEVICE, dtype=dtype, memory_format=layout).normal_(0, scale).requires_grad_(grad)


def random_weight(*shape: int, grad: bool = False) -> Tensor:
    """Of a linear layer or a convolution; results are of order 1."""
    return random(*shape, scale=math.prod(shape[1:]) ** -0.5, grad=grad)


def kind(name: str) -> Callable[[Shapes], Counter]:
    """Picks the shapes of one kind of layer."""
    return lambda found: found[name]


def norm_ops(kernels: dict[str, ModuleType], liger: ModuleType | None) -> dict[str, Op]:
    """group_norm_silu, layer_norm and geglu."""
    group_norm, layer_norm, geglu = (kernels[name] for name in ("group_norm_silu", "layer_norm", "geglu"))

    def make_group_norm(c: int, h: int, w: int, silu: bool, shift: bool, residual: bool) -> list:
        added = random(1, c, grad=True) if shift else None, random(1, c, h, w, grad=True) if residual else None
        return [random(1, c, h, w, grad=True), random(c), random(c), silu, *added]

    def group_norm_cost(c: int, h: int, w: int, silu: bool, shift: bool, residual: bool) -> tuple[float, float]:
        """x twice and y; x and dy twice and dx. With a residual also that and the sum; and the sum's gradient."""
        return 2 * c * h * w * (5 if residual else 3), 2 * c * h * w * (6 if residual else 5)

    def group_norm_with(run: Callable) -> Callable:
        def with_options(x, weight, bias, silu, shift, residual):
            return run(x, weight, bias, 32, 1e-5, silu=silu, shift=shift, residual=residual)

        return with_options

    def liger_group_norm(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, *added: Tensor | None) -> object:
        shift, residual = added
        v = x if shift is None else x + shift[:, :, None, None]
        v = v if residual is None else v + residual
        y = liger.liger_group_norm(v, weight, bias, v.shape[1], 32, 1e-5)
        y = F.silu(y) if silu else y
        return y if residual is None else (y, v)

    def make_layer_norm(n: int, c: int, added: bool) -> list:
        x, residual = random(1, n, c, grad=True), random(1, n, c, grad=True) if added else None
        return [x, random(c), random(c), 1e-5, residual]

    def liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> object:
        s = x if residual is None else x + residual
        y = liger.liger_layer_norm(s, weight, bias, eps)
        return y if residual is None else (s, y)

    peers: dict[str, dict[str, Provider]] = {"group_norm": {}, "layer_norm": {}, "geglu": {}}
    if liger:
        # Each gets the layout that it is made for: NCHW, and value and gate as two tensors. Its gelu is the tanh one.
        # Its GroupNorm (0.8.5) adds up bf16 numbers and their squares in bf16, and is refused for what comes of that.
        nchw = lambda *args: [x.contiguous() if torch.is_tensor(x) else x for x in args]  # noqa: E731
        peers["group_norm"]["Liger"] = Provider(liger_group_norm, nchw)
        peers["layer_norm"]["Liger"] = Provider(liger_layer_norm)
        halves = lambda x: [half.contiguous() for half in x.chunk(2, dim=-1)[::-1]]  # noqa: E731
        peers["geglu"]["Liger"] = Provider(liger.liger_geglu, halves, activations=2)
    return {
        "group_norm_silu": Op(
            kind("group_norm"), make_group_norm, group_norm_cost, group_norm_with(group_norm.group_norm_silu_ref),
            group_norm_with(group_norm.group_norm_silu), peers["group_norm"], compiled=whole,
        ),
        "layer_norm": Op(  # x and y; x, dy and dx; both streams, where there is an addition
            kind("layer_norm"), make_layer_norm,
            lambda n, c, added: (8 * n * c, 8 * n * c) if added else (4 * n * c, 6 * n * c),
            layer_norm.layer_norm_ref, layer_norm.layer_norm, peers["layer_norm"], compiled=whole,
        ),
        "geglu": Op(  # 2F and F; 2F, F and 2F
            kind("geglu"), lambda n, f: [random(1, n, 2 * f, grad=True)], lambda n, f: (6 * n * f, 10 * n * f),
            geglu.geglu_ref, geglu.geglu, peers["geglu"], compiled=whole,
        ),
    }  # fmt: skip


def peft_layer(peft: ModuleType) -> Callable:
    """A layer with peft's LoRA of alpha = rank, its weights as arguments: all in bf16, so that it casts nothing."""

    @functools.cache
    def module(shape: tuple[int, ...], bias: bool, rank: int, stride: int, padding: int) -> nn.Module:
        out, inputs, *kernel = shape
        with torch.device("meta"):
            conv = nn.Conv2d(inputs, out, kernel[0], stride, padding, bias=bias) if kernel else None
            parent = nn.ModuleDict({"layer": conv or nn.Linear(inputs, out, bias=bias)})
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
            peft.inject_adapter_in_model(config, parent, low_cpu_mem_usage=True)
        return parent["layer"]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, stride=1, padding=0) -> Tensor:
        names = "base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"
        count = len(down) // up.shape[1]
        layer = module((len(weight) // count, *weight.shape[1:]), bias is not None, up.shape[1], stride, padding)
        parts = [(None,) * count if t is None else t.chunk(count) for t in (weight, bias, down, up)]
        given = [{k: v for k, v in zip(names, part, strict=True) if v is not None} for part in zip(*parts, strict=True)]
        outs = [torch.func.functional_call(layer, part, (x,)) for part in given]
        return outs[0] if count == 1 else torch.cat(outs, -1)  # layers in one: each on its own here

    return run


def layer_ops(kernels: dict[str, ModuleType], peft: ModuleType | None) -> dict[str, Op]:
    """LoRA layers and frozen ones. FLOP are those of the frozen product: a low rank should add nothing."""
    linear, conv, frozen, up = (
        kernels[name] for name in ("lora_linear", "lora_conv", "frozen_conv", "geglu_linear")
    )  # fmt: skip
    peers = {"peft": Provider(peft_layer(peft))} if peft else {}

    def targets(name: str) -> Callable[[Shapes], Counter]:
        return lambda found: Counter({shape[:-1]: n for shape, n in found[name].items() if shape[-1]})

    def all_convs(found: Shapes) -> Counter:
        return sum((Counter({shape[:-1]: n}) for shape, n in found["conv"].items()), Counter())

    def ups(found: Shapes) -> Counter:
        return Counter({(n, f // 4, 2 * f): count for (n, f), count in found["geglu"].items()})

    def make_linear(rank: int, rows: int, inputs: int, outputs: int, bias: bool, layers: int) -> list:
        x, weight = random(1, rows, inputs, grad=True), random_weight(outputs, inputs)
        low_rank = random_weight(layers * rank, inputs, grad=True), random_weight(outputs, rank, grad=True)
        return [x, weight, random(outputs) if bias else None, *low_rank]

    def make_stack(rank: int, rows: int, inputs: int, outputs: int, bias: bool, layers: int) -> list:
        _, *weights = make_linear(rank, 1, inputs, outputs, bias, layers)
        return [random(rows, inputs), *weights]  # of the time and the text no gradient is wanted

    def run_stack(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        """As rapm.stacks has it, but with the frozen product, which an iteration does once for all its passes."""
        count = linear.groups(down, up)
        down, up = (part.unflatten(0, (count, -1)) for part in (down, up))
        return add_low_rank(product(x, weight, bias, count), x, down, up).transpose(0, 1).flatten(1)

    def make_conv(inputs: int, outputs: int, k: int, stride: int, h: int, w: int) -> list:
        x, weight = random(1, inputs, h, w, grad=True), random_weight(outputs, inputs, k, k)
        return [x, weight, random(outputs), stride, k // 2]

    def make_lora_conv(rank: int, inputs: int, outputs: int, k: int, *rest: int) -> list:
        x, weight, bias, *geometry = make_conv(inputs, outputs, k, *rest)
        low_rank = random_weight(rank, inputs, k, k, grad=True), random_weight(outputs, rank, 1, 1, grad=True)
        return [x, weight, bias, *low_rank, *geometry]

    def by_taps(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, *rest: object) -> tuple:
        """With `down` as a LoRA has it."""
        return x, weight, bias, down.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), *rest

    def linear_cost(rows: int, inputs: int, outputs: int, bias: bool, layers: int) -> tuple[float, float]:
        return (2.0 * rows * inputs * outputs,) * 2

    def stack_cost(*shape: int) -> tuple[float, float]:
        return linear_cost(*shape)[0], 0.0

    def conv_cost(inputs: int, outputs: int, k: int, stride: int, h: int, w: int) -> tuple[float, float]:
        return (2.0 * inputs * outputs * k * k * math.ceil(h / stride) * math.ceil(w / stride),) * 2

    ops = {}
    for rank in RANKS:
        alone = Provider(F.linear, lambda x, weight, bias, *_: (x, weight, bias), checked=False)
        ops[f"lora_linear rank {rank}"] = Op(
            targets("linear"), partial(make_linear, rank), linear_cost, linear.lora_linear_ref, linear.lora_linear,
            {FROZEN: alone, **peers}, "flop",
        )  # fmt: skip
        ops[f"lora_linear stack rank {rank}"] = Op(
            lambda found: found["stack"], partial(make_stack, rank), stack_cost, linear.lora_linear_ref, run_stack,
            {FROZEN: alone}, "flop",
        )  # fmt: skip
    for rank in RANKS:
        alone = Provider(F.conv2d, lambda x, weight, bias, down, up, *rest: (x, weight, bias, *rest), checked=False)
        ops[f"lora_conv rank {rank}"] = Op(
            targets("conv"), partial(make_lora_conv, rank), conv_cost, conv.lora_conv_ref, conv.lora_conv,
            {FROZEN: alone, **peers}, "flop", prepare=by_taps,
        )  # fmt: skip
    ops["geglu_linear"] = Op(  # of a pass without gradient
        ups, lambda m, k, n: [random(1, m, k), random_weight(n, k), random(n)], lambda m, k, n: (2.0 * m * k * n, 0.0),
        up.geglu_linear_ref, up.geglu_linear,
        {TWO_STEPS: Provider(lambda *args: kernels["geglu"].geglu(F.linear(*args)))}, "flop", compiled=whole,
    )  # fmt: skip
    ops["frozen_conv"] = Op(all_convs, make_conv, conv_cost, frozen.frozen_conv_ref, frozen.frozen_conv, {}, "flop")
    return ops


def low_precision_ops(kernels: dict[str, ModuleType]) -> dict[str, Op]:
    """Layers of frozen weights in fewer bits, for the linear layers that a LoRA extends."""
    linear, low, stored = (kernels[name] for name in ("lora_linear", "int8_linear", "dequantise"))

    def shapes(found: Shapes) -> Counter:
        return Counter({shape[:-1]: n for shape, n in found["linear"].items() if shape[-1]})

    def weights(found: Shapes) -> Counter:
        return sum((Counter({(k, n): count}) for (_, k, n, *_), count in shapes(found).items()), Counter())

    def make(rank: int, rows: int, k: int, n: int, bias: bool, layers: int) -> list:
        codes, scale, _ = stored.int8(random_weight(n, k))
        pair = random_weight(layers * rank, k, grad=True), random_weight(n, rank, grad=True)
        return [random(1, rows, k, grad=True), codes, scale, random(n) if bias else None, *pair]

    def whole(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, *pair: Tensor) -> tuple:
        return x, (codes.to(scale.dtype) * scale[:, None]).to(x.dtype), bias, *pair

    def alone(*args: Tensor) -> tuple:
        return whole(*args)[:3]

    def reference(*args: Tensor) -> Tensor:
        return linear.lora_linear_ref(*whole(*args))

    def make_codes(k: int, n: int) -> list:
        return [*stored.nf4(random_weight(n, k)), torch.bfloat16]

    ops = {
        f"int8_linear rank {rank}": Op(
            shapes, partial(make, rank), lambda m, k, n, *_: (2.0 * m * k * n,) * 2, reference, low.int8_linear,
            {FROZEN: Provider(F.linear, alone, checked=False), WHOLE: Provider(linear.lora_linear, whole)}, "flop",
            slack=0.03,  # x and dy in 127 steps of a row's largest, which is off by some 1%
        )
        for rank in RANKS
    }  # fmt: skip
    ops["dequantise"] = Op(  # half a byte and a 64th read, two written
        weights, make_codes, lambda k, n: (k * n * (0.5 + 1 / 64 + 2), 0.0), stored.dequantise_ref,
        stored.dequantise, {}, activations=0,
    )  # fmt: skip
    return ops


def attention_ops(kernels: dict[str, ModuleType], xformers: ModuleType | None) -> dict[str, Op]:
    """attention, beside PyTorch's backends and xformers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def backend(which: SDPBackend) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    def make(heads: int, n: int, length: int, width: int) -> list:
        flat = [random(1, rows, heads * width) for rows in (n, length, length)]
        return [x.unflatten(-1, (heads, width)).transpose(1, 2).requires_grad_() for x in flat]  # 1 heads N d

    def cost(heads: int, n: int, length: int, width: int) -> tuple[float, float]:
        return 4.0 * heads * n * length * width, 10.0 * heads * n * length * width  # two products; five

    backends = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
    others = {name: Provider(backend(getattr(SDPBackend, value)), activations=3) for name, value in backends.items()}
    if xformers:
        others["xformers"] = Provider(
            lambda *qkv: xformers.memory_efficient_attention(*qkv).transpose(1, 2),
            lambda *qkv: [x.transpose(1, 2) for x in qkv], activations=3,
        )  # fmt: skip

    def few_keys(found: Shapes) -> Counter:
        return Counter({shape: n for shape, n in found["attention"].items() if short.fits(*shape[2:])})

    module, short = kernels["attention"], kernels["short_attention"]
    every = make, cost, module.attention_ref, module.attention, others, "flop"
    few = make, cost, short.short_attention_ref, short.short_attention, others, "flop"
    return {
        "attention": Op(kind("attention"), *every, activations=3),
        "short_attention": Op(few_keys, *few, activations=3),
    }


def slot_ops(kernels: dict[str, ModuleType]) -> dict[str, Op]:
    """What happens once a slot. Gradients are outputs of the forward."""
    heads, position, renoise, guided = (
        kernels[name] for name in ("disc_head", "position_loss", "renoise", "guided_step")
    )

    def make_heads(*taps: tuple[int, int, int]) -> list:
        features = [random(3, *tap)[:, None] for tap in taps]  # 3 1 C H W: fake, real of either side
        channels = [c for c, _, _ in taps]
        weights = torch.zeros(2, heads.layout(channels)[1], device=DEVICE)
        # No logit is near a margin of the hinges, 1 and -1: where rounding takes it across, a position has no gradient
        # in one computation and all of it in the other, and a map of SD1.5's has 64 (one of them turned was 13%).
        for row, bias in zip(weights, (0.0, -3.0), strict=True):
            for name, view in heads.views(row, channels).items():
                if name.endswith("out.bias"):
                    view.fill_(bias)
                elif view.dim() > 1:
                    view.normal_(0, (0.1 if "out" in name else 1.0) * view.shape[1] ** -0.5)
                else:
                    view.normal_(float("norm" in name and name.endswith("weight")), 0.2)
        return [features, weights, (0.1, 0.1)]

    def heads_cost(*taps: tuple[int, int, int]) -> tuple[float, float]:
        """24 products of C C by C N: 8 forward (two layers, two sides, two images), 4 to the fake, 12 for weights."""
        return sum(48.0 * c * c * h * w for c, h, w in taps), 0.0

    def compiled_heads(_: Callable) -> Callable:
        """The losses as one compiled graph; one backward for both gradients, as no loss sees the other's leaves."""

        @whole
        def losses(leaves: list[Tensor], features: list[Tensor], rows: Tensor, scales: Sequence[float]) -> tuple:
            generator, discriminator = [], []
            for side in (0, 1):
                fake = heads.logits_ref(leaves, rows[side].detach())
                generator.append(torch.stack([F.relu(1 - x).mean() for x in fake]).mean())
                pairs = [
                    x.chunk(2) for x in heads.logits_ref([torch.cat([x[0], x[1 + side]]) for x in features], rows[side])
                ]
                terms = [F.relu(1 + f).mean() + F.relu(1 - r).mean() for f, r in pairs]
                discriminator.append(torch.stack(terms).mean())
            total = sum(s * g for s, g in zip(scales, generator, strict=True)) + sum(discriminator)
            return total, torch.stack(generator), torch.stack(discriminator)

        def run(features: list[Tensor], weights: Tensor, scales: Sequence[float]) -> tuple:
            leaves, rows = [x[0].detach().requires_grad_() for x in features], weights.detach().requires_grad_()
            total, generator, discriminator = losses(leaves, features, rows, scales)
            *grad_fake, grad_weights = torch.autograd.grad(total, [*leaves, rows])
            return generator.detach(), discriminator.detach(), grad_fake, grad_weights

        return run

    def latents(batch: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """fp32 ones are contiguous, the network's channels-last."""
        x = random(batch, 4, h, w, dtype=dtype)
        return x.contiguous() if dtype == torch.float32 else x

    def make_position(h: int, w: int) -> list:
        z, zhat, ztilde = (latents(1, h, w) for _ in range(3))
        out, part = (latents(1, h, w, torch.bfloat16) for _ in range(2))
        a_b, keep, adversarial = (torch.rand(n, device=DEVICE) for n in (2, 1, 1))
        return [z, out, a_b, zhat, ztilde, keep, part, adversarial, torch.zeros(1, dtype=torch.int32, device=DEVICE)]

    def position_with(loss: Callable, gradient: Callable, counts: bool) -> Callable:
        """From the network's output to the gradient on it, with the discriminators' part."""

        def run(z, out, a_b, zhat, ztilde, keep, part, adversarial, counter):
            z_n, losses, pull = loss(z, out, a_b, zhat, ztilde, (1.0, 1.0), 1e-3, *([counter] if counts else []))
            return z_n, losses, gradient(pull, out, a_b[1:], keep, part, adversarial, 1.0)

        return run

    def make_renoise(h: int, w: int) -> list:
        numbers = [749, 499, 249, 0], [999, 749, 499, 249], [1], [0, 7]
        low, high, slot, key = (torch.tensor(x, device=DEVICE) for x in numbers)
        table = torch.rand(4, 1000, 2, device=DEVICE)
        return [*(latents(1, h, w) for _ in range(3)), low, high, table, slot, key, 1.0, torch.bfloat16]

    def make_guided(h: int, w: int) -> list:
        return [latents(1, h, w), latents(2, h, w, torch.bfloat16), torch.rand(2, device=DEVICE), 7.5]

    def per_number(size: float) -> Callable[[int, int], tuple[float, float]]:
        return lambda h, w: (4 * h * w * size, 0.0)

    once = kind("latents")
    return {
        "disc_head": Op(
            kind("taps"), make_heads, heads_cost, heads.disc_head_ref, heads.disc_head, {}, "flop", compiled_heads,
            # bf16 products against fp32 ones: y is off by a roundoff, 2^-9, and LeakyReLU's slope by 0.8 for a share of
            # 0.8 times that, which is 0.04 of the slopes' rms
            slack=0.05,
        ),
        "position_loss": Op(
            once, make_position, per_number(5 * 4 + 2 + 4 + 2 + 2),
            position_with(position.position_loss_ref, position.position_gradient_ref, False),
            position_with(position.position_loss, position.position_gradient, True), {}, compiled=whole,
        ),
        "renoise": Op(
            once, make_renoise, per_number(3 * 4 + 3 * 2), renoise.renoise_ref, renoise.renoise, {}, compiled=whole,
        ),
        "guided_step": Op(
            once, make_guided, per_number(4 + 4 + 4), guided.guided_step_ref, guided.guided_step, {}, compiled=whole,
        ),
    }  # fmt: skip


def library(name: str, left_out: dict[str, str]) -> ModuleType | None:
    """Another library's module; None, with the reason in `left_out`, where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a binary that does not match raises anything
        left_out[name.split(".")[0]] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None


def operators(left_out: dict[str, str], peers: bool = True) -> dict[str, Op]:
    """Every operator by name, beside `peers` where wanted; libraries that are not to be had go to `left_out`."""
    kernels = {name: importlib.import_module(f"rapm.kernels.{name}") for name in KERNELS}
    liger = peft = xformers = None
    if peers:
        liger, peft = library("liger_kernel.transformers.functional", left_out), library("peft", left_out)
        problem = kernels["attention"].xformers_problem()
        xformers = None if problem else library("xformers.ops", left_out)
        left_out |= {"xformers": problem} if problem else {}
    return {
        **norm_ops(kernels, liger), **layer_ops(kernels, peft), **attention_ops(kernels, xformers),
        **slot_ops(kernels), **low_precision_ops(kernels),
    }  # fmt: skip
