"""What a plan counts of a run's phases is what they hold: parts that take turns are not there at once."""

from __future__ import annotations

import weakref

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import rapm.trajectories
from rapm.cli import main
from rapm.config import Config
from rapm.errors import ExportError
from rapm.export.files import export_lora, verify_export
from rapm.loading.families import model_of
from rapm.lora import LoRA
from rapm.memory import cards
from rapm.memory.budget import Budget
from rapm.memory.cards import GIB
from rapm.memory.planner import Plan, Planner
from rapm.solver import Solver
from rapm.teacher import DECODE_PIXELS, Teacher, load_teacher
from rapm.training import Training
from rapm.trajectories import prepare

CPU = torch.device("cpu")
SIZES = (64, 128), (128, 64), (64, 64)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("place")
    tiny.tiny_pipeline("sdxl", folder / "teacher")
    return load_teacher(str(folder / "teacher"), device="cpu", dtype=torch.float32)


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operators have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            storage = x.untyped_storage() if torch.is_tensor(x) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("side", [512, 1024])
def test_the_vae_takes_no_more_than_is_counted(side: int) -> None:
    """The published VAE's shapes, and as many pictures as `Teacher.decode` gives it."""
    import diffusers

    widths, count = [128, 256, 512, 512], max(1, DECODE_PIXELS // side**2)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(block_out_channels=widths, latent_channels=4, layers_per_block=2, **blocks)
    with torch.no_grad(), Alive() as alive:
        vae.decode(torch.empty(count, 4, side // 8, side // 8, device="meta"))
    assert 0.5 * cards.DECODE < alive.peak / (count * side**2) <= cards.DECODE
    for family in ("sd15", "sdxl"):
        planner = Planner(model_of(family), Config.preset(family).replace(resolution=(side, side)), cards.CARDS[-1])
        plan = planner.plan(None)
        beside = planner.sizes.weights + planner.sizes.state + planner.sizes.vae
        assert plan.phases["validate"] >= planner.context + beside + alive.peak


def test_small_pictures_are_counted_as_many_as_are_decoded_together() -> None:
    config = Config.preset("sd15").replace(resolution=(128, 128), validation_prompts=8)
    found = [Planner(model_of("sd15"), config.replace(validation_prompts=n)).plan(None) for n in (8, 16, 64)]
    need = [plan.phases["validate"] for plan in found]
    assert need[1] - need[0] >= 8 * 128**2 * cards.DECODE
    assert need[2] == need[1]  # of 512 x 512 pixels there are no more


@pytest.mark.parametrize("unet_waits", [False, True])
def test_the_text_encoders_come_when_no_solver_is_there(teacher, tmp_path, monkeypatch, unet_waits) -> None:
    """For several shards at a time, of which each is what it would be alone."""
    made, visits, encode = [], [], Teacher.encode

    class Noted(Solver):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            made.append(weakref.ref(self))

    def visited(self: Teacher, prompts: list[str], resolution: tuple[int, int] | None = None):
        visits.append((len(prompts), [solver for solver in made if solver() is not None]))
        return encode(self, prompts, resolution)

    config = Config(trajectories=11, fine_steps=2, guidance=3.0, solve_batch=2, resolution=(64, 64))
    monkeypatch.setattr(rapm.trajectories, "SHARD_MAX", 2)
    monkeypatch.setattr(rapm.trajectories, "ENCODED", 1)
    alone = prepare(tmp_path / "alone", teacher, ["a cat", "a dog", "a cow"], config, progress=False)
    monkeypatch.setattr(rapm.trajectories, "ENCODED", 4)
    monkeypatch.setattr(rapm.trajectories, "Solver", Noted)
    monkeypatch.setattr(Teacher, "encode", visited)
    monkeypatch.setattr(teacher, "unet_waits", unet_waits)
    store = prepare(tmp_path / "store", teacher, ["a cat", "a dog", "a cow"], config, progress=False)
    assert visits == [(2, [])] * 5 + [(1, [])] and len(made) == 2
    for i in range(11):
        assert store[i].prompt == alone[i].prompt and torch.equal(store[i].text.hidden, alone[i].text.hidden)
        assert torch.equal(store[i].positions, alone[i].positions)


def test_a_solver_holds_one_shape(teacher) -> None:
    solver = Solver(teacher.unet, teacher.schedule, steps=2, fine_steps=1, guidance=1.0)
    walks = []
    for rows in (2, 1, 1, 2):
        solver(teacher.encode(["a cat"] * rows, (64, 64)), torch.zeros(rows, 4, 8, 8))
        walks.append(weakref.ref(solver._walk[0]))
    assert walks[1]() is None and walks[2]() is None and walks[3]().z.shape[0] == 2


def test_the_prompts_are_encoded_before_the_stock_pipeline_is_there(teacher, tmp_path, monkeypatch) -> None:
    there, encode, stock = [], Teacher.encode, Teacher.stock_pipeline
    monkeypatch.setattr(Teacher, "encode", lambda *words: there.append("text") or encode(*words))
    monkeypatch.setattr(Teacher, "stock_pipeline", lambda self: there.append("stock") or stock(self))
    lora = LoRA(teacher.unet, 2).export()
    export_lora(tmp_path, lora, teacher, config=Config(lora_rank=2), steps_done=1)
    verify_export(tmp_path, teacher, lora, prompts=["a cat"], noise=torch.randn(1, 4, 16, 16), steps=2)
    assert there == ["text", "stock"]
    planner = Planner(model_of("sdxl"), Config.preset("sdxl").replace(lora_rank=64), cards.CARDS[-1])
    sizes, plan = planner.sizes, planner.plan(None)
    most = max(sizes.whole + (sizes.text + sizes.vae) // 2 + sizes.weights, sizes.text + sizes.weights)
    assert plan.phases["export"] >= planner.context + most + sizes.state + 4 * sizes.lora


@pytest.mark.parametrize("unet_waits", [False, True])
def test_by_blocks_ours_waits_only_where_it_must(teacher, tmp_path, monkeypatch, unet_waits) -> None:
    """Each time the stock UNet samples, and while the prompts are encoded."""
    moves, lay = [], type(teacher.unet).lay
    monkeypatch.setattr(type(teacher.unet), "lay", lambda self, device: moves.append(str(device)) or lay(self, device))
    monkeypatch.setattr(teacher, "stock_by_blocks", True)
    monkeypatch.setattr(teacher, "unet_waits", unet_waits)
    lora = LoRA(teacher.unet, 2).export()
    export_lora(tmp_path, lora, teacher, config=Config(lora_rank=2), steps_done=1)
    found = verify_export(tmp_path, teacher, lora, prompts=["a cat"], noise=torch.randn(1, 4, 16, 16), steps=2)
    assert len(found) == 2 and moves == ["cpu", "cpu"] * 3 * unet_waits
    planner = Planner(model_of("sdxl"), Config.preset("sdxl"), cards.CARDS[-1])
    need = planner._export(Plan(None, cards.CARDS[-1], stock_by_blocks=True, unet_waits=unet_waits))
    assert need >= planner.sizes.block + planner.sizes.weights * (not unet_waits)


def test_without_room_for_a_stock_pipeline_the_files_are_read_back(teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Teacher, "stock_pipeline", lambda self: pytest.fail("a stock pipeline was loaded"))
    monkeypatch.setattr(teacher, "proven", False)
    lora = LoRA(teacher.unet, 2).export()
    export_lora(tmp_path, lora, teacher, config=Config(lora_rank=2), steps_done=1)
    proof = dict(prompts=["a cat"], noise=torch.randn(1, 4, 16, 16), steps=2)
    assert verify_export(tmp_path, teacher, lora, **proof) == {}
    other = {name: (down, up + 1) for name, (down, up) in lora.items()}
    with pytest.raises(ExportError, match="differs from the student's"):
        verify_export(tmp_path, teacher, other, **proof)


def test_an_eager_slot_has_no_graphs_of_other_sizes_beside_it(teacher, tmp_path) -> None:
    config = Config(resolution=SIZES[0], buckets=SIZES[1:], trajectories=6, validation_prompts=1, fine_steps=2,
                    guidance=1.0, lora_rank=2)  # fmt: skip
    store = prepare(tmp_path, teacher, ["a cat"], config.replace(trajectories=7), progress=False)
    training, seen = Training(teacher, store, config), set()
    while len(seen) < len(SIZES):
        size = store.resolution(training._turn(training.done)[0])
        for other in seen - {size}:
            training._slots[other], training._eager[other] = training.steps[other].__call__, 0  # as if it were captured
        training.iterate()
        if size not in seen:
            assert all(training._slots[other] is training.steps[other] for other in training.steps)
        seen.add(size)


def test_replayed_features_are_counted_for_each_size_and_in_every_phase() -> None:
    config = Config.preset("sdxl").replace(resolution=(1024, 1024), replay_size=16)
    one, two = (Planner(model_of("sdxl"), config.replace(buckets=sizes)) for sizes in ((), ((512, 512),)))
    none = Planner(model_of("sdxl"), config.replace(replay_size=0))
    kept = 16 * 4 * 3 * one.sizes.features
    plans = [planner.plan(None).phases for planner in (none, one, two)]
    for phase in ("train", "validate", "export"):
        assert plans[1][phase] - plans[0][phase] >= kept and plans[2][phase] - plans[1][phase] >= kept
    assert plans[2]["solve"] == plans[0]["solve"]


def test_a_plan_for_several_sizes_is_that_of_a_run(capsys: pytest.CaptureFixture) -> None:
    """The largest decides, whichever comes first; the store has all."""
    assert main(["plan", "--teacher", "sdxl", "--vram", "12G", "--resolution", "512x512,1024x1024"]) == 0
    said = capsys.readouterr().out
    config = Config.preset("sdxl").replace(vram="12G", resolution=(512, 512), buckets=((1024, 1024),))
    budget = Budget(model_of("sdxl"), config, CPU)
    assert "sdxl, 512x512, 1024x1024, LoRA" in said
    assert f"{budget.plan.phases['train'] / GIB:6.2f}" in said
    small, large = budget.planner.sizes.trajectories
    assert small < large and budget.planner.disk() == 504 * (small + large)
    assert Budget(model_of("sdxl"), config, CPU, 16 * GIB).bytes == 16 * GIB


@pytest.mark.parametrize("name, side", [("sdxl", 1024), ("sdxl", 768), ("sdxl", 512), ("sd21", 512), ("sd15", 512)])
@pytest.mark.parametrize("rank", [1, 64])
def test_every_budget_above_the_smallest_has_a_plan(name: str, side: int, rank: int) -> None:
    """A part that waits aside is found for each phase that needs it, and whole weights are kept where they fit."""
    config = Config.preset("sdxl" if name == "sdxl" else "sd15").replace(lora_rank=rank, resolution=(side, side))
    planner = Planner(model_of(name), config, cards.CARDS[-1], "full")
    smallest = int(float(planner.smallest_words()[:-1]) * GIB)
    for budget in range(smallest, 18 * GIB, GIB // 4):
        plan = planner.plan(budget)
        assert max(plan.phases.values()) <= budget
