"""Captions to evaluate on: COCO's captions_val2014.json, or a CSV, drawn so that every machine draws the same.

What is drawn depends on the file's ids and a seed alone (a hash orders them), and fewer are the first of more.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

from rapm.errors import UserError
from rapm.trajectories import seed_for

COLUMNS = ("caption", "prompt", "text")  # of a CSV, the first that is there
SEED = 2014  # of the draw and of the noise; a protocol has one


class Caption(NamedTuple):
    """A caption and what it belongs to: COCO's image id, or the row of a CSV."""

    key: str
    text: str


def read_captions(path: Path, count: int) -> list[Caption]:
    """`count` captions (or all, if there are fewer), in the order drawn: of COCO images, of each one of its captions.

    UserError for a file that cannot be read or holds no captions.
    """
    try:
        found = _coco(path) if path.suffix.lower() == ".json" else _csv(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        what = "COCO's captions_val2014.json (images and annotations), or a CSV with a column `caption`"
        raise UserError(f"captions: {path} cannot be read ({type(error).__name__}: {error}): give {what}") from error
    if not found:
        raise UserError(f"captions: {path} holds no caption: give another file")
    return sorted(found, key=lambda caption: seed_for(SEED, f"image {caption.key}"))[:count]


def _coco(path: Path) -> list[Caption]:
    """Of each image the caption that the hash puts first; COCO has five or more."""
    chosen: dict[int, tuple[int, str]] = {}
    for annotation in json.loads(path.read_text("utf-8"))["annotations"]:
        image, text = annotation["image_id"], " ".join(annotation["caption"].split())
        place = seed_for(SEED, f"caption {annotation['id']}")
        if image not in chosen or place < chosen[image][0]:
            chosen[image] = place, text
    return [Caption(str(image), text) for image, (_, text) in chosen.items()]


def _csv(path: Path) -> list[Caption]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        column = next((name for name in COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            raise ValueError(f"no column {', '.join(COLUMNS)}")
        return [Caption(str(i), text) for i, row in enumerate(rows) if (text := " ".join((row[column] or "").split()))]
