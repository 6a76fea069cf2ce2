"""Write the tables of README and docs/ from benchmarks/results/: `python benchmarks/readme.py` (`--check` compares)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import readme_runs
import scaling
from tables import fill, rows_table

ROOT = Path(__file__).parents[1]
WATCHING = "discriminators that only watch"  # benchmarks/quality.py

MEASURED = """
Measured on the embedded teacher: {report[trajectories]} trajectories, {report[iterations]} iterations, guidance
{settings[guidance]}, LoRA rank {settings[lora_rank]}, {report[pairs]} held-out caption and seed pairs,
{report[device]}, torch {report[torch]}; mean ± deviation of {seeds} seeds. FD is the Frechet distance, in the
features of a judge trained on real renders, to the teacher's {whole}-step samples of the same captions from other
noise; d is FD minus the floor, which is the teacher's own {whole} steps; `prompt` is the share of pictures in which
everything the caption says is right; RMSE is to the teacher's endpoints from the same noise, in pixels of [0, 1].
"""
VERDICT = """
The student's d is {share_guided} of the guided teacher's in {n} steps (which cost twice the network calls) and
{share_unguided} of the unguided teacher's. The guided teacher's {n} steps are {floors} floors away from its {whole}.
On this teacher the discriminators help most, and either of them alone does nearly all of it: what the second one
adds is about the deviation between seeds. The absolute distance helps; the relative distance does not: without it the
student is, if anything, a little closer. One teacher proves nothing about the next.
"""
DEMO = """
The demo, {demo[iterations]} iterations on {demo[cores]} CPU cores, takes {minutes} minutes, {minutes_training} of them
training; its student has d {best[d]}, prompt accuracy {best[prompt]} and RMSE {best[RMSE]}.
"""
LEARN = """
**The discriminators learn.** Hinge loss on held-out pairs by iteration (2 is chance): of heads that only watch a
student (weight 1e-6), and of the student's own, who leaves them less and less to see.
"""
CURVE = "![Hinge losses on held-out pairs](docs/hinge.svg)"
SEARCHED = """
**What was searched**, on another draw of held-out captions, one seed, {search[iterations]} iterations, learning rate
{search[settings][learning_rate]}: the weight of both generator terms, re-noising as a share of the slot, the heads'
learning rate (1e-3 where none is named), a replay of past features, a late start. D_rel and D_abs are held-out hinge
losses, a quarter in and at the end.
"""
TEACHER = """
The embedded teacher in 40 steps on 1,024 held-out captions, two seeds each. Its judge, on held-out renders with
handwriting it has not seen, has {colour} of the colours right, {shape} of the shapes, {digit} of the digits and
{background} of the backgrounds. On one {device} the judge took {judge_s} s to train, the autoencoder {vae_s} s,
the UNet with its text encoder {unet_s} s.
"""
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
{card[device]}: before, with `RAPM_KERNELS=reference`, and after. Training has a second stream besides. {summary}
"""
STOPS = """
`tests/faults/kills.py` stopped runs {stops[stops]} times ({signals}) at random moments of every phase ({phases}): what
lay on the disk was whole each time, and each of the {stops[runs_finished]} runs, started again until it got through,
ended with the uninterrupted run's LoRA, tensors byte for byte and the header but for its date. The slowest exit after
SIGINT or SIGTERM took {stops[slowest_exit_seconds]:.1f} s.
"""
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = {
    "calls": ("calls", "{:.0f}"), "fd": ("FD", "{:.2f}"), "d": ("d", "{:.2f}"), "prompt": ("prompt", "{:.1%}"),
    "digit": ("digit", "{:.1%}"), "background": ("background", "{:.1%}"), "diversity": ("diversity", "{:.2f}"),
    "rmse": ("RMSE", "{:.4f}"),
}  # fmt: skip


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def figures(row: dict, spread: dict | None = None) -> dict[str, str]:
    """A row's cells; with the spread over seeds behind a plus-minus."""
    cells = {}
    for key, (title, form) in COLUMNS.items():
        cells[title] = form.format(row[key])
        if spread and key in ("fd", "d", "prompt", "rmse"):
            cells[title] += " ± " + form.format(spread[key][1])
    return cells


def quality() -> str:
    """The README's section on the embedded run."""
    report, search, demo, demo_quality = map(load, ("ablation", "search", "demo", "demo_quality"))
    floor, guided, unguided = report["reference"][:3]
    summary, settings = report["summary"], report["settings"]
    rows = [(row["name"], figures(row)) for row in report["reference"][:3]]
    for name, spread in summary.items():
        if name != WATCHING:
            rows.append((name, figures({key: value[0] for key, value in spread.items()}, spread)))
    rows += [(row["name"], figures(row)) for row in report["reference"][3:]]

    curves = [next(run["curve"] for run in report["runs"] if run["name"] == name) for name in (WATCHING, "student")]
    hinge = []
    for (i, watching), (_, taught) in zip(*curves, strict=True):
        values = [curve[f"val_disc_{side}"] for curve in (watching, taught) for side in ("rel", "abs")]
        columns = ("watching: D_rel", "watching: D_abs", "student: D_rel", "student: D_abs")
        hinge.append((str(i), dict(zip(columns, map("{:.2f}".format, values), strict=True))))
    tried = []
    for run in search["runs"]:
        first, last = run["curve"][0][1], run["curve"][-1][1]
        cells = {key: figures(run["row"])[key] for key in ("d", "prompt", "RMSE")}
        for side in ("rel", "abs"):
            cells[f"D_{side}"] = f"{first[f'val_disc_{side}']:.2f}, {last[f'val_disc_{side}']:.2f}"
        tried.append((run["name"], cells))

    seconds, d = demo["seconds"], summary["student"]["d"][0]
    facts = {
        "n": settings["steps"],
        "whole": settings["steps"] * settings["fine_steps"],
        "seeds": sum(run["name"] == "student" for run in report["runs"]),
        "share_guided": f"{d / guided['d']:.2f}",
        "share_unguided": f"{d / unguided['d']:.3f}",
        "floors": f"{guided['fd'] / floor['fd']:.0f}",
        "minutes": f"{seconds['in all'] / 60:.1f}",
        "minutes_training": f"{seconds['training'] / 60:.1f}",
        "report": report,
        "settings": settings,
        "search": search,
        "demo": demo,
        "best": figures(next(row for row in demo_quality["rows"] if row["name"] == "demo")),
    }
    parts = [MEASURED, rows_table(rows), VERDICT, DEMO, LEARN, CURVE, rows_table(hinge), SEARCHED, rows_table(tried)]
    return "\n\n".join(part if part.startswith(("|", "!")) else fill(part.format(**facts)) for part in parts)


def hinge_svg() -> str:
    """The held-out hinge losses of the ablation's watching heads and of its first student, as a picture."""
    runs = load("ablation")["runs"]
    width, height, left, low, high = 640, 240, 40, 1.6, 2.1
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>']  # fmt: skip

    def y(value: float) -> float:
        return 20 + (high - value) / (high - low) * (height - 50)

    for value in (1.6, 1.7, 1.8, 1.9, 2.0, 2.1):
        colour = "#000" if value == 2.0 else "#ddd"
        parts.append(f'<path d="M{left} {y(value):.1f}H{width - 190}" stroke="{colour}"/>')
        parts.append(f'<text x="8" y="{y(value) + 4:.1f}">{value:.1f}</text>')
    lines = [(WATCHING, "rel", "#e69f00", "6 3"), (WATCHING, "abs", "#d55e00", ""),
             ("student", "rel", "#56b4e9", "6 3"), ("student", "abs", "#0072b2", "")]  # fmt: skip
    for row, (name, side, colour, dashes) in enumerate(lines):
        curve = next(run["curve"] for run in runs if run["name"] == name)
        scale = (width - 190 - left) / curve[-1][0]
        points = " ".join(f"{left + i * scale:.1f},{y(figures[f'val_disc_{side}']):.1f}" for i, figures in curve)
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{points}" fill="none" {stroke}/>')
        parts.append(f'<path d="M{width - 180} {40 + 24 * row}h24" {stroke}/>')
        label = f"{'watching' if name == WATCHING else name}: D_{side}"
        parts.append(f'<text x="{width - 150}" y="{44 + 24 * row}">{label}</text>')
    parts.append(f'<text x="{left}" y="{height - 8}">0</text>')
    parts.append(f'<text x="{width - 300}" y="{height - 8}">{curve[-1][0]} iterations</text></svg>')
    return "\n".join(parts) + "\n"


def teacher() -> str:
    """The README's section on how the embedded teacher was made and what it can do."""
    report = load("teacher")
    judge, seconds = report["judge_on_held_out_renders"], report["seconds"]
    rows = []
    for guidance, found in report["guidance"].items():
        cells = {key: f"{found[0][key]:.1%}" for key in ("prompt", "colour", "shape", "digit", "background")}
        few = {"d of 4 guided steps": found[1]["d"], "d of 4 unguided steps": found[2]["d"]}
        rows.append((f"guidance {guidance}", {**cells, **{key: f"{value:.2f}" for key, value in few.items()}}))
    shares = {name: f"{share:.1%}" for name, share in judge.items()}
    text = TEACHER.format(**shares, device=report["device"], **{f"{k}_s": f"{v:.0f}" for k, v in seconds.items()})
    return fill(text) + "\n\n" + rows_table(rows)


MODELS = {"sd15": "SD1.5, 512x512", "sdxl": "SDXL, 1024x1024"}
OURS = ("reference", "compile", "rapm", "frozen layer")  # providers of rapm/bench/run.py that are no library
LARGEST = 5  # rapm/bench/run.py
RANKS = 1, 64  # rapm/bench/ops.py


def times(ms: list[float]) -> str:
    return " + ".join(f"{x:#.3g}".rstrip(".") for x in ms)


def span(shares: list[float]) -> str:
    low, high = (f"{100 * x:.0f}" for x in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low}-{high}%"


def kernel_cells(total: dict) -> dict[str, str]:
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


def overhead_cells(ops: dict, layer: str) -> dict[str, str]:
    """What a LoRA of either rank adds to `layer`, lora_linear or lora_conv."""
    cells = {"frozen layer": times(ops[f"{layer} rank {RANKS[0]}"]["providers"]["frozen layer"]["ms"])}
    for rank in RANKS:
        done = ops[f"{layer} rank {rank}"]["providers"]
        for name in ("rapm", "peft"):
            pairs = [*zip(done[name]["ms"], done["frozen layer"]["ms"], strict=True)] if name in done else []
            pairs += [tuple(map(sum, zip(*pairs, strict=True)))] if pairs else []
            cells[f"{name}, rank {rank}"] = "; ".join(f"{a / b - 1:+.0%}" for a, b in pairs)
    return cells


def kernels() -> str:
    """The README's section on the operators, from `rapm bench --output benchmarks/results/kernels.json`."""
    report = load("kernels")
    if report["quick"]:
        sys.exit("benchmarks/results/kernels.json is of --quick: run rapm bench without it")
    parts, added, reasons = [fill(KERNELS.format(**report))], [], dict(report["left_out"])
    for model, ops in report["totals"].items():
        parts += [f"**{MODELS[model]}**", rows_table([(name, kernel_cells(total)) for name, total in ops.items()])]
        layers = [name for name in ("lora_linear", "lora_conv") if all(f"{name} rank {rank}" in ops for rank in RANKS)]
        added += [(f"{MODELS[model].split(',')[0]} {name}", overhead_cells(ops, name)) for name in layers]
    parts.append(fill(BELOW.format(**report, largest=LARGEST)))
    if added:
        parts += [fill(OVERHEAD), rows_table(added)]
    for row in report["rows"]:
        failed = {name: found["failed"] for name, found in row["providers"].items() if "failed" in found}
        reasons |= {f"{name}'s {row['op']}": reason for name, reason in failed.items()}
    if reasons:
        parts.append(fill(MISSING.format(reasons="; ".join(f"{name} ({reason})" for name, reason in reasons.items()))))
    return "\n\n".join(parts)


# Family of benchmarks/slot_time.py -> what the picture calls it, its colour
COLOURS = {
    "gemm": ("matrix products", "#0072b2"), "conv": ("convolutions", "#56b4e9"), "attention": ("attention", "#009e73"),
    "lora": ("LoRA", "#cc79a7"), "norm": ("norms", "#d55e00"), "elementwise": ("elementwise", "#e69f00"),
    "copy": ("copies, casts", "#f0e442"), "layout": ("layout", "#999933"), "heads": ("heads", "#882255"),
    "optimizer": ("optimizer", "#555555"), "other": ("other", "#bbbbbb"),
}  # fmt: skip


def slot_svg() -> str:
    """One bar for each model, before and after, as long as its share of the time before, cut by family."""
    models = load("slot_time")["models"]
    left, long, bar = 100, 500, 26
    height = sum(20 + (bar + 8) * len(modes) for modes in models.values()) + 80
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + long + 80} {height}" '
             f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    y = 10
    for model, modes in models.items():
        whole = max(mode["kernel_ms"] for mode in modes.values())
        for name, mode in modes.items():
            x = float(left)
            parts.append(f'<text x="8" y="{y + 17}">{MODELS[model].split(",")[0]} {name}</text>')
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


def slot() -> str:
    """The README's section on the time of a slot: a column for each model and mode."""
    report, ratios, columns = load("slot_time"), [], {}
    for model, modes in report["models"].items():
        short = MODELS[model].split(",")[0]
        columns |= {f"{short} {name}": mode for name, mode in modes.items()}
        if {"before", "after"} <= modes.keys():
            share = modes["after"]["gpu_ms"] / modes["before"]["gpu_ms"]
            ratios.append(f"{short} takes {share:.0%} of the time")

    def row(cell: Callable[[dict], str]) -> dict[str, str]:
        return {title: cell(mode) for title, mode in columns.items()}

    rows = [("all", row(lambda mode: f"{mode['gpu_ms']:.1f}"))]
    for family, (label, _) in COLOURS.items():
        if any(mode["families"].get(family, 0.0) >= 0.05 for mode in columns.values()):
            rows.append((label, row(lambda mode, family=family: f"{mode['families'].get(family, 0.0):.1f}")))
    rows.append(("launches", row(lambda mode: f"{mode['launches']:,}")))
    summary = " and ".join(ratios) + "." if ratios else ""
    picture = "![GPU time of one slot by family](docs/slot_time.svg)"
    return "\n\n".join([fill(SLOT.format(card=report["card"], summary=summary)), picture, rows_table(rows)])


def stops() -> str:
    """The campaign of stops."""
    found = load("stops")

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {n}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))

    return fill(STOPS.format(stops=found, signals=listed(found["by_signal"]), phases=listed(found["by_phase"])))


def full() -> str:
    """The README's section on full-size teachers, of the models that are there."""
    return readme_runs.full({m: load(f"full_teacher_{m}") for m in MODELS if there(f"full_teacher_{m}")})


# Section -> what writes it, the results without which it stays as it is
SECTIONS = {
    "quality": (quality, "ablation"), "teacher": (teacher, "teacher"), "kernels": (kernels, "kernels"),
    "slot": (slot, "slot_time"), "stops": (stops, "stops"), "full": (full, "full_teacher_sdxl"),
}  # fmt: skip
# Those that show the report of their own name
RUNS = ("step", "trajectories", "memory", "job", "soak", "crowd", "distributed", "low_precision")
SECTIONS |= {name: (lambda name=name: getattr(readme_runs, name)(load(name)), name) for name in RUNS}


def there(name: str) -> bool:
    return (RESULTS / f"{name}.json").is_file()


def render(text: str) -> str:
    """The README with its generated sections written anew, where their results are there."""
    for name, (write, results) in SECTIONS.items():
        if not there(results):
            continue
        section = f"<!-- {name}:begin -->.*?<!-- {name}:end -->"
        place = re.search(section, text, flags=re.S)
        if not place:
            sys.exit(
                f"README.md has no <!-- {name}:begin --> and <!-- {name}:end -->, where {results}.json is to be shown"
            )
        begin, end = place.span(0)
        text = f"{text[:begin]}<!-- {name}:begin -->\n\n{write()}\n\n<!-- {name}:end -->{text[end:]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    files = [(ROOT / "README.md", render), (ROOT / "docs" / "hinge.svg", lambda text: hinge_svg())]
    if there("slot_time"):
        files.append((ROOT / "docs" / "slot_time.svg", lambda text: slot_svg()))
        files.append((ROOT / "docs" / "scaling.md", scaling.render))
    for path, write in files:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        new = write(text)
        if arguments.check and new != text:
            sys.exit(f"{path.name} differs from benchmarks/results: python benchmarks/readme.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
