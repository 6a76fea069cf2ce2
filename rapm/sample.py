"""Sampling with our UNet exactly as stock DDIM "trailing" walks it, and pictures of what came out.

Shapes: B batch, C h w latents, H W image size in pixels.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from rapm.errors import UserError
from rapm.export.lora_file import read_lora, text_lora
from rapm.schedule import Schedule
from rapm.solver import walk
from rapm.stacks import Lora
from rapm.trajectories import noise
from rapm.unet import Text, UNet

if TYPE_CHECKING:
    from rapm.teacher import Teacher

MIN_SIDE = 128  # pixels of a picture in a grid: smaller ones are magnified
GAP, FONT_SIZE, LINE = 4, 13, 17  # pixels
CAPTION_LINES = 3
ENCODE = 256  # prompts whose text is held at a time


def sample(
    unet: UNet,
    schedule: Schedule,
    text: Text,
    noise: Tensor,
    steps: int,
    *,
    lora: Lora = None,
    guidance: float = 1.0,
    uncond: Text | None = None,
) -> Tensor:
    """The end of `walk`: latents B C h w in fp32, from `noise` of the same shape."""
    for z in walk(unet, schedule, text, noise, steps, lora=lora, guidance=guidance, uncond=uncond):
        last = z
    return last


def sample_batches(
    teacher: Teacher,
    prompts: list[str],
    *,
    lora_path: str | Path | None = None,
    steps: int = 4,
    guidance: float = 1.0,
    seeds: Sequence[int] = (0,),
    resolution: tuple[int, int] | None = None,
    negative_prompt: str = "",
    batch: int = 4,
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """Every prompt with every seed, prompt by prompt: (number of the prompt, seed) of at most `batch` pictures, and
    the pictures, B H W 3, uint8 on the CPU. Only a batch is held at a time, so a prompt file may be long.

    `lora_path` is a LoRA file or a run's folder, for the text encoders too; None samples the teacher. One seed is the
    same noise for every prompt, whatever the batch. UserError for a number of steps, resolution or LoRA that does not
    fit the teacher.
    """
    if not 1 <= steps <= len(teacher.schedule):
        raise UserError(f"steps {steps}: the teacher's schedule has 1 to {len(teacher.schedule)}")
    shape = teacher.latent_shape(resolution)
    lora = read_lora(lora_path, teacher.unet) if lora_path else None
    with text_lora(teacher.pipe, lora_path):
        uncond = teacher.encode_negative(negative_prompt, resolution) if guidance > 1 else None
    with tqdm(total=len(prompts) * len(seeds), desc="sample", disable=None) as bar:
        for first in range(0, len(prompts), ENCODE):  # the text encoders visit the device once for each so many
            with text_lora(teacher.pipe, lora_path):
                text = teacher.encode(prompts[first : first + ENCODE], resolution)
            pairs = [(first + i, seed) for i in range(len(text.hidden)) for seed in seeds]
            for start in range(0, len(pairs), batch):
                some = pairs[start : start + batch]
                z = sample(
                    teacher.unet,
                    teacher.schedule,
                    Text.cat([text.rows(i - first, i - first + 1) for i, _ in some]),
                    torch.stack([noise(seed, shape) for _, seed in some]),
                    steps,
                    lora=lora,
                    guidance=guidance,
                    uncond=uncond,
                )
                yield some, teacher.decode(z)
                bar.update(len(some))


def png(picture: Image.Image, **texts: str) -> bytes:
    """A PNG whose text chunks are `texts`."""
    chunks, data = PngInfo(), io.BytesIO()
    for name, text in texts.items():
        chunks.add_text(name, text)  # as international text where Latin-1 does not suffice
    picture.save(data, "png", pnginfo=chunks)
    return data.getvalue()


def grid(images: Sequence[Tensor], columns: int) -> Image.Image:
    """Images H W 3 (uint8) as one picture, row by row; small ones are magnified by a whole factor."""
    sheet, _ = _paste(images, columns, top=0, between=GAP)
    return sheet


def grid_size(size: tuple[int, int], count: int, columns: int) -> tuple[int, int]:
    """Width and height in pixels of the `grid` of so many pictures of `size` (H, W)."""
    height, width = _cell([torch.empty(*size, 3, device="meta")])
    return min(columns, count) * (width + GAP) - GAP, -(-count // columns) * (height + GAP) - GAP


def labelled_grid(rows: Mapping[str, Sequence[Tensor]], captions: Sequence[str] | None = None) -> Image.Image:
    """One row of images (H W 3, uint8, as many in each) under each name; `captions` head the columns."""
    images = [image for row in rows.values() for image in row]
    columns = len(images) // len(rows)
    font = ImageFont.load_default(FONT_SIZE)
    letters = int(_cell(images)[1] / font.getlength("n"))  # that fit above a picture
    heads = [textwrap.wrap(text, letters, max_lines=CAPTION_LINES, placeholder="...") for text in captions or []]
    top = LINE * max(map(len, heads), default=0)
    sheet, corners = _paste(images, columns, top=top + LINE, between=LINE + GAP)
    draw = ImageDraw.Draw(sheet)
    for lines, (x, _) in zip(heads, corners, strict=False):
        draw.multiline_text((x, 0), "\n".join(lines), fill="black", font=font, spacing=LINE - FONT_SIZE)
    for name, (x, y) in zip(rows, corners[::columns], strict=True):
        draw.text((x, y - LINE), name, fill="black", font=font)
    return sheet


def _zoom(images: Sequence[Tensor]) -> int:
    """The least whole factor that makes every side at least MIN_SIDE."""
    return max(1, -(-MIN_SIDE // min(min(image.shape[:2]) for image in images)))


def _cell(images: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width of a picture's place: the largest ones', magnified."""
    height, width = (_zoom(images) * max(image.shape[i] for image in images) for i in range(2))
    return height, width


def _paste(images: Sequence[Tensor], columns: int, top: int, between: int) -> tuple[Image.Image, list[tuple[int, int]]]:
    """A white sheet with the images in rows of `columns`, `top` above the first and `between` two rows; the corners."""
    factor, (height, width), count = _zoom(images), _cell(images), len(images)
    corners = [(i % columns * (width + GAP), top + i // columns * (height + between)) for i in range(count)]
    size = min(columns, count) * (width + GAP) - GAP, corners[-1][1] + height
    sheet = Image.new("RGB", size, "white")
    for image, corner in zip(images, corners, strict=True):
        picture = Image.fromarray(image.cpu().numpy())
        sheet.paste(picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST), corner)
    return sheet, corners
