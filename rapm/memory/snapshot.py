"""What an iteration changes, copied aside so that it can start again: an out-of-memory costs time, not numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from rapm.step import Step


class Snapshot:
    """Weights, moments, replay and counters of a step, on the CPU."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.copies = [(x, x.detach().to("cpu", copy=True)) for x in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        step = self.step
        found = [step.lora.flat, step.discriminators.flat, step.sums]
        found += [step.skipped, step.streak, step.worst, step.fault]
        found += step.replay.buffers() if step.replay is not None else []
        for optimizer in filter(None, (step.optimizer, step.head_optimizer)):
            found += [x for moments in optimizer.state.values() for x in moments.values()]
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was."""
        for x, copy in self.copies:
            x.copy_(copy)
        self.step.forget()
