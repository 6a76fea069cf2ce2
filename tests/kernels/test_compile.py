"""Every launch of real training compiles for the cards that people have, within their shared memory, without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
SPILL = 512  # bytes a thread: short_attention's backward has 384 on sm_120, 50 MiB of a card of 84 processors
LIMITS = {75: 64, 80: 99, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB a block; sm_80 has 163, but one table serves all


def told(words: list[str], cache: Path) -> Any:
    """The JSON that a Python without the interpreter of kernels prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RAPM_KERNELS")}
    environment |= {
        "TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }  # fmt: skip
    run = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def kernels() -> set[str]:
    """Names of all `_..._kernel` of kernels/."""
    sources = "".join(path.read_text() for path in (TESTS.parent / "kernels").glob("*.py"))
    return set(re.findall(r"^def (_\w+_kernel)\(", sources, re.M))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What compile_kernels.py says of each architecture: one after another, as the other tests have the other cores."""
    cache = tmp_path_factory.mktemp("triton")
    return [told([str(TESTS / "compile_kernels.py"), str(arch)], cache) for arch in LIMITS]


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


def test_every_thread_has_the_same_bits_of_a_sum(found: list[dict]) -> None:
    """No bare product goes into a sum with another thread's number: who writes the sum would decide its bits."""
    assert [report["uneven"] for report in found] == [[]] * len(LIMITS)


def test_no_kernel_is_left_out(shared: dict[str, dict[str, int]], kernels: set[str]) -> None:
    """Each is launched by training, and so was compiled."""
    assert set(shared) == kernels


def test_a_checker_sees_every_kernel(kernels: set[str], tmp_path: Path) -> None:
    """However few calls of each operator it is given."""
    script = "import json, sanitize; print(json.dumps([names for _, names in sanitize.chosen(1)]))"
    assert {name for names in told(["-c", script], tmp_path) for name in names} == kernels


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
