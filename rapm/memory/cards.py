"""What a plan assumes of a card, and what it measures where there is one.

The constants are in one table, each with where it comes from. "Estimate until measured": no run has confirmed it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

GIB, MIB = 2**30, 2**20


class Card(NamedTuple):
    """Dense TFLOP/s (in the table of bf16), GB/s of its memory, GB/s of pinned copies from or to the host."""

    name: str
    gib: float
    tflops: float
    bandwidth: float
    link: float
    measured: bool = False


CARDS = (  # by memory; data sheets, links: PCIe 4 x16 at 24 GB/s, the H200 measured
    Card("RTX 3060", 12, 25.5, 360, 24),
    Card("RTX 4070 Ti SUPER", 16, 88, 672, 24),
    Card("RTX 4090", 24, 165, 1008, 24),
    Card("RTX A6000", 48, 155, 768, 24),
    Card("H200", 141, 785, 4300, 55),
)

# What counting on meta tensors cannot see. Calibrated on captured slots of SDXL and SD1.5 at their own size and at
# 768x768, ranks 1 to 64, on H100s and H200s with torch 2.11 (benchmarks/memory.py). What is reserved beyond weights,
# state and what is counted as kept depends on the model, hardly on the plan.
TRANSIENT = 3.5  # times the largest convolution input and the largest up-projection that it is
BESIDE = 3.5  # more of them, where passes without gradient have a stream of their own
PIECES = 0.45  # of a LoRA in the UNet's dtype: its gradient's parts
WORKSPACE = 320 * MIB  # of cuBLAS and cuDNN, and what small tensors round up to
# Alive in a forward without gradients: times the largest convolution input and the largest up-projection. With keys and
# WORKSPACE it covers what batches of 1 to 32 trajectories reserved on an H200 (benchmarks/trajectories.py).
FORWARD = 6.15, 1.3
# CUDA context, cuBLAS and cuDNN, compiled kernels, and a captured slot: what nvidia-smi says of the process beyond what
# is reserved. On an H100 858 to 892 MiB with SDXL's slots of 8,343 launches, 946 and 950 with stock's of 19,133.
CONTEXT = 824 * MIB
GRAPH = 8 * 2**10  # a launch
# Estimates until measured.
DISPLAY = int(0.4 * GIB)  # what a desktop takes of a card that `--vram auto` would fill
DECODE = 4096  # bytes a pixel that the VAE takes in fp32: some 4 GiB for 1024x1024
TILE = 512  # pixels a side of what is decoded at a time when tiled; of small pictures as many as have its pixels
ENCODE = 0.1  # activations of the text encoders, of their bytes
SLACK = 1.02  # of what is counted outside training, all of which is alive at once: segments that are not filled
# Of the host: Python, PyTorch, diffusers and CUDA; a shard, prompts and pictures that are read, made or written
HOST = int(1.5 * GIB)
COPIES = 3  # of a checkpoint's numbers, on the host while it is written: as tensors, in the file's order, as its bytes
# Speed. Calibrated on slots with everything kept and two streams: of SDXL and SD1.5 at their own size and at 768x768,
# ranks 1 to 64, on H200s (4,237 GB/s, 738 and 746 TFLOP/s), with an H100's parting of LAUNCH (3,017 GB/s); what an odd
# rank takes was timed by kernel alone. COPY and INT8 are what rows of
# results/memory.json for 16G and less took beyond the rest: 0 to 42 us a tensor, and some 13 ms of SDXL's slot.
PRODUCTS = 0.825  # of `tflops`, in products and convolutions
ATTENTION = 3.2  # times as long an operation of it takes
LATENCY, LAUNCH = 1.8e-6, 1.8e-6 * 3018  # seconds, and seconds times GB/s, a launch: by itself, and by memory
FORWARDS = 8  # without a gradient, that have a slot's launches
RANKED, ODD = 2.5e-6, 7.5e-6  # seconds for each layer that a LoRA of a rank above 1 extends; of an odd one
UPDATE = 139  # bytes read and written for each of a LoRA's weights: gradients in pieces and as one, clipping, Adam
COPY = 20e-6  # seconds that a tensor on its way to the host and back shows, even where its copies are hidden
INT8 = 18e-6 * 3018  # seconds times GB/s: of a slot, for each linear layer that is multiplied in int8
HIDDEN = 0.2  # of what launches take, that the second stream hides: of SDXL's 18%, of SD1.5's 31%
ONE_BY_ONE = 1 / 12  # of what launches take, that real features one by one add: about one more pass of the encoder
LAUNCHES = 12  # a slot's, for each layer that a LoRA may extend
MADE = 2.1  # bytes read and written for each of a weight that is made for a product: 5 ms of an SD1.5 slot
ELEMENTWISE = 0.6  # of `bandwidth`, where norms are computed again


def card_for(budget: int) -> Card:
    """The smallest of CARDS that has the budget."""
    return next((card for card in CARDS if card.gib * GIB >= budget), CARDS[-1])


def this_card(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Card:
    """The rates of `device`, measured in about a second: a product in `dtype`, a copy, both ways to the host."""
    properties = torch.cuda.get_device_properties(device)
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    product = _seconds(lambda: a @ a, 20)
    source = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    copy = _seconds(lambda: source.clone(), 10)
    link = link_rate(device)
    tflops, bandwidth = 2 * 4096**3 / product * 1e-12, 2 * 64 * MIB / copy * 1e-9
    torch.cuda.empty_cache()
    return Card(properties.name, properties.total_memory / GIB, tflops, bandwidth, link, measured=True)


def link_rate(device: torch.device) -> float:
    """GB/s of pinned copies: the slower direction."""
    host = torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    out = _seconds(lambda: host.copy_(there, non_blocking=True), 5)
    back = _seconds(lambda: there.copy_(host, non_blocking=True), 5)
    return host.nbytes / max(out, back) * 1e-9


def _seconds(run: Callable[[], object], times: int) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def automatic(device: torch.device) -> int:
    """The budget of `--vram auto`: what is free or this process's already, less what a desktop may come to take."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + CONTEXT - DISPLAY


def most(device: torch.device) -> int:
    """Bytes of `device` that a budget can have: what is free, and what this process holds already."""
    held = process_memory()
    return automatic(device) if held is None else torch.cuda.mem_get_info(device)[0] + held


def granted(device: torch.device, asked: int | None) -> int:
    """The budget for `asked` bytes (None: auto): no more than there is, which is said in a line."""
    if asked is None:
        return automatic(device)
    if asked <= (there := most(device)):
        return asked
    print(f"note: vram {asked / GIB:.2f}G is more than this card has free: planned for {there / GIB:.2f}G")
    return there


def allowed(device: torch.device) -> int | None:
    """Bytes that this process, with its context, can have of `device`: what is free, within the allocator's cap.

    None for a CPU.
    """
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return min(automatic(device), int(torch.cuda.get_per_process_memory_fraction(device) * total) + CONTEXT)


def cap(device: torch.device, budget: int, context: int = CONTEXT) -> None:
    """The allocator's part of `budget`: the process with its context of `context` bytes stays within it."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, budget - context) / total), device)


def process_memory() -> int | None:
    """Bytes of the card that this process holds, by the driver; None where nvidia-smi cannot say (containers, WSL)."""
    ask = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
        return next(int(used) * MIB for pid, used in (line.split(", ") for line in lines) if int(pid) == os.getpid())
    except (OSError, subprocess.SubprocessError, ValueError, StopIteration):
        return None


def fallback_risk() -> str | None:
    """On Windows and WSL: what to do against NVIDIA's system-memory fallback, which crawls instead of failing."""
    version = Path("/proc/version")
    wsl = version.exists() and "microsoft" in version.read_text().lower()
    if platform.system() != "Windows" and not wsl:
        return None
    return (
        "the NVIDIA driver may move memory to the host instead of failing, which is many times slower: in the NVIDIA "
        "Control Panel set CUDA - Sysmem Fallback Policy to `Prefer No Sysmem Fallback`"
    )
