"""The slab and what goes through it. The CPU's copies are plain; on a GPU the same code has streams and events."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from rapm.memory.offload import ALIGN, SMALLEST, CannotPin, Offload, Slab
from rapm.memory.saved import Policy, Saved

CPU = torch.device("cpu")
BIG = SMALLEST // 4 + 4  # numbers of fp32 that are worth moving


def layer(offload: Offload) -> Saved:
    return Saved(Policy("keep", True), offload)


def test_the_slab_is_a_stack_of_its_very_size():
    slab = Slab(3 * ALIGN, CPU)
    assert len(slab.bytes) == 3 * ALIGN
    first, second = slab.take(10), slab.take(ALIGN + 1)
    assert second.data_ptr() - first.data_ptr() == ALIGN and len(second) == ALIGN + 1
    assert slab.take(ALIGN) is None  # the rest is smaller


def test_a_storage_moves_once_and_comes_back_as_every_view_of_it():
    offload = Offload(2**24, CPU)
    x = torch.randn(2, BIG // 2, requires_grad=True)
    with layer(offload):
        y = x * 3
        z = (y * y).sum() + (y.t().exp().log() * y.t()).sum()  # y three times, y^T, and what exp and log keep
    assert offload.moved_out < 5 * y.nbytes
    (gradient,) = torch.autograd.grad(z, x)
    with torch.enable_grad():
        y = x * 3
        (expected,) = torch.autograd.grad((y * y).sum() + (y.t().exp().log() * y.t()).sum(), x)
    assert torch.equal(gradient, expected)
    assert offload.moved_in == offload.moved_out > 0


def test_what_stays():
    weight = torch.nn.Parameter(torch.randn(BIG))
    offload = Offload(2**24, CPU, [weight])
    assert offload.pack(weight) is None and offload.pack(weight.detach()) is None
    assert offload.pack(torch.randn(SMALLEST // 4 - 1)) is None
    assert offload.pack(torch.randn(5 * BIG)[:BIG]) is None  # a small part of what others may keep
    full = Offload(SMALLEST, CPU)
    assert full.pack(torch.randn(2 * BIG)) is None  # more than was counted
    assert offload.moved_out == full.moved_out == 0


def test_memory_is_let_go_in_the_forward():
    """Nothing but the slab holds a moved tensor: its memory is free before backward."""
    offload = Offload(2**24, CPU)
    from torch.multiprocessing.reductions import StorageWeakRef

    x = torch.randn(BIG, requires_grad=True)
    with layer(offload):
        y = x.exp()
        held = StorageWeakRef(y.untyped_storage())
        z = y.sum()
    del y
    assert held.expired()
    assert torch.equal(torch.autograd.grad(z, x)[0], x.detach().exp())


def test_a_new_pass_starts_with_an_empty_slab():
    offload = Offload(4 * BIG + ALIGN, CPU)  # room for one tensor
    x = torch.randn(BIG, requires_grad=True)
    for i in range(1, 4):
        offload.begin()
        with layer(offload):
            z = x.exp().sum()
        torch.autograd.grad(z, x)
        offload.finish()
        assert offload.moved_out == i * 4 * BIG


def test_a_host_that_cannot_pin_is_named_and_leaves_no_error(monkeypatch):
    """CUDA would report it at the next kernel."""
    asked, forgotten = [], []
    runtime = SimpleNamespace(cudaHostRegister=lambda *given: asked.append(given) or 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr("rapm.memory.offload._forget_error", forgotten.append)
    with pytest.raises(CannotPin, match=r"cannot pin 0.5 GiB of memory \(CUDA error 2\)"):
        Slab(2**29, torch.device("cuda", 0))  # whose end does not ask to unpin what is not pinned
    assert asked[0][1:] == (2**29, 0) and forgotten == [torch.device("cuda", 0)]


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
def test_on_a_gpu(capture: bool) -> None:
    """A chain of layers through a window smaller than what it keeps: the same bits, and a lower peak."""
    device, size = torch.device("cuda"), 2**22
    x = torch.randn(size, device=device, requires_grad=True)
    window = 4 * 4 * size
    offload = Offload(64 * 4 * size, device, window=window)

    def run(offload: Offload | None) -> tuple[torch.Tensor, int]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

        def step() -> torch.Tensor:
            y = x
            if offload is not None:
                offload.begin()
            with layer(offload) if offload is not None else saved_tensors_hooks(lambda x: x.detach(), lambda x: x):
                for _ in range(32):
                    y = (y.sin() * 0.9).exp()
            (gradient,) = torch.autograd.grad(y.sum(), x)
            if offload is not None:
                offload.finish()
            return gradient

        if not capture:
            gradient = step()
        else:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                gradient = step()
            for _ in range(3):
                graph.replay()
        torch.cuda.synchronize()
        return gradient.clone(), torch.cuda.max_memory_allocated() - before

    expected, most = run(None)
    for _ in range(3):
        gradient, peak = run(offload)
        assert torch.equal(gradient, expected)
    assert offload.moved_out > 32 * 4 * size and offload.moved_in > 0
    assert peak < 0.6 * most, (peak, most)
