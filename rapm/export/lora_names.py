"""The names of layers in LoRA files, and what a file is that has others.

kohya's trainer names a layer after the module it trains: diffusers' for SD1.x and SD2.x, the original code's for SDXL.
ComfyUI, Forge and diffusers read both, for every family. A1111 turns diffusers' names into the original ones by a rule
made for SD1.x, which on SDXL looks for up_blocks.0.upsamplers.0 where it is not and drops it; the original names reach
every layer there. So the names of kohya's trainer are also the ones that lose nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from rapm.loading.original import original_name
from rapm.unet import UNet

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


def original_names(unet: UNet) -> dict[str, str]:
    """Each of a UNet's LoRA targets, with its name in the original code's UNet."""
    return {name: original_name(name, unet.config) for name in unet.lora_targets()}


def kohya_name(name: str) -> str:
    """A UNet's layer in kohya's files: the dotted path, diffusers' or the original code's, with underscores."""
    return "lora_unet_" + name.replace(".", "_")


def kohya_names(unet: UNet) -> dict[str, str]:
    """Layer -> its name in a file as kohya's trainer writes it for the UNet's family."""
    theirs = unet.config["addition_embed_type"] == "text_time"
    names = original_names(unet) if theirs else {layer: layer for layer in unet.lora_targets()}
    return {layer: kohya_name(name) for layer, name in names.items()}


def unet_spellings(unet: UNet) -> dict[str, str]:
    """What LoRA files call a UNet's layers -> the layer: kohya's and the original code's names, peft's, diffusers'."""
    spellings: dict[str, str] = {}
    for layer, original in original_names(unet).items():
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
