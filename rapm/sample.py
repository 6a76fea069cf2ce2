"""Sampling with our UNet exactly as stock DDIM "trailing" walks it.

Shapes: B batch, C h w latents, H W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from rapm.errors import UserError
from rapm.export.lora_file import read_lora, text_lora
from rapm.layers import Lora
from rapm.schedule import Schedule
from rapm.solver import walk
from rapm.trajectories import noise
from rapm.unet import Text, UNet

if TYPE_CHECKING:
    from rapm.teacher import Teacher

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


def sample_with(
    teacher: Teacher,
    text: Text,
    noise: Tensor,
    steps: int,
    *,
    lora: Lora = None,
    guidance: float = 1.0,
    uncond: Text | None = None,
) -> Tensor:
    """`sample` with the teacher's UNet: latents B C h w, of as many at a time as there is room for; `uncond` B or 1."""
    most, parts = teacher.walk_batch or len(noise), []
    for start in range(0, len(noise), most):
        stop = start + most
        other = uncond.rows(start, stop) if uncond is not None and len(uncond.hidden) > 1 else uncond
        parts.append(
            sample(
                teacher.unet,
                teacher.schedule,
                text.rows(start, stop),
                noise[start:stop],
                steps,
                lora=lora,
                guidance=guidance,
                uncond=other,
            )
        )
    return torch.cat(parts)


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
                z = sample_with(
                    teacher,
                    Text.cat([text.rows(i - first, i - first + 1) for i, _ in some]),
                    torch.stack([noise(seed, shape) for _, seed in some]),
                    steps,
                    lora=lora,
                    guidance=guidance,
                    uncond=uncond,
                )
                yield some, teacher.decode(z)
                bar.update(len(some))
