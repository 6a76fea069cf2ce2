"""Every launch of real training compiles for the cards that people have, within their shared memory, without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SPILL = 512  # bytes a thread: short_attention's backward has 384 on sm_120, 50 MiB of a card of 84 processors
LIMITS = {75: 64, 80: 99, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB a block; sm_80 has 163, but one table serves all


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What compile_kernels.py says of each architecture; a process for each."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RAPM_KERNELS")}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }  # fmt: skip
    reports = []
    for arch in LIMITS:  # one after another: the other tests have the other cores
        command = [sys.executable, str(TESTS / "compile_kernels.py"), str(arch)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        reports.append(json.loads(run.stdout))
    return reports


@pytest.fixture(scope="module")
def shared(found: list[dict]) -> dict[str, dict[str, int]]:
    """Kernel -> architecture -> bytes of shared memory at most."""
    merged: dict[str, dict[str, int]] = {}
    for report in found:
        for kernel, bytes_by_arch in report["shared"].items():
            merged.setdefault(kernel, {}).update(bytes_by_arch)
    return merged


@pytest.mark.timeout(2700)
def test_every_kernel_compiles_within_the_cards_shared_memory(shared: dict[str, dict[str, int]]) -> None:
    too_much = [
        f"{kernel} on sm_{arch}: {bytes_by_arch[str(arch)] / 1024:.0f} of {limit} KiB"
        for kernel, bytes_by_arch in shared.items()
        for arch, limit in LIMITS.items()
        if bytes_by_arch.get(str(arch), 0) > limit * 1024
    ]
    assert not too_much


def test_no_kernel_spills(found: list[dict]) -> None:
    """What a thread's registers do not hold goes through memory, of which the driver sets aside as much for all."""
    spills = [report["spills"] for report in found]
    assert all("_layer_norm_fwd_kernel" in report for report in spills)
    assert [{name: size for name, size in report.items() if size > SPILL} for report in spills] == [{}] * len(LIMITS)


def test_no_kernel_is_left_out(shared: dict[str, dict[str, int]]) -> None:
    """Each `_..._kernel` of kernels/ is launched by training, and so was compiled."""
    sources = "".join(path.read_text() for path in (TESTS.parent / "kernels").glob("*.py"))
    assert set(re.findall(r"^def (_\w+_kernel)\(", sources, re.M)) == set(shared)


def test_hoppers_own_instructions_are_used_where_they_are_meant_to_be(found: list[dict]) -> None:
    """Descriptors' copies and warp groups' products."""
    by_arch = dict(zip(LIMITS, found, strict=True))
    assert [arch for arch, report in by_arch.items() if "_geglu_linear_kernel" in report["hopper"]] == [90]


def test_low_ranks_are_loaded_in_wide_words(found: list[dict]) -> None:
    """SDXL's at rank 4, of 8 bytes a row; small models, whose widths are odd, are not compiled for these."""
    by_arch = dict(zip(LIMITS, found, strict=True))
    assert not [arch for arch in (86, 89) if "_rows_kernel" in by_arch[arch]["narrow"]]


def test_heads_of_every_width_are_loaded_in_wide_words(found: list[dict]) -> None:
    """SD1.5's of 40 too, which are no multiple of the 16 that Triton asks for in an argument."""
    assert not [name for report in found for name in report["narrow"] if "short_attention" in name]
