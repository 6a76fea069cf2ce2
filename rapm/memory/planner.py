"""Which plan fits a budget and is the fastest that does: memory by phase, a policy for each layer, seconds, disk.

Memory is counted (count.py); what cannot be counted, and all rates, are in cards.py; the policies of the layers are the
fastest that fit (choice.py).
"""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rapm import distributed
from rapm.config import Config, parse_vram
from rapm.device import DTYPES
from rapm.errors import UserError
from rapm.loading.families import Model, model_of
from rapm.memory import cards
from rapm.memory.cards import GIB, MIB, Card
from rapm.memory.choice import Choice, Chooser
from rapm.memory.low_precision import MODES
from rapm.memory.offload import WINDOWS
from rapm.memory.saved import Policy
from rapm.memory.sizes import Sizes, forward_seconds, launch_seconds, sizes_of, slot_seconds
from rapm.solver import check_grid

PHASES = ("encode", "solve", "train", "validate", "export")


@dataclass(frozen=True)
class Plan:
    """What a run does within `budget` bytes of the card (None: no limit)."""

    budget: int | None
    card: Card
    student: dict[str, Policy] = field(default_factory=dict)
    encoder: dict[str, Policy] = field(default_factory=dict)
    kept: int = 0  # bytes that a slot keeps for backward on the card
    moved: int = 0  # bytes that it moves to the host
    window: int = 0  # bytes under way each way, and so how far the copies run ahead
    solve_batch: int = 1
    together: bool = True  # both real features in one pass of two rows, or one after the other
    beside: bool = True  # the passes without gradient on a stream of their own
    aside: bool = False  # the UNet waits on the host while text encoders or VAE work
    tiled: bool = False  # the VAE decodes tile by tile
    apart: bool = False  # at the export, ours waits on the host, and the stock UNet's blocks take turns on the card
    phases: dict[str, int] = field(default_factory=dict)  # bytes of the process, by phase
    seconds: float = 0.0  # an iteration
    slowdown: float = 1.0  # over the same card without a budget
    solve_seconds: float = 0.0  # a trajectory


class Planner:
    """Plans for one job on one card, for any budget."""

    def __init__(
        self, model: Model, config: Config, card: Card | None = None, mode: str | None = None,
        whole: Sizes | None = None,
    ) -> None:  # fmt: skip
        """`mode` is that of the frozen weights, by default the settings', where auto is full; `whole` the sizes that
        they would have without a budget, by default these."""
        self.asked = config.frozen_weights
        self.model = model
        self.config = config.replace(frozen_weights=mode or self.asked.replace("auto", "full"))
        self.sizes = sizes_of(model, self.config)
        self.whole = whole or self.sizes
        self.card = card
        self.graph = cards.GRAPH * cards.LAUNCHES * self.sizes.targets
        self.context = cards.CONTEXT + self.graph  # bytes of the process outside the allocator
        self.correction = 0  # bytes that a dry slot took beyond what was predicted

    def plan(self, budget: int | None, most: int | None = None) -> Plan:
        """The fastest plan for `budget` bytes of the card, of which at most `most` are kept for backward or under way.

        UserError for a budget that cannot work, with the smallest that would.
        """
        sizes, card, fitting = self.sizes, self.card or cards.card_for(budget or 0), []
        adversarial = sizes.heads > 0
        chooser = Chooser(sizes, card, adversarial)
        if budget is None:
            return self._finish(Plan(None, card), chooser.everything())
        # What costs no time comes first: a second stream, copies further ahead, both real features in one pass.
        # After an out-of-memory there is one stream, whose memory is all used again.
        for beside, together, window in itertools.product(
            (True, False)[most is not None :], (True, False), (0, *WINDOWS)
        ):
            plan = Plan(budget, card, together=together, beside=beside, window=window)
            room = min(self._room(plan), 2**62 if most is None else most - window)
            choice = chooser.best(room, window)
            if choice is not None and (window == 0 or choice.moved):
                # With one real position at a time, about one more pass of the encoder's launches
                more = launch_seconds(sizes, card) * ((not together) / 12 + (not beside) * cards.HIDDEN)
                choice = choice._replace(seconds=choice.seconds + more)
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
        plan = Plan(0, card, together=False, beside=False, window=WINDOWS[-1])
        chooser = Chooser(self.sizes, card, self.sizes.heads > 0)
        train = self._train(plan, chooser.least)
        return max(train, *(self._phase(phase, plan, 1, True, True, True) for phase in PHASES if phase != "train"))

    def smallest_words(self) -> str:
        """`smallest` as --vram takes it, rounded up."""
        return f"{math.ceil(self.smallest() / GIB * 10) / 10:.1f}G"

    def _parts(self, plan: Plan, extra: int | None) -> tuple[float, float, float]:
        """Bytes of training: what is always there, a slot that keeps nothing, and its end, when its graphs are gone."""
        sizes = self.sizes
        lora = DTYPES[self.config.mixed_precision].itemsize * sizes.lora  # in the UNet's dtype
        if extra is None:
            extra = max(max(layer.extra.values()) for layer in sizes.student.layers.values())
        transient = cards.TRANSIENT * sizes.student.transient + extra + 2 * sizes.largest
        if not plan.together:
            transient -= sizes.student.widest + sizes.features
        if self._replay():  # the picked features, and they beside the slot's own
            transient += 2 * self.config.replay_batch * 3 * sizes.features
        sent = 4 * (sizes.lora + sizes.heads) if distributed.world() > 1 else 0  # what ranks add up
        fixed = self.context + self.correction + sizes.weights + sizes.state + self._replay() + sent
        heads = 4 * sizes.heads  # their gradient, which is there before the LoRA's
        slot = cards.WORKSPACE + transient + plan.window + heads + cards.PIECES * lora + plan.beside * self._beside()
        # At the end the LoRA's gradient: piece by piece it takes the place of what was found in the UNet's dtype
        return fixed, slot, cards.WORKSPACE + cards.PIECES * lora + 4 * sizes.lora + heads

    def _replay(self) -> int:
        """Bytes of the replayed features, of which each size has its own, all as large as the largest at the most."""
        kept = self.config.replay_size * self.config.steps * 3 * self.sizes.features if self.sizes.heads else 0
        return len(set(self.config.resolutions) or (None,)) * kept

    def _beside(self) -> int:
        """Bytes of the second stream's own: a pass without gradient."""
        return int(cards.BESIDE * self.sizes.student.transient)

    def eager(self, plan: Plan) -> int:
        """Bytes of the process at the peak of a slot that is not captured: one stream does it all."""
        return plan.phases["train"] - plan.beside * self._beside()

    def _train(self, plan: Plan, kept: int, extra: int | None = None) -> int:
        """Bytes of the process at the peak of a slot that keeps `kept`; `extra`: the most that is computed again."""
        fixed, slot, end = self._parts(plan, extra)
        return int(fixed + max(slot + kept, end))

    def _room(self, plan: Plan) -> int:
        """Bytes that may be kept; below 0 where not even nothing fits."""
        fixed, slot, end = self._parts(plan, None)
        free = plan.budget - fixed
        return int(free - slot) if free >= max(slot, end) else -1

    def _phase(self, phase: str, plan: Plan, batch: int, aside: bool, tiled: bool, apart: bool) -> int:
        """Bytes of the process in a phase other than training."""
        sizes, size = self.sizes, DTYPES[self.config.mixed_precision].itemsize
        inputs, ups = cards.FORWARD
        forward = inputs * sizes.student.widest + ups * sizes.student.up  # a row
        forward += sizes.keys  # there twice where they change
        guided = (2 * batch * forward if self.config.guidance > 1 else batch * forward) + sizes.largest
        state = sizes.state + self._replay()
        if phase == "encode":
            live = sizes.text * (1 + cards.ENCODE) + (0 if aside else sizes.weights)
        elif phase == "solve":
            live = sizes.weights + guided + cards.WORKSPACE
        elif phase == "validate":
            together = min(cards.TILE**2 // sizes.pixels, self.config.validation_prompts)  # of small pictures
            pixels = min(sizes.pixels, cards.TILE**2) if tiled else sizes.pixels * max(1, together)
            walk = sizes.weights + state + cards.WORKSPACE + max(guided, 3 * batch * forward + sizes.largest)
            decode = sizes.vae + cards.DECODE * pixels + state + (0 if aside else sizes.weights)
            live = max(walk, decode)
        else:
            stock = (sizes.block if apart else sizes.whole) + (sizes.text + sizes.vae) * size // 4
            live = stock + 2 * forward + (0 if apart else sizes.weights)
            live = max(live, sizes.weights + 2 * forward + sizes.largest) + cards.WORKSPACE  # our own sampler, before
            live = max(live, sizes.text * (1 + cards.ENCODE) + (0 if aside else sizes.weights))  # and the prompts
            live += state + (2 - apart) * size * sizes.lora  # in our sampler, and in the stock UNet
        return int(self.context + live * 1.02)

    def _finish(self, plan: Plan, choice: Choice) -> Plan:
        """The other phases, and the seconds."""
        budget, config, sizes = plan.budget or 2**62, self.config, self.sizes

        def fits(phase: str, batch: int = 1, aside=False, tiled=False, apart=False) -> bool:
            return self._phase(phase, plan, batch, aside, tiled, apart) <= budget

        # Halves of what is asked for: a shard's last batch of another size would have a graph of its own
        halves = [config.solve_batch >> i for i in range(config.solve_batch.bit_length())]
        batch = next((n for n in halves if fits("solve", n) and fits("validate", n, True)), 1)
        aside = not (fits("encode") and fits("validate", batch) and fits("export", apart=True))
        tiled = not fits("validate", batch, aside)
        apart = not fits("export", aside=aside)
        for phase in ("encode", "solve", "validate", "export"):
            need = self._phase(phase, plan, batch, aside, tiled, apart)
            if need > budget:
                raise UserError(
                    f"vram {budget / GIB:.2f}G is too little to {phase} with {self.model.name}: "
                    f"at least --vram {self.smallest_words()}"
                )
        phases = {phase: self._phase(phase, plan, batch, aside, tiled, apart) for phase in PHASES if phase != "train"}
        slot = slot_seconds(sizes, plan.card)
        solve = 2 * config.steps * config.fine_steps * forward_seconds(sizes, plan.card, 2 * batch)
        policies: dict[str, dict[str, Policy]] = {"student": {}, "encoder": {}}
        for name, policy in choice.policies.items():
            kind, _, layer = name.partition("/")
            if layer != "rest":
                policies[kind][layer] = policy
        extra = max(sizes.student.extra(policies["student"]), sizes.encoder.extra(policies["encoder"]))
        phases["train"] = self._train(plan, choice.kept, extra)
        return replace(
            plan, **policies, kept=choice.kept, moved=choice.moved, window=plan.window if choice.moved else 0,
            solve_batch=batch, aside=aside, tiled=tiled, apart=apart,
            phases={phase: phases[phase] for phase in PHASES}, seconds=config.steps * (slot + choice.seconds),
            slowdown=(slot + choice.seconds) / slot_seconds(self.whole, plan.card), solve_seconds=solve,
        )  # fmt: skip

    def disk(self) -> int:
        """Bytes of the store, whose trajectories take each size in turn."""
        each, count = self.sizes.trajectories, self.config.trajectories + self.config.validation_prompts
        return sum(each[i % len(each)] for i in range(count))


def planned(model: Model, config: Config, card: Card | None, budget: int | None) -> tuple[Planner, Plan]:
    """The planner and its plan. With `frozen_weights` auto in fewer bits only if no plan fits without.

    UserError for a budget that cannot work, with the smallest that would.
    """
    modes, whole = MODES if config.frozen_weights == "auto" else (config.frozen_weights,), None
    for mode in modes:
        planner = Planner(model, config, card, mode, whole)
        whole = planner.whole
        try:
            return planner, planner.plan(budget)
        except UserError:
            if mode == modes[-1]:
                raise
    raise AssertionError("there is no mode")


def precision_words(planner: Planner) -> str | None:
    """What becomes of the frozen weights, and why; None where they stay whole."""
    words = {"int8": "linear layers in int8", "nf4": "linear layers in nf4 (4 bits), convolutions in int8"}
    if (mode := planner.config.frozen_weights) == "full":
        return None
    why = ", as no plan fits this budget without: the teacher is a near one" if planner.asked == "auto" else ""
    return f"frozen weights: {words[mode]}{why}"


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
    resolutions = ", ".join(f"{height}x{width}" for height, width in config.resolutions or (model.resolution,))
    budget = "no limit" if plan.budget is None else f"{plan.budget / GIB:.1f} GiB"
    rates = f"{card.tflops:.0f} TFLOP/s, {card.bandwidth:.0f} GB/s, {card.link:.0f} GB/s to the host"
    hours = config.max_train_steps * plan.seconds / 3600
    count = config.trajectories + config.validation_prompts
    solve = count * plan.solve_seconds / 3600
    precision = config.mixed_precision.replace("no", "fp32")
    batch = f"{plan.solve_batch} trajectories at a time"
    notes = {
        "encode": "the UNet waits on the host" if plan.aside else "beside the UNet",
        "solve": batch,
        "train": ", ".join(["targets on a second stream"] * plan.beside
                           + ["real features one by one"] * (not plan.together)),
        "validate": ", ".join([batch, *(["the UNet waits on the host while the VAE decodes"] if plan.aside else []),
                               *(["decoded in tiles"] if plan.tiled else [])]),
        "export": "ours waits on the host, the stock UNet comes by blocks" if plan.apart else "beside the stock UNet",
    }  # fmt: skip
    lines = [
        f"{model.name}, {resolutions}, LoRA rank {config.lora_rank}, {precision}, budget {budget}",
        f"card: {card.name} ({'measured' if card.measured else 'data sheet'}: {rates})",
        *filter(None, [precision_words(planner)]),
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


def plan_for(config: Config) -> str:
    """The report for `config`: on this machine's GPU, else on the smallest card of the table that has the budget.

    UserError for a teacher or steps that `rapm train` refuses, a budget that cannot work, and `auto` without a GPU.
    """
    budget, card, model = parse_vram(config.vram), None, model_of(config.teacher)
    check_grid(model.timesteps, config.steps, config.fine_steps)
    if torch.cuda.is_available() and config.device in ("auto", "cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
        card = cards.this_card(device)
        budget = budget or cards.automatic(device)
    elif budget is None:
        raise UserError("plan: there is no GPU here, so say for which budget: --vram 12G")
    planner, plan = planned(model, config, card, budget)
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
