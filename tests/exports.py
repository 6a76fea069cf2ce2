"""What the tests of exports share: a small LoRA far from zero, noise for it, and files with something changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rapm.config import Config
from rapm.lora import LoRA
from rapm.teacher import Teacher
from rapm.unet import UNet

FAMILIES = ["sd1", "sd2", "sdxl"]
PROMPTS = ["a red circle", "two blue squares"]
CONFIG = Config(seed=3, output_dir="runs/demo", lora_rank=2)
RANK = CONFIG.lora_rank
HOSTILE = 'a "quoted" `tick` | pipe \\ back: #1 - [x](y) <b>bold</b>\n```\n---\nevil: true\u2028\x7f é 😀'


def trained(unet: UNet, seed: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA whose down and up are both far from zero."""
    lora = LoRA(unet, RANK)
    with torch.no_grad():
        lora.flat.copy_(0.05 * torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return lora.export()


def latents(teacher: Teacher) -> Tensor:
    return torch.randn(len(PROMPTS), *teacher.latent_shape(), generator=torch.Generator().manual_seed(7))


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict], None]) -> None:
    """Saves the file again after `change(tensors, metadata)`."""
    tensors, metadata = load_file(path), header(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
