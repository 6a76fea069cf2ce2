"""Does the method work, and which of its terms carry it: many short trainings of the embedded teacher, side by side.

    python benchmarks/quality.py ablation     the method, each term left out, several seeds -> results/ablation.json
    python benchmarks/quality.py search       settings of the discriminators, one seed      -> results/search.json

All runs share one store of trajectories and, on a GPU, the card: each has its own stream and its own captured slot, and
the host hands them their iterations in turn. The search is judged on another draw of captions than the ablation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from rapm.config import Config
from rapm.device import pick_device
from rapm.disk import write_atomic
from rapm.evaluate.embedded import Evaluation, Row, Sampler, table, teacher_samplers
from rapm.train import Training, prepare_run, solve_all

RESULTS = Path(__file__).parent / "results"
NO_HEADS = dict(adversarial_relative=0.0, adversarial_absolute=0.0)
ABLATION = {
    "student": {},
    "without D_rel": dict(adversarial_relative=0.0),
    "without D_abs": dict(adversarial_absolute=0.0),
    "without both": NO_HEADS,
    "without the relative distance": dict(weight_relative=0.0),
    "without the absolute distance": dict(weight_absolute=0.0),
}
# The heads learn while the student hardly hears them: what there is to see for them.
WATCHING = "discriminators that only watch"


def heads(weight: float, **settings: object) -> dict[str, object]:
    return dict(adversarial_relative=weight, adversarial_absolute=weight, **settings)


FAST = dict(head_learning_rate=1e-3)
SEARCH = {
    "no discriminators": NO_HEADS,
    "no discriminators, lr 3e-4": dict(NO_HEADS, learning_rate=3e-4),
    "no discriminators, lr 3e-3": dict(NO_HEADS, learning_rate=3e-3),
    "no discriminators, rank 64": dict(NO_HEADS, lora_rank=64),
    "0.1, renoise 1, head lr 1e-4": heads(0.1, renoise=1.0, head_learning_rate=1e-4),
    "0.1, renoise 1": heads(0.1, renoise=1.0, **FAST),
    "0.1, renoise 0.2": heads(0.1, renoise=0.2, **FAST),
    "0.03, renoise 0.2": heads(0.03, renoise=0.2, **FAST),
    "0.01, renoise 0.2": heads(0.01, renoise=0.2, **FAST),
    "0.03, renoise 0.2, replay 64": heads(0.03, renoise=0.2, replay_size=64, **FAST),
    "0.01, renoise 0.2, replay 64": heads(0.01, renoise=0.2, replay_size=64, **FAST),
    "0.003, renoise 0.2, replay 64": heads(0.003, renoise=0.2, replay_size=64, **FAST),
    "0.01, renoise 0, replay 64": heads(0.01, renoise=0.0, replay_size=64, **FAST),
    "0.01, renoise 1, replay 64": heads(0.01, renoise=1.0, replay_size=64, **FAST),
    "0.01, renoise 0.2, replay 64 x 32": heads(0.01, renoise=0.2, replay_size=64, replay_batch=32, **FAST),
    "0.03, renoise 0.2, replay 64, late": heads(0.03, renoise=0.2, replay_size=64, head_warmup_steps=-2, **FAST),
}


@dataclass
class Run:
    """One training among the others; `curve` holds (iteration, held-out figures)."""

    name: str
    config: Config
    training: Training
    stream: torch.cuda.Stream | None
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    row: Row | None = None


def train_together(runs: list[Run], iterations: int, points: int) -> float:
    """Every run to `iterations`, in turn; seconds. The held-out curve has `points` points."""
    start = time.perf_counter()
    for i in tqdm(range(iterations), desc=f"{len(runs)} runs", mininterval=5):
        for run in runs:
            with torch.cuda.stream(run.stream):  # does nothing where there is no GPU
                run.training.iterate()
                if (i + 1) % max(1, iterations // points) == 0:
                    run.training.losses(1)()
                    run.training.check()  # raises where a run is lost
                    run.curve.append((i + 1, run.training.measure().figures))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(rows: list[Row]) -> dict[str, list[float]]:
    """Mean and standard deviation of every figure over the seeds."""
    numbers = [{k: v for k, v in asdict(row).items() if k != "name"} for row in rows]
    columns = {k: [n[k] for n in numbers] for k in numbers[0]}
    return {k: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for k, v in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["ablation", "search"])
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="of the ablation; the search has one")
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--points", type=int, default=8, help="of the held-out curve")
    parser.add_argument("--only", type=int, default=None, help="the first N variants, to try the script")
    parser.add_argument("--output", type=Path, help="results/ablation.json or search.json")
    arguments = parser.parse_args()
    variants = SEARCH if arguments.what == "search" else {**ABLATION, WATCHING: heads(1e-6)}
    variants = dict(list(variants.items())[: arguments.only])

    with tempfile.TemporaryDirectory() as folder:
        base = Config.preset("embedded").replace(
            fd_samples=0,  # the judge says how far away a student is
            trajectories=arguments.trajectories, max_train_steps=arguments.iterations, solve_batch=256,
            validation_prompts=32, output_dir=folder, report_to="none",
        )  # fmt: skip
        if arguments.what == "search":
            base = base.replace(learning_rate=1e-3)  # high: what helps shows sooner
        teacher, base, prompts, _ = prepare_run(base)
        start = time.perf_counter()
        store = solve_all(base, teacher, prompts)
        solving = time.perf_counter() - start
        cuda = pick_device(base).type == "cuda"
        runs = []
        for name, changes in variants.items():
            if changes.get("head_warmup_steps", 0) < 0:  # a share of the run
                changes = {**changes, "head_warmup_steps": arguments.iterations // -changes["head_warmup_steps"]}
            for seed in range(arguments.seeds if name in ABLATION else 1):
                # The seed of the student: the trajectories stay those of the shared store.
                config = base.replace(**changes, seed=seed)
                stream = torch.cuda.Stream() if cuda else None
                runs.append(Run(name, config, Training(teacher, store, config), stream))
        if cuda:
            torch.cuda.synchronize()  # what was made on the default stream is there for all
        seconds = train_together(runs, arguments.iterations, arguments.points)
        evaluation = Evaluation(
            teacher, reference_steps=base.steps * base.fine_steps, guidance=base.guidance, pairs=arguments.pairs,
            seed=1 if arguments.what == "ablation" else 1001,
        )  # fmt: skip
        rows = [evaluation.floor, *map(evaluation.row, teacher_samplers(base.guidance, base.steps))]
        for run in tqdm(runs, desc="evaluate"):
            run.row = evaluation.row(Sampler(run.name, base.steps, lora=run.training.lora.export()))
        if arguments.what == "ablation":
            lora = runs[0].training.lora.export()
            rows += [evaluation.row(Sampler(f"student, {n} steps", n, lora=lora)) for n in (1, 2, 8)]

    print(table([*rows, *(run.row for run in runs)]))
    for run in runs:
        last = run.curve[-1][1]
        print(f"{run.name:45} held-out hinge rel {last['val_disc_rel']:.3f} abs {last['val_disc_abs']:.3f}")
    report = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "iterations": arguments.iterations,
        "trajectories": arguments.trajectories,
        "pairs": arguments.pairs,
        "seconds_solving": solving,
        "seconds_training_together": seconds,
        "settings": {k: v for k, v in asdict(base).items() if k not in ("output_dir", "store")},
        "reference": [asdict(row) for row in rows],
        "runs": [
            {"name": r.name, "seed": r.config.seed, **variants[r.name], "row": asdict(r.row), "curve": r.curve}
            for r in runs
        ],
        "summary": {name: spread([r.row for r in runs if r.name == name]) for name in variants},
    }
    output = arguments.output or RESULTS / f"{arguments.what}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, f"{json.dumps(report, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
