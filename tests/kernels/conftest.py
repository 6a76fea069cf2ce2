"""Every test of an operator runs its kernels: on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ops import DEVICE

from rapm.kernels import runtime


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage counts lines of rapm/, and the interpreter is slow enough."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MODE", "triton")


@pytest.fixture(autouse=True)
def bf16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bf16 numbers in tl.dot, and cuts them off where a GPU rounds."""
    if DEVICE == "cpu":
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

        def exact(x: TensorHandle) -> TensorHandle:
            bf16 = x.dtype.scalar == tl.bfloat16
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if bf16 else x

        def rounded(self, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
            if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
                return cast(self, x, dtype)
            bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(bits.view(np.uint16).reshape(x.data.shape), dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *c: dot(self, exact(a), exact(b), *c))
        for name in ("create_fp_trunc", "cast_impl"):
            monkeypatch.setattr(InterpreterBuilder, name, rounded)
    yield
