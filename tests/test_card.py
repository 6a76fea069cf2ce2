"""The model card: what it says, that no prompt can break it, and that its snippet runs as pasted."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from exports import CONFIG, HOSTILE, PROMPTS, latents, trained

from rapm.export.card import write_model_card
from rapm.export.clients import WORKFLOW, webui_settings
from rapm.export.files import export_lora
from rapm.export.lora_file import WEIGHTS
from rapm.sample import sample
from rapm.teacher import load_teacher


def test_model_card(tiny_teacher: Callable, tmp_path: Path) -> None:
    teacher = tiny_teacher("sdxl")
    metrics = {"teacher 40": {"FD": 1.23456, "calls": 80}, "student | 4": {"FD": 2.0, "calls": 4}}
    write_model_card(tmp_path, teacher, config=CONFIG, prompts=[HOSTILE, "plain"], steps_done=7, metrics=metrics)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(front)
    assert "base_model" not in front and "# RAPM 4-step LoRA of base-sdxl\n" in body  # nobody else has the folder
    assert front["library_name"] == "diffusers" and front["license"]
    tags = {"text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion-xl"}
    assert tags <= set(front["tags"])
    assert front["widget"] == [{"text": HOSTILE, "output": {"url": "samples.png"}}]
    assert "evil" not in front
    assert "\n| student \\| 4 | 2 | 4 |\n" in body and "\n| teacher 40 | 1.235 | 80 |\n" in body
    assert "\n| iterations | 7 |\n" in body
    assert body.count("\n```") == 4  # the fences of the snippet and of the settings alone
    assert '\n- a "quoted" \\`tick\\` \\| pipe' in body


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_snippet_runs_as_pasted(
    tiny_teacher: Callable, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher(family)
    if family == "sdxl":  # with a LoRA of its own, fused when it is loaded
        export_lora(tmp_path / "style", trained(teacher.unet, seed=6), teacher, config=CONFIG, steps_done=7)
        style = f"{tmp_path / 'style'}:0.7"
        teacher = load_teacher(teacher.source, device="cpu", dtype=torch.float32, loras=[style])
    else:  # whose weights are of a variant only
        shutil.copytree(teacher.source, tmp_path / "variant")
        for path in (tmp_path / "variant").rglob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
        teacher = load_teacher(str(tmp_path / "variant"), device="cpu", dtype=torch.float32)
    lora, noise = trained(teacher.unet), latents(teacher)
    folder = tmp_path / 'run "1"'
    export_lora(folder, lora, teacher, config=CONFIG, steps_done=7)
    monkeypatch.chdir(tmp_path)
    write_model_card(folder.name, teacher, config=CONFIG, prompts=[HOSTILE])  # and read in another place
    snippet = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pasted: dict = {}
    exec(compile(snippet, "README.md", "exec"), pasted)
    assert Path("sample.png").is_file()
    assert pasted["image"].size == (128, 128)
    assert pasted["prompt"] == HOSTILE
    stock = pasted["pipe"](
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="latent"
    ).images  # fmt: skip
    ours = sample(teacher.unet, teacher.schedule, teacher.encode(PROMPTS), noise, 4, lora=lora)
    assert (stock - ours).abs().max() <= 1e-4 * ours.std()


def test_the_snippet_of_other_sources(tiny_teacher: Callable, tmp_path: Path) -> None:
    """The bundled teacher wherever it is installed, a hub id as it is, a single file."""
    teacher = tiny_teacher("sd1")
    file = tmp_path / "my model.safetensors"
    file.touch()
    sources = {
        "embedded": 'from_pretrained(Path(rapm.__file__).parent / "zoo" / "embedded", torch',
        "someone/model": 'from_pretrained("someone/model",',
        str(file): f'from_single_file("{file.resolve().as_posix()}",',
    }
    for source, expected in sources.items():
        teacher = dataclasses.replace(teacher, source=source)
        write_model_card(tmp_path, teacher, config=CONFIG, prompts=PROMPTS)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert expected in card
        compile(re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1], "README.md", "exec")
        front = yaml.safe_load(card.removeprefix("---\n").split("\n---\n", 1)[0])
        assert front.get("base_model") == ("someone/model" if source == "someone/model" else None)
        assert f"# RAPM 4-step LoRA of {file.stem if source == str(file) else source}\n" in card


@pytest.mark.parametrize("prompt", ["- item", "12. of may", "# no title", "---", "<script>", "> quote", "| a | b |"])
def test_no_prompt_is_markup(tiny_teacher: Callable, prompt: str, tmp_path: Path) -> None:
    write_model_card(tmp_path, tiny_teacher("sd1"), config=CONFIG, prompts=["plain", prompt])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    line = card[card.index("\n- plain\n") + len("\n- plain\n") :].partition("\n")[0]
    assert re.sub(r"\\(?=[^\w\s])", "", line) == f"- {prompt}"  # the prompt, once the escapes are taken as such
    assert not re.match(r"- (-|\d+\. |#|<|>|\|)", line)


def test_how_to_use_it_elsewhere(tiny_teacher: Callable, tmp_path: Path) -> None:
    """In the model's repository the snippet names it, and what to paste into A1111 is one block of its own."""
    teacher = tiny_teacher("sdxl")
    write_model_card(tmp_path, teacher, config=CONFIG, prompts=PROMPTS, repo="me/demo")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f'pipe.load_lora_weights("me/demo", weight_name="{WEIGHTS}")\n' in card
    assert str(tmp_path) not in card and str(Path(teacher.source).resolve().parent) not in card
    assert f'from_pretrained("{Path(teacher.source).name}", torch_dtype=dtype)' in card
    assert f"\n```\n{webui_settings(teacher, CONFIG)}\n```\n" in card
    assert f"models/loras/demo.safetensors`, and drop `{WORKFLOW}`" in card and "models/Lora/demo.safetensors" in card
    write_model_card(tmp_path, dataclasses.replace(teacher, source="embedded"), config=CONFIG, prompts=PROMPTS)
    assert not {"ComfyUI", "A1111"} & set(re.findall(r"\w+", (tmp_path / "README.md").read_text(encoding="utf-8")))
