"""What frozen weights in int8 and nf4 cost and save: python benchmarks/low_precision.py -> results/low_precision.json.

On a GPU, in some three minutes:
1. slots: SD1.5 at 512x512 and SDXL at 1024x1024, random weights, bf16, batch 1, LoRA rank 1: seconds of an iteration of
   4 captured slots, and memory, by mode; beside it how far the position after one slot, the network's output and the
   LoRA's gradient are from those of fp32 and of bf16.
2. products: the forward of one frozen linear layer by cuBLAS in bf16, by our int8, and by what else there is: PyTorch's
   int8 product (torch._int_mm, whose integers are rescaled beside it) and fp8 (torch._scaled_mm, a scale for each row),
   with the same rounding kernel's time in it; errors on normal numbers, and on such with outliers.
3. quality: the embedded teacher distilled under every mode, each with trajectories of its own; all judged on the fp32
   teacher, where their LoRAs are used.

`--check` does the same on any device with small models, times nothing and writes nothing. A result that is off ends the
script before anything is told.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from quality import Run, spread, train_together
from slot_time import make_step, random_trajectory, random_unet
from step import SMALL
from torch import Tensor

from rapm.bench.measure import card, graph_ms, need_gpu
from rapm.bench.results import keep
from rapm.bench.shapes import MODELS
from rapm.config import Config
from rapm.errors import UserError
from rapm.evaluate.embedded import Evaluation, Sampler, table, teacher_samplers
from rapm.kernels.dequantise import int8
from rapm.kernels.guided_step import guided_step
from rapm.kernels.int8_linear import int8_linear, quantise_rows
from rapm.losses import pseudo_huber
from rapm.memory.cards import MIB
from rapm.memory.low_precision import MODES
from rapm.step import Step
from rapm.teacher import load_teacher
from rapm.train import Training, prepare_run, solve_all
from rapm.unet import UNet

OUTPUT = Path(__file__).parent / "results" / "low_precision.json"
# Of the network's output against fp32: beyond, what is timed is not the layer. int8 is off by 1% a layer, nf4 by 9%.
LIMITS = {"full": 0.1, "int8": 0.2, "nf4": 0.7}
SHAPES = ((1024, 1280, 1280), (1024, 1280, 10240), (1024, 5120, 1280), (4096, 640, 640), (4096, 640, 5120))  # M K N
OURS = "bf16", "int8"
ITERATIONS = 5  # timed
QUALITY = {"fp32": ("no", "full"), "bf16": ("bf16", "full"), "int8": ("bf16", "int8"), "nf4": ("bf16", "nf4")}


def refuse(what: str) -> None:
    raise SystemExit(f"low_precision: {what}: nothing is told")


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# 1. Slots


def new_step(unet: UNet, name: str, side: int) -> tuple[Step, object]:
    """A step with a LoRA that does something, and its trajectory; the same numbers for every mode."""
    torch.manual_seed(1)
    config = Config.preset(name).replace(lora_rank=1)
    trajectory = random_trajectory(unet, config, side)
    step = make_step(unet, config, trajectory)
    with torch.no_grad():
        step.lora.flat.copy_(0.01 * torch.randn(step.lora.flat.shape))
    step.load(trajectory, 0)
    return step, trajectory


def one_slot(unet: UNet, name: str, side: int) -> dict[str, Tensor]:
    """Output, position and the LoRA's gradient (of the distance to the teacher's position) of the first slot."""
    step, _ = new_step(unet, name, side)
    out = step.student(step.z, step.text, step.lora.views(unet.dtype))
    position = guided_step(step.z, out, step.slots.step[step.slot][0])
    loss = pseudo_huber(position, step.positions[step.slot + 1], step.config.huber_c)
    (gradient,) = torch.autograd.grad(loss, step.lora.flat)
    return {"output": out.detach().cpu(), "position": position.detach().cpu(), "gradient": gradient.cpu()}


def seconds(unet: UNet, name: str, side: int) -> dict[str, float]:
    """Of a captured iteration, and the memory with the UNet's own."""
    step, trajectory = new_step(unet, name, side)
    step()
    slot, times = step.captured(), []
    for _ in range(ITERATIONS):
        step.load(trajectory, 0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(step.config.steps):
            slot()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if float(step.skipped):
        refuse(f"{name}: {float(step.skipped):.0f} slots were not finite")
    return {
        "seconds": statistics.median(times), "allocated_mib": torch.cuda.max_memory_allocated() / MIB,
        "reserved_mib": torch.cuda.max_memory_reserved() / MIB,
    }  # fmt: skip


def slots(name: str, check: bool) -> dict[str, dict]:
    """Every mode of one model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, side = MODELS[name]
    if check:
        config, side = {**config, **SMALL[name]}, 16
    torch.manual_seed(0)
    whole = random_unet(config, device)
    exact, half = (one_slot(unet, name, side) for unet in (copy.deepcopy(whole).float().join(), whole))
    rows = {}
    for mode in MODES:
        torch.manual_seed(0)
        unet = random_unet(config, device, mode=mode)
        if mode == MODES[-1]:
            del whole
        found = one_slot(unet, name, side)
        row = {"weights_mib": sum(p.nbytes for p in unet.parameters()) / MIB}
        row["to_fp32"] = {key: distance(x, exact[key]) for key, x in found.items()}
        row["to_bf16"] = {key: distance(x, half[key]) for key, x in found.items()}
        if not row["to_fp32"]["output"] <= LIMITS[mode]:
            refuse(f"{name} {mode}: the output is off by {row['to_fp32']['output']:.2e}")
        if rows and not row["weights_mib"] < min(r["weights_mib"] for r in rows.values()):
            refuse(f"{name} {mode}: the weights take no less memory")
        rows[mode] = row
        del unet
    for mode in MODES if device == "cuda" and not check else ():  # without the others' weights
        clean()
        torch.manual_seed(0)
        unet = random_unet(config, device, mode=mode)
        clean()
        rows[mode] |= seconds(unet, name, side)
        del unet
    clean()
    return rows


# 2. Products


def providers(weight: Tensor) -> dict:
    """Callables of x (M K) for its product with the weight (N K)."""
    codes, scale, _ = int8(weight)
    found = {"bf16": lambda x: F.linear(x, weight), "int8": lambda x: int8_linear(x, codes, scale, None)}
    if weight.is_cuda:

        def int_mm(x: Tensor) -> Tensor:
            rounded, s = quantise_rows(x)
            return (torch._int_mm(rounded, codes.t()) * s[:, None] * scale).to(x.dtype)

        found["torch._int_mm"] = int_mm
        if torch.cuda.get_device_capability() >= (8, 9):
            most = torch.finfo(torch.float8_e4m3fn).max
            steps = weight.float().abs().amax(1, keepdim=True) / most
            w8 = (weight.float() / steps).to(torch.float8_e4m3fn)

            def fp8(x: Tensor) -> Tensor:
                s = x.float().abs().amax(1, keepdim=True) / most
                x8 = (x.float() / s).to(torch.float8_e4m3fn)
                return torch._scaled_mm(x8, w8.t(), scale_a=s, scale_b=steps.t(), out_dtype=x.dtype)

            found["fp8"] = torch.compile(fp8, dynamic=False)  # which makes one kernel of the rounding
    return found


@torch.no_grad()
def product(run: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, outliers: Tensor, timed: bool) -> dict:
    """Errors on both inputs, and milliseconds of a call."""
    errors = [distance(run(y), y.double() @ weight.double().t()) for y in (x, outliers)]
    if not max(errors) < 0.2:
        refuse(f"a product with {tuple(weight.shape)} is off by {max(errors):.1e}")
    found = {"error": errors[0], "error_outliers": errors[1]}
    return {**found, "ms": graph_ms([partial(run, x.clone()) for _ in range(4)])[0]} if timed else found


def products(check: bool) -> list[dict]:
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    for m, k, n in ((64, 128, 64),) if check else SHAPES:
        torch.manual_seed(0)
        weight = (torch.randn(n, k, device=device) * k**-0.5).bfloat16()
        x = torch.randn(m, k, device=device).bfloat16()
        outliers = x.clone()
        outliers[:, :: k // 8] *= 20  # eight channels, as some layers have them
        row: dict = {"m": m, "k": k, "n": n, "providers": {}}
        for name, run in providers(weight).items():
            try:
                row["providers"][name] = product(run, weight, x, outliers, timed=device == "cuda" and not check)
            except RuntimeError as error:
                if name in OURS:
                    raise
                row["providers"][name] = {"failed": str(error).splitlines()[0][:200]}
        rows.append(row)
    return rows


# 3. Quality


def quality(iterations: int, trajectories: int, seeds: int, pairs: int, fine_steps: int = 10) -> dict:
    """Students of every mode on the embedded teacher, judged on its fp32 self."""
    cuda, runs = torch.cuda.is_available(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, (precision, frozen) in QUALITY.items():
            base = Config.preset("embedded").replace(
                fd_samples=0, trajectories=trajectories, max_train_steps=iterations, solve_batch=256,
                validation_prompts=2, output_dir=str(Path(folder) / name), report_to="none",
                mixed_precision=precision, frozen_weights=frozen, fine_steps=fine_steps,
            )  # fmt: skip
            teacher, base, prompts, _ = prepare_run(base)
            store = solve_all(base, teacher, prompts)
            for seed in range(seeds):
                config, stream = base.replace(seed=seed), torch.cuda.Stream() if cuda else None
                runs.append(Run(name, config, Training(teacher, store, config), stream))
        if cuda:
            torch.cuda.synchronize()
        took = train_together(runs, iterations, 1)
        whole = load_teacher("embedded", device=teacher.unet.device, dtype=torch.float32)
        options = dict(reference_steps=base.steps * base.fine_steps, guidance=base.guidance, pairs=pairs)
        evaluation = Evaluation(whole, **options)
        rows = [evaluation.floor, *map(evaluation.row, teacher_samplers(base.guidance, base.steps))]
        for run in runs:
            run.row = evaluation.row(Sampler(run.name, base.steps, lora=run.training.lora.export()))
    for run in runs:
        if not run.row.fd < float("inf") or float(run.training.step.skipped):
            refuse(f"quality {run.name}: FD {run.row.fd}, {float(run.training.step.skipped):.0f} slots skipped")
    print(table([*rows, *(run.row for run in runs)]))
    return {
        "iterations": iterations, "trajectories": trajectories, "seeds": seeds, "pairs": pairs,
        "seconds_training_together": took, "reference": [asdict(row) for row in rows],
        "runs": [{"name": run.name, "seed": run.config.seed, "row": asdict(run.row)} for run in runs],
        "summary": {name: spread([run.row for run in runs if run.name == name]) for name in QUALITY},
    }  # fmt: skip


def told(name: str, rows: dict[str, dict]) -> str:
    lines = []
    for mode, row in rows.items():
        errors = ", ".join(f"{key} {x:.1e} ({row['to_bf16'][key]:.1e})" for key, x in row["to_fp32"].items())
        time_memory = f", {row['seconds']:.3f} s, {row['reserved_mib']:.0f} MiB reserved" if "seconds" in row else ""
        lines.append(f"{name} {mode}: weights {row['weights_mib']:.0f} MiB{time_memory}; off fp32 (bf16): {errors}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["slots", "products", "quality"])
    parser.add_argument("--iterations", type=int, default=1000, help="of a training")
    parser.add_argument("--trajectories", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--check", action="store_true", help="small models, any device, nothing timed or written")
    arguments = parser.parse_args()
    check, parts = arguments.check, arguments.parts or ["slots", "products", "quality"]
    if not check:
        try:
            need_gpu()
        except UserError as error:
            print(f"low_precision: {error}", file=sys.stderr)
            return 2
    report, start, device = {}, time.perf_counter(), {"card": {} if check else card()}

    def note(part: str, **found: object) -> None:
        report[part] = {**device, **found}
        if not check:
            keep(arguments.output, report, depth=2, same=())

    with torch.cuda.stream(torch.cuda.Stream() if torch.cuda.is_available() else None):
        if "slots" in parts:
            found = {}
            for name in MODELS:
                found[name] = slots(name, check)
                note("slots", models=found)
                print(told(name, found[name]), flush=True)
        if "products" in parts:
            note("products", rows=products(check))
            for row in report["products"]["rows"]:
                print(json.dumps(row), flush=True)
        if "quality" in parts:
            few = dict(iterations=2, trajectories=2, seeds=1, pairs=16)
            asked = {key: getattr(arguments, key) for key in few}
            note("quality", **quality(**(dict(few, fine_steps=2) if check else asked)))
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
