"""How a run begins and ends: whose folder it takes, what it reads back, what a stop or a failure leaves."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rapm.checkpoint import checkpoints, load_checkpoint
from rapm.cli import main
from rapm.config import Config
from rapm.errors import RunError, UserError
from rapm.evaluate.validate import Validation
from rapm.store import Store
from rapm.train import export_run
from rapm.training import Training

SETTINGS = "trajectories = 3\nvalidation_prompts = 1\nfine_steps = 2\nguidance = 3.0\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.place(tmp_path_factory.mktemp("place"), SETTINGS)


def arguments(place: Path, output: Path, *extra: str) -> list[str]:
    return ["train", "--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--output_dir",
            str(output), "--config", str(place / "settings.toml"), "--report_to", "none", "--lora_rank", "2",
            "--max_train_steps", "4", "--validation_steps", "2", "--checkpointing_steps", "2", *extra]  # fmt: skip


@pytest.mark.parametrize("name", ["README.md", "config.toml"])
def test_a_folder_of_others_is_left_alone(place, tmp_path, capsys, name):
    (tmp_path / name).write_text("precious")
    assert main(arguments(place, tmp_path)) == 2
    assert f"holds {name}, which no run wrote" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "precious"


def test_a_stop_while_the_last_checkpoint_is_written_is_heard(place, tmp_path, monkeypatch, capsys):
    measure = Validation.__call__

    def stopped(self, steps):
        signal.raise_signal(signal.SIGINT)
        return measure(self, steps)

    monkeypatch.setattr(Validation, "__call__", stopped)
    words = arguments(place, tmp_path / "run", "--validation_steps", "4")
    assert main(words) == 128 + signal.SIGINT
    assert "--resume_from_checkpoint latest goes on" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-4"
    monkeypatch.setattr(Validation, "__call__", measure)
    assert main([*words, "--resume_from_checkpoint", "latest"]) == 0


def test_damage_is_found_where_a_shard_is_read(place, tmp_path, capsys):
    """Not only by verify: a bit of a number may leave it finite."""
    assert main(["trajectories", *arguments(place, tmp_path / "run")[1:-6]]) == 0
    folder = tmp_path / "run" / "trajectories"
    path = next(folder.glob("shard-*"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name} is damaged.*delete it"):
        Store.open(folder)[0]
    assert main(arguments(place, tmp_path / "run")) == 2
    assert f"{path.name} is damaged" in capsys.readouterr().err


def test_a_validation_that_fails_costs_no_iteration(place, tmp_path, monkeypatch) -> None:
    """The checkpoint that is due is there, and the run goes on from it."""
    words = arguments(place, tmp_path / "run", "--checkpointing_steps", "4")
    measure, failing = Validation.__call__, [True]

    def fails(self: Validation, steps: object):
        if failing.pop():
            raise RunError("validation: no memory")
        failing.append(False)
        return measure(self, steps)

    monkeypatch.setattr(Validation, "__call__", fails)
    assert main(words) == 1
    assert (tmp_path / "run" / "checkpoint-2" / "state.safetensors").is_file()  # though none is due before the fourth
    failing.append(False)
    assert main([*words, "--resume_from_checkpoint", "latest"]) == 0
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_an_iteration_that_cannot_be_costs_none_before_it(place, tmp_path, monkeypatch) -> None:
    """As where no plan has the memory for it: a checkpoint of the iterations that were, and the run goes on from it."""
    words = arguments(place, tmp_path / "run", "--checkpointing_steps", "4", "--validation_steps", "4")
    walk = Training._walk

    def fails(self: Training, *work: object) -> None:
        if self.done == 3:
            raise RunError("out of memory in iteration 3")
        walk(self, *work)

    monkeypatch.setattr(Training, "_walk", fails)
    assert main(words) == 1
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    monkeypatch.setattr(Training, "_walk", walk)
    assert main([*words, "--resume_from_checkpoint", "latest"]) == 0
    assert main([str(tmp_path / "whole") if word == str(tmp_path / "run") else word for word in words]) == 0
    ends = [load_file(tmp_path / name / "checkpoint-4/state.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())


def test_a_checkpoint_is_due_by_time_too(place, tmp_path, monkeypatch) -> None:
    """On a slow card 500 iterations are hours. It is due at the next line of the log, here with each iteration."""
    words = arguments(place, tmp_path / "run", "--checkpointing_steps", "9", "--max_train_steps", "3")
    (place / "log.toml").write_text(SETTINGS + "log_steps = 1\nvalidation_steps = 9\ncheckpoints_total_limit = 9\n")
    words[words.index(str(place / "settings.toml"))] = str(place / "log.toml")
    monkeypatch.setattr("rapm.train.SAVED_EVERY", 0.0)
    assert main([*words, "--validation_steps", "9"]) == 0
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_resumed_run_holds_no_file(place, tmp_path) -> None:
    """Windows deletes none that is mapped, and old checkpoints are to go."""
    assert main(arguments(place, tmp_path / "run")) == 0
    path = tmp_path / "run/checkpoint-4"
    state, _ = load_checkpoint(path, Config.of_run(tmp_path / "run"))
    if Path("/proc/self/maps").exists():
        assert str(path) not in Path("/proc/self/maps").read_text()
    assert state


def test_the_best_checkpoint_alone_can_be_exported(tmp_path, monkeypatch) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    seen = []
    monkeypatch.setattr("rapm.train.find_best", lambda folder: (300, 1.0))
    with pytest.raises(UserError, match="only its best one: give --checkpoint best"):
        export_run(tmp_path)
    monkeypatch.setattr("rapm.train.find_checkpoint", lambda *words: seen.append(words) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(tmp_path, "best")
    assert seen == [(Path(tmp_path), "best")]
