"""A run under a budget: refused at once, planned, and carried on after an out-of-memory with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rapm.cli import main
from rapm.step import Step
from rapm.train import Training

SETTINGS = """
trajectories = 3
fine_steps = 2
guidance = 3.0
validation_prompts = 2
learning_rate = 1e-3
replay_size = 2
log_steps = 1
checkpointing_steps = 4
validation_steps = 4
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.tiny_pipeline("sd2", folder / "teacher")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "settings.toml").write_text(SETTINGS)
    return folder


def arguments(place: Path, output: Path, *extra: str) -> list[str]:
    return [
        "train", "--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--output_dir",
        str(output), "--config", str(place / "settings.toml"), "--report_to", "none", "--lora_rank", "2",
        "--max_train_steps", "4", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def free(place: Path) -> dict[str, torch.Tensor]:
    """The state after a run without a budget."""
    assert main(arguments(place, place / "free")) == 0
    return load_file(place / "free/checkpoint-4/state.safetensors")


def out_of_memory(monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> list[int]:
    """Slots, counted over all attempts, that have done their work and then find no memory; what ran is appended."""
    ran: list[int] = []
    call = Step.__call__

    def step(self: Step) -> None:
        call(self)
        ran.append(int(self.slot))
        if len(ran) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Step, "__call__", step)
    return ran


def test_a_budget_changes_no_number(place, free, tmp_path, capsys):
    """Tight: layers are checkpointed, recomputed or moved, and every bit is that of the run that keeps everything."""
    assert main(arguments(place, tmp_path / "run", "--vram", "0.78G")) == 0
    out = capsys.readouterr().out
    assert "memory: 0.8 GiB" in out and "checkpoint" in out, out
    state = load_file(tmp_path / "run/checkpoint-4/state.safetensors")
    assert state.keys() == free.keys() and all(torch.equal(x, free[name]) for name, x in state.items())


def test_out_of_memory_goes_on_from_the_same_iteration(place, free, tmp_path, monkeypatch, capsys):
    """In the first iteration and later, twice in one: said once, and every bit is that of the undisturbed run."""
    ran = out_of_memory(monkeypatch, {3, 5, 14})
    plans = []
    replan = Training._replan

    def noted(self: Training) -> None:
        replan(self)
        plans.append(self.budget.plan.kept)

    monkeypatch.setattr(Training, "_replan", noted)
    assert main(arguments(place, tmp_path / "run", "--vram", "4G")) == 0
    assert len(ran) == 16 + 3 + 2 + 1  # the slots of three lost attempts
    assert len(plans) == 3 and plans == sorted(plans, reverse=True)
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("out of memory") == 1
    state = load_file(tmp_path / "run/checkpoint-4/state.safetensors")
    assert all(torch.equal(x, free[name]) for name, x in state.items())


def test_when_nothing_is_left_to_give_it_says_so(place, tmp_path, monkeypatch, capsys):
    out_of_memory(monkeypatch, set(range(1, 1000)))
    assert main(arguments(place, tmp_path / "run", "--vram", "4G")) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rapm: ")]
    assert len(lines) == 1 and "out of memory in iteration 0" in lines[0] and "Tried to allocate" in lines[0]


def test_a_budget_that_cannot_work_is_refused_before_the_weights_are_read(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rapm.train.load_teacher", lambda *_, **__: pytest.fail("the weights were read"))
    assert main(arguments(place, tmp_path / "run", "--vram", "500M")) == 2
    assert "too little" in (error := capsys.readouterr().err) and "at least --vram 0." in error


def test_the_unet_waits_while_another_part_visits(place, monkeypatch):
    from rapm.teacher import load_teacher

    teacher = load_teacher(str(place / "teacher"), device="cpu", dtype=torch.float32)
    prompts, wanted, moves = ["a cat"], teacher.encode(["a cat"]), []
    to = type(teacher.unet).to
    monkeypatch.setattr(type(teacher.unet), "to", lambda self, *a: moves.append(a[0]) or to(self, *a))
    teacher.aside = True
    assert torch.equal(teacher.encode(prompts).hidden, wanted.hidden)
    assert moves == ["cpu", torch.device("cpu")]  # away, and back to where it was


def test_dry_run_tells_the_plan(place, tmp_path, capsys):
    assert main(arguments(place, tmp_path / "run", "--vram", "4G", "--dry-run")) == 0
    assert "everything is kept for backward" in capsys.readouterr().out
