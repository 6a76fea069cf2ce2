"""One RAPM iteration, beside what others would write: python benchmarks/step.py (needs a GPU) -> results/step.json.

SD1.5 at 512x512 and SDXL at 1024x1024 (random weights, bf16, LoRA rank 1), and the embedded teacher's size (its own
settings, fp32): batch 1, seconds for an iteration of 4 slots with the load of the next trajectory, the median of 10.
Providers, each in a process of its own, so that nobody's memory counts for another:

    naive     peers.Naive: eager diffusers and peft under autocast, features for each discriminator and each update
    stock     peers.Stock: shared features, one forward for both updates, the whole slot as one CUDA graph
    compile   stock, with diffusers' regional torch.compile, if that compiles within 8 minutes
    rapm      rapm.step, captured, everything kept for backward
    lean      the same, but that outputs of norms and GEGLUs are computed again (rapm/memory/saved.py)

First all of them must compute the same losses, in fp32 on small UNets of each family that is timed, over slots that
update: whoever does not is named, and nothing is timed. Another call's models stay in the file, and its providers if
card, driver and libraries are the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peers import Naive, Peer, Stock, stock_unet
from slot_time import SCHEDULE, make_step, random_trajectory, random_unet
from torch.utils.flop_counter import FlopCounterMode

from rapm.bench.measure import card, kernel_mode, limits, measuring, need_gpu
from rapm.bench.results import keep
from rapm.bench.shapes import MODELS, Model, example_text
from rapm.config import Config
from rapm.errors import UserError
from rapm.finite import LOSSES
from rapm.graph import captured
from rapm.kernels.renoise import renoise_ref
from rapm.memory.saved import Memory, Policy
from rapm.schedule import Schedule
from rapm.step import SlotMemory, Step
from rapm.store import Trajectory
from rapm.unet import UNet
from rapm.zoo import EMBEDDED

ROOT = Path(__file__).parents[1]
PROVIDERS = ("naive", "stock", "compile", "rapm", "lean")
OURS = ("rapm", "lean")
ITERATIONS, WARM = 10, 2
COMPILE_LIMIT = 480  # seconds
CHANNELS_LAST = ("sd15",)  # where it makes the stock slot faster: 63.2 ms against 71.7; SDXL 230.4 against 226.6
# The families in small. Widths are multiples of 32, so that GroupNorm has its 32 groups.
SMALL = {
    "sd15": dict(
        block_out_channels=(32, 64, 64), layers_per_block=1, attention_head_dim=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "sdxl": dict(
        block_out_channels=(32, 64, 64), layers_per_block=1, attention_head_dim=(2, 4, 4), cross_attention_dim=32,
        transformer_layers_per_block=(1, 1, 2), addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    ),
}  # fmt: skip
# A LeakyReLU that crosses zero moves a gradient at once.
BOUNDS = {name: 5e-2 if name.endswith("grad_norm") else 1e-3 for name in LOSSES}


def model_of(name: str) -> Model:
    """A UNet's config and the side of its latents."""
    if name != "embedded":
        return MODELS[name]
    config = json.loads((EMBEDDED / "unet" / "config.json").read_text())
    return Model(config, config["sample_size"])


def config_of(name: str) -> Config:
    config = Config.preset(name)
    return config if name == "embedded" else config.replace(lora_rank=1)


def make(name: str, unet: UNet, config: Config, trajectory: Trajectory, **options: object) -> Step | Peer:
    """A provider's slot, before any capture."""
    if name in OURS:
        step = make_step(unet, config, trajectory)
        policies = dict.fromkeys(unet.layers(), Policy("lean")) if name == "lean" else {}
        step.memory = SlotMemory(Memory(policies), beside=True)
        return step
    schedule = Schedule.from_config(SCHEDULE)
    kind = Naive if name == "naive" else Stock
    return kind(stock_unet(unet.config, unet.state_dict()), config, schedule, trajectory, **options)


# The same losses


def same_noise(key: torch.Tensor) -> Callable[[Peer], tuple[torch.Tensor, ...]]:
    """A peer's `draw` that gives it rapm's own numbers."""

    def draw(peer: Peer) -> tuple[torch.Tensor, ...]:
        slots, zero = peer.slots, torch.zeros_like(peer.z)
        tables = slots.low, slots.high, slots.renoise, peer.slot, key
        noises, u, keep = renoise_ref(zero, zero, zero, *tables, peer.config.renoise, torch.float32)
        key[1] += 1
        return noises, u, keep

    return draw


def losses(name: str, unet: UNet, config: Config, trajectory: Trajectory, slots: int) -> torch.Tensor:
    """LOSSES of `slots` slots, a row each, from weights that are the same for every provider."""
    torch.manual_seed(0)
    start = make("rapm", unet, config, trajectory)
    start.lora.flat.data.normal_(0, 0.05)  # a LoRA that matters from the first slot on
    if name in OURS:
        step = start if name == "rapm" else make(name, unet, config, trajectory)
        step.lora.flat.data.copy_(start.lora.flat.data)
        step.load(trajectory, 0)
    else:
        step = make(name, unet, config, trajectory, draw=same_noise(torch.tensor([config.seed, 0], device=unet.device)))
        step.copy_weights(start.lora.export(), start.discriminators)
    rows = []
    for _ in range(slots):
        step.sums.zero_()
        step()
        rows.append(step.sums.clone())
    return torch.stack(rows)


@contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 as it is: by default cuDNN's convolutions round to TF32, by as much as the bounds."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@without_tf32()
def check(device: str, families: Collection[str] = tuple(SMALL), slots: int = 3) -> None:
    """SystemExit unless all providers compute the same losses on small UNets of `families`."""
    for family, changes in SMALL.items():
        if family not in families:
            continue
        torch.manual_seed(0)
        unet = UNet(MODELS[family].unet | changes)
        unet = unet.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
        # Fast, so that an update that is left out moves a loss by more than its bound
        config = Config(lora_rank=2, fine_steps=2, learning_rate=1e-2, head_learning_rate=1e-2)
        trajectory = random_trajectory(unet, config, 8)
        ours = losses("rapm", unet, config, trajectory, slots)
        for name in ("naive", "stock", "lean"):
            theirs = losses(name, unet, config, trajectory, slots)
            for i, (loss, bound) in enumerate(BOUNDS.items()):
                difference = float((theirs[:, i] / ours[:, i] - 1).abs().max())
                if not difference <= bound:
                    raise SystemExit(f"step: {family} {name}: {loss} differs by {difference:.1e}: nothing is timed")


# Time


def pass_tflop(name: str) -> tuple[float, float]:
    """Of one forward's products: the UNet's, and those of its encoder and mid block."""
    config, side = model_of(name)
    with torch.device("meta"), torch.no_grad(), kernel_mode("reference"):
        unet = UNet(config).to(torch.bfloat16)
        z, t = torch.empty(1, 4, side, side), torch.empty((), dtype=torch.long)
        text, counts = example_text(unet.config, side, "meta"), []
        for run in (unet, unet.features):
            with FlopCounterMode(display=False) as counter:
                run(z, t, text)
            counts.append(counter.get_total_flops() * 1e-12)
    return counts[0], counts[1]


def tflop(name: str) -> float:
    """Of an iteration: N times 3 UNet passes (a backward counts as one) and 4 of its encoder."""
    whole, encoder = pass_tflop(name)
    return config_of(name).steps * (3 * whole + 4 * encoder)


def measure(model: str, provider: str) -> dict:
    """Seconds an iteration, memory, and the seconds before the first iteration was done."""
    config, side = config_of(model), model_of(model).side
    unet = random_unet(model_of(model).unet, "cuda", torch.float32 if model == "embedded" else torch.bfloat16)
    if provider == "naive" or (provider not in OURS and model not in CHANNELS_LAST):
        unet = unet.to(memory_format=torch.contiguous_format)
    trajectory = random_trajectory(unet, config, side)
    pinned = trajectory._replace(
        positions=trajectory.positions.pin_memory(), fine=trajectory.fine.pin_memory(),
        text=type(trajectory.text)(*(None if x is None else x.pin_memory() for x in trajectory.text)),
    )  # fmt: skip
    start = time.perf_counter()
    step = make(provider, unet, config, trajectory)
    gc.collect()
    if provider == "compile":
        torch._dynamo.config.recompile_limit = 64  # with and without the adapter, batch 1 and 2, with and without grad
        step.unet.compile_repeated_blocks(dynamic=False)

    def load(i: int) -> None:
        step.load(pinned, i) if provider in OURS else step.load(pinned)

    load(0)
    step()
    slot = step if provider == "naive" else step.captured() if provider in OURS else captured(step)
    times = []
    for i in range(WARM + ITERATIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        load(i)
        for _ in range(config.steps):
            slot()
        end.record()
        end.synchronize()
        if i == 0:
            ready = time.perf_counter() - start
        times.append(begin.elapsed_time(end) * 1e-3)
    if not torch.isfinite(step.sums).all():
        raise SystemExit(f"step: {model} {provider}: not finite: what was timed is not a training")
    times, mib = times[WARM:], 2**-20
    free, total = torch.cuda.mem_get_info()
    return {
        "seconds": statistics.median(times), "fastest": min(times), "slowest": max(times), "ready_seconds": ready,
        "allocated_mib": torch.cuda.max_memory_allocated() * mib,
        "reserved_mib": torch.cuda.max_memory_reserved() * mib,
        "device_mib": (total - free) * mib, "beside": provider in OURS and step.memory.beside,
    }  # fmt: skip


def alone(command: list[str], limit: int) -> dict:
    """What a case says that runs in a process of its own, for at most `limit` seconds; what went wrong in its place."""
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {limit} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "embedded"], default=[*MODELS, "embedded"])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "step.json")
    parser.add_argument("--check", action="store_true", help="only the check, on whatever device there is")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        check("cuda" if torch.cuda.is_available() else "cpu")
        print("step: the same losses from all")
        return
    try:
        need_gpu()
    except UserError as error:
        print(f"step: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.one:
        torch.manual_seed(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            print(json.dumps(measure(*arguments.one)))
        return
    check("cuda", {"sdxl" if model == "sdxl" else "sd15" for model in arguments.models})
    with measuring():
        limit = limits()
    report: dict = {"models": {}}
    for model in arguments.models:
        rows = report["models"][model] = {"card": card(), "limits": limit, "tflop": tflop(model)}
        for provider in arguments.providers:
            rows[provider] = found = alone([__file__, "--one", model, provider], COMPILE_LIMIT)
            keep(arguments.output, report, depth=2, same=())
            if "failed" in found:
                print(f"{model} {provider}: {found['failed']}")
                continue
            share = rows["tflop"] / limit["bf16_tflops"] / found["seconds"]
            memory = f"{found['allocated_mib']:.0f} MiB allocated, {found['reserved_mib']:.0f} reserved"
            print(f"{model} {provider}: {found['seconds']:.4f} s, {share:.0%} of the limit, {memory}", flush=True)


if __name__ == "__main__":
    main()
