"""CUDA graphs: a step captured as one, what runs beside it, and fills that no longer stall it.

cuBLAS and cuDNN zero their counters and accumulators before many of their kernels. In a graph that is a memset node,
for which the GPU stands still some 5 us (H200): 600 times in SDXL's slot. So captured memsets become kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import torch

MEMSET = 2  # the driver's number for such a node
THREADS, BLOCKS = 256, 1024  # of a fill: threads of a block, and blocks at most
# Units of a fill: bytes, and how a thread stores one
UNITS = {16: "st.global.v4.u32 [%at], {%value, %value, %value, %value};", 4: "st.global.u32 [%at], %value;"}
PTX = """.version 6.3
.target sm_70
.address_size 64
.visible .entry fill(.param .u64 start, .param .u64 count, .param .u32 word)
{{
    .reg .pred %done;
    .reg .b32 %value, %block, %threads, %first;
    .reg .b64 %start, %count, %i, %step, %at;
    ld.param.u64 %start, [start];
    ld.param.u64 %count, [count];
    ld.param.u32 %value, [word];
    cvta.to.global.u64 %start, %start;
    mov.u32 %block, %ctaid.x;
    mov.u32 %threads, %ntid.x;
    mov.u32 %first, %tid.x;
    mad.lo.u32 %first, %block, %threads, %first;
    cvt.u64.u32 %i, %first;
    mov.u32 %block, %nctaid.x;
    mul.wide.u32 %step, %block, %threads;
next:
    setp.ge.u64 %done, %i, %count;
    @%done ret;
    mad.lo.u64 %at, %i, {size}, %start;
    {store}
    add.u64 %i, %i, %step;
    bra next;
}}
"""  # count units of {size} bytes from start on


class Memset(ctypes.Structure):
    """The driver's CUDA_MEMSET_NODE_PARAMS: `height` rows of `width` values of `size` bytes."""

    _fields_ = [
        ("start", ctypes.c_uint64),
        ("pitch", ctypes.c_size_t),
        ("value", ctypes.c_uint),
        ("size", ctypes.c_uint),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


class Launch(ctypes.Structure):
    """The driver's CUDA_KERNEL_NODE_PARAMS_v1."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.POINTER(ctypes.c_void_p)),
    ]


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    """The CUDA driver's library."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _call(name: str, *args: object) -> None:
    """A function of the driver. RuntimeError where it fails, or the driver has none of that name."""
    function = getattr(cuda_driver(), name, None)
    if function is None:
        raise RuntimeError(f"{name}: this driver has none")
    if error := function(*args):
        raise RuntimeError(f"{name}: CUDA error {error}")


def nodes(graph: int) -> list[int]:
    """The nodes of a CUDA graph, given by its handle (`raw_cuda_graph`)."""
    return _listed("cuGraphGetNodes", graph)


def _listed(name: str, of: int) -> list[int]:
    """What a function lists of a handle: it is asked for the number first."""
    count = ctypes.c_size_t()
    _call(name, ctypes.c_void_p(of), None, ctypes.byref(count))
    found = (ctypes.c_void_p * count.value)()
    _call(name, ctypes.c_void_p(of), found, ctypes.byref(count))
    return [handle for handle in found if handle is not None]


@functools.cache
def _fill(unit: int, device: int) -> int:
    """The kernel that fills units of 16 or 4 bytes, on `device`, which is the current one."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    text = PTX.format(size=unit, store=UNITS[unit]).encode()
    _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(text))  # never unloaded: graphs call it
    _call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(b"fill"))
    if function.value is None:
        raise RuntimeError("cuModuleGetFunction: no function")
    return function.value


def _launch_of(memset: Memset, device: int) -> tuple[Launch, object] | None:
    """The kernel that does the same, and what must outlive it until it is added; None for one that is left alone."""
    length = memset.size * memset.width
    unit = next((unit for unit in UNITS if memset.start % unit == 0 and length % unit == 0), None)
    if memset.height != 1 or unit is None or length == 0:
        return None
    word = {1: memset.value & 0xFF, 2: memset.value & 0xFFFF, 4: memset.value}[memset.size]
    word *= {1: 0x01010101, 2: 0x00010001, 4: 1}[memset.size]
    count = length // unit
    values = ctypes.c_uint64(memset.start), ctypes.c_uint64(count), ctypes.c_uint32(word)
    parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    grid = min(BLOCKS, -(-count // THREADS)), 1, 1
    return Launch(_fill(unit, device), grid, (THREADS, 1, 1), 0, parameters, None), (values, parameters)


def memsets_to_kernels(graph: int) -> int:
    """Put kernels in the place of a captured graph's memsets, before it is instantiated: how many.

    Those of several rows or of odd bytes stay, and the rest where the driver refuses: the graph is right in any case.
    """
    done, device = 0, torch.cuda.current_device()
    try:
        for node in nodes(graph):
            kind, memset = ctypes.c_int(), Memset()
            _call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
            if kind.value != MEMSET:
                continue
            _call("cuGraphMemsetNodeGetParams", ctypes.c_void_p(node), ctypes.byref(memset))
            if (found := _launch_of(memset, device)) is not None:
                _replace(graph, node, found[0])
                done += 1
    except (RuntimeError, OSError):  # OSError: no driver's library of that name
        pass
    return done


def _replace(graph: int, node: int, launch: Launch) -> None:
    """Put a kernel in a node's place. Until the last call the node is still there: then both do the same."""
    before, after = (_listed(f"cuGraphNodeGet{which}", node) for which in ("Dependencies", "DependentNodes"))
    kernel, count, handles = ctypes.c_void_p(), ctypes.c_size_t(len(after)), ctypes.c_void_p * len(after)
    _call(
        "cuGraphAddKernelNode", ctypes.byref(kernel), ctypes.c_void_p(graph), (ctypes.c_void_p * len(before))(*before),
        ctypes.c_size_t(len(before)), ctypes.byref(launch),
    )  # fmt: skip
    ends, starts = handles(*after), handles(*[kernel.value] * len(after))
    try:
        if after:
            _call("cuGraphAddDependencies", ctypes.c_void_p(graph), starts, ends, count)
    except RuntimeError:
        _call("cuGraphDestroyNode", kernel)  # nobody would wait for it
        raise
    _call("cuGraphDestroyNode", ctypes.c_void_p(node))


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
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, pool=pool, stream=stream):  # type: ignore[arg-type]
        step()
    memsets_to_kernels(graph.raw_cuda_graph())
    graph.instantiate()
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
