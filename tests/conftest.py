"""Every test: offline, few threads, the same seeds, uninitialised memory full of NaN; `gpu` tests only with CUDA."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined

# Its log handler keeps the stderr of its first import, which must not be one that a test captures and closes
import diffusers  # noqa: F401

# torch lists what a device context redirects when one is first used: let that be before the patches below
with torch.device("meta"):
    torch.empty(0)
# Small tensors: more threads only add overhead, and with several workers (make test) they stall each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


def pytest_xdist_auto_num_workers() -> int:
    """A GPU is for one process; otherwise a few, of some 2 GB each."""
    return 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)


LONGEST = ("test_compile.py", "test_step_parity.py")  # one process's work for many minutes: they start first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny teacher of each family as a diffusers folder, for tests that leave it as it is."""
    import tiny

    return {family: tiny.tiny_pipeline(family, tmp_path_factory.mktemp(family)) for family in tiny.UNET}


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN: code that reads before it writes then shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: object, **kwargs: object) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            with torch.no_grad():
                return out.fill_(torch.nan) if out.is_floating_point() and not out.is_meta else out

        return call

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """family, dtype, device -> the tiny teacher of a family, written and loaded once: no test changes it."""
    root = tmp_path_factory.mktemp("teachers")

    @functools.cache
    def load(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):  # -> rapm.teacher.Teacher
        import tiny

        from rapm.teacher import load_teacher

        folder = root / f"base-{family}"
        if not folder.exists():
            tiny.tiny_pipeline(family, folder)
        return load_teacher(str(folder), device=device, dtype=dtype)

    return load
