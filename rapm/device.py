"""Where a run computes, and in what; what the host asks of a device, and graphs of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapm.config import Config, parse_vram
from rapm.distributed import local_device
from rapm.errors import UserError
from rapm.kernels import runtime
from rapm.memory.cards import CONTEXT, cap

if TYPE_CHECKING:
    from rapm.step import Step

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by `mixed_precision`
# Numbers in the latents below which a second core gains a CPU slot nothing, and stalls it on a busy machine.
SMALL = 8192


def pick_device(config: Config) -> torch.device:
    """The device, made current and its allocator capped at the `vram` budget. UserError for one that is not there."""
    if runtime.MODE not in runtime.MODES:
        raise UserError(f"RAPM_KERNELS={runtime.MODE}: choose one of {', '.join(runtime.MODES)}")
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(local_device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if runtime.triton is None:
            print("note: Triton is not installed, so plain PyTorch operators are used: slower, the same results")
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
        if budget := parse_vram(config.vram):
            cap(device, budget, CONTEXT)
    return device


@contextmanager
def cores(steps: Iterable[Step]) -> Iterator[None]:
    """One core for slots too small to share among several."""
    before = torch.get_num_threads()
    if all(not step.z.is_cuda and step.z.numel() < SMALL for step in steps):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Fetched:
    """Numbers on their way from a device to the host: only who asks for them waits, and until they are there only."""

    def __init__(self, x: Tensor) -> None:
        """`x` as it is now, in the order of the current stream."""
        self._host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=True)
        self._there = torch.cuda.Event(blocking=True) if x.is_cuda else None
        if self._there is not None:
            self._there.record()

    def __call__(self) -> Tensor:
        """The numbers, on the CPU."""
        if self._there is not None:
            self._there.synchronize()
        return self._host


@functools.cache
def _stream(purpose: str, device: int) -> torch.cuda.Stream:
    """The stream for `purpose`, always the same: cuBLAS holds a workspace for every stream that it has ever seen."""
    return torch.cuda.Stream(device)


def captured(step: Callable[[], None], pool: tuple[int, int] | None = None) -> Callable[[], None]:
    """`step` as one CUDA graph; capturing runs nothing. The step must have run before, on the current stream.

    Graphs of one `pool` work in the same memory: they must not replay at once, nor leave results there.

    Where the current stream is one of its own, it is captured there: two graphs that replay at once must not share
    cuBLAS's workspace, which belongs to the stream of the capture. Those of the default stream never replay at once.
    """
    current = torch.cuda.current_stream()
    stream = _stream("captures", current.device_index) if current == torch.cuda.default_stream() else current
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        step()
    return graph.replay


class Beside:
    """What `with` surrounds may run at the same time as what follows it, up to `join`: in a graph under capture.

    Elsewhere, and where it is not `wanted`, it runs first: a kernel's first call is timed or compiled, and asks for a
    quiet device. What both use must be there before, and stay until `join`.
    """

    def __init__(self, wanted: bool) -> None:
        wanted = wanted and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._stream, self._mark = (
            (_stream("beside", torch.cuda.current_device()), torch.cuda.Event()) if wanted else (None,) * 2
        )

    def __enter__(self) -> Beside:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        self._inside = torch.cuda.stream(self._stream)
        self._inside.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.__exit__(*error)

    def mark(self) -> None:
        """A point inside that `wait_mark` waits for."""
        if self._mark is not None:
            self._mark.record()

    def wait_mark(self) -> None:
        """What follows waits for what was inside up to `mark`."""
        if self._mark is not None:
            torch.cuda.current_stream().wait_event(self._mark)

    def join(self) -> None:
        """What follows waits for all that was inside."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
