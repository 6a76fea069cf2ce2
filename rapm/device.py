"""Where a run computes, and in what; and what the host asks of a device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rapm.config import Config, parse_vram
from rapm.distributed import local_device, world
from rapm.errors import UserError
from rapm.kernels import runtime
from rapm.loading.families import model_of
from rapm.memory.cards import CONTEXT, cap
from rapm.memory.count import meta_unet

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by `mixed_precision`
# Compute capabilities: bf16 in hardware (below, PyTorch refuses cuDNN for its convolutions), and what our kernels need.
BF16, TRITON = (8, 0), (7, 0)
# Numbers in a UNet that a CPU trains in hours at the most; the embedded teacher's has 4 million, SD1.5's 860.
SMALL_UNET = 10**8
# PyTorch's wheels: today's, and the last ones with kernels for cards before compute capability 7.5.
WHEELS, OLD_WHEELS = (f"https://download.pytorch.org/whl/{name}" for name in ("cu130", "cu126"))
# Numbers in the latents below which a second core gains a CPU slot nothing, and stalls it on a busy machine.
SMALL = 8192


class NoGpu(NamedTuple):
    """Why there is no GPU to compute on, and what would mend it: "" where nothing would."""

    reason: str
    fix: str = ""


def no_gpu(name: str = "cuda") -> NoGpu | None:
    """Why the GPU `name` does not compute; None where it does."""
    reinstall = "pip install --force-reinstall torch --index-url "
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device=name).add_(1)  # runs a kernel: memory alone is there without any for this card
        except (RuntimeError, AssertionError) as error:
            if "no kernel image" not in str(error):
                return NoGpu(str(error).splitlines()[0], "nvidia-smi lists the cards, and who uses them")
            kernels = f"kernels for {', '.join(torch.cuda.get_arch_list())} only"
            return NoGpu(f"{_card(name)}, but torch {torch.__version__} has {kernels}", reinstall + OLD_WHEELS)
        return None
    if not (seen := driver_cards()):
        return NoGpu("there is no NVIDIA GPU")
    if torch.version.cuda is None:
        return NoGpu(f"{seen[0]}, but this torch is a CPU build", reinstall + WHEELS)
    fix = "update the NVIDIA driver, or unset CUDA_VISIBLE_DEVICES if it hides the card"
    return NoGpu(f"{seen[0]}, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it", fix)


def driver_cards() -> list[str]:
    """ "name, driver version" of each card that the NVIDIA driver knows, whatever torch can do with it."""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in lines if line.strip()]


def pick_device(config: Config) -> torch.device:
    """The device, made current and its allocator capped at the `vram` budget; `auto`: a GPU that computes, or the CPU.

    UserError for a device that is not there, and where Triton cannot launch a kernel on it.
    """
    if runtime.MODE not in runtime.MODES:
        raise UserError(f"RAPM_KERNELS={runtime.MODE}: choose one of {', '.join(runtime.MODES)}")
    name = local_device("cuda" if config.device == "auto" else config.device)
    try:
        device = torch.device(name)
        if device.type != "cuda":
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device {name!r} ({first}): write cpu, cuda or cuda:N, or leave `device` out") from error
    if (absent := no_gpu(name)) is not None:
        # Several processes that see cards have agreed to speak NCCL
        if config.device != "auto" or (world() > 1 and torch.cuda.is_available()):
            raise UserError(f"device {name!r}: {absent.reason}: {absent.fix or 'leave `device` out to use the CPU'}")
        if absent.fix:
            print(f"note: {absent.reason}: the CPU is used ({absent.fix})", file=sys.stderr)
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    _pick_kernels(device)
    torch.cuda.set_device(device)  # streams and graphs are made on the current one
    if budget := parse_vram(config.vram):
        cap(device, budget, CONTEXT)
    return device


def _pick_kernels(device: torch.device) -> None:
    """Turns off those that no launch on `device` could run. UserError where one could, were it not for the machine."""
    if runtime.triton is None:
        print("note: Triton is not installed, so plain PyTorch operators are used: slower, the same results")
    elif runtime.MODE != "reference" and torch.cuda.get_device_capability(device) < TRITON:
        print(f"note: {_card(device)} is too old for Triton, so plain PyTorch operators are used: slower")
        runtime.MODE = "reference"
    elif runtime.MODE != "reference" and (problem := runtime.launch_problem()):
        raise UserError(": ".join(problem))


def check_training(config: Config) -> None:
    """UserError for training or trajectories that would take many times as long as the user can expect.

    That is a UNet of real size on a CPU that nobody asked for, and bf16 on a GPU that has none.
    """
    if config.mixed_precision == "bf16" and (card := _without_bf16(config)):
        raise UserError(
            f"mixed_precision bf16: {card} has none, and takes many times as long: use --mixed_precision fp16 (a run "
            "that was begun in bf16 goes on where there is a card with it)"
        )
    if config.device != "auto" or (absent := no_gpu(local_device("cuda"))) is None:
        return
    model = model_of(config.teacher)
    if (size := sum(p.numel() for p in meta_unet(model.unet, torch.float32).parameters())) > SMALL_UNET:
        reason = f"{absent.reason} ({absent.fix})" if absent.fix else absent.reason
        raise UserError(
            f"no GPU for {config.teacher}, a UNet of {size / 1e6:,.0f} million numbers: {reason}; if you mean the CPU, "
            'write device = "cpu" into a file for --config'
        )


def preset_precision(config: Config) -> Config:
    """`config`, of whose preset its precision is: fp16 in the place of bf16, said in a line, on a GPU without bf16."""
    if config.mixed_precision != "bf16" or not (card := _without_bf16(config)):
        return config
    print(f"note: {card} has no bf16: mixed_precision fp16")
    return config.replace(mixed_precision="fp16")


def _without_bf16(config: Config) -> str | None:
    """The GPU that `config` is for, if it is there and has no bf16. Makes no context on it."""
    name = local_device("cuda" if config.device == "auto" else config.device)
    if not name.startswith("cuda") or not torch.cuda.is_available():
        return None
    try:
        return _card(name) if torch.cuda.get_device_capability(name) < BF16 else None
    except (RuntimeError, AssertionError, ValueError):  # pick_device says why
        return None


def _card(device: torch.device | str) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


@contextmanager
def cores(latents: Iterable[Tensor]) -> Iterator[None]:
    """One core for slots of these latents where they are too small to share among several."""
    before = torch.get_num_threads()
    if all(not z.is_cuda and z.numel() < SMALL for z in latents):
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
