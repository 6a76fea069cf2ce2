"""`rapm bench`: what the operators of rapm.kernels cost on the shapes of one UNet pass, beside what else computes them.

Shapes are recorded from a pass of the real architectures on meta tensors: SD1.5 at 512x512, SDXL at 1024x1024, batch 1,
bf16, channels-last. Providers: `reference` is the operator's plain PyTorch, eager; `compile` is torch.compile of that;
`rapm` is the kernel; then libraries that have the operator. Who computes it wrongly gets no time.

A time is one call's in a CUDA graph, whose calls take turns with inputs, up to twelve sets, that the L2 cache does not
hold (but for the smallest): the median over replays. `forward` keeps what backward needs; `backward` is autograd.grad
of all that a training wants, never of frozen weights. Bytes and FLOP are the algorithm's (ops.py); a copy's bytes
are those it reads and those it writes, and its time is the better of a device memcpy's and of an elementwise kernel's
(torch.neg), which is the faster on an H200.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence, Set
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from rapm.bench.measure import (
    REPLAYS,
    card,
    check,
    copy_ms,
    errors,
    fresh,
    limits,
    measured,
    measuring,
    need_gpu,
    results,
    tensors,
    wanted,
)
from rapm.bench.ops import KERNELS, RAPM, Op, operators, providers_of
from rapm.bench.shapes import MODELS, unet_shapes
from rapm.bench.warm import tasks_of, warm
from rapm.disk import write_atomic
from rapm.errors import UserError
from rapm.kernels.attention import choices

SET_BYTES, SETS = 180e6, (2, 12)  # bytes of arguments that take turns, over three times an H200's L2; how many sets
LARGEST = 5  # shapes of an operator whose share of the card's limit is told


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
