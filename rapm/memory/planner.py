"""Which plan fits a budget and is the fastest that does: memory by phase, a policy for each layer, seconds, disk.

Memory is counted (count.py); what cannot be counted, and all rates, are in cards.py; the policies of the layers are the
fastest that fit (choice.py).
"""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

from rapm import distributed
from rapm.config import Config
from rapm.device import DTYPES
from rapm.errors import UserError
from rapm.loading.families import Model
from rapm.memory import cards
from rapm.memory.cards import GIB, Card
from rapm.memory.choice import Choice, Chooser
from rapm.memory.low_precision import MODES
from rapm.memory.offload import WINDOWS, slab_bytes
from rapm.memory.saved import Policy
from rapm.memory.sizes import Sizes, forward_seconds, launch_seconds, sizes_of, slot_seconds
from rapm.store import read_metadata

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
    unet_waits: bool = False  # the UNet waits on the host while text encoders or VAE work
    tiled: bool = False  # the VAE decodes tile by tile
    stock_by_blocks: bool = False  # at the export its blocks take turns on the card; if `unet_waits`, ours waits then
    proven: bool = True  # there the files are sampled in a stock pipeline, for which the host must have room
    phases: dict[str, int] = field(default_factory=dict)  # bytes of the process on the card, by phase
    host: dict[str, int] = field(default_factory=dict)  # and on the host
    seconds: float = 0.0  # an iteration
    slowdown: float = 1.0  # over the same card without a budget
    solve_seconds: float = 0.0  # a trajectory


class Planner:
    """Plans for one job on one card, for any budget."""

    def __init__(
        self, model: Model, config: Config, card: Card | None = None, mode: str | None = None,
        whole: Sizes | None = None, host: int | None = None,
    ) -> None:  # fmt: skip
        """`mode` is that of the frozen weights, by default the settings', where auto is full; `whole` the sizes that
        they would have without a budget, by default these; `host` the most that the process may hold there."""
        self.asked = config.frozen_weights
        self.model = model
        self.config = config.replace(frozen_weights=mode or self.asked.replace("auto", "full"))
        self.sizes = sizes_of(model, self.config)
        self.whole = whole or self.sizes
        self.card, self.host = card, host
        self.copies = True  # whether the host can pin memory for them
        self.stored = False  # whether the mode is that of trajectories that are there
        self.graph = cards.GRAPH * cards.LAUNCHES * self.sizes.targets
        self.context = cards.CONTEXT + self.graph  # bytes of the process outside the allocator
        self.correction = 0  # bytes that a dry slot took beyond what was predicted

    def plan(self, budget: int | None, most: int | None = None) -> Plan:
        """The fastest plan for `budget` bytes of the card, of which at most `most` are kept for backward or under way.

        UserError for a budget that cannot work, with the smallest that would, and for a host with too little memory.
        """
        sizes, card, fitting = self.sizes, self.card or cards.card_for(budget or 0), []
        chooser, movable = Chooser(sizes, card, sizes.heads > 0), self._movable()
        self._ways(Plan(budget, card))  # or what the host lacks would look like the card's
        if budget is None:
            return self._finish(Plan(None, card), chooser.everything())
        # What costs no time comes first: a second stream, copies further ahead, both real features in one pass.
        # After an out-of-memory there is one stream, whose memory is all used again.
        for beside, together, window in itertools.product(
            (True, False)[most is not None :], (True, False), (0, *WINDOWS)
        ):
            plan = Plan(budget, card, together=together, beside=beside, window=window)
            room = min(self._room(plan), 2**62 if most is None else most - window)
            choice = chooser.best(room, window, movable)
            if choice is not None and (window == 0 or choice.moved):
                more = launch_seconds(sizes, card) * ((not together) * cards.ONE_BY_ONE + (not beside) * cards.HIDDEN)
                choice = choice._replace(seconds=choice.seconds + more)
                fitting.append((choice.seconds, len(fitting), plan, choice))
        if not fitting:
            raise self._too_little(budget, f"for {self.model.name} at rank {self.config.lora_rank}")
        _, _, plan, choice = min(fitting)
        return self._finish(plan, choice)

    def draw(self, budget: int, batch: int, lora: int = 0, visitor: int = 0) -> Plan:
        """How pictures are drawn within `budget` bytes of the card: at most `batch` by one walk, with `lora` numbers in
        the LoRA, and `visitor` bytes of whatever else looks at them.

        UserError where there is no way, with the least that would do.
        """
        ways = [
            Plan(budget, cards.CARDS[0], tiled=tiled, unet_waits=unet_waits)
            for tiled, unet_waits in itertools.product(*[(False, True)] * 2)
        ]
        if self.host is not None:
            ways = [way for way in ways if not way.unet_waits or self._on_host(way)["encode"] <= self.host]

        def need(way: Plan) -> int:
            walks = self._solve(way) + lora * DTYPES[self.config.mixed_precision].itemsize
            visits = visitor + (0 if way.unet_waits else self.sizes.weights)
            live = max(walks, self._encode(way), self._decode(way, batch), visits)
            return int(cards.CONTEXT + cards.SLACK * live)

        found = next((way for way in ways if need(way) <= budget), None)
        if found is None:
            least = math.ceil(min(map(need, ways)) / GIB * 10) / 10
            height, width = max(self.config.resolutions or (self.model.resolution,), key=math.prod)
            raise UserError(
                f"the card has {budget / GIB:.2f} GiB for this process, too little to draw {height}x{width} with "
                f"{self.model.name}, for which {least:.1f} would do: close what else uses it, draw smaller pictures, "
                "or use another card"
            )
        most = next(n for n in range(batch, 0, -1) if need(replace(found, solve_batch=n)) <= budget)
        return replace(found, solve_batch=most)

    def smallest(self) -> int:
        """Bytes of the least budget that works."""
        card, movable = self.card or cards.CARDS[0], self._movable()
        plan = Plan(0, card, together=False, beside=False, window=0 if movable == 0 else WINDOWS[-1])
        chooser = Chooser(self.sizes, card, self.sizes.heads > 0)
        others = min(max(self._others(way).values()) for way in self._ways(plan))
        return max(self._train(plan, chooser.least(movable)), others)

    def smallest_words(self) -> str:
        """`smallest` as --vram takes it, rounded up."""
        return f"{math.ceil(self.smallest() / GIB * 10) / 10:.1f}G"

    def _too_little(self, budget: int, what: str) -> UserError:
        least, free = self.smallest_words(), copy(self)
        free.host = None
        if self.host is not None and free.smallest_words() != least:
            what += f", where the host has {self.host / GIB:.1f} GiB"
        return UserError(f"vram {budget / GIB:.2f}G is too little {what}: at least --vram {least}")

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

    def _others(self, plan: Plan) -> dict[str, int]:
        """Bytes of the process on the card in the phases other than training."""
        live = {
            "encode": self._encode(plan),
            "solve": self._solve(plan),
            "validate": self._validate(plan),
            "export": self._export(plan),
        }
        return {phase: int(self.context + cards.SLACK * size) for phase, size in live.items()}

    def _forward(self, rows: int) -> float:
        """Bytes alive in a pass without gradient of so many rows, beside what is made for one product."""
        inputs, ups = cards.FORWARD
        student = self.sizes.student
        return rows * (inputs * student.widest + ups * student.up + self.sizes.keys)  # keys: twice where they change

    def _encode(self, plan: Plan) -> float:
        """Bytes alive while prompts are encoded."""
        return self.sizes.text * (1 + cards.ENCODE) + (0 if plan.unet_waits else self.sizes.weights)

    def _solve(self, plan: Plan) -> float:
        """Bytes alive while trajectories are solved."""
        rows = plan.solve_batch * (2 if self.config.guidance > 1 else 1)
        return self.sizes.weights + self._forward(rows) + self.sizes.largest + cards.WORKSPACE

    def _validate(self, plan: Plan) -> float:
        """Bytes alive at a validation: while the student walks and the heads look, or while the VAE decodes."""
        sizes, state = self.sizes, self.sizes.state + self._replay()
        looks = sizes.weights + self._forward(3 * plan.solve_batch) + sizes.largest + cards.WORKSPACE
        return state + max(self._solve(plan), looks, self._decode(plan, self.config.validation_prompts))

    def _decode(self, plan: Plan, count: int) -> float:
        """Bytes alive while the VAE decodes `count` pictures."""
        sizes = self.sizes
        pixels = sizes.pixels * max(1, min(cards.TILE**2 // sizes.pixels, count))  # of small pictures some together
        if plan.tiled:
            pixels = min(pixels, cards.TILE**2)
        return sizes.vae + cards.DECODE * pixels + (0 if plan.unet_waits else sizes.weights)

    def _export(self, plan: Plan) -> float:
        """Bytes alive at the export: the prompts first, then our own sampler, then the stock pipeline."""
        sizes, size = self.sizes, DTYPES[self.config.mixed_precision].itemsize
        ours = sizes.weights + self._forward(2) + sizes.largest + cards.WORKSPACE
        stock = (sizes.block if plan.stock_by_blocks else sizes.whole) + sizes.parts * size // 4 + self._forward(2)
        stock += (0 if plan.stock_by_blocks and plan.unet_waits else sizes.weights) + cards.WORKSPACE
        stock *= plan.proven
        lora = (2 - plan.stock_by_blocks) * size * sizes.lora  # in our sampler, and in the stock UNet
        return max(ours, stock, self._encode(plan)) + sizes.state + self._replay() + lora

    def _on_host(self, plan: Plan) -> dict[str, int]:
        """Bytes of the process on the host, by phase: what waits for its turn, is pinned, or is to be written."""
        sizes, size = self.sizes, DTYPES[self.config.mixed_precision].itemsize
        base = cards.HOST + sizes.parts
        unet = sizes.weights if plan.unet_waits else 0
        saved = cards.COPIES * (sizes.state + distributed.world() * self._replay())
        stock = sizes.whole + sizes.parts * size // 4 + (unet if plan.stock_by_blocks else 0) if plan.proven else 0
        live = {
            "encode": unet,
            "solve": 0,
            "train": slab_bytes(plan.moved) + saved,
            "validate": unet + saved,
            "export": max(unet, stock),
        }
        return {phase: base + live[phase] for phase in PHASES}

    def _movable(self) -> int | None:
        """Bytes that a slot may move, as far as the host can pin them; None for no limit."""
        if not self.copies:
            return 0
        if self.host is None:
            return None
        left = self.host - self._on_host(Plan(None, cards.CARDS[0]))["train"]
        return max(0, left * 32 // 33)  # the slab is larger

    def _ways(self, plan: Plan) -> list[Plan]:
        """How the phases beside training may go for which the host has room, the better first.

        UserError where it has none for any.
        """
        ways = [
            replace(plan, proven=proven, tiled=tiled, unet_waits=unet_waits, stock_by_blocks=stock_by_blocks)
            for proven, tiled, unet_waits, stock_by_blocks in itertools.product((True, False), *[(False, True)] * 3)
        ]
        peaks = [max(self._on_host(way).values()) for way in ways]
        room = [self.host is None or peak <= self.host for peak in peaks]
        half = len(ways) // 2  # the latter proves nothing, which the host alone may ask for
        found = [way for i, way in enumerate(ways) if room[i] and (i < half or not room[i - half])]
        if not found:
            raise UserError(
                f"host memory: {self.model.name} takes {min(peaks) / GIB:.1f} GiB, of which {self.host / GIB:.1f} are "
                "there: close other programs, or raise the container's limit (WSL: `memory` in .wslconfig)"
            )
        return found

    def _finish(self, plan: Plan, choice: Choice) -> Plan:
        """The other phases, and the seconds."""
        budget, config, sizes = plan.budget or 2**62, self.config, self.sizes
        # Halves of what is asked for: a shard's last batch of another size would have a graph of its own
        halves = [config.solve_batch >> i for i in range(config.solve_batch.bit_length())]

        def fits(n: int) -> bool:
            need = self._others(replace(plan, solve_batch=n, unet_waits=True))
            return max(need["solve"], need["validate"]) <= budget

        batch = next(filter(fits, halves), 1)
        ways = [replace(way, solve_batch=batch) for way in self._ways(plan)]
        plan = next((way for way in ways if max(self._others(way).values()) <= budget), ways[-1])
        phases = self._others(plan)
        if phases[phase := max(phases, key=phases.__getitem__)] > budget:
            raise self._too_little(budget, f"to {phase} with {self.model.name}")
        slot = slot_seconds(sizes, plan.card)
        solve = 2 * config.steps * config.fine_steps * forward_seconds(sizes, plan.card, 2 * batch)
        policies: dict[str, dict[str, Policy]] = {"student": {}, "encoder": {}}
        for name, policy in choice.policies.items():
            kind, _, layer = name.partition("/")
            if layer != "rest":
                policies[kind][layer] = policy
        extra = max(sizes.student.extra(policies["student"]), sizes.encoder.extra(policies["encoder"]))
        phases["train"] = self._train(plan, choice.kept, extra)
        plan = replace(
            plan, **policies, kept=choice.kept, moved=choice.moved, window=plan.window if choice.moved else 0,
            phases={phase: phases[phase] for phase in PHASES}, seconds=config.steps * (slot + choice.seconds),
            slowdown=(slot + choice.seconds) / slot_seconds(self.whole, plan.card), solve_seconds=solve,
        )  # fmt: skip
        return replace(plan, host=self._on_host(plan))

    def disk(self) -> int:
        """Bytes of the store, whose trajectories take each size in turn."""
        each, count = self.sizes.trajectories, self.config.trajectories + self.config.validation_prompts
        return sum(each[i % len(each)] for i in range(count))


def planned(
    model: Model, config: Config, card: Card | None, budget: int | None, host: int | None = None, copies: bool = True
) -> tuple[Planner, Plan]:
    """The planner and its plan, for `budget` bytes of the card and `host` of the host, which `copies` asks to pin some.

    `frozen_weights` auto is what the trajectories in config's store were made with, else full, else, only if no plan
    fits, fewer bits. UserError for what cannot work, with the smallest budget that would.
    """
    auto, errors = config.frozen_weights == "auto", {}
    stored = _stored_mode(config) if auto else None
    full = Planner(model, config, card, host=host) if auto else None
    for mode in sorted(MODES, key=lambda mode: mode != stored) if auto else [config.frozen_weights]:
        if full and mode == "full":
            planner = full
        else:
            planner = Planner(model, config, card, mode, full and full.sizes, host)
        planner.copies, planner.stored = copies, mode == stored
        try:
            return planner, planner.plan(budget)
        except UserError as error:
            errors[mode] = error
    raise errors[max(errors, key=MODES.index)]


def _stored_mode(config: Config) -> str | None:
    """The frozen weights of the trajectories that `config` would go on with; None where there are none to be read."""
    folder = Path(config.store or Path(config.output_dir) / "trajectories")
    if not any(folder.glob("shard-*")):
        return None
    with suppress(UserError):  # whoever opens it says what is wrong
        mode: str = read_metadata(folder).get("frozen_weights", "full")
        return mode
    return None
