"""A run's plan, the cap that enforces it, and what happens when it does not hold: the next rung, and on."""

from __future__ import annotations

from dataclasses import replace

import torch
from tqdm import tqdm

from rapm import distributed
from rapm.config import Config, parse_vram
from rapm.device import DTYPES
from rapm.errors import RunError, UserError
from rapm.loading.families import Model
from rapm.memory import cards, host
from rapm.memory.cards import GIB, MIB, Card
from rapm.memory.offload import CannotPin, Offload, Slab, slab_bytes
from rapm.memory.planner import Plan, planned
from rapm.memory.report import export_words, grouped, host_words, precision_words
from rapm.memory.saved import Memory
from rapm.step import SlotMemory
from rapm.teacher import Teacher

RUNG = 0.85  # of the bytes kept and under way, after an out-of-memory
# What is said of memory without torch.OutOfMemoryError: by the driver, by cuBLAS and cuDNN, by Triton, by the host
EXHAUSTED = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED", "[CUDA]: out of memory",
             "DefaultCPUAllocator: can't allocate memory")  # fmt: skip
SLOT = "student", "encoder", "together", "beside", "window"  # what of a plan a slot depends on
ELSEWHERE = "solve_batch", "unet_waits", "stock_by_blocks", "tiled", "proven"  # and what other phases do
MEND = "raise `ulimit -l` or free host memory"
NO_LIMIT = 2**62
CHANGE = 64 * MIB  # between predicted and measured, from which on it is worth another plan


def _host_limit() -> int | None:
    """Of several ranks' hosts the smallest."""
    limit = host.limit()
    limit = distributed.smallest(NO_LIMIT if limit is None else limit)
    return None if limit == NO_LIMIT else limit


class Budget:
    """The plan for `config` on `device`. UserError for a budget that cannot work, with the smallest that would."""

    def __init__(self, model: Model, config: Config, device: torch.device, budget: int | None = None) -> None:
        """`budget` in bytes stands above that of `config`: what is free now is less once the weights are there."""
        self.device, self.stepped, self.corrected = device, False, False
        self.most: int | None = None  # bytes that a slot may keep or have under way, after an out-of-memory
        cuda, asked = device.type == "cuda", parse_vram(config.vram)
        if budget is None:
            budget = cards.granted(device, asked) if cuda else asked
        self.bytes = distributed.smallest(budget)  # several ranks have one plan
        card = Card(*distributed.from_first(cards.this_card(device, DTYPES[config.mixed_precision]))) if cuda else None
        given = model, config, card, self.bytes, _host_limit() if cuda else None
        self.planner, self.plan = planned(*given)
        if not cuda:
            return
        problem = None
        try:
            Slab(slab_bytes(self.plan.moved), device)
        except CannotPin as error:
            problem = str(error)
        if distributed.largest(int(problem is not None)):
            problem = problem or "another rank's host cannot pin memory"
            try:
                self.planner, self.plan = planned(*given, copies=False)
            except UserError as error:
                raise UserError(f"{error}; {problem}: {MEND}") from error
            print(f"note: {problem}, so nothing is moved there: {MEND}, if that is too slow")
        cards.cap(device, self.bytes, self.planner.context)

    @staticmethod
    def wanted(config: Config, device: torch.device) -> bool:
        """A CPU run without --vram has no budget to keep."""
        return device.type == "cuda" or config.vram != "auto"

    def apply(self, teacher: Teacher, config: Config) -> Config:
        """`config` with the plan's batch; the teacher's parts take turns where the plan says so."""
        for name in ("unet_waits", "stock_by_blocks", "proven"):
            setattr(teacher, name, getattr(self.plan, name))
        if self.plan.tiled:
            teacher.decode_in_tiles()
        return config.replace(solve_batch=self.plan.solve_batch, frozen_weights=teacher.frozen)

    def memory(self, unet: torch.nn.Module) -> SlotMemory:
        """What a slot's passes keep, with a slab for what is moved. RunError for a host that cannot pin it any more."""
        moved = None
        if self.plan.moved:
            try:
                size = slab_bytes(self.plan.moved)
                moved = Offload(size, self.device, unet.parameters(), self.plan.window)
            except CannotPin as error:
                self._without_copies(str(error))
        plan = self.plan
        return SlotMemory(Memory(plan.student, moved), Memory(plan.encoder), plan.together, plan.beside)

    def _without_copies(self, problem: str) -> None:
        """In the middle of a run: the next plan moves nothing."""
        self.planner.copies = False
        try:
            self._replan(self.planner.plan(self.bytes, self.most))
        except UserError as error:
            raise RunError(f"{error}; {problem}: {MEND}") from error
        tqdm.write(f"note: {problem}, so nothing is moved there any more; the numbers stay the same")

    def _replan(self, plan: Plan) -> None:
        """`plan` for training; what the other phases go by stays."""
        self.plan = replace(plan, **{name: getattr(self.plan, name) for name in ELSEWHERE})

    def step_down(self) -> str | None:
        """The next plan after an out-of-memory, and one line that says so, at the first; None where there is none."""
        self.most = int(RUNG * (self.plan.kept + self.plan.window))
        try:
            self.plan = self.planner.plan(self.bytes, self.most)
        except UserError:
            return None
        first, self.stepped = not self.stepped, True
        words = "out of memory: the same iteration again, keeping less of each pass; the numbers stay the same"
        return words if first else ""

    def correct(self) -> str | None:
        """After the first iteration on the card: what it really took decides. One line where that changes the plan.

        That iteration was eager, and what a captured one takes beyond it does not show: a slot may prove larger than
        predicted, not smaller. Only a context that is smaller than assumed gives room.
        """
        if self.corrected or self.stepped:
            return None
        self.corrected, planner, before = True, self.planner, self.plan
        measured = distributed.largest(torch.cuda.max_memory_reserved(self.device))
        more, corrected = max(0, measured - (planner.eager(before) - planner.context)), planner.correction
        planner.correction += more
        process = cards.process_memory()
        context = -1 if process is None else process - torch.cuda.memory_reserved(self.device)
        if (context := distributed.largest(context)) >= 0:
            context += planner.graph
            more += context - planner.context
            planner.context = context
            cards.cap(self.device, self.bytes, planner.context)
        if abs(more) < CHANGE:
            return None
        try:
            plan = planner.plan(self.bytes)
        except UserError:  # it ran: the prediction was too high only for what it might have been
            planner.correction = corrected
            return None
        if all(getattr(plan, name) == getattr(before, name) for name in SLOT):
            return None
        self._replan(plan)
        return f"the first iteration took {measured / GIB:.2f} GiB: {summary(self.plan)}"


def out_of_memory(error: RuntimeError) -> str | None:
    """The first line of an out-of-memory; None for any other error. A capture that it ends may raise one of its own.

    Where the driver or a library finds none, for a graph or a workspace, its words are all that tells.
    """
    for e in (error, error.__context__):
        known = isinstance(e, RuntimeError) and any(words in str(e) for words in EXHAUSTED)
        if isinstance(e, torch.OutOfMemoryError) or known:
            return str(e).splitlines()[0]
    return None


def summary(plan: Plan) -> str:
    """What a plan does, in a line."""
    parts = [f"{kind} {policy}: {names}" for kind, policies in (("student", plan.student), ("encoder", plan.encoder))
             for policy, names in grouped(policies) if policy != "keep"]  # fmt: skip
    return "; ".join(parts) if parts else "everything is kept for backward"


def record(budget: Budget) -> dict[str, object]:
    """The plan as the report shows it; memory in MiB."""
    plan = budget.plan
    phases = {name: round(size / MIB) for name, size in plan.phases.items()}
    return {
        "budget": round(budget.bytes / MIB),
        "phases": phases,
        "slowdown": plan.slowdown,
        "summary": summary(plan),
    }


def words(budget: Budget) -> str:
    """What a run says of its plan, in a few lines."""
    plan = budget.plan
    peak = max(plan.phases, key=plan.phases.get)
    lines = [
        f"memory: {budget.bytes / GIB:.1f} GiB; training is to take {plan.phases['train'] / GIB:.1f}, "
        f"the most is {plan.phases[peak] / GIB:.1f} ({peak}); {plan.slowdown:.2f} times as long as without a limit",
        f"        {summary(plan)}",
        f"        {host_words(budget.planner, plan)}",
    ]
    if not plan.proven:
        lines.append(f"note: at the export the files are {export_words(plan)}")
    if line := precision_words(budget.planner):
        lines.append(f"        {line}")
    if risk := cards.fallback_risk():
        lines.append(f"note: {risk}")
    return "\n".join(lines)
