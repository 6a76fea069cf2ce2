"""What every operator shares: Triton where it is installed, and the switch between its kernels and the reference."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: every operator is its plain PyTorch reference
    triton = tl = None

MODES = ("auto", "reference", "triton")
# auto: kernels on CUDA, reference on a CPU. reference: no kernel at all. triton: kernels everywhere, on a CPU in
# Triton's interpreter (TRITON_INTERPRET=1), as the tests do.
MODE = os.environ.get("RAPM_KERNELS", "auto")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jit(function: Callable) -> Callable:
    """`triton.jit`, or the bare function where there is no Triton to call it."""
    return triton.jit(function) if triton else function


@jit
def apart(x):
    """x, as the operand of a sum over threads. Without it the compiler makes one FMA of a product and the first number
    from another thread, so that each thread, whose own product is not rounded then, ends with other bits. A square it
    would know never to be -0, and leave this out: there a mask does the same.
    """
    return x + 0.0


def enabled(x: Tensor) -> bool:
    """Whether an operator on `x` runs its kernel. TypeError for a dtype that no kernel takes: no silent slow path."""
    if MODE == "reference" or triton is None or (MODE == "auto" and x.device.type == "cpu"):
        return False
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"kernels take {names}, not {x.dtype} of shape {tuple(x.shape)}: set RAPM_KERNELS=reference")
    return True


def launch_problem() -> tuple[str, str] | None:
    """What keeps Triton from launching any kernel on this machine's GPU, and what would mend it; None: nothing does.

    The first launch of all compiles the C part of Triton's driver, with the system's compiler and Python's headers.
    """
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:  # of the search for a compiler, of it, of the linker, of the cache
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        headers = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").is_file()
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        lacks = [*(["gcc"] if not compiler else []), *([f"{version}-dev ({version}-devel)"] if not headers else [])]
        install = f"install {' and '.join(lacks)}, or " if lacks else ""
        failed = isinstance(error, subprocess.CalledProcessError)
        why = f"{error.cmd[0]} failed" if failed else str(error).partition("\n")[0]
        return f"Triton cannot compile its driver ({why})", f"{install}set RAPM_KERNELS=reference, which is slower"
    return None


@functools.cache
def tensor_cores(device: torch.device) -> bool:
    """Whether Triton uses those of `device`, as it does from Ampere on; off CUDA yes, to serve tests."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8


def multiplies(x: Tensor) -> bool:
    """Whether a kernel that multiplies matrices runs: before Ampere it would spill kilobytes a thread, and crawl."""
    return enabled(x) and tensor_cores(x.device)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; off CUDA (interpreter, compiling without a GPU) a few, to serve tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
