"""benchmarks/soak.py, as far as a CPU goes: what grows is seen, what a run has not left is named, a short soak ends."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rapm.checkpoint import checkpoints
from rapm.config import Config

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("done", [50, 1250, 20_000])
def test_the_windows_lie_apart_and_after_the_warm_up(soak: ModuleType, done: int) -> None:
    first, last = soak.windows(done)
    assert first.start > 0 and first.stop <= last.start and last.stop == done and len(first) == len(last) <= 1000
    assert (first.start, len(first)) == (1000, 1000) or done < 20_000


def test_figures_see_what_grows(soak: ModuleType) -> None:
    """Every tenth iteration waits for the GPU: the time of a stretch counts, not that of its fast iterations."""
    notes, now = [], 0.0
    for i in range(100):
        now += 0.1 if i % 10 == 9 else 0.0
        notes.append((now, 5.0, 7.0, 100.0 + i, 12 + (i > 60)))
    first, last = (soak.figures(notes, window, 10) for window in soak.windows(100))
    assert first["iteration_ms"] == pytest.approx(10) and last["allocated_mib"] == 5.0
    assert last["rss_mib"] - first["rss_mib"] == 40 and (first["handles"], last["handles"]) == (12, 13)


def test_a_soak_that_the_limit_stops_leaves_a_whole_run(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(soak.Watched):
        def iterate(self) -> None:
            super().iterate()
            if self.done == 12:
                self.end = 0.0  # has come

    monkeypatch.setattr(soak, "Watched", Late)
    config = Config.preset("embedded").replace(**soak.CHECK, max_train_steps=10_000, output_dir=str(tmp_path / "run"))
    found = soak.soak(config, math.inf)
    done = found["iterations"]
    assert done == 13 and found["missing"] == [] and found["skipped"] == 0
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == f"checkpoint-{done}"
    assert all(math.isfinite(x) for row in (found["first"], found["last"]) for x in row.values())

    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[1:]))
    (checkpoints(tmp_path / "run")[0] / "state.safetensors").unlink()
    resolved = Config().replace(**Config.from_toml(tmp_path / "run" / "config.toml"))
    problems = soak.missing(tmp_path / "run", resolved, done)
    assert [line.split(":")[0] for line in problems] == ["losses", "checkpoints"]


def test_needs_a_gpu_or_says_so(soak: ModuleType) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check", "--iterations", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and "at least" in done.stderr
