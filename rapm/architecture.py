"""What a diffusers `unet/config.json` may say: what is left out, computed here, refused; and what it says of sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rapm.errors import UserError

# What the UNet reads from a config.json, with diffusers' defaults.
DEFAULTS = dict(
    in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    transformer_layers_per_block=1, attention_head_dim=8, num_attention_heads=None, cross_attention_dim=1280,
    use_linear_projection=False, norm_num_groups=32, norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0,
    time_embedding_dim=None, addition_embed_type=None, addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None,
)  # fmt: skip
# What would need other code: these values only are computed. A config that leaves one out means the first.
SUPPORTED = dict(
    _class_name=("UNet2DConditionModel",), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    mid_block_type=("UNetMidBlock2DCrossAttn",), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type=(None, "text_time"), act_fn=("silu", "swish"), time_embedding_type=("positional",),
    attention_type=("default",), resnet_time_scale_shift=("default",), mid_block_scale_factor=(1,),
    downsample_padding=(1,), conv_in_kernel=(3,), conv_out_kernel=(3,),
    **dict.fromkeys((
        "class_embed_type", "num_class_embeds", "class_embeddings_concat", "encoder_hid_dim", "encoder_hid_dim_type",
        "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "center_input_sample",
        "only_cross_attention", "dual_cross_attention", "cross_attention_norm", "reverse_transformer_layers_per_block",
    ), (None, False)),
)  # fmt: skip
# Sizes, and the most that is still a model.
SIZES = dict(
    in_channels=2**10, out_channels=2**10, block_out_channels=2**14, layers_per_block=64,
    transformer_layers_per_block=64, attention_head_dim=2**10, num_attention_heads=2**10, cross_attention_dim=2**14,
    norm_num_groups=2**10, time_embedding_dim=2**16, addition_time_embed_dim=2**12,
    projection_class_embeddings_input_dim=2**16,
)  # fmt: skip
MOST_LEVELS, MOST_SIDE = 8, 2**12  # of a sample in latents
# What may be one for all levels or one each; block_out_channels is one each, the rest one.
BY_LEVEL = (
    "layers_per_block", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads",
    "cross_attention_dim",
)  # fmt: skip
OPTIONAL = ("num_attention_heads", "time_embedding_dim")  # may be None
ADDED = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")  # so may these, but for SDXL
# `upcast_attention` is read nowhere: SDPA keeps the softmax in fp32, and diffusers ignores the flag with it too.


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with diffusers' defaults filled in. UserError for what this UNet does not compute."""
    if not isinstance(config, Mapping):
        raise UserError("UNet config: not a JSON object")
    config = {**DEFAULTS, **config}
    levels = len(each(config["block_out_channels"]))
    if not 0 < levels <= MOST_LEVELS:
        raise UserError(f"UNet config: block_out_channels has {levels} levels, not 1 to {MOST_LEVELS}")
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(config[key], (list, tuple)) or len(config[key]) != levels:
            raise UserError(f"UNet config: {key} is {config[key]}, not one for each of {levels} levels")
    optional = OPTIONAL if config["addition_embed_type"] == "text_time" else OPTIONAL + ADDED
    for key, most in SIZES.items():
        value = config[key]
        if value is None and key in optional:
            continue
        if key not in ("block_out_channels", *BY_LEVEL) and not _size(value, most):
            raise UserError(f"UNet config: {key} is {value}, not a size")
        if len(each(value)) not in (1, levels) or not all(_size(n, most) for n in each(value)):
            raise UserError(f"UNet config: {key} is {value}, not a size, or one for each of {levels} levels")
    if any(n % config["norm_num_groups"] for n in each(config["block_out_channels"])):
        raise UserError(f"UNet config: {config['norm_num_groups']} groups do not divide {config['block_out_channels']}")
    if not all(type(config[key]) in (int, float) and 0 <= config[key] <= 1 for key in ("norm_eps", "freq_shift")):
        raise UserError("UNet config: norm_eps and freq_shift are numbers from 0 to 1")
    checks = [(key, value, values) for key, values in SUPPORTED.items() for value in each(config.get(key, values[0]))]
    checks.append(("in_channels", config["in_channels"], (config["out_channels"],)))  # inpainting models have more
    for key, value, values in checks:
        if value not in values:
            expected = " or ".join(map(str, values))
            raise UserError(f"UNet config: {key} is {value}, not {expected}: use a base model of SD1.x, SD2.x or SDXL")
    return config


def trained_size(config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """H, W in pixels of what the model of a complete `config` was trained on; `factor` pixels are one latent.

    UserError for a config that does not say.
    """
    size = each(config.get("sample_size"))
    if len(size) not in (1, 2) or not all(_size(side, MOST_SIDE) for side in size):
        raise UserError(f"UNet config: sample_size is {config.get('sample_size')}, not a size, nor height and width")
    return size[0] * factor, size[-1] * factor


def latent_shape(config: Mapping[str, Any], factor: int, resolution: tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, h, w) of an image of H W pixels, None: `trained_size`. UserError for sides that the latents cannot tile."""
    height, width = resolution or trained_size(config, factor)
    multiple = math.lcm(8, factor)
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise UserError(f"resolution {height}x{width}: height and width must be multiples of {multiple}")
    return config["in_channels"], height // factor, width // factor


def _size(value: object, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def each(value: object) -> list[Any]:
    """A setting by level, where it may be one for all."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
