"""`rapm plan` refuses what `rapm train` refuses, and says of a teacher only what it knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers  # noqa: F401  # here, not within a test: its log goes to the stderr of its import for good
import pytest
import tiny
import torch
from safetensors.torch import save_file

from rapm.cli import main
from rapm.loading.families import FAMILIES, NAMES, model_of
from rapm.zoo import EMBEDDED

JUDGE = EMBEDDED.parent / "judge.safetensors"


def plan(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    """The exit code, and what was said: a refusal in one line."""
    code = main(["plan", "--vram", "12G", *map(str, words)])
    said = capsys.readouterr()
    assert not (code and said.out) and said.err.count("\n") == (code != 0)
    return code, said.err or said.out


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("nonsense", "does not exist: give a diffusers folder, a hub id"),
        ("sd3", "does not exist"),
        ("a b", "does not exist"),
        ("/no/such.safetensors", "does not exist"),
        ("no/such.safetensors", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("model.ckpt", "does not exist"),
        ("a--b/c", "no folder a--b/c, nor on the hub"),
        (__file__, "is not a .safetensors file"),
        (Path(__file__).parent, "is not a diffusers folder"),
        (JUDGE, "is not a whole checkpoint of a supported family"),
        ("{here}/style.safetensors", "is a LoRA, not a teacher"),
        ("{here}/old.ckpt", "is a pickle"),
    ],
)
def test_what_is_no_teacher_is_refused(capsys, tmp_path, teacher, message):
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    (tmp_path / "old.ckpt").touch()
    code, said = plan(capsys, "--teacher", str(teacher).format(here=tmp_path))
    assert code == 2 and message in said


def test_prompts_that_cannot_be_read_are_refused(capsys, tmp_path):
    code, said = plan(capsys, "--teacher", "sd15", "--prompts", tmp_path / "nosuch.txt")
    assert code == 2 and "prompts: cannot read" in said
    assert plan(capsys, "--teacher", "sd15", "--prompts", "-")[0] == 0  # those of the run


def test_names_of_families(capsys, monkeypatch, tmp_path):
    assert NAMES == {"sd15": "sd15", "sd1": "sd15", "sd21": "sd21", "sd2": "sd21", "sdxl": "sdxl"}
    assert all(model_of(name.upper()).name == family in FAMILIES for name, family in NAMES.items())
    code, said = plan(capsys, "--teacher", "sd2")
    assert code == 0 and said.startswith("sd21, 768x768") and "taken for" not in said
    (tmp_path / "sd2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert plan(capsys, "--teacher", "sd2")[0] == 2  # what is there is meant, not a name


def test_a_file_is_planned_by_its_header(capsys, tiny_folders, tmp_path):
    """With the published model's sizes: of the file's own, only the resolution is looked at."""
    said = {"modelspec.resolution": "512x640", "modelspec.prediction_type": "epsilon"}  # W x H
    file = tiny.single_file(tiny_folders["sd2"], tmp_path / "model.safetensors", said)
    code, text = plan(capsys, "--teacher", file)
    assert code == 0 and text.startswith("sd21, 640x512")


def cached(cache: Path, hub_id: str, folder: Path, *parts: str) -> Path:
    """`parts` of `folder` as the snapshot of `hub_id` in the hub's cache."""
    repository = cache / ("models--" + hub_id.replace("/", "--"))
    snapshot = repository / "snapshots" / ("0" * 40)
    for part in parts:
        (snapshot / part).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (folder / part).is_dir() else shutil.copy)(folder / part, snapshot / part)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_cached_hub_id_is_not_guessed(capsys, monkeypatch, tiny_folders, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tiny_folders["sdxl"]
    code, said = plan(capsys, "--teacher", "acme/tiny")
    assert code == 0 and said.startswith("sd15") and "note: acme/tiny is not here: taken for sd15" in said
    cached(tmp_path, "acme/tiny", folder, *(path.name for path in folder.iterdir()))
    code, said = plan(capsys, "--teacher", "acme/tiny")
    assert code == 0 and said.startswith("acme/tiny, 128x128") and "taken for" not in said
    assert model_of("acme/tiny") == model_of(str(folder))._replace(name="acme/tiny")
    cached(tmp_path, "acme/cut-xl", folder, "model_index.json", "vae")  # a download that was stopped
    assert model_of("acme/cut-xl") == model_of("sdxl")._replace(guessed=True)
    index = cached(tmp_path, "acme/flux", folder, "model_index.json") / "model_index.json"
    index.write_text('{"_class_name": "FluxPipeline"}')
    code, said = plan(capsys, "--teacher", "acme/flux")
    assert code == 2 and "is a FluxPipeline, not supported yet" in said


def test_the_grid_must_divide_the_teachers_timesteps(capsys, tiny_folders, tmp_path):
    for teacher in ("embedded", "sdxl", "owner/name"):
        code, said = plan(capsys, "--teacher", teacher, "--steps", "7")
        assert code == 2 and "steps 7 x fine_steps 10 = 70 must divide the teacher's 1000 timesteps" in said
    folder = shutil.copytree(tiny_folders["sd1"], tmp_path / "teacher")
    assert plan(capsys, "--teacher", folder)[0] == 0
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": 900}))
    code, said = plan(capsys, "--teacher", folder)
    assert code == 2 and "= 40 must divide the teacher's 900 timesteps" in said
