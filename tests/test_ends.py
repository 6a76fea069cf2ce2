"""How a run begins and ends: whose folder it takes, what it reads back, what a stop or a failure leaves."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tiny

from rapm.checkpoint import checkpoints
from rapm.cli import main
from rapm.errors import RunError, UserError
from rapm.evaluate.validate import Validation
from rapm.store import Store
from rapm.train import export_run

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
