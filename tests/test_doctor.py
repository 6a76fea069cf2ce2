"""rapm doctor: a line for everything, a command for what is wrong, the exit code."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from rapm import doctor
from rapm.cli import main
from rapm.kernels import runtime


def test_this_machine_works(tmp_path, capsys):
    assert main(["doctor", "--output_dir", str(tmp_path / "not" / "there" / "yet")]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "gpu", "kernels", "attention", "extension", "disk"):
        assert f" {name} " in out, name
    assert "training works here" in out and "BROKEN" not in out
    assert not (tmp_path / "not").exists()


def broken(capsys, *words: str) -> None:
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "training does not work here" in out
    for word in ("BROKEN", "fix: ", *words):
        assert word in out, (word, out)


def test_kernels_setting(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "MODE", "fast")
    broken(capsys, "RAPM_KERNELS=fast", "unset RAPM_KERNELS")


def test_package_missing_or_too_old(monkeypatch, capsys):
    version = importlib.metadata.version

    def other(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.20.1" if name == "diffusers" else version(name)

    monkeypatch.setattr(doctor, "version", other)
    broken(capsys, 'pip install "peft>=', 'pip install "diffusers>=', "0.20.1, not >=")


def test_disk(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 2**30))
    broken(capsys, "free 1.0 GiB")


def test_a_card_that_torch_cannot_use(monkeypatch, capsys):
    real = subprocess.run

    def smi(command, **options):
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0, "NVIDIA GeForce RTX 4090, 580.1\n", "")
        return real(command, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(subprocess, "run", smi)
    broken(capsys, "RTX 4090", "CPU build", "--index-url")


def test_without_triton_it_is_slower(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "triton", None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "plain PyTorch operators" in out and "pip install triton" in out and "faster" in out


def test_a_card_on_which_no_kernel_can_be_launched(monkeypatch):
    """What pick_device refuses, and what it goes without."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(runtime, "launch_problem", lambda: ("no compiler", "install gcc"))
    assert str(doctor._kernels(None)) == "BROKEN  kernels     no compiler\n" + " " * 20 + "fix: install gcc"
    monkeypatch.setattr(runtime, "launch_problem", lambda: None)
    assert str(doctor._kernels(None)).endswith("on the GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setattr(runtime, "launch_problem", None)  # not reached
    assert str(doctor._kernels(None)).startswith("slower") and "for newer cards" in str(doctor._kernels(None))


def test_a_card_without_bf16(monkeypatch):
    card = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**34))
    monkeypatch.setattr(doctor.cards, "link_rate", lambda device: 12.0)
    assert "no bf16, so presets take fp16" in str(doctor._gpu(None)[0])


@pytest.mark.gpu
def test_rate_of_the_link():
    lines, works = doctor.examine(doctor.Path("."))
    (line,) = (line for line in lines if " link " in line)
    assert works and float(line.split()[2]) > 1
