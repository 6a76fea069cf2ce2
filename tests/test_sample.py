"""The sampler against the stock pipeline, and the files that `rapm sample` draws."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from rapm.config import Config
from rapm.draw import draw
from rapm.errors import UserError
from rapm.export.clients import webui_settings
from rapm.export.files import export_lora
from rapm.lora import LoRA
from rapm.sample import sample, sample_batches
from rapm.solver import walk
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import noise

FAMILIES = ["sd1", "sd2", "sdxl"]
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Teacher]:
    """The tiny teacher of a family, its files written once."""
    root, folders = tmp_path_factory.mktemp("teachers"), {}

    def teacher(family: str, dtype: torch.dtype = torch.float32) -> Teacher:
        if family not in folders:
            folders[family] = tiny.tiny_pipeline(family, root / family)
        return load_teacher(str(folders[family]), device="cpu", dtype=dtype)

    return teacher


def latents(teacher: Teacher, resolution: tuple[int, int] | None = None) -> Tensor:
    shape = teacher.latent_shape(resolution)
    return torch.stack([noise(seed, shape) for seed in range(len(PROMPTS))])


def pictures(teacher: Teacher, prompts: list[str], **options: object) -> Tensor:
    """All of `sample_batches` together: B H W 3."""
    return torch.cat([images for _, images in sample_batches(teacher, prompts, **options)])


# What the latents may differ by, in their standard deviations. fp64 network: what is left are the stock sampler's fp32
# coefficients and our fp32 positions, some 1e-6. fp32: the bar for the recipe, which has no guidance; guidance of w
# multiplies the rounding of two network calls by about 2 w, so it is compared in fp64.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
CASES = {  # steps, guidance
    torch.float64: [(3, 5.0), (4, 7.5)],
    torch.float32: [(1, 1.0), (3, 1.0), (4, 1.0), (7, 1.0)],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_stock_pipeline(load: Callable, family: str, dtype: torch.dtype) -> None:
    """Also where the steps do not divide the schedule, and on a picture that is not square."""
    teacher = load(family, dtype)
    pipe = teacher.stock_pipeline()
    start = latents(teacher, (112, 136))
    text, negative = teacher.encode(PROMPTS, (112, 136)), teacher.encode_negative("a cat", (112, 136))
    for steps, guidance in CASES[dtype]:
        stock = pipe(
            PROMPTS,
            negative_prompt=["a cat"] * 2,
            height=112,
            width=136,
            latents=start.to(dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        ours = sample(teacher.unet, teacher.schedule, text, start, steps, guidance=guidance, uncond=negative)
        assert (ours - stock).abs().max() <= TOLERANCE[dtype] * stock.std(), (steps, guidance)


def test_lora_is_the_merged_weights(load: Callable) -> None:
    teacher, merged = load("sd1"), load("sd1")
    lora = LoRA(teacher.unet, 2)
    with torch.no_grad():
        lora.flat.copy_(0.05 * torch.randn(lora.flat.shape))
    weights = lora.export()
    for name, layer in merged.unet.lora_targets().items():
        down, up = weights[name]
        layer.weight += (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    text, start = teacher.encode(PROMPTS), latents(teacher)
    ours = sample(teacher.unet, teacher.schedule, text, start, 4, lora=weights)
    bare = sample(teacher.unet, teacher.schedule, text, start, 4)
    other = sample(merged.unet, merged.schedule, text, start, 4)
    assert (ours - other).abs().max() <= 1e-4 * other.std()
    assert (bare - other).abs().max() > 0.1 * other.std()


def test_walk_yields_every_position_in_fp32(load: Callable) -> None:
    teacher = load("sd1", torch.bfloat16)
    text, start = teacher.encode(PROMPTS), latents(teacher)
    before = start.clone()
    positions = list(walk(teacher.unet, teacher.schedule, text, start, 3))
    assert [z.dtype for z in positions] == [torch.float32] * 3
    assert not any(z.requires_grad for z in positions)
    assert torch.equal(positions[-1], sample(teacher.unet, teacher.schedule, text, start, 3))
    assert torch.equal(start, before)
    assert not torch.equal(positions[0], positions[0].bfloat16().float())  # not rounded on the way


def test_walk_leaves_gradients_as_they_were(load: Callable) -> None:
    """A generator runs in its caller's turns: no_grad must not leak out between two of them."""
    teacher = load("sd1")
    steps = walk(teacher.unet, teacher.schedule, teacher.encode(PROMPTS), latents(teacher), 2)
    next(steps)
    assert torch.is_grad_enabled()


def test_sample_batches(load: Callable, tmp_path: Path) -> None:
    """Prompt by prompt, seed by seed, whatever the batch; one seed is one noise; the LoRA of a run's folder counts."""
    teacher = load("sd1")
    lora = LoRA(teacher.unet, 1)
    with torch.no_grad():
        lora.flat.copy_(0.1 * torch.randn(lora.flat.shape))
    export_lora(tmp_path, lora.export(), teacher, config=Config(), steps_done=1)
    images = pictures(teacher, PROMPTS, seeds=[5, 6, 7], lora_path=tmp_path, batch=4)
    assert images.shape == (6, 128, 128, 3) and images.dtype == torch.uint8
    for i, (prompt, seed) in enumerate((p, s) for p in PROMPTS for s in (5, 6, 7)):
        z = sample(
            teacher.unet,
            teacher.schedule,
            teacher.encode([prompt]),
            noise(seed, teacher.latent_shape())[None],
            4,
            lora=lora.export(),
        )
        assert (images[i].int() - teacher.decode(z)[0].int()).abs().max() <= 1  # batches may round otherwise
    bare = pictures(teacher, PROMPTS, seeds=[5, 6, 7])
    assert (bare.int() - images.int()).abs().max() > 1


def test_sample_batches_with_guidance_and_resolution(load: Callable) -> None:
    teacher = load("sdxl")
    options = dict(steps=2, guidance=6.0, resolution=(64, 96), negative_prompt="a cat")
    images = pictures(teacher, PROMPTS[:1], **options)
    start = noise(0, teacher.latent_shape((64, 96)))[None]
    uncond = teacher.encode_negative("a cat", (64, 96))
    text = teacher.encode(PROMPTS[:1], (64, 96))
    z = sample(teacher.unet, teacher.schedule, text, start, 2, guidance=6.0, uncond=uncond)
    assert torch.equal(images, teacher.decode(z))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps 0"),
        (dict(steps=1001), "steps 1001"),
        (dict(resolution=(100, 128)), "multiples of"),
        (dict(lora_path="nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_sample_batches_says_what_is_wrong(load: Callable, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pictures(load("sd1"), PROMPTS, **options)


def a1111_settings(path: Path) -> tuple[list[str], dict[str, str]]:
    """A PNG's text as A1111 takes it apart: the lines before the last, and the last one's names and values."""
    text = Image.open(path).text["parameters"]
    return text.split("\n")[:-1], settings_line(text)


def settings_line(text: str) -> dict[str, str]:
    """The names and values of the last line."""
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.split("\n")[-1])
    return {name: json.loads(value) if value[:1] == '"' else value for name, value in pairs}


def test_a_folder_gets_a_png_for_each_picture_with_its_settings(load: Callable, tmp_path: Path) -> None:
    teacher, folder = load("sdxl"), tmp_path / "pictures"
    source = teacher.source
    written = list(
        draw(["a cat, sitting", "Überraschung"], teacher=source, output=folder, steps=2, guidance=3.0, seeds=[7, 8],
             negative_prompt="a dog", resolution=(64, 96), batch=3)
    )  # fmt: skip
    names = ["00000-7.png", "00000-8.png", "00001-7.png", "00001-8.png", "grid.png"]
    assert [path.name for path in written] == names == sorted(path.name for path in folder.iterdir())
    lines, values = a1111_settings(folder / "00000-8.png")
    assert lines == ["a cat, sitting", "Negative prompt: a dog"]
    config = Config().replace(steps=2, seed=8, resolution=(64, 96))
    wanted = settings_line(webui_settings(teacher, config)) | {"CFG scale": "3", "Model": "sdxl", "RNG": "CPU"}
    assert wanted["Sampler"] == "Euler" and wanted.items() <= values.items()
    assert a1111_settings(folder / "00001-7.png")[0][0] == "Überraschung"
    expected = pictures(teacher, ["Überraschung"], steps=2, guidance=3.0, seeds=[7], negative_prompt="a dog",
                        resolution=(64, 96))  # fmt: skip
    drawn = torch.tensor(list(Image.open(folder / "00001-7.png").tobytes()), dtype=torch.uint8).view(64, 96, 3)
    assert (drawn.int() - expected[0].int()).abs().max() <= 1


def test_a_run_says_how_its_lora_is_used(load: Callable, tmp_path: Path) -> None:
    """Teacher, steps and resolution come from the run whose folder the LoRA is; a flag overrides them."""
    teacher, run = load("sd1"), tmp_path / "my run"
    config = Config().replace(teacher=teacher.source, steps=2, resolution=(64, 64), output_dir=str(run))
    export_lora(run, LoRA(teacher.unet, 1).export(), teacher, config=config, steps_done=1)
    (run / "config.toml").write_text(config.to_toml())
    (path,) = draw(["a cat"], lora=run, output=tmp_path / "one.png")
    lines, values = a1111_settings(path)
    assert lines == webui_settings(teacher, config).replace("your prompt", "a cat").split("\n")[:1]
    assert lines == ["a cat <lora:my_run:1>"] and (values["Steps"], values["Size"]) == ("2", "64x64")
    (path,) = draw(["a cat"], lora=run, output=tmp_path / "two.jpg", teacher=teacher.source, steps=8)
    assert Image.open(path).size == (128, 128) and Image.open(path).format == "JPEG"


def test_a_styled_teacher_is_named_with_its_styles(load: Callable, tmp_path: Path) -> None:
    teacher = load("sd1")
    style = tmp_path / "ink" / "pytorch_lora_weights.safetensors"
    export_lora(style.parent, LoRA(teacher.unet, 1).export(), teacher, config=Config(), steps_done=1)
    ink = style.rename(tmp_path / "ink.safetensors")
    (path,) = draw(["a cat"], teacher=teacher.source, teacher_lora=[f"{ink}:0.5"], lora=ink, output=tmp_path / "a.png")
    assert a1111_settings(path)[0] == ["a cat <lora:ink:0.5> <lora:ink:1>"]
