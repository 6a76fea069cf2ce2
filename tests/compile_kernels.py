"""Compile every launch that training makes, without a GPU: `python tests/compile_kernels.py 86 90` prints JSON.

The operators' calls are recorded from a training step of real models on the meta device, and their launchers are run
again under a driver that compiles for the given architectures and launches nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch
import triton
from full import SD15, SDXL
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from rapm.kernels import geglu_linear, group_norm_silu, lora_linear, low_rank, runtime
from rapm.kernels.disc_head import disc_head, layout
from rapm.kernels.guided_step import guided_step
from rapm.kernels.position_loss import position_gradient, position_loss
from rapm.kernels.renoise import renoise
from rapm.kernels.short_attention import fits, short_attention
from rapm.memory.low_precision import low_precision
from rapm.memory.saved import Memory, Policy
from rapm.unet import Attention, FeedForward, Text, UNet

Call = tuple[str, tuple]
LOW = ("int8", "nf4")


class Offline:
    """A Triton driver of one architecture and no GPU; the device's number is the architecture, so caches are apart."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Recorded(TorchDispatchMode):
    """The distinct calls of our operators, by name, and the shapes, dtypes and strides of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rapm":
            name = func._schema.name
            full = func._schema.arguments
            values = [*args, *((kwargs or {}).get(a.name, a.default_value) for a in full[len(args) :])]
            self.calls.setdefault(f"{name}{[described(v) for v in values]}", (name, tuple(values)))
        return func(*args, **(kwargs or {}))


def described(value: object) -> object:
    if torch.is_tensor(value):
        return str(value.dtype), tuple(value.shape), value.stride()
    return [described(v) for v in value] if isinstance(value, (list, tuple)) else value


def lora_on(unet: UNet, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA of meta tensors on every target."""
    pairs = {}
    for name, layer in unet.lora_targets().items():
        out, inputs, *kernel = layer.weight.shape
        down = torch.empty(*kernel, rank, inputs, device="meta", dtype=unet.dtype)
        up = torch.empty(out, rank, *(1 for _ in kernel), device="meta", dtype=unet.dtype)
        if kernel:
            down = down.permute(2, 3, 0, 1)
        pairs[name] = (down.requires_grad_(), up.requires_grad_())
    return pairs


def pass_through(config: dict, side: int, dtype: torch.dtype, rank: int, mode: str = "full") -> None:
    """The student's forward and backward, and the encoder with a gradient on its input, of frozen weights in `mode`.

    Under `lean`: all that `keep` calls, and what is made again.
    """
    with torch.device("meta"):
        unet = UNet(config).to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
        low_precision(unet, mode)
        z, t = torch.empty(1, unet.config["in_channels"], side, side), torch.zeros(1)
        length = 77
        hidden = torch.empty(1, length, unet.config["cross_attention_dim"], dtype=dtype)
        text = Text(hidden)
        if unet.config["addition_embed_type"]:
            text = Text(hidden, torch.empty(1, 1280, dtype=dtype), torch.empty(1, 6))
        lean = Memory(dict.fromkeys(unet.layers(), Policy("lean")))
        out = unet(z, t, text, lora_on(unet, rank), lean)
        out.backward(torch.empty_like(out))
        z = z.clone().requires_grad_()
        features = unet.features(z, t, text)
        torch.autograd.backward(features, [torch.empty_like(x) for x in features])


def prompt(config: dict, dtype: torch.dtype) -> None:
    """Attention over a prompt in heads of every width that ours takes: with gradients for all, and for q alone."""
    with torch.device("meta"):
        layers = [m for m in UNet(config).modules() if isinstance(m, Attention)]
        sizes = {(m.heads, m.to_q.out_features // m.heads) for m in layers}
        for heads, width in (size for size in sizes if fits(77, size[1])):
            q, k = (torch.empty(1, n, heads, width, dtype=dtype).transpose(1, 2) for n in (1024, 77))
            for trained in (True, False):
                y = short_attention(q.requires_grad_(), *(k.detach().requires_grad_(trained) for _ in range(2)))
                y.backward(torch.empty_like(y))


def feed_forward(config: dict, dtype: torch.dtype) -> None:
    """The up-projections of a pass without gradient, as one launch with GEGLU."""
    with torch.device("meta"):
        ups = [m.net[0]["proj"] for m in UNet(config).to(dtype).requires_grad_(False).modules()
               if isinstance(m, FeedForward)]  # fmt: skip
        for up in ups:
            geglu_linear.geglu_linear(torch.empty(16, 1024, up.in_features, dtype=dtype), up.weight, up.bias)


def slot(channels: list[int], side: int, dtype: torch.dtype) -> None:
    """What a slot calls beside the UNet."""
    with torch.device("meta"):
        z, out, number = torch.empty(1, 4, side, side), torch.empty(1, 4, side, side, dtype=dtype), torch.empty(1)
        pair, long = torch.empty(2), torch.empty(4, dtype=torch.int64)
        guided_step(z, out, pair)
        guided_step(z, torch.cat([out, out]).requires_grad_(), pair, 7.5).backward(z)
        counter = torch.empty(1, dtype=torch.int32)
        _, _, gradient = position_loss(z, out, pair, z, z, (1.0, 1.0), 1e-3, counter)
        position_gradient(gradient, out, number, number, z, number)
        renoise(z, z, z, long, long, torch.empty(4, 1000, 2), long[:1], long[:2], 1.0, dtype)
        sides = [max(1, side // 2 ** (i + 1)) for i in range(len(channels) - 2)]
        sides += [sides[-1]] * 2
        features = [torch.empty(3, 1, s, s, c, dtype=dtype).permute(0, 1, 4, 2, 3)
                    for c, s in zip(channels, sides, strict=True)]  # fmt: skip
        disc_head(features, torch.empty(2, layout(channels)[1]), (0.1, 0.1))


LIKE_80 = (86, 89)  # the same instructions are used there, so what only dtypes and odd widths change is compiled once


def large_card() -> None:
    """Have launchers cut their work as for a card of 132 processors, where sums are in parts."""
    for kernels in (group_norm_silu, lora_linear, low_rank):
        kernels.processors = lambda device: 132


def recorded(dtypes: bool = True, full: bool = True) -> Iterator[Call]:
    """Operator calls: with `dtypes` of a small model in all three, if `full` of SD1.5, and of SDXL at four ranks."""
    blocks = {"down_block_types": SD15["down_block_types"][1:], "up_block_types": SD15["up_block_types"][:-1]}
    small = {**SD15, **blocks, "block_out_channels": [48, 96, 128], "norm_num_groups": 16, "attention_head_dim": 4}
    ranks = dict(zip(runtime.DTYPES, (64, 1, 64), strict=True)) if dtypes else {}
    runs: list[tuple] = [(small, 96, dtype, rank) for dtype, rank in ranks.items()]  # whose maps are large and small
    if full:
        runs += [(SD15, 64, torch.bfloat16, 1), *((SDXL, 128, torch.bfloat16, rank) for rank in (1, 4, 16, 64))]
    low_ranks = ((torch.float32, 1, 16), (torch.float16, 16, 1)) if dtypes else ()
    low = [(small, 8, dtype, *run) for dtype, *both in low_ranks for run in zip(both, LOW, strict=True)]
    low += [(SDXL, 128, torch.bfloat16, 1, mode) for mode in LOW if full]
    with Recorded() as record:
        for run in low:
            pass_through(*run)
        for config, side, dtype, rank in runs:
            pass_through(config, side, dtype, rank)
            if dtype != torch.float32 and runtime.tensor_cores(torch.device("meta")):  # which these ask for
                prompt(config, dtype)
                feed_forward(config, dtype)
            slot([*config["block_out_channels"], config["block_out_channels"][-1]], side, dtype)
    yield from record.calls.values()


def calls_for(arch: int) -> list[Call]:
    """What that architecture runs: without bf16 before 80."""
    calls = list(recorded(dtypes=arch not in LIKE_80, full=arch >= 80))
    return [call for call in calls if arch >= 80 or "torch.bfloat16" not in str(described(call[1]))]


def main(archs: list[int]) -> None:
    runtime.MODE = "triton"
    shared: dict[str, dict[int, int]] = defaultdict(dict)
    narrow: set[str] = set()
    hopper: set[str] = set()
    uneven: set[str] = set()
    spills: dict[str, int] = defaultdict(int)  # bytes a thread
    count = 0
    triton.knobs.nvidia.dump_ptxas_log = True
    run = triton.runtime.jit.JITFunction.run

    def compiled(self, *args, grid, warmup, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()) as log:  # of what is compiled now, and not found in the cache
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        for stored in re.findall(r"(\d+) bytes spill stores", log.getvalue()):
            spills[self.__name__] = max(int(stored), spills[self.__name__])
        arch = kernel.metadata.target.arch
        shared[self.__name__][arch] = max(kernel.metadata.shared, shared[self.__name__].get(arch, 0))
        if "ld.global.b16" in kernel.asm["ptx"]:  # two bytes at a time
            narrow.add(self.__name__)
        shuffled = re.findall(r"shfl\.sync\.\S+\s+(%\w+)", kernel.asm["ptx"])
        if not {*shuffled}.isdisjoint(re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+)", kernel.asm["ptx"])):
            uneven.add(self.__name__)  # a product and another thread's number in one instruction
        if all(word in kernel.asm["ptx"] for word in ("wgmma.mma_async", "cp.async.bulk.tensor")):
            hopper.add(self.__name__)
        return kernel

    triton.runtime.jit.JITFunction.run = compiled
    for arch in archs:
        triton.runtime.driver.set_active(Offline(arch))
        geglu_linear.architecture = lambda device, arch=arch: arch
        large_card()
        runtime.tensor_cores = lambda device, arch=arch: arch >= 80
        calls = calls_for(arch)
        count += len(calls)
        with torch.no_grad():  # as below autograd, where operators run
            for name, args in calls:
                OPDEFS[name]._init_fn(*args)
    told = {"calls": count, "shared": shared, "spills": spills, "narrow": sorted(narrow), "hopper": sorted(hopper)}
    told["uneven"] = sorted(uneven)
    print(json.dumps(told))


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
