"""The state of a training: what an iteration changes, saves and restores, and the figures it leaves.

Every random number of iteration i of rank r of W comes from (seed, i W + r), so a checkpoint needs no generator state
and a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from rapm import distributed
from rapm.config import Config
from rapm.device import Fetched
from rapm.errors import RunError
from rapm.evaluate.validate import Measured, Validation
from rapm.finite import LOSSES, describe
from rapm.lora import LoRA
from rapm.memory.budget import Budget, out_of_memory
from rapm.memory.snapshot import Snapshot
from rapm.prefetch import Reader
from rapm.step import SlotMemory, Step
from rapm.store import Store, Trajectory
from rapm.teacher import Teacher
from rapm.trajectories import Negatives, seed_for
from rapm.unet import Text

PATIENCE = 20  # non-finite updates in a row before a run gives up
EAGER = 1  # iterations of a size before its slot is captured: every kernel and workspace must have been used once


class Training:
    """What changes during a run: the LoRA, the heads, both optimizers, the replay, the number of iterations done.

    Each resolution of the store has a step of its own, in `steps`, and on a GPU a captured slot; weights, optimizers
    and counters are those of `step`, the first. With a budget the passes keep what its plan says, and an out-of-memory
    takes the next plan.
    """

    def __init__(self, teacher: Teacher, store: Store, config: Config, budget: Budget | None = None) -> None:
        self.teacher, self.store, self.config, self.budget = teacher, store, config, budget
        self.lora = LoRA(teacher.unet, config.lora_rank, config.seed)
        self.negatives = Negatives(teacher, config.negative_prompt)
        self.validation = Validation(teacher, store, config, self.negatives)
        for i in range(len(store)) if config.relative_start == "student" else self.validation.held_out:
            self.negatives(store.negative(i))  # now: between iterations the text encoders would need memory
        self.step = Step(teacher.unet, self.lora, teacher.schedule, config, store[0], self._uncond(store[0]))
        self.steps = {store.resolution(0): self.step}
        for i in range(1, min(len(store), len(store.resolutions))):
            if store.resolution(i) not in self.steps:
                self.steps[store.resolution(i)] = self.step.sibling(store[i], self._uncond(store[i]))
        self._paused = budget is not None  # without what the budget's plan keeps aside: no slab is there yet
        self._slots: dict[tuple[int, int], Callable[[], None]] = dict(self.steps)
        self._eager = dict.fromkeys(self.steps, EAGER)
        self._pool = torch.cuda.graph_pool_handle() if self.step.z.is_cuda else None
        self._read = Reader(store, self.steps)
        trained = range(self.validation.trained)
        self._mine = {size: torch.tensor([store.resolution(i) == size for i in trained]) for size in self.steps}
        self._dry = True  # no iteration has shown yet what it takes
        self._reported = 0.0  # skipped updates of earlier reports
        self._worst = 0.0  # the most in a row, by the last report
        self.fault: tuple[int, str] | None = None  # the first skipped update of the last report: iteration, stage
        self._measured: tuple[int, Measured] | None = None
        self.done = 0

    def iterate(self) -> None:
        """One iteration: one trajectory for each rank, all of one size, N slots, both updates in each.

        One that runs out of memory starts again under the next plan, from what was there before. RunError if none is.
        """
        if self._paused:
            self._replan()
        index, before = self._turn(self.done)
        trajectory, size = self._read(index, then=self._turn(self.done + 1)[0]), self.store.resolution(index)
        if self.budget is None or self._slots[size] is not self.steps[size]:  # a graph that is there allocates nothing
            self._walk(trajectory, size, before)
        else:
            self._walk_within(self.budget, trajectory, size, before)
        self.done += 1
        if self._dry and self.budget is not None:
            self._settle(self.budget)

    def _walk(self, trajectory: Trajectory, size: tuple[int, int], before: int) -> None:
        step = self.steps[size]
        if self._slots[size] is step:
            if self._eager[size] and any(self._slots[other] is not self.steps[other] for other in self.steps):
                self.release()  # a plan has no room for the others' graphs beside an eager slot
            if self._eager[size] == 0 and step.z.is_cuda:
                self._slots[size] = step.captured(self._pool)
        self._eager[size] = max(0, self._eager[size] - 1)
        number = self.done * distributed.world() + distributed.rank()
        step.load(trajectory, number, self._uncond(trajectory) if self.config.relative_start == "student" else None)
        self._read.sent()
        step.draw(self._generator(f"iteration {number}"), before)
        self._set_rates()
        for _ in range(self.config.steps):
            self._slots[size]()

    def _walk_within(self, budget: Budget, trajectory: Trajectory, size: tuple[int, int], before: int) -> None:
        """`_walk`, until it fits."""
        if self._dry and self.step.z.is_cuda:  # what earlier phases took does not count
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        as_it_was = Snapshot(self.steps[size])
        while True:
            try:
                self._walk(trajectory, size, before)
                break
            except RuntimeError as error:
                if (message := out_of_memory(error)) is None:
                    raise
            if distributed.world() > 1:  # the others wait in the middle of this slot
                raise RunError(
                    f"rank {distributed.rank()} ran out of memory in iteration {self.done} ({message}), and several "
                    "ranks cannot take another plan: give a smaller --vram, and --resume_from_checkpoint latest goes on"
                )
            as_it_was.restore()
            self._step_down(budget, message)

    def _settle(self, budget: Budget) -> None:
        """What the first iteration has taken decides the plan of the others."""
        if self.step.z.is_cuda and (line := budget.correct()):
            tqdm.write(line)
            self.release()
            self._eager = dict.fromkeys(self.steps, EAGER)  # what is to be captured must have run
            self._replan()
        self._dry = False

    def _step_down(self, budget: Budget, message: str) -> None:
        line = budget.step_down()
        if line is None:
            raise RunError(
                f"out of memory in iteration {self.done} though everything was given up that could be ({message}): "
                f"give more --vram, at least {budget.planner.smallest_words()}, or a smaller resolution or rank"
            )
        if line:
            tqdm.write(f"note: {line}")
        self._let_go()
        self.release()
        self._eager = dict.fromkeys(self.steps, EAGER)
        self._replan()

    def _replan(self) -> None:
        self._let_go()  # or the host would hold two slabs
        memory = self.budget.memory(self.teacher.unet)
        for step in self.steps.values():
            step.memory = memory
        self._paused = False

    def _let_go(self) -> None:
        """Of the slab, and of what an iteration that broke off has under way there: it holds itself."""
        if self.step.z.is_cuda:
            torch.cuda.synchronize()
        for step in self.steps.values():
            if (offload := step.memory.student.offload) is not None:
                offload.begin()
            step.memory = SlotMemory()

    def pause(self) -> None:
        """`release`, and let go of the host's memory that is pinned for slots: the next iteration takes it again."""
        self.release()
        self._let_go()
        self._paused = self.budget is not None

    def release(self) -> None:
        """Give back the captured slots and their memory; the next iteration of each size captures it again."""
        for size, step in self.steps.items():
            if self._slots[size] is not step:
                self._slots[size], self._eager[size] = step, 0
        if self.step.z.is_cuda:
            self.step.forget()  # they lie in the graphs' memory
            self._pool = torch.cuda.graph_pool_handle()  # one that no graph holds any more takes no other capture
            torch.cuda.empty_cache()

    def measure(self) -> Measured:
        """What `validation` says of the student as it is now; once for each iteration."""
        if self._measured is None or self._measured[0] != self.done:
            self._measured = self.done, self.validation(self.steps)
        return self._measured[1]

    @property
    def behind(self) -> bool:
        """Whether the host may be ahead of the device: then what it asks for is not there at once."""
        return self.step.z.is_cuda

    def losses(self, slots: int) -> Callable[[], dict[str, float]]:
        """Asks the device for the figures of the last `slots` slots; the call that is returned waits for them.

        The mean losses, without those whose update was skipped; how many were, ever; the learning rate. That call sets
        `fault`.
        """
        step = self.step
        rate = step.optimizer.param_groups[0]["lr"]
        fetched = Fetched(torch.cat([step.sums, torch.stack([step.skipped, step.worst, rate]), step.fault.float()]))
        step.sums.zero_()
        step.fault.zero_()

        def read() -> dict[str, float]:
            found = fetched()
            skipped, self._worst, lr, *fault = found[len(LOSSES) :].tolist()
            self.fault = describe([*map(int, fault)], self.config.steps, distributed.world()) if fault[0] else None
            counted = max(1.0, slots - (skipped - self._reported))
            self._reported = skipped
            means = dict(zip(LOSSES, (found[: len(LOSSES)] / counted).tolist(), strict=True))
            return {**means, "skipped": skipped, "lr": lr}

        return read

    def check(self) -> None:
        """RunError after too many updates in a row that were not finite, by the last figures that were read."""
        if self._worst >= PATIENCE:
            last = f" (iteration {self.fault[0]}: {self.fault[1]})" if self.fault else ""
            raise RunError(
                f"{PATIENCE} updates in a row were not finite, up to iteration {self.done}{last}: "
                "lower learning_rate, or use mixed_precision bf16 or no"
            )

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name; all ranks ask together, and the first gets it."""
        return self._shared() | distributed.gathered(self._own())

    def _own(self) -> dict[str, Tensor]:
        """What each rank has for itself."""
        found: dict[str, Tensor] = {}
        for i, own in enumerate(self.steps.values()):
            if own.replay is not None:
                found |= {f"replay{i or ''}.{name}": x for name, x in own.replay.state_dict().items()}
        return found

    def _shared(self) -> dict[str, Tensor]:
        """What all ranks have alike."""
        step = self.step
        tensors = {"lora": self.lora.flat, "skipped": step.skipped, "streak": step.streak}
        tensors |= {f"heads.{name}": x for name, x in step.discriminators.state_dict().items()}
        for label, optimizer in (("lora", step.optimizer), ("heads", step.head_optimizer)):
            for i, parameter in enumerate(optimizer.param_groups[0]["params"] if optimizer else []):
                tensors |= {f"adam.{label}.{i}.{name}": x for name, x in optimizer.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], done: int) -> None:
        """The inverse of `state`."""
        for name, mine in self._shared().items():
            mine.copy_(state[name])
        for name, mine in self._own().items():
            mine.copy_(state[distributed.owned(name)])
        self._reported = float(self.step.skipped)
        self.done = done

    def _uncond(self, trajectory: Trajectory) -> Text:
        return self.negatives(trajectory.negative, trajectory.text)

    def _set_rates(self) -> None:
        config, i = self.config, self.done
        rise = min(1.0, (i + 1) / (config.lr_warmup_steps + 1))
        fall = 0.5 * (1 + math.cos(math.pi * i / config.max_train_steps)) if config.lr_schedule == "cosine" else 1.0
        self.step.optimizer.param_groups[0]["lr"].fill_(config.learning_rate * rise * fall)
        self.step.adversarial.fill_(float(i >= config.head_warmup_steps))

    def _turn(self, iteration: int) -> tuple[int, int]:
        """This rank's trajectory in an iteration, and how many iterations of its size there were before.

        All ranks have one size at a time. Each size has an endless shuffle, of which W ranks take the next W.
        """
        epoch, place = divmod(iteration, self.validation.trained)
        order = self._order(epoch)
        mine = self._mine[self.store.resolution(int(order[place]))]
        before = epoch * int(mine.sum()) + int(mine[order[:place]].sum())
        epoch, place = divmod(before * distributed.world() + distributed.rank(), int(mine.sum()))
        order = self._order(epoch)
        return int(order[mine[order]][place]), before

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.validation.trained, generator=self._generator(f"epoch {epoch}"))

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_for(self.config.seed, purpose))
