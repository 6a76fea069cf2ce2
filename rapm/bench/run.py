"""`rapm bench`: what the operators of rapm.kernels cost on the shapes of one UNet pass, beside what else computes them.

Shapes are recorded from a pass of the real architectures on meta tensors: SD1.5 at 512x512, SDXL at 1024x1024, batch 1,
bf16, channels-last. Providers: `reference` is the operator's plain PyTorch, eager; `compile` is torch.compile of that;
`rapm` is the kernel; then libraries that have the operator. Who computes it wrongly gets no time.

A time is one call's in a CUDA graph, whose calls take turns with inputs, up to twelve sets, that the L2 cache does not
hold (but for the smallest): the median over replays. `forward` keeps what backward needs; `backward` is autograd.grad
of all that a training wants, never of frozen weights. Bytes and FLOP are the algorithm's (ops.py); a copy's bytes
are those it reads and those it writes, and its time is the better of a device memcpy's and of an elementwise kernel's
(torch.neg), which is the faster on an H200.

Before anything is measured, processes compile what will be, all at once: the measuring pass then finds it in the caches
on disk of Triton and of torch.compile (FX graphs and AOTAutograd's), which know it by its graph, inputs and settings.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rapm.bench.ops import KERNELS, Op, Provider, Shapes, operators
from rapm.disk import write_atomic
from rapm.errors import UserError
from rapm.kernels import runtime
from rapm.kernels.attention import choices
from rapm.loading.families import SD15, SDXL
from rapm.unet import Attention, Conv2d, FeedForward, GroupNorm, LayerNorm, Linear, Text, UNet


class Model(NamedTuple):
    """Whose shapes are timed."""

    unet: dict  # config.json, without what is diffusers' default
    side: int  # of the latents


MODELS = {"sd15": Model(SD15, SD15["sample_size"]), "sdxl": Model(SDXL, SDXL["sample_size"])}
SET_BYTES, SETS = 180e6, (2, 12)  # bytes of arguments that take turns, over three times an H200's L2; how many sets
CALLS, REPLAYS = 10, 5  # in a graph, at least; of it
SPIN = 400_000, 500  # cycles that the host needs to queue a graph, and more for each of its launches
WORKERS, WORKER_BYTES = 8, 2**32  # processes that compile, at most; GPU memory that one may need
UNCOMPILED = "attention", "frozen_conv"  # operators whose products are libraries' alone
LARGEST = 5  # shapes of an operator whose share of the card's limit is told
REFERENCE, COMPILE, RAPM = "reference", "compile", "rapm"


# Shapes


def example_text(config: dict, side: int, device: str) -> Text:
    """Random embeddings of one prompt, as the UNet of `config` takes them for latents of `side`."""
    hidden = torch.randn(1, 77, config["cross_attention_dim"], device=device)
    if not config["addition_embed_type"]:
        return Text(hidden)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    sizes = torch.tensor([[8, 8, 0, 0, 8, 8]], device=device) * float(side)
    return Text(hidden, torch.randn(1, pooled, device=device), sizes)


@contextmanager
def kernel_mode(mode: str) -> Iterator[None]:
    """RAPM_KERNELS, for a while."""
    before, runtime.MODE = runtime.MODE, mode
    try:
        yield
    finally:
        runtime.MODE = before


@functools.cache
def unet_shapes(model: str) -> Shapes:
    """The shapes of one UNet pass, by kind.

    group_norm: C H W, SiLU, shift, residual. layer_norm: N C, residual. geglu: N F.
    attention: heads N L d. linear: rows, in, out, bias, layers in one, LoRA. stack: rows, in, out, bias, layers in one.
    conv: in, out, k, stride, H, W of x, LoRA.
    taps: the C H W that a discriminator reads. latents: H W.
    """
    found: Shapes = defaultdict(Counter)

    def add(kind: str, *shape: object) -> None:
        found[kind][shape] += 1

    def see(module: nn.Module, args: tuple, options: dict) -> None:
        x = args[0]
        if isinstance(module, GroupNorm):
            added = (options.get(name) is not None for name in ("shift", "residual"))
            add("group_norm", *x.shape[1:], options.get("silu", False), *added)
        elif isinstance(module, LayerNorm):
            add("layer_norm", *x.shape[1:], args[1] is not None)
        elif isinstance(module, FeedForward):
            add("geglu", x.shape[1], module.net[2].in_features)
        elif isinstance(module, Attention):
            rows, channels = x.shape[1:]
            context = text.hidden.shape[1] if module.cross else rows
            add("attention", module.heads, rows, context, channels // module.heads)
            if not module.cross:
                add("linear", rows, channels, 3 * channels, False, 3, True)
        elif isinstance(module, nn.Linear):
            sizes = math.prod(x.shape[:-1]), module.in_features, module.out_features
            add("linear", *sizes, module.bias is not None, 1, isinstance(module, Linear))
        elif isinstance(module, nn.Conv2d):
            sizes = module.in_channels, module.out_channels, module.kernel_size[0]
            add("conv", *sizes, module.stride[0], *x.shape[2:], isinstance(module, Conv2d))

    config, side = MODELS[model]
    with torch.device("meta"), torch.no_grad(), kernel_mode("reference"):
        unet = UNet(config).to(torch.bfloat16)
        z, t = torch.empty(1, 4, side, side), torch.empty((), dtype=torch.long)
        text = example_text(unet.config, side, "meta")
        add("taps", *(tuple(x.shape[1:]) for x in unet.features(z, t, text)))
        for module in unet.modules():
            module.register_forward_pre_hook(see, with_kwargs=True)
        unet(z, t, text)
        for stacks, rows in ((unet.time_stacks, 1), (unet.text_stacks, text.hidden.shape[1])):
            for stack in stacks:
                outputs, inputs = stack.layers[0].weight.shape
                count = len(stack.layers)
                add("stack", rows, inputs, count * outputs, stack.layers[0].bias is not None, count)
    add("latents", side, side)
    return dict(found)


# Measuring


def need_gpu() -> None:
    """UserError without one."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: kernels are timed on an NVIDIA GPU only")


def card() -> dict[str, str]:
    """What is measured on."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    versions["triton"] = runtime.triton.__version__ if runtime.triton else None
    return {"device": torch.cuda.get_device_name(), "driver": driver, **{k: str(v) for k, v in versions.items()}}


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    """The CUDA driver's library."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def graph_ms(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> tuple[float, int]:
    """Milliseconds and launches (kernels, copies and fills) of one of `calls`, all of them in one CUDA graph.

    The current stream must not be the default one.
    """
    calls[0]()  # compiles, tunes and allocates
    free, total = torch.cuda.mem_get_info()
    if 2 * free < total:
        torch.cuda.empty_cache()  # former graphs' memory; torch.cuda.graph would do so each time, which takes longer
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    graph.capture_begin()
    try:
        # no result may take another's place: it would be written to the cache only
        kept = [call() for _ in range(math.ceil(CALLS / len(calls))) for call in calls]
    finally:
        graph.capture_end()
    nodes = ctypes.c_size_t()
    if error := cuda_driver().cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes)):
        raise RuntimeError(f"cuGraphGetNodes: CUDA error {error}")
    times = []
    for _ in range(1 + replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN[0] + SPIN[1] * nodes.value)  # so that its launch does not count
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(kept))
    return statistics.median(times[1:]), round(nodes.value / len(kept))


def copy_ms(size: float, sets: int, replays: int = REPLAYS) -> float:
    """The faster of a device memcpy and an elementwise kernel that read and write `size` bytes in all."""
    n = max(1, int(size) // 8)
    pairs = [[torch.empty(n, dtype=torch.float32, device="cuda") for _ in range(2)] for _ in range(sets)]
    ways = [partial(y.copy_, x) for x, y in pairs], [partial(torch.neg, x, out=y) for x, y in pairs]
    return min(graph_ms(calls, replays)[0] for calls in ways)


def limits() -> dict[str, float]:
    """What the card reaches: the faster of two large copies (`copy_ms`), and a dense bf16 product."""
    size, n = 2**31, 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    product_ms, _ = graph_ms([lambda: a @ b])
    return {"copy_gbs": size / copy_ms(size, 2) * 1e-6, "bf16_tflops": 2 * n**3 / product_ms * 1e-9}


def tensors(tree: object) -> list[Tensor]:
    """Those of a tree of arguments or results."""
    return [x for x in tree_leaves(tree) if torch.is_tensor(x)]


def wanted(args: object) -> list[Tensor]:
    """Of arguments, what gradients are asked for; of results, what has one."""
    return [x for x in tensors(args) if x.requires_grad]


def fresh(args: Sequence, dtype: torch.dtype | None = None) -> list:
    """The same numbers without their history; floating-point ones in `dtype`."""

    def new(x: object) -> object:
        if not torch.is_tensor(x):
            return x
        y = x.detach()
        return (y.to(dtype) if dtype and y.is_floating_point() else y).requires_grad_(x.requires_grad)

    return tree_map(new, list(args))


def results(run: Callable, args: Sequence, cotangents: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of all arguments that want one."""
    out = tensors(run(*args))
    heads = wanted(out)
    pulls = [c.to(y.dtype) for c, y in zip(cotangents, heads, strict=True)]
    return [*(y.detach() for y in out), *(torch.autograd.grad(heads, wanted(args), pulls) if heads else ())]


def errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """||actual - exact|| / ||exact|| of each; infinite where a number is not finite."""
    found = []
    for a, e in zip(actual, exact, strict=True):
        distance = (a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)
        found.append(float(distance) if a.isfinite().all() else math.inf)
    return found


def check(provider: Provider, args: list, cotangents: list[Tensor], exact: list[Tensor], allowed: list[float]) -> None:
    """ArithmeticError for an output or a gradient that is further from `exact` than allowed."""
    actual = results(lambda *x: provider.run(*provider.prepare(*x)), fresh(args), cotangents)
    for i, (found, limit) in enumerate(zip(errors(actual, exact), allowed, strict=True)):
        if not found <= limit:
            raise ArithmeticError(f"result {i} of {len(exact)} is off by {found:.1e}, over {limit:.1e}")


def kept_mib(provider: Provider, args: list) -> float:
    """What autograd keeps from forward to backward, but for weights: whole storages, each once."""
    kept = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = provider.run(*args)
    for weight in tensors(args[provider.activations :]):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / 2**20 if wanted(out) else 0.0


def measured(provider: Provider, sets: list[list], replays: int) -> dict:
    """Times, launches and memory of a provider; lists are of forward, and of backward where there is one."""
    args = [fresh(provider.prepare(*x)) for x in sets]
    forward = [partial(provider.run, *x) for x in args]
    found, kept = [graph_ms(forward, replays)], kept_mib(provider, args[0])

    def backward_of(call: Callable, inputs: list) -> Callable | None:
        heads = wanted(call())
        pulls = [torch.randn_like(y) for y in heads]
        return partial(torch.autograd.grad, heads, wanted(inputs), pulls, retain_graph=True) if heads else None

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = backward_of(forward[0], args[0])
    if first:
        first()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    if first:
        others = filter(None, map(backward_of, forward[1:], args[1:]))
        found.append(graph_ms([first, *others], replays))
    ms, launches = map(list, zip(*found, strict=True))
    return {"ms": ms, "launches": launches, "kept_mib": kept, "peak_mib": peak}


# Compiling beforehand


@contextmanager
def measuring() -> Iterator[None]:
    """Settings that a compiled graph is known by, and a stream that can be captured."""
    import torch._functorch.config as functorch

    stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    # Compiled backward passes run many times on what they have kept, so they must not write into it.
    with torch.cuda.stream(stream), kernel_mode("auto"), functorch.patch(donated_buffer=False):
        yield


@functools.cache
def own_operators() -> dict[str, Op]:
    """Without the libraries they are compared with."""
    return operators({}, peers=False)


def warmed(task: tuple[str, tuple, str]) -> bool:
    """Runs a provider (the task: operator, shape, provider) forward and backward, so that it is compiled; if it can."""
    name, shape, provider = task
    try:
        with measuring():
            op = own_operators()[name]
            args = op.make(*shape)
            heads = wanted(providers_of(op, provider == COMPILE)[provider].run(*args))
            if heads:
                torch.autograd.grad(heads, wanted(args), [torch.ones_like(y) for y in heads])
        return True
    except Exception:  # the measuring pass will meet it again, and tell
        return False


def warm(tasks: list[tuple[str, tuple, str]]) -> str:
    """Compiles `tasks` in processes of their own; what was done, in a line."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each process; one for each core by default
    if runtime.triton:  # torch.compile moves Triton's cache at its first kernel, unless told where it is
        os.environ.setdefault("TRITON_CACHE_DIR", runtime.triton.knobs.cache.dir)
    places = min(WORKERS, (os.cpu_count() or 1) // 2, torch.cuda.mem_get_info()[0] // WORKER_BYTES, len(tasks))
    workers, done, start = max(1, places), 0, time.perf_counter()
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for good in pool.map(warmed, tasks):
                done += good
    except BrokenProcessPool:  # one was killed, perhaps for its memory: what is not done is compiled later
        pass
    seconds = time.perf_counter() - start
    return f"compiled {done} of {len(tasks)} cases beforehand, {workers} at once, in {seconds:.0f} s"


# The command


def providers_of(op: Op, compiled: bool) -> dict[str, Provider]:
    """All that are timed for `op`; with torch.compile if `compiled`."""
    out = {REFERENCE: Provider(op.reference, activations=op.activations, checked=False)}  # the measure of the others
    if compiled and op.compiled:
        torch._dynamo.reset()  # a shape is compiled for itself: too many others, and it would run eagerly
        out[COMPILE] = Provider(op.compiled(op.reference), activations=op.activations)
    return {**out, **op.others, RAPM: Provider(op.rapm, activations=op.activations)}


def case(op: Op, shape: tuple, replays: int, compiled: bool, without: Set[str] = frozenset()) -> dict:
    """Everything about one shape; a provider that is wrong or fails has a reason instead of times."""
    torch.manual_seed(0)
    args = op.make(*shape)
    count = math.ceil(SET_BYTES / sum(x.nbytes for x in tensors(args)))
    sets = [args] + [op.make(*shape) for _ in range(min(max(count, SETS[0]), SETS[1]) - 1)]
    cotangents = [torch.randn_like(y) for y in wanted(op.reference(*args))]
    exact = results(op.reference, fresh(args, torch.float64), cotangents)
    inexact = errors(results(op.reference, fresh(args), cotangents), exact)
    allowed = [1.5 * error + op.slack for error in inexact]
    found: dict[str, dict] = {}
    for name, provider in providers_of(op, compiled).items():
        if name in without:
            continue
        try:
            if provider.checked:
                check(provider, args, cotangents, exact, allowed)
            found[name] = measured(provider, sets, replays)
        except Exception as error:  # of any library; the others are still of interest
            found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    row: dict = {"sets": len(sets), "unit": op.unit, "cost": list(op.cost(*shape)), "providers": found}
    if op.unit == "bytes":
        row["copy_ms"] = [copy_ms(size, len(sets), replays) for size in row["cost"] if size]
    return row


def totals(rows: list[dict], limit: dict[str, float]) -> dict:
    """An operator's milliseconds and MiB over one pass, for providers that did all shapes.

    `share`: forward's and backward's rates of the kernel on the largest shapes, as shares of the card's copy or bf16
    product; `of_copy`: as shares of a copy of the same bytes, of equally many sets.
    """
    names = [name for name in rows[0]["providers"] if all("ms" in row["providers"].get(name, {}) for row in rows)]
    out: dict = {"shapes": len(rows), "calls": sum(row["count"] for row in rows), "providers": {}}
    for name in names:
        ms = [[row["count"] * x for x in row["providers"][name]["ms"]] for row in rows]
        kept = sum(row["count"] * row["providers"][name]["kept_mib"] for row in rows)
        out["providers"][name] = {"ms": [sum(column) for column in zip(*ms, strict=True)], "kept_mib": kept}
    if RAPM in names:
        out["unit"] = rows[0]["unit"]
        peak = limit["copy_gbs"] * 1e6 if out["unit"] == "bytes" else limit["bf16_tflops"] * 1e9  # in a millisecond
        largest = sorted(rows, key=lambda row: -sum(row["cost"]))[:LARGEST]
        times = [row["providers"][RAPM]["ms"] for row in largest]
        passes = range(len(times[0]))
        out["share"] = [[row["cost"][i] / ms[i] / peak for row, ms in zip(largest, times, strict=True)] for i in passes]
        if out["unit"] == "bytes":
            out["of_copy"] = [[r["copy_ms"][i] / ms[i] for r, ms in zip(largest, times, strict=True)] for i in passes]
    return out


def line(model: str, name: str, total: dict, rows: list[dict]) -> str:
    """An operator's totals as text, and why a provider has none."""
    parts = [f"{k} {' + '.join(f'{ms:.3f}' for ms in v['ms'])} ms" for k, v in total["providers"].items()]
    if "share" in total:
        what = "copy" if total["unit"] == "bytes" else "bf16 product"
        shares = "; ".join(" ".join(f"{100 * x:.0f}" for x in column) for column in total["share"])
        parts.append(f"% of the {what}, largest shapes: {shares}")
    reasons = {k: v["failed"] for row in reversed(rows) for k, v in row["providers"].items() if "failed" in v}
    return "\n    ".join([f"{model} {name}: {', '.join(parts)}", *(f"{k}: {v}" for k, v in reasons.items())])


def tasks_of(table: dict[str, Op], shapes: dict[tuple[str, str], list[tuple]]) -> list[tuple[str, tuple, str]]:
    """What `warm` compiles: the one that takes longest first, then torch.compile's others, then our kernels."""
    tasks = {(name, shape, RAPM) for (_, name), found in shapes.items() for shape in found if name not in UNCOMPILED}
    tasks |= {(name, shape, COMPILE) for name, shape, _ in tasks if table[name].compiled}
    tasks = random.Random(0).sample(sorted(tasks, key=str), len(tasks))  # neighbours often share a kernel
    return sorted(tasks, key=lambda task: (task[0] != "disc_head", task[2] != COMPILE))


def bench(
    names: Sequence[str] = (), models: Sequence[str] = tuple(MODELS), quick: bool = False, output: Path | None = None
) -> dict:
    """The report of `rapm bench`, printed and written to `output` operator by operator.

    UserError without a GPU, or for an operator that is not there.
    """
    unknown = sorted(set(names) - set(KERNELS))
    if unknown:
        raise UserError(f"no operator {unknown[0]!r}: choose from {', '.join(KERNELS)}")
    need_gpu()
    start = time.perf_counter()
    left_out: dict[str, str] = {}
    every = operators(left_out)
    table = {key: every[key] for name in names or KERNELS for key in every if key.split()[0] == name}
    report: dict = {"card": card(), "quick": quick, "left_out": left_out, "totals": {}, "rows": []}
    counts = {(model, name): op.shapes(unet_shapes(model)) for name, op in table.items() for model in models}
    shapes = {
        (model, name): sorted(found, key=lambda shape: -sum(table[name].cost(*shape)))[: 1 if quick else None]
        for (model, name), found in counts.items()
    }
    if not quick and (tasks := tasks_of(table, shapes)):
        print(warm(tasks), flush=True)
    with measuring():
        report["limits"] = limits()
        print(*(f"{k} {v}" for k, v in rounded({**report["card"], **report["limits"], **left_out}).items()), sep=", ")
        for (model, name), chosen in shapes.items():
            rows, failed = [], set()  # who failed has no total: further shapes would only take time
            for shape in chosen:
                found = case(table[name], shape, REPLAYS, not quick, failed)
                failed |= {key for key, provider in found["providers"].items() if "failed" in provider}
                rows.append({"model": model, "op": name, "shape": shape, "count": counts[model, name][shape], **found})
            report["rows"] += rows
            total = report["totals"].setdefault(model, {})[name] = totals(rows, report["limits"])
            print(f"[{time.perf_counter() - start:.0f} s] {line(model, name, total, rows)}", flush=True)
            report["attention_choices"] = choices()
            if output:
                write_atomic(output, f"{json.dumps(rounded(report), indent=1)}\n".encode())
    if not quick and (missed := torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]):
        print(f"{missed} graphs were compiled again: torch.compile's cache did not have them")
    return rounded(report)


def rounded(tree: dict) -> dict:
    """Five digits: more are noise."""
    return tree_map(lambda x: float(f"{x:.5g}") if isinstance(x, float) else x, tree)


def run(names: Sequence[str], models: Sequence[str], quick: bool, output: Path | None) -> int:
    """`rapm bench`; exit code 1 where one of our kernels is wrong."""
    if output and not output.parent.is_dir():
        raise UserError(f"output {output}: {output.parent} is no folder: make it, or choose another")
    report = bench(names, models, quick, output)
    return int(any("failed" in row["providers"].get(RAPM, {}) for row in report["rows"]))
