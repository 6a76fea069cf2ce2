"""benchmarks/job.py, as far as a CPU goes: both stages in small, the sum, and the estimate for other cards."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from rapm.loading.families import model_of
from rapm.memory.cards import Card

ROOT = Path(__file__).parents[1]
STAGES = {
    "trajectories": dict(first_seconds=36.0, count=1000, seconds=1.8),
    "training": dict(first_seconds=72.0, count=20_000, seconds=0.36),
}
LIMITS = {"bf16_tflops": 800.0, "copy_gbs": 4000.0}
FAMILIES = {"gemm": 30.0, "conv": 10.0, "attention": 20.0, "norm": 30.0, "lora": 10.0}
SLOT_TIME = {"card": {"device": "A Card"}, "models": {"sdxl": {"after": {"families": FAMILIES}}}}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import job

    yield job
    for name in ("job", "step", "peers", "slot_time"):
        sys.modules.pop(name, None)


def test_arithmetic_goes_by_the_rate_and_the_rest_by_the_bandwidth(job: ModuleType) -> None:
    assert job.scaled(FAMILIES, LIMITS, Card("same", 80, 800, 4000, 55)) == pytest.approx(1)
    assert job.scaled(FAMILIES, LIMITS, Card("slow", 80, 200, 4000, 55)) == pytest.approx(0.6 * 4 + 0.4)
    assert job.scaled(FAMILIES, LIMITS, Card("narrow", 80, 800, 500, 55)) == pytest.approx(0.6 + 0.4 * 8)


def test_the_hours_of_the_job(job: ModuleType) -> None:
    """What comes first counts once, and nothing is concluded from one stage."""
    report = {"card": {"device": "A Card"}, "limits": LIMITS, "stages": dict(list(STAGES.items())[:1])}
    assert "hours" not in job.conclude(report, SLOT_TIME, model_of("sdxl"))
    report["stages"] = STAGES
    found = job.conclude(report, SLOT_TIME, model_of("sdxl"))
    assert found["hours"] == pytest.approx(0.01 + 0.5 + 0.02 + 2.0)
    rows = found["estimates"]
    assert set(rows) == {"RTX 3060", "RTX 4080", "RTX 3090", "RTX 4090"}
    row = rows["RTX 3060"]
    assert row["times"] == pytest.approx(0.6 * 800 / 25.5 + 0.4 * 4000 / 360) and row["slowdown"] >= 1
    assert row["hours"] == pytest.approx(row["times"] * (0.51 + 2.02 * row["slowdown"]))


def test_a_slot_of_another_card_gives_no_estimate(job: ModuleType) -> None:
    report = {"card": {"device": "Another"}, "limits": LIMITS, "stages": STAGES}
    assert "estimates" not in job.conclude(report, SLOT_TIME, model_of("sdxl"))


def test_the_best_batch(job: ModuleType) -> None:
    """Of such a card's trajectories only."""
    rows = {"1": {"seconds": 3.0}, "8": {"seconds": 1.0}, "16": {"seconds": 2.0}}
    report = {"models": {"sdxl": {"card": {"device": "A Card"}, "rapm": rows}}}
    assert job.best_batch(report, "A Card", 4) == 8
    assert job.best_batch(report, "Another", 4) == job.best_batch({}, "A Card", 4) == 4


def test_the_job_in_small(job: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Both stages through the store, the solver and the training; nothing is written."""
    monkeypatch.setattr(job, "STORED", 3)
    monkeypatch.setattr(sys, "argv", ["job.py", "--check"])
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    assert job.main() == 0
    out = capsys.readouterr().out
    assert "trajectories: " in out and "training: " in out and "h for 20" in out
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before
    monkeypatch.setattr(sys, "argv", ["job.py", "--check", "--share", "0"])
    assert job.main() == 2
