"""CUDA graphs: memsets become kernels, in their places and with their bytes; whatever fails, the graph is right."""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rapm import graph
from rapm.graph import MEMSET, PTX, UNITS, Memset, captured, cuda_driver, memsets_to_kernels, nodes

# bytes of a value, the value, the bytes from which on and how many, whether it becomes a kernel
FILLS = [
    (1, 0xAB, 0, 64, True),
    (2, 0xBEEF, 16, 4096, True),
    (4, 0x01020304, 32, 8 * 2**20, True),  # more than one unit a thread
    (4, 7, 4, 20, True),  # words
    (1, 0, 0, 16, True),
    (1, 3, 1, 7, False),
    (2, 9, 2, 6, False),
]


def test_the_kernel_compiles_for_every_card() -> None:
    triton = pytest.importorskip("triton")
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for unit, store in UNITS.items():
        text = PTX.format(size=unit, store=store)
        for arch in (75, 80, 86, 89, 90, 120):
            words = [assembler, f"-arch=sm_{arch}", "-o", "/dev/null", "-"]
            made = subprocess.run(words, input=text, capture_output=True, text=True)
            assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("size, value, start, length, replaced", FILLS)
def test_a_launch_writes_what_the_memset_did(
    size: int, value: int, start: int, length: int, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_fill", lambda unit, device: unit)
    found = graph._launch_of(Memset(start, 0, value, size, length // size, 1), 0)
    assert (found is not None) == replaced
    assert graph._launch_of(Memset(0, 64, value, size, 4, 2), 0) is None  # rows
    if found is not None:
        launch, (values, _) = found
        at, count, word = (x.value for x in values)
        assert at == start and at % launch.function == 0 and count * launch.function == length
        assert word.to_bytes(4, "little") == (value.to_bytes(size, "little") * 4)[:4]
        assert launch.grid[0] * launch.block[0] >= min(count, graph.BLOCKS * graph.THREADS)


def fill(x: Tensor, size: int, value: int, start: int, length: int) -> None:
    """A memset of bytes of x, as libraries ask for it."""
    call = getattr(cuda_driver(), {1: "cuMemsetD8Async", 2: "cuMemsetD16Async", 4: "cuMemsetD32Async"}[size])
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    width = {1: ctypes.c_ubyte, 2: ctypes.c_ushort, 4: ctypes.c_uint}[size](value)
    assert call(ctypes.c_uint64(x.data_ptr() + start), width, ctypes.c_size_t(length // size), stream) == 0


def kinds(handle: int) -> Counter:
    """How many nodes of each kind."""
    found = []
    for node in nodes(handle):
        kind = ctypes.c_int()
        assert cuda_driver().cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        found.append(kind.value)
    return Counter(found)


def chain() -> tuple[Callable[[], None], Callable[[int], bool]]:
    """A step of kernels, memsets, and kernels that read what both wrote; whether n steps left the right bytes."""
    xs = [torch.zeros(16 * 2**20, dtype=torch.uint8, device="cuda") for _ in FILLS]
    ys = [torch.zeros_like(x) for x in xs]

    def step() -> None:
        for x, y, (*how, _) in zip(xs, ys, FILLS, strict=True):
            x.add_(5)
            fill(x, *how)
            torch.add(x, 1, out=y)

    def right(steps: int) -> bool:
        good = True
        for x, y, (size, value, start, length, _) in zip(xs, ys, FILLS, strict=True):
            expected = torch.full_like(x, 5 * steps)
            values = torch.tensor(list(value.to_bytes(size, "little")), dtype=torch.uint8, device="cuda")
            expected[start : start + length] = values.repeat(length // size)
            good = good and torch.equal(x, expected) and torch.equal(y, expected + 1)
        return good

    return step, right


@pytest.mark.gpu
def test_captured_memsets_are_kernels() -> None:
    step, right = chain()
    recorded = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(recorded):
        step()
    before = kinds(recorded.raw_cuda_graph())
    replaced = sum(found for *_, found in FILLS)
    assert before[MEMSET] == len(FILLS) and memsets_to_kernels(recorded.raw_cuda_graph()) == replaced
    after = kinds(recorded.raw_cuda_graph())
    assert after[MEMSET] == len(FILLS) - replaced and after.total() == before.total()
    recorded.instantiate()
    for i in range(3):
        recorded.replay()
        assert right(i + 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    ["cuModuleLoadData", "cuGraphNodeGetType", "cuGraphMemsetNodeGetParams", "cuGraphNodeGetDependencies",
     "cuGraphAddKernelNode", "cuGraphAddDependencies"],
)  # fmt: skip
def test_a_driver_that_refuses_leaves_the_graph_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, step, right = graph._call, *chain()

    def refusing(asked: str, *args: object) -> None:
        if asked == name:
            raise RuntimeError(f"{name}: CUDA error 801")
        call(asked, *args)

    graph._fill.cache_clear()
    monkeypatch.setattr(graph, "_call", refusing)
    replay = captured(step)
    for i in range(2):
        replay()
        assert right(i + 1)


@pytest.mark.gpu
def test_fills_of_libraries_are_replaced() -> None:
    """cuBLAS and cuDNN, whose kernels wait for theirs: the same numbers as without a graph."""
    x, w, b = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((1024, 1280), (10240, 1280), (10240,)))
    q = torch.randn(1, 20, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out: list[Tensor] = []

    def step() -> None:
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        out[:] = torch.nn.functional.linear(x, w, b), y.detach(), *torch.autograd.grad(y.float().square().sum(), [q])

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
        expected = [t.clone() for t in out]
        replay = captured(step)
        for _ in range(3):
            replay()
            torch.cuda.synchronize()
            assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
            assert torch.allclose(out[2].float(), expected[2].float(), rtol=0.02, atol=0.02)  # atomics
