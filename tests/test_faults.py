"""Stops at random moments, in small (tests/faults/kills.py has the whole campaign), and two runs in one folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rapm.cli import main
from rapm.disk import held

SCRIPT = Path(__file__).parent / "faults" / "kills.py"


def test_stopped_runs_end_as_the_uninterrupted_one() -> None:
    """In a process of its own, whose children are forked before it has any threads."""
    command = [sys.executable, str(SCRIPT), "--kills", "6", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"stops": 6' in done.stdout


@pytest.mark.parametrize("command", ["train", "trajectories"])
def test_a_folder_where_another_run_works_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture
) -> None:
    with held(tmp_path):
        assert main([command, "--output_dir", str(tmp_path)]) == 2
    assert "another run is at work there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
