"""Long runs of the embedded teacher on a GPU, through the code that `rapm train` runs -> results/soak.json.

    python benchmarks/soak.py                                       20,000 iterations in one process
    python benchmarks/soak.py --precision fp16 --iterations 1250    5,000 slots in fp16
    python benchmarks/soak.py --same_bits                           the same seed twice, each in a process of its own

A soak compares the first and the last 1,000 iterations after a warm-up that has met everything once, a validation and
its new capture too: GPU and host memory, open files, and the time of an iteration, which is the median over stretches
of one log interval, since the host only waits for the GPU there. Then what the run has left on the disk must be whole.
One that the limit stops has ended as by SIGTERM, with a checkpoint, and its figures are of the iterations it did.

`--check` does the same in small, on any device, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

import torch
from safetensors.torch import load_file

from rapm.bench.measure import card, need_gpu
from rapm.bench.results import keep
from rapm.checkpoint import checkpoints, load_checkpoint
from rapm.config import Config
from rapm.errors import UserError
from rapm.export.lora_file import WEIGHTS
from rapm.stop import Interrupted
from rapm.train import prepare_run, run, solve_all
from rapm.training import Training

START = time.perf_counter()
ROOT = Path(__file__).parents[1]
WARM, WINDOW = 1000, 1000  # iterations before the first window, and of a window; less in short runs
GROWTH_MIB, HANDLES, DRIFT = 16.0, 0, 0.02  # what a soak may grow by
MEMORY = ("allocated_mib", "reserved_mib", "rss_mib")
CHECK = dict(
    trajectories=3, validation_prompts=1, fine_steps=1, fd_samples=0, lora_rank=1, log_steps=2, checkpointing_steps=4,
    validation_steps=6,
)  # fmt: skip
DETERMINISTIC = (
    "import sys, torch; torch.use_deterministic_algorithms(True, warn_only=True); from rapm.cli import main; "
    "sys.exit(main(sys.argv[1:]))"
)


class Watched(Training):
    """A training that notes, after each iteration, the time and what the process holds; SIGTERM to itself at `end`."""

    def __init__(self, *args: object, end: float) -> None:
        """`end`: of time.perf_counter; the rest is Training's."""
        super().__init__(*args)
        self.end, self.notes = end, array("d")  # of which 20,000 iterations are less than a megabyte

    def iterate(self) -> None:
        super().iterate()
        now, cuda = time.perf_counter(), self.step.z.is_cuda
        gpu = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if cuda else (0, 0)
        self.notes.extend((now, *(x / 2**20 for x in (*gpu, resident())), len(os.listdir("/proc/self/fd"))))
        if now > self.end:
            self.end = math.inf
            os.kill(os.getpid(), signal.SIGTERM)


def resident() -> int:
    """Bytes of the host's memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def windows(done: int) -> tuple[range, range]:
    """The first and the last iterations that are compared; the warm-up is over before the first."""
    warm = min(WARM, done // 5)
    size = min(WINDOW, (done - warm) // 2)
    return range(warm, warm + size), range(done - size, done)


def least(config: Config) -> int:
    """The fewest iterations whose windows have a stretch to time."""
    return 5 * config.log_steps


def figures(notes: list[tuple[float, ...]], window: range, interval: int) -> dict[str, float]:
    """Medians over a window of iterations; `interval`: iterations of a stretch that is timed."""
    columns = list(zip(*(notes[i] for i in window), strict=True))
    stretches = [(notes[i][0] - notes[i - interval][0]) / interval for i in window[interval::interval]]
    held = dict(zip(MEMORY, map(statistics.median, columns[1:4]), strict=True))
    return {"iteration_ms": 1e3 * statistics.median(stretches), **held, "handles": max(columns[4])}


def missing(folder: Path, config: Config, done: int) -> list[str]:
    """What a run of `done` iterations should have left in `folder` and has not."""

    def due(every: int, *more: int) -> list[int]:
        return sorted({*range(every, done + 1, every), *more})

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [done] if done == config.max_train_steps else []
    found = []
    for name, key, expected in (
        ("losses", "loss", due(config.log_steps, done)),
        ("validations", "val_rmse", due(config.validation_steps, *last)),
    ):
        if [line["iteration"] for line in lines if key in line] != expected:
            found.append(f"{name}: not those of {len(expected)} iterations")
    if not all(math.isfinite(line[key]) for line in lines for key in line if key not in ("iteration", "warning")):
        found.append("metrics: not finite")
    kept = [f"checkpoint-{i}" for i in due(config.checkpointing_steps, done)[-config.checkpoints_total_limit :]]
    if [path.name for path in checkpoints(folder)] != kept:
        found.append(f"checkpoints: not {', '.join(kept)}")
    for path in checkpoints(folder):
        state, _ = load_checkpoint(path, config)
        found += [f"{path.name}: {name} is not finite" for name, x in state.items() if not torch.isfinite(x).all()]
    pictures = [int(path.stem) for path in sorted((folder / "samples").glob("*.png"))]
    if pictures != due(config.validation_steps, *last):
        found.append("samples: not one for each validation")
    return found


def soak(config: Config, end: float) -> dict:
    """The run, until its end or `end` (of time.perf_counter), and what is told of it."""
    teacher, config, prompts, budget = prepare_run(config)
    training = Watched(teacher, solve_all(config, teacher, prompts), config, budget, end=end)
    folder = Path(config.output_dir)
    (folder / "config.toml").write_text(config.to_toml())  # of which a stopped run's report tells
    start = time.perf_counter()
    try:
        run(training, folder)
    except Interrupted as stop:
        print(f"soak: {stop}")
    seconds, done, interval = time.perf_counter() - start, training.done, config.log_steps
    if done < least(config):
        raise SystemExit(f"soak: only {done} iterations in {seconds:.0f} s: too few to compare")
    notes = [tuple(training.notes[i : i + 5]) for i in range(0, len(training.notes), 5)]
    first, last = (figures(notes, window, interval) for window in windows(done))
    growth = {name: last[name] - first[name] for name in MEMORY}
    found = {
        "iterations": done, "wanted": config.max_train_steps, "slots": done * config.steps, "seconds": seconds,
        "precision": config.mixed_precision, "warm": windows(done)[0].start, "window": len(windows(done)[0]),
        "first": first, "last": last, "growth_mib": growth, "handles": int(last["handles"] - first["handles"]),
        "drift": last["iteration_ms"] / first["iteration_ms"] - 1, "skipped": int(training.step.skipped),
        "missing": missing(folder, config, done),
    }  # fmt: skip
    flat = max(growth.values()) <= GROWTH_MIB and found["handles"] <= HANDLES and found["drift"] < DRIFT
    return {**found, "flat": flat, "bounds": {"mib": GROWTH_MIB, "handles": HANDLES, "drift": DRIFT}}


def lora(config: Config, deterministic: bool) -> dict[str, torch.Tensor]:
    """The LoRA file of a run in a process of its own. SystemExit if that fails."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    (folder.parent / "settings.toml").write_text(config.to_toml())
    start = ["-c", DETERMINISTIC, "train"] if deterministic else ["-m", "rapm.train"]
    command = [sys.executable, *start, "--config", str(folder.parent / "settings.toml")]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else None
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"soak: {folder.name} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return load_file(folder / WEIGHTS)


def same_bits(config: Config, place: Path) -> dict:
    """Two runs of the same settings as they come, and two with PyTorch's deterministic algorithms."""
    report: dict = {"iterations": config.max_train_steps, "precision": config.mixed_precision}
    for name in ("default", "deterministic"):
        runs = [config.replace(output_dir=str(place / f"{name}-{i}")) for i in (1, 2)]
        one, two = (lora(run, name == "deterministic") for run in runs)
        assert one.keys() == two.keys() and any(x.abs().max() > 0 for k, x in one.items() if "lora_up" in k)
        different = [key for key in one if not torch.equal(one[key], two[key])]
        largest = max(float((one[key] - two[key]).abs().max()) for key in one)
        report[name] = {"same": not different, "different": len(different), "of": len(one), "largest": largest}
        print(f"{name}: {len(different)} of {len(one)} tensors differ, by {largest:.1e} at the most", flush=True)
    return report


def told(found: dict) -> str:
    first, last = found["first"], found["last"]
    lines = [
        f"{found['iterations']} of {found['wanted']} iterations, {found['slots']} slots in {found['seconds']:.0f} s"
    ]
    lines += [f"  {name:14} {first[name]:10.2f} -> {last[name]:10.2f}" for name in first]
    lines.append(f"  drift {found['drift']:+.2%}, {found['skipped']} updates skipped, flat: {found['flat']}")
    return "\n".join([*lines, *(f"  missing: {line}" for line in found["missing"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, help="20,000, or 100 for --same_bits")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--limit_s", type=float, default=560, help="seconds after which a soak stops and tells")
    parser.add_argument("--same_bits", action="store_true", help="compare two runs of the same seed instead")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    parser.add_argument("--check", action="store_true", help="in small, on any device, nothing written")
    arguments = parser.parse_args()
    if not arguments.check:
        try:
            need_gpu()
        except UserError as error:
            print(f"soak: {error}", file=sys.stderr)
            return 2
    usual = (2 if arguments.check else 100) if arguments.same_bits else (12 if arguments.check else 20_000)
    config = Config.preset("embedded").replace(
        max_train_steps=arguments.iterations or usual, mixed_precision=arguments.precision, validation_steps=1000,
        checkpointing_steps=1000,
    )  # fmt: skip
    if arguments.check:
        config = config.replace(**CHECK)
    if not arguments.same_bits and config.max_train_steps < least(config):
        print(f"soak: --iterations {config.max_train_steps}: at least {least(config)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        if arguments.same_bits:
            name, found = "same_bits", same_bits(config, Path(place))
            good = found["deterministic"]["same"]
        else:
            name = "soak" if arguments.precision == "no" else arguments.precision
            found = soak(config.replace(output_dir=f"{place}/run"), START + arguments.limit_s)
            good = not found["missing"] and (found["flat"] or arguments.check)
            print(told(found))
    if not arguments.check:
        keep(arguments.output, {"card": card(), name: found}, depth=0)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
