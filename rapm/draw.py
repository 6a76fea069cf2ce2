"""`rapm sample`: pictures as files, a grid or a folder of PNGs that carry their settings as A1111 reads them."""

from __future__ import annotations

import errno
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from rapm import __version__
from rapm.config import RESOLVED, Config
from rapm.device import pick_device
from rapm.disk import TEMPORARY, make_writable, write_atomic
from rapm.errors import UserError
from rapm.export.clients import run_name, style_tags, webui_settings, webui_text
from rapm.export.files import base_name
from rapm.export.lora_file import WEIGHTS
from rapm.memory.drawing import teacher_to_draw
from rapm.pictures import grid, grid_size, packed, png
from rapm.sample import sample_batches
from rapm.teacher import Teacher

GRID_MAX = 100  # pictures beyond which nobody looks at a grid; it is also all that is held in memory
# What an output that is no folder ends with, and how many pixels a side of such a file may have.
IMAGES = {".png": 2**31 - 1, ".jpg": 65500, ".jpeg": 65500, ".webp": 16383}


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
    No file is replaced: a folder's numbers go on after its highest, and a file that is there gets a -1, -2 ... beside
    it. UserError before any work for an output that cannot be written, and for a value that no picture can have.
    """
    if batch < 1:
        raise UserError(f"batch {batch}: at least 1")
    if half := next((text for text in (*prompts, negative_prompt) if re.search("[\ud800-\udfff]", text)), None):
        raise UserError(f"prompt {half!r}: not UTF-8")
    run = _settings_of(lora)
    device = pick_device(run)
    if precision is None:
        precision = run.mixed_precision if lora and run != Config() else "fp16" if device.type == "cuda" else "no"
    config = run.replace(
        teacher=run.teacher if teacher is None else teacher,
        teacher_lora=tuple(teacher_lora or (run.teacher_lora if teacher is None else ())),
        mixed_precision=precision, steps=run.steps if steps is None else steps, guidance=guidance, buckets=(),
        resolution=resolution or (run.resolution if teacher is None else None),
    )  # fmt: skip
    for seed in seeds:
        config.replace(seed=seed)  # refuses what no seed is
    suffix = output.suffix.lower()
    folder = output if suffix not in IMAGES else None
    if folder and not folder.is_dir() and suffix in Image.registered_extensions():
        raise UserError(f"output {output}: choose a name in {', '.join(IMAGES)}, or a folder")
    sheet_path = folder / "grid.png" if folder else output
    _check_writable(sheet_path, output)
    loaded = teacher_to_draw(config, device, batch=batch, lora=lora)
    count = len(prompts) * len(seeds)
    size = grid_size(config.resolution or loaded.default_resolution, count, columns=len(seeds))
    if folder is None and max(size) > IMAGES[suffix]:
        raise UserError(f"output {output}: a grid of {size[0]}x{size[1]} pixels is too large for it: choose a folder")
    settings, tags = _settings(loaded, config), _tags(loaded, lora, run)
    start = _next_number(folder) if folder else 0
    shown: list[Tensor] = []
    first = ""
    for some, images in sample_batches(
        loaded, prompts, lora_path=lora, steps=config.steps, guidance=guidance, seeds=seeds,
        resolution=config.resolution, negative_prompt=negative_prompt, batch=batch,
    ):  # fmt: skip
        for (number, seed), image in zip(some, images, strict=True):
            negative = negative_prompt if guidance > 1 else ""
            text = parameters(webui_text(prompts[number]) + tags, webui_text(negative), {**settings, "Seed": seed})
            first = first or text
            if folder:
                name = f"{start + number:05d}-{seed}.png"
                yield _write_new(folder / name, png(Image.fromarray(image.numpy()), parameters=text))
        if folder is None or len(shown) + len(images) <= GRID_MAX:
            shown.extend(images)
    if folder is None or count <= GRID_MAX:
        yield _write_new(sheet_path, packed(grid(shown, columns=len(seeds)), sheet_path.suffix.lower(), first))


def parameters(prompt: str, negative: str, settings: Mapping[str, object]) -> str:
    """A picture's settings as A1111 writes and reads them: prompt, negative prompt, and a line of `Name: value`."""
    lines = [prompt, f"Negative prompt: {negative}"] if negative else [prompt]
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"') else value


def _settings(teacher: Teacher, config: Config) -> dict[str, object]:
    """What `webui_settings` says, for any guidance, with the model and the noise: torch's on the CPU."""
    line = webui_settings(teacher, config).rpartition("\n")[2]
    return {
        **dict(pair.split(": ") for pair in line.split(", ")),
        "CFG scale": f"{config.guidance:g}", "Model": base_name(teacher), "RNG": "CPU",
        "Version": f"rapm-fast {__version__}",
    }  # fmt: skip


def _tags(teacher: Teacher, lora: Path | None, run: Config) -> str:
    """The teacher's styles and `lora` by the names of their files in a client's folder of LoRAs."""
    if lora is None:
        return style_tags(teacher)
    name = run_name(run) if (lora / RESOLVED).is_file() else lora.resolve().name if lora.is_dir() else lora.stem
    return f"{style_tags(teacher)} <lora:{name}:1>"


def _check_writable(path: Path, output: Path) -> None:
    """UserError, naming `output`, if `write_atomic` could not write `path`."""
    try:
        make_writable(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{path.name} is a folder")
        temporary = path.with_name(path.name + TEMPORARY)
        temporary.touch()
        temporary.unlink(missing_ok=True)  # another process may be at the same
    except OSError as error:
        raise UserError(f"output {output} cannot be written ({error.strerror}): choose another") from error


def _next_number(folder: Path) -> int:
    """The first above all that its pictures have."""
    found = (re.match(r"(\d{5,9})-", path.name) for path in folder.glob("*.png"))
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _write_new(path: Path, data: bytes) -> Path:
    """Write to `path`, or to the first of NAME-1, NAME-2 ... beside it that nobody has, nor a process beside us."""
    others = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(1))
    name = next(filter(_made, itertools.chain([path], others)))
    try:
        write_atomic(name, data)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    return name


def _made(path: Path) -> bool:
    """Whether an empty file could be made: there was none."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _settings_of(lora: Path | None) -> Config:
    """The settings of the run whose folder `lora` is; the defaults for a file, or for none. UserError without LoRA."""
    if lora is None or not (lora / RESOLVED).is_file():
        return Config()
    if not (lora / WEIGHTS).is_file():
        raise UserError(f"LoRA: the run {lora} has none yet: `rapm export --run {shlex.quote(str(lora))}` writes it")
    return Config.of_run(lora)
