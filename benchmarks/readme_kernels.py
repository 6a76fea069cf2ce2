"""What README and docs/results.md show of the kernels: each a function of the report that it shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from tables import NONE, fill, rows_table, table

MODELS = {"sd15": "SD1.5, 512x512", "sdxl": "SDXL, 1024x1024"}
SHORT = {model: name.partition(",")[0] for model, name in MODELS.items()}
# Providers of rapm/bench/ops.py that are no library; the last two are what a layer costs without LoRA, or in bf16.
OURS = ("reference", "compile", "rapm", "frozen layer", "whole weight")
LARGEST = 5  # rapm/bench/run.py
RANKS = 1, 64  # rapm/bench/ops.py

# Every operator of kernels/: what it is, in a few words
OPERATORS = {
    "group_norm_silu": "additions, GroupNorm, SiLU",
    "layer_norm": "addition, LayerNorm",
    "geglu": "value times gelu of the gate",
    "geglu_linear": "product and GEGLU, no gradient",
    "lora_linear": "linear layer and its LoRA",
    "lora_conv": "convolution and its LoRA",
    "frozen_conv": "convolution that keeps nothing",
    "int8_linear": "linear layer of int8 weights",
    "dequantise": "int8 and nf4 made whole",
    "attention": "each shape's fastest backend",
    "short_attention": "attention to a prompt",
    "disc_head": "all heads, losses, gradients",
    "position_loss": "student's step, both distances",
    "renoise": "three positions re-noised",
    "guided_step": "guidance and a DDIM step",
}
OPERATORS_TEXT = """
Milliseconds, forward and backward together, of all calls in one pass of the UNet (the last four: in one slot), batch 1,
bf16, on one {card[device]}, torch {card[torch]}: plain PyTorch, torch.compile, the fastest library that does the same,
and ours. {none}: there is none. `failed`: it gave no result, or one too far from the fp64 reference.
`int8_linear` is there for memory: with whole weights its layers are `lora_linear`'s.
"""
SLOWER = "Ours is not the fastest at {cases}."
KERNELS = """
Measured on one {card[device]}, driver {card[driver]}, torch {card[torch]}, CUDA {card[cuda]}, Triton {card[triton]},
by `rapm bench`: milliseconds, forward + backward, of all calls of one UNet pass, batch 1, bf16. disc_head,
position_loss, renoise and guided_step are called once a slot, and their gradients are part of the forward.
"""
BELOW = """
Medians of CUDA-graph replays, so that launches do not count, on sets of inputs that take turns, so that the L2 cache
does not hold them; who is further from an fp64 result than plain PyTorch's own rounding explains gets no time.
`PyTorch` is the plain reference, eager; `compile` is torch.compile of it; `library` is the fastest other one: Liger
(its gelu is the tanh one) gets the layouts that it is made for, peft gets weights in bf16, so that it casts nothing.
`of the limit`: rates on the {largest} largest shapes, forward; backward, as shares of this card's large copy
({limits[copy_gbs]:,.0f} GB/s, the faster of a memcpy and an elementwise kernel), for products of a dense bf16 one
({limits[bf16_tflops]:.0f} TFLOP/s). `kept MiB`: what autograd keeps for backward over the pass.
"""
OVERHEAD = """
What a LoRA adds to the time of the frozen layers, in all layers of a pass: forward; backward; both. The frozen layers'
backward is the gradient of their input; the LoRA's has its own gradients too.
"""
MISSING = "Not measured: {reasons}."
SLOT = """
GPU milliseconds of one slot by family of kernels, LoRA rank 1, batch 1, bf16, as one CUDA graph of one stream, on one
{card[device]}: before, with `RAPM_KERNELS=reference`, and after. {summary}
"""
# Family of benchmarks/slot_time.py -> what the picture calls it, its colour
COLOURS = {
    "gemm": ("matrix products", "#0072b2"), "conv": ("convolutions", "#56b4e9"), "attention": ("attention", "#009e73"),
    "lora": ("LoRA", "#cc79a7"), "norm": ("norms", "#d55e00"), "elementwise": ("elementwise", "#e69f00"),
    "copy": ("copies, casts", "#f0e442"), "layout": ("layout", "#999933"), "heads": ("heads", "#882255"),
    "optimizer": ("optimizer", "#555555"), "other": ("other", "#bbbbbb"),
}  # fmt: skip


def operators(report: Mapping) -> str:
    """A line for each operator: what a pass takes in all, with whom to compare it."""
    whole(report)
    failed = {(row["model"], row["op"], name) for row in report["rows"] for name, found in row["providers"].items()
              if "failed" in found}  # fmt: skip
    rows, slower, timed = [], [], next(iter(report["totals"].values()))
    for op, words in OPERATORS.items():
        for name in [name for name in timed if name.split()[0] == op and "stack" not in name]:
            cells = [f"`{op}`{name.removeprefix(op)}", words]
            for model, ops in report["totals"].items():
                done = {who: sum(found["ms"]) for who, found in ops.get(name, {"providers": {}})["providers"].items()}
                peers = {who: ms for who, ms in done.items() if who not in OURS}
                shown = {**done, "library": min(peers.values())} if peers else done
                for who in ("reference", "compile", "library", "rapm"):
                    absent = "failed" if (model, name, who) in failed else NONE
                    cells.append(number(shown[who]) if who in shown else absent)
                others = {who: ms for who, ms in done.items() if who not in OURS[2:]}
                best = min(others, key=others.__getitem__, default=None)
                if best and done.get("rapm", 0.0) > others[best]:
                    who = {"reference": "PyTorch", "compile": "torch.compile"}.get(best, best)
                    case = f"`{op}`{name.removeprefix(op)} on {SHORT[model]}"
                    slower.append(f"{case} ({number(done['rapm'])} ms, {who} {number(others[best])})")
            rows.append(cells)
    columns = [f"{SHORT[model]} PyTorch" for model in report["totals"]]
    head = ["", "", *(cell for first in columns for cell in (first, "compile", "library", "rapm"))]
    untimed = [f"`{op}` ({words})" for op, words in OPERATORS.items() if op not in {name.split()[0] for name in timed}]
    last = SLOWER.format(cases=", ".join(slower)) if slower else ""
    last += f" Not timed yet: {', '.join(untimed)}." if untimed else ""
    parts = [fill(OPERATORS_TEXT.format(**report, none=NONE)), table([head, *rows])]
    return "\n\n".join([*parts, fill(last)] if last else parts)


def whole(report: Mapping) -> None:
    """Nothing of --quick is shown."""
    if report["quick"]:
        sys.exit("benchmarks/results/kernels.json is of --quick: run rapm bench without it")


def number(ms: float) -> str:
    return f"{ms:#.3g}".rstrip(".")


def times(ms: list[float]) -> str:
    return " + ".join(map(number, ms))


def span(shares: list[float]) -> str:
    low, high = (f"{100 * x:.0f}" for x in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low}-{high}%"


def kernel_cells(total: Mapping) -> dict[str, str]:
    """An operator's row: its totals over a pass."""
    done = total["providers"]
    found = {name: sum(provider["ms"]) for name, provider in done.items()}
    cells = {name: times(done[name]["ms"]) if name in found else "" for name in OURS[:3]}
    peer = min((name for name in found if name not in OURS), key=lambda name: found[name], default=None)
    kept = [
        f"{done[name]['kept_mib']:,.0f}"
        for name in ("reference", "rapm")
        if name in found and len(done[name]["ms"]) > 1
    ]
    return {
        "PyTorch": cells["reference"],
        "compile": cells["compile"],
        "library": f"{times(done[peer]['ms'])} ({peer})" if peer else "",
        "rapm": cells["rapm"],
        "compile / rapm": f"{found['compile'] / found['rapm']:.2f}" if {"compile", "rapm"} <= found.keys() else "",
        "of the limit": "; ".join(map(span, total.get("share", []))),
        "kept MiB": " → ".join(kept),
    }


def overhead_cells(ops: Mapping, layer: str) -> dict[str, str]:
    """What a LoRA of either rank adds to `layer`, lora_linear or lora_conv."""
    cells = {"frozen layer": times(ops[f"{layer} rank {RANKS[0]}"]["providers"]["frozen layer"]["ms"])}
    for rank in RANKS:
        done = ops[f"{layer} rank {rank}"]["providers"]
        for name in ("rapm", "peft"):
            pairs = [*zip(done[name]["ms"], done["frozen layer"]["ms"], strict=True)] if name in done else []
            pairs += [tuple(map(sum, zip(*pairs, strict=True)))] if pairs else []
            cells[f"{name}, rank {rank}"] = "; ".join(f"{a / b - 1:+.0%}" for a, b in pairs)
    return cells


def kernels(report: Mapping) -> str:
    """All that `rapm bench --output benchmarks/results/kernels.json` says of each operator."""
    whole(report)
    parts, added, reasons = [fill(KERNELS.format(**report))], [], dict(report["left_out"])
    for model, ops in report["totals"].items():
        parts += [f"**{MODELS[model]}**", rows_table([(name, kernel_cells(total)) for name, total in ops.items()])]
        layers = [name for name in ("lora_linear", "lora_conv") if all(f"{name} rank {rank}" in ops for rank in RANKS)]
        added += [(f"{SHORT[model]} {name}", overhead_cells(ops, name)) for name in layers]
    parts.append(fill(BELOW.format(**report, largest=LARGEST)))
    if added:
        parts += [fill(OVERHEAD), rows_table(added)]
    for row in report["rows"]:
        failed = {name: found["failed"] for name, found in row["providers"].items() if "failed" in found}
        reasons |= {f"{name}'s {row['op']}": reason for name, reason in failed.items()}
    if reasons:
        parts.append(fill(MISSING.format(reasons="; ".join(f"{name} ({reason})" for name, reason in reasons.items()))))
    return "\n\n".join(parts)


def slot_svg(report: Mapping) -> str:
    """One bar for each model, before and after, as long as its share of the time before, cut by family."""
    models = report["models"]
    left, long, bar = 100, 500, 26
    height = sum(20 + (bar + 8) * len(modes) for modes in models.values()) + 80
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + long + 80} {height}" '
             f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    y = 10
    for model, modes in models.items():
        whole = max(mode["kernel_ms"] for mode in modes.values())
        for name, mode in modes.items():
            x = float(left)
            parts.append(f'<text x="8" y="{y + 17}">{SHORT[model]} {name}</text>')
            for family, (label, colour) in COLOURS.items():
                ms = mode["families"].get(family, 0.0)
                width = long * ms / whole
                title = f"<title>{label}: {ms:.1f} ms</title>"
                shape = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{bar}" fill="{colour}"'
                parts.append(f"<rect {shape}>{title}</rect>")
                if width > 24:
                    ink = "#000" if family in ("copy", "elementwise", "conv", "other", "lora") else "#fff"
                    parts.append(f'<text x="{x + 4:.1f}" y="{y + 17}" fill="{ink}" font-size="10">{ms:.1f}</text>')
                x += width
            parts.append(f'<text x="{x + 6:.1f}" y="{y + 17}">{mode["gpu_ms"]:.1f} ms</text>')
            y += bar + 8
        y += 20
    for i, (label, colour) in enumerate(COLOURS.values()):
        x, row = 8 + 110 * (i % 6), y + 24 * (i // 6)
        parts.append(f'<rect x="{x}" y="{row}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="{row + 11}">{label}</text>')
    return "\n".join(parts) + "</svg>\n"


def slot(report: Mapping) -> str:
    """The picture of a slot's time, and what it comes to."""
    shares = [(SHORT[model], modes["after"]["gpu_ms"] / modes["before"]["gpu_ms"])
              for model, modes in report["models"].items() if {"before", "after"} <= modes.keys()]  # fmt: skip
    summary = " and ".join(f"{name} takes {share:.0%} of the time" for name, share in shares) + "." if shares else ""
    picture = "![GPU time of one slot by family](docs/slot_time.svg)"
    return "\n\n".join([fill(SLOT.format(card=report["card"], summary=summary)), picture])


def slot_table(report: Mapping) -> str:
    """The picture's numbers: a column for each model and mode."""
    models = report["models"]
    columns = {f"{SHORT[model]} {name}": mode for model in models for name, mode in models[model].items()}

    def row(cell: Callable[[Mapping], str]) -> dict[str, str]:
        return {title: cell(mode) for title, mode in columns.items()}

    rows = [("all", row(lambda mode: f"{mode['gpu_ms']:.1f}"))]
    for family, (label, _) in COLOURS.items():
        if any(mode["families"].get(family, 0.0) >= 0.05 for mode in columns.values()):
            rows.append((label, row(lambda mode, family=family: f"{mode['families'].get(family, 0.0):.1f}")))
    rows.append(("launches", row(lambda mode: f"{mode['launches']:,}")))
    return rows_table(rows)
