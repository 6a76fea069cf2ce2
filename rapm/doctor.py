"""`rapm doctor`: what is installed and active here, what is missing, and the one command that would fix each."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from rapm.kernels import runtime
from rapm.kernels.attention import xformers_problem
from rapm.memory import cards, offload
from rapm.memory.cards import GIB

OPTIONAL = {
    "xformers": "one more candidate for attention", "tensorboard": "a run's curves", "pyarrow": "prompts from parquet",
    "scikit-learn": "rapm evaluate", "torchmetrics": "rapm evaluate", "torch-fidelity": "rapm evaluate",
}  # fmt: skip
LEAST_DISK = 2 * GIB  # a run of the embedded teacher takes a tenth of it, the smallest of a real one about this
OLDEST = (8, 0)  # compute capability: bf16 in hardware


class Finding(NamedTuple):
    """A line: what was looked at, what was found, whether training goes without it, and what would mend it."""

    name: str
    found: str
    state: str = "ok"  # "ok", "slow": it works without, or "broken": it does not
    fix: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok    ", "slow": "slower", "broken": "BROKEN"}[self.state]
        line = f"{mark}  {self.name:<12}{self.found}"
        return line + (f"\n{'':<20}fix: {self.fix}" if self.fix else "")


def examine(folder: Path) -> tuple[list[str], bool]:
    """The report, a finding a line, and whether training would work here with its output in `folder`."""
    findings = [*_packages(), *_gpu(), _kernels(), _attention(), _extension(), _disk(folder)]
    works = all(finding.state != "broken" for finding in findings)
    slower = sum(finding.state == "slow" for finding in findings)
    end = "training works here" if works else "training does not work here: mend what is BROKEN"
    if works and slower:
        end += f"; {slower} thing{'s' * (slower > 1)} would make it faster"
    return [*map(str, findings), end], works


def _packages() -> list[Finding]:
    """Python, and what setup.py asks for."""
    findings = [Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    wanted = [Requirement(line) for line in requires("rapm-fast") or []] if _installed("rapm-fast") else []
    present = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name == "triton":  # told of below
            continue
        command = f'{Path(sys.executable).name} -m pip install "{requirement}"'
        found = _installed(requirement.name)
        if found is None:
            findings.append(Finding(requirement.name, "is not installed", "broken", command))
        elif not requirement.specifier.contains(Version(found).base_version, prereleases=True):
            findings.append(Finding(requirement.name, f"{found}, not {requirement.specifier}", "broken", command))
        else:
            present.append(f"{requirement.name} {found}")
    findings.append(Finding("packages", ", ".join(present) or f"torch {torch.__version__}"))
    if extras := {name: use for name, use in OPTIONAL.items() if _installed(name) is None}:
        listed = ", ".join(f"{name} ({use})" for name, use in extras.items())
        names = " ".join(name for name in extras if name != "xformers")  # whose release must be that for this torch
        fix = f"{Path(sys.executable).name} -m pip install {names}" if names else ""
        findings.append(Finding("optional", f"not installed: {listed}", fix=fix))
    return findings


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> list[Finding]:
    """The card, its driver, its memory, the rate of copies to the host."""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")
        seen = [line for line in lines if line.strip()]
    except (OSError, subprocess.SubprocessError):
        seen = []
    if not torch.cuda.is_available():
        if not seen:
            return [Finding("gpu", "none: on a CPU only the embedded teacher trains in minutes", "slow")]
        if torch.version.cuda is None:
            reason, fix = "this torch is a CPU build", "pip install --force-reinstall torch --index-url " + _index()
        else:
            reason = f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it"
            fix = "update the NVIDIA driver, or unset CUDA_VISIBLE_DEVICES if it hides the card"
        return [Finding("gpu", f"{seen[0]}, but {reason}", "broken", fix)]
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    driver = seen[0].rpartition(", ")[2] if seen else "unknown"
    free, total = torch.cuda.mem_get_info(device)
    findings = [Finding("gpu", f"{properties.name}, driver {driver}, CUDA {torch.version.cuda}")]
    if (properties.major, properties.minor) < OLDEST:
        findings[0] = findings[0]._replace(state="slow", fix="--mixed_precision fp16: this card has no bf16")
    findings.append(Finding("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"))
    findings.append(Finding("link", f"{cards.link_rate(device):.1f} GB/s to and from pinned host memory"))
    if risk := cards.fallback_risk():
        findings.append(Finding("fallback", "the driver may use host memory for the card's", "slow", risk))
    return findings


def _index() -> str:
    return "https://download.pytorch.org/whl/cu130"


def _kernels() -> Finding:
    if runtime.MODE not in runtime.MODES:
        return Finding("kernels", f"RAPM_KERNELS={runtime.MODE} is none of {', '.join(runtime.MODES)}", "broken",
                       "unset RAPM_KERNELS")  # fmt: skip
    if runtime.triton is None:
        windows = platform.system() == "Windows"
        name = "triton-windows" if windows else "triton"
        return Finding("kernels", "Triton is not installed: plain PyTorch operators", "slow", f"pip install {name}")
    if runtime.MODE == "reference":
        return Finding("kernels", "turned off by RAPM_KERNELS=reference", "slow", "unset RAPM_KERNELS")
    where = "on the GPU" if torch.cuda.is_available() else "for a GPU; on a CPU plain PyTorch operators run"
    return Finding("kernels", f"Triton {runtime.triton.__version__}, {where}")


def _attention() -> Finding:
    backends = "PyTorch's scaled_dot_product_attention"
    if not torch.cuda.is_available():
        return Finding("attention", backends)
    problem = xformers_problem()
    return Finding("attention", f"{backends}{'' if problem else ' and xformers'}, timed for each shape"
                   + (f" ({problem})" if problem else ""))  # fmt: skip


def _extension() -> Finding:
    if offload.EXTENSION:
        return Finding("extension", "C++/CUDA copies to the host are built and loaded")
    words = "not built: copies to the host are made from Python, the same numbers"
    if not torch.cuda.is_available():
        return Finding("extension", words)
    fix = "RAPM_EXTENSION=1 pip install --no-build-isolation --no-deps -e .  (in a clone, with the CUDA toolkit)"
    return Finding("extension", words, "slow", fix)


def _disk(folder: Path) -> Finding:
    """Whether the folder, or where it would be made, can be written and has room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding("disk", f"{there} cannot be written ({error.strerror})", "broken", "choose another --output_dir")
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.0f} GiB free in {there.resolve().name or there.resolve()}"
    if free < LEAST_DISK:
        return Finding(
            "disk", found, "broken", f"free {(LEAST_DISK - free) / GIB:.1f} GiB, or take another --output_dir"
        )
    return Finding("disk", found)
