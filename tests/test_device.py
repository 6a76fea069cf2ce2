"""Which device and which precision a run gets, and what is refused before any work: on cards that are made up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from rapm.cli import build_parser, main, settings
from rapm.config import Config
from rapm.device import check_training, no_gpu, pick_device
from rapm.errors import UserError
from rapm.kernels import runtime
from rapm.loading.families import model_of
from rapm.memory import cards
from rapm.memory.budget import Budget

NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ..."
REAL = "owner/name"  # not here, and by its name SD1.5's
Card = Callable[..., None]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """(capability, error): from now on torch tells of such a GPU, whose first kernel raises `error`."""

    real = torch.zeros

    def make(capability: tuple[int, int], error: Exception | None = None) -> None:
        def zeros(*size: int, device: str | None = None) -> torch.Tensor:
            if device and error:
                raise error
            return real(*size)

        for name, found in dict(
            is_available=True, current_device=0, set_device=None, get_device_name="Old Card",
            get_device_capability=capability, get_arch_list=["sm_75", "sm_120"],
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *device, found=found: found)
        monkeypatch.setattr(torch, "zeros", zeros)
        monkeypatch.setattr(runtime, "MODE", "auto")
        monkeypatch.setattr(runtime, "launch_problem", lambda: None)

    return make


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("rapm.device.driver_cards", list)


def driver_knows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card, and a torch that is a CPU build."""
    monkeypatch.setattr("rapm.device.driver_cards", lambda: ["NVIDIA GeForce RTX 4090, 580.1"])
    monkeypatch.setattr(torch.version, "cuda", None)


def test_a_gpu_that_computes_is_taken(card, capsys):
    card((8, 6))
    assert no_gpu() is None
    assert pick_device(Config()) == pick_device(Config(device="cuda")) == torch.device("cuda", 0)
    assert runtime.MODE == "auto" and capsys.readouterr() == ("", "")


def test_a_card_that_torch_has_no_kernels_for(card, capsys):
    """Memory is there without any: only a kernel shows it."""
    card((6, 1), torch.AcceleratorError(NO_KERNEL))
    assert pick_device(Config()) == torch.device("cpu")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    for words in ("Old Card (compute capability 6.1)", "kernels for sm_75, sm_120 only", "CPU is used", "whl/cu126"):
        assert words in err, words
    with pytest.raises(UserError, match=r"device 'cuda': Old Card .* has kernels for sm_75, sm_120 only: pip install"):
        pick_device(Config(device="cuda"))
    check_training(Config())  # the embedded teacher's is small
    with pytest.raises(UserError, match=r"no GPU for owner/name, .*860 million numbers: Old Card .*whl/cu126"):
        check_training(Config(teacher=REAL))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN  gpu         Old Card" in out and "whl/cu126" in out and "on a CPU plain PyTorch" in out


def test_several_processes_do_not_fall_back(card, monkeypatch):
    card((6, 1), torch.AcceleratorError(NO_KERNEL))
    monkeypatch.setattr("rapm.device.world", lambda: 2)
    with pytest.raises(UserError, match="Old Card"):
        pick_device(Config())


def test_a_card_that_triton_does_not_know(card, capsys, monkeypatch):
    card((6, 1))
    monkeypatch.setattr(runtime, "launch_problem", None)  # not reached
    assert pick_device(Config()).type == "cuda"
    assert "too old for Triton, so plain PyTorch operators" in capsys.readouterr().out
    assert not runtime.enabled(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32))


def test_a_machine_on_which_no_kernel_can_be_launched(card, monkeypatch):
    card((8, 6))
    monkeypatch.setattr(runtime, "launch_problem", lambda: ("no compiler", "install gcc"))
    with pytest.raises(UserError, match="no compiler: install gcc"):
        pick_device(Config())
    monkeypatch.setattr(runtime, "MODE", "reference")
    assert pick_device(Config()).type == "cuda"


LAUNCH = """
import sysconfig, torch
torch.cuda.is_available = lambda: True
from rapm.kernels import runtime
real = sysconfig.get_config_var
if {headers} is False:
    sysconfig.get_config_var = lambda name: "/nowhere" if name == "INCLUDEPY" else real(name)
print(*runtime.launch_problem(), sep="|")
"""


@pytest.mark.skipif(runtime.triton is None, reason="no Triton")
@pytest.mark.parametrize(
    ("compiler", "headers", "reason", "fix"),
    [
        ({"PATH": ""}, True, "Failed to find C compiler", "install gcc, or set RAPM_KERNELS=reference"),
        ({"CC": "false"}, False, "false failed", f"install python{sys.version_info[0]}.{sys.version_info[1]}-dev ("),
        ({"CC": "false"}, True, "false failed", "set RAPM_KERNELS=reference"),
    ],
)
def test_what_the_first_launch_lacks(tmp_path, compiler, headers, reason, fix):
    """Triton's own driver is compiled, in a process of its own: it is kept for good once that has gone well."""
    env = {name: value for name, value in os.environ.items() if name != "CC"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path), **compiler}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    code = LAUNCH.format(headers=headers)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, advice = done.stdout.strip().split("|")
    assert found.startswith("Triton cannot compile its driver (") and reason in found
    assert advice.startswith(fix)


@pytest.mark.parametrize("command", ["train", "trajectories"])
def test_nobody_trains_a_real_teacher_on_a_cpu_by_mistake(no_card, command, capsys, tmp_path, monkeypatch):
    run = [command, "--teacher", REAL, "--output_dir", str(tmp_path / "run")]
    assert main(run) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "there is no NVIDIA GPU; if you mean the CPU, write device" in err
    driver_knows_one(monkeypatch)
    assert main(run) == 2
    assert "RTX 4090, 580.1, but this torch is a CPU build (pip install" in capsys.readouterr().err
    (tmp_path / "settings.toml").write_text('device = "cpu"')
    assert main([*run, "--config", str(tmp_path / "settings.toml")]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err  # on its way to the teacher


def test_small_teachers_and_pictures_are_for_a_cpu_too(no_card, tiny_folders, capsys, monkeypatch):
    for teacher in ("embedded", *map(str, tiny_folders.values())):
        check_training(Config(teacher=teacher))
    assert pick_device(Config()) == torch.device("cpu") and capsys.readouterr() == ("", "")
    driver_knows_one(monkeypatch)
    assert main(["sample", "a cat", "--teacher", REAL]) == 2  # would draw, were it there
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "CPU build: the CPU is used (pip install" in lines[0] and "HF_HUB_OFFLINE" in lines[1]


def test_devices_that_are_none(no_card):
    for name, message in (("cuda", "there is no NVIDIA GPU: leave `device` out"), ("cudo", "write cpu, cuda or cuda:")):
        with pytest.raises(UserError, match=f"device '{name}'.*{message}"):
            pick_device(Config(device=name))


def test_presets_take_fp16_where_there_is_no_bf16(card, capsys):
    def wanted(*words: str) -> str:
        return settings(build_parser().parse_args(["train", "--teacher", REAL, *words])).mixed_precision

    card((8, 0))
    assert wanted() == "bf16" and capsys.readouterr().out == ""
    check_training(Config(teacher=REAL, mixed_precision="bf16"))
    card((7, 5))
    assert wanted() == "fp16"
    assert "Old Card (compute capability 7.5) has no bf16: mixed_precision fp16\n" in capsys.readouterr().out
    assert wanted("--mixed_precision", "bf16") == "bf16" and wanted("--mixed_precision", "no") == "no"
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(UserError, match=r"bf16: Old Card .*7.5.* has none, .*: use --mixed_precision fp16"):
            check_training(Config(teacher=REAL, mixed_precision="bf16", device=device))
    check_training(Config(teacher=REAL, mixed_precision="bf16", device="cpu"))


def test_a_card_is_measured_in_the_dtype_of_the_run(card, monkeypatch):
    found = []
    monkeypatch.setattr(cards, "_seconds", lambda run, times: found.append(run().dtype) or 1.0)
    monkeypatch.setattr(cards, "link_rate", lambda device: 1.0)
    properties = SimpleNamespace(name="Old Card", total_memory=2**33)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cards.this_card(torch.device("meta"), torch.float16)
    assert found[0] == torch.float16

    def measured(device: torch.device, dtype: torch.dtype) -> None:
        found.append(dtype)
        raise UserError("measured")  # which is all that is looked at

    card((7, 5))
    monkeypatch.setattr(cards, "this_card", measured)
    config = Config(teacher="sd15", mixed_precision="fp16")
    with pytest.raises(UserError, match="measured"):
        Budget(model_of("sd15"), config, torch.device("cuda", 0), cards.GIB)
    assert main(["plan", "--teacher", "sd15", "--vram", "12G", "--mixed_precision", "no"]) == 2
    assert found[-2:] == [torch.float16, torch.float32]
