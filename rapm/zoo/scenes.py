"""The world of the embedded teacher: every caption it knows, and a renderer of 64x64 pictures for them.

A scene holds one or two objects, each a handwritten digit or a geometric shape in one of 8 colours, on one of 4 kinds
of background. Captions are numbered: `caption(i)` is the text, `objects(i)` what a picture must show. One caption in
ten (by a hash of its text) is held out from training. Everything is vectorised and runs on any device.
"""

from __future__ import annotations

import math
import zlib
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rapm.errors import UserError

SIZE = 64
COLOURS = {
    "red": (0.90, 0.12, 0.15), "green": (0.15, 0.78, 0.20), "blue": (0.20, 0.32, 1.00), "yellow": (0.95, 0.90, 0.12),
    "purple": (0.62, 0.18, 0.85), "cyan": (0.10, 0.85, 0.92), "orange": (1.00, 0.55, 0.08), "white": (0.97, 0.97, 0.97),
}  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "star", "cross")
KINDS = DIGITS + SHAPES
BACKGROUNDS = ("plain", "striped", "checkered", "dotted")
# Where an object can stand: name, caption of a single object, centre in [-1, 1] (x, y).
PLACES = (
    ("in the center", (0.0, 0.0)), ("on the left", (-0.48, 0.0)), ("on the right", (0.48, 0.0)),
    ("at the top", (0.0, -0.48)), ("at the bottom", (0.0, 0.48)),
)  # fmt: skip
# How a second object relates to the first: words, place of the first, place of the second.
RELATIONS = (("left of", 1, 2), ("right of", 2, 1), ("above", 3, 4), ("below", 4, 3))
WORDS = sorted({"a", "on", "background"} | {*COLOURS, *KINDS, *BACKGROUNDS}
               | {word for name, *_ in PLACES + RELATIONS for word in name.split()})  # fmt: skip

_OBJECTS = len(COLOURS) * len(KINDS)
SINGLES = _OBJECTS * len(PLACES) * len(BACKGROUNDS)
CAPTIONS = SINGLES + _OBJECTS**2 * len(RELATIONS) * len(BACKGROUNDS)


class Objects(NamedTuple):
    """What a scene shows. `kind`, `colour`: B P (place by place, -1 where nothing stands); `background`: B."""

    kind: Tensor
    colour: Tensor
    background: Tensor


def objects(index: Tensor) -> Objects:
    """The contents of captions number `index` (B, int64), by mixed-radix decoding."""
    rows = torch.arange(len(index), device=index.device)
    background, rest = index % len(BACKGROUNDS), index // len(BACKGROUNDS)
    single = index < SINGLES
    pair = rest - SINGLES // len(BACKGROUNDS)
    relation = torch.where(single, 0, pair % len(RELATIONS))
    layout = torch.tensor([r[1:] for r in RELATIONS], device=index.device)
    place_one = torch.where(single, rest % len(PLACES), layout[relation, 0])
    one = torch.where(single, rest // len(PLACES), pair // len(RELATIONS) % _OBJECTS)
    two = torch.where(single, 0, pair // len(RELATIONS) // _OBJECTS)
    kind = index.new_full((len(index), len(PLACES)), -1)
    colour = kind.clone()
    # The second object first: for a single scene it lands on a place that the lines below it overwrite or clear.
    place_two = torch.where(single, place_one, layout[relation, 1])
    for place, content in ((place_two, two), (place_one, one)):
        kind[rows, place] = content % len(KINDS)
        colour[rows, place] = content // len(KINDS)
    return Objects(kind, colour, background)


def caption(index: int) -> str:
    """The text of caption number `index`."""
    names = list(COLOURS)

    def thing(content: int) -> str:
        return f"a {names[content // len(KINDS)]} {KINDS[content % len(KINDS)]}"

    background, rest = BACKGROUNDS[index % len(BACKGROUNDS)], index // len(BACKGROUNDS)
    if index < SINGLES:
        return f"{thing(rest // len(PLACES))} {PLACES[rest % len(PLACES)][0]} on a {background} background"
    rest -= SINGLES // len(BACKGROUNDS)
    relation, rest = RELATIONS[rest % len(RELATIONS)][0], rest // len(RELATIONS)
    return f"{thing(rest % _OBJECTS)} {relation} {thing(rest // _OBJECTS)} on a {background} background"


def held_out(text: str) -> bool:
    """Whether a caption was kept from the teacher's and the student's training."""
    return zlib.crc32(text.encode()) % 10 == 0


def draw_captions(count: int, *, seed: int, unseen: bool = False) -> list[int]:
    """`count` distinct caption numbers, of the training or the held-out ones; a third single objects, if so many exist.

    UserError for more than a twentieth of all: the draw would not end soon.
    """
    if count > CAPTIONS // 20:
        raise UserError(f"{count} captions: the embedded teacher has at most {CAPTIONS // 20}: ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        low, high = (0, SINGLES) if torch.rand((), generator=generator) < 1 / 3 else (SINGLES, CAPTIONS)
        index = int(torch.randint(low, high, (), generator=generator))
        if held_out(caption(index)) == unseen:
            chosen[index] = None
    return list(chosen)


@cache
def digit_bank(train: bool = True) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits, enlarged: images n 1 32 32 in [0, 1] and labels n; a fixed 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    split = train_test_split(data.images, data.target, test_size=0.2, random_state=0, stratify=data.target)
    images, labels = (split[0], split[2]) if train else (split[1], split[3])
    images = torch.tensor(images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    return images, torch.tensor(labels)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def _background(kind: Tensor, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Two dark tones in a pattern of random period, angle and phase. kind: B -> B 3 H W."""
    count = len(kind)

    def draw(low: float, high: float) -> Tensor:
        return _uniform((count, 1, 1), low, high, generator)

    angle, period = draw(0, 2 * math.pi), draw(0.30, 0.50)
    u = (x * angle.cos() + y * angle.sin()) / period + draw(0, 1)
    v = (y * angle.cos() - x * angle.sin()) / period + draw(0, 1)
    sine_u, sine_v = (2 * math.pi * u).sin(), (2 * math.pi * v).sin()
    patterns = torch.stack([torch.zeros_like(u), sine_u * 4, sine_u * sine_v * 6, (sine_u + sine_v - 0.9) * 4])
    mask = patterns.sigmoid()[kind, torch.arange(count, device=kind.device)][:, None]  # B 1 H W
    dark = _uniform((count, 1, 1, 1), 0.04, 0.22, generator) + _uniform((count, 3, 1, 1), -0.04, 0.04, generator)
    light = dark + _uniform((count, 1, 1, 1), 0.16, 0.28, generator)
    return dark + (light - dark) * mask


def _shape(kind: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """How far inside shape number `kind` (B) each point u, v (B H W, in the object's frame) lies; negative outside."""
    angle, radius = torch.atan2(u, -v), (u**2 + v**2).sqrt()
    sector = (angle % (2 * math.pi / 5) - math.pi / 5).abs()  # 0 in a notch, pi/5 at a tip
    arms = torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    inside = torch.stack([
        0.82 - radius,
        0.72 - torch.maximum(u.abs(), v.abs()),
        torch.minimum(0.62 - v, (v + 0.86 - 1.73 * u.abs()) / 2),
        0.40 + 0.55 * sector / (math.pi / 5) - radius,
        torch.minimum(0.28 - arms[0], 0.85 - arms[1]),
    ])  # fmt: skip
    return inside[kind, torch.arange(len(kind), device=kind.device)]


def render(index: Tensor, generator: torch.Generator, *, train: bool = True) -> Tensor:
    """Pictures of captions number `index` (B, on the generator's device): B 3 64 64 in [-1, 1].

    Size, angle, place, tone and handwriting vary at random; `train` chooses the digits' train or test split.
    """
    device, count = generator.device, len(index)
    scene = objects(index)
    axis = (torch.arange(SIZE, device=device) + 0.5) / SIZE * 2 - 1
    y, x = axis[:, None].expand(SIZE, SIZE), axis[None, :].expand(SIZE, SIZE)
    image = _background(scene.background, x, y, generator)
    bank, labels = (part.to(device) for part in digit_bank(train))
    by_label = labels.argsort(stable=True)
    first, size = torch.searchsorted(labels[by_label], torch.arange(10, device=device)), labels.bincount(minlength=10)
    palette = torch.tensor(list(COLOURS.values()), device=device)

    for place, (_, centre) in enumerate(PLACES):
        kind, colour = scene.kind[:, place], scene.colour[:, place]
        scale = _uniform((count, 1, 1), 0.34, 0.44, generator)
        turn = _uniform((count, 1, 1), -0.2, 0.2, generator)
        shift = _uniform((count, 2, 1, 1), -0.06, 0.06, generator)
        dx, dy = (x - centre[0] - shift[:, 0]) / scale, (y - centre[1] - shift[:, 1]) / scale
        u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
        digit = kind.clamp(0, 9)
        pick = (torch.rand(count, generator=generator, device=device) * size[digit]).long()
        frame = torch.stack([u, v], -1) * 0.88  # the bank's pictures have a margin
        ink = F.grid_sample(bank[by_label[first[digit] + pick]], frame, align_corners=False)[:, 0]
        ink = ((ink - 0.3) * 4).clamp(0, 1)
        body = (_shape((kind - 10).clamp(0, 4), u, v) * scale * SIZE / 2 + 0.5).clamp(0, 1)  # one pixel of soft edge
        mask = torch.where((kind < 10)[:, None, None], ink, body) * (kind >= 0)[:, None, None]
        tone = palette[colour.clamp(min=0)] + _uniform((count, 3), -0.05, 0.05, generator)
        image = image + mask[:, None] * (tone[:, :, None, None] - image)
    return image.clamp(0, 1) * 2 - 1
