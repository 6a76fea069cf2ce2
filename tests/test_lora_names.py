"""Names of every layer of the full-size UNets, against the rules of the programs that read them.

ComfyUI's and A1111's rules are written here from reading their public code; neither program is run.
"""

from __future__ import annotations

import functools
import re

import diffusers
import full
import pytest
import tiny
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_unet_state_dict_to_peft

from rapm.export.files import TARGETS
from rapm.export.lora_names import kohya_name, kohya_names, original_names, text_encoder_spellings, unet_spellings
from rapm.loading.original import original_name
from rapm.unet import UNet

CONFIGS = {**full.FULL, **{f"tiny {family}": config for family, config in tiny.UNET.items()}}


@functools.cache
def both(family: str) -> tuple[diffusers.UNet2DConditionModel, UNet]:
    """diffusers' UNet and ours, without weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(CONFIGS[family]), UNet(CONFIGS[family])


# Of each level, how many layers; transformer blocks in each layer going down, in the middle, in each layer going up.
COMFY = {
    "sd15": (4, [1, 1, 1, 1, 1, 1, 0, 0], 1, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    "sdxl": (3, [0, 0, 2, 2, 10, 10], 10, [10, 10, 10, 2, 2, 2, 0, 0, 0]),
}
COMFY["sd21"] = COMFY["sd15"]
IN_A_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
               "conv_shortcut": "skip_connection"}  # fmt: skip
IN_A_BLOCK = [f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")]
IN_A_BLOCK += ["ff.net.0.proj", "ff.net.2"]


def comfy_rule(family: str) -> dict[str, str]:
    """ComfyUI's map from names of diffusers' UNet to its own, the original code's; two layers a level going down."""
    levels, down, middle, up = COMFY[family]
    rule = {}

    def resnet(theirs: str, ours: str) -> None:
        rule.update({f"{theirs}.{a}": f"{ours}.{b}" for a, b in IN_A_RESNET.items()})

    def attention(theirs: str, ours: str, blocks: int) -> None:
        rule.update({f"{theirs}.{part}": f"{ours}.{part}" for part in ("proj_in", "proj_out") if blocks})
        for i in range(blocks):
            rule.update(
                {f"{theirs}.transformer_blocks.{i}.{x}": f"{ours}.transformer_blocks.{i}.{x}" for x in IN_A_BLOCK}
            )

    depths = iter(down)
    for level in range(levels):
        for i in range(2):
            block = f"input_blocks.{1 + 3 * level + i}"
            resnet(f"down_blocks.{level}.resnets.{i}", f"{block}.0")
            attention(f"down_blocks.{level}.attentions.{i}", f"{block}.1", next(depths))
        rule[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 + 3 * level}.0.op"
    resnet("mid_block.resnets.0", "middle_block.0")
    attention("mid_block.attentions.0", "middle_block.1", middle)
    resnet("mid_block.resnets.1", "middle_block.2")
    depths = iter(up)
    for level in range(levels):
        for i in range(3):
            block, depth = f"output_blocks.{3 * level + i}", next(depths)
            resnet(f"up_blocks.{level}.resnets.{i}", f"{block}.0")
            attention(f"up_blocks.{level}.attentions.{i}", f"{block}.1", depth)
        rule[f"up_blocks.{level}.upsamplers.0.conv"] = f"{block}.{1 + bool(depth)}.conv"
    return rule


def flat(name: str) -> str:
    return name.replace(".", "_")


@pytest.mark.parametrize("family", full.FULL)
def test_comfyui_finds_every_layer_once(family: str) -> None:
    """Its table has lora_unet_ and the name, diffusers' or its own, for every weight. Forge's is a copy of it."""
    _, unet = both(family)
    rule = comfy_rule(family)
    table = {
        f"lora_unet_{flat(name)}": own for pair in rule.items() for name, own in zip(pair, pair[1:] * 2, strict=True)
    }
    assert table["lora_unet_mid_block_resnets_0_conv1"] == table["lora_unet_middle_block_0_in_layers_2"]
    stems = kohya_names(unet)
    assert {name: table[stem] for name, stem in stems.items()} == {name: rule[name] for name in unet.lora_targets()}
    assert len(set(stems.values())) == len(stems) == {"sd15": 278, "sd21": 278, "sdxl": 788}[family]


def webui_rule(stem: str) -> str:
    """A1111's rewriting of a name in a file to one of its modules, both with underscores; unknown names stay."""
    name = stem.removeprefix("lora_unet_")
    if m := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        side, first = ("input", 1) if m[1] == "down" else ("output", 0)
        inner = flat(IN_A_RESNET.get(m[5], m[5])) if m[3] == "resnets" else m[5]
        return f"{side}_blocks_{first + 3 * int(m[2]) + int(m[4])}_{int(m[3] == 'attentions')}_{inner}"
    if m := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        inner = flat(IN_A_RESNET.get(m[3], m[3])) if m[1] == "resnets" else m[3]
        return f"middle_block_{1 if m[1] == 'attentions' else 2 * int(m[2])}_{inner}"
    if m := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"input_blocks_{3 + 3 * int(m[1])}_0_op"
    if m := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) else 1}_conv"
    return name


@pytest.mark.parametrize("family", full.FULL)
def test_a1111_finds_every_layer_once(family: str) -> None:
    _, unet = both(family)
    rule = comfy_rule(family)
    modules = {flat(rule[name]) for name in unet.lora_targets()}
    found = {name: webui_rule(stem) for name, stem in kohya_names(unet).items()}
    assert found == {name: flat(rule[name]) for name in unet.lora_targets()}
    # why SDXL has the original names: with diffusers' one layer would be dropped
    lost = [name for name in unet.lora_targets() if webui_rule(kohya_name(name)) not in modules]
    assert lost == (["up_blocks.0.upsamplers.0.conv"] if family == "sdxl" else [])


@pytest.mark.parametrize("family", CONFIGS)
def test_original_names_are_those_that_diffusers_converts(family: str) -> None:
    """Its converter of single files turns every original name back into the layer's."""
    stock, unet = both(family)
    names = original_names(unet)
    top = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    top += ["label_emb.0.0", "label_emb.0.2"] if "sdxl" in family else []
    ends = ("weight", "bias")
    checkpoint = {f"model.diffusion_model.{name}.{end}": name for name in (*names.values(), *top) for end in ends}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(stock.config))
    assert {name: converted[f"{name}.weight"] for name in names} == names


@pytest.mark.parametrize("family", CONFIGS)
def test_diffusers_and_peft_find_every_layer_once(family: str) -> None:
    stock, unet = both(family)
    targets, stems = unet.lora_targets(), kohya_names(unet)
    pattern = "|".join(re.escape(name) for name in TARGETS)
    assert set(targets) == {name for name, _ in stock.named_modules() if re.fullmatch(rf"(.*\.)?({pattern})", name)}
    keys = {stem + end: torch.tensor(float(i)) for i, stem in enumerate(stems.values())
            for end in (".lora_down.weight", ".lora_up.weight", ".alpha")}  # fmt: skip
    loader = diffusers.StableDiffusionXLPipeline if "sdxl" in family else diffusers.StableDiffusionPipeline
    options = {"unet_config": stock.config} if "sdxl" in family else {}
    converted, alphas = loader.lora_state_dict(keys, **options)
    converted = convert_unet_state_dict_to_peft(converted)
    wanted = {f"unet.{name}.{part}.weight": i for i, name in enumerate(targets) for part in ("lora_A", "lora_B")}
    assert {key: int(x) for key, x in converted.items()} == wanted
    assert len(alphas) == len(targets)


@pytest.mark.parametrize("family", full.FULL)
def test_no_two_layers_share_a_spelling(family: str) -> None:
    _, unet = both(family)
    spellings = unet_spellings(unet)
    targets = unet.lora_targets()
    per_layer = 8 - 1  # a path without to_q and its like has no `processor` in it, which leaves six
    assert set(spellings.values()) == set(targets)
    assert 6 * len(targets) <= len(spellings) <= (per_layer + 1) * len(targets)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    for name in (layer, f"unet.{layer}", kohya_name(layer), layer.replace(".to_out.0", ".processor.to_out")):
        assert spellings[name] == layer


def test_text_encoders_of_both_versions_of_transformers() -> None:
    encoders = {"text_encoder": tiny._text_encoder(32), "text_encoder_2": tiny._text_encoder(40, projected=True)}
    spellings = text_encoder_spellings(encoders)
    path = "text_model_encoder_layers_1_mlp_fc1"
    for name, encoder in (
        (f"lora_te_{path}", "text_encoder"),
        (f"lora_te1_{path}", "text_encoder"),
        (f"lora_te2_{path}", "text_encoder_2"),
        ("text_encoder.text_model.encoder.layers.1.mlp.fc1", "text_encoder"),
    ):
        found, layer = spellings[name]
        assert found == encoder
        assert layer.endswith("encoder.layers.1.mlp.fc1")
        encoders[found].get_submodule(layer)


def test_a_number_of_layers_for_each_level() -> None:
    """The blocks are numbered through without gaps, whatever a level has; equal numbers are the one number."""
    config = {**tiny.SD1, "layers_per_block": [1, 3, 2]}
    with torch.device("meta"):
        names = original_names(UNet(config))
    assert len({*names.values()}) == len(names)
    for part, count in (("input", 1 + 1 + 3 + 2 + 2), ("output", 1 + 3 + 2 + 3)):  # one more a level, or a resampling
        numbers = {int(name.split(".")[1]) for name in names.values() if name.startswith(f"{part}_blocks")}
        assert numbers == set(range(part == "input", count))
    alike = {**tiny.SD1, "layers_per_block": [1, 1, 1]}
    with torch.device("meta"):
        layers = UNet(alike).lora_targets()
    assert all(original_name(name, alike) == original_name(name, tiny.SD1) for name in layers)
