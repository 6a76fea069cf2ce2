"""benchmarks/step.py and trajectories.py, as far as a CPU goes: the peers do rapm's work; who does not is named."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step

    yield step
    for name in ("step", "trajectories", "peers", "slot_time"):
        sys.modules.pop(name, None)


def test_all_compute_the_same_losses(step: ModuleType) -> None:
    step.check("cpu")


def test_a_peer_that_leaves_out_a_term_is_named(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SMALL", {"sd15": step.SMALL["sd15"]})
    monkeypatch.setattr(step.Stock, "total", lambda self, distances, generator: sum(distances))
    with pytest.raises(SystemExit, match="sd15 stock: loss differs"):
        step.check("cpu", slots=1)


@pytest.mark.parametrize("kind", ["Naive", "Stock"])
def test_a_peer_that_does_not_update_is_named(step: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(step, "SMALL", {"sd15": step.SMALL["sd15"]})
    made = step.make

    def idle(name: str, *arguments: object, **options: object) -> object:
        peer = made(name, *arguments, **options)
        if type(peer).__name__ == kind:
            peer.optimizer.step = lambda: None
        return peer

    monkeypatch.setattr(step, "make", idle)
    with pytest.raises(SystemExit, match=f"sd15 {kind.lower()}: loss differs"):
        step.check("cpu")


def test_fp32_is_not_tf32_while_it_is_checked(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import trajectories

    seen = []
    for module in (step, trajectories):
        monkeypatch.setattr(module, "SMALL", {"sd15": {}})
        monkeypatch.setattr(module, "UNet", lambda config: seen.append(torch.backends.cudnn.allow_tf32) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.check("cpu")
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


def test_work_of_an_iteration(step: ModuleType) -> None:
    """An SD1.5 pass has 0.803 TFLOP, its encoder and mid block 0.261."""
    assert step.tflop("sd15") == pytest.approx(4 * (3 * 0.803 + 4 * 0.261), rel=0.02)


def test_the_stock_pipeline_ends_where_the_solver_does(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import trajectories

    trajectories.check("cpu")
    monkeypatch.setattr(trajectories, "SMALL", {"sdxl": step.SMALL["sdxl"]})
    monkeypatch.setattr(trajectories, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="sdxl: the latents differ"):
        trajectories.check("cpu")
