"""Two GPUs as one run: python benchmarks/distributed.py (needs two GPUs) -> results/distributed.json.

First the numbers: two processes train the embedded teacher in fp32, in captured slots with the sum of the gradients in
them, and one process computes the same from the same global batches, eagerly, each slot's gradients averaged and given
to PyTorch's own AdamW. Losses and weights must be equal within 1e-4, or nothing is timed.

Then the speed of one process and of two, on SD1.5 at 512x512, random weights, bf16, LoRA rank 1: trajectories a second,
through the store that a run would make (encoding aside), and slots a second, summed over the processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from slot_time import SCHEDULE, make_step, random_trajectory, random_unet
from torch import Tensor

from rapm import distributed
from rapm.bench.measure import card, need_gpu
from rapm.bench.results import keep
from rapm.bench.shapes import MODELS, example_text
from rapm.checkpoint import STATE, checkpoints
from rapm.config import Config
from rapm.device import DTYPES, pick_device
from rapm.errors import UserError
from rapm.finite import LOSSES
from rapm.lora import LoRA
from rapm.schedule import Schedule
from rapm.solver import Solver
from rapm.step import SlotMemory, Step
from rapm.store import Store
from rapm.teacher import load_teacher
from rapm.trajectories import Negatives, prepare, seed_for
from rapm.unet import Text

ROOT = Path(__file__).parents[1]
MODEL, RANKS = "sd15", 2
TOLERANCE = 1e-4
PARTS = ("equal", "speed")
STORES = 3  # of trajectories, that are timed
ITERATIONS, TIMES = 10, 5  # of four slots, and how often those are timed
SETTINGS = """
trajectories = 30
fine_steps = 5
validation_prompts = 2
fd_samples = 0
replay_size = 2
log_steps = 1
attention = "sdpa"
lr_warmup_steps = 0
"""
COMPARED = [name for name in LOSSES if not name.endswith("norm")]


class Found(NamedTuple):
    """What a training has come to: its losses by iteration, and the LoRA's weights, fp32 on the CPU.

    Not the heads': those whose gradient is rounding alone, such as a bias before a norm, Adam moves by its sign. Nor
    the gradients' norms, which jump where that takes a LeakyReLU to its other slope.
    """

    losses: list[dict[str, float]]
    lora: Tensor


def launch(ranks: int, *words: str) -> list[str]:
    """The command that starts `words` in `ranks` processes of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]


def found(folder: Path) -> Found:
    """Of the run in `folder`."""
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = load_file(checkpoints(folder)[-1] / STATE)
    return Found([x for x in lines if "loss" in x], state["lora"])


def expected(folder: Path, ranks: int, device: str) -> Found:
    """What `ranks` processes should have found, from the store and the settings in `folder`, in one process.

    Each rank is a step of its own with its own replay; its gradients go into a mean, and the mean to torch's AdamW.
    """
    config = Config.of_run(folder)
    teacher = load_teacher(config.teacher, device=torch.device(device), dtype=DTYPES[config.mixed_precision])
    teacher.unet.use_attention(config.attention)
    store, negatives = Store.open(folder / "trajectories"), Negatives(teacher, config.negative_prompt)
    raw = config.replace(max_grad_norm=1e30)  # each rank's gradient as it is
    steps = []
    for _ in range(ranks):
        lora, example = LoRA(teacher.unet, config.lora_rank, config.seed), store[0]
        step = Step(teacher.unet, lora, teacher.schedule, raw, example, negatives("", example.text))
        for optimizer in (step.optimizer, step.head_optimizer):
            optimizer.step = lambda: None
        steps.append(step)
    replicas = [[step.lora.flat, step.discriminators.flat] for step in steps]
    masters = [torch.nn.Parameter(x.detach().clone()) for x in replicas[0]]
    rates = config.learning_rate, config.head_learning_rate
    adams = [
        torch.optim.AdamW([x], lr=rate, betas=betas, weight_decay=0.0, foreach=False)
        for x, rate, betas in zip(masters, rates, ((0.9, 0.99), (0.0, 0.99)), strict=True)
    ]
    trained, losses = len(store) - config.validation_prompts, []

    def generator(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_for(config.seed, purpose))

    for i in range(config.max_train_steps):
        for r, step in enumerate(steps):
            epoch, place = divmod(ranks * i + r, trained)
            order = torch.randperm(trained, generator=generator(f"epoch {epoch}"))
            step.load(store[int(order[place])], ranks * i + r)
            step.draw(generator(f"iteration {ranks * i + r}"), i)
        rise = min(1.0, (i + 1) / (config.lr_warmup_steps + 1))
        rate = config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * i / config.max_train_steps))
        adams[0].param_groups[0]["lr"] = rate
        for _ in range(config.steps):
            for step in steps:
                step()
            with torch.no_grad():
                found = [(step.gradient, step.discriminators.flat.grad) for step in steps]
                for master, gradients in zip(masters, zip(*found, strict=True), strict=True):
                    master.grad = torch.stack(gradients).mean(0)
            torch.nn.utils.clip_grad_norm_(masters[:1], config.max_grad_norm)
            for adam in adams:
                adam.step()
            with torch.no_grad():
                for mine in replicas:
                    for x, master in zip(mine, masters, strict=True):
                        x.copy_(master)
        means = torch.stack([step.sums for step in steps]).mean(0) / config.steps
        losses.append(dict(zip(LOSSES, means.tolist(), strict=True)))
        for step in steps:
            step.sums.zero_()
    return Found(losses, masters[0].detach().cpu())


def differences(mine: Found, theirs: Found) -> dict[str, float]:
    """The largest difference of the losses, relative where they are above 1, and of the LoRA."""
    pairs = [(a[name], b[name]) for a, b in zip(mine.losses, theirs.losses, strict=True) for name in COMPARED]
    losses = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
    return {"losses": losses, "lora": float((mine.lora - theirs.lora).abs().max())}


def check(iterations: int = 2) -> dict[str, float]:
    """Two GPUs against one process, on the embedded teacher, without TF32. SystemExit if they differ.

    Few iterations: later, a rounding alone decides by percents (tests/kernels/test_step_parity.py).
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # for both; CUDA starts below
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "run")
        Path(place, "settings.toml").write_text(SETTINGS)
        words = ["--config", f"{place}/settings.toml", "--output_dir", str(folder), "--report_to", "none"]
        words += ["--max_train_steps", str(iterations)]
        subprocess.run(launch(RANKS, "-m", "rapm.train", *words), check=True, cwd=ROOT)
        result = differences(found(folder), expected(folder, RANKS, "cuda:0"))
    for name, value in result.items():
        if not value <= TOLERANCE:
            raise SystemExit(f"distributed: {name} differ by {value:.1e}: nothing is timed")
    return result


def stand_in(unet: torch.nn.Module, side: int) -> SimpleNamespace:
    """As much of a teacher as the store asks for, with random text."""
    text = example_text(unet.config, side, "cpu")
    text = Text(*(None if x is None else x.float() for x in text))
    return SimpleNamespace(
        unet=unet, schedule=Schedule.from_config(SCHEDULE), default_resolution=(8 * side, 8 * side), unet_waits=False,
        fingerprint="random", frozen="full", latent_shape=lambda resolution: (4, side, side),
        encode_negative=lambda words: text, encode=lambda prompts, resolution: text.expand(len(prompts)),
    )  # fmt: skip


def work(output: Path, count: int) -> None:
    """One of the processes: times `count` trajectories and some slots; the first writes what all did a second."""
    config = Config.preset(MODEL).replace(lora_rank=1, trajectories=count)
    with distributed.group(config), tempfile.TemporaryDirectory() as own:
        pick_device(config)
        torch.manual_seed(0)
        side = MODELS[MODEL].side
        unet = random_unet(MODELS[MODEL].unet, "cuda")
        store = Path(distributed.from_first(own), "trajectories")
        rates = {"trajectories": trajectories(stand_in(unet, side), config, store)}
        torch.cuda.empty_cache()
        rates["slots"], rates["sent_mib"] = slots(unet, config, side)
        if distributed.first():
            output.write_text(json.dumps(rates))


def trajectories(teacher: SimpleNamespace, config: Config, folder: Path) -> float:
    """Trajectories a second of all ranks together, with the writing of the store: the median of several."""
    grid = dict(steps=config.steps, fine_steps=config.fine_steps, guidance=config.guidance)
    text, uncond = teacher.encode(["a"] * config.solve_batch, None), teacher.encode_negative("")
    noise = torch.randn(config.solve_batch, *teacher.latent_shape(None))
    Solver(teacher.unet, teacher.schedule, **grid)(text, noise, uncond)  # compiles and tunes
    torch.cuda.synchronize()
    times = []
    for i in range(STORES):
        distributed.wait()
        start = time.perf_counter()
        prepare(folder / str(i), teacher, ["a"], config, progress=False)
        times.append(time.perf_counter() - start)
    return config.trajectories / statistics.median(times)


def slots(unet: torch.nn.Module, config: Config, side: int) -> tuple[float, float]:
    """Captured slots a second of all ranks together, with the loads between iterations; MiB that a slot sends."""
    trajectory = random_trajectory(unet, config, side)
    step = make_step(unet, config, trajectory)
    step.memory = SlotMemory(beside=True)
    step.load(trajectory, 0)
    step()  # every kernel, workspace and communicator must have been used once
    slot, times = step.captured(), []
    for _ in range(TIMES):
        torch.cuda.synchronize()
        distributed.wait()
        start = time.perf_counter()
        for i in range(ITERATIONS):
            step.load(trajectory, i)
            for _ in range(config.steps):
                slot()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if float(step.skipped):
        raise SystemExit("distributed: slots were not finite: what was timed is not a training")
    sent = 0.0 if step.exchange is None else step.exchange.buffer.nbytes / 2**20
    return distributed.world() * ITERATIONS * config.steps / statistics.median(times), sent


def compared(path: Path) -> bool:
    """Whether a call on such a card found both equal."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    equal = found.get("equal", {}) if found.get("card") == card() else {}
    return bool(equal) and max(equal.values()) <= TOLERANCE


def conclude(report: dict) -> dict:
    """`report` with how many times as fast several GPUs are as one, once both are measured."""
    one, several = (report.get("ranks", {}).get(str(ranks), {}) for ranks in (1, RANKS))
    report["speedup"] = {name: several[name] / one[name] for name in ("trajectories", "slots") if one and several}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=128, help="64 are a shard, which one process computes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="one by one where time is short")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "distributed.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # As torchrun does for several processes. One alone would take all cores, which held it up: 2.24 times was measured
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.worker:
        return work(arguments.worker, arguments.trajectories)
    try:
        need_gpu()
        if torch.cuda.device_count() < RANKS:
            raise UserError(f"{RANKS} GPUs are needed, here is one")
        if "equal" not in arguments.parts and not compared(arguments.output):
            raise UserError(f"{arguments.output} has no comparison on this card: --parts equal comes first")
    except UserError as error:
        print(f"distributed: {error}", file=sys.stderr)
        sys.exit(2)
    report: dict = {"card": card(), "model": MODEL}
    if "equal" in arguments.parts:
        report["equal"] = check()
        keep(arguments.output, report, conclude=conclude)
        print("equal:", ", ".join(f"{name} {value:.1e}" for name, value in report["equal"].items()), flush=True)
    if "speed" not in arguments.parts:
        return
    report |= {"trajectories": arguments.trajectories, "ranks": {}}
    for ranks in (1, RANKS):
        with tempfile.TemporaryDirectory() as place:
            words = ["--worker", f"{place}/rates.json", "--trajectories", str(arguments.trajectories)]
            subprocess.run(launch(ranks, __file__, *words), check=True)
            report["ranks"][ranks] = json.loads(Path(place, "rates.json").read_text())
        whole = keep(arguments.output, report, conclude=conclude)
    one, several = (report["ranks"][ranks] for ranks in (1, RANKS))
    for name, factor in whole["speedup"].items():
        print(f"{name:<13}{one[name]:8.2f}/s with 1 GPU{several[name]:9.2f}/s with {RANKS}{factor:7.2f} times")


if __name__ == "__main__":
    main()
