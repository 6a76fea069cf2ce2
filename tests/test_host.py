"""The host's memory: how much there is, what plans ask of it, and what they do where it is not enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rapm import doctor
from rapm.cli import main
from rapm.config import Config
from rapm.errors import UserError
from rapm.loading.families import model_of
from rapm.memory import cards, host
from rapm.memory.budget import Budget, words
from rapm.memory.cards import GIB, MIB
from rapm.memory.offload import slab_bytes
from rapm.memory.planner import PHASES, Planner

SDXL = Config.preset("sdxl")
FREE, OWN = 12 * GIB, 300 * MIB


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 GiB are free, this process has 300 MiB, and it is in no cgroup."""
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc/meminfo", f"MemTotal: 16308 kB\nMemFree:  1 kB\nMemAvailable:   {FREE // 2**10} kB\n")
    write(tmp_path / "proc/self/status", f"Name:\tpython\nVmRSS:\t 99 kB\nRssAnon:\t  {OWN // 2**10} kB\n")
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group(folder: Path, most: object, used: int, version: int = 2) -> None:
    """A cgroup, a quarter of whose usage is the page cache."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (most, used), strict=True):
        write(folder / name, value)
    before = "total_" * (version == 1)
    lines = ("anon 1", f"{before}inactive_file {used // 8}", f"{before}active_file {used // 8}")
    write(folder / "memory.stat", "\n".join(lines))


def test_what_is_free_and_what_it_has(machine, monkeypatch):
    assert host.available() == FREE and host.held() == OWN
    assert host.limit() == FREE - host.MARGIN + OWN
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host.limit() == (FREE - host.MARGIN) // 4 + OWN
    (machine / "proc/meminfo").unlink()  # as on macOS
    assert host.available() is None and host.limit() is None


def test_a_containers_limit_counts_without_the_cache_that_it_can_let_go(machine):
    """The cgroup's own limit or that of one around it, whichever leaves less."""
    write(machine / "proc/self/cgroup", "0::/outer/inner")
    group(machine / "cgroup/outer/inner", "max", 2 * GIB)
    assert host.available() == FREE
    group(machine / "cgroup/outer", 8 * GIB, 4 * GIB)
    assert host.available() == 5 * GIB
    group(machine / "cgroup/outer/inner", 4 * GIB, 2 * GIB)
    assert host.available() == 2.5 * GIB
    write(machine / "proc/self/cgroup", "0::/the/hosts/own/path")  # which a container does not see
    group(machine / "cgroup", 6 * GIB, 2 * GIB)
    assert host.available() == 4.5 * GIB


def test_a_limit_of_version_1(machine):
    write(machine / "proc/self/cgroup", "5:cpu,cpuacct:/job\n4:memory:/job\n0::/")
    group(machine / "cgroup/cpu/job", GIB, 0)
    group(machine / "cgroup/memory", 2**63 - 4096, 9 * GIB, version=1)
    assert host.available() == FREE
    group(machine / "cgroup/memory/job", 8 * GIB, 4 * GIB, version=1)
    assert host.available() == 5 * GIB


def test_doctor_tells(machine):
    assert str(doctor._host()).endswith("12.0 GiB of memory for this process")
    (machine / "proc/meminfo").unlink()
    assert "memory unknown" in str(doctor._host())


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(model_of("sdxl"), SDXL, cards.CARDS[0])


@pytest.mark.parametrize("vram", [9.5, 11.2, 12])
def test_no_plan_pins_more_than_the_host_has(planner, vram):
    """Down to nothing; less room is never faster, and never slower than moving nothing."""
    planner.host, planner.copies = None, False
    still = planner.plan(int(vram * GIB)).slowdown
    planner.copies = True
    free = planner.plan(int(vram * GIB))
    assert free.moved and free.slowdown < still
    least, slower = free.host["train"] - slab_bytes(free.moved), free.slowdown
    for share in (1.0, 0.7, 0.4, 0.1, 0.0):
        planner.host = int(least + share * slab_bytes(free.moved))
        try:
            plan = planner.plan(int(vram * GIB))
        except UserError as error:  # the UNet cannot wait on the host either
            assert "where the host has" in str(error) and vram == 9.5
            continue
        assert tuple(plan.host) == PHASES and max(plan.host.values()) <= planner.host
        assert plan.moved <= share * free.moved + MIB
        assert slower <= plan.slowdown + 1e-9 and plan.slowdown <= still + 1e-9
        slower = plan.slowdown
    planner.host = None


def test_what_the_host_holds(planner):
    """Bytes of the parts, the UNet that waits, the slab, and at the export a whole stock pipeline beside them."""
    planner.host, sizes = None, planner.sizes
    plan = planner.plan(9 * GIB)
    assert plan.unet_waits and plan.stock_by_blocks and plan.proven and plan.moved > 4 * GIB
    parts = sizes.text + sizes.vae
    assert plan.host["encode"] >= parts + sizes.weights
    assert plan.host["train"] >= parts + plan.moved + sizes.state
    assert plan.host["validate"] >= parts + sizes.weights and plan.host["validate"] < plan.host["train"]  # no slab
    assert plan.host["export"] >= parts + sizes.weights + sizes.whole + parts // 2
    assert planner.plan(24 * GIB).host["encode"] < parts + sizes.weights


def test_where_only_the_export_is_too_large_the_proof_is_left_out(planner):
    """And only there: what the card alone cannot hold is refused as before."""
    smallest = planner.smallest()
    planner.host = int(13.5 * GIB)
    tight, wide = planner.plan(9 * GIB), planner.plan(12 * GIB)
    assert not tight.proven and tight.host["export"] < 13.5 * GIB
    assert wide.proven and wide.stock_by_blocks and not wide.unet_waits  # ours stays on the card, where it has room
    planner.host = 64 * GIB
    assert planner.smallest() == smallest and planner.plan(9 * GIB).proven
    planner.host = None


def test_the_advice_works_on_such_a_host(planner):
    planner.host = int(7.5 * GIB)
    with pytest.raises(UserError, match=r"vram 8.00G .*, where the host has 7.5 GiB: at least --vram") as error:
        planner.plan(8 * GIB)
    vram = float(str(error.value).rpartition(" ")[2].rstrip("G"))
    assert max(planner.plan(int(vram * GIB)).host.values()) <= 7.5 * GIB
    planner.host = None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A card of 12 GiB where there is none, whatever the host."""
    for owner, name, value in (
        (cards, "this_card", cards.CARDS[0]), (cards, "most", 12 * GIB), (cards, "cap", None),
        (torch.cuda, "set_device", None), (torch.cuda, "current_device", 0), (host, "limit", 32 * GIB),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *_, value=value: value)
    monkeypatch.setattr("rapm.memory.report.no_gpu", lambda name: None)
    monkeypatch.setattr("rapm.memory.budget.Slab", lambda *_: None)
    return torch.device("cuda", 0)


@pytest.mark.parametrize("vram", ["8G", "12G"])
def test_a_host_that_cannot_do_it_is_refused_before_any_work(gpu, monkeypatch, capsys, vram):
    monkeypatch.setattr(host, "limit", lambda: 4 * GIB)
    with pytest.raises(UserError, match=r"host memory: sdxl takes [5-9]\.\d GiB, of which 4\.0 are there: ") as error:
        Budget(model_of("sdxl"), SDXL.replace(vram=vram), gpu)
    assert "\n" not in str(error.value)
    assert main(["plan", "--teacher", "sdxl", "--vram", vram]) == 2
    assert capsys.readouterr().err.count("host memory") == 1


def test_a_run_and_a_plan_say_what_the_host_must_have(gpu, monkeypatch, capsys):
    monkeypatch.setattr(host, "limit", lambda: 13 * GIB)
    budget = Budget(model_of("sdxl"), SDXL.replace(vram="9G"), gpu)
    line = f"host: {max(budget.plan.host.values()) / GIB:.1f} GiB of memory at the most (train), of 13.0"
    note = "not sampled in stock diffusers: the host has no room for a stock pipeline"
    assert line in words(budget) and note in words(budget)
    assert main(["plan", "--teacher", "sdxl", "--vram", "9G"]) == 0
    said = capsys.readouterr().out
    assert line in said and note in said


def test_the_plan_for_another_card_does_not_ask_this_host(monkeypatch, capsys):
    monkeypatch.setattr(host, "limit", lambda: GIB)
    monkeypatch.setattr("rapm.memory.report.no_gpu", lambda name: "none")
    assert main(["plan", "--teacher", "sdxl", "--vram", "12G"]) == 0
    said = capsys.readouterr().out
    assert "host: 11.3 GiB of memory at the most (export)\n" in said and "data sheet" in said


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_a_gpu_is_planned_for_by_whatever_name(gpu, monkeypatch, tmp_path, capsys, device):
    asked = []
    monkeypatch.setattr(cards, "this_card", lambda device, dtype: asked.append(device) or cards.CARDS[1])
    monkeypatch.setattr(cards, "automatic", lambda device: 11 * GIB)
    (tmp_path / "settings.toml").write_text(f'device = "{device}"\n')
    assert main(["plan", "--teacher", "sdxl", "--config", str(tmp_path / "settings.toml")]) == 0
    said = capsys.readouterr().out
    assert asked == [torch.device("cuda", int(device == "cuda:1"))]
    assert "budget 11.0 GiB" in said and cards.CARDS[1].name in said
