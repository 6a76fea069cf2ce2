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
LIMITS = {80: 99, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB a block; sm_80 has 163, but one table serves all


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Kernel -> architecture -> bytes of shared memory at most; a process for each architecture."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RAPM_KERNELS")}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }  # fmt: skip
    found: dict[str, dict[str, int]] = {}

    def compiled(arch: int) -> subprocess.CompletedProcess:
        command = [sys.executable, str(TESTS / "compile_kernels.py"), str(arch)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    for arch in LIMITS:  # one after another: the other tests have the other cores
        run = compiled(arch)
        assert run.returncode == 0, run.stderr[-3000:]
        for kernel, bytes_by_arch in json.loads(run.stdout)["shared"].items():
            found.setdefault(kernel, {}).update(bytes_by_arch)
    return found


@pytest.mark.timeout(2700)
def test_every_kernel_compiles_within_the_cards_shared_memory(shared: dict[str, dict[str, int]]) -> None:
    too_much = [
        f"{kernel} on sm_{arch}: {bytes_by_arch[str(arch)] / 1024:.0f} of {limit} KiB"
        for kernel, bytes_by_arch in shared.items()
        for arch, limit in LIMITS.items()
        if bytes_by_arch[str(arch)] > limit * 1024
    ]
    assert not too_much


def test_no_kernel_is_left_out(shared: dict[str, dict[str, int]]) -> None:
    """Each `_..._kernel` of kernels/ is launched by training, and so was compiled."""
    sources = "".join(path.read_text() for path in (TESTS.parent / "kernels").glob("*.py"))
    assert set(re.findall(r"^def (_\w+_kernel)\(", sources, re.M)) == set(shared)
