"""What a call costs on the card: milliseconds, launches and memory; and whether its numbers are right."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rapm.bench.ops import Provider
from rapm.errors import UserError
from rapm.kernels import runtime

CALLS, REPLAYS = 10, 5  # in a graph, at least; of it
SPIN = 400_000, 500  # cycles that the host needs to queue a graph, and more for each of its launches


@contextmanager
def kernel_mode(mode: str) -> Iterator[None]:
    """RAPM_KERNELS, for a while."""
    before, runtime.MODE = runtime.MODE, mode
    try:
        yield
    finally:
        runtime.MODE = before


@contextmanager
def measuring() -> Iterator[None]:
    """Settings that a compiled graph is known by, and a stream that can be captured."""
    import torch._functorch.config as functorch

    stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    # Compiled backward passes run many times on what they have kept, so they must not write into it.
    with torch.cuda.stream(stream), kernel_mode("auto"), functorch.patch(donated_buffer=False):
        yield


def need_gpu() -> None:
    """UserError without one."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: kernels are timed on an NVIDIA GPU only")


def card() -> dict[str, str]:
    """What is measured on."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    versions["triton"] = runtime.triton.__version__ if runtime.triton else None
    return {"device": torch.cuda.get_device_name(), "driver": driver, **{k: str(v) for k, v in versions.items()}}


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    """The CUDA driver's library."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def graph_ms(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> tuple[float, int]:
    """Milliseconds and launches (kernels, copies and fills) of one of `calls`, all of them in one CUDA graph.

    The current stream must not be the default one.
    """
    calls[0]()  # compiles, tunes and allocates
    free, total = torch.cuda.mem_get_info()
    if 2 * free < total:
        torch.cuda.empty_cache()  # former graphs' memory; torch.cuda.graph would do so each time, which takes longer
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    graph.capture_begin()
    try:
        # no result may take another's place: it would be written to the cache only
        kept = [call() for _ in range(math.ceil(CALLS / len(calls))) for call in calls]
    finally:
        graph.capture_end()
    nodes = ctypes.c_size_t()
    if error := cuda_driver().cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes)):
        raise RuntimeError(f"cuGraphGetNodes: CUDA error {error}")
    times = []
    for _ in range(1 + replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN[0] + SPIN[1] * nodes.value)  # so that its launch does not count
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(kept))
    return statistics.median(times[1:]), round(nodes.value / len(kept))


def copy_ms(size: float, sets: int, replays: int = REPLAYS) -> float:
    """The faster of a device memcpy and an elementwise kernel that read and write `size` bytes in all."""
    n = max(1, int(size) // 8)
    pairs = [[torch.empty(n, dtype=torch.float32, device="cuda") for _ in range(2)] for _ in range(sets)]
    ways = [partial(y.copy_, x) for x, y in pairs], [partial(torch.neg, x, out=y) for x, y in pairs]
    return min(graph_ms(calls, replays)[0] for calls in ways)


def limits() -> dict[str, float]:
    """What the card reaches: the faster of two large copies (`copy_ms`), and a dense bf16 product."""
    size, n = 2**31, 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    product_ms, _ = graph_ms([lambda: a @ b])
    return {"copy_gbs": size / copy_ms(size, 2) * 1e-6, "bf16_tflops": 2 * n**3 / product_ms * 1e-9}


def tensors(tree: object) -> list[Tensor]:
    """Those of a tree of arguments or results."""
    return [x for x in tree_leaves(tree) if torch.is_tensor(x)]


def wanted(args: object) -> list[Tensor]:
    """Of arguments, what gradients are asked for; of results, what has one."""
    return [x for x in tensors(args) if x.requires_grad]


def fresh(args: Sequence, dtype: torch.dtype | None = None) -> list:
    """The same numbers without their history; floating-point ones in `dtype`."""

    def new(x: object) -> object:
        if not torch.is_tensor(x):
            return x
        y = x.detach()
        return (y.to(dtype) if dtype and y.is_floating_point() else y).requires_grad_(x.requires_grad)

    return tree_map(new, list(args))


def results(run: Callable, args: Sequence, cotangents: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of all arguments that want one."""
    out = tensors(run(*args))
    heads = wanted(out)
    pulls = [c.to(y.dtype) for c, y in zip(cotangents, heads, strict=True)]
    return [*(y.detach() for y in out), *(torch.autograd.grad(heads, wanted(args), pulls) if heads else ())]


def errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """||actual - exact|| / ||exact|| of each; infinite where a number is not finite."""
    found = []
    for a, e in zip(actual, exact, strict=True):
        distance = (a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)
        found.append(float(distance) if a.isfinite().all() else math.inf)
    return found


def check(provider: Provider, args: list, cotangents: list[Tensor], exact: list[Tensor], allowed: list[float]) -> None:
    """ArithmeticError for an output or a gradient that is further from `exact` than allowed."""
    actual = results(lambda *x: provider.run(*provider.prepare(*x)), fresh(args), cotangents)
    for i, (found, limit) in enumerate(zip(errors(actual, exact), allowed, strict=True)):
        if not found <= limit:
            raise ArithmeticError(f"result {i} of {len(exact)} is off by {found:.1e}, over {limit:.1e}")


def kept_mib(provider: Provider, args: list) -> float:
    """What autograd keeps from forward to backward, but for weights: whole storages, each once."""
    kept = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = provider.run(*args)
    for weight in tensors(args[provider.activations :]):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / 2**20 if wanted(out) else 0.0


def measured(provider: Provider, sets: list[list], replays: int) -> dict:
    """Times, launches and memory of a provider; lists are of forward, and of backward where there is one."""
    args = [fresh(provider.prepare(*x)) for x in sets]
    forward = [partial(provider.run, *x) for x in args]
    found, kept = [graph_ms(forward, replays)], kept_mib(provider, args[0])

    def backward_of(call: Callable, inputs: list) -> Callable | None:
        heads = wanted(call())
        pulls = [torch.randn_like(y) for y in heads]
        return partial(torch.autograd.grad, heads, wanted(inputs), pulls, retain_graph=True) if heads else None

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = backward_of(forward[0], args[0])
    if first:
        first()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    if first:
        others = filter(None, map(backward_of, forward[1:], args[1:]))
        found.append(graph_ms([first, *others], replays))
    ms, launches = map(list, zip(*found, strict=True))
    return {"ms": ms, "launches": launches, "kept_mib": kept, "peak_mib": peak}
