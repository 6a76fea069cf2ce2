"""The names of layers in LoRA files, and what a file is that has others.

kohya's trainer names a layer after the module it trains: diffusers' for SD1.x and SD2.x, the original code's for SDXL.
ComfyUI, Forge and diffusers read both, for every family. A1111 turns diffusers' names into the original ones by a rule
made for SD1.x, which on SDXL looks for up_blocks.0.upsamplers.0 where it is not and drops it; the original names reach
every layer there. So the names of kohya's trainer are also the ones that lose nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from rapm.unet import UNet

RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
# What a key says of a file that is not a plain LoRA of these families.
FOREIGN = (
    (r"\.hada_w[12]_[ab]$|\.hada_t[12]$", "a LoHa"),
    (r"\.lokr_(w[12]|t2)(_[ab])?$", "a LoKr"),
    (r"dora_scale$|lora_magnitude_vector", "a DoRA"),
    (r"\.oft_|\.boft_", "an OFT"),
    (r"\.(a1|a2|b1|b2)\.weight$", "a GLoRA"),
    (r"\.on_input$", "an (IA)^3"),
    (r"\.lora_mid\.weight$", "a LoCon with a Tucker core (lora_mid)"),
    (r"\.diff(_b)?$|\.[wb]_norm$", "a LyCORIS file with full differences"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "a LoRA for Flux"),
    (r"joint_blocks|^transformer\.|^lora_transformer_", "a LoRA for SD3 or another transformer"),
    (r"^(lora_prior_|lora_te3_)", "a LoRA for a family that is not supported"),
)
# Width of the text that cross attention reads -> the family; the same in every model of one.
WIDTHS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 1280: "the SDXL refiner"}


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """Each of a UNet's LoRA targets, all of which are in `layers`, with its name in the original code's UNet.

    There every down level is its numbered blocks and one that halves the picture; an up level's last block doubles it.
    """
    layers = list(layers)
    blocks = {name: name.split(".") for name in layers}
    resnets = {(words[0], int(words[1]), words[3]) for words in blocks.values() if words[2] == "resnets"}
    sizes = Counter((part, level) for part, level, _ in resnets)
    attends = {int(words[1]) for words in blocks.values() if words[0] == "up_blocks" and words[2] == "attentions"}

    def original(words: list[str]) -> str:
        if words[0] == "mid_block":
            _, kind, index, *rest = words
            block = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(index)}"
        else:
            part, number, kind, index, *rest = words
            level, down = int(number), part == "down_blocks"
            size = sizes[part, level]
            first = sum(sizes[part, below] + down for below in range(level)) + down
            if kind == "downsamplers":
                return f"input_blocks.{first + size}.0.op"
            if kind == "upsamplers":
                return f"output_blocks.{first + size - 1}.{1 + (level in attends)}.conv"
            block = f"{'input' if down else 'output'}_blocks.{first + int(index)}.{int(kind == 'attentions')}"
        return f"{block}.{RESNET.get(rest[0], '.'.join(rest))}"

    return {name: original(words) for name, words in blocks.items()}


def kohya_name(name: str) -> str:
    """A UNet's layer in kohya's files: the dotted path, diffusers' or the original code's, with underscores."""
    return "lora_unet_" + name.replace(".", "_")


def kohya_names(unet: UNet) -> dict[str, str]:
    """Layer -> its name in a file as kohya's trainer writes it for the UNet's family."""
    layers = unet.lora_targets()
    names = original_names(layers) if unet.config["addition_embed_type"] == "text_time" else {x: x for x in layers}
    return {layer: kohya_name(name) for layer, name in names.items()}


def unet_spellings(unet: UNet) -> dict[str, str]:
    """What LoRA files call a UNet's layers -> the layer: kohya's and the original code's names, peft's, diffusers'."""
    layers = unet.lora_targets()
    spellings: dict[str, str] = {}
    for layer, original in original_names(layers).items():
        processor = re.sub(r"\.to_(out\.0|\w)$", lambda m: ".processor.to_" + m[1].removesuffix(".0"), layer)
        names = [kohya_name(layer), kohya_name(original), f"diffusion_model.{original}", processor, f"unet.{processor}"]
        names += [layer, f"unet.{layer}", f"base_model.model.{layer}"]
        spellings |= dict.fromkeys(names, layer)
    return spellings


def text_encoder_spellings(encoders: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """What LoRA files call the linear layers of a pipeline's text encoders -> (the encoder, its layer).

    `encoders` by diffusers' names, text_encoder and text_encoder_2. transformers 5 leaves out the prefix `text_model`.
    """
    kohya = {"text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_",)}
    spellings: dict[str, tuple[str, str]] = {}
    for encoder, module in encoders.items():
        for layer, part in module.named_modules():
            if isinstance(part, nn.Linear):
                path = layer if layer.startswith("text_") else f"text_model.{layer}"
                names = [prefix + path.replace(".", "_") for prefix in kohya[encoder]]
                spellings |= dict.fromkeys((*names, f"{encoder}.{path}"), (encoder, layer))
    return spellings


def foreign_kind(key: str) -> str | None:
    """What a file with `key` in it is, where that is not a plain LoRA of a supported family."""
    return next((kind for pattern, kind in FOREIGN if re.search(pattern, key)), None)
