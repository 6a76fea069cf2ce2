"""Pictures as files, and in grids. Shapes: H W image size in pixels."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

MIN_SIDE = 128  # pixels of a picture in a grid: smaller ones are magnified
GAP, FONT_SIZE, LINE = 4, 13, 17  # pixels
CAPTION_LINES = 3


def png(picture: Image.Image, **texts: str) -> bytes:
    """A PNG whose text chunks are `texts`."""
    chunks, data = PngInfo(), io.BytesIO()
    for name, text in texts.items():
        chunks.add_text(name, text)  # as international text where Latin-1 does not suffice
    picture.save(data, "png", pnginfo=chunks)
    return data.getvalue()


def packed(picture: Image.Image, suffix: str, text: str) -> bytes:
    """A picture file of the kind that `suffix` names (".webp"); a PNG carries `text` as its parameters."""
    if suffix == ".png":
        return png(picture, parameters=text)
    data = io.BytesIO()
    picture.save(data, Image.registered_extensions()[suffix], quality=95)
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
