"""Softmax attention, softmax(q k^T / sqrt(d)) v, by whatever is fastest for each case.

PyTorch's scaled_dot_product_attention is cuDNN's, FlashAttention or the memory-efficient one; ours (short_attention)
takes few keys, and xformers is there where it is installed and its binary fits. Which is fastest depends on shapes,
dtype, direction and card, and PyTorch's own choice is a fixed order, so "auto" times them once for each case, when that
first runs outside a CUDA graph, and stays with the winner, which may differ from run to run:
torch.use_deterministic_algorithms gives PyTorch's choice.

Shapes: B batch, H heads, N positions, L of k and v, d of a head; q, k, v and the output: B H N d over memory B N H d.
"""

from __future__ import annotations

import functools
import logging
import statistics
import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapm.kernels import runtime
from rapm.kernels.short_attention import short_attention, takes

BACKENDS = ("auto", "sdpa", "xformers")
WARMUP, RUNS = 2, 7  # of a candidate; the median counts
SPIN = 20_000_000  # cycles, about 10 ms, that the device idles while the runs are enqueued: no launch gap is timed


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _only(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


CANDIDATES = {
    "cudnn": _only(SDPBackend.CUDNN_ATTENTION),
    "flash": _only(SDPBackend.FLASH_ATTENTION),
    "efficient": _only(SDPBackend.EFFICIENT_ATTENTION),
    "short": short_attention,
    "xformers": _xformers,
}
RUN = {"sdpa": attention_ref, **CANDIDATES}
# What says that a candidate does not take a case. Triton's own (too little shared memory, say) are no RuntimeErrors.
REFUSALS = (RuntimeError, ValueError, *((runtime.triton.TritonError,) if runtime.triton else ()))
# case -> candidate -> ms, the fastest first
_TIMES: dict[tuple, dict[str, float]] = {}


@functools.cache
def xformers_problem() -> str | None:
    """One line that says why xformers cannot be used here; None where it can.

    Without its binary xformers only logs a warning and goes on, with fewer operators: its own record of that is read.
    """
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it would warn of, in six lines, is what this function returns
    try:
        import xformers
        import xformers.ops
    except Exception as error:  # whatever a foreign binary or version raises
        if isinstance(error, ModuleNotFoundError) and error.name == "xformers":
            return f"xformers is not installed: install the release built for torch {torch.__version__}"
        line = (str(error).splitlines() or [""])[0][:200]
        return f"xformers does not import ({type(error).__name__}: {line}): reinstall it for torch {torch.__version__}"
    finally:
        logger.setLevel(level)
    library = getattr(xformers, "_cpp_lib", None)
    failure = getattr(library, "_cpp_library_load_exception", None)
    build = getattr(library, "_build_metadata", None) or getattr(failure, "build_info", None)
    cuda = getattr(build, "cuda_version", None)  # 1208 for 12.8
    here = torch.version.cuda
    if failure is not None or (cuda and here and cuda // 100 != int(here.split(".")[0])):
        name = f"xformers {getattr(xformers, '__version__', '')}".strip()
        if build is None:
            return f"{name} has no binary for this system: install the release built for torch {torch.__version__}"
        built = f"torch {build.torch_version}" + (f" and CUDA {cuda // 100}.{cuda % 100}" if cuda else "")
        return f"the binary of {name} is for {built}, not torch {torch.__version__}: install the matching release"
    if not hasattr(xformers.ops, "memory_efficient_attention"):
        return "xformers has no memory_efficient_attention: install a current release"
    if not torch.cuda.is_available():
        return "xformers needs a CUDA device, and there is none"
    return None


def choices() -> dict[str, dict[str, float]]:
    """What "auto" timed: case -> candidate -> ms, the fastest, which is used, first. Ready for JSON."""
    out = {}
    for (device, dtype, grads, (shape, _), (context, _), _), times in _TIMES.items():
        wanted = "".join(name for name, grad in zip("qkv", grads, strict=True) if grad)
        size = f"{'x'.join(map(str, shape))} over {context[2]}, {str(dtype).removeprefix('torch.')}, {device}"
        out[f"{size}, {f'forward and backward to {wanted}' if wanted else 'forward'}"] = dict(times)
    return out


def _milliseconds(name: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of a forward, and a backward to those that require a gradient. Whatever a case that it does not take raises."""
    leaves = [x.detach().requires_grad_(x.requires_grad and torch.is_grad_enabled()) for x in (q, k, v)]
    wanted = [x for x in leaves if x.requires_grad]
    dy = torch.ones_like(q.transpose(1, 2)).flatten(2)

    def run() -> None:
        y = RUN[name](*leaves).transpose(1, 2).flatten(2)  # B N H d, as it is used: another layout pays for its copy
        if wanted:
            torch.autograd.grad(y, wanted, dy)

    for _ in range(WARMUP):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(events))


def _time(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Milliseconds of each candidate that takes this case, the fastest first; of "sdpa" where none does."""
    times = {}
    for name in CANDIDATES:
        if (name == "xformers" and xformers_problem()) or (name == "short" and not (runtime.triton and takes(q, k))):
            continue
        try:
            times[name] = _milliseconds(name, q, k, v)
        except REFUSALS:  # no such kernel for this dtype, width or card
            continue
    times = times or {"sdpa": _milliseconds("sdpa", q, k, v)}
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _choice(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The winner, remembered or timed now. "sdpa" for a new case that a CUDA graph or a dispatch mode would record."""
    grads = tuple(torch.is_grad_enabled() and x.requires_grad for x in (q, k, v))
    case = (q.device, q.dtype, grads, *((tuple(x.shape), x.stride()) for x in (q, k, v)))
    if case not in _TIMES:
        if torch.cuda.is_current_stream_capturing() or torch._C._len_torch_dispatch_stack():
            return "sdpa"
        # Hooks of our own: those of a checkpoint or an offload around us must not see what the timing saves
        own_hooks = saved_tensors_hooks(lambda x: x.detach(), lambda x: x)
        with torch.cuda.device(q.device), torch.random.fork_rng([q.device]), own_hooks, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's reasons against each kernel it was forbidden
            _TIMES[case] = _time(q, k, v)
    return next(iter(_TIMES[case]))


def _plain(q: Tensor) -> bool:
    """Whether "auto" is PyTorch's own choice: traced, fake, not on CUDA, kernels off, or reproducible by request."""
    if torch.compiler.is_compiling() or type(q) is not Tensor or q.device.type != "cuda":
        return True
    return runtime.MODE == "reference" or torch.are_deterministic_algorithms_enabled()


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v: B H N d for q (B H N d) and k, v (B H L d); out.transpose(1, 2).flatten(2) is free.

    backend: "auto", "sdpa" (PyTorch's own choice) or "xformers". RuntimeError for xformers where it cannot be used.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "xformers" and (problem := xformers_problem()):
        raise RuntimeError(problem)
    if q.is_meta:  # to count memory: FlashAttention's, since what it keeps is what the others keep
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if backend == "auto":
        backend = "sdpa" if _plain(q) else _choice(q, k, v)
    return RUN[backend](q, k, v)
