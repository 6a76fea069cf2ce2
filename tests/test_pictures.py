"""Pictures in grids: where each lies, how large, and what is written beside them."""

from __future__ import annotations

import pytest
import torch

from rapm.pictures import GAP, LINE, MIN_SIDE, grid, grid_size, labelled_grid


def test_grid_magnifies_and_places() -> None:
    images = torch.randint(0, 256, (5, 50, 64, 3), dtype=torch.uint8)
    sheet = grid(images, columns=3)
    height, width = 150, 192  # the least whole factor to 128 or more: 3
    assert sheet.size == (3 * width + 2 * GAP, 2 * height + GAP)
    pixels = torch.tensor(list(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
    for i, image in enumerate(images):
        y, x = i // 3 * (height + GAP), i % 3 * (width + GAP)
        tile = pixels[y : y + height, x : x + width]
        assert torch.equal(tile, image.repeat_interleave(3, 0).repeat_interleave(3, 1))
    assert (pixels[height + GAP :, 2 * (width + GAP) :] == 255).all()  # the place of a sixth


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 4), (5, 3), (6, 3)])
def test_grid_size(count: int, columns: int) -> None:
    images = torch.zeros(count, 50, 64, 3, dtype=torch.uint8)
    assert grid(images, columns).size == grid_size((50, 64), count, columns)


def test_grid_of_large_and_few_images() -> None:
    images = torch.zeros(2, MIN_SIDE, 300, 3, dtype=torch.uint8)
    assert grid(images, columns=4).size == (2 * 300 + GAP, MIN_SIDE)


def test_labelled_grid_has_rows_names_and_captions() -> None:
    rows = {name: torch.full((3, 64, 64, 3), grey, dtype=torch.uint8) for name, grey in (("teacher", 90), ("x", 160))}
    captions = ["short", "a caption of very many words " * 9, "Überlänge" * 9]
    sheet, bare = labelled_grid(rows, captions), labelled_grid(rows)
    assert sheet.size == (3 * 128 + 2 * GAP, bare.height + 3 * LINE)
    assert bare.height == 2 * (LINE + 128) + GAP
    pixels = torch.tensor(list(sheet.convert("L").tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width)
    top = 3 * LINE
    for y, grey in ((top + LINE, 90), (top + 2 * LINE + 128 + GAP, 160)):
        assert (pixels[y : y + 128, :128] == grey).all()  # no text on a picture
        assert (pixels[y - LINE : y, :128] < 128).any()  # the row's name above it
    for i in range(3):
        x = i * (128 + GAP)
        assert (pixels[:top, x : x + 128] < 128).any()  # a caption above each column


def test_grid_of_several_shapes_gives_each_the_largest_place() -> None:
    wide, tall = torch.full((128, 192, 3), 10, dtype=torch.uint8), torch.full((160, 128, 3), 20, dtype=torch.uint8)
    sheet = grid([wide, tall], columns=2)
    assert sheet.size == (2 * 192 + GAP, 160)
    assert sheet.getpixel((0, 0)) == (10,) * 3 and sheet.getpixel((0, 150)) == (255,) * 3
    assert sheet.getpixel((192 + GAP, 150)) == (20,) * 3
