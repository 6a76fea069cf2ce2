"""How a run begins and ends: whose folder it takes, what it reads back, what a stop or a failure leaves."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rapm.checkpoint import checkpoints, load_checkpoint
from rapm.cli import main
from rapm.config import Config
from rapm.errors import RunError, UserError
from rapm.evaluate.validate import Validation
from rapm.prompts import Row
from rapm.store import Store
from rapm.train import _keep_prompts, export_run
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


@pytest.mark.parametrize("beside", [".lock", "checkpoint-500/model.safetensors"])
def test_another_trainers_folder_is_left_alone(place, tmp_path, capsys, beside):
    """It writes the same names; and the lock is of a run that was refused."""
    (tmp_path / "checkpoint-500").mkdir()
    for name in ("pytorch_lora_weights.safetensors", beside):
        (tmp_path / name).write_text("precious")
    assert main(arguments(place, tmp_path)) == 2
    assert "which no run wrote" in capsys.readouterr().err
    assert (tmp_path / "pytorch_lora_weights.safetensors").read_text() == "precious"


def test_settings_make_no_run(place, tmp_path, capsys):
    """A settings file of the name that a run gives its own, beside other things of its user."""
    (tmp_path / "config.toml").write_text("# why\nseed = 1\n")
    (tmp_path / "README.md").write_text("precious")
    assert main(arguments(place, tmp_path)) == 2
    assert "which no run wrote" in capsys.readouterr().err and (tmp_path / "README.md").read_text() == "precious"


@pytest.mark.parametrize("more, kept", [("a\nb\nc\n", "a\nb\nc\n"), ("a\n", "a\nb\n")])
def test_more_or_fewer_prompts_of_one_list(tmp_path, more, kept):
    """As for more or fewer trajectories: the longer list stays."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    config = _keep_prompts(tmp_path, Config(prompts="-"), [Row(text) for text in more.split()])
    assert (tmp_path / "prompts.txt").read_text() == kept and config.prompts == str(tmp_path / "prompts.txt")


def test_nothing_is_left_of_a_dry_run(place, tmp_path):
    (tmp_path / "a").mkdir()
    assert main(arguments(place, tmp_path / "a/b/c/d", "--dry-run")) == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_another_runs_checkpoint_sets_this_run_aside(place, tmp_path):
    """All of it: its figures and files are not those of the run that goes on here."""
    run = tmp_path / "run"
    assert main(arguments(place, run)) == 0
    shutil.copytree(run / "checkpoint-2", tmp_path / "other/checkpoint-2")
    assert main(arguments(place, run, "--resume_from_checkpoint", str(tmp_path / "other/checkpoint-2"))) == 0
    aside = {path.name for path in (run / "previous-1").iterdir()}
    assert {"checkpoint-2", "checkpoint-4", "metrics.jsonl", "config.toml", "README.md"} <= aside
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4"]


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


def test_a_run_is_understood_from_anywhere(place, tmp_path, monkeypatch, capsys) -> None:
    """Made of relative paths and of the standard input, then moved: exported and resumed from another folder."""
    monkeypatch.chdir(place)
    (place / "own.toml").write_text(SETTINGS + "negative_prompt = 'blurred'\n")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a tree\na hill\na (red) house\n")))
    words = ["train", "--teacher", "teacher", "--prompts", "-", "--output_dir", "own", "--config", "own.toml",
             "--report_to", "none", "--lora_rank", "2", "--max_train_steps", "2"]  # fmt: skip
    assert main(words) == 0
    monkeypatch.chdir(tmp_path)
    (place / "own").rename(tmp_path / "moved")
    (tmp_path / "models").mkdir()
    shutil.copytree(place / "teacher", tmp_path / "models/teacher")
    capsys.readouterr()
    assert main(["export", "--run", "moved"]) == 0
    assert "prompts: 3 in moved/trajectories, as " in capsys.readouterr().out
    config = ["--config", "moved/config.toml", "--output_dir", "moved", "--teacher", "models/teacher"]
    assert main(["train", *config, "--resume_from_checkpoint", "latest"]) == 0
    assert main(["sample", "a tree", "--lora", str(tmp_path / "moved"), "--output", "tree.png"]) == 0
    shutil.rmtree(tmp_path / "moved/trajectories")
    assert main(["export", "--run", "moved"]) == 2
    assert "prompts: cannot read" in capsys.readouterr().err


def test_who_closes_or_fills_the_output_gets_no_traceback(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert main(["plan", "--teacher", "sd15", "--vram", "12G"]) == 0

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sys.stdout", Full())
    assert main(["plan", "--teacher", "sd15", "--vram", "12G"]) == 1
    assert capsys.readouterr().err.strip() == "rapm: [Errno 28] No space left on device"


@pytest.mark.parametrize("command", [["evaluate", "--pairs", "4"], ["report"], ["export"]], ids=lambda words: words[0])
def test_a_folder_that_cannot_be_written_is_one_line(place, tmp_path, monkeypatch, capsys, command) -> None:
    """And for an evaluation before any picture is drawn."""
    assert main(arguments(place, tmp_path / "run", "--max_train_steps", "2")) == 0

    def refused(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("rapm.disk.make_writable", refused)
    monkeypatch.setattr("rapm.train.make_writable", refused)
    monkeypatch.setattr("rapm.disk.open", refused, raising=False)
    monkeypatch.setattr("rapm.evaluate.compare.teacher_to_draw", None)
    capsys.readouterr()
    place_of = [str(tmp_path / "run")] if command[0] == "report" else ["--run", str(tmp_path / "run")]
    extra = ["--samples", "4"] if command[0] == "evaluate" else []
    assert main([command[0], *place_of, *extra]) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rapm: ")]
    assert "Read-only file system" in line


def test_a_host_without_the_memory_is_one_line(capsys) -> None:
    assert main(["sample", "a tree", "--resolution", "99999992x99999992"]) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rapm: ")]
    assert "memory" in line


def test_a_store_that_is_a_file_is_one_line(place, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "settings.toml").write_text(f"{SETTINGS}store = '{tmp_path / 'file'}'\n")
    words = arguments(place, tmp_path / "run")
    words[words.index(str(place / "settings.toml"))] = str(tmp_path / "settings.toml")
    assert main(words) == 2
    assert "file cannot be written (File exists)" in capsys.readouterr().err


def test_more_captions_than_there_are_is_one_line(tmp_path, capsys) -> None:
    assert main(["train", "--output_dir", str(tmp_path / "run"), "--validation_prompts", "12000", "--dry-run"]) == 2
    assert "12000 captions: the embedded teacher has at most" in capsys.readouterr().err


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
