"""Style LoRAs of the teacher, `--teacher_lora FILE[:scale]`, fused into UNet and text encoders when it is loaded."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from rapm.errors import UserError
from rapm.export.lora_file import WEIGHTS, Weights, read_lora, read_text_lora
from rapm.loading.weights import Update
from rapm.unet import UNet


@dataclass(frozen=True)
class Style:
    """A LoRA as the teacher takes it."""

    path: Path
    scale: float
    parts: Mapping[str, Weights]  # "unet", "text_encoder", "text_encoder_2" -> what the file holds for it

    def reading_text(self, encoders: Mapping[str, nn.Module]) -> Style:
        """With what the file holds for the pipeline's text encoders. UserError for layers that they lack."""
        return replace(self, parts={**self.parts, **read_text_lora(self.path, encoders)})

    @property
    def name(self) -> str:
        """What ComfyUI and A1111, which have one folder for all LoRAs, call it: as its file, or as its run's folder."""
        return client_name(self.path.resolve().parent) if self.path.name == WEIGHTS else self.path.stem

    @property
    def digest(self) -> str:
        """sha256 of the weights and of the strength with which they are added, however the file names them."""
        digest = hashlib.sha256(json.dumps(self.scale).encode())
        for part, layers in sorted(self.parts.items()):
            for layer, pair in sorted(layers.items()):
                for x in pair:
                    digest.update(f"{part} {layer} {tuple(x.shape)} ".encode())
                    digest.update(x.float().contiguous().numpy().data)
        return digest.hexdigest()


def client_name(path: Path) -> str:
    """The last part of `path` in letters that these programs all take."""
    return re.sub(r"[^\w.-]+", "_", path.name)


def parse_style(spec: str) -> tuple[Path, float]:
    """ "FILE" or "FILE:scale"; a folder stands for the LoRA of its run. UserError for a scale that is not finite."""
    name, colon, scale = spec.rpartition(":")
    try:
        path, strength = (Path(name), float(scale)) if colon else (Path(spec), 1.0)
    except ValueError:
        path, strength = Path(spec), 1.0  # a colon of the path's own
    if not math.isfinite(strength):
        raise UserError(f"teacher_lora {spec!r}: the scale must be a finite number")
    return (path / WEIGHTS if path.is_dir() else path), strength


def read_style(spec: str, unet: UNet) -> Style:
    """The LoRA of `spec`, its UNet part only. UserError for a file that is none, or of another family."""
    path, scale = parse_style(spec)
    return Style(path, scale, {"unet": read_lora(path, unet)})


def updates_of(styles: Sequence[Style], part: str) -> dict[str, list[Update]]:
    """layer of `part` -> what the styles add to it, in their order."""
    updates: dict[str, list[Update]] = {}
    for style in styles:
        for layer, pair in style.parts[part].items():
            updates.setdefault(layer, []).append((pair, style.scale))
    return updates
