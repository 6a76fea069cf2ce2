"""Write the figures of docs/scaling.md: `python benchmarks/scaling.py` (`--check` only compares). No GPU is needed.

What a slot sends is counted from the code: the buffer of `distributed.Gradients` on meta tensors. What sending takes is
computed, not measured: NCCL's own model of its ring and tree (src/graph/tuning.cc: a base latency, one for each step,
and bytes over bandwidth; protocol Simple, which is that of large buffers), with the links' data sheets. A slot's time is
the measured one of results/slot_time.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from rapm.config import Config
from rapm.distributed import Gradients
from rapm.loading.families import model_of
from rapm.memory.sizes import Sizes, sizes_of
from rapm.trajectories import shard_size

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
MODELS = {"sd15": "SD1.5, 512x512", "sdxl": "SDXL, 1024x1024"}
RANKS = (1, 64)  # of the LoRA
MIB = 2**20
BASE = {"ring": 8.4e-6, "tree": 8.4e-6}  # seconds, NCCL's for Simple
NVLINK = {"ring": 3.4e-6, "tree": 28e-6}  # a step within a machine
NETWORK = {"ring": 14e-6, "tree": 28e-6}  # a step between two


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
    return Gradients(*weights).buffer.nbytes


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


def table(rows: list[list[str]]) -> str:
    """The first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


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
    device = measured["card"]["device"]
    parts.append(
        f"A slot takes {measured['models']['sd15']['after']['gpu_ms']:.1f} ms for SD1.5 and "
        f"{measured['models']['sdxl']['after']['gpu_ms']:.1f} ms for SDXL on one {device} at rank 1 (measured; at rank 64\n"
        "more, so its shares below are a little better than they say). Milliseconds of the all-reduce by ring and by\n"
        "tree, and what is left of the speed of a slot that sends nothing, by the faster of the two:"
    )
    rows = [["", "LoRA rank", *(fabric.name for fabric in FABRICS)]]
    for model, name in MODELS.items():
        slot = measured["models"][model]["after"]["gpu_ms"] * 1e-3
        for rank in RANKS:
            cells = []
            for fabric in FABRICS:
                ring, tree = (seconds(sent(sizes[model], rank), fabric, algorithm) for algorithm in BASE)
                cells.append(f"{1e3 * ring:.2f}, {1e3 * tree:.2f}: {slot / (slot + min(ring, tree)):.0%}")
            rows.append([name, str(rank), *cells])
    parts.append(table(rows))
    rows = [["", "KiB a trajectory", "in a shard", "shards of a default run", "full rounds at 64 ranks"]]
    for model, name in MODELS.items():
        config = Config.preset(model)
        count, size = config.trajectories + config.validation_prompts, shard_size(sizes[model].trajectory)
        shards = math.ceil(count / size)
        rows.append(
            [name, f"{sizes[model].trajectory / 1024:,.0f}", str(size), str(shards), str(math.ceil(shards / 64))]
        )
    parts.append("Stage 1, the trajectories:")
    parts.append(table(rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    section = f"<!-- figures:begin -->\n\n{figures()}\n\n<!-- figures:end -->"
    new = re.sub("<!-- figures:begin -->.*<!-- figures:end -->", lambda match: section, text, flags=re.S)
    if arguments.check and new != text:
        sys.exit(f"{PAGE.name} differs from the code: python benchmarks/scaling.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
