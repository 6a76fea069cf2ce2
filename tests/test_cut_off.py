"""Benchmarks that are cut off: what was measured until then is in the file, with what other calls have measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
CARD, LIMITS = {"device": "A Card"}, {"bf16_tflops": 700.0}
MADE = {"card": CARD, "limits": LIMITS}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable]:
    """name, words, what is patched, an earlier report -> the report of a call that is cut off, as if on a GPU."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def call(name: str, words: str, earlier: dict, **changes: object) -> dict:
        module: ModuleType = __import__(name)
        for key, value in changes.items():
            monkeypatch.setattr(module, key, value)
        for key, value in dict(need_gpu=lambda: None, card=lambda: CARD, limits=lambda: LIMITS,
                               measuring=nullcontext, check=lambda *_: {"losses": 0.0}).items():  # fmt: skip
            monkeypatch.setattr(module, key, changes.get(key, value), raising=False)
        for key in ("stream", "Stream", "empty_cache", "reset_peak_memory_stats", "max_memory_reserved"):
            monkeypatch.setattr(torch.cuda, key, lambda *_: nullcontext() if _ else 0)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"card": CARD, **earlier}))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words.split(), "--output", str(path)])
        with pytest.raises(KeyboardInterrupt):
            module.main()
        return json.loads(path.read_text())

    yield call
    for path in (ROOT / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


def times(count: int, found: Callable) -> Callable:
    """`found`, `count` times; then the end."""
    done = []

    def call(*words: object, **options: object) -> object:
        done.append(words)
        if len(done) > count:
            raise KeyboardInterrupt
        return found(*words, **options)

    return call


ROW = dict(seconds=1.0, allocated_mib=1.0, reserved_mib=1.0)


@pytest.mark.parametrize("device", [CARD["device"], "Another"])
def test_step(run: Callable, device: str) -> None:
    """What another card measured of the same model goes."""
    sd15 = {"card": {"device": device}, "rapm": {"seconds": 2.0}, "compile": {"seconds": 3.0}}
    earlier = {"models": {"sd15": sd15, "sdxl": {"tflop": 1.0}}}
    rows = times(2, lambda command, limit: ROW if command[-1] == "stock" else {"failed": "no"})
    found = run("step", "--models sd15 --providers rapm stock lean", earlier, alone=rows, tflop=lambda model: 5.0)
    sd15 = {**MADE, "rapm": {"failed": "no"}, "stock": ROW, "tflop": 5.0}
    sd15 |= {"compile": {"seconds": 3.0}} if device == CARD["device"] else {}
    assert found["models"] == {"sd15": sd15, "sdxl": {"tflop": 1.0}}


@pytest.mark.usefixtures("run")
def test_a_cap_needs_a_device_with_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 refuses "cuda" alone."""
    import memory

    monkeypatch.setattr(memory.torch.cuda, "current_device", lambda: 3)
    assert memory.device_of(check=False) == torch.device("cuda", 3)


def test_memory(run: Callable) -> None:
    rows = times(2, lambda command, limit: ROW)
    found = run("memory", "--models sd15 --budgets 24G 16G 8G", {"rows": {"rapm sd15 64 none": ROW}}, alone=rows)
    assert [*found["rows"]] == ["rapm sd15 64 none", "rapm sd15 64 24G", "rapm sd15 64 16G"]


def test_slot_time(run: Callable) -> None:
    mode = dict(gpu_ms=1.0, kernel_ms=1.0, launches=1, families={"gemm": 1.0})
    earlier = {"models": {"sdxl": {"after": {"gpu_ms": 7.0}}}}
    found = run("slot_time", "", earlier, measure=times(3, lambda *_: mode), random_unet=lambda *_: torch.nn.Module())
    assert found["models"]["sd15"] == {"before": mode, "after": mode}
    assert found["models"]["sdxl"] == {"before": mode, "after": {"gpu_ms": 7.0}}


def test_trajectories(run: Callable) -> None:
    parts = {name: lambda *_, **__: lambda *_: None for name in ("random_unet", "Stock", "Solver")}
    found = run(
        "trajectories", "--models sd15",
        {"models": {"sd15": {**MADE, "rapm": {"32": {"seconds": 9.0}}}, "sdxl": {"a": 1}}},
        **parts, inputs=lambda *_: (), pass_tflop=lambda model: (1.0, 1.0), seconds=times(3, lambda *_: 1.0),
    )  # fmt: skip
    assert [*found["models"]["sd15"]["rapm"]] == ["32", "1", "2"] and found["models"]["sdxl"] == {"a": 1}
    assert found["models"]["sd15"]["stock"]["seconds"] == 1.0


def test_low_precision(run: Callable) -> None:
    row = {"full": {"to_fp32": {}, "to_bf16": {}, "weights_mib": 1.0}}
    earlier = {"quality": {"x": 1}, "slots": {"card": CARD, "models": {"sd15": {"int8": 1}, "sdxl": {"full": 2}}}}
    found = run("low_precision", "--parts slots", earlier, slots=times(1, lambda *_: row))
    assert found["slots"]["models"] == {"sd15": row, "sdxl": {"full": 2}}
    found = run("low_precision", "", {"quality": {"x": 1}}, slots=lambda *_: row, products=times(0, lambda *_: []))
    slots = {"card": CARD, "models": {"sd15": row, "sdxl": row}}
    assert found == {"card": CARD, "quality": {"x": 1}, "slots": slots}


def test_distributed(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much faster two are is said when both are there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def rates(words: list[str], check: bool) -> None:
        Path(words[words.index("--worker") + 1]).write_text(json.dumps({"trajectories": 1.0, "slots": 4.0}))

    earlier = {"ranks": {"2": {"trajectories": 1.5, "slots": 6.0}}}
    processes = SimpleNamespace(run=times(1, rates))
    found = run("distributed", "", earlier, subprocess=processes)
    assert found["equal"] == {"losses": 0.0} and found["speedup"] == {"trajectories": 1.5, "slots": 1.5}
    processes = SimpleNamespace(run=times(1, rates))
    assert run("distributed", "", {}, subprocess=processes)["speedup"] == {}
    processes = SimpleNamespace(run=times(1, rates))
    again = run("distributed", "--parts speed", found, subprocess=processes, check=times(0, lambda: {}))
    assert again["speedup"] == found["speedup"]


@pytest.mark.parametrize("earlier", [{}, {"equal": {"losses": 1.0}}, {"card": {}, "equal": {"losses": 0.0}}])
def test_nothing_is_timed_before_it_is_equal(
    run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, earlier: dict
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as end:
        run("distributed", "--parts speed", earlier, subprocess=SimpleNamespace(run=times(0, lambda *_: None)))
    assert end.value.code == 2 and "--parts equal comes first" in capsys.readouterr().err
