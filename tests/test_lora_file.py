"""Reading LoRA files as the world writes them, and what is said of those that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exports import CONFIG, FAMILIES, PROMPTS, RANK, rewrite, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from rapm.errors import UserError
from rapm.export.files import FILES, export_lora
from rapm.export.lora_file import WEIGHTS, fold, read_lora, read_text_lora, text_lora
from rapm.export.lora_names import kohya_name, kohya_names, original_names
from rapm.sample import sample_batches


def test_strength_is_folded_into_up(tiny_teacher: Callable, tmp_path: Path) -> None:
    teacher = tiny_teacher("sd1")
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    first, second = list(lora)[:2]

    def patterns(tensors: dict[str, Tensor], metadata: dict) -> None:
        adapter = {**json.loads(metadata["lora_adapter_metadata"]), "unet.alpha_pattern": {first: RANK / 2}}
        metadata["lora_adapter_metadata"] = json.dumps(adapter)

    def alphas(tensors: dict[str, Tensor], metadata: dict) -> None:
        tensors[f"{kohya_name(first)}.alpha"] /= 2
        del tensors[f"{kohya_name(second)}.alpha"]

    for name, change in zip(FILES, (alphas, patterns), strict=True):
        rewrite(tmp_path / name, change)
        weights = read_lora(tmp_path / name, teacher.unet)
        assert torch.equal(weights[first][0], lora[first][0])
        assert torch.equal(weights[first][1], lora[first][1] / 2)
        assert torch.equal(weights[second][1], lora[second][1])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_an_up(path: Path) -> None:
    rewrite(path, lambda tensors, _: tensors.pop(next(key for key in tensors if "lora_up" in key)))


def a_whole_model(path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, path)


def damage_the_header(path: Path) -> None:
    rewrite(path, lambda _, metadata: metadata.update(lora_adapter_metadata="{"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, "not a whole safetensors file"),
        (lambda path: path.write_bytes(b"not safetensors"), "not a whole safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and so on"), "a pickle under another name"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "a Git LFS pointer"),
        (lambda path: path.write_bytes(b"\n<!DOCTYPE html><title>Log in"), "a web page"),
        (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: save_file({}, path), "is empty"),
        (a_whole_model, "no LoRA weight"),
        (drop_an_up, "only a part"),
        (damage_the_header, "damaged lora_adapter_metadata"),
    ],
    ids=[
        "truncated",
        "garbage",
        "renamed pickle",
        "pointer",
        "web page",
        "zero bytes",
        "missing",
        "empty",
        "a checkpoint",
        "half a layer",
        "header",
    ],
)
def test_read_lora_says_what_is_wrong(tiny_teacher: Callable, damage: Callable, message: str, tmp_path: Path) -> None:
    teacher = tiny_teacher("sd1")
    export_lora(tmp_path, trained(teacher.unet), teacher, config=CONFIG, steps_done=7)
    damage(tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path / WEIGHTS, teacher.unet)
    assert str(tmp_path / WEIGHTS) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_pickles_are_refused(tiny_teacher: Callable, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickle"):
        read_lora(path, tiny_teacher("sd1").unet)


@pytest.mark.parametrize("ours, theirs", [("sd1", "sd2"), ("sdxl", "sd1"), ("sd1", "sdxl")])
def test_another_family_is_refused(tiny_teacher: Callable, ours: str, theirs: str, tmp_path: Path) -> None:
    other = tiny_teacher(theirs)
    export_lora(tmp_path, trained(other.unet), other, config=CONFIG, steps_done=7)
    for name in FILES:
        with pytest.raises(UserError, match="the model family it was made for"):
            read_lora(tmp_path / name, tiny_teacher(ours).unet)


OLD = {"lora_down": "lora.down", "lora_up": "lora.up"}  # before diffusers used peft


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_is_read(tiny_teacher: Callable, family: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(family)
    lora, original = trained(teacher.unet), original_names(teacher.unet)
    spellings = {
        "diffusers' names by kohya's trainer": lambda name, part: f"{kohya_name(name)}.{part}.weight",
        "the original names": lambda name, part: f"{kohya_name(original[name])}.{part}.weight",
        "the original paths": lambda name, part: f"diffusion_model.{original[name]}.{part}.weight",
        "old diffusers": lambda name, part: (
            f"unet.{name.replace('.to_', '.processor.to_').removesuffix('.0')}_{OLD[part]}.weight"
            if ".attn" in name
            else f"unet.{name}.{OLD[part]}.weight"
        ),
        "peft": lambda name, part: f"base_model.model.{name}.{'lora_A' if part == 'lora_down' else 'lora_B'}.weight",
    }
    for what, spell in spellings.items():
        tensors = {spell(name, part): x for name, pair in lora.items() for part, x in zip(OLD, pair, strict=True)}
        save_file(tensors, tmp_path / "lora.safetensors")
        weights = read_lora(tmp_path / "lora.safetensors", teacher.unet)
        assert list(weights) == list(lora), what
        for name, pair in lora.items():
            assert all(map(torch.equal, pair, weights[name])), (what, name)


@pytest.mark.parametrize(
    "key, kind",
    [
        ("lora_unet_mid_block_resnets_0_conv1.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block_resnets_0_conv1.lokr_w2_b", "LoKr"),
        ("lora_unet_mid_block_resnets_0_conv1.lokr_w1", "LoKr"),
        ("lora_unet_mid_block_resnets_0_conv1.dora_scale", "DoRA"),
        ("unet.mid_block.resnets.0.conv1.lora_magnitude_vector", "DoRA"),
        ("lora_unet_mid_block_resnets_0_conv1.oft_blocks", "OFT"),
        ("lora_unet_mid_block_resnets_0_conv1.a1.weight", "GLoRA"),
        ("lora_unet_mid_block_resnets_0_conv1.on_input", r"\(IA\)\^3"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "Tucker"),
        ("lora_unet_mid_block_resnets_0_norm1.w_norm", "LyCORIS"),
        ("lora_unet_mid_block_resnets_0_conv1.diff_b", "LyCORIS"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight", "SD3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "SD3"),
    ],
)
def test_other_kinds_are_named(tiny_teacher: Callable, key: str, kind: str, tmp_path: Path) -> None:
    """Beside plain layers too: half of such a file would be another model."""
    teacher, path = tiny_teacher("sd1"), tmp_path / "style.safetensors"
    export_lora(tmp_path, trained(teacher.unet), teacher, config=CONFIG, steps_done=7)
    save_file(load_file(tmp_path / WEIGHTS) | {key: torch.ones(2, 2)}, path)
    for read in (lambda: read_lora(path, teacher.unet), lambda: read_text_lora(path, {})):
        with pytest.raises(UserError, match=kind) as caught:
            read()
        assert str(path) in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("width, family", [(768, "SD1.x"), (1024, "SD2.x"), (2048, "SDXL"), (1280, "refiner")])
@pytest.mark.parametrize("key", ["lora_unet_x_attn2_to_k.lora_down.weight", "unet.x.attn2.to_k.lora_A.weight",
                                 "unet.x.attn2.processor.to_k_lora.down.weight"])  # fmt: skip
def test_the_family_of_a_file_is_named(
    tiny_teacher: Callable, key: str, width: int, family: str, tmp_path: Path
) -> None:
    save_file({key: torch.ones(2, width)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=f"width {width} .*{family}.*this UNet of width 32.*family it was made for"):
        read_lora(tmp_path / "lora.safetensors", tiny_teacher("sd1").unet)


def style(teacher, path: Path, alpha: float = 1.0) -> None:
    """A style LoRA as kohya's trainer writes it, with rank 2 and alpha 1, for UNet and text encoders."""
    tensors, generator = {}, torch.Generator().manual_seed(11)
    stems = {stem: (teacher.unet, name) for name, stem in kohya_names(teacher.unet).items()}
    for encoder, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        if module := getattr(teacher.pipe, encoder, None):
            prefix = prefix if teacher.family == "sdxl" else "lora_te_"
            for name, part in module.named_modules():
                if isinstance(part, torch.nn.Linear) and "projection" not in name:
                    path_ = name if name.startswith("text_model.") else f"text_model.{name}"
                    stems[prefix + path_.replace(".", "_")] = module, name
    for stem, (module, name) in stems.items():
        out, inputs, *kernel = module.get_submodule(name).weight.shape
        shapes = {"lora_down": (2, inputs, *kernel), "lora_up": (out, 2, *(1 for _ in kernel))}
        for part, shape in shapes.items():
            tensors[f"{stem}.{part}.weight"] = 0.2 * torch.randn(shape, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoders_get_their_part(tiny_teacher: Callable, family: str, tmp_path: Path) -> None:
    """As in every client, and as diffusers does it; afterwards the teacher is as before, to the bit."""
    teacher, path = tiny_teacher(family), tmp_path / "style.safetensors"
    style(teacher, path)
    plain = teacher.encode(PROMPTS)
    with text_lora(teacher.pipe, path):
        ours = teacher.encode(PROMPTS)
    assert (ours.hidden - plain.hidden).abs().max() > 0.1
    again = teacher.encode(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True) if a is not None)
    with text_lora(teacher.pipe, None):
        assert torch.equal(teacher.encode(PROMPTS).hidden, plain.hidden)

    encoders = {name: x for name in ("text_encoder", "text_encoder_2") if (x := getattr(teacher.pipe, name, None))}
    parts = read_text_lora(path, encoders)
    assert {encoder: len(weights) for encoder, weights in parts.items()} == dict.fromkeys(encoders, 2 * 6)
    pipe = teacher.stock_pipeline()
    pipe.load_lora_weights(path)
    options = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    stock = pipe.encode_prompt(prompt=PROMPTS, **options)
    assert (stock[0] - ours.hidden).abs().max() <= 1e-5 * ours.hidden.abs().max()
    if family == "sdxl":
        assert (stock[2] - ours.pooled).abs().max() <= 1e-5 * ours.pooled.abs().max()
    assert list(read_lora(path, teacher.unet)) == list(teacher.unet.lora_targets())


def test_a_style_changes_the_samples_through_its_text_encoder(tiny_teacher: Callable, tmp_path: Path) -> None:
    teacher = tiny_teacher("sd1")
    style(teacher, tmp_path / "both.safetensors")
    tensors = load_file(tmp_path / "both.safetensors")
    save_file({k: x for k, x in tensors.items() if "lora_te" not in k}, tmp_path / "unet.safetensors")
    save_file({k: x for k, x in tensors.items() if "lora_te" in k}, tmp_path / "text.safetensors")
    images = [
        next(sample_batches(teacher, PROMPTS[:1], lora_path=tmp_path / f"{name}.safetensors", steps=1))[1]
        for name in ("both", "unet")
    ]
    assert not torch.equal(*images)
    with pytest.raises(UserError, match="nothing for the UNet"):
        next(sample_batches(teacher, PROMPTS[:1], lora_path=tmp_path / "text.safetensors", steps=1))


def test_the_text_encoders_of_another_family_are_refused(tiny_teacher: Callable, tmp_path: Path) -> None:
    save_file({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="text encoders lack"):
        read_text_lora(tmp_path / "lora.safetensors", {"text_encoder": tiny_teacher("sd1").pipe.text_encoder})


def test_folding_is_the_sum(tiny_teacher: Callable) -> None:
    linear, conv = torch.nn.Linear(5, 3), torch.nn.Conv2d(4, 3, 3).half()
    module = torch.nn.ModuleDict({"linear": linear, "conv": conv})
    x, y = torch.randn(7, 5), torch.randn(2, 4, 6, 6)
    lora = {
        "linear": (torch.randn(2, 5), torch.randn(3, 2)),
        "conv": (torch.randn(2, 4, 3, 3), torch.randn(3, 2, 1, 1)),
    }
    expected = linear(x) + 0.5 * x @ lora["linear"][0].T @ lora["linear"][1].T
    inner = torch.nn.functional.conv2d(torch.nn.functional.conv2d(y, lora["conv"][0]), lora["conv"][1])
    both = torch.nn.functional.conv2d(y, conv.weight.float(), conv.bias.float()) + 0.5 * inner
    fold(module, lora, 0.5)
    torch.testing.assert_close(linear(x), expected)
    assert conv.weight.dtype == torch.float16
    halved = torch.nn.functional.conv2d(y, conv.weight.float(), conv.bias.float())
    assert (halved - both).abs().max() <= 4 * 36 * 2**-11 * 4  # 36 products, each weight rounded to 11 bits
