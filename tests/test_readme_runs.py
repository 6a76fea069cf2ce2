"""What README and docs/results.md show of whole runs, on made-up results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CARD = dict(device="A Card", driver="1.2", torch="2.11", cuda="13.0", cudnn="9", triton="3.6")
LIMITS = {"copy_gbs": 4000.0, "bf16_tflops": 800.0}


def provider(seconds: float) -> dict:
    held = dict(allocated_mib=2048.0, reserved_mib=3072.0, device_mib=4096.0)
    return dict(seconds=seconds, fastest=seconds, slowest=seconds, ready_seconds=12.4, **held)


def budget(seconds: float, process: float | None = None, **more: object) -> dict:
    return dict(
        seconds=seconds, slowest=seconds, process_mib=process, reserved_mib=9000.0, allocated_mib=8000.0, **more
    )


WINDOW = dict(iteration_ms=20.0, allocated_mib=100.0, reserved_mib=200.0, rss_mib=3000.0, handles=40)
SOAK = dict(
    iterations=15_000, wanted=20_000, slots=60_000, seconds=540.0, precision="no", warm=1000, window=1000, first=WINDOW,
    last={**WINDOW, "iteration_ms": 20.2}, growth_mib=dict(allocated_mib=0.0, reserved_mib=2.0, rss_mib=7.5), handles=0,
    drift=0.01, skipped=0, missing=[], flat=True, bounds=dict(mib=16.0, handles=0, drift=0.02),
)  # fmt: skip
REPORTS = {
    "step": {
        "models": {
            "sdxl": {"card": CARD, "limits": LIMITS, "tflop": 120.0, "naive": provider(4.0), "stock": provider(1.0),
                     "compile": {"failed": "not ready within 480 s"}, "rapm": provider(0.5)},
            "embedded": {"card": {**CARD, "device": "Another"}, "limits": LIMITS, "tflop": 0.1, "rapm": provider(0.02)},
        },
    },
    "trajectories": {
        "models": {"sdxl": {"card": CARD, "limits": LIMITS, "tflop": 540.0,
                            "stock": dict(seconds=4.0, share=0.17, mib=8192.0),
                            "rapm": {"1": dict(seconds=2.0, share=0.34, mib=6144.0)}}},
    },
    "memory": {
        "card": CARD,
        "rows": {
            "rapm sdxl 1 none": budget(0.4, predicted_mib=17_000.0, moved=0),
            "rapm sdxl 1 12G": budget(0.5, 11_900.0, predicted_mib=11_000.0, final_predicted_mib=11_800.0,
                                      moved_mib=50.0, promised=1.3, frozen_weights="full"),
            "rapm sdxl 64 none": budget(0.5, predicted_mib=17_000.0),
            "rapm sdxl 64 8G": budget(1.0, predicted_mib=8_000.0, frozen_weights="int8"),
            "rapm sd15-768 16 none": budget(0.2, predicted_mib=5_000.0, moved=0),
            "rapm sd15-768 4 none": budget(0.2, predicted_mib=5_000.0, moved=0),
            "rapm sdxl 1 4G": {"failed": "vram 4.00G is too little for sdxl at rank 1: at least --vram 6.1G"},
            "stock sdxl 1 none": budget(1.2),
            "stock sdxl 1 12G": {"failed": "out of memory: CUDA out of memory.", "device": "Another"},
            "move sdxl 1 none": budget(0.5, layers=3, moved_mib=70.0),
            "move sdxl 1 rapm": budget(0.6, layers=3, moved_mib=70.0),
            "move sdxl 1 torchtune": {"failed": "torchtune is not installed"},
        },
    },
    "job": {
        "card": CARD, "limits": LIMITS, "share": 0.05, "vram": "12G", "hours": 2.34, "goal_hours": 2.5,
        "stages": {
            "trajectories": dict(count=1000, measured=48, batch=8, first_seconds=30.0, seconds=1.9, share=0.048),
            "training": dict(count=20_000, measured=1000, first_seconds=60.0, seconds=0.35, share=0.05),
        },
        "estimates": {"RTX 3060": dict(hours=52.4, times=23.6, slowdown=1.05, gib=12)},
    },
    "soak": {
        "card": CARD, "soak": SOAK,
        "fp16": {**SOAK, "iterations": 1250, "wanted": 1250, "slots": 5000, "precision": "fp16", "skipped": 3,
                 "missing": ["losses: not those of 125 iterations"]},
        "same_bits": {"iterations": 100, "precision": "no",
                      "default": dict(same=False, different=7, of=279, largest=2e-6),
                      "deterministic": dict(same=True, different=0, of=279, largest=0.0)},
    },
    "crowd": {
        "card": CARD,
        "cases": {
            "0": dict(crowded_at=27, code=1, ended_at=100, stepped_down=False, line="rapm: out", same_lora=True),
            "64": dict(crowded_at=26, code=0, ended_at=400, stepped_down=True, line="", same_lora=True),
        },
    },
    "distributed": {
        "card": CARD, "model": "sd15", "equal": {"losses": 1.5e-6, "weights": 2e-7}, "trajectories": 256,
        "ranks": {"1": dict(trajectories=1.5, slots=30.0, sent_mib=0.0),
                  "2": dict(trajectories=2.9, slots=57.0, sent_mib=5.0)},
        "speedup": dict(trajectories=1.93, slots=1.9),
    },
    "low_precision": {
        "slots": {"card": CARD, "models": {"sdxl": {"int8": dict(
            weights_mib=3072.0, seconds=0.41, reserved_mib=10_240.0, allocated_mib=9000.0,
            to_fp32=dict(output=0.02, position=0.001, gradient=0.05), to_bf16={},
        )}}},
        "quality": dict(card=CARD, iterations=2000, seeds=3, pairs=4096,
                        summary={"nf4": dict(d=[0.5, 0.04], prompt=[0.99, 0.001], rmse=[0.08, 0.0002])}),
    },
    "full_teacher_sdxl_14G": {
        "card": CARD, "family": "sdxl", "resolution": [1024, 1024], "unet_gb": 5.13,
        "seconds": {"make": 24.4, "load folder": 9.0}, "seconds_per_iteration": 0.474, "vram_mib": 20480.0,
        "host_peak_gb": 21.6, "lora_mb": 12.6,
    },
}  # fmt: skip


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/readme.py with the results in `tmp_path`: none yet."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    yield readme
    for name in ("readme", "readme_kernels", "readme_runs", "scaling", "tables"):
        sys.modules.pop(name, None)


def section(readme: ModuleType, name: str) -> str:
    """The section of a page that has only its markers, in one line for each paragraph or row of a table."""
    results = readme.SECTIONS[name][1]
    (readme.RESULTS / f"{results}.json").write_text(json.dumps(REPORTS[results]))
    page = f"a\n<!-- {name}:begin -->\n<!-- {name}:end -->\nb\n"
    text = readme.render(page, "page", [name])
    assert readme.render(text, "page", [name]) == text
    assert text.startswith("a\n<!-- ") and text.endswith("-->\nb\n")
    return "\n".join(part if part.startswith("|") else " ".join(part.split()) for part in text.split("\n\n"))


def test_a_section_without_its_result_stays_as_it_is(readme: ModuleType) -> None:
    """And each has its place, on one page."""
    assert sorted(name for names in readme.PAGES.values() for name in names) == sorted(readme.SECTIONS)
    for page, names in readme.PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert readme.render(text, page, names) == text
        assert sorted(re.findall(r"<!-- (\w+):begin -->", text)) == sorted(names)


def test_the_speed_of_both(readme: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section(readme, "speed")
    assert "| | SDXL s | over rapm | of the limit | GiB |" in text and "embedded" not in text
    assert "| rapm | 0.500 | 1.00 | 30% | 3.0 |" in text and "| compile | failed | – | – | – |" in text
    places = [text.index(f"| {name} |") for name in ("rapm", "stock", "naive", "compile")]
    assert places == sorted(places)
    models = {**REPORTS["step"]["models"], "sd15": {**REPORTS["step"]["models"]["embedded"]}}
    monkeypatch.setitem(REPORTS, "step", {"models": models})
    text = section(readme, "speed")
    assert "| stock | not run | – | – | – | 1.000 | 2.00 | 15% | 3.0 |" in text
    assert "one Another (SD1.5) and one A Card (SDXL)" in text


def test_an_iteration(readme: ModuleType) -> None:
    text = section(readme, "step")
    assert "| naive | 4.000 | ████████████████████ | 8.00 | 4% | 2.0 | 3.0 | 12 |" in text
    assert "**SDXL, 1024x1024**, one A Card, torch 2.11, 800 TFLOP/s" in text and "one Another, torch" in text
    assert "| rapm | 0.500 | ██ | 1.00 | 30% |" in text and "| rapm | 0.020 | " in text
    assert "Not measured: SDXL compile (not ready within 480 s)." in text
    places = [text.index(words) for words in ("**SDXL", "| rapm | 0.500", "| stock | 1.000", "| naive | 4.000")]
    assert places == sorted(places) and places[-1] < text.index("the embedded teacher, 64x64")


def test_trajectories(readme: ModuleType) -> None:
    text = section(readme, "trajectories")
    assert "| SDXL stock, batch 1 | 4.000 | 1.00 | 17% | 8.0 |" in text
    assert "| SDXL rapm, batch 1 | 2.000 | 0.50 | 34% | 6.0 |" in text


def test_budgets(readme: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section(readme, "budgets")
    assert "| none | 0.400 | 1.00 | – | 9,000 | 17,000 | 0 | 1.200 | 9,000 |" in text
    assert "| 12G | 0.500 | 1.25 | 1.30 | 11,900 | 11,800 | 50 | out of memory | – |" in text
    assert "**SDXL, 1024x1024, rank 1**; stock at 12G: one Another\n" in text and "768x768" not in text
    assert "| 4G | refused | – | – | – | – | – | not run | – |" in text
    rows = {key: REPORTS["memory"]["rows"][key] for key in reversed(REPORTS["memory"]["rows"])}  # as calls come to end
    monkeypatch.setitem(REPORTS, "memory", {**REPORTS["memory"], "rows": rows})
    assert section(readme, "budgets") == text


def test_budgets_that_cost_the_same_share_a_row(readme: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {f"rapm sdxl 1 {name}": budget(0.4, predicted_mib=9_000.0) for name in ("16G", "8G", "12G")}
    rows["stock sdxl 1 8G"] = budget(1.2)
    monkeypatch.setitem(REPORTS, "memory", {"card": CARD, "rows": rows})
    lines = section(readme, "budgets").split("\n")
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:] == ["| 16G, 12G", "| 8G"]


def test_memory(readme: ModuleType) -> None:
    """The tables without the peer, by rank as a number."""
    text = section(readme, "memory")
    assert "**SD1.5, 768x768, rank 16**" in text and "| none | 0.200 | 1.00 | – | 9,000 | 5,000 | 0 |" in text
    assert text.index("SD1.5, 768x768, rank 4*") < text.index("SD1.5, 768x768, rank 16*") and "rank 1*" not in text
    assert "| rapm | 0.600 | +0.100 | 7.8 |" in text and "| torchtune | torchtune is not installed |  |" in text


def test_what_fits(readme: ModuleType) -> None:
    text = section(readme, "fits")
    assert "| `--vram` | SDXL, 1024x1024, rank 1 | SDXL, 1024x1024, rank 64 |" in text and "| none |" not in text
    assert "| 12G | 1.25 | not run |" in text and "| 8G | not run | 2.00 (int8) |" in text
    assert "| 4G | refused | not run |" in text


def test_the_job(readme: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section(readme, "job")
    assert "takes **2.34 hours** on one A Card within 12G (goal: under 2.5)" in text
    assert "1,000 iterations of 0.350 s" in text
    assert "| RTX 3060, 12 GB | 52 | 23.6 times as long | 1.05 times |" in text
    part = {**REPORTS["job"], "stages": {"training": REPORTS["job"]["stages"]["training"]}}
    monkeypatch.setitem(REPORTS, "job", {key: part[key] for key in ("card", "limits", "vram", "stages")})
    assert "Only a part of the whole job was measured yet: training." in section(readme, "job")


def test_long_runs(readme: ModuleType) -> None:
    """What was not reached, or is missing, is said."""
    text = section(readme, "soak")
    assert "15,000 iterations (of 20,000 that were asked for: the time was up) in one process took 9 minutes" in text
    assert "from 20.00 to 20.20 ms (+1.0%; bound 2%)" in text and "the host's by +7.5 (bound 16)" in text
    assert "In fp16, 5,000 slots: 3 updates skipped; losses: not those of 125 iterations." in text
    assert "7 of 279 tensors differ, by 2.0e-06 at the most" in text and "the same LoRA bit for bit." in text


def test_a_crowded_card(readme: ModuleType) -> None:
    text = section(readme, "crowd")
    assert "| 0 MiB | 27 | exit code 1 at 100, one line | yes |" in text
    assert "| 64 MiB | 26 | went on with less kept | yes |" in text


def test_two_gpus(readme: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section(readme, "distributed")
    assert "losses 1.5e-06, weights 2.0e-07" in text
    assert "| 2 GPUs | 2.90 | 57.00 |" in text and "| times | 1.93 | 1.90 |" in text
    only = {name: x for name, x in REPORTS["distributed"].items() if name != "ranks"}
    monkeypatch.setitem(REPORTS, "distributed", {**only, "speedup": {}})
    assert "losses 1.5e-06, weights 2.0e-07" in section(readme, "distributed")


def test_full_size_teachers(readme: ModuleType) -> None:
    """Of the runs that are there."""
    text = section(readme, "full")
    assert "| | make | load folder | one iteration | GPU GiB | host GB | LoRA MB |" in text
    assert "| SDXL, 1024x1024, 14G | 24 | 9 | 0.474 | 20.0 | 21.6 | 12.6 |" in text and "SD1.5" not in text


def test_low_precision(readme: ModuleType) -> None:
    text = section(readme, "low_precision")
    assert "| SDXL int8 | 0.410 | 3.0 | 10.0 | 2.0e-02 | 1.0e-03 | 5.0e-02 |" in text
    assert "| nf4 | 0.50 ± 0.04 | 99.0% ± 0.1% | 0.0800 ± 0.0002 |" in text and "of 3 seeds" in text
