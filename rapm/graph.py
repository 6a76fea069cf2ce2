"""A step as one CUDA graph, and what runs beside it in one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


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
    with torch.cuda.graph(graph, pool=pool, stream=stream):  # type: ignore[arg-type]
        step()
    return graph.replay


class Beside:
    """What `with` surrounds may run at the same time as what follows it, up to `join`: in a graph under capture.

    Elsewhere, and where it is not `wanted`, it runs first: a kernel's first call is timed or compiled, and asks for a
    quiet device. What both use must be there before, and stay until `join`.
    """

    def __init__(self, wanted: bool) -> None:
        wanted = wanted and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._stream = _stream("beside", torch.cuda.current_device()) if wanted else None
        self._mark = torch.cuda.Event() if wanted else None

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
