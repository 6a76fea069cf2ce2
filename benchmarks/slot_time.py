"""Where the GPU time of one training slot goes, by family of kernels: python benchmarks/slot_time.py (needs a GPU).

SD1.5 at 512x512 and SDXL at 1024x1024, batch 1, bf16, LoRA rank 1: the whole slot as one CUDA graph of one stream,
before (plain PyTorch, RAPM_KERNELS=reference) and after (auto) -> results/slot_time.json. Training has a second stream
besides. The weights are random: times are real, losses mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from rapm.bench.measure import card, kernel_mode, need_gpu
from rapm.bench.results import keep
from rapm.bench.shapes import MODELS, example_text
from rapm.config import Config
from rapm.errors import UserError
from rapm.lora import LoRA
from rapm.memory.low_precision import low_precision, set_weight
from rapm.schedule import Schedule
from rapm.step import Step
from rapm.store import Trajectory
from rapm.unet import UNet

ROOT = Path(__file__).parents[1]
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
MODES = {"before": "reference", "after": "auto"}
# The family of a kernel is the first of these that its name contains, in small letters. Names say little about purpose,
# but a rank-1 LoRA is all vector products, and hardly anything else is; fp32 products are the discriminators' heads'.
FAMILIES = (
    ("layout", ("nchwtonhwc", "nhwctonchw", "transpose", "tensortransform", "permute", "addpadding", "converttensor")),
    ("attention", ("flash", "fmha", "sdpa", "attention", "softmax", "compute_dot_do_o", "convert_dq")),
    ("heads", ("tf32", "s1688", "sgemm", "leaky_relu", "f32f32_f32f32_f32")),
    ("lora", ("gemv", "gemmk1", "gemmsn", "dot_kernel", "reduce_1block")),
    ("norm", ("groupnorm", "group_norm", "layernorm", "layer_norm", "rowwisemoments", "fusedparams", "gammabeta",
              "internalgradients")),
    ("optimizer", ("multi_tensor", "fusedadam", "fused_adam", "fusedoptimizer")),
    ("conv", ("fprop", "dgrad", "wgrad", "convolve", "conv2d", "winograd", "im2col", "implicit", "cudnn")),
    ("gemm", ("gemm", "nvjet", "splitk", "cutlass", "cublas", "xmma")),
    ("copy", ("direct_copy", "copy_kernel", "memcpy", "memset", "catarray", "fillfunctor", "gather", "index",
              "scatter")),
    ("elementwise", ("elementwise", "reduce_kernel", "upsample", "triton_")),
)  # fmt: skip
# What the kernels of a file of kernels/ replace, by the first of these that its name begins with; the report lists them
# one by one besides.
REPLACES = {
    "group_norm": "norm", "layer_norm": "norm", "geglu_linear": "gemm", "geglu": "elementwise",
    "attention": "attention", "frozen": "conv", "lora": "lora", "low_rank": "lora",
    "disc_head": "heads", "position": "elementwise", "renoise": "elementwise", "guided": "elementwise",
    "int8": "gemm", "dequantise": "copy", "short": "attention",
}  # fmt: skip
PROFILED = 2  # slots; all are the same graph
OTHER_LIMIT = 0.03  # a larger share of `other` means that the table above is out of date


def own_kernels() -> dict[str, str]:
    """Triton kernel's name -> file of kernels/."""
    files = (ROOT / "kernels").glob("*.py")
    return {name: file.stem for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M)}


def classify(name: str, own: dict[str, str]) -> str:
    """The family of a GPU kernel; "other" for one that the table does not know."""
    if name in own:
        return next((family for file, family in REPLACES.items() if own[name].startswith(file)), "other")
    name = name.lower()
    return next((family for family, words in FAMILIES if any(word in name for word in words)), "other")


def random_unet(config: Mapping, device: str, dtype: torch.dtype = torch.bfloat16, mode: str = "full") -> UNet:
    """A frozen UNet: normal weights of deviation 0.02, the same in every `mode` of low_precision."""
    with torch.device("meta"):
        unet = UNet(config).to(dtype)
    shapes = {name: x.shape for name, x in unet.named_parameters()}
    low_precision(unet, mode).requires_grad_(False).eval().lay(device)
    for name, shape in shapes.items():
        x = torch.empty(shape, dtype=dtype, device=device)
        # Of a norm: 1; a bias: 0
        set_weight(unet, name, x.normal_(0, 0.02) if x.dim() > 1 else x.fill_(name.endswith(".weight")))
    if device == "cuda":
        torch.cuda.synchronize()  # other streams will read it
    return unet


def random_trajectory(unet: UNet, config: Config, side: int) -> Trajectory:
    """Of latents of `side`."""
    positions, fine = (torch.randn(n, 4, side, side) for n in (config.steps + 1, config.steps))
    return Trajectory(positions, fine, example_text(unet.config, side, "cpu"), "", 0)


def make_step(unet: UNet, config: Config, trajectory: Trajectory) -> Step:
    """rapm's own slot."""
    lora, schedule = LoRA(unet, config.lora_rank), Schedule.from_config(SCHEDULE)
    return Step(unet, lora, schedule, config, trajectory, trajectory.text)


def gpu_kernels(call: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and milliseconds of every kernel, copy and fill that `call` has the GPU do."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    events = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()]
    return [(e.name(), e.duration_ns() * 1e-6) for e in events]


def measure(unet: UNet, model: str, iterations: int = 5) -> dict:
    """One slot as a CUDA graph: GPU milliseconds, launches and milliseconds by family."""
    config = Config.preset(model).replace(lora_rank=1)
    trajectory = random_trajectory(unet, config, MODELS[model].side)
    step = make_step(unet, config, trajectory)
    reset = partial(step.load, trajectory, 0)
    reset()
    step()  # eager: every kernel and workspace must have been used once
    slot, slots = step.captured(), step.config.steps

    def iteration() -> None:
        for _ in range(slots):
            slot()

    times = []
    for _ in range(iterations):
        reset()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        iteration()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / slots)
    reset()
    kernels = gpu_kernels(lambda: [slot() for _ in range(PROFILED)])
    if float(step.skipped) or not torch.isfinite(step.sums).all():
        raise SystemExit(f"{model}: {float(step.skipped):.0f} slots were not finite: what was timed is not a training")
    return {
        "gpu_ms": statistics.median(times),
        **summary([(name, ms / PROFILED) for name, ms in kernels], len(kernels) // PROFILED),
    }


def summary(kernels: list[tuple[str, float]], launches: int) -> dict:
    """Milliseconds by family, of each kernel of ours, and of the largest that no family knows."""
    own = own_kernels()
    ms = Counter()
    for name, value in kernels:
        ms[name] += value
    families = Counter({family: 0.0 for family, _ in FAMILIES})
    for name, value in ms.items():
        families[classify(name, own)] += value
    unknown = [(name, value) for name, value in ms.most_common() if classify(name, own) == "other"]
    return {
        "kernel_ms": sum(ms.values()),
        "launches": launches,
        "families": dict(families),
        "ours": {name: value for name, value in ms.most_common() if name in own},
        "largest": [[name[:160], value] for name, value in ms.most_common(30)],
        "unclassified": [[name[:160], value] for name, value in unknown[:10]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "slot_time.json")
    arguments = parser.parse_args()
    try:
        need_gpu()
    except UserError as error:
        print(f"slot_time: {error}", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(0)
    report: dict = {"card": card(), "models": {}}
    for model in arguments.models:
        unet, modes = random_unet(MODELS[model].unet, "cuda"), report["models"].setdefault(model, {})
        for name in arguments.modes:
            with kernel_mode(MODES[name]), torch.cuda.stream(torch.cuda.Stream()):
                modes[name] = found = measure(unet, model)
            keep(arguments.output, report, depth=2)
            gc.collect()
            torch.cuda.empty_cache()
            families = ", ".join(f"{k} {v:.1f}" for k, v in Counter(found["families"]).most_common())
            print(f"{model} {name}: {found['gpu_ms']:.1f} ms, {found['launches']} launches: {families}")
            if found["families"].get("other", 0) > OTHER_LIMIT * found["kernel_ms"]:
                print("  unclassified:", *(f"{v:.3f} ms {k}" for k, v in found["unclassified"]), sep="\n    ")
        del unet
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
