"""What each budget costs: python benchmarks/memory.py (needs a GPU) -> results/memory.json.

SDXL at 1024x1024 and SD1.5 at 512x512, random weights, bf16, batch 1: for each rank and budget 50 iterations of 4 slots
under `rapm`'s plan, with the allocator capped as `rapm train --vram` does it, each in a process of its own. Told are
the plan's prediction, what the driver says the process holds, what the allocator reserved, and the time over that of
the same code without a budget. Beside it 10 of `stock` (peers.Stock: diffusers, peft, autocast) with gradient
checkpointing of the student under the same caps. Who runs out of memory keeps a row that says so.

Then the offload on its own: SDXL's slot under the 8G plan, of which what goes to the host is moved by ours, by
torch.autograd.graph.save_on_cpu(pin_memory=True) and by torchtune where it is installed, or stays; in one process, in
turns, eager and as a CUDA graph, where no host takes part in the time. save_on_cpu waits for the host and so has no
graph: there its copies stand for it (movers.Copies).

`--check` runs every case for 2 iterations on small models on whatever device there is, so that a GPU's time is not
spent on a mistake here.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from movers import Mover, movers
from peers import Stock, stock_unet
from slot_time import SCHEDULE, make_step, random_trajectory, random_unet
from step import SMALL, alone
from torch.utils.checkpoint import checkpoint

from rapm.architecture import complete
from rapm.bench.measure import card, need_gpu
from rapm.bench.results import keep
from rapm.bench.shapes import MODELS, Model
from rapm.config import Config
from rapm.errors import UserError
from rapm.graph import captured
from rapm.loading.families import Model as Planned
from rapm.memory import cards
from rapm.memory.budget import Budget, out_of_memory, summary
from rapm.memory.cards import GIB, MIB
from rapm.memory.offload import Offload
from rapm.memory.planner import Planner
from rapm.memory.saved import Memory, Policy
from rapm.schedule import Schedule
from rapm.step import SlotMemory

ROOT = Path(__file__).parents[1]
BUDGETS = {
    "sdxl": ("none", "24G", "16G", "12G", "8G", "6G"), "sd15": ("none", "24G", "16G", "12G", "8G", "6G", "4G"),
    "sdxl-768": ("none", "12G", "8G"), "sd15-768": ("none", "6G", "4G"),  # of pictures of 768 x 768
}  # fmt: skip
RANKS = {"sdxl": (1, 64), "sd15": (64,), "sdxl-768": (16,), "sd15-768": (16,)}
OFFLOADED = 8 * GIB  # the budget whose plan is moved
MOVERS = "none", "rapm", "save_on_cpu", "torchtune"
MOVERS = (*MOVERS, *(f"{mover}-captured" for mover in MOVERS))
ITERATIONS, PEER, WARM = 50, 10, 2  # of ours, of a peer, and before both
MOVES, REPLAYS = 2, 12  # of a mover, eager, and as many times more as a graph
TIMEOUT = 300  # seconds a case


def family_of(name: str) -> str:
    return name.partition("-")[0]


def model_of(name: str, check: bool) -> tuple[Model, Planned]:
    """A UNet's config and side, small for a check, and what the planner is told of it: text encoders do not train."""
    family, _, pixels = name.partition("-")
    unet, side = MODELS[family]
    if pixels:
        side = int(pixels) // 8
    if check:
        unet, side = dict(unet) | SMALL[family], 16
    return Model(unet, side), Planned(name, complete({**unet, "sample_size": side}), 0, 0)


def device_of(check: bool) -> torch.device:
    if check and not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, iteration, count: int, warm: int = WARM) -> list[float]:
    """Seconds of each of `count` iterations, after those to warm up."""
    times = []
    for _ in range(warm + count):
        synchronize(device)
        start = time.perf_counter()
        iteration()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times[warm:]


def held(device: torch.device) -> dict[str, float | None]:
    """MiB: of the process by the driver, of the whole card in use, reserved and allocated at the most."""
    if device.type != "cuda":
        return {}
    process, (free, total) = cards.process_memory(), torch.cuda.mem_get_info()
    return {
        "process_mib": None if process is None else process / MIB, "card_mib": (total - free) / MIB,
        "reserved_mib": torch.cuda.max_memory_reserved() / MIB,
        "allocated_mib": torch.cuda.max_memory_allocated() / MIB,
    }  # fmt: skip


def ours(name: str, rank: int, vram: str, count: int, check: bool) -> dict:
    """`count` captured iterations under the plan for `vram`, corrected by its own first one, as Training does it."""
    device, (model, planned) = device_of(check), model_of(name, check)
    config = Config.preset(family_of(name)).replace(lora_rank=rank, vram="auto" if vram == "none" else vram)
    budget = None if vram == "none" else Budget(planned, config, device)
    mode = "full" if budget is None else budget.planner.config.frozen_weights
    unet = random_unet(model.unet, device.type, mode=mode)
    if budget is not None and device.type == "cuda":  # now: a run loads its weights layer by layer
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cards.cap(device, budget.bytes)
    trajectory = random_trajectory(unet, config, model.side)
    step, notes = make_step(unet, config, trajectory), []
    row: dict = {"frozen_weights": mode}
    if budget is None:
        row |= {
            "predicted_mib": Planner(planned, config, cards.CARDS[-1]).plan(None).phases["train"] / MIB,
            "beside": True,
        }
        step.memory = SlotMemory(beside=True)
    else:
        row["predicted_mib"] = budget.plan.phases["train"] / MIB
        step.memory = budget.memory(unet)

    def iteration(slot=step) -> None:
        step.load(trajectory, 0)
        for _ in range(config.steps):
            slot()

    slot = None
    while slot is None:
        try:
            iteration()
            if device.type == "cuda":
                if budget is not None and (line := budget.correct()):
                    notes.append(line)
                    step.memory = SlotMemory()
                    step.memory = budget.memory(unet)
                    iteration()
                slot = step.captured()
            else:
                slot = step
        except RuntimeError as error:  # a capture that runs out of memory ends with an error of its own
            if out_of_memory(error) is None or budget is None or (line := budget.step_down()) is None:
                raise
            notes.append(line or "and again")
            step.forget()  # what lies in the graph's memory
            torch.cuda.empty_cache()
            step.memory = SlotMemory()
            step.memory = budget.memory(unet)
    times = timed(device, functools.partial(iteration, slot), count)
    if not torch.isfinite(step.sums).all():
        raise SystemExit(f"memory: {name} {rank} {vram}: not finite: what was timed is not a training")
    row |= {"seconds": statistics.median(times), "slowest": max(times), "notes": notes, **held(device)}
    if budget is not None:
        plan = budget.plan
        row |= {
            "plan": summary(plan),
            "window_mib": plan.window / MIB,
            "together": plan.together,
            "beside": plan.beside,
        }
        for kind, policies in (("student", plan.student), ("encoder", plan.encoder)):
            row[kind] = {name: str(policy) for name, policy in policies.items() if policy != Policy()}
        row |= {"moved_mib": plan.moved / MIB, "promised": plan.slowdown}
        row["final_predicted_mib"] = plan.phases["train"] / MIB
    offload = step.memory.student.offload
    row["moved"] = 0 if offload is None else offload.moved_out
    return row


class Checkpointed(Stock):
    """Stock with the student's blocks checkpointed; the features are not: their recompute would have the LoRA on."""

    def features(self, x: torch.Tensor, u: torch.Tensor) -> list[torch.Tensor]:
        self.unet.disable_gradient_checkpointing()
        try:
            return super().features(x, u)
        finally:
            checkpointed(self.unet)


def checkpointed(unet: torch.nn.Module) -> None:
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    unet.enable_gradient_checkpointing(run)


def stock(name: str, rank: int, vram: str, count: int, check: bool) -> dict:
    """The peer, captured too, under the same cap."""
    device, (model, _) = device_of(check), model_of(name, check)
    config = Config.preset(family_of(name)).replace(lora_rank=rank)
    if vram != "none" and device.type == "cuda":
        from rapm.config import parse_vram

        cards.cap(device, parse_vram(vram))
    unet = random_unet(model.unet, device.type)
    trajectory = random_trajectory(unet, config, model.side)
    theirs = stock_unet(unet.config, unet.state_dict())
    step = Checkpointed(theirs, config, Schedule.from_config(SCHEDULE), trajectory)
    checkpointed(step.unet)

    def iteration(slot=step) -> None:
        step.load(trajectory)
        for _ in range(config.steps):
            slot()

    iteration()
    slot = captured(step) if device.type == "cuda" else step
    times = timed(device, functools.partial(iteration, slot), count)
    return {"seconds": statistics.median(times), "slowest": max(times), **held(device)}


def moves(name: str, count: int, check: bool) -> dict[str, dict]:
    """A slot under the policies of the 8G plan, whose offload is each mover's, or none: eager, and captured.

    In turns, since an eager slot is as fast as its host, which other work slows down for minutes.
    """
    device, (model, planned) = device_of(check), model_of(name, check)
    config, cuda = Config.preset(family_of(name)).replace(lora_rank=1), device.type == "cuda"
    plan = Planner(planned, config, cards.this_card(device) if cuda else cards.CARDS[0])
    plan = plan.plan(OFFLOADED if not check else plan.smallest() * 11 // 10)
    unet = random_unet(model.unet, device.type)
    trajectory = random_trajectory(unet, config, model.side)
    step = make_step(unet, config, trajectory)
    own = Offload(plan.moved * 5 // 4 + MIB, device, unet.parameters(), plan.window)
    offloads = {"rapm": own, "rapm-captured": own} | movers(cuda)
    still = {layer: policy._replace(offload=False) for layer, policy in plan.student.items()}
    students = {"none": Memory(still), "none-captured": Memory(still)}
    students |= {mover: Memory(plan.student, offload) for mover, offload in offloads.items()}
    memories = {
        mover: SlotMemory(student, Memory(plan.encoder), plan.together, plan.beside)
        for mover, student in students.items()
    }
    rows: dict[str, dict] = {mover: {"failed": "torchtune is not installed"} for mover in MOVERS}

    def iteration(slot=step) -> None:
        step.load(trajectory, 0)
        for _ in range(config.steps):
            slot()

    def prepare(mover: str) -> Callable[[], None]:
        """The slot after a first iteration, with its row."""
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step.memory, out, slot = memories[mover], own.moved_out, step
        iteration()
        rows[mover] = {"layers": sum(policy.offload for policy in plan.student.values())}
        if mover == "rapm":
            rows[mover]["moved_mib"] = (own.moved_out - out) / MIB / config.steps
        if mover.endswith("-captured") and cuda:
            torch.cuda.synchronize()
            with torch.cuda.stream(graphs):
                iteration()
                slot = step.captured()
            torch.cuda.synchronize()
        rows[mover]["allocated_mib"] = held(device).get("allocated_mib", 0.0)
        return slot

    graphs = torch.cuda.Stream() if cuda else None
    for group, times in ((MOVERS[: len(MOVERS) // 2], count), (MOVERS[len(MOVERS) // 2 :], REPLAYS * count)):
        slots = {}
        for mover in filter(memories.__contains__, group):
            try:
                slots[mover] = prepare(mover)
            except Exception as error:  # of another's library
                if not isinstance(memories[mover].student.offload, Mover):
                    raise
                reason = error.__context__ or error  # a capture that it ends has an error of its own
                rows[mover] = {"failed": f"{type(reason).__name__}: {reason}".splitlines()[0][:200]}
        for _ in range(times):
            for mover, slot in slots.items():
                step.memory = memories[mover]
                rows[mover].setdefault("all_seconds", []).extend(
                    timed(device, functools.partial(iteration, slot), 1, warm=0)
                )
    if not torch.isfinite(step.sums).all():
        raise SystemExit("memory: move: not finite: what was timed is not a training")
    for row in rows.values():
        if "all_seconds" in row:
            row["seconds"] = statistics.median(row["all_seconds"])
    return rows


def run_one(kind: str, name: str, rank: str, what: str, check: bool) -> dict:
    count = 2 if check else {"rapm": ITERATIONS, "stock": PEER, "move": MOVES}[kind]
    try:
        if kind == "move":
            return moves(name, count, check)
        return (ours if kind == "rapm" else stock)(name, int(rank), what, count, check)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).splitlines()[0]}"[:300]}
    except UserError as error:
        return {"failed": str(error)}


def told(row: dict, fastest: dict | None) -> str:
    if "failed" in row:
        return row["failed"]
    words = f"{row['seconds']:.3f} s"
    if fastest and "seconds" in fastest:
        words += f", {row['seconds'] / fastest['seconds']:.2f}x"
    if row.get("process_mib"):
        words += f", process {row['process_mib']:.0f} MiB"
    if row.get("reserved_mib"):
        words += f", reserved {row['reserved_mib']:.0f}"
    return words + (f", predicted {row['final_predicted_mib']:.0f}" if "final_predicted_mib" in row else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--budgets", nargs="+", help="none, 24G, 16G ...")
    parser.add_argument("--kinds", nargs="+", choices=["rapm", "stock", "move"], default=["rapm", "stock", "move"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    parser.add_argument("--check", action="store_true", help="small models, 2 iterations, any device, nothing written")
    parser.add_argument("--one", nargs=4, metavar=("KIND", "MODEL", "RANK", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check = arguments.check
    if arguments.one:
        torch.manual_seed(0)
        # What is captured has a stream of its own; torchtune's hooks know the default one only
        if device_of(check).type == "cuda" and arguments.one[0] != "move":
            with torch.cuda.stream(torch.cuda.Stream()):
                row = run_one(*arguments.one, check)
        else:
            row = run_one(*arguments.one, check)
        print(json.dumps(row))
        return 0
    if not check:
        try:
            need_gpu()
        except UserError as error:
            print(f"memory: {error}", file=sys.stderr)
            return 2
    report: dict = {"card": {} if check else card(), "rows": {}}
    cases = []
    for name in arguments.models:
        for rank in arguments.ranks or RANKS[name]:
            for kind in ("rapm", "stock"):
                budgets = arguments.budgets or (("none", "1.3G") if check else BUDGETS[name])
                cases += [(kind, name, rank, vram) for vram in budgets if kind in arguments.kinds]
    if "move" in arguments.kinds and "sdxl" in arguments.models:
        cases.append(("move", "sdxl", 1, "all"))
    failures = 0
    for case in cases:
        kind, name, rank, what = case
        found = alone([__file__, "--one", *map(str, case), *["--check"] * check], TIMEOUT * (1 + (kind == "move")))
        if kind != "move":
            found = {what: found}
        elif "failed" in found:
            found = dict.fromkeys(MOVERS, found)
        for which, row in found.items():
            report["rows"][f"{kind} {name} {rank} {which}"] = row
            fastest = report["rows"].get(f"{kind} {name} {rank} none")
            print(f"{kind} {name} rank {rank} {which}: {told(row, fastest)}", flush=True)
            failures += "failed" in row and "torchtune" not in row["failed"]
        if not check:
            keep(arguments.output, report)
    return int(check and failures > 0)


if __name__ == "__main__":
    sys.exit(main())
