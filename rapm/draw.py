"""`rapm sample`: pictures as files, a grid or a folder of PNGs that carry their settings as A1111 reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rapm import __version__
from rapm.config import RESOLVED, Config
from rapm.device import DTYPES, pick_device
from rapm.disk import make_writable, write_atomic
from rapm.errors import UserError
from rapm.export.files import base_name
from rapm.sample import grid, png, sample_batches
from rapm.teacher import load_teacher

GRID_MAX = 100  # pictures beyond which nobody looks at a grid; it is also all that is held in memory
IMAGES = (".png", ".jpg", ".jpeg", ".webp")  # what an output that is no folder ends with


def draw(
    prompts: list[str],
    *,
    output: Path,
    teacher: str | None = None,
    teacher_lora: Sequence[str] | None = None,
    lora: Path | None = None,
    precision: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    seeds: Sequence[int] = (0,),
    resolution: tuple[int, int] | None = None,
    negative_prompt: str = "",
    batch: int = 4,
) -> Iterator[Path]:
    """Draw every prompt with every seed, and yield what was written: a grid, or first the pictures of a folder.

    What is None comes from the run whose folder `lora` is, else it is the embedded teacher, 4 steps, fp16 on a GPU.
    UserError before any work for an output that cannot be written.
    """
    if batch < 1:
        raise UserError(f"batch {batch}: at least 1")
    run = _settings_of(lora)
    folder = output if output.suffix.lower() not in IMAGES else None
    try:
        make_writable(folder or output.parent)
    except OSError as error:
        raise UserError(f"output {output} cannot be written ({error.strerror}): choose another") from error
    device = pick_device(run)
    if precision is None:
        precision = run.mixed_precision if lora and run != Config() else "fp16" if device.type == "cuda" else "no"
    dtype = DTYPES[run.replace(mixed_precision=precision).mixed_precision]
    styles = teacher_lora or (run.teacher_lora if teacher is None else ())
    loaded = load_teacher(teacher or run.teacher, device=device, dtype=dtype, loras=styles)
    resolution = resolution or (run.resolution if teacher is None else None)
    steps = run.steps if steps is None else steps
    height, width = resolution or loaded.default_resolution
    shared: dict[str, Any] = dict(
        lora=_lora_name(lora), model=base_name(loaded), steps=steps, guidance=guidance, size=f"{width}x{height}"
    )
    shown: list[Tensor] = []
    first, count = "", len(prompts) * len(seeds)
    for some, images in sample_batches(
        loaded, prompts, lora_path=lora, steps=steps, guidance=guidance, seeds=seeds, resolution=resolution,
        negative_prompt=negative_prompt, batch=batch,
    ):  # fmt: skip
        for (number, seed), image in zip(some, images, strict=True):
            text = parameters(prompts[number], negative_prompt, seed=seed, **shared)
            first = first or text
            if folder:
                path = folder / f"{number:05d}-{seed}.png"
                write_atomic(path, png(Image.fromarray(image.numpy()), parameters=text))
                yield path
        if folder is None or len(shown) + len(images) <= GRID_MAX:
            shown.extend(images)
    if folder is None or count <= GRID_MAX:
        sheet, path = grid(shown, columns=len(seeds)), folder / "grid.png" if folder else output
        if path.suffix.lower() == ".png":
            write_atomic(path, png(sheet, parameters=first))
        else:
            sheet.save(path, quality=95)
        yield path


def parameters(
    prompt: str, negative: str, *, lora: str | None, model: str, steps: int, guidance: float, seed: int, size: str
) -> str:
    """A picture's settings as A1111 writes and reads them: prompt, negative prompt, and a line of `Name: value`.

    The noise is torch's on the CPU, which A1111 calls `RNG: CPU`. `size` is WxH, in pixels.
    """
    lines = [f"{prompt} <lora:{lora}:1>" if lora else prompt]
    if negative and guidance > 1:
        lines.append(f"Negative prompt: {negative}")
    values = {
        "Steps": steps, "Sampler": "DDIM", "Schedule type": "SGM Uniform", "CFG scale": f"{guidance:g}", "Seed": seed,
        "Size": size, "Model": model, "RNG": "CPU", "Version": f"rapm-fast {__version__}",
    }  # fmt: skip
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"') else value


def _settings_of(lora: Path | None) -> Config:
    """The settings of the run whose folder `lora` is; the defaults for a file, or for none."""
    return Config.of_run(lora) if lora is not None and (lora / RESOLVED).is_file() else Config()


def _lora_name(lora: Path | None) -> str | None:
    """What the file is called once it lies in a client's folder of LoRAs: its own name, of a run the folder's."""
    if lora is None:
        return None
    return lora.resolve().name if lora.is_dir() else lora.stem
