"""The embedded teacher's unit costs: a slot of training, and a batch of trajectories (`make bench`)."""

from __future__ import annotations

import pytest
import torch

from rapm.config import Config
from rapm.device import pick_device
from rapm.lora import LoRA
from rapm.solver import solve
from rapm.step import Step
from rapm.store import Trajectory
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import noise

CONFIG = Config.preset("embedded")
PROMPT = "a red seven left of a blue star on a striped background"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("embedded", device=pick_device(CONFIG), dtype=torch.float32)


def solved(teacher: Teacher, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    start = torch.stack([noise(i, teacher.latent_shape()) for i in range(batch)])
    text, uncond = teacher.encode([PROMPT] * batch), teacher.encode_negative()
    options = dict(steps=CONFIG.steps, fine_steps=1, guidance=CONFIG.guidance)
    positions, fine = solve(teacher.unet, teacher.schedule, text, uncond, start, **options)
    return positions.cpu(), fine.cpu()  # which waits for the device


def test_slot(benchmark, teacher):
    """One slot, eager: two student passes, the encoder passes, both backward passes, both updates."""
    positions, fine = solved(teacher, 1)
    trajectory = Trajectory(positions[0], fine[0], teacher.encode([PROMPT]), PROMPT, 0)
    config, lora = CONFIG.replace(fine_steps=1), LoRA(teacher.unet, CONFIG.lora_rank)
    step = Step(teacher.unet, lora, teacher.schedule, config, trajectory, teacher.encode_negative())

    def slot() -> float:
        step.slot.zero_()
        step()
        return float(step.skipped)  # waits for the device

    assert benchmark(slot) == 0


def test_trajectories(benchmark, teacher):
    """16 trajectories of 4 guided steps."""
    positions, _ = benchmark(solved, teacher, 16)
    assert positions.shape == (16, 5, *teacher.latent_shape())
