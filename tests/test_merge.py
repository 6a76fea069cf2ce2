"""The merged pipeline: that it samples as the student does without a LoRA, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from exports import PROMPTS, latents, trained
from safetensors import SafetensorError
from safetensors.torch import load_file

from rapm.errors import ExportError, RunError
from rapm.export.lora_file import folded
from rapm.export.merge import MERGED, export_merged, verify_merged
from rapm.sample import sample
from rapm.stop import advice


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_it_samples_as_the_student_does(tiny_teacher: Callable, family: str, tmp_path: Path, capfd) -> None:
    teacher = tiny_teacher(family)
    lora, noise = trained(teacher.unet), latents(teacher)
    before = {name: x.clone() for name, x in teacher.unet.state_dict().items()}
    path = export_merged(tmp_path, lora, teacher)
    assert path == tmp_path / MERGED and [x.name for x in tmp_path.iterdir()] == [MERGED]
    capfd.readouterr()
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    assert "outdated" not in capfd.readouterr().err
    scheduler = pipe.scheduler.config
    assert type(pipe.scheduler) is diffusers.DDIMScheduler and scheduler.timestep_spacing == "trailing"
    assert not scheduler.set_alpha_to_one and not scheduler.clip_sample
    assert scheduler.prediction_type == teacher.schedule.prediction
    stock = pipe(PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="latent").images
    ours = sample(teacher.unet, teacher.schedule, teacher.encode(PROMPTS), noise, 4, lora=lora)
    assert (stock - ours).abs().max() <= 1e-4 * ours.std()
    assert all(torch.equal(x, before[name]) for name, x in teacher.unet.state_dict().items())
    assert teacher.pipe.unet is None and teacher.pipe.scheduler.config.steps_offset == 0
    assert str(tmp_path.parent) not in "".join(file.read_text() for file in path.rglob("*.json"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_part_is_in_the_dtype(tiny_teacher: Callable, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = tiny_teacher("sd1")
    lora = trained(teacher.unet)
    path = export_merged(tmp_path, lora, teacher, dtype=dtype)
    files = list(path.rglob("*.safetensors"))
    assert sorted(file.parent.name for file in files) == ["text_encoder", "unet", "vae"]
    for file in files:
        assert {x.dtype for x in load_file(file).values() if x.is_floating_point()} == {dtype}, file
    unet = load_file(path / "unet/diffusion_pytorch_model.safetensors")
    for name, layer in teacher.unet.lora_targets().items():
        assert torch.equal(unet[f"{name}.weight"], folded(layer.weight, lora[name]).to(dtype)), name
    assert next(teacher.pipe.vae.parameters()).dtype == torch.float32
    proof = dict(prompts=PROMPTS[:1], noise=latents(teacher)[:1], steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # as of an argument that diffusers has renamed
        assert verify_merged(path, teacher, lora, **proof, dtype=dtype) > 0
    pipe = type(teacher.pipe).from_pretrained(path, torch_dtype=dtype)  # as the last line says
    pipe(PROMPTS[0], num_inference_steps=1, guidance_scale=1.0, height=64, width=64, output_type="latent")
    lora[next(iter(lora))][1].mul_(30)
    with pytest.raises(ExportError, match="latents differ"):
        verify_merged(path, teacher, lora, **proof, dtype=dtype)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_the_old_one(
    tiny_teacher: Callable, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher("sd1")
    (tmp_path / MERGED).mkdir()
    (tmp_path / MERGED / "model_index.json").write_text("{}")

    def fill(self, folder: Path, **options: object) -> None:
        Path(folder).mkdir()
        Path(folder, "half").write_bytes(b"half")
        raise error

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_pretrained", fill)
    with pytest.raises(RunError, match=r"No space left.*; once that is mended, try again"), advice("try again"):
        export_merged(tmp_path, trained(teacher.unet), teacher)
    assert json.loads((tmp_path / MERGED / "model_index.json").read_text()) == {}
    assert os.listdir(tmp_path) == [MERGED]


def test_a_second_one_replaces_the_first(tiny_teacher: Callable, tmp_path: Path) -> None:
    teacher = tiny_teacher("sd1")
    (tmp_path / MERGED).mkdir()
    (tmp_path / MERGED / "old").touch()
    export_merged(tmp_path, trained(teacher.unet), teacher, dtype=torch.float16)
    assert os.listdir(tmp_path) == [MERGED]
    assert not (tmp_path / MERGED / "old").exists() and (tmp_path / MERGED / "model_index.json").exists()
