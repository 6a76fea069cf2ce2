"""Write the README's tables from benchmarks/results/: `python benchmarks/readme.py` (`--check` only compares)."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
WATCHING = "discriminators that only watch"  # benchmarks/quality.py
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = {
    "calls": ("calls", "{:.0f}"), "fd": ("FD", "{:.2f}"), "d": ("d", "{:.2f}"), "prompt": ("prompt", "{:.1%}"),
    "digit": ("digit", "{:.1%}"), "background": ("background", "{:.1%}"), "diversity": ("diversity", "{:.2f}"),
    "rmse": ("RMSE", "{:.4f}"),
}  # fmt: skip


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def fill(text: str) -> str:
    return textwrap.fill(text, 118, break_on_hyphens=False)


def rows_table(rows: list[tuple[str, dict[str, str]]]) -> str:
    """A Markdown table with the columns of its first row."""
    columns = [*rows[0][1]]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells[c] for c in columns) + " |" for name, cells in rows])


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
    n, whole = settings["steps"], settings["steps"] * settings["fine_steps"]
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

    best, seconds = figures(demo_quality["rows"][-1]), demo["seconds"]
    seeds, d = sum(run["name"] == "student" for run in report["runs"]), summary["student"]["d"][0]
    parts = [
        fill(
            f"Measured on the embedded teacher: {report['trajectories']} trajectories, {report['iterations']}"
            f" iterations, guidance {settings['guidance']}, LoRA rank {settings['lora_rank']}, {report['pairs']} held-out"
            f" caption and seed pairs, {report['device']}, torch {report['torch']}; mean ± deviation of {seeds} seeds. FD"
            " is the Frechet distance, in the features of a judge trained on real renders, to the teacher's"
            f" {whole}-step samples of the same captions from other noise; d is FD minus the floor, which is the"
            f" teacher's own {whole} steps; `prompt` is the share of pictures in which everything the caption says is"
            " right; RMSE is to the teacher's endpoints from the same noise, in pixels of [0, 1]."
        ),
        rows_table(rows),
        fill(
            f"The student's d is {d / guided['d']:.2f} of the guided teacher's in {n} steps (which cost twice the"
            f" network calls) and {d / unguided['d']:.3f} of the unguided teacher's. The guided teacher's {n} steps are"
            f" {guided['fd'] / floor['fd']:.0f} floors away from its {whole}."
        ),
        fill(
            f"The demo, {demo['iterations']} iterations on {demo['cores']} CPU cores, takes"
            f" {seconds['in all'] / 60:.1f} minutes, {seconds['training'] / 60:.1f} of them training; its student has d {best['d']}, prompt accuracy"
            f" {best['prompt']} and RMSE {best['RMSE']}."
        ),
        fill(
            "**The discriminators learn.** Hinge loss on held-out pairs by iteration (2 is chance): of heads that only"
            " watch a student (weight 1e-6), and of the student's own, who leaves them less and less to see."
        ),
        rows_table(hinge),
        fill(
            f"**What was searched**, on other captions, one seed, {search['iterations']} iterations, learning rate"
            f" {search['settings']['learning_rate']}: the weight of both generator terms, re-noising as a share of the"
            " slot, the heads' learning rate (1e-3 where none is named), a replay of past features, a late start."
            " D_rel and D_abs are held-out hinge losses, a quarter in and at the end."
        ),
        rows_table(tried),
    ]
    return "\n\n".join(parts)


def render(text: str) -> str:
    """The README with its generated section written anew."""
    section = r"(<!-- quality:begin -->\n).*?(<!-- quality:end -->)"
    return re.sub(section, lambda m: f"{m[1]}\n{quality()}\n\n{m[2]}", text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    new = render(text)
    if arguments.check:
        sys.exit("README.md differs from benchmarks/results: python benchmarks/readme.py" if new != text else 0)
    path.write_text(new)


if __name__ == "__main__":
    main()
