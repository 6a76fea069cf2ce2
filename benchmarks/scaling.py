"""The figures of docs/scaling.md, which `python benchmarks/readme.py` writes. No GPU is needed.

What a slot sends is counted from the code: the buffer of `distributed.Gradients` on meta tensors. What sending takes
is computed, not measured: NCCL's own model of its ring and tree (src/graph/tuning.cc: a base latency, one for each
step, and bytes over bandwidth; protocol Simple, which is that of large buffers), with the links' data sheets. A slot's
time is the measured one of results/slot_time.json.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from tables import fill, table

from rapm.config import Config
from rapm.distributed import Gradients
from rapm.finite import SHARED
from rapm.loading.families import model_of
from rapm.memory.sizes import Sizes, sizes_of
from rapm.trajectories import shard_size

ROOT = Path(__file__).parents[1]
MODELS = {"sd15": "SD1.5, 512x512", "sdxl": "SDXL, 1024x1024"}
RANKS = (1, 64)  # of the LoRA
MIB = 2**20
SLOTS = """
A slot takes {sd15:.1f} ms for SD1.5 and {sdxl:.1f} ms for SDXL on one {device} at rank 1 (measured; at rank 64 more, so
that less is lost there than the table says). Milliseconds of the all-reduce by ring and by tree, and what is left of
the speed of a slot that sends nothing, by the faster:
"""
BASE = {"ring": 8.4e-6, "tree": 8.4e-6}  # seconds, NCCL's for Simple
NVLINK = {"ring": 3.4e-6, "tree": 4e-6}  # a step within a machine
NETWORK = {"ring": 14e-6, "tree": 14e-6}  # a step between two


class Fabric(NamedTuple):
    """Machines of `local` GPUs; GB/s each way of a GPU's NVLink, and of all network cards of a machine."""

    name: str
    machines: int
    nvlink: float
    cards: float = math.inf
    local: int = 8


FABRICS = (
    Fabric("8 GPUs, NVLink", 1, 450),
    Fabric("64 GPUs, 8 x 400 Gb/s a machine", 8, 450, 8 * 50),
    Fabric("64 GPUs, 100 Gb/s a machine", 8, 450, 12.5),
)


def sent(sizes: Sizes, lora_rank: int) -> int:
    """Bytes of a slot's one all-reduce; `sizes` are those of a LoRA of rank 1."""
    weights = (torch.empty(n, device="meta") for n in (lora_rank * sizes.lora, sizes.heads))
    return Gradients(len(SHARED), *weights).buffer.nbytes


def seconds(size: int, fabric: Fabric, algorithm: str) -> float:
    """One all-reduce of `size` bytes."""
    count, machines = fabric.machines * fabric.local, fabric.machines
    if algorithm == "ring":
        across = 2 * machines if machines > 1 else 0
        within, share = 2 * (count - 1) - across, (count - 1) / count
    else:  # a chain within each machine, a tree of machines
        across = 2 * math.ceil(math.log2(machines))
        within, share = 2 * (fabric.local - 1), 1.0
    rate = min(fabric.nvlink, fabric.cards) * 1e9
    latency = BASE[algorithm] + within * NVLINK[algorithm] + across * NETWORK[algorithm]
    return latency + 2 * share * size / rate


def figures() -> str:
    """The page's section."""
    measured = json.loads((ROOT / "benchmarks/results/slot_time.json").read_text())
    sizes = {model: sizes_of(model_of(model), Config.preset(model).replace(lora_rank=1)) for model in MODELS}
    rows = [["", "LoRA rank", "numbers in the LoRA", "in the heads", "sent a slot, MiB"]]
    for model, name in MODELS.items():
        for rank in RANKS:
            found = sizes[model]
            numbers = f"{rank * found.lora:,}", f"{found.heads:,}"
            rows.append([name, str(rank), *numbers, f"{sent(found, rank) / MIB:.1f}"])
    parts = [table(rows)]
    slots = {model: measured["models"][model]["after"]["gpu_ms"] for model in MODELS}
    parts.append(fill(SLOTS.format(device=measured["card"]["device"], **slots)))
    rows = [["", "LoRA rank", *(fabric.name for fabric in FABRICS)]]
    for model, name in MODELS.items():
        for rank in RANKS:
            cells = []
            for fabric in FABRICS:
                times = [1e3 * seconds(sent(sizes[model], rank), fabric, algorithm) for algorithm in BASE]
                share = slots[model] / (slots[model] + min(times))
                cells.append(f"{times[0]:.2f}, {times[1]:.2f}: {share:.1%}")
            rows.append([name, str(rank), *cells])
    parts.append(table(rows))
    rows = [["", "KiB a trajectory", "in a shard", "shards of a default run"]]
    for model, name in MODELS.items():
        config = Config.preset(model)
        count, size = config.trajectories + config.validation_prompts, shard_size(max(sizes[model].trajectories))
        shards = math.ceil(count / size)
        rows.append([name, f"{max(sizes[model].trajectories) / 1024:,.0f}", str(size), str(shards)])
    parts.append("Stage 1, the trajectories:")
    parts.append(table(rows))
    return "\n\n".join(parts)


def render(text: str) -> str:
    """The page with its figures written anew."""
    section = f"<!-- figures:begin -->\n\n{figures()}\n\n<!-- figures:end -->"
    return re.sub("<!-- figures:begin -->.*<!-- figures:end -->", lambda match: section, text, flags=re.S)
