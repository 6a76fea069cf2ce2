"""A run under a budget: refused at once, planned, and carried on after an out-of-memory with the same numbers."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from rapm import doctor
from rapm.cli import main
from rapm.config import Config
from rapm.errors import RunError, UserError
from rapm.loading.families import Model, model_of
from rapm.memory import cards, host
from rapm.memory.budget import Budget
from rapm.memory.cards import GIB, MIB
from rapm.memory.offload import CannotPin, Entry, Offload, Slab, _streams
from rapm.memory.planner import Plan, Planner, planned
from rapm.memory.saved import Policy
from rapm.step import SlotMemory, Step
from rapm.stop import advice
from rapm.store import FORMAT, METADATA, Store, pack_metadata
from rapm.teacher import Teacher, load_teacher
from rapm.training import Training
from rapm.trajectories import prepare

CONFIG = Config(
    trajectories=3, validation_prompts=1, fine_steps=2, guidance=3.0, learning_rate=1e-3, replay_size=2, lora_rank=2,
    max_train_steps=4,
)  # fmt: skip
SDXL = Config.preset("sdxl")
ITERATIONS = 3
FREE = 39 * GIB // 4
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
    monkeypatch.setattr(teacher, "unet_waits", True)
    assert torch.equal(teacher.encode(["a cat"]).hidden, wanted.hidden)
    assert moves == ["cpu", torch.device("cpu")]  # away, and back to where it was


def test_the_slab_is_there_for_slots_alone(teacher, store, free, monkeypatch):
    """Not before the first, nor at a validation or the export; and back for the next, with the same numbers."""
    budget, made, memory = budget_of(teacher), [], Budget.memory
    monkeypatch.setattr(Budget, "memory", lambda *given: made.append(memory(*given)) or made[-1])
    training = Training(teacher, store, CONFIG, budget)
    assert not made and training.step.memory == SlotMemory()
    for done in range(ITERATIONS):
        training.iterate()
        assert training.step.memory is made[-1] and len(made) == max(1, done)
        if done:
            training.pause()
            assert training.step.memory == SlotMemory()
    assert same({**training.state(), "sums": training.step.sums}, free)
    alone = Training(teacher, store, CONFIG)
    alone.pause()
    alone.iterate()  # without a budget nothing is planned


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A card of 12 GiB where there is none, with 10.25 GiB for us."""
    for owner, name, value in (
        (cards, "this_card", cards.CARDS[0]), (cards, "cap", None), (host, "limit", None),
        (cards, "process_memory", GIB // 2), (torch.cuda, "mem_get_info", (FREE, 12 * GIB)),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *_, value=value: value)
    monkeypatch.setattr("rapm.memory.budget.Slab", lambda *_: None)
    return torch.device("cuda", 0)


def test_a_budget_above_what_is_free_is_cut_down_to_it(gpu, monkeypatch, capsys):
    budget = Budget(model_of("sdxl"), SDXL.replace(vram="12G"), gpu)
    assert budget.bytes == FREE + GIB // 2 and max(budget.plan.phases.values()) <= budget.bytes
    line = "note: vram 12.00G is more than this card has free: planned for 10.25G\n"
    assert capsys.readouterr().out == line
    again = Budget(model_of("sdxl"), SDXL.replace(vram="12G"), gpu, budget.bytes)
    assert again.bytes == budget.bytes and Budget(model_of("sdxl"), SDXL.replace(vram="10G"), gpu).bytes == 10 * GIB
    assert not capsys.readouterr().out
    monkeypatch.setattr(cards, "process_memory", lambda: None)  # as in containers and WSL
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    assert cards.most(gpu) == cards.automatic(gpu) == FREE + 3 * GIB + cards.CONTEXT - cards.DISPLAY


def test_plan_and_doctor_say_it_too(gpu, monkeypatch, capsys):
    monkeypatch.setattr("rapm.memory.report.no_gpu", lambda name: None)
    for name in ("set_device", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    assert main(["plan", "--teacher", "sdxl", "--vram", "12G"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("note: vram 12.00G is more than") and "budget 10.2 GiB" in said
    card = SimpleNamespace(name="card", major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(cards, "link_rate", lambda device: 24.0)
    assert any("at most --vram 10.2G" in str(finding) for finding in doctor._gpu(None))


def cannot_pin(*_: object) -> None:
    raise CannotPin("the host cannot pin 4.1 GiB of memory (CUDA error 2)")


def test_a_host_that_cannot_pin_gets_a_plan_without_copies(gpu, monkeypatch, capsys):
    config = SDXL.replace(vram="10G")
    assert Budget(model_of("sdxl"), config, gpu).plan.moved
    monkeypatch.setattr("rapm.memory.budget.Slab", cannot_pin)
    budget = Budget(model_of("sdxl"), config, gpu)
    assert not budget.plan.moved and max(budget.plan.phases.values()) <= 10 * GIB
    out = capsys.readouterr().out
    assert out.startswith("note: the host cannot pin 4.1 GiB") and out.count("\n") == 1 and "ulimit -l" in out
    with pytest.raises(UserError, match=r"too little .*at least --vram .*cannot pin .*ulimit -l"):
        Budget(model_of("sdxl"), SDXL.replace(vram="7.1G", frozen_weights="full"), gpu)
    assert Budget(model_of("sdxl"), SDXL.replace(vram="7.1G"), gpu).planner.config.frozen_weights == "int8"


def test_in_the_middle_of_a_run_too(teacher, store, free, monkeypatch, capsys):
    """At the second slab, after an out-of-memory: the next plan moves nothing, keeps no more, and has the same bits."""
    planned = []
    plan = Planner.plan

    def moving(self: Planner, budget: int, most: int | None = None) -> Plan:
        planned.append(plan(self, budget, most))
        return replace(planned[-1], moved=2**20 * self.copies)

    monkeypatch.setattr(Planner, "plan", moving)
    offload, slabs = Offload, []
    monkeypatch.setattr("rapm.memory.budget.Offload", lambda *given: slabs.append(0) or (
        offload(*given) if len(slabs) == 1 else cannot_pin()))  # fmt: skip
    out_of_memory(monkeypatch, {3, 9})
    assert same(run(teacher, store, budget_of(teacher)), free)
    assert len(slabs) == 2  # nothing is pinned after that, whatever fails
    kept = [found.kept for found in planned]
    assert len(kept) == 4 and kept[0] > kept[1] == kept[2] > kept[3]
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("cannot pin") == 1


def test_the_host_never_holds_two_slabs(teacher, store, monkeypatch):
    """Not after an out-of-memory in the middle of a slot either, whose tensors under way hold the slab in a circle."""
    plan, offload, slabs = Planner.plan, Offload, []
    monkeypatch.setattr(Planner, "plan", lambda *given: replace(plan(*given), moved=2**20))

    def made(*given: object) -> Offload:
        assert not any(slab() for slab in slabs)
        found = offload(*given)
        slabs.append(weakref.ref(found.slab))
        return found

    monkeypatch.setattr("rapm.memory.budget.Offload", made)
    call, failing = Step.__call__, [2, 1]

    def step(self: Step) -> None:
        if failing and self.slot == 1:
            failing.pop()
            mover = self.memory.student.offload
            mover.entries.append(Entry(mover, 0, torch.zeros(1), torch.zeros(1)))
            raise torch.OutOfMemoryError("CUDA out of memory")
        call(self)

    monkeypatch.setattr(Step, "__call__", step)
    gc.disable()
    try:
        training = Training(teacher, store, CONFIG, budget_of(teacher))
        training.iterate()
        training.pause()
        training.iterate()
    finally:
        gc.enable()
    assert len(slabs) == 4 and not failing


def test_copies_of_all_slabs_have_the_same_streams(monkeypatch):
    """PyTorch has 32: ever new ones would come to be the stream of a capture."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    _streams.cache_clear()
    assert _streams(torch.device("cuda", 0)) is _streams(torch.device("cuda", 0))
    assert len({*_streams(torch.device("cuda", 0)), *_streams(torch.device("cuda", 1))}) == 4
    _streams.cache_clear()


def test_a_host_without_the_memory_cannot_pin_it():
    with pytest.raises(CannotPin, match=r"the host has no .* GiB"):
        Slab(2**60, CPU)


def test_where_no_plan_is_left_without_copies_it_is_one_line(monkeypatch):
    budget = Budget(model_of("sdxl"), SDXL.replace(vram="7.1G", frozen_weights="full"), CPU)
    monkeypatch.setattr("rapm.memory.budget.Offload", cannot_pin)
    with pytest.raises(RunError, match=r"too little .*cannot pin .*ulimit -l") as error:
        budget.memory(torch.nn.Module())
    assert "\n" not in str(error.value)


def stored(folder: Path, **mode: str) -> Path:
    """A store of which there is a shard, as far as a plan looks."""
    (folder / "trajectories").mkdir(parents=True)
    (folder / "trajectories" / "shard-00000.safetensors").touch()
    (folder / "trajectories" / METADATA).write_bytes(pack_metadata({"format": FORMAT, **mode}))
    return folder


def test_auto_goes_on_with_the_weights_of_the_store(tmp_path, capsys):
    """Whatever is free today, as long as a plan for them fits."""
    int8, full = stored(tmp_path / "int8", frozen_weights="int8"), stored(tmp_path / "full")
    nf4 = stored(tmp_path / "nf4", frozen_weights="nf4")
    for folder, vram, mode in (
        (tmp_path, 8, "full"), (int8, 8, "int8"), (full, 8, "full"), (full, 6, "int8"), (nf4, 8, "nf4"),
    ):  # fmt: skip
        config = SDXL.replace(output_dir=str(folder))
        assert planned(model_of("sdxl"), config, None, vram * GIB)[0].config.frozen_weights == mode, (folder, vram)
    with pytest.raises(UserError) as error:
        planned(model_of("sdxl"), SDXL.replace(output_dir=str(tmp_path / "int8")), None, 3 * GIB)
    assert str(error.value) in main_error(capsys, "--output_dir", str(tmp_path), "--vram", "3G")  # nf4's smallest
    assert main(["plan", "--teacher", "sdxl", "--vram", "8G", "--output_dir", str(int8)]) == 0
    assert "in int8, as the trajectories that are here were made with" in capsys.readouterr().out
    (int8 / "trajectories" / METADATA).write_text("damaged")
    assert main(["plan", "--teacher", "sdxl", "--vram", "8G", "--output_dir", str(int8)]) == 0


def main_error(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(["plan", "--teacher", "sdxl", *words]) == 2
    return capsys.readouterr().err


def test_a_run_goes_on_with_its_checkpoints_weights(place, tmp_path, monkeypatch, capsys):
    """`auto` would take others: it does without trajectories, and names the setting where nothing decides."""
    settings = tmp_path / "settings.toml"
    small = "fine_steps = 2\ntrajectories = 3\nvalidation_prompts = 1\nlr_schedule = 'constant'\nfd_samples = 0\n"
    files = ["--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--config", str(settings)]
    command = ["train", *files, "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--max_train_steps"]
    settings.write_text(small + "frozen_weights = 'int8'\ndevice = 'cpu'\n")
    assert main([*command, "1"]) == 0
    settings.write_text(small + "device = 'cpu'\n")
    capsys.readouterr()
    assert main([*command, "2"]) == 2  # a CPU without --vram has no budget: full
    assert 'frozen_weights = "int8" in a file for --config goes on with it' in capsys.readouterr().err
    said, pause, measure = [], Training.pause, Training.measure
    monkeypatch.setattr(Training, "pause", lambda self: said.append("pause") or pause(self))
    monkeypatch.setattr(Training, "measure", lambda self: said.append("measure") or measure(self))
    monkeypatch.setattr("rapm.train.verify_export", lambda *_, **__: said.append("verify") or {})
    assert main([*command, "2", "--resume_from_checkpoint", "latest"]) == 0
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert said == ["pause", "measure", "pause", "verify", "measure"]  # no slab is there for any of them
    out = capsys.readouterr().out
    assert "safetensors was read back, but not sampled in stock diffusers (DDIM" in out and "rapm export --run" in out
    settings.write_text(small + "frozen_weights = 'full'\ndevice = 'cpu'\n")
    assert main([*command, "3", "--resume_from_checkpoint", "latest"]) == 2
    assert 'go on with frozen_weights = "int8" in a file for --config' in capsys.readouterr().err


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
