"""Finding a teacher: single files, the hub's cache, what contradicts itself, and what a user gives by mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import tiny
import torch
from full import FULL
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from rapm.cli import main, pick_preset
from rapm.errors import UserError
from rapm.loading import single_file
from rapm.loading.families import model_of
from rapm.loading.original import original_name
from rapm.loading.single_file import base_parts, config_folder, family_of
from rapm.loading.source import find
from rapm.loading.weights import Header
from rapm.teacher import load_teacher
from rapm.unet import UNet

FAMILIES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}  # and their names in full.py
V = {"v_pred": torch.zeros(0)}


@pytest.fixture(scope="module")
def folders(tiny_folders) -> dict[str, Path]:
    return tiny_folders


@pytest.fixture(scope="module")
def tiny_bases(folders, tmp_path_factory) -> Path:
    return tiny.bases(folders, tmp_path_factory.mktemp("bases") / "bases")


@pytest.fixture
def bases(tiny_bases, monkeypatch) -> None:
    """The tiny models' configs in the place of the published ones."""
    monkeypatch.setattr(single_file, "BASES", tiny_bases)


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["sd1"], tmp_path / "copy"))


def load(source, dtype=torch.float32):
    return load_teacher(str(source), device="cpu", dtype=dtype)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_is_its_folder(folders, bases, family, tmp_path):
    """Text, UNet and schedule as of the folder; diffusers' own conversion gives the UNet's weights the same names."""
    file = tiny.single_file(folders[family], tmp_path / "model.safetensors", {"modelspec.prediction_type": "epsilon"})
    if family == "sd2":
        file = tiny.single_file(folders[family], file, {"modelspec.resolution": "128x128"}, **V)
    teacher, wanted = load(file), load(folders[family])
    assert (teacher.family, teacher.default_resolution) == (family, (128, 128))
    assert teacher.fingerprint == wanted.fingerprint
    assert not any(p.requires_grad for p in teacher.unet.parameters())
    assert teacher.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    prompts = ["a red circle", "Two dogs, on a hill."]
    for ours, theirs in zip(teacher.encode(prompts), wanted.encode(prompts), strict=True):
        assert ours is None or torch.equal(ours, theirs)
    stock = teacher.stock_pipeline()
    for name, x in stock.unet.state_dict().items():
        assert torch.equal(x, teacher.unet.get_parameter(name)), name
    for ours, theirs in zip(teacher.pipe.vae.parameters(), wanted.pipe.vae.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file(folders, bases, tmp_path, dtype):
    file = tiny.single_file(folders["sd1"], tmp_path / "model.safetensors")
    save_file(
        {name: x.to(dtype) for name, x in load_file(file).items()}, file, {"modelspec.prediction_type": "epsilon"}
    )
    teacher = load(file, torch.bfloat16)
    source = load_file(folders["sd1"] / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(teacher.unet.conv_in.weight, source.to(dtype).to(torch.bfloat16))
    assert teacher.pipe.text_encoder.dtype == teacher.pipe.vae.dtype == torch.float32
    assert teacher.stock_pipeline().unet.dtype == torch.bfloat16


def test_the_shipped_bases_are_the_published_models():
    """Every weight of the full-size models has a place, by diffusers' converter too; parameters as the models have."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    text = {"sd1": [123_060_480], "sd2": [340_387_840], "sdxl": [123_060_480, 694_659_840]}
    for family, full in FAMILIES.items():
        parts = base_parts(family, Header({}, {}))
        with torch.device("meta"):
            unet, stock = UNet(parts["unet"]), UNet2DConditionModel.from_config(FULL[full])
            assert sum(p.numel() for p in AutoencoderKL.from_config(parts["vae"]).parameters()) == 83_653_863
            encoders = [CLIPTextModel(CLIPTextConfig(**parts["text_encoder"]))]
            if family == "sdxl":
                encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**parts["text_encoder_2"])))
        assert [sum(p.numel() for p in encoder.parameters()) for encoder in encoders] == text[family]
        shapes = {name: x.shape for name, x in unet.state_dict().items()}
        assert shapes == {name: x.shape for name, x in stock.state_dict().items()}
        original = {single_file.UNET + original_name(name, unet.config): name for name in shapes}
        assert convert_ldm_unet_checkpoint(original, parts["unet"]) == {name: name for name in shapes}
        with config_folder(parts) as folder:
            for name in ("tokenizer", "tokenizer_2")[: len(encoders)]:
                tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=name)
                pad = 0 if family == "sd2" or name == "tokenizer_2" else 49407
                ids = tokenizer("A photo of a cat", padding="max_length").input_ids
                assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70  # CLIP's own


@pytest.mark.parametrize(
    ("metadata", "extra", "yaml", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, {}, None, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, {}, None, "epsilon"),
        ({}, V, None, "v_prediction"),
        ({}, V | {"ztsnr": torch.zeros(0)}, None, "v_prediction zero"),
        ({}, {}, '  params:\n    parameterization: "v"\n', "v_prediction"),
        ({}, {}, "  params:\n    linear_start: 0.00085\n", "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v1"}, {}, None, None),
        ({"modelspec.prediction_type": "epsilon"}, V, None, "its key v_pred says v_prediction, its header .*epsilon"),
        (
            {"modelspec.prediction_type": "v"},
            {},
            "params:\n",
            "its header .*v.* says v_prediction, model.yaml says eps",
        ),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, {}, None, "says stable-diffusion-xl-.* are sd1's"),
    ],
)
def test_what_a_file_says_of_itself(folders, bases, tmp_path, metadata, extra, yaml, expected):
    file = tiny.single_file(folders["sd1"], tmp_path / "model.safetensors", metadata, **extra)
    if yaml is not None:
        file.with_suffix(".yaml").write_text(yaml)
    if expected and "says" in expected:
        with pytest.raises(UserError, match=f"contradicts itself: .*{expected}") as error:
            find(str(file))
        assert "\n" not in str(error.value)
        return
    found = find(str(file))
    assert found.prediction == (expected and expected.split()[0])
    assert found.parts["scheduler"]["rescale_betas_zero_snr"] == ("zero" in (expected or ""))


def test_the_size_that_a_header_gives(folders, bases, tmp_path):
    metadata = {"modelspec.resolution": "64x128", "modelspec.prediction_type": "epsilon"}
    teacher = load(tiny.single_file(folders["sd1"], tmp_path / "model.safetensors", metadata))
    assert teacher.default_resolution == (128, 64)


def test_a_file_that_says_nothing_is_asked(folders, bases, tmp_path, capsys):
    """The tiny networks answer with the noise: epsilon, and SD2's smaller size. One that answers with nothing: v."""
    file = tiny.single_file(folders["sd2"], tmp_path / "model.safetensors")
    teacher = load(file)
    assert "does not say what it predicts" in (said := capsys.readouterr().out) and said.endswith("says epsilon\n")
    assert teacher.schedule.prediction == teacher.pipe.scheduler.config.prediction_type == "epsilon"
    assert teacher.default_resolution == (80, 80) and teacher.stock_pipeline().unet.config.sample_size == 10
    state = load_file(file)
    state["model.diffusion_model.out.2.weight"].zero_()
    save_file(state, file)
    teacher = load(file)
    assert teacher.schedule.prediction == "v_prediction" and teacher.default_resolution == (128, 128)


ONE = torch.zeros(1, 4, 1, 1)
CONV, CLIP = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x.weight"
WRONG = {
    "flux": ({"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": ONE}, "flux-.*not supported yet"),
    "sd3": ({"model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight": ONE}, "sd35_large.*not supported yet"),
    "kohya": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": ONE}, "is a LoRA, not a teacher.*_lora"),
    "peft": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": ONE}, "is a LoRA, not a teacher"),
    "refiner": ({CONV: ONE, "conditioner.embedders.0.model.ln_final.bias": ONE}, "is SDXL's refiner"),
    "inpainting": ({CONV: torch.zeros(1, 9, 1, 1), CLIP: ONE}, "is an inpainting model .* takes 9 channels, not 4"),
    "edm": ({CONV: ONE, CLIP: ONE, "edm_mean": ONE}, "is an EDM model"),
    "no_vae": ({CONV: ONE, CLIP: ONE}, "holds no VAE"),
    "pruned": ({CONV: ONE}, "no text encoder that is known"),
    "part": ({"down_blocks.0.resnets.0.conv1.weight": ONE}, "one part of a diffusers pipeline: give the folder"),
    "bare": (
        {CONV: ONE, CLIP.replace("text_model.", ""): ONE, "first_stage_model.x": ONE},
        r"lacks `text_model` in the names of its text encoder .*: save it again with ComfyUI",
    ),
    "else": ({"some.weight": ONE}, "is not a whole checkpoint of a supported family"),
}


def refused(capsys, source: object, message: str) -> None:
    """As a user meets it: exit code 2, one line."""
    assert main(["sample", "--teacher", str(source), "a cat"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_no_teacher_is_named(capsys, tmp_path, kind):
    tensors, message = WRONG[kind]
    tensors = {name: x.clone() for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    refused(capsys, tmp_path / "model.safetensors", message)


def test_a_damaged_or_foreign_file(folders, bases, capsys, tmp_path):
    file = tiny.single_file(folders["sd1"], tmp_path / "whole.safetensors", {"modelspec.prediction_type": "epsilon"})
    data, state = file.read_bytes(), load_file(file)
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "garbage.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q")
    (tmp_path / "model.txt").write_text("a model")
    nan = {**state, "model.diffusion_model.out.2.weight": state["model.diffusion_model.out.2.weight"] * torch.nan}
    save_file(nan, tmp_path / "nan.safetensors", {"modelspec.prediction_type": "epsilon"})
    lacks = {name: x for name, x in state.items() if not name.endswith("out.2.bias")}
    save_file(lacks, tmp_path / "lacks.safetensors")
    save_file({**state, "model.diffusion_model.label_emb.0.0.weight": ONE}, tmp_path / "more.safetensors")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "lora").mkdir()
    save_file({"x": ONE}, tmp_path / "lora/pytorch_lora_weights.safetensors")
    for name, message in {
        "cut.safetensors": "not a whole safetensors file .*: download it again",
        "garbage.safetensors": "not a whole safetensors file",
        "empty.safetensors": "not a whole safetensors file",
        "model.ckpt": "is a pickle, which can run any code .*: take the .safetensors version, or convert it",
        "model.txt": "is not a .safetensors file: give a diffusers folder",
        "nan.safetensors": "conv_out.weight holds numbers that are not finite",
        "lacks.safetensors": r"do not fit .*Missing key: conv_out.bias, of \[4\]",
        "more.safetensors": "do not fit .*unexpected key: model.diffusion_model.label_emb",
        "missing": "does not exist: give a diffusers folder, a hub id",
        "missing/x.safetensors": "does not exist: give a diffusers folder, a hub id",
        "nothing": r"is not a diffusers folder \(no model_index.json\): give",
        "lora": "it holds a LoRA: give its base model as --teacher",
    }.items():
        refused(capsys, tmp_path / name, message)
    clip = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"  # diffusers passes over it
    save_file({name: x for name, x in state.items() if name != clip}, tmp_path / "lacks.safetensors")
    refused(capsys, tmp_path / "lacks.safetensors", r"lacks text_encoder\..*layers.1.mlp.fc1.bias: get the whole of it")
    state["model.diffusion_model.out.2.bias"] += 1e6
    save_file(state, file, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(UserError, match=r"conv_out.bias is too large for torch\.float16: use --mixed_precision bf16"):
        load(file, torch.float16)


def test_headers_of_impossible_shapes_and_sizes():
    """safetensors takes shapes of no elements that torch refuses, and any text as metadata."""
    conv, text = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"
    for shapes, message in (
        ({conv: [320], text: [0]}, "its UNet takes 0 channels, not 4"),
        ({"x": [0, 2**62, 2**62]}, "is not a whole checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            family_of(Path("x.safetensors"), Header(shapes, {}))
    for size in ("0x0", f"{'8' * 5000}x8"):
        assert base_parts("sd1", Header({}, {"modelspec.resolution": size}))["unet"]["sample_size"] == 64


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "is a FluxPipeline, not supported yet: supported .* SD1.x",
        ),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline, not supp"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "no inpainting"),
        ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "no refiner"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "says StableDiffusionXLP.* is sd1's: one is",
        ),
        ("model_index.json", {"text_encoder": [None, None]}, "is a refiner, or has no text encoder: supported"),
        ("unet/config.json", {"in_channels": 9}, "in_channels is 9"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type is image"),
        ("unet/config.json", {"cross_attention_dim": 48}, "has cross_attention_dim 48, but the text is 32 wide"),
        ("unet/config.json", {"block_out_channels": [32, 64, 96]}, r"do not fit .*Missing key: .* of \[96, 64, 1, 1\]"),
        ("unet/config.json", {"sample_size": None}, "sample_size is None, not a size"),
        (
            "unet/config.json",
            {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
            "0 levels, not 1 to 8",
        ),
        ("unet/config.json", {"norm_num_groups": [32]}, r"norm_num_groups is \[32\], not a size"),
        ("unet/config.json", {"layers_per_block": []}, r"layers_per_block is \[\], not a size, or one for each of 3"),
        ("text_encoder/config.json", {"hidden_size": "32"}, "has cross_attention_dim 32, but the text is 32 wide"),
        ("text_encoder/config.json", {"num_attention_heads": []}, "does not load"),
        ("vae/config.json", {"act_fn": -1}, r"does not load \(.*\): get it again"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps 0 is not a number from 1"),
        ("scheduler/scheduler_config.json", {"beta_end": None}, "beta_end has None, not a number from 0 to 1"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 9}, "its betas are no noise schedule"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "'flow_prediction' is not"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero terminal SNR .* needs .*v_pred"),
    ],
)
def test_a_folder_that_is_unsupported_or_of_two_minds(copy, file, changes, message):
    edit_json(copy / file, **changes)
    with pytest.raises(UserError, match=message) as error:
        load(copy)
    assert "\n" not in str(error.value)


def test_a_folder_with_a_broken_part(copy, capsys):
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    save_file(load_file(weights), weights, {"modelspec.prediction_type": "v"})
    refused(capsys, copy, "scheduler_config.json says epsilon, its header .* says v_prediction")
    weights.write_bytes(data[:-100])
    refused(capsys, copy, "diffusion_pytorch_model.safetensors is not a whole safetensors file")
    weights.write_bytes(data)
    edit_json(copy / "text_encoder/config.json", hidden_size=24)
    refused(capsys, copy, "has cross_attention_dim 32, but the text is 24 wide")
    edit_json(copy / "text_encoder/config.json", hidden_size=32)
    text = copy / "text_encoder/model.safetensors"
    whole, lacks = text.read_bytes(), load_file(text)
    del lacks[next(name for name in lacks if name.endswith("layers.1.mlp.fc1.bias"))]  # transformers makes it up
    save_file(lacks, text, {"format": "pt"})
    refused(capsys, copy, r"copy lacks text_encoder\..*layers.1.mlp.fc1.bias: get the whole of it")
    text.write_bytes(whole[:-100])
    refused(capsys, copy, "does not load")
    text.rename(copy / "text_encoder/pytorch_model.bin")
    refused(capsys, copy, "does not load")
    weights.rename(copy / "unet/diffusion_pytorch_model.bin")
    refused(capsys, copy, "only safetensors is read")
    (copy / "model_index.json").write_text("{")
    refused(capsys, copy, "not a readable JSON file")


def test_the_preset_is_that_of_the_family(folders, bases, tmp_path):
    xl = tiny.single_file(folders["sdxl"], tmp_path / "anime.safetensors")
    assert pick_preset(str(xl), None) == pick_preset(str(folders["sdxl"]), "sdxl") == "sdxl"
    assert pick_preset(str(folders["sd2"]), None) == pick_preset("owner/name", None) == "sd15"
    assert model_of(str(xl)).name == "sdxl" and model_of("owner/name").name == "sd15"
    assert pick_preset("owner/name-xl", None) == "sdxl" and pick_preset("embedded", None) == "embedded"
    for source, wanted, message in (
        (xl, "sd15", "is sdxl: use --preset sdxl"),
        (folders["sd1"], "sdxl", "is sd1: use"),
    ):
        with pytest.raises(UserError, match=f"--preset {wanted}, but the teacher .* {message}"):
            pick_preset(str(source), wanted)


def cached(home: Path, hub_id: str, folder: Path) -> None:
    """`folder` as a snapshot in the hub's cache."""
    repository = home / "hub" / ("models--" + hub_id.replace("/", "--"))
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)


@pytest.fixture
def home(folders, tmp_path) -> Path:
    """An HF_HOME that holds a tiny SDXL, acme/tiny, and the index of another pipeline, acme/flux."""
    cached(tmp_path / "home", "acme/tiny", folders["sdxl"])
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    cached(tmp_path / "home", "acme/flux", tmp_path / "flux")
    return tmp_path / "home"


def test_hub_ids_with_hf_hub_offline(folders, home, capsys, monkeypatch):
    """conftest has set HF_HUB_OFFLINE; the cache's place is looked up at each call."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    assert load("acme/tiny").fingerprint == load(folders["sdxl"]).fingerprint
    refused(capsys, "acme/flux", "acme/flux is a FluxPipeline, not supported yet")
    refused(capsys, "acme/other", "nor is it in the hub's cache .*hub, and HF_HUB_OFFLINE is set: fetch it once")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written(capsys, monkeypatch, number):
    def download(*names: str) -> None:
        raise OSError(number, os.strerror(number), "a folder of the cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    refused(capsys, "acme/new", rf"cannot be written \({os.strerror(number)}\): set HF_HOME to a folder that can")


def status(number: int) -> HfHubHTTPError:
    return HfHubHTTPError(f"{number} of the hub", response=httpx.Response(number, request=httpx.Request("GET", "x:/")))


def wrapped(cause: Exception) -> OSError:
    """As diffusers raises what the hub said."""
    error = OSError("Cannot load model acme/new")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (httpx.ConnectError("Name or service not known"), r"broke off \(Name or .*\): the same command goes on"),
        (httpx.ReadTimeout("The read operation timed out"), "broke off"),
        (RuntimeError("Data processing error: Network error"), r"broke off \(Data processing error"),  # hf_xet's
        (ConnectionError("Connection reset by peer"), "broke off"),
        (status(503), "broke off"),
        (wrapped(httpx.ConnectError("")), r"broke off \(Cannot load"),
        (wrapped(OfflineModeIsEnabled("")), r"nor on the hub \(Cannot load"),
        (status(403), r"nor on the hub \(403 of the hub"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file"),
            "disk of the hub's cache .* is full: free some .*, or set HF_HOME",
        ),
        (OSError(errno.ENOSPC, "in Windows' words"), "disk of the hub's cache .* is full"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "disk of the hub's cache .* is full: free some .*, or set HF_HOME",
        ),
    ],
)
def test_a_download_that_fails_half_way(folders, capsys, monkeypatch, error, message):
    def download(*names: str, **options: object) -> None:
        raise error

    index = str(folders["sd1"] / "model_index.json")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: index)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    refused(capsys, "acme/new", f"acme/new.* {message}")


UNREACHABLE = """
import sys, torch
from pathlib import Path
from rapm.loading import single_file
from rapm.errors import UserError
from rapm.teacher import load_teacher
single_file.BASES = Path(sys.argv[1])
for source in sys.argv[2:]:
    try:
        print(">", load_teacher(source, device="cpu", dtype=torch.float32).fingerprint)
    except UserError as error:
        print(">", error)
"""


def test_without_a_network(folders, tiny_bases, home, tmp_path):
    """Files need none; hub ids come from the cache. In a process of its own: the hub's address is read at import."""
    file = tiny.single_file(folders["sd2"], tmp_path / "model.safetensors", **V)
    nobody = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    output = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, str(tiny_bases), str(file), "acme/tiny", "acme/flux", "acme/other"],
        env={**os.environ, **nobody, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    lines = [line[2:] for line in output.stdout.splitlines() if line.startswith("> ")]
    assert len(lines) == 4, output.stderr
    assert lines[:2] == [load(folders[family]).fingerprint for family in ("sd2", "sdxl")]
    assert lines[2].startswith("teacher: acme/flux is a FluxPipeline, not supported yet")
    assert "nor is it in the hub's cache" in lines[3] and "the hub cannot be reached: fetch it once" in lines[3]
