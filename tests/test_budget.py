"""A run under a budget: refused at once, planned, and carried on after an out-of-memory with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from rapm.cli import main
from rapm.config import Config
from rapm.errors import RunError
from rapm.loading.families import Model, model_of
from rapm.memory import cards
from rapm.memory.budget import Budget
from rapm.memory.cards import GIB, MIB
from rapm.memory.saved import Policy
from rapm.step import Step
from rapm.stop import advice
from rapm.store import Store
from rapm.teacher import Teacher, load_teacher
from rapm.training import Training
from rapm.trajectories import prepare

CONFIG = Config(
    trajectories=3, validation_prompts=1, fine_steps=2, guidance=3.0, learning_rate=1e-3, replay_size=2, lora_rank=2,
    max_train_steps=4,
)  # fmt: skip
ITERATIONS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.tiny_pipeline("sd2", folder / "teacher")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder


@pytest.fixture(scope="module")
def teacher(place: Path) -> Teacher:
    return load_teacher(str(place / "teacher"), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def store(place: Path, teacher: Teacher) -> Store:
    return prepare(place / "store", teacher, ["a cat", "a dog"], CONFIG.replace(trajectories=4), progress=False)


def run(teacher: Teacher, store: Store, budget: Budget | None) -> dict[str, torch.Tensor]:
    """The state after ITERATIONS."""
    training = Training(teacher, store, CONFIG, budget)
    for _ in range(ITERATIONS):
        training.iterate()
    assert training.done == ITERATIONS
    return {**training.state(), "sums": training.step.sums}


@pytest.fixture(scope="module")
def free(teacher: Teacher, store: Store) -> dict[str, torch.Tensor]:
    """Without a budget."""
    return run(teacher, store, None)


def budget_of(teacher: Teacher, vram: str = "4G") -> Budget:
    return Budget(Model.of(teacher.source, teacher.unet.config, teacher.pipe), CONFIG.replace(vram=vram), CPU)


def same(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in state.items())


def out_of_memory(monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> list[int]:
    """Slots, counted over all attempts, that have done their work and then find no memory; what ran is appended."""
    ran: list[int] = []
    call = Step.__call__

    def step(self: Step) -> None:
        call(self)
        ran.append(int(self.slot))
        if len(ran) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Step, "__call__", step)
    return ran


def test_a_tight_plan_changes_no_number(teacher, store, free):
    """Layers are checkpointed, computed again or moved, and every bit is that of the run that keeps everything."""
    budget = budget_of(teacher)
    assert not budget.plan.moved and all(policy == Policy() for policy in budget.plan.student.values())
    for _ in range(7):
        assert budget.step_down() is not None
    levels = {policy.level for policy in (*budget.plan.student.values(), *budget.plan.encoder.values())}
    assert "checkpoint" in levels and len(levels) > 1
    assert same(run(teacher, store, budget), free)


def test_out_of_memory_goes_on_from_the_same_iteration(teacher, store, free, monkeypatch, capsys):
    """In the first iteration, in the one after, twice in one: said once, and every bit is the undisturbed run's."""
    ran = out_of_memory(monkeypatch, {3, 5, 14})
    plans, replan = [], Training._replan

    def noted(self: Training) -> None:
        replan(self)
        plans.append(self.budget.plan.kept)

    monkeypatch.setattr(Training, "_replan", noted)
    assert same(run(teacher, store, budget_of(teacher)), free)
    assert len(ran) == 4 * ITERATIONS + 3 + 2 + 1  # the slots of three lost attempts
    assert len(plans) == 1 + 3 and plans == sorted(set(plans), reverse=True)  # the first, and one for each of them
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("out of memory") == 1


def test_when_nothing_is_left_to_give_it_says_so(teacher, store, monkeypatch):
    out_of_memory(monkeypatch, set(range(1, 1000)))
    with pytest.raises(RunError, match=r"out of memory in iteration 0 .*Tried to allocate.*--vram") as caught:
        run(teacher, store, budget_of(teacher))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCompile with ...",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_outside_an_iteration_it_ends_a_run_in_one_line(words):
    """As while validating, where no plan helps."""
    with pytest.raises(RunError) as caught, advice("the same command goes on"):
        raise RuntimeError(words)
    line = f"out of memory ({words.splitlines()[0]}); what was written before is whole; with more of it free, the same"
    assert str(caught.value) == f"{line} command goes on"
    with pytest.raises(RuntimeError, match=r"^a shape$"), advice("the same command goes on"):
        raise RuntimeError("a shape")


def test_the_real_features_may_come_one_by_one(teacher, store, free):
    """On a CPU a batch of two is computed as two of one are, up to rounding."""
    training = Training(teacher, store, CONFIG)
    training.step.memory = training.step.memory._replace(together=False)
    for _ in range(ITERATIONS):
        training.iterate()
    assert torch.allclose(training.step.sums, free["sums"], rtol=1e-3)


def test_a_budget_that_cannot_work_is_refused_before_the_weights_are_read(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rapm.train.load_teacher", lambda *_, **__: pytest.fail("the weights were read"))
    files = ["--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt")]
    assert main(["train", *files, "--output_dir", str(tmp_path / "run"), "--vram", "500M"]) == 2
    error = capsys.readouterr().err
    assert "too little" in error and "at least --vram" in error
    smallest = error.split("at least --vram ")[1].strip()
    budget = Budget(model_of(str(place / "teacher")), Config(vram=smallest), CPU)
    assert max(budget.plan.phases.values()) <= budget.bytes


def test_the_unet_waits_while_another_part_visits(teacher, monkeypatch):
    wanted, moves = teacher.encode(["a cat"]), []
    lay = type(teacher.unet).lay
    monkeypatch.setattr(type(teacher.unet), "lay", lambda self, device: moves.append(device) or lay(self, device))
    monkeypatch.setattr(teacher, "aside", True)
    assert torch.equal(teacher.encode(["a cat"]).hidden, wanted.hidden)
    assert moves == ["cpu", torch.device("cpu")]  # away, and back to where it was


def test_dry_run_tells_the_plan(place, tmp_path, capsys):
    files = ["--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt")]
    settings = tmp_path / "settings.toml"
    settings.write_text("fine_steps = 2\ntrajectories = 3\nvalidation_prompts = 1\n")
    extra = ["--config", str(settings), "--vram", "4G", "--dry-run"]
    assert main(["train", *files, "--output_dir", str(tmp_path / "run"), *extra]) == 0
    assert "everything is kept for backward" in capsys.readouterr().out


@pytest.mark.parametrize("more, context, fewer", [(-500, 0, False), (300, 0, True), (0, 300, True), (0, -300, False)])
def test_a_first_iteration_can_only_prove_a_slot_larger(monkeypatch, more, context, fewer):
    """`more` MiB reserved than an eager slot was to take, and `context` MiB beside them more than assumed."""
    budget = Budget(model_of("sdxl"), Config.preset("sdxl").replace(vram="12G"), CPU)
    planner, before, capped = budget.planner, budget.plan, []
    assert before.beside and planner.eager(before) < before.phases["train"]
    assumed = planner.context
    reserved = planner.eager(before) - assumed + more * MIB
    for name in ("max_memory_reserved", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: reserved)
    monkeypatch.setattr(cards, "process_memory", lambda: reserved + cards.CONTEXT + context * MIB)
    monkeypatch.setattr(cards, "cap", lambda *arguments: capped.append(arguments))
    line = budget.correct()
    assert planner.context == assumed + context * MIB and planner.correction == max(0, more) * MIB
    assert capped == [(CPU, 12 * GIB, planner.context)]
    assert budget.plan.phases["train"] <= 12 * GIB
    assert (budget.plan.kept < before.kept) == fewer and (budget.plan.kept > before.kept) == (context < 0)
    assert (line is None) == (more <= 0 and context == 0)
    assert budget.correct() is None  # once
