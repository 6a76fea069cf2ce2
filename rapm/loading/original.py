"""The names that a UNet's parameters and layers have in the original code of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
TOP = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
       "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
       "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def original_name(name: str, config: Mapping[str, Any]) -> str:
    """A UNet parameter's or layer's name in the original code, which numbers all blocks through."""
    for ours, original in TOP.items():
        if name == ours or name.startswith(ours + "."):
            return original + name.removeprefix(ours)
    part, *rest = name.split(".")
    if part == "mid_block":
        kind, index, *rest = rest
        block = f"middle_block.{2 * int(index)}" if kind == "resnets" else "middle_block.1"
    else:
        number, kind, index, *rest = rest
        level, down, layers = int(number), part == "down_blocks", config["layers_per_block"]
        layers = list(layers) if isinstance(layers, (list, tuple)) else [layers] * len(config["block_out_channels"])
        if not down:
            layers.reverse()
        first = sum(layers[:level]) + level + down  # a level has one more: going down its resampling, up a layer
        if kind == "downsamplers":
            return ".".join([f"input_blocks.{first + layers[level]}.0.op", *rest[1:]])
        if kind == "upsamplers":
            attends = config["up_block_types"][level].startswith("CrossAttn")
            return ".".join([f"output_blocks.{first + layers[level]}.{1 + attends}.conv", *rest[1:]])
        block = f"{'input' if down else 'output'}_blocks.{first + int(index)}.{int(kind == 'attentions')}"
    if kind == "resnets":
        rest[0] = RESNET[rest[0]]
    return ".".join([block, *rest])
