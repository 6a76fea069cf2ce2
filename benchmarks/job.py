"""The paper's SDXL job on one GPU, from a part of it: python benchmarks/job.py (needs a GPU) -> results/job.json.

1,000 trajectories of N = 4 slots of M = 10 guided steps, then 20,000 iterations, at 1024x1024 in bf16 at rank 1. A
`--share` of both is measured, 5% by default, and multiplied: what comes first (kernels compiled, attention timed, slots
captured) counts once. Random weights of the real architecture; the rest is what `rapm train` runs: the solver writes a
store, and the training reads random trajectories of a store and its losses back as in a run. Not in it: text encoders,
validations, checkpoints, export. 5% is more than ten minutes on most cards: `--stages` measures one of the two, and
keeps what another call measured of the other.

For other cards there is an estimate: benchmarks/slot_time.py's GPU time of a slot, by family of kernels, on the
measured card; products, convolutions and attention are scaled by the cards' dense bf16 rates, everything else by their
memory's bandwidth, and the training by what a plan for the card's memory is predicted to cost. On shapes of batch 1
small cards come closer to their rates than large ones: the estimate leans to the slow side.

`--check` does all of it in small, on any device, and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from slot_time import SCHEDULE, random_unet
from step import SMALL

from rapm.bench.measure import card, limits, measuring, need_gpu
from rapm.bench.results import keep
from rapm.bench.shapes import MODELS, Model, example_text
from rapm.config import Config
from rapm.errors import UserError
from rapm.loading.families import Model as Planned
from rapm.loading.families import model_of
from rapm.memory.budget import Budget
from rapm.memory.cards import DISPLAY, GIB, MIB, Card
from rapm.memory.planner import Planner
from rapm.schedule import Schedule
from rapm.store import Store
from rapm.training import Training
from rapm.trajectories import prepare
from rapm.unet import Text, UNet, complete

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = ("trajectories", "training")
GOAL_HOURS = 2.5
WARM = 10  # iterations before the measured ones
STORED = 48  # trajectories that are trained on, in random order
PROMPT = "a photograph"
# Dense bf16 with fp32 accumulation and memory bandwidth, by NVIDIA's data sheets; PCIe 4 x16.
CARDS = (
    Card("RTX 3060", 12, 25.5, 360, 24), Card("RTX 4080", 16, 97.5, 717, 24), Card("RTX 3090", 24, 71, 936, 24),
    Card("RTX 4090", 24, 165, 1008, 24),
)  # fmt: skip
ARITHMETIC = ("gemm", "conv", "attention")  # families of slot_time.py; the others are bound by memory


# What is measured


def teacher_of(unet: UNet, side: int, mode: str) -> SimpleNamespace:
    """What stage 1 and the training ask of a teacher, without text encoders and VAE: random embeddings, as many."""

    def encode(prompts: list[str], resolution: tuple[int, int] | None = None) -> Text:
        return Text.cat([example_text(unet.config, side, "cpu") for _ in prompts])

    return SimpleNamespace(
        unet=unet, schedule=Schedule.from_config(SCHEDULE), unet_waits=False, stock_by_blocks=False, frozen=mode,
        fingerprint="random", default_resolution=(8 * side, 8 * side),
        latent_shape=lambda resolution=None: (4, side, side), encode=encode,
        encode_negative=lambda words="": encode([words]),
    )  # fmt: skip


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fresh() -> None:
    """What earlier stages took does not count."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    return torch.cuda.max_memory_reserved() / MIB if torch.cuda.is_available() else 0.0


def solve(teacher: SimpleNamespace, folder: Path, config: Config, count: int, fine_steps: int) -> Store:
    config = config.replace(trajectories=count, fine_steps=fine_steps)
    return prepare(folder, teacher, [PROMPT], config, progress=count > config.solve_batch)


def measure_trajectories(teacher: SimpleNamespace, place: Path, config: Config, count: int) -> dict:
    """Seconds of the first batch, which compiles, and of each of `count` trajectories in a store of their own."""
    fresh()
    begin = now()
    solve(teacher, place / "first", config, config.solve_batch, config.fine_steps)
    first = now()
    solve(teacher, place / "store", config, count, config.fine_steps)
    seconds = (now() - first) / count
    return {
        "count": config.trajectories, "measured": count, "batch": config.solve_batch, "first_seconds": first - begin,
        "seconds": seconds, "reserved_mib": peak_mib(),
    }  # fmt: skip


def measure_training(
    teacher: SimpleNamespace, place: Path, config: Config, count: int, budget: Budget | None
) -> dict[str, object]:
    """Seconds of the first iterations and of each of `count`, with the losses read as a run reads them."""
    # Of one fine step a slot: what is in a trajectory costs the training nothing.
    store = solve(teacher, place / "train", config, STORED + config.validation_prompts, 1)
    fresh()
    begin, training = now(), Training(teacher, store, config, budget)
    pending, asked = 0, None
    for i in range(WARM + count):
        if i == WARM:
            first = now()
        training.iterate()
        pending += config.steps
        if asked is not None:
            asked()
            training.check()
            asked = None
        if (i + 1) % config.log_steps == 0:
            asked, pending = training.losses(pending), 0
            if (i + 1) % 100 == 0:
                print(f"training: {i + 1} of {WARM + count}", file=sys.stderr, flush=True)
    seconds, skipped = (now() - first) / count, int(training.step.skipped)
    if skipped:
        raise SystemExit(f"job: {skipped} updates were not finite: what was timed is not a training")
    return {
        "count": config.max_train_steps, "measured": count, "first_seconds": first - begin, "seconds": seconds,
        "skipped": skipped, "reserved_mib": peak_mib(),
    }  # fmt: skip


# What is concluded


def hours(stage: Mapping[str, float]) -> float:
    """Of the whole stage: what comes first once, and `count` times what was measured."""
    return (stage["first_seconds"] + stage["count"] * stage["seconds"]) / 3600


def scaled(families: Mapping[str, float], here: Mapping[str, float], there: Card) -> float:
    """How many times as long a slot of `families` (ms on a card that reaches `here`) takes on the card `there`."""
    rate, bandwidth = here["bf16_tflops"] / there.tflops, here["copy_gbs"] / there.bandwidth
    ms = sum(value * (rate if family in ARITHMETIC else bandwidth) for family, value in families.items())
    return ms / sum(families.values())


def estimates(
    stages: Mapping[str, Mapping[str, float]], families: Mapping[str, float], limit: Mapping[str, float], model: Planned
) -> dict[str, dict[str, float]]:
    """Hours of the job on each of CARDS, what a slot takes there over here, and what the plan for its memory costs."""
    found, config = {}, Config.preset("sdxl").replace(lora_rank=1)
    for there in CARDS:
        times = scaled(families, limit, there)
        slowdown = Planner(model, config, there).plan(int(there.gib * GIB) - DISPLAY).slowdown
        each = {name: hours(stage) * times * (slowdown if name == "training" else 1) for name, stage in stages.items()}
        found[there.name] = {"hours": sum(each.values()), "times": times, "slowdown": slowdown, "gib": there.gib}
    return found


def conclude(report: dict, slot_time: Mapping, model: Planned) -> dict:
    """`report` with the job's hours, once both stages are there, and the estimates, where the slot's card is this."""
    stages = report["stages"]
    if set(STAGES) <= stages.keys():
        report["hours"] = sum(hours(stages[name]) for name in STAGES)
        report["goal_hours"] = GOAL_HOURS
        modes = slot_time.get("models", {}).get("sdxl", {})
        if "after" in modes and slot_time["card"]["device"] == report["card"]["device"]:
            report["estimates"] = estimates(stages, modes["after"]["families"], report["limits"], model)
    return report


def best_batch(report: Mapping, device: str, otherwise: int) -> int:
    """The fastest batch of benchmarks/trajectories.py's report, if it is of such a card."""
    found = report.get("models", {}).get("sdxl", {})
    rows = found.get("rapm", {})
    if not rows or found.get("card", {}).get("device") != device:
        return otherwise
    return int(min(rows, key=lambda batch: rows[batch]["seconds"]))


def read(folder: Path, name: str) -> dict:
    """Another benchmark's report: `folder`'s, otherwise the one that the README shows."""
    found = [path for path in (folder / f"{name}.json", RESULTS / f"{name}.json") if path.is_file()]
    return json.loads(found[0].read_text()) if found else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.05, help="of the job that is measured")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch", type=int, help="of trajectories; the fastest of results/trajectories.json")
    parser.add_argument("--vram", default="auto", help="a budget for the training, as rapm train takes it")
    parser.add_argument("--output", type=Path, default=RESULTS / "job.json")
    parser.add_argument("--check", action="store_true", help="in small, on any device, nothing written")
    arguments = parser.parse_args()
    check = arguments.check
    if not check:
        try:
            need_gpu()
        except UserError as error:
            print(f"job: {error}", file=sys.stderr)
            return 2
    if not 0 < arguments.share <= 1:
        print(f"job: --share {arguments.share}: above 0, at most 1", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model(dict(MODELS["sdxl"].unet) | SMALL["sdxl"], 8) if check else MODELS["sdxl"]
    config = Config.preset("sdxl").replace(lora_rank=1, vram=arguments.vram, resolution=(8 * model.side,) * 2)
    if check:
        config, report = config.replace(fine_steps=2, trajectories=4, max_train_steps=20, solve_batch=2), {"card": {}}
        report["limits"] = {"bf16_tflops": 700.0, "copy_gbs": 4000.0}
    else:
        report = {"card": card()}
        with measuring():
            report["limits"] = limits()
        solved = read(arguments.output.parent, "trajectories")
        batch = arguments.batch or best_batch(solved, report["card"]["device"], config.solve_batch)
        config = config.replace(solve_batch=batch)
    budget = None
    if Budget.wanted(config, device):
        budget = Budget(Planned("sdxl", complete({**model.unet, "sample_size": model.side}), 0, 0), config, device)
        mode = budget.planner.config.frozen_weights
        config = config.replace(solve_batch=min(config.solve_batch, budget.plan.solve_batch), frozen_weights=mode)
    report |= {"share": arguments.share, "vram": arguments.vram, "stages": {}}

    def concluded(report: dict) -> dict:
        return conclude(report, read(arguments.output.parent, "slot_time"), model_of("sdxl"))

    mode, dtype = config.frozen_weights.replace("auto", "full"), torch.float32 if check else torch.bfloat16
    teacher = teacher_of(random_unet(model.unet, device.type, dtype, mode), model.side, mode)
    with tempfile.TemporaryDirectory() as name:
        for stage in arguments.stages:
            of = config.trajectories if stage == "trajectories" else config.max_train_steps
            count = max(1, round(arguments.share * of))
            if stage == "trajectories":
                batch = config.solve_batch  # a last one of another size would be captured for itself
                found = measure_trajectories(teacher, Path(name), config, max(batch, count // batch * batch))
            else:
                found = measure_training(teacher, Path(name), config, max(count, WARM), budget)
            report["stages"][stage] = {**found, "share": found["measured"] / of}
            print(f"{stage}: {found['seconds']:.3f} s each, {hours(found):.2f} h for {of}", flush=True)
            told = report if check else keep(arguments.output, report, same=("card", "vram"), conclude=concluded)
    if "hours" in told:
        print(f"the whole job: {told['hours']:.2f} h (goal: under {GOAL_HOURS})")
        for there, row in told.get("estimates", {}).items():
            print(f"  estimate, {there}: {row['hours']:.1f} h")
    return 0


if __name__ == "__main__":
    sys.exit(main())
