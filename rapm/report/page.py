"""`rapm report`: a run as one HTML page that needs nothing else: curves as SVG, grids inside, nothing loaded.

It reads what a run has written (config.toml, metrics.jsonl, samples.png, samples/, evaluation.json, README.md), so a
run that still goes on, or was stopped, has a report too. A figure that no chart names gets one of its own; what cannot
be read is left out, with a note in its place: a damaged file is to end no run that has just finished.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open

from rapm.config import PRESETS, Config
from rapm.disk import write_atomic
from rapm.evaluate.record import RECORD
from rapm.export.clients import WORKFLOW
from rapm.export.lora_file import WEIGHTS
from rapm.log import METRICS, read_metrics
from rapm.report.chart import Chart, svg

REPORT, PLAN = "report.html", "plan.json"
WIDE, NARROW, SHOWN = 1600, 800, 5  # pixels across: the last grid, an earlier one; how many of these

CLOSENESS = (
    Chart("Distance to the teacher", "FD in the teacher's own features; less is closer. The flat line is what the "
          "teacher's own pictures of the same prompts score.", {"val_fd": "student", "val_fd_floor": "teacher"}),
    Chart("Latent error", "RMSE to the teacher's endpoints from the same noise, held-out prompts.",
          {"val_rmse": "student"}),
    Chart("Pictures", "Student over teacher, held-out prompts: 1 is the teacher's.",
          {"val_saturation": "saturation", "val_contrast": "contrast", "val_diversity": "diversity of seeds"}, 1.0),
)  # fmt: skip
TRAINING = (
    Chart("Distance losses", "Pseudo-Huber to the relative and the absolute target.",
          {"huber_rel": "relative", "huber_abs": "absolute"}),
    Chart("Student loss", "All terms, weighted.", {"loss": "loss"}),
    Chart("Adversarial terms", "What the heads charge the student.", {"gen_rel": "D_rel", "gen_abs": "D_abs"}),
    Chart("Discriminators, training", "Hinge loss; 2 is chance.", {"disc_rel": "D_rel", "disc_abs": "D_abs"}, 2.0),
    Chart("Discriminators, held out", "Hinge loss on held-out pairs; 2 is chance.",
          {"val_disc_rel": "D_rel", "val_disc_abs": "D_abs"}, 2.0),
    Chart("How often the heads are right", "Share of positions, held-out pairs; 0.5 is chance.",
          {"val_acc_rel_real": "D_rel, real", "val_acc_rel_fake": "D_rel, fake", "val_acc_abs_real": "D_abs, real",
           "val_acc_abs_fake": "D_abs, fake"}, 0.5),
    Chart("Gradient norms", "Before clipping, on a logarithmic scale.",
          {"grad_norm": "LoRA", "head_grad_norm": "heads"}, log=True),
    Chart("Learning rate", "Of the LoRA.", {"lr": "LoRA"}),
)  # fmt: skip
MACHINE = (
    Chart("Speed", "Iterations per second, since the start.", {"iterations_per_second": "iterations/s"}),
    Chart("GPU memory", "Peak of what PyTorch has allocated, in MiB.", {"vram_mib": "peak"}),
    Chart("Skipped updates", "Losses or gradients that were not finite, so far.", {"skipped": "updates"}),
)
Series = dict[str, list[tuple[int, float]]]  # figure -> (iteration, value)
# What reading raises of a damaged file: from the disk, safetensors, Pillow; of JSON also where it is not what we wrote.
DAMAGE = (
    OSError, SafetensorError, EOFError, SyntaxError, Image.DecompressionBombError,
    ValueError, LookupError, TypeError, AttributeError, RecursionError,
)  # fmt: skip


class Unreadable(Exception):
    """A damaged file: what shows it is left out, with these words in its place."""


def write_report(folder: Path) -> Path:
    """`report.html` in a run's folder. UserError where there is no run."""
    folder = Path(folder)
    config, (lines, damaged) = Config.of_run(folder), read_metrics(folder / METRICS)
    write_atomic(folder / REPORT, page(folder, config, lines, damaged).encode(errors="replace"))
    return folder / REPORT


def page(folder: Path, config: Config, lines: list[dict[str, Any]], damaged: int) -> str:
    """The report as HTML. `damaged`: lines of metrics.jsonl that could not be read."""
    series = _series(lines)
    done = max((line["iteration"] for line in lines), default=0)
    last = {name: points[-1][1] for name, points in series.items()}
    name = Path(config.teacher).name if config.teacher != "embedded" else "the embedded teacher"
    best = min(series.get("val_fd", []), key=lambda point: point[1], default=None)
    slots = _slot_charts(series, config.steps)
    known = {figure for chart in CLOSENESS + TRAINING + MACHINE + slots for figure in chart.figures} | {"seconds"}
    rest = [Chart(figure, "", {figure: figure}) for figure in series if figure not in known]
    state = "finished" if done >= config.max_train_steps else "not finished"
    state = ", ".join(filter(None, (state, _time(last.get("seconds")))))
    sections = [
        _tiles(series, last, best, done, config),
        _warnings(lines),
        _note(f"damaged lines of metrics.jsonl ({damaged})") if damaged else "",
        _section("Pictures", _pictures, folder),
        _section("How close", _charts, CLOSENESS, series, best),
        _section("How to use the file", _use, folder, config),
        _section("Measured", _evaluation, folder / RECORD),
        _section("Training", _charts, TRAINING + slots, series),
        _section("Machine", _charts, (*MACHINE, *rest), series),
        _section("Plan", _plan, folder, config, last, done),
        _section("Settings", _settings, config),
        _section("Last figures", _table, sorted(last.items()), ("figure", "value"), "all figures"),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{escape(f"RAPM report: {folder.resolve().name}")}</title>
<style>{Path(__file__).with_name("report.css").read_text("utf-8")}</style>
</head>
<body>
<header>
<p class="kicker">RAPM report · {escape(folder.resolve().name)}</p>
<h1>A {config.steps}-step LoRA of {escape(name)}</h1>
<p>{done:,} of {config.max_train_steps:,} iterations, {state}.</p>
</header>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""


def _series(lines: list[dict[str, Any]]) -> Series:
    """figure -> (iteration, value), finite ones only."""
    series: Series = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("iteration", "warning") and math.isfinite(value):
                series.setdefault(name, []).append((line["iteration"], value))
    return series


def _slot_charts(series: Series, steps: int) -> tuple[Chart, ...]:
    return tuple(
        Chart(f"D_{side} by slot, held out", "Hinge loss; slot 0 starts at the noise. 2 is chance.",
              {name: f"slot {n}" for n in range(steps) if (name := f"val_disc_{side}_slot{n}") in series}, 2.0)
        for side in ("rel", "abs")
    )  # fmt: skip


def _tiles(series: Series, last: dict[str, Any], best: tuple[int, float] | None, done: int, config: Config) -> str:
    tiles = []
    if best:
        floor = f"the teacher's own: {last['val_fd_floor']:.2f}"
        tiles.append(("FD to the teacher", f"{last['val_fd']:.2f}", floor))
        tiles.append(("best checkpoint", f"{best[0]:,}", f"FD {best[1]:.2f}"))
    for figure, words in (
        ("val_saturation", "saturation"),
        ("val_contrast", "contrast"),
        ("val_diversity", "diversity"),
    ):
        if figure in last:
            tiles.append((words, f"{last[figure]:.0%}", "of the teacher's"))
    if "iterations_per_second" in last:
        tiles.append(("speed", f"{last['iterations_per_second']:.3g}", "iterations/s"))
    if "vram_mib" in last:
        tiles.append(("GPU memory", f"{last['vram_mib'] / 1024:.1f}", "GiB at the peak"))
    cards = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(cards)}</dl>' if tiles else ""


def _warnings(lines: list[dict[str, Any]]) -> str:
    found = [line for line in lines if "warning" in line]
    if not found:
        return '<p class="fine">No warnings.</p>' if lines else ""
    items = (f"<li><b>{line['iteration']:,}</b> {escape(line['warning'])}</li>" for line in found)
    return f'<section class="warn"><h2>Warnings</h2><ul>{"".join(items)}</ul></section>'


def _pictures(folder: Path) -> str:
    """The last grid, and evenly spaced earlier ones: those that the run has numbered."""
    parts = []
    if (folder / "samples.png").exists():
        caption = "What the file draws, from the same noise as the teacher"
        parts.append(_shown(_figure, folder / "samples.png", caption, WIDE))
    earlier = sorted(path for path in (folder / "samples").glob("*.png") if path.stem.isdecimal())
    if not parts and earlier:
        parts.append(_shown(_figure, earlier.pop(), "The newest so far", WIDE))
    if earlier:
        count = min(SHOWN, len(earlier))
        chosen = [earlier[(i + 1) * len(earlier) // count - 1] for i in range(count)]
        grids = "".join(_shown(_figure, path, f"Iteration {int(path.stem):,}", NARROW) for path in chosen)
        parts.append(f"<details><summary>How it got there</summary>{grids}</details>")
    return "".join(parts)


def _figure(path: Path, caption: str, width: int) -> str:
    with _reading(path), Image.open(path) as image:
        names = "".join(f"<li>{escape(prompt)}</li>" for prompt in json.loads(image.info.get("prompts", "[]")))
        image = image.convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "png", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    below = f"<ol>{names}</ol>" if names and width == WIDE else ""
    image = f'<div class="wide"><img src="{source}" alt="Grid of samples"></div>'
    return f'<figure class="grid"><figcaption>{escape(caption)}</figcaption>{image}{below}</figure>'


def _charts(charts: Iterable[Chart], series: Series, best: tuple[int, float] | None = None) -> str:
    mark = best[0] if best else None
    drawn = [
        svg(c, series, mark if "val_fd" in c.figures else None) for c in charts if any(f in series for f in c.figures)
    ]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _use(folder: Path, config: Config) -> str:
    """The recipe, and the snippet of the model card."""
    if not (folder / WEIGHTS).exists():
        return "<p>Not exported yet.</p>"
    known = (folder / WORKFLOW).is_file()
    elsewhere = "the model card says how in ComfyUI, A1111 and Forge" if known else "others do not know its base model"
    text = (
        f"<p><code>{WEIGHTS}</code>{_steps(folder / WEIGHTS)}: strength 1.0, <b>DDIM</b>, <b>{config.steps} steps</b>, "
        f"<b>CFG 1</b>, trailing timesteps in diffusers; {elsewhere}.</p>"
        f'<p>From here: <code>rapm sample "a prompt" --lora {escape(shlex.quote(str(folder)))}</code></p>'
    )
    return text + _shown(_snippet, folder / "README.md")


def _steps(path: Path) -> str:
    """Which iteration the file is of: its header says."""
    with _reading(path), safe_open(path, framework="pt") as file:
        steps = (file.metadata() or {}).get("ss_steps")
        return f" (of iteration {int(steps):,})" if steps else ""


def _snippet(card: Path) -> str:
    """The Python of the model card."""
    if not card.exists():
        return ""
    with _reading(card):
        text = card.read_text("utf-8")
    snippet = text.partition("```python\n")[2].partition("```")[0]
    return f"<p>In diffusers:</p><pre>{escape(snippet)}</pre>" if snippet else ""


def _evaluation(path: Path) -> str:
    """The tables of `rapm evaluate`, each with its protocol."""
    if not path.exists():
        return ""
    parts = []
    with _reading(path):
        report = json.loads(path.read_text("utf-8"))
        for part in [report, *report.get("figures", [])]:
            if part.get("rows"):
                columns = list(dict.fromkeys(name for row in part["rows"] for name in row))
                parts.append(_table([[row.get(c, "") for c in columns] for row in part["rows"]], columns))
                parts.append(_table(part["protocol"].items(), ("protocol", ""), "how it was measured"))
    return "".join(parts)


def _plan(folder: Path, config: Config, last: dict[str, Any], done: int) -> str:
    """What was to be done, in which memory, and how long it takes."""
    slots, fine = config.steps, config.steps * config.fine_steps
    rows = [
        ("trajectories", f"{config.trajectories:,} to train on, {config.validation_prompts} held out"),
        ("teacher", f"{slots} slots of {config.fine_steps} DDIM steps = {fine}, guidance {config.guidance:g}"),
        ("student", f"LoRA of rank {config.lora_rank}, {slots} steps without guidance"),
        ("training", f"{config.max_train_steps:,} iterations of {slots} slots, batch 1"),
        ("memory", f"budget {config.vram}"),
    ]
    if (folder / PLAN).exists():
        with _reading(folder / PLAN):
            plan = json.loads((folder / PLAN).read_text("utf-8"))
            phases = ", ".join(f"{name} {size / 1024:.1f} GiB" for name, size in plan["phases"].items())
            rows[-1:] = [
                ("memory", f"budget {plan['budget'] / 1024:.1f} GiB; planned: {phases}"),
                ("kept and recomputed", f"{plan['summary']}; {plan['slowdown']:.2f} times as long as without a limit"),
            ]
    if last.get("iterations_per_second"):
        left = (config.max_train_steps - done) / last["iterations_per_second"]
        rows.append(("time", f"{_time(last.get('seconds'))} so far, {_time(left) or 'nothing'} to go"))
    return _table(rows, ("", ""))


def _settings(config: Config) -> str:
    """Every setting; those that differ from the preset's default stand out."""
    usual = next((Config.preset(n) for n, p in PRESETS.items() if p.get("teacher") == config.teacher), Config())
    rows = []
    for name, value in dataclasses.asdict(config).items():
        changed = value != getattr(usual, name)
        rows.append((f"<b>{name}</b>" if changed else name, escape("" if value is None else str(value))))
    table = f'<div class="wide"><table>{"".join(f"<tr><td>{a}</td><td>{b}</td></tr>" for a, b in rows)}</table></div>'
    return f"<details><summary>all settings; bold ones are not the default</summary>{table}</details>"


def _table(rows: Iterable[Iterable[object]], columns: Iterable[str], folded: str = "") -> str:
    def text(value: object) -> str:
        return escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{escape(c)}</th>" for c in columns) if any(columns) else ""
    body = "".join(f"<tr>{''.join(f'<td>{text(x)}</td>' for x in row)}</tr>" for row in rows)
    table = f'<div class="wide"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'
    return f"<details><summary>{escape(folded)}</summary>{table}</details>" if folded else table


def _section(title: str, part: Callable[..., str], *given: object) -> str:
    body = _shown(part, *given)
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _shown(part: Callable[..., str], *given: object) -> str:
    """The part, or a note in its place."""
    try:
        return part(*given)
    except Unreadable as error:
        return _note(str(error))


def _note(text: str) -> str:
    return f'<p class="fine">Not shown: {escape(text)}.</p>'


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Around what reads the file, and nothing else: elsewhere such an error is a mistake of ours."""
    try:
        yield
    except DAMAGE as error:
        raise Unreadable(f"{path.name} cannot be read ({type(error).__name__}: {error})") from error


def _time(seconds: float | None) -> str:
    if not seconds:
        return ""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
