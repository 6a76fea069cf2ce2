"""The shapes of what a UNet pass computes, recorded from the real architectures on meta tensors."""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from typing import NamedTuple

import torch
from torch import nn

from rapm.bench.measure import kernel_mode
from rapm.bench.ops import Shapes
from rapm.layers import Conv2d, GroupNorm, LayerNorm, Linear
from rapm.loading.families import SD15, SDXL
from rapm.unet import Attention, FeedForward, Text, UNet


class Model(NamedTuple):
    """Whose shapes are timed."""

    unet: dict  # config.json, without what is diffusers' default
    side: int  # of the latents


MODELS = {"sd15": Model(SD15, SD15["sample_size"]), "sdxl": Model(SDXL, SDXL["sample_size"])}


def example_text(config: dict, side: int, device: str) -> Text:
    """Random embeddings of one prompt, as the UNet of `config` takes them for latents of `side`."""
    hidden = torch.randn(1, 77, config["cross_attention_dim"], device=device)
    if not config["addition_embed_type"]:
        return Text(hidden)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    sizes = torch.tensor([[8, 8, 0, 0, 8, 8]], device=device) * float(side)
    return Text(hidden, torch.randn(1, pooled, device=device), sizes)


@functools.cache
def unet_shapes(model: str) -> Shapes:
    """The shapes of one UNet pass, by kind.

    group_norm: C H W, SiLU, shift, residual. layer_norm: N C, residual. geglu: N F.
    attention: heads N L d. linear: rows, in, out, bias, layers in one, LoRA. stack: rows, in, out, bias, layers in one.
    conv: in, out, k, stride, H, W of x, LoRA.
    taps: the C H W that a discriminator reads. latents: H W.
    """
    found: Shapes = defaultdict(Counter)

    def add(kind: str, *shape: object) -> None:
        found[kind][shape] += 1

    def see(module: nn.Module, args: tuple, options: dict) -> None:
        x = args[0]
        if isinstance(module, GroupNorm):
            added = (options.get(name) is not None for name in ("shift", "residual"))
            add("group_norm", *x.shape[1:], options.get("silu", False), *added)
        elif isinstance(module, LayerNorm):
            add("layer_norm", *x.shape[1:], args[1] is not None)
        elif isinstance(module, FeedForward):
            add("geglu", x.shape[1], module.net[2].in_features)
        elif isinstance(module, Attention):
            rows, channels = x.shape[1:]
            context = text.hidden.shape[1] if module.cross else rows
            add("attention", module.heads, rows, context, channels // module.heads)
            if not module.cross:
                add("linear", rows, channels, 3 * channels, False, 3, True)
        elif isinstance(module, nn.Linear):
            sizes = math.prod(x.shape[:-1]), module.in_features, module.out_features
            add("linear", *sizes, module.bias is not None, 1, isinstance(module, Linear))
        elif isinstance(module, nn.Conv2d):
            sizes = module.in_channels, module.out_channels, module.kernel_size[0]
            add("conv", *sizes, module.stride[0], *x.shape[2:], isinstance(module, Conv2d))

    config, side = MODELS[model]
    with torch.device("meta"), torch.no_grad(), kernel_mode("reference"):
        unet = UNet(config).to(torch.bfloat16)
        z, t = torch.empty(1, 4, side, side), torch.empty((), dtype=torch.long)
        text = example_text(unet.config, side, "meta")
        add("taps", *(tuple(x.shape[1:]) for x in unet.features(z, t, text)))
        for module in unet.modules():
            module.register_forward_pre_hook(see, with_kwargs=True)
        unet(z, t, text)
        for stacks, rows in ((unet.time_stacks, 1), (unet.text_stacks, text.hidden.shape[1])):
            for stack in stacks:
                outputs, inputs = stack.layers[0].weight.shape
                count = len(stack.layers)
                add("stack", rows, inputs, count * outputs, stack.layers[0].bias is not None, count)
    add("latents", side, side)
    return dict(found)
