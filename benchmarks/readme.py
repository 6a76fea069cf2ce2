"""Write the tables of README and docs/ from benchmarks/results/: `python benchmarks/readme.py` (`--check` compares)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import readme_kernels
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
ABLATION = """
README's student, and students that lack a part of the loss: one discriminator or both, or one of the two distances.
"""
DEMO = """
The demo, {demo[iterations]} iterations on {demo[cores]} CPU cores, takes {minutes} minutes, {minutes_training} of them
training; its student has d {best[d]}, prompt accuracy {best[prompt]} and RMSE {best[RMSE]}.
"""
LEARN = """
Hinge loss on held-out pairs by iteration (2 is chance): of heads that only watch a
student (weight 1e-6), and of the student's own, who leaves them less and less to see.
"""
CURVE = "![Hinge losses on held-out pairs](hinge.svg)"
SEARCHED = """
On another draw of held-out captions, one seed, {search[iterations]} iterations, learning rate
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
    """How close the embedded teacher's student comes."""
    report, demo, demo_quality = map(load, ("ablation", "demo", "demo_quality"))
    floor, guided, unguided = report["reference"][:3]
    summary, settings = report["summary"], report["settings"]
    references = [(row["name"], figures(row)) for row in report["reference"]]
    rows = [*references[:3], *students(report)[:1], *references[3:]]
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
        "demo": demo,
        "best": figures(next(row for row in demo_quality["rows"] if row["name"] == "demo")),
    }
    parts = [MEASURED, rows_table(rows), VERDICT, DEMO]
    return "\n\n".join(part if part.startswith("|") else fill(part.format(**facts)) for part in parts)


def students(report: dict) -> list[tuple[str, dict[str, str]]]:
    """The rows of the student and of those that lack a part of the loss."""
    rows = {name: spread for name, spread in report["summary"].items() if name != WATCHING}
    means = {name: {key: value[0] for key, value in spread.items()} for name, spread in rows.items()}
    return [(name, figures(means[name], spread)) for name, spread in rows.items()]


def ablation() -> str:
    """The student, and what it is without each part of its loss."""
    return "\n\n".join([fill(ABLATION), rows_table(students(load("ablation")))])


def learning() -> str:
    """What the discriminators see: held-out losses."""
    runs, hinge = load("ablation")["runs"], []
    curves = [next(run["curve"] for run in runs if run["name"] == name) for name in (WATCHING, "student")]
    for (i, watching), (_, taught) in zip(*curves, strict=True):
        values = [curve[f"val_disc_{side}"] for curve in (watching, taught) for side in ("rel", "abs")]
        columns = ("watching: D_rel", "watching: D_abs", "student: D_rel", "student: D_abs")
        hinge.append((str(i), dict(zip(columns, map("{:.2f}".format, values), strict=True))))
    return "\n\n".join([fill(LEARN), CURVE, rows_table(hinge)])


def searched() -> str:
    """What settings of the discriminators were tried."""
    search, tried = load("search"), []
    for run in search["runs"]:
        first, last = run["curve"][0][1], run["curve"][-1][1]
        cells = {key: figures(run["row"])[key] for key in ("d", "prompt", "RMSE")}
        for side in ("rel", "abs"):
            cells[f"D_{side}"] = f"{first[f'val_disc_{side}']:.2f}, {last[f'val_disc_{side}']:.2f}"
        tried.append((run["name"], cells))
    return "\n\n".join([fill(SEARCHED.format(search=search)), rows_table(tried)])


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
    """How the embedded teacher was made and what it can do."""
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


def stops() -> str:
    """The campaign of stops."""
    found = load("stops")

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {n}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))

    return fill(STOPS.format(stops=found, signals=listed(found["by_signal"]), phases=listed(found["by_phase"])))


def full() -> str:
    """Full-size teachers, of the runs that are there."""
    runs = ("sd15", "5G"), ("sdxl", "14G"), ("sdxl", "8G")
    names = {run: f"full_teacher_{'_'.join(run)}" for run in runs}
    return readme_runs.full({run: load(name) for run, name in names.items() if there(name)})


# Section -> what writes it, the results without which it stays as it is
SECTIONS = {
    "quality": (quality, "ablation"), "teacher": (teacher, "teacher"), "ablation": (ablation, "ablation"),
    "learning": (learning, "ablation"), "search": (searched, "search"), "stops": (stops, "stops"),
    "full": (full, "full_teacher_sdxl_14G"),
}  # fmt: skip
# Section of one report, which a function of its name shows -> the report
RUNS = {"fits": "memory", "budgets": "memory", "speed": "step"}
RUNS |= {n: n for n in ("step", "trajectories", "memory", "job", "soak", "crowd", "distributed", "low_precision")}
KERNELS = {"operators": "kernels", "kernels": "kernels", "slot": "slot_time", "slot_table": "slot_time"}
for module, shown in ((readme_runs, RUNS), (readme_kernels, KERNELS)):
    for section, results in shown.items():
        SECTIONS[section] = (lambda m=module, s=section, r=results: getattr(m, s)(load(r)), results)
# Page -> its sections
PAGES = {"README.md": ("fits", "quality", "speed", "budgets", "job", "operators", "slot")}
PAGES["docs/results.md"] = tuple(name for name in SECTIONS if name not in PAGES["README.md"])


def there(name: str) -> bool:
    return (RESULTS / f"{name}.json").is_file()


def render(text: str, page: str, names: Sequence[str]) -> str:
    """`page` with its sections written anew, where their results are there."""
    for name in names:
        write, results = SECTIONS[name]
        if not there(results):
            continue
        place = re.search(f"<!-- {name}:begin -->.*?<!-- {name}:end -->", text, flags=re.S)
        if not place:
            sys.exit(f"{page} has no <!-- {name}:begin --> and <!-- {name}:end --> to show {results}.json")
        begin, end = place.span(0)
        text = f"{text[:begin]}<!-- {name}:begin -->\n\n{write()}\n\n<!-- {name}:end -->{text[end:]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    files: dict[str, Callable[[str], str]] = {
        page: lambda text, page=page, names=names: render(text, page, names) for page, names in PAGES.items()
    }
    files["docs/hinge.svg"] = lambda text: hinge_svg()
    if there("slot_time"):
        files["docs/slot_time.svg"] = lambda text: readme_kernels.slot_svg(load("slot_time"))
        files["docs/scaling.md"] = scaling.render
    for name, write in files.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        new = write(text)
        if arguments.check and new != text:
            sys.exit(f"{name} differs from benchmarks/results: python benchmarks/readme.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
