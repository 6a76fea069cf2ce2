"""The fastest policies whose kept bytes fit: exact, up to the grain of a table over bytes kept and bytes moved.

Layer by layer, over both passes, the table holds the least added time for every number of bytes; the answers for all
budgets are in it. Copies to the host count only as far as the passes do not hide them, which the whole decides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rapm.memory import cards
from rapm.memory.cards import Card
from rapm.memory.saved import LEVELS, Policy
from rapm.memory.sizes import Sizes, slot_seconds

CELLS = 1200  # of the choice's table, over all that can be kept
MOVED_CELLS = 96  # over all that can be moved to the host


class Option(NamedTuple):
    """A policy of one layer: bytes kept and moved, seconds added to a slot."""

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
    """A policy for every layer, and what they keep, move and cost together."""

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
        link = np.arange(shape[1]) * self.moved_grain / self.link
        unhidden = np.maximum(0, link - self.hidden) + np.maximum(0, link - 2 * self.hidden)
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
