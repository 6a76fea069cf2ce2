"""Stops at random moments, in small (tests/faults/kills.py has the whole campaign); two runs in a folder; no pickle."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rapm.cli import main
from rapm.disk import held

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "faults" / "kills.py"


def test_stopped_runs_end_as_the_uninterrupted_one() -> None:
    """In a process of its own, whose children are forked before it has any threads."""
    command = [sys.executable, str(SCRIPT), "--kills", "6", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"stops": 6' in done.stdout


@pytest.mark.gpu
def test_a_run_whose_memory_another_process_takes_loses_nothing() -> None:
    script = ROOT / "tests" / "faults" / "crowd.py"
    done = subprocess.run([sys.executable, str(script), "--spares", "64"], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("command", ["train", "trajectories"])
def test_a_folder_where_another_run_works_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture
) -> None:
    with held(tmp_path):
        assert main([command, "--output_dir", str(tmp_path)]) == 2
    assert "another run is at work there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_no_pickle_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run of the embedded teacher and its export, with every way to unpickle closed."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a pickle")

    class Closed(pickle.Unpickler):  # others derive from it when they are imported
        __init__ = refuse

    monkeypatch.setattr(pickle, "Unpickler", Closed)
    for owner, name in [(pickle, "load"), (pickle, "loads"), (pickle, "dump"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(owner, name, refuse)
    settings = "trajectories = 2\nvalidation_prompts = 1\nfine_steps = 1\nlora_rank = 1\nmax_train_steps = 1\n"
    (tmp_path / "settings.toml").write_text(settings)
    words = ["--config", str(tmp_path / "settings.toml"), "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    assert main(["train", *words]) == 0
    assert main(["export", "--run", str(tmp_path / "run")]) == 0


def test_no_code_of_ours_knows_pickle() -> None:
    words = re.compile(r"import pickle|pickle\.|torch\.load\(|torch\.save\(|allow_pickle=True|joblib|shelve")
    for file in [*(ROOT / "rapm").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        assert not words.search(file.read_text(encoding="utf-8")), file
