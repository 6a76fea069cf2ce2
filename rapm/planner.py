"""Which plan fits a budget and is the fastest that does: memory by phase, a policy for each layer, seconds, disk.

Memory is counted (rapm/memory.py); what cannot be counted, and all rates, are in rapm/cards.py. The choice is exact up
to the grain of its table: over all layers of the student's and the discriminators' pass, the policies of least added
time whose kept bytes fit. Copies to the host count only as far as the passes do not hide them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from rapm import cards
from rapm.cards import GIB, MIB, Card
from rapm.config import Config
from rapm.device import DTYPES
from rapm.errors import UserError
from rapm.families import Model, latents_of
from rapm.kernels.disc_head import layout
from rapm.memory import TOKENS, Pass, count_encoder, count_student, meta_unet
from rapm.offload import WINDOWS
from rapm.saved import LEVELS, Policy

PHASES = ("encode", "solve", "train", "validate", "export")
CELLS = 1200  # of the choice's table, over all that can be kept
MOVED_CELLS = 96  # over all that can be moved to the host


class Sizes(NamedTuple):
    """A job's bytes, and its passes."""

    weights: int  # of the UNet
    lora: int  # numbers in the LoRA
    targets: int  # layers that it extends
    heads: int  # numbers in the heads
    features: int  # bytes of one set of features
    text: int  # bytes of the text encoders, in fp32
    vae: int  # bytes of the VAE, in fp32
    pixels: int
    student: Pass
    encoder: Pass
    trajectory: int  # bytes of one in the store

    @property
    def state(self) -> int:
        """LoRA and heads: fp32 weights, gradient, two moments."""
        return 16 * (self.lora + self.heads)

    @property
    def flops(self) -> float:
        """Of a slot: two passes of the student and a backward, three of the encoder and a backward."""
        return 3 * self.student.flops + 4 * self.encoder.flops


@dataclass(frozen=True)
class Plan:
    """What a run does within `budget` bytes of the card (None: no limit)."""

    budget: int | None
    card: Card
    student: dict[str, Policy] = field(default_factory=dict)
    encoder: dict[str, Policy] = field(default_factory=dict)
    kept: int = 0  # bytes that a slot keeps for backward on the card
    moved: int = 0  # bytes that it moves to the host
    window: int = WINDOWS[0]  # bytes under way each way, and so how far the copies run ahead
    solve_batch: int = 1
    together: bool = True  # both real features in one pass of two rows, or one after the other
    aside: bool = False  # the UNet waits on the host while text encoders or VAE work
    tiled: bool = False  # the VAE decodes tile by tile
    apart: bool = False  # at the export, ours and the stock UNet take turns on the card
    phases: dict[str, int] = field(default_factory=dict)  # bytes of the process, by phase
    seconds: float = 0.0  # an iteration
    slowdown: float = 1.0  # over the same card without a budget
    solve_seconds: float = 0.0  # a trajectory


def sizes_of(model: Model, config: Config) -> Sizes:
    """Everything that a plan for `config` needs to know of `model`. UserError for a resolution it cannot have."""
    dtype = DTYPES[config.mixed_precision]
    c, h, w = latents = latents_of(model, config.resolution)
    unet = meta_unet(model.unet, dtype)
    channels = unet.feature_channels
    targets = unet.lora_targets()
    lora = 0
    for layer in targets.values():
        out, inputs, *kernel = layer.weight.shape
        lora += config.lora_rank * (inputs * math.prod(kernel) + out)
    sides, features = (h, w), 0
    for i, width in enumerate(channels):  # after each down block, all but the last of which halve the size; mid
        if i < len(channels) - 2:
            sides = tuple(-(-side // 2) for side in sides)
        features += width * sides[0] * sides[1] * dtype.itemsize
    heads = 2 * layout(channels)[1] if config.adversarial_relative or config.adversarial_absolute else 0
    hidden = unet.config["cross_attention_dim"]
    text = TOKENS * (max(hidden) if isinstance(hidden, (list, tuple)) else hidden) * 4
    positions = (2 * config.steps + 1) * c * h * w * getattr(torch, config.trajectory_dtype).itemsize
    return Sizes(
        sum(p.nbytes for p in unet.parameters()), lora, len(targets), heads, features, 4 * model.text, 4 * model.vae,
        h * w * model.factor**2, count_student(unet, latents, config.lora_rank), count_encoder(unet, latents),
        positions + text,
    )  # fmt: skip


def slot_seconds(sizes: Sizes, card: Card) -> float:
    """A slot with everything kept."""
    products = sizes.flops / (card.tflops * 1e12 * cards.PRODUCTS)
    return products + cards.LAUNCHES * sizes.targets * cards.LAUNCH / card.bandwidth


class Option(NamedTuple):
    policy: Policy
    kept: int
    moved: int
    seconds: float


def options(name: str, sizes: Sizes, card: Card, last: bool) -> list[Option]:
    """What a layer of a pass may do. `name` begins with the pass: "student/down_blocks.0.0"."""
    kind, _, layer = name.partition("/")
    counted = (sizes.student if kind == "student" else sizes.encoder).layers[layer]
    rate = sizes.flops / slot_seconds(sizes, card)
    out = []
    for level in LEVELS:
        if level != "keep" and counted.kept[level] >= counted.kept["keep"]:
            continue
        products = rate if level == "checkpoint" else card.tflops * 1e12 * cards.PRODUCTS
        seconds = counted.flops[level] / products
        if level != "checkpoint":
            seconds += 3 * counted.again[level] / (card.bandwidth * 1e9 * cards.ELEMENTWISE)
        out.append(Option(Policy(level), counted.kept[level], 0, seconds))
        moved = counted.movable[level]
        if kind == "student" and moved and not last:  # the last layer's is needed at once
            copies = cards.COPIES * moved / (card.link * 1e9)
            out.append(Option(Policy(level, True), counted.kept[level] - moved, moved, seconds + copies))
    return out


class Choice(NamedTuple):
    policies: dict[str, Policy]
    kept: int
    moved: int
    seconds: float  # added to a slot


class Chooser:
    """The least added time for any number of kept bytes: a table over bytes kept and bytes moved, layer by layer."""

    def __init__(self, sizes: Sizes, card: Card, adversarial: bool = True) -> None:
        names = [f"student/{name}" for name in sizes.student.layers]
        if adversarial:
            names += [f"encoder/{name}" for name in sizes.encoder.layers]
        last = f"student/{[name for name in sizes.student.layers if name != 'rest'][-1]}"
        self.options = {name: options(name, sizes, card, name == last) for name in names}
        self.link = card.link * 1e9
        per_flop = slot_seconds(sizes, card) / sizes.flops
        self.hidden = sizes.student.flops * per_flop  # what the forward hides; the backward takes twice as long
        most = sum(max(o.kept for o in found) for found in self.options.values())
        movable = sum(max(o.moved for o in found) for found in self.options.values())
        self.grain, self.moved_grain = max(1, most // CELLS), max(1, movable // MOVED_CELLS)
        self._fill()

    def _cells(self, option: Option) -> tuple[int, int]:
        return -(-option.kept // self.grain), -(-option.moved // self.moved_grain)

    def _fill(self) -> None:
        shape = CELLS + len(self.options) + 1, MOVED_CELLS + len(self.options) + 1
        best = np.full(shape, np.inf)
        best[0, 0] = 0.0
        self.picks: list[np.ndarray] = []
        for found in self.options.values():
            after, pick = np.full(shape, np.inf), np.zeros(shape, np.int8)
            for i, option in enumerate(found):
                kept, moved = self._cells(option)
                if kept >= shape[0] or moved >= shape[1]:
                    continue
                candidate = np.full(shape, np.inf)
                candidate[kept:, moved:] = best[: shape[0] - kept, : shape[1] - moved] + option.seconds
                better = candidate < after
                after[better], pick[better] = candidate[better], i
            best = after
            self.picks.append(pick)
        moved = np.arange(shape[1]) * self.moved_grain / self.link
        unhidden = np.maximum(0, moved - self.hidden) + np.maximum(0, moved - 2 * self.hidden)
        self.total = best + unhidden[None, :]

    @property
    def least(self) -> int:
        """The fewest bytes that can be kept."""
        return int(np.argmax(np.isfinite(self.total).any(axis=1))) * self.grain

    def everything(self) -> Choice:
        """All is kept."""
        kept = sum(found[0].kept for found in self.options.values())
        return Choice({name: found[0].policy for name, found in self.options.items()}, kept, 0, 0.0)

    def best(self, kept: int, offload: bool = True) -> Choice | None:
        """The fastest choice that keeps at most `kept` bytes, of those moving none without `offload`; None if none."""
        total = self.total[: max(0, kept // self.grain + 1), : None if offload else 1]
        if not np.isfinite(total).any():
            return None
        i, j = map(int, np.unravel_index(np.argmin(total), total.shape))
        seconds = float(total[i, j])
        chosen = {}
        for name, pick in reversed(list(zip(self.options, self.picks, strict=True))):
            chosen[name] = option = self.options[name][pick[i, j]]
            kept_cells, moved_cells = self._cells(option)
            i, j = i - kept_cells, j - moved_cells
        return Choice(
            {name: option.policy for name, option in reversed(chosen.items())},
            sum(o.kept for o in chosen.values()), sum(o.moved for o in chosen.values()), seconds,
        )  # fmt: skip


class Planner:
    """Plans for one job on one card, for any budget."""

    def __init__(self, model: Model, config: Config, card: Card | None = None) -> None:
        self.model, self.config = model, config
        self.sizes = sizes_of(model, config)
        self.card = card
        self.context = cards.CONTEXT  # bytes of the process outside the allocator
        self.correction = 0  # bytes that a dry slot took beyond what was predicted

    def plan(self, budget: int | None, most: int | None = None) -> Plan:
        """The fastest plan for `budget` bytes of the card that keeps at most `most` bytes for backward.

        UserError for a budget that cannot work, with the smallest that would.
        """
        sizes, card, fitting = self.sizes, self.card or cards.card_for(budget or 0), []
        adversarial = sizes.heads > 0
        chooser = Chooser(sizes, card, adversarial)
        if budget is None:
            return self._finish(Plan(None, card), chooser.everything())
        # What costs no time comes first: copies further ahead, both real features in one pass.
        for together, window in itertools.product((True, False), (0, *WINDOWS)):
            plan = Plan(budget, card, together=together, window=window)
            room = min(self._room(plan), 2**62 if most is None else most)
            choice = chooser.best(room, offload=window > 0)
            if choice is not None and (window == 0 or choice.moved):
                fitting.append((choice.seconds, len(fitting), plan, choice))
        if not fitting:
            raise UserError(
                f"vram {budget / GIB:.2f}G is too little for {self.model.name} at rank {self.config.lora_rank}: "
                f"at least --vram {self.smallest_words()}"
            )
        _, _, plan, choice = min(fitting)
        return self._finish(plan, choice)

    def smallest(self) -> int:
        """Bytes of the least budget that works."""
        card = self.card or cards.CARDS[0]
        plan = Plan(0, card, together=False, window=WINDOWS[-1])
        chooser = Chooser(self.sizes, card, self.sizes.heads > 0)
        train = self._train(plan, chooser.least)
        return max(train, *(self._phase(phase, plan, 1, True, True, True) for phase in PHASES if phase != "train"))

    def smallest_words(self) -> str:
        return f"{math.ceil(self.smallest() / GIB * 10) / 10:.1f}G"

    def _train(self, plan: Plan, kept: int) -> int:
        """Bytes of the process at the peak of a slot that keeps `kept`."""
        sizes = self.sizes
        size = DTYPES[self.config.mixed_precision].itemsize
        extra = max(max(layer.extra.values()) for layer in (*sizes.student.layers.values(),))
        rows = 2 if plan.together else 1
        transient = (cards.TRANSIENT + rows - 2) * (sizes.student.widest + sizes.features) + extra
        replay = self.config.replay_size * self.config.steps * 3 * sizes.features
        slot = kept * (1 + cards.KEPT_OVERHEAD) + transient + 2 * plan.window + size * sizes.lora
        end = 3 * size * sizes.lora + 12 * sizes.lora  # the gradient, cast, clipped, when everything else is gone
        live = sizes.state + replay + cards.WORKSPACE + max(slot, end)
        return int(self.context + self.correction + sizes.weights + live * cards.RESERVED)

    def _room(self, plan: Plan) -> int:
        """Bytes that may be kept."""
        slot = plan.budget - self.context - self.correction - self.sizes.weights
        end = self._train(plan, 0) - self.context - self.correction - self.sizes.weights
        return int((slot - end) / (cards.RESERVED * (1 + cards.KEPT_OVERHEAD))) if slot >= end else -1

    def _phase(self, phase: str, plan: Plan, batch: int, aside: bool, tiled: bool, apart: bool) -> int:
        """Bytes of the process in a phase other than training."""
        sizes, size = self.sizes, DTYPES[self.config.mixed_precision].itemsize
        forward = cards.FORWARD * sizes.student.widest  # a row
        guided = 2 * batch * forward if self.config.guidance > 1 else batch * forward
        state = sizes.state
        if phase == "encode":
            live = sizes.text + cards.ENCODE + (0 if aside else sizes.weights)
        elif phase == "solve":
            live = sizes.weights + guided
        elif phase == "validate":
            pixels = min(sizes.pixels, cards.TILE**2) if tiled else sizes.pixels
            walk = sizes.weights + state + max(guided, 3 * batch * forward)
            decode = sizes.vae + cards.DECODE * pixels + state + (0 if aside else sizes.weights)
            live = max(walk, decode)
        else:
            stock = sizes.weights + (sizes.text + sizes.vae) * size // 4
            live = stock + 2 * forward + (0 if apart else sizes.weights) + state
        return int(self.context + live * 1.02)

    def _finish(self, plan: Plan, choice: Choice) -> Plan:
        """The other phases, and the seconds."""
        budget, config, sizes = plan.budget or 2**62, self.config, self.sizes

        def fits(phase: str, batch: int = 1, aside=False, tiled=False, apart=False) -> bool:
            return self._phase(phase, plan, batch, aside, tiled, apart) <= budget

        batch = next((n for n in range(config.solve_batch, 1, -1) if fits("solve", n) and fits("validate", n, True)), 1)
        aside = not (fits("encode") and fits("validate", batch))
        tiled = not fits("validate", batch, aside)
        apart = not fits("export")
        for phase in ("encode", "solve", "validate", "export"):
            need = self._phase(phase, plan, batch, aside, tiled, apart)
            if need > budget:
                raise UserError(
                    f"vram {budget / GIB:.2f}G is too little to {phase} with {self.model.name}: "
                    f"at least --vram {self.smallest_words()}"
                )
        phases = {phase: self._phase(phase, plan, batch, aside, tiled, apart) for phase in PHASES if phase != "train"}
        phases["train"] = self._train(plan, choice.kept)
        slot = slot_seconds(sizes, plan.card)
        solve = 2 * config.steps * config.fine_steps * sizes.student.flops * slot / sizes.flops
        policies: dict[str, dict[str, Policy]] = {"student": {}, "encoder": {}}
        for name, policy in choice.policies.items():
            kind, _, layer = name.partition("/")
            if layer != "rest":
                policies[kind][layer] = policy
        return replace(
            plan, **policies, kept=choice.kept, moved=choice.moved, window=plan.window if choice.moved else 0,
            solve_batch=batch, aside=aside, tiled=tiled, apart=apart,
            phases={phase: phases[phase] for phase in PHASES}, seconds=config.steps * (slot + choice.seconds),
            slowdown=(slot + choice.seconds) / slot, solve_seconds=solve,
        )  # fmt: skip

    def disk(self) -> int:
        """Bytes of the store."""
        return (self.config.trajectories + self.config.validation_prompts) * self.sizes.trajectory


def grouped(policies: dict[str, Policy]) -> list[tuple[str, str]]:
    """(policy, its layers), runs of layers of a block joined: "up_blocks.0.0-2"."""
    by_policy: dict[str, list[str]] = {}
    for name, policy in policies.items():
        by_policy.setdefault(str(policy), []).append(name)
    lines = []
    for policy, names in by_policy.items():
        blocks: dict[str, list[int]] = {}
        for name in names:
            block, _, i = name.rpartition(".")
            blocks.setdefault(block, []).append(int(i))
        parts = []
        for block, found in blocks.items():
            run = found == list(range(found[0], found[-1] + 1)) and len(found) > 1
            parts.append(f"{block}.{found[0]}-{found[-1]}" if run else ", ".join(f"{block}.{i}" for i in found))
        lines.append((policy, ", ".join(parts)))
    return lines


def report(planner: Planner, plan: Plan) -> str:
    """What `rapm plan` prints."""
    config, model, card = planner.config, planner.model, plan.card
    height, width = config.resolution or model.resolution
    budget = "no limit" if plan.budget is None else f"{plan.budget / GIB:.1f} GiB"
    rates = f"{card.tflops:.0f} TFLOP/s, {card.bandwidth:.0f} GB/s, {card.link:.0f} GB/s to the host"
    hours = config.max_train_steps * plan.seconds / 3600
    count = config.trajectories + config.validation_prompts
    solve = count * plan.solve_seconds / 3600
    batch = f"{plan.solve_batch} trajectories at a time"
    notes = {
        "encode": "the UNet waits on the host" if plan.aside else "beside the UNet",
        "solve": batch,
        "train": "" if plan.together else "real features one by one",
        "validate": ", ".join([batch, *(["the UNet waits on the host while the VAE decodes"] if plan.aside else []),
                               *(["decoded in tiles"] if plan.tiled else [])]),
        "export": "ours and the stock UNet take turns" if plan.apart else "ours beside the stock UNet",
    }  # fmt: skip
    lines = [
        f"{model.name}, {height}x{width}, LoRA rank {config.lora_rank}, {config.mixed_precision}, budget {budget}",
        f"on a {card.name} ({'measured' if card.measured else 'data sheet'}: {rates})",
        "",
        "memory of the process, GiB (predicted)",
        *(f"  {phase:<9}{plan.phases[phase] / GIB:6.2f}  {notes[phase]}".rstrip() for phase in PHASES),
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
    ]
    return "\n".join(lines)
