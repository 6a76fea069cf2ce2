"""What an operator launches, and whether a CUDA graph of it gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided")


class Recorded(TorchDispatchMode):
    """The names of PyTorch's own operators that compute something, in order."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") not in ALLOCATE and not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Kernel:
    """In place of a kernel: writes its name down instead of running."""

    def __init__(self, name: str, names: list[str]) -> None:
        self.name, self.names = name, names

    def __getitem__(self, grid: object) -> Callable:
        return lambda *args, **kwargs: self.names.append(self.name)


def launched(monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: Callable[[], object]) -> list[str]:
    """What `call`, an operator's launcher, launches: measured on a GPU, else with the kernels of `module` replaced."""
    monkeypatch.undo()  # the poison of torch.empty is a launch too
    names: list[str] = []
    if torch.cuda.is_available():
        call()  # compiles
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    for name in [name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Kernel(name, names))
    with Recorded(names):
        call()
    return names


def check_replay(call: Callable[[], tuple[Tensor, ...]], replays: int = 3) -> None:
    """A captured `call` gives eager's bits at every replay; GPU only."""
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for _ in range(replays):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
