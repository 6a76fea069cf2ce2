"""The fastest policies whose kept bytes fit: exact, up to the grain of a table over bytes kept and copies behind.

Layer by layer, over both passes, the table holds the least added time for every number of bytes; the answers for all
budgets are in it. Copies to the host count as far as passes do not hide them: a layer hides what the link takes in its
own time, later layers the rest, of which no more than the window may be under way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rapm.memory import cards
from rapm.memory.cards import Card
from rapm.memory.saved import LEVELS, Policy
from rapm.memory.sizes import Sizes, slot_seconds

CELLS = 1200  # of the choice's table, over all that can be kept
BEHIND = 12  # over the window, of what copies are behind
# On a byte moved, in times what the link takes for it: the lowest is taken that keeps to what the host can pin
PRICES = (0.0, *(2.0**i for i in range(-10, 7)))


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
    rate = sizes.work / slot_seconds(sizes, card)
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
            copies = cards.COPY * counted.copies[level]
            out.append(Option(Policy(level, True), counted.kept[level] - moved, moved, seconds + copies))
    return out


class Choice(NamedTuple):
    """A policy for every layer, and what they keep, move and cost together."""

    policies: dict[str, Policy]
    kept: int
    moved: int
    seconds: float  # added to a slot


class Chooser:
    """The least added time for any number of kept bytes: tables over bytes kept and copies behind, layer by layer."""

    def __init__(self, sizes: Sizes, card: Card, adversarial: bool = True) -> None:
        names = [f"student/{name}" for name in sizes.student.layers]
        if adversarial:
            names += [f"encoder/{name}" for name in sizes.encoder.layers]
        last = f"student/{[name for name in sizes.student.layers if name != 'rest'][-1]}"
        self.options = {name: options(name, sizes, card, name == last) for name in names}
        self.link = card.link * 1e9
        per_flop = slot_seconds(sizes, card) / sizes.work
        # Seconds of each layer's forward, which hides copies; its backward takes twice as long
        self.forward = {f"student/{name}": x.flops["checkpoint"] * per_flop for name, x in sizes.student.layers.items()}
        most = sum(max(o.kept for o in found) for found in self.options.values())
        self.grain = max(1, most // CELLS)
        self._tables: dict[tuple[int, float], tuple[np.ndarray, list[np.ndarray]]] = {}

    def seconds(self, chosen: Mapping[str, Option], window: int) -> float:
        """What the options of all layers add to a slot."""
        total = behind = 0.0
        for name, option in chosen.items():
            behind, stall = self._after(name, option, behind, window)
            total += option.seconds + stall
        return total

    def _after(self, name: str, option: Option, behind: float, window: int) -> tuple[float, float]:
        """Seconds that copies are behind after a layer, and that it waits for them, its backward too."""
        forward, copy, most = self.forward.get(name, 0.0), option.moved / self.link, window / self.link
        behind = max(0.0, behind + copy - forward)
        return min(behind, most), max(0.0, behind - most) + max(0.0, copy - 2 * forward)

    def _cells(self, option: Option) -> int:
        return -(-option.kept // self.grain)

    def _table(self, window: int, price: float) -> tuple[np.ndarray, list[np.ndarray]]:
        """Least seconds by bytes kept and copies behind, and how each layer came there: option and copies before it."""
        if (window, price) in self._tables:
            return self._tables[window, price]
        cell = window / self.link / BEHIND or 1.0
        shape = CELLS + len(self.options) + 1, BEHIND + 1 if window else 1
        best = np.full(shape, np.inf)
        best[0, 0] = 0.0
        picks: list[np.ndarray] = []
        for name, found in self.options.items():
            after, pick = np.full(shape, np.inf), np.zeros(shape, np.int16)
            for (i, option), before in itertools.product(enumerate(found), range(shape[1])):
                kept = self._cells(option)
                if kept >= shape[0] or (option.moved and not window):
                    continue
                behind, stall = self._after(name, option, before * cell, window)
                stall += price * option.moved / self.link
                to = min(math.ceil(behind / cell - 1e-9), shape[1] - 1)
                candidate = best[: shape[0] - kept, before] + option.seconds + stall
                better = candidate < after[kept:, to]
                after[kept:, to][better], pick[kept:, to][better] = candidate[better], i * shape[1] + before
            best = after
            picks.append(pick)
        self._tables[window, price] = best, picks
        return best, picks

    def least(self, movable: int | None = None) -> int:
        """The fewest bytes that can be kept; if not all that takes may be moved, then without moving any."""
        every = list(self.options.values())
        if movable is not None and sum(min(found, key=self._cells).moved for found in every) > movable:
            every = [[option for option in found if not option.moved] for found in every]
        return sum(min(map(self._cells, found)) for found in every) * self.grain

    def everything(self) -> Choice:
        """All is kept."""
        kept = sum(found[0].kept for found in self.options.values())
        return Choice({name: found[0].policy for name, found in self.options.items()}, kept, 0, 0.0)

    def best(self, kept: int, window: int, movable: int | None = None) -> Choice | None:
        """The fastest choice that keeps at most `kept` bytes, with `window` bytes under way; None if there is none.

        Without a window nothing is moved, and never more than `movable` bytes: then it is nearly the fastest, with a
        price on what is moved.
        """
        for price in PRICES:
            choice = self._priced(kept, window, price)
            if choice is None or movable is None or choice.moved <= movable:
                return choice
        return None

    def _priced(self, kept: int, window: int, price: float) -> Choice | None:
        best, picks = self._table(window, price)
        total = best[: max(0, kept // self.grain + 1)]
        if not np.isfinite(total).any():
            return None
        i, j = map(int, np.unravel_index(np.argmin(total), total.shape))
        chosen = {}
        for name, pick in reversed(list(zip(self.options, picks, strict=True))):
            place, j = divmod(int(pick[i, j]), best.shape[1])
            chosen[name] = option = self.options[name][place]
            i -= self._cells(option)
        chosen = dict(reversed(chosen.items()))
        return Choice(
            {name: option.policy for name, option in chosen.items()},
            sum(o.kept for o in chosen.values()), sum(o.moved for o in chosen.values()), self.seconds(chosen, window),
        )  # fmt: skip
