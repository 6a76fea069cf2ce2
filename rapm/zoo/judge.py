"""The judge: a small convolutional network that reads a scene, trained on real renders only.

It answers, place by place, what stands there (or nothing), in which colour, and on which background; its inner
activations, standardised on real renders, are the features of the Frechet distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch import Tensor

from rapm.zoo import JUDGE
from rapm.zoo.scenes import BACKGROUNDS, COLOURS, DIGITS, KINDS, Objects

# The 4x4 window of the 8x8 map that each place of `scenes.PLACES` sees: first row, first column.
WINDOWS = ((2, 2), (2, 0), (2, 4), (0, 2), (4, 2))
FEATURES = 96 + 64


class Verdict(NamedTuple):
    """kind: B P logits over nothing + KINDS; colour: B P logits; background: B logits; features: B FEATURES."""

    kind: Tensor
    colour: Tensor
    background: Tensor
    features: Tensor


class Judge(nn.Module):
    """Pictures B 3 64 64 in [-1, 1] -> Verdict."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.1)
            )  # fmt: skip

        self.texture = nn.Sequential(block(3, 32, 1), block(32, 64, 2), block(64, 96, 2))  # B 96 16 16
        self.trunk = nn.Sequential(block(96, 128, 2), block(128, 128, 1))  # B 128 8 8
        self.place = nn.Sequential(nn.Linear(128 * 16, 64), nn.LeakyReLU(0.1))
        self.kind = nn.Linear(64, 1 + len(KINDS))
        self.colour = nn.Linear(64, len(COLOURS))
        self.background = nn.Linear(96 + 128, len(BACKGROUNDS))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    def forward(self, image: Tensor) -> Verdict:
        texture = self.texture(image)
        map8 = self.trunk(texture)
        windows = torch.stack([map8[:, :, r : r + 4, c : c + 4].flatten(1) for r, c in WINDOWS], 1)
        place = self.place(windows)  # B P 64
        pooled = texture.mean((2, 3))
        background = self.background(torch.cat([pooled, map8.mean((2, 3))], 1))
        features = (torch.cat([pooled, place.mean(1)], 1) - self.mean) / self.std
        return Verdict(self.kind(place), self.colour(place), background, features)

    def save(self, path: Path) -> None:
        """Write the weights in half precision."""
        save_file({name: part.half().contiguous() for name, part in self.state_dict().items()}, path)


def load_judge(device: torch.device | str = "cpu", path: Path = JUDGE) -> Judge:
    """The judge that ships with the package, frozen, in fp32."""
    judge = Judge()
    judge.load_state_dict({name: part.float() for name, part in load_file(path).items()})
    return judge.eval().requires_grad_(False).to(device)


def mistakes(verdict: Verdict, scene: Objects) -> dict[str, Tensor]:
    """What a picture gets wrong, as boolean tensors.

    `colour`, `shape`, `digit`: one entry per object in question; `background`, `place` (an object missing or too many)
    and `prompt` (anything at all wrong): one entry per picture.
    """
    there = scene.kind >= 0  # B P
    said = verdict.kind.argmax(-1) - 1
    wrong_kind, wrong_colour = said != scene.kind, verdict.colour.argmax(-1) != scene.colour
    background = verdict.background.argmax(-1) != scene.background
    is_digit = there & (scene.kind < len(DIGITS))
    return {
        "colour": wrong_colour[there],
        "shape": wrong_kind[there & ~is_digit],
        "digit": wrong_kind[is_digit],
        "background": background,
        "place": ((said >= 0) != there).any(1),
        "prompt": wrong_kind.any(1) | (wrong_colour & there).any(1) | background,
    }
