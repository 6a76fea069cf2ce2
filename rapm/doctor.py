"""`rapm doctor`: what is installed and active here, what is missing, and the one command that would fix each."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from rapm.device import BF16, TRITON, NoGpu, driver_cards, no_gpu
from rapm.kernels import runtime
from rapm.kernels.attention import xformers_problem
from rapm.memory import cards, host, offload
from rapm.memory.cards import GIB

OPTIONAL = {
    "xformers": "one more candidate for attention", "tensorboard": "a run's curves", "pyarrow": "prompts from parquet",
    "scikit-learn": "rapm evaluate", "torchmetrics": "rapm evaluate", "torch-fidelity": "rapm evaluate",
}  # fmt: skip
LEAST_DISK = 2 * GIB  # a run of the embedded teacher takes a tenth of it, the smallest of a real one about this


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
    absent = no_gpu()
    findings = [*_packages(), *_gpu(absent), _kernels(absent), _attention(), _extension(), _host(), _disk(folder)]
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
        command = f'{shlex.quote(sys.executable)} -m pip install "{requirement}"'
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
        fix = f"{shlex.quote(sys.executable)} -m pip install {names}" if names else ""
        findings.append(Finding("optional", f"not installed: {listed}", fix=fix))
    return findings


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu(absent: NoGpu | None) -> list[Finding]:
    """The card, its driver, its memory, the rate of copies to the host."""
    if absent is not None:
        if not absent.fix:
            return [Finding("gpu", "none: on a CPU only the embedded teacher trains in minutes", "slow")]
        return [Finding("gpu", absent.reason, "broken", absent.fix)]
    seen = driver_cards()
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    driver = seen[0].rpartition(", ")[2] if seen else "unknown"
    free, total = torch.cuda.mem_get_info(device)
    findings = [Finding("gpu", f"{properties.name}, driver {driver}, CUDA {torch.version.cuda}")]
    if (properties.major, properties.minor) < BF16:
        findings[0] = findings[0]._replace(found=f"{findings[0].found}; no bf16, so presets take fp16")
    most = cards.most(device)
    words = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, so at most --vram {int(most / GIB * 10) / 10:.1f}G"
    findings.append(Finding("memory", words))
    findings.append(Finding("link", f"{cards.link_rate(device):.1f} GB/s to and from pinned host memory"))
    if risk := cards.fallback_risk():
        findings.append(Finding("fallback", "the driver may use host memory for the card's", "slow", risk))
    return findings


def _kernels(absent: NoGpu | None) -> Finding:
    if runtime.MODE not in runtime.MODES:
        return Finding("kernels", f"RAPM_KERNELS={runtime.MODE} is none of {', '.join(runtime.MODES)}", "broken",
                       "unset RAPM_KERNELS")  # fmt: skip
    if runtime.triton is None:
        windows = platform.system() == "Windows"
        name = "triton-windows" if windows else "triton"
        return Finding("kernels", "Triton is not installed: plain PyTorch operators", "slow", f"pip install {name}")
    if runtime.MODE == "reference":
        return Finding("kernels", "turned off by RAPM_KERNELS=reference", "slow", "unset RAPM_KERNELS")
    found = f"Triton {runtime.triton.__version__}, "
    if absent is not None:
        return Finding("kernels", found + "for a GPU; on a CPU plain PyTorch operators run")
    if torch.cuda.get_device_capability() < TRITON:
        return Finding("kernels", found + "for newer cards: plain PyTorch operators", "slow")
    if problem := runtime.launch_problem():
        return Finding("kernels", problem[0], "broken", problem[1])
    return Finding("kernels", found + "on the GPU")


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


def _host() -> Finding:
    limit = host.limit()
    return Finding("host", "memory unknown" if limit is None else f"{limit / GIB:.1f} GiB of memory for this process")


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
