"""Trajectories read ahead: a thread takes the next one from the store while the device works on this one.

On a GPU they lie in pinned memory, with the dtypes of the step's buffers, so that the host only starts their copies:
two places for each size, used in turn. CUDA is called in the caller's thread alone: while one thread captures a graph,
the others must not.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from rapm.step import Step
from rapm.store import Store, Trajectory
from rapm.unet import Text


class _Read(NamedTuple):
    """A trajectory under way."""

    number: int
    place: _Pinned | None  # where it will lie
    trajectory: Future[Trajectory]


class Reader:
    """The trajectories of `store`, one after the other; `steps` are the training's, by size.

    What reading raises is raised by the call that asks for that trajectory. The thread ends with this object.
    """

    def __init__(self, store: Store, steps: Mapping[tuple[int, int], Step]) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trajectories")
        cuda = {size: step for size, step in steps.items() if step.z.is_cuda}
        self._places = {size: [_Pinned(step), _Pinned(step)] for size, step in cuda.items()}
        self._coming: _Read | None = None
        self._shown: _Pinned | None = None

    def __call__(self, index: int, then: int) -> Trajectory:
        """Trajectory `index`; `then` is read meanwhile. On a GPU it is there until the call after the next one."""
        coming, self._coming = self._coming, None  # should it fail, it is read again
        if coming is None or coming.number != index:
            coming = self._start(index)
        trajectory, self._shown = coming.trajectory.result(), coming.place
        self._coming = self._start(then)
        return trajectory

    def sent(self) -> None:
        """The copies of the last trajectory are queued on the current stream: its place is free when they are done."""
        if self._shown is not None:
            self._shown.copied.record()

    def _start(self, index: int) -> _Read:
        size = self._store.resolution(index)
        if size not in self._places:
            return _Read(index, None, self._thread.submit(self._store.__getitem__, index))
        place = self._places[size].pop(0)
        self._places[size].append(place)
        place.copied.synchronize()
        return _Read(index, place, self._thread.submit(place.fill, self._store, index))


class _Pinned:
    """Host memory for one trajectory; `copied`: when the device has what was there."""

    def __init__(self, step: Step) -> None:
        def like(x: Tensor) -> Tensor:
            return torch.empty_like(x, device="cpu", pin_memory=True)

        self.positions, self.fine, self.hidden = like(step.positions), like(step.fine), like(step.text.hidden)
        self.more = [None if x is None else like(x) for x in step.text[1:]]
        self.copied = torch.cuda.Event(blocking=True)

    def fill(self, store: Store, index: int) -> Trajectory:
        """The trajectory with its numbers here."""
        found = store[index]
        text = Text(self.hidden.copy_(found.text.hidden), *map(_copied, self.more, found.text[1:]))
        return found._replace(
            positions=self.positions.copy_(found.positions), fine=self.fine.copy_(found.fine), text=text
        )


def _copied(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if mine is None or theirs is None else mine.copy_(theirs)
