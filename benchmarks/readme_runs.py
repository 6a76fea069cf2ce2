"""What README and docs/results.md show of whole iterations and runs: each a function of the report that it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from tables import NONE, fill, rows_table, table

NAMES = {
    "sd15": "SD1.5, 512x512", "sdxl": "SDXL, 1024x1024", "embedded": "the embedded teacher, 64x64",
}  # fmt: skip
ABOUT = ("card", "limits", "tflop")  # of a model in results/step.json; all else is who was timed
BAR = 20  # characters of the longest bar
SPEED = """
Seconds of one training iteration (4 slots), batch 1, LoRA rank 1, bf16, random weights, on one {cards}. `stock`
is diffusers and peft with shared features and the slot as one CUDA graph, `compile` that under torch.compile, `naive`
eager diffusers and peft (bound by the Python of a host that other jobs shared). `lean` is rapm that makes norms and
GEGLU again in backward. `of the limit`: of the speed that the card's measured bf16 rate would allow. GiB are what the
allocator reserves. All compute the same losses.
"""
FITS = """
What fits, and how many times as long an iteration takes as with memory for everything; {card[device]}, its allocator
capped. `int8` and `nf4`: the frozen weights had to be held in 8 or 4 bits.
"""
STEP = """
Seconds of one iteration (4 slots, with the load of the next trajectory), batch 1, LoRA rank 1, random weights, bf16;
the embedded teacher as it is trained, in fp32. All compute the same losses, or nothing would be timed: `naive` is
eager diffusers and peft under autocast, with the features computed for each discriminator and each update; `stock` the
same libraries with shared features, one forward for both updates and the slot as one CUDA graph; `compile` that under
diffusers' regional torch.compile. `lean` is rapm that makes norms and GEGLU again in backward. `of the limit`: the
FLOP of 3 UNet and 4 encoder passes a slot at the card's measured bf16 rate. `ready` is the time until the first
iteration is done.
"""
TRAJECTORIES = """
Seconds of a trajectory of 40 guided steps, embeddings to latents, in bf16: diffusers' own pipeline as people call it,
and our solver, whose step is a CUDA graph. `of the limit`: the network's FLOP at the card's measured rate. {cards}.
"""
MEMORY = """
What a budget costs: an iteration under the plan for `--vram`, the allocator capped at it, in a process of its own, on
one {card[device]}, torch {card[torch]}, bf16, random weights. MiB are the process's by the driver where that says so,
otherwise what the allocator reserved. `slower` is over the iteration without a budget, `promised` and `predicted` are
what the plan said of the time and of the memory. `stock` is diffusers, peft and autocast with gradient checkpointing
of the student, as one CUDA graph, under the same cap.
"""
MOVED = """
SDXL under the {budget} plan of one {card[device]}, of which {mib:,.0f} MiB of a slot go to pinned host memory: moved by
ours, by others, or not at all, in turns in one process, eager (where the host's Python takes most of the time) and as
CUDA graphs. save_on_cpu waits for the host and can be no graph: its copies stand there for it, of activations only,
where it moves the frozen weights too. `more` is over an iteration of the same kind that moves nothing.
"""
JOB = """
The paper's SDXL job, {trajectories[count]:,} trajectories and {training[count]:,} iterations at rank 1, takes
**{hours:.2f} hours** on one {card[device]}{budget} (goal: under {goal_hours}): extrapolated from
{trajectories[measured]} trajectories of {trajectories[seconds]:.2f} s (batch {trajectories[batch]}) and
{training[measured]:,} iterations of {training[seconds]:.3f} s, random weights, without text encoders, validations,
checkpoints and export.
"""
ESTIMATE = """
Other cards, by estimate only: the slot's GPU time by family of kernels, scaled by the dense bf16 rates and the memory
bandwidths of the data sheets, and the slowdown that a plan for the card's memory is predicted to have. (`rapm plan`
counts operations instead, and says somewhat less.)
"""
SOAK = """
The embedded teacher for {iterations:,} iterations{of} in one process took {minutes:.0f} minutes on one {device}. From
the first to the last {window:,} iterations after a warm-up of {warm:,}, an iteration went from
{first[iteration_ms]:.2f} to {last[iteration_ms]:.2f} ms ({drift:+.1%}; bound {bounds[drift]:.0%}), allocated GPU memory
changed by {growth_mib[allocated_mib]:+.1f} MiB, reserved by {growth_mib[reserved_mib]:+.1f}, the host's by
{growth_mib[rss_mib]:+.1f} (bound {bounds[mib]:.0f}), open files by {handles:+d}. {skipped} updates were skipped;
{missing}.
"""
HALF = """
In {precision}, {slots:,} slots{of}: {skipped} updates skipped; {missing}.
"""
BITS = """
The same seed twice, {iterations} iterations, each in a process of its own: {default}; with PyTorch's deterministic
algorithms, {deterministic}.
"""
CROWD = """
When another process takes a card's memory in the middle of a run, and leaves the run the given MiB (one
{card[device]}): how it ended, and whether its LoRA, after the same command went on, was the undisturbed run's bit for
bit.
"""
FULL = """
Random pipelines of the published configs, from disk to pictures on one {device}, the allocator capped at `--vram`:
saved in fp16, loaded from a folder and from one file, trained for a few iterations in bf16, exported and proven in
stock diffusers, sampled. Seconds.
"""
DISTRIBUTED = """
Two GPUs as one run, {card[device]}, {model}, batch 1 on each. Against one process that computes the same from the same
global batches the largest differences are: {equal}.
"""


PRECISION = """
Frozen weights in int8 and nf4 on {card}, LoRA rank 1, bf16, random weights: an iteration of 4 captured
slots, memory, and how far the first slot's output, position and gradient of the LoRA are from fp32's (relative norms).
"""
JUDGED = """
The embedded teacher distilled under each on {card}, {iterations:,} iterations, mean ± deviation of {seeds} seeds,
judged on the fp32 teacher with {pairs:,} pairs, where the LoRA is used:
"""


def short(model: str) -> str:
    return NAMES[model].split(",")[0]


def gib(mib: float) -> str:
    return f"{mib / 1024:.1f}"


def on_card(found: Mapping) -> str:
    """Where a table was measured."""
    card = "one {device}, torch {torch}".format(**found["card"])
    return card + (", {bf16_tflops:.0f} TFLOP/s".format(**found["limits"]) if "limits" in found else "")


def not_measured(failed: Mapping[str, str]) -> list[str]:
    """A paragraph that names what has no figure, and why."""
    words = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
    return [fill(f"Not measured: {words}.")] if failed else []


def speed(report: Mapping) -> str:
    """The real models' iterations beside each other."""
    models = {model: report["models"][model] for model in NAMES if model in report["models"] and model != "embedded"}
    last = [*models.values()][-1]
    names = [name for name in last if name not in ABOUT]
    head = ["", *(title for model in models for title in (f"{short(model)} s", "over rapm", "of the limit", "GiB"))]
    rows = []
    for name in sorted(names, key=lambda name: last[name].get("seconds", math.inf)):
        cells = [name]
        for found in models.values():
            row = found.get(name, {"failed": "not run"})
            if "failed" in row:
                cells += ["not run" if row["failed"] == "not run" else "failed", NONE, NONE, NONE]
                continue
            over = f"{row['seconds'] / found['rapm']['seconds']:.2f}" if "seconds" in found["rapm"] else NONE
            cells += [f"{row['seconds']:.3f}", over, f"{_share(found, row):.0%}", gib(row["reserved_mib"])]
        rows.append(cells)
    devices = {short(model): found["card"]["device"] for model, found in models.items()}
    each = " and one ".join(f"{device} ({model})" for model, device in devices.items())
    cards = each if len({*devices.values()}) > 1 else last["card"]["device"]
    return "\n\n".join([fill(SPEED.format(cards=cards)), table([head, *rows])])


def _share(found: Mapping, row: Mapping) -> float:
    """Of the card's measured rate."""
    share: float = found["tflop"] / found["limits"]["bf16_tflops"] / row["seconds"]
    return share


def step(report: Mapping) -> str:
    parts, failed = [fill(STEP)], {}
    for model, found in sorted(report["models"].items(), key=lambda item: [*NAMES].index(item[0])):
        providers = {name: row for name, row in found.items() if name not in ABOUT}
        failed |= {f"{short(model)} {name}": row["failed"] for name, row in providers.items() if "failed" in row}
        done = {name: row for name, row in providers.items() if "failed" not in row}
        if not done:
            continue
        slowest, rows = max(row["seconds"] for row in done.values()), []
        for name, row in sorted(done.items(), key=lambda item: item[1]["seconds"]):
            cells = {
                "s": f"{row['seconds']:.3f}",
                "": "█" * max(1, round(BAR * row["seconds"] / slowest)),
                "over rapm": f"{row['seconds'] / done['rapm']['seconds']:.2f}" if "rapm" in done else "",
                "of the limit": "" if model == "embedded" else f"{_share(found, row):.0%}",  # which is of bf16
                "allocated GiB": gib(row["allocated_mib"]),
                "reserved GiB": gib(row["reserved_mib"]),
                "ready s": f"{row['ready_seconds']:.0f}",
            }
            rows.append((name, cells))
        parts += [f"**{NAMES[model]}**, {on_card(found)}", rows_table(rows)]
    return "\n\n".join(parts + not_measured(failed))


def trajectories(report: Mapping) -> str:
    rows = []
    for model, found in report["models"].items():
        each = {"stock, batch 1": found["stock"]} | {f"rapm, batch {n}": row for n, row in found["rapm"].items()}
        for name, row in each.items():
            cells = {
                "s": f"{row['seconds']:.3f}",
                "over the stock pipeline": f"{row['seconds'] / found['stock']['seconds']:.2f}",
                "of the limit": f"{row['share']:.0%}",
                "peak GiB": gib(row["mib"]),
            }
            rows.append((f"{short(model)} {name}", cells))
    cards = "; ".join(f"{short(model)}: {on_card(found)}" for model, found in report["models"].items())
    return "\n\n".join([fill(TRAJECTORIES.format(cards=cards)), rows_table(rows)])


def fits(report: Mapping) -> str:
    """What fits, and how much slower it is: a line for each budget, a column for each model at its own size."""
    shown = {case: found for case, found in _budgets(report).items() if "-" not in case[0] and len(found) > 1}
    rows = [["`--vram`", *(f"{NAMES[model]}, rank {rank}" for model, rank in shown)]]
    for budget in _falling({budget for found in shown.values() for budget in found} - {"none"}):
        cells = []
        for found in shown.values():
            row, whole = (found.get(name, {}).get("rapm", {}) for name in (budget, "none"))
            precision = row.get("frozen_weights", "full")
            slower = f"{row['seconds'] / whole['seconds']:.2f}" if "seconds" in row and "seconds" in whole else ""
            cells.append(slower + ("" if precision == "full" else f" ({precision})") if slower else _state(row))
        rows.append([budget, *cells])
    return "\n\n".join([fill(FITS.format(**report)), table(rows)])


def budgets(report: Mapping) -> str:
    """The tables in which the peer stands beside us."""
    return "\n\n".join([fill(MEMORY.format(**report)), *_tables(report, beside=True)])


def memory(report: Mapping) -> str:
    """The other tables, and who moves what to the host."""
    moved, mib = [], 0.0
    for key, row in report["rows"].items():
        kind, *_, budget = key.split()
        if kind == "move":
            still = report["rows"].get(f"{key.removesuffix(budget)}{_still(budget)}", {})
            moved.append((budget, _moved_cells(row, still)))
            mib = row.get("moved_mib", mib)
    last = [fill(MOVED.format(budget="8G", mib=mib, card=report["card"])), rows_table(moved)] if moved else []
    return "\n\n".join(_tables(report, beside=False) + last)


def _budgets(report: Mapping) -> dict[tuple[str, str], dict[str, dict[str, Mapping]]]:
    """By model and rank, budget, and whose: the rows; in order of models and ranks."""
    found: dict[tuple[str, str], dict[str, dict[str, Mapping]]] = {}
    for key, row in report["rows"].items():
        kind, model, rank, budget = key.split()
        if kind != "move":
            found.setdefault((model, rank), {}).setdefault(budget, {})[kind] = row
    return {case: found[case] for case in sorted(found, key=lambda case: (case[0], int(case[1])))}


def _falling(budgets: Iterable[str]) -> list[str]:
    """None first, then the larger ones."""
    return sorted(budgets, key=lambda budget: -math.inf if budget == "none" else -float(budget.rstrip("GB")))


def _tables(report: Mapping, beside: bool) -> list[str]:
    """Those in which `stock` was run, or was not."""
    parts = []
    for (model, rank), found in _budgets(report).items():
        if any("stock" in kinds for kinds in found.values()) != beside:
            continue
        fastest = found.get("none", {}).get("rapm", {})
        rows: list[tuple[str, dict[str, str]]] = []
        for budget in _falling(found):
            cells = _budget_cells(found[budget], fastest, beside)
            same = [rows.pop()[0]] if rows and rows[-1][1] == cells else []
            rows.append((", ".join([*same, budget]), cells))
        family, _, pixels = model.partition("-")
        name = f"{short(family)}, {pixels}x{pixels}" if pixels else NAMES[family]
        here = fastest.get("device", report["card"]["device"])
        other = f", on one {here}" if "device" in fastest else ""
        elsewhere: dict[str, list[str]] = {}
        for budget in _falling(found):
            for kind, row in found[budget].items():
                if (card := row.get("device", report["card"]["device"])) != here:
                    elsewhere.setdefault(card, []).append(f"{kind} at {budget}")
        other += "".join(f"; {', '.join(cases)}: one {card}" for card, cases in elsewhere.items())
        parts += [f"**{name}, rank {rank}**{other}", rows_table(rows)]
    return parts


def _still(mover: str) -> str:
    """Who moves nothing, and else does the same."""
    return "none-captured" if mover.endswith("-captured") else "none"


def _moved_cells(row: Mapping, still: Mapping) -> dict[str, str]:
    if "seconds" not in row:
        return {"s": row["failed"], "more": "", "allocated GiB": ""}
    more = f"{row['seconds'] - still['seconds']:+.3f}" if "seconds" in still else ""
    return {"s": f"{row['seconds']:.3f}", "more": more, "allocated GiB": gib(row["allocated_mib"])}


def _state(row: Mapping) -> str:
    """Why a row has no seconds."""
    if not row:
        return "not run"
    if row["failed"].startswith("out of memory"):
        return "out of memory"
    return "refused" if "too little" in row["failed"] else "failed"


def _budget_cells(found: Mapping[str, Mapping], fastest: Mapping, beside: bool) -> dict[str, str]:
    """A budget's row: ours, and the peer's."""
    ours, stock = found.get("rapm", {}), found.get("stock", {})
    names = ("s", "slower", "promised", "MiB", "predicted", "moved MiB", *(("stock s", "stock MiB") if beside else ()))
    cells = dict.fromkeys(names, NONE)
    for name, row in (("", ours), ("stock ", stock))[: 1 + beside]:
        if "seconds" in row:
            held = row.get("process_mib") or row["reserved_mib"]
            cells |= {f"{name}s": f"{row['seconds']:.3f}", f"{name}MiB": f"{held:,.0f}"}
        else:
            cells[f"{name}s"] = _state(row)
    if "seconds" in ours:
        cells["predicted"] = f"{ours.get('final_predicted_mib', ours['predicted_mib']):,.0f}"
        cells["moved MiB"] = f"{ours.get('moved_mib', 0):,.0f}"
        if "promised" in ours:
            cells["promised"] = f"{ours['promised']:.2f}"
        if "seconds" in fastest:
            cells["slower"] = f"{ours['seconds'] / fastest['seconds']:.2f}"
    return cells


def job(report: Mapping) -> str:
    if "hours" not in report:
        return fill("Only a part of the whole job was measured yet: " + ", ".join(report["stages"]) + ".")
    budget = "" if report["vram"] == "auto" else f" within {report['vram']}"
    parts = [fill(JOB.format(**report, **report["stages"], budget=budget))]
    if "estimates" in report:
        rows = [
            (
                f"{name}, {row['gib']:.0f} GB",
                {"hours, estimated": f"{row['hours']:.0f}", "a slot takes": f"{row['times']:.1f} times as long",
                 "for its memory": f"{row['slowdown']:.2f} times"},
            )
            for name, row in report["estimates"].items()
        ]  # fmt: skip
        parts += [fill(ESTIMATE), rows_table(rows)]
    return "\n\n".join(parts)


def soak(report: Mapping) -> str:
    parts = []
    for name in ("soak", "bf16", "fp16"):
        if (found := report.get(name)) is None:
            continue
        done, wanted = found["iterations"], found["wanted"]
        of = "" if done == wanted else f" (of {wanted:,} that were asked for: the time was up)"
        missing = "; ".join(found["missing"]) or "every line, checkpoint and picture was there, and finite"
        facts = {**found, "of": of, "missing": missing, "device": report["card"]["device"]}
        parts.append(fill((SOAK if name == "soak" else HALF).format(**facts, minutes=found["seconds"] / 60)))
    if (found := report.get("same_bits")) is not None:
        words = {name: _bits(found[name]) for name in ("default", "deterministic")}
        parts.append(fill(BITS.format(iterations=found["iterations"], **words)))
    return "\n\n".join(parts)


def _bits(found: Mapping) -> str:
    if found["same"]:
        return "the same LoRA bit for bit"
    return f"{found['different']} of {found['of']} tensors differ, by {found['largest']:.1e} at the most"


def crowd(report: Mapping) -> str:
    rows = []
    for spare, found in report["cases"].items():
        how = "went on with less kept" if found["stepped_down"] else "went on"
        cells = {
            "crowded at": str(found["crowded_at"]),
            "how it ended": how
            if found["code"] == 0
            else f"exit code {found['code']} at {found['ended_at']}, one line",
            "the same LoRA": "yes" if found["same_lora"] else "no",
        }
        rows.append((f"{spare} MiB", cells))
    return "\n\n".join([fill(CROWD.format(**report)), rows_table(rows)])


def full(report: Mapping[tuple[str, str], Mapping]) -> str:
    """`report`: by model and budget, what tests/test_full_teacher.py wrote."""
    rows = []
    for (model, budget), found in report.items():
        cells = {stage: f"{seconds:.0f}" for stage, seconds in found["seconds"].items()}
        cells |= {
            "one iteration": f"{found['seconds_per_iteration']:.3f}",
            "GPU GiB": gib(found["vram_mib"]),
            "host GB": f"{found['host_peak_gb']:.1f}",
            "LoRA MB": f"{found['lora_mb']:.1f}",
        }
        rows.append((f"{NAMES[model]}, {budget}", cells))
    device = next(iter(report.values()))["card"]["device"]
    return "\n\n".join([fill(FULL.format(device=device)), rows_table(rows)])


def distributed(report: Mapping) -> str:
    equal = ", ".join(f"{name} {value:.1e}" for name, value in report["equal"].items())
    rows = []
    for ranks, found in report.get("ranks", {}).items():
        cells = {f"{name} a second": f"{found[name]:.2f}" for name in ("trajectories", "slots")}
        rows.append((f"{ranks} GPU{'s' * (int(ranks) > 1)}", cells))
    if report["speedup"]:
        rows.append(("times", {f"{name} a second": f"{factor:.2f}" for name, factor in report["speedup"].items()}))
    told = fill(DISTRIBUTED.format(card=report["card"], model=NAMES[report["model"]], equal=equal))
    return "\n\n".join([told, *([rows_table(rows)] if rows else [])])


def low_precision(report: Mapping) -> str:
    parts, rows, slots = [], [], report.get("slots", {"models": {}})
    for model, modes in slots["models"].items():
        for mode, row in modes.items():
            cells = {"s": f"{row['seconds']:.3f}", "weights GiB": gib(row["weights_mib"])}
            cells["reserved GiB"] = gib(row["reserved_mib"])
            cells |= {name: f"{row['to_fp32'][name]:.1e}" for name in ("output", "position", "gradient")}
            rows.append((f"{short(model)} {mode}", cells))
    parts += [fill(PRECISION.format(card=on_card(slots))), rows_table(rows)] if rows else []
    if (found := report.get("quality")) is not None:
        judged = []
        for mode, spread in found["summary"].items():
            forms = {"d": "{:.2f}", "prompt": "{:.1%}", "rmse": "{:.4f}"}
            cells = {key: " ± ".join(form.format(x) for x in spread[key]) for key, form in forms.items()}
            judged.append((mode, cells))
        parts += [fill(JUDGED.format(**{**found, "card": on_card(found)})), rows_table(judged)]
    return "\n\n".join(parts)
