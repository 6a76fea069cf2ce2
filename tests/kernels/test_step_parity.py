"""Training with the kernels and with their references is the same training, over several iterations of fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from ops import DEVICE

from rapm.config import Config
from rapm.kernels import runtime
from rapm.lora import LoRA
from rapm.solver import solve
from rapm.step import LOSSES, Step
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import Trajectory, noise

SETTINGS = dict(fine_steps=2, learning_rate=3e-4, lr_warmup_steps=0)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No TF32, and attention that gives the same bits twice: what differs then is the kernels."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def trained(teacher: Teacher, trajectories: list[Trajectory], mode: str, slots: int, monkeypatch) -> tuple:
    """Losses by slot, and the LoRA, after training in `mode`."""
    monkeypatch.setattr(runtime, "MODE", mode)
    config = Config.preset("embedded").replace(**SETTINGS)
    lora = LoRA(teacher.unet, config.lora_rank)
    step = Step(teacher.unet, lora, teacher.schedule, config, trajectories[0], teacher.encode_negative())
    losses = []
    for i in range(slots):
        if i % config.steps == 0:
            step.load(trajectories[i // config.steps % len(trajectories)], i // config.steps)
        step.sums.zero_()
        step()
        losses.append(step.sums.clone())
    assert float(step.skipped) == 0
    return torch.stack(losses), lora.flat.detach()


def compare(teacher: Teacher, shape: tuple, prompts: list[str], slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MODE", "reference")
    text, uncond = teacher.encode(prompts), teacher.encode_negative()
    start = torch.stack([noise(i, shape) for i in range(len(prompts))])
    positions, fine = solve(
        teacher.unet, teacher.schedule, text, uncond, start, steps=4, fine_steps=2, guidance=7.5
    )  # fmt: skip
    trajectories = [
        Trajectory(positions[i], fine[i], text.rows(i, i + 1), prompt, i) for i, prompt in enumerate(prompts)
    ]
    mine, lora = trained(teacher, trajectories, "triton", slots, monkeypatch)
    theirs, wanted_lora = trained(teacher, trajectories, "reference", slots, monkeypatch)
    # The gradient is no continuous function of what the kernels round: where an activation of a head crosses zero, the
    # slope of its LeakyReLU jumps from 0.2 to 1. On 4x4 latents one crossing moved the norm by up to 0.7%.
    bounds = torch.tensor([5e-2 if name.endswith("grad_norm") else 1e-3 for name in LOSSES], device=mine.device)
    assert ((mine - theirs).abs() <= bounds * theirs.abs() + 1e-6).all(), (mine / theirs - 1).abs().amax(0)
    assert (lora - wanted_lora).norm() <= 1e-4 * wanted_lora.norm()


def test_one_slot(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.tiny_pipeline("sd1", tmp_path / "sd1")
    teacher = load_teacher(str(folder), device=DEVICE, dtype=torch.float32)
    compare(teacher, (4, 4, 4), ["a red seven"], 1, monkeypatch)


@pytest.mark.gpu
def test_twenty_iterations_of_the_embedded_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a red {digit} left of a blue star" for digit in ("one", "two", "three", "four", "five")]
    teacher = load_teacher("embedded", device=DEVICE, dtype=torch.float32)
    compare(teacher, teacher.latent_shape(), prompts, 80, monkeypatch)
