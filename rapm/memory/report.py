"""A plan in words: for `rapm plan`, and for a run's first lines."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rapm.config import Config, parse_vram
from rapm.device import DTYPES, no_gpu
from rapm.errors import UserError
from rapm.loading.families import model_of
from rapm.memory import cards, host
from rapm.memory.cards import GIB, MIB
from rapm.memory.planner import Plan, Planner, planned
from rapm.memory.saved import Policy
from rapm.solver import check_grid


def precision_words(planner: Planner) -> str | None:
    """What becomes of the frozen weights, and why; None where they stay whole."""
    words = {"int8": "linear layers in int8", "nf4": "linear layers in nf4 (4 bits), convolutions in int8"}
    if (mode := planner.config.frozen_weights) == "full":
        return None
    why = ", as no plan fits this budget without: the teacher is a near one" if planner.asked == "auto" else ""
    if planner.stored:
        why = ", as the trajectories that are here were made with"
    return f"frozen weights: {words[mode]}{why}"


def host_words(planner: Planner, plan: Plan) -> str:
    """The host memory that a run needs, and how much there is where a plan has looked."""
    phase = max(plan.host, key=plan.host.__getitem__)
    there = "" if planner.host is None else f", of {planner.host / GIB:.1f} that it may have"
    return f"host: {plan.host[phase] / GIB:.1f} GiB of memory at the most ({phase}){there}"


def export_words(plan: Plan) -> str:
    """How the files are proven."""
    if not plan.proven:
        return "not sampled in stock diffusers: the host has no room for a stock pipeline"
    if not plan.stock_by_blocks:
        return "beside the stock UNet"
    return f"{'ours waits on the host, ' * plan.unet_waits}the stock UNet comes by blocks"


def grouped(policies: dict[str, Policy]) -> list[tuple[str, str]]:
    """(policy, its layers), runs of layers of a block joined: "up_blocks.0.0-2"."""
    by_policy: dict[str, list[str]] = {}
    for name, policy in policies.items():
        by_policy.setdefault(str(policy), []).append(name)
    lines = []
    for words, names in by_policy.items():
        blocks: dict[str, list[int]] = {}
        for name in names:
            block, _, i = name.rpartition(".")
            blocks.setdefault(block, []).append(int(i))
        parts = []
        for block, found in blocks.items():
            run = found == list(range(found[0], found[-1] + 1)) and len(found) > 1
            parts.append(f"{block}.{found[0]}-{found[-1]}" if run else ", ".join(f"{block}.{i}" for i in found))
        lines.append((words, ", ".join(parts)))
    return lines


def report(planner: Planner, plan: Plan) -> str:
    """What `rapm plan` prints."""
    config, model, card = planner.config, planner.model, plan.card
    resolutions = ", ".join(f"{height}x{width}" for height, width in config.resolutions or (model.resolution,))
    budget = "no limit" if plan.budget is None else f"{plan.budget / GIB:.1f} GiB"
    rates = f"{card.tflops:.0f} TFLOP/s, {card.bandwidth:.0f} GB/s, {card.link:.0f} GB/s to the host"
    hours = config.max_train_steps * plan.seconds / 3600
    count = config.trajectories + config.validation_prompts
    solve = count * plan.solve_seconds / 3600
    precision = config.mixed_precision.replace("no", "fp32")
    batch = f"{plan.solve_batch} trajectories at a time"
    notes = {
        "encode": "the UNet waits on the host" if plan.unet_waits else "beside the UNet",
        "solve": batch,
        "train": ", ".join(["targets on a second stream"] * plan.beside
                           + ["real features one by one"] * (not plan.together)),
        "validate": ", ".join([batch] + ["the UNet waits on the host while the VAE decodes"] * plan.unet_waits
                              + ["decoded in tiles"] * plan.tiled),
        "export": export_words(plan),
    }  # fmt: skip
    lines = [
        f"{model.name}, {resolutions}, LoRA rank {config.lora_rank}, {precision}, budget {budget}",
        f"card: {card.name} ({'measured' if card.measured else 'data sheet'}: {rates})",
        *filter(None, [host_words(planner, plan), precision_words(planner)]),
        "",
        "memory of the process, GiB (predicted)",
        "             card   host",
        *(
            f"  {phase:<9}{size / GIB:6.2f} {plan.host[phase] / GIB:6.2f}  {notes[phase]}".rstrip()
            for phase, size in plan.phases.items()
        ),
        "",
        "kept for backward, by layer",
    ]
    for kind, policies in (("student", plan.student), ("encoder", plan.encoder)):
        lines += [f"  {kind:<9}{policy:<22}{names}" for policy, names in grouped(policies)]
    if plan.moved:
        lines.append(f"  {plan.moved / MIB:.0f} MiB a slot go to pinned host memory and back")
    lines += [
        "",
        f"{plan.seconds:.2f} s an iteration, {plan.slowdown:.2f} times that of this card without a budget",
        f"{hours:.1f} h for {config.max_train_steps} iterations, {solve:.1f} h for {count} trajectories",
        f"{planner.disk() / GIB:.2f} GiB of disk for the trajectories",
    ]  # fmt: skip
    return "\n".join(lines)


def plan_for(config: Config) -> str:
    """The report for `config`: on this machine and its GPU, else on the smallest card of the table with the budget.

    UserError for a teacher or steps that `rapm train` refuses, a budget that cannot work, and `auto` without a GPU.
    """
    budget, card, memory, model = parse_vram(config.vram), None, None, model_of(config.teacher)
    check_grid(model.timesteps, config.steps, config.fine_steps)
    name = config.device.replace("auto", "cuda")
    if name.startswith("cuda") and no_gpu(name) is None:
        index = torch.device(name).index
        device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        torch.cuda.set_device(device)  # what is measured is on the current one
        card = cards.this_card(device, DTYPES[config.mixed_precision])
        budget, memory = cards.granted(device, budget), host.limit()
    elif budget is None:
        raise UserError("plan: there is no GPU here, so say for which budget: --vram 12G")
    planner, plan = planned(model, config, card, budget, memory)
    free = shutil.disk_usage(_existing(Path(config.output_dir))).free
    lines = [report(planner, plan)]
    if model.guessed:
        lines.append(f"note: {config.teacher} is not here: taken for {model.name} by its name")
    if planner.disk() > free:
        lines.append(f"warning: the disk of {config.output_dir} has only {free / GIB:.2f} GiB free")
    return "\n".join(lines)


def _existing(path: Path) -> Path:
    """The path or its nearest parent that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
