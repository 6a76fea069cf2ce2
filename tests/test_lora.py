"""The LoRA as an argument: against merged weights and against peft in diffusers, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from full import FULL
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_unet import CONFIGS, error, inputs, perturb, stock_forward
from tiny import UNET
from torch import Tensor

from rapm.errors import UserError
from rapm.lora import LoRA
from rapm.unet import UNet

NAMES = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
Weights = dict[str, tuple[Tensor, Tensor]]


def teacher(family: str, dtype: torch.dtype = torch.float32) -> UNet:
    torch.manual_seed(0)
    return perturb(UNet(CONFIGS[family])).to(dtype)


def student(unet: UNet, rank: int) -> LoRA:
    """A LoRA with every weight away from zero."""
    lora = LoRA(unet, rank)
    with torch.no_grad():
        lora.flat += 0.05 * torch.randn_like(lora.flat)
    return lora


def update(down: Tensor, up: Tensor) -> Tensor:
    """What (down, up) adds to the weight."""
    return torch.einsum("or,ri...->oi...", up.flatten(1), down)


def merged(unet: UNet, weights: Weights) -> dict[str, Tensor]:
    """The UNet's parameters with W + up down in place of W: differentiable in the weights."""
    out = dict(unet.named_parameters())
    for name, pair in weights.items():
        out[f"{name}.weight"] = out[f"{name}.weight"] + update(*pair)
    return out


@pytest.mark.parametrize("family", ["sd1", "sdxl"])  # convolutions and linear layers as proj_in and proj_out
@pytest.mark.parametrize("target", NAMES)
def test_equals_merged_weights(family: str, target: str) -> None:
    """A mapping that covers only some layers extends those and no other; exact but for rounding, hence fp64."""
    unet = teacher(family, torch.float64)
    views = student(unet, 3).views(torch.float64)
    some = {name: pair for name, pair in views.items() if f".{name}".endswith(f".{target}")}
    assert some
    z, t, text = inputs(CONFIGS[family], 2, (13, 22))
    with torch.no_grad():
        wanted = torch.func.functional_call(unet, merged(unet, some), (z, t, text))
        assert error(unet(z, t, text, some), wanted) < 1e-12
        assert error(unet(z, t, text), wanted) > 1e-4  # the layers matter


@pytest.mark.parametrize("family", CONFIGS)
def test_whole_lora_values_and_gradients(family: str) -> None:
    """Output, input gradient and the gradient of `flat`, fp32 against merged weights in fp64."""
    unet, exact = teacher(family), teacher(family, torch.float64)
    lora = student(unet, 2)
    z, t, text = inputs(CONFIGS[family], 2, (16, 16))
    results = []
    for model, dtype in ((unet, torch.float32), (exact, torch.float64)):
        x = z.to(dtype).requires_grad_()
        views = lora.views(dtype)
        if model is exact:
            out = torch.func.functional_call(exact, merged(exact, views), (x, t, text))
        else:
            out = unet(x, t, text, views)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append((out, *torch.autograd.grad(out, (x, lora.flat), weight)))
        assert out.dtype == dtype
    for actual, wanted in zip(*results, strict=True):
        assert error(actual, wanted) < 1e-5


def test_gradient_reaches_flat_alone() -> None:
    unet = teacher("sd1")
    lora = student(unet, 1)
    z, t, text = inputs(UNET["sd1"], 1, (16, 16))
    unet(z, t, text, lora.views(torch.float32)).square().mean().backward()
    assert all(p.grad is None for p in unet.parameters())
    with torch.no_grad():
        lora.flat.copy_(lora.flat.grad)
    assert all(down.any() and up.any() for down, up in lora.export().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_by_part_are_the_flat_one(family: str, dtype: torch.dtype) -> None:
    """Bit for bit, and what a backward gives takes no flat copy: each part is a storage of its own."""
    unet = teacher(family, dtype)
    lora = student(unet, 2)
    z, t, text = inputs(CONFIGS[family], 2, (16, 16))
    out = unet(z.to(dtype), t, text.to(z.device, dtype), lora.views(dtype))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (wanted,) = torch.autograd.grad(out, lora.flat, weight)
    weights, leaves = lora.leaves(dtype)
    out_again = unet(z.to(dtype), t, text.to(z.device, dtype), weights)
    assert torch.equal(out_again, out)
    pieces = torch.autograd.grad(out_again, leaves, weight)
    assert [x.shape for x in pieces] == [x.shape for x in lora.parts(lora.flat)]
    assert max(x.untyped_storage().nbytes() for x in pieces) < lora.flat.numel() * dtype.itemsize
    assert torch.equal(torch.cat(pieces).float(), wanted) and not weights.keys() ^ lora.views(dtype).keys()


def test_teacher_is_untouched() -> None:
    """No state is left behind by a LoRA's forward, and a new LoRA (up is zero) is the teacher."""
    unet = teacher("sdxl")
    z, t, text = inputs(UNET["sdxl"], 2, (16, 16))
    before = unet(z, t, text)
    assert error(unet(z, t, text, student(unet, 2).views(torch.float32)), before) > 1e-3
    assert torch.equal(unet(z, t, text), before)
    assert torch.equal(unet(z, t, text, LoRA(unet, 2).views(torch.float32)), before)
    assert torch.equal(unet(z, t, text, {}), before)


def test_features_see_the_lora() -> None:
    unet = teacher("sd1")
    views = student(unet, 1).views(torch.float32)
    z, t, text = inputs(UNET["sd1"], 1, (16, 16))
    exact = torch.func.functional_call(unet, merged(unet, views), (z, t, text))
    seen = []
    handle = unet.mid_block.register_forward_hook(lambda _, __, out: seen.append(out))
    assert error(unet(z, t, text, views), exact) < 1e-5
    handle.remove()
    assert torch.equal(unet.features(z, t, text, views)[-1], seen[0])


@pytest.mark.parametrize("family", CONFIGS)
def test_equals_peft(family: str) -> None:
    """The 14 names in peft, alpha = rank, with the same weights in diffusers' UNet."""
    unet = teacher(family)
    stock = UNet2DConditionModel(**CONFIGS[family]).requires_grad_(False).eval()
    stock.load_state_dict(unet.state_dict())
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=NAMES, init_lora_weights=False), stock)
    layers = {name: x for name, x in stock.named_modules() if isinstance(x, BaseTunerLayer)}
    assert layers.keys() == unet.lora_targets().keys()
    lora = LoRA(unet, 3)
    lora.load({name: (x.lora_A["default"].weight, x.lora_B["default"].weight) for name, x in layers.items()})
    z, t, text = inputs(CONFIGS[family], 2, (13, 22))
    assert error(unet(z, t, text, lora.views(torch.float32)), stock_forward(stock, z, t, text)) < 1e-5


@pytest.mark.parametrize(("family", "layers", "size"), [("sd15", 278, 1_050_816), ("sd21", 278, 1_059_008),
                                                        ("sdxl", 788, 3_074_240)])  # fmt: skip
def test_full_size_targets_are_those_of_peft(family: str, layers: int, size: int) -> None:
    with torch.device("meta"):
        unet, stock = UNet(FULL[family]), UNet2DConditionModel.from_config(FULL[family])
    inject_adapter_in_model(LoraConfig(r=1, target_modules=NAMES), stock, low_cpu_mem_usage=True)
    targets = {name for name, x in stock.named_modules() if isinstance(x, BaseTunerLayer)}
    assert set(unet.lora_targets()) == targets and len(targets) == layers
    assert LoRA(unet, 1).flat.numel() == size


def test_views_are_one_cast_and_one_split() -> None:
    lora = student(teacher("sd1"), 4)
    views = lora.views(torch.bfloat16)
    assert list(views) == lora.names == list(teacher("sd1").lora_targets())
    todo, nodes = [x.grad_fn for pair in views.values() for x in pair], set()
    assert all(x.dtype == torch.bfloat16 for pair in views.values() for x in pair)
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [parent for parent, _ in node.next_functions]
    names = [node.name() for node in nodes]
    assert sum(name.startswith("Split") for name in names) == sum(name.startswith("ToCopy") for name in names) == 1
    base = lora.views(torch.float32)
    assert all(x.untyped_storage().data_ptr() == lora.flat.untyped_storage().data_ptr() for x, _ in base.values())
    down, up = base["down_blocks.0.resnets.0.conv1"]
    assert down.shape == (4, 32, 3, 3) and down.permute(2, 3, 0, 1).is_contiguous()
    assert up.shape == (32, 4, 1, 1)


def test_initial_weights() -> None:
    """peft's: down uniform in +-1/sqrt(fan in), up zero; the seed decides the bits."""
    unet = teacher("sdxl")
    lora = LoRA(unet, 8, seed=3)
    assert lora.rank == 8 and lora.flat.dtype == torch.float32 and lora.flat.requires_grad
    for name, (down, up) in lora.export().items():
        bound = 1 / math.sqrt(down[0].numel())
        assert not up.any() and down.abs().max() <= bound, name
        assert down.abs().max() > 0.9 * bound and abs(down.std() * math.sqrt(3) / bound - 1) < 0.2, name
    assert torch.equal(lora.flat, LoRA(unet, 8, seed=3).flat)
    assert not torch.equal(lora.flat, LoRA(unet, 8, seed=4).flat)


def test_export_and_load() -> None:
    unet = teacher("sd1")
    lora = student(unet, 2)
    saved = lora.export()
    for name, pair in saved.items():
        for x, view in zip(pair, lora.views(torch.float32)[name], strict=True):
            assert torch.equal(x, view) and x.is_contiguous() and not x.requires_grad
    other = LoRA(unet, 2, seed=1)
    other.load(saved)
    assert torch.equal(other.flat, lora.flat)
    with torch.no_grad():
        lora.flat.zero_()
    assert saved["mid_block.resnets.0.conv1"][0].any()  # copies, not views

    with pytest.raises(UserError, match=r"same rank \(4\)"):
        LoRA(unet, 4).load(saved)
    del saved["mid_block.resnets.0.conv1"]
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv1 is a layer of"):
        other.load(saved)
