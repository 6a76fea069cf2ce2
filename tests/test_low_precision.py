"""Frozen weights in int8 and nf4: less memory, nothing whole kept, whole runs, and when a plan takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from exports import CONFIG, PROMPTS, latents, trained
from ops import error
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapm.cli import main
from rapm.config import Config
from rapm.errors import UserError
from rapm.export import files as export
from rapm.export.files import export_lora, verify_export
from rapm.export.lora_file import read_lora
from rapm.export.merge import export_merged, merged_pipeline, verify_merged
from rapm.kernels.dequantise import dequantise_ref
from rapm.layers import Linear
from rapm.loading.families import model_of
from rapm.lora import LoRA
from rapm.memory.cards import GIB
from rapm.memory.count import meta_unet
from rapm.memory.low_precision import Int8Linear, LowPrecision, Nf4Linear, low_precision
from rapm.memory.planner import Planner, planned
from rapm.memory.saved import LEVELS, Memory, Policy
from rapm.memory.sizes import sizes_of
from rapm.sample import sample
from rapm.store import Store
from rapm.teacher import load_teacher
from rapm.trajectories import prepare
from rapm.unet import Text, UNet

LOW = ("int8", "nf4")
# Of the UNet's output and of the LoRA's gradient. One layer is off by 1% in int8, by 9% in nf4, most of it averages
# out; twice what the tiny models show.
OUTPUT, GRADIENT = {"int8": 0.03, "nf4": 0.35}, {"int8": 0.06, "nf4": 0.7}


def tiny_unet(family: str) -> UNet:
    torch.manual_seed(0)
    return UNet(tiny.UNET[family]).requires_grad_(False).to(memory_format=torch.channels_last)


def inputs(unet: UNet) -> tuple[Tensor, Tensor, Text]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 5, unet.config["cross_attention_dim"], generator=generator)
    extra = (torch.randn(1, 32, generator=generator), torch.full((1, 6), 128.0))
    text = Text(hidden, *(extra if unet.config["addition_embed_type"] else ()))
    z, t = torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([500.0])
    return z.to(unet.device), t.to(unet.device), text.to(unet.device)


def step(unet: UNet, memory: Memory | None = None) -> tuple[Tensor, Tensor]:
    """The student's output and the LoRA's gradient."""
    lora = LoRA(unet, 2)
    with torch.no_grad():
        lora.flat.copy_(0.02 * torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(2)))
    out = unet(*inputs(unet), lora.views(unet.dtype), memory or Memory())
    pull = torch.linspace(-1, 2, out.numel()).view(out.shape).to(out)
    (gradient,) = torch.autograd.grad(out, lora.flat, pull)
    return out.detach(), gradient


def nbytes(unet: UNet) -> int:
    return sum(p.nbytes for p in unet.parameters())


@pytest.mark.parametrize("mode", LOW)
@pytest.mark.parametrize("family", tiny.UNET)
def test_near_the_whole_one_and_the_same_under_every_policy(family: str, mode: str) -> None:
    whole = tiny_unet(family)
    low = low_precision(copy.deepcopy(whole), mode)
    (out, gradient), (out_whole, gradient_whole) = step(low), step(whole)
    assert 0 < error(out, out_whole) < OUTPUT[mode] and 0 < error(gradient, gradient_whole) < GRADIENT[mode]
    for level in LEVELS[1:]:
        for x, y in zip(step(low, Memory(dict.fromkeys(low.layers(), Policy(level)))), (out, gradient), strict=True):
            assert torch.equal(x, y), level


def attention_by_matrices(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", LOW)
def test_kernels_and_references_agree_on_a_gpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, whose rounding is all that differs; and the same bits again, with every layer checkpointed too."""
    low = low_precision(tiny_unet("sdxl").to("cuda", torch.bfloat16), mode)
    monkeypatch.setattr("rapm.unet.attention", attention_by_matrices)  # others add up in any order
    found = step(low)
    again = step(low, Memory(dict.fromkeys(low.layers(), Policy("checkpoint"))))
    monkeypatch.setattr("rapm.kernels.runtime.MODE", "reference")
    (out, gradient), (out_ref, gradient_ref) = found, step(low)
    assert [error(x, y) for x, y in zip(again, found, strict=True)] == [0, 0]
    assert error(out, out_ref) < 0.03 and error(gradient, gradient_ref) < 0.1


@pytest.mark.gpu
def test_the_card_holds_fewer_bytes() -> None:
    """A student's pass at SDXL's widths: less in all, by what the weights are smaller."""
    config = {**tiny.UNET["sdxl"], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048}
    peaks, weights = {}, {}
    for mode in ("full", *LOW):
        torch.manual_seed(0)
        unet = UNet(config).requires_grad_(False).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
        low_precision(unet, mode)
        step(unet)  # compiles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step(unet)
        peaks[mode], weights[mode] = torch.cuda.max_memory_allocated(), nbytes(unet)
        del unet
    for mode in LOW:  # what is made for a product is there again, for its time
        assert peaks["full"] - peaks[mode] > 0.7 * (weights["full"] - weights[mode]) > 0


@pytest.mark.parametrize("mode", LOW)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_bytes_are_fewer_by_what_each_layer_says(family: str, mode: str) -> None:
    """int8: one byte a weight, and four a row, of four; nf4: half, a 64th, and four a row; of convolutions one."""
    whole = tiny_unet(family)
    saved = 0
    for layer in whole.lora_targets().values():
        count, rows = layer.weight.numel(), len(layer.weight)
        if isinstance(layer, Linear):
            if ".attentions." in layer.name:
                blocks = rows * -(-(count // rows) // 64)
                saved += 4 * count - 4 * rows - (count if mode == "int8" else count // 2 + blocks)
        elif mode == "nf4":
            saved += 4 * count - 4 * rows - count
    assert saved > 0 and nbytes(low_precision(copy.deepcopy(whole), mode)) == nbytes(whole) - saved


@pytest.mark.parametrize("mode", LOW)
@pytest.mark.parametrize("policy", ["keep", "lean"])
def test_no_whole_weight_is_kept_for_backward(mode: str, policy: str) -> None:
    """What autograd holds between forward and backward, beside parameters, is what it holds without."""

    def kept(unet: UNet) -> int:
        mine = {p.untyped_storage()._cdata for p in unet.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def note(x: Tensor) -> Tensor:
            if x.untyped_storage()._cdata not in mine:
                storages[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        with saved_tensors_hooks(note, lambda x: x):
            lora = LoRA(unet, 2).views(torch.float32)
            out = unet(*inputs(unet), lora)
        assert out.requires_grad
        return sum(x.nbytes() for x in storages.values())

    unet = tiny_unet("sdxl")
    whole = kept(unet)
    assert kept(low_precision(unet, mode)) <= whole
    held = [x for m in unet.modules() if isinstance(m, LowPrecision) for x in vars(m).values()]
    assert not any(torch.is_tensor(x) for x in held)


def test_what_is_counted_is_what_there_is() -> None:
    """The planner's bytes, on meta tensors, are those of real weights; its passes keep no more than without."""
    for family, kind in (("sd15", Config.preset("sd15")), ("sdxl", Config.preset("sdxl"))):
        sizes = {mode: sizes_of(model_of(family), kind.replace(frozen_weights=mode)) for mode in ("full", *LOW)}
        assert sizes["full"].weights == sizes["int8"].whole and sizes["full"].made == sizes["int8"].made == 0
        for mode in LOW:
            assert sizes[mode].weights == nbytes(low_precision(meta_unet(model_of(family).unet, torch.bfloat16), mode))
            assert sizes[mode].encoder == sizes["full"].encoder
            for level in LEVELS:  # a LoRA's updates are added elsewhere, which takes some of its ranks' columns
                kept = [sum(x.kept[level] for x in sizes[m].student.layers.values()) for m in ("full", mode)]
                assert kept[1] == pytest.approx(kept[0], rel=0.01)
            assert 0 < sizes[mode].largest < 0.1 * sizes[mode].whole
    assert sizes["int8"].weights / GIB == pytest.approx(2.70, rel=0.02)  # as counted elsewhere: NUMBERS
    real = tiny_unet("sdxl")
    meta = low_precision(meta_unet(tiny.UNET["sdxl"], torch.float32), "nf4")
    assert nbytes(meta) == nbytes(low_precision(real, "nf4"))


@pytest.mark.parametrize("mode", LOW)
def test_loading_streams_into_it(tiny_folders: dict[str, Path], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes as of a whole teacher; no layer's weight stays whole; the fingerprint is the files'."""
    folder = str(tiny_folders["sdxl"])
    whole = load_teacher(folder, device="cpu", dtype=torch.bfloat16)
    alive: list[int] = []
    parts = LowPrecision.parts

    def counted(self: LowPrecision, weight: Tensor) -> dict[str, Tensor]:
        if not weight.is_meta:
            alive.append(weight.nbytes)
        return parts(self, weight)

    monkeypatch.setattr(LowPrecision, "parts", counted)
    low = load_teacher(folder, device="cpu", dtype=torch.bfloat16, frozen=mode)
    names = [m.name for m in low.unet.modules() if isinstance(m, LowPrecision)]
    assert len(alive) == len(names) > 0 and low.frozen == mode and low.fingerprint == whole.fingerprint
    expected = low_precision(whole.unet, mode).state_dict()
    found = low.unet.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in found.items())
    assert low.unet.dtype == torch.bfloat16 and not any(p.requires_grad for p in low.unet.parameters())
    layer = next(m for m in low.unet.modules() if isinstance(m, (Int8Linear, Nf4Linear)))
    assert layer.weight.dtype == torch.bfloat16 and layer.scale.dtype == torch.float32
    assert torch.equal(layer.weight, dequantise_ref(layer.codes, layer.scale, layer.blocks, torch.bfloat16))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.tiny_pipeline("sd1", folder / "teacher")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "settings.toml").write_text(
        "trajectories = 2\nfine_steps = 2\nguidance = 3.0\nvalidation_prompts = 1\nlearning_rate = 1e-3\n"
        "checkpointing_steps = 2\nvalidation_steps = 2\n"
    )
    return folder


def run(place: Path, output: str, mode: str, *extra: str) -> int:
    settings = place / f"{output}.toml"
    settings.write_text((place / "settings.toml").read_text() + f'frozen_weights = "{mode}"\n')
    return main([
        "train", "--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--output_dir",
        str(place / output), "--config", str(settings), "--report_to", "none", "--lora_rank", "2",
        "--max_train_steps", "2", *extra,
    ])  # fmt: skip


@pytest.mark.parametrize("mode", LOW)
def test_a_whole_run(place: Path, mode: str, capsys: pytest.CaptureFixture) -> None:
    """Trains, exports with the proof in stock software, resumes; its LoRA then works on the whole teacher."""
    assert run(place, mode, mode) == 0
    assert f'frozen_weights = "{mode}"' in (place / mode / "config.toml").read_text()
    assert Store.open(place / mode / "trajectories").metadata["frozen_weights"] == mode
    whole = load_teacher(str(place / "teacher"), device="cpu", dtype=torch.float32)
    low = load_teacher(str(place / "teacher"), device="cpu", dtype=torch.float32, frozen=mode)
    lora, text, noise = read_lora(place / mode, whole.unet), whole.encode(PROMPTS), latents(whole)
    assert any(up.any() for _, up in lora.values())
    ours, theirs = (sample(t.unet, t.schedule, text, noise, 4, lora=lora) for t in (whole, low))
    assert 0 < error(theirs, ours) < export.LOW_TOLERANCE[mode]
    capsys.readouterr()
    assert run(place, mode, "full", "--resume_from_checkpoint", "latest") == 2  # it would be another training
    assert f"made with frozen_weights = '{mode}', not 'full'" in capsys.readouterr().err
    assert main(["export", "--run", str(place / mode), "--merge"]) == 0
    assert "merged:" in capsys.readouterr().out


def test_stores(place: Path) -> None:
    """A complete store of the whole teacher serves; one of another precision, or one to be extended, does not."""
    full, int8, nf4 = (load_teacher(str(place / "teacher"), device="cpu", dtype=torch.float32, frozen=mode)
                       for mode in ("full", *LOW))  # fmt: skip
    config = CONFIG.replace(trajectories=2, fine_steps=2, guidance=3.0)
    whole = prepare(place / "whole", full, PROMPTS, config, progress=False)
    assert "frozen_weights" not in whole.metadata
    before = {path: path.read_bytes() for path in (place / "whole").iterdir()}
    same = prepare(place / "whole", int8, PROMPTS, config, progress=False)
    assert same.metadata == whole.metadata
    assert before == {path: path.read_bytes() for path in (place / "whole").iterdir()}
    with pytest.raises(UserError, match="frozen_weights 'full', not 'int8'"):
        prepare(place / "whole", int8, PROMPTS, config.replace(trajectories=4), progress=False)
    mine = prepare(place / "mine", int8, PROMPTS, config, progress=False)
    assert mine.metadata["frozen_weights"] == "int8"
    assert not torch.equal(mine[0].positions, whole[0].positions)
    for other, words in ((full, "'int8', not 'full'"), (nf4, "'int8', not 'nf4'")):
        with pytest.raises(UserError, match=f"frozen_weights {words}"):
            prepare(place / "mine", other, PROMPTS, config, progress=False)


@pytest.mark.parametrize("mode", ["full", *LOW])
def test_the_proof_takes_the_stock_unet_block_by_block(
    tiny_folders: dict[str, Path], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not both fit; a student of another strength is caught then too."""
    teacher = load_teacher(str(tiny_folders["sd1"]), device="cpu", dtype=torch.float32, frozen=mode)
    teacher.stock_by_blocks, moved = True, []
    monkeypatch.setattr(export, "_move", lambda place, module, *_: moved.append((str(place), type(module).__name__)))
    lora, proof = trained(teacher.unet), dict(prompts=PROMPTS, noise=latents(teacher), steps=4)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    differences = verify_export(tmp_path, teacher, lora, **proof)
    assert max(differences.values()) <= export.LOW_TOLERANCE.get(mode, 1e-4)
    blocks = {name for _, name in moved}
    assert {"CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "Conv2d"} <= blocks
    places = [place for place, name in moved if name == "UpBlock2D"]
    assert places == ["cpu", "cpu"] * (4 * len(differences))  # in and out at every step; here both are the CPU
    wrong = {name: (down, -40 * up) for name, (down, up) in lora.items()}
    pipe = teacher.stock_pipeline()
    with pytest.raises(export.ExportError, match="latents differ"):
        text = export.encoded(teacher, PROMPTS, proof["noise"])
        export.compare(tmp_path, pipe, teacher, wrong, **proof, text=text, dtype=torch.float32)


def test_a_merged_pipeline_has_the_whole_weights(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = str(tiny_folders["sd1"])
    whole, low = (load_teacher(folder, device="cpu", dtype=torch.float32, frozen=mode) for mode in ("full", "nf4"))
    lora = trained(whole.unet)
    state, expected = (merged_pipeline(t, lora, torch.float32).unet.state_dict() for t in (low, whole))
    assert state.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in state.items())
    path = export_merged(tmp_path, lora, low)
    proof = dict(prompts=PROMPTS, noise=latents(low), steps=4)
    assert verify_merged(path, low, lora, **proof, dtype=torch.float32) < export.LOW_TOLERANCE["nf4"]


@pytest.mark.parametrize(
    "name, rank, gib, mode",
    [("sdxl", 1, 12, "full"), ("sdxl", 1, 6, "int8"), ("sd15", 64, 6, "full"), ("sd15", 64, 4, "nf4")],
)
def test_only_a_budget_that_leaves_no_other_plan_takes_it(name: str, rank: int, gib: int, mode: str) -> None:
    config = Config.preset(name).replace(lora_rank=rank)
    planner, plan = planned(model_of(name), config, None, gib * GIB)
    assert planner.config.frozen_weights == mode and max(plan.phases.values()) <= gib * GIB
    if mode != "full":
        with pytest.raises(UserError, match="too little"):
            Planner(model_of(name), config).plan(gib * GIB)
        with pytest.raises(UserError, match="too little"):  # what is asked for is not overruled
            planned(model_of(name), config.replace(frozen_weights="full"), None, gib * GIB)


def test_plan_says_so(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--teacher", "sdxl", "--vram", "6G"]) == 0
    assert "frozen weights: linear layers in int8, as no plan fits this budget without" in capsys.readouterr().out
    assert main(["plan", "--teacher", "sdxl", "--vram", "16G"]) == 0
    assert "frozen weights" not in capsys.readouterr().out
    assert main(["plan", "--teacher", "sdxl", "--vram", "3G"]) == 2
    assert "at least --vram" in capsys.readouterr().err


def test_a_budget_chooses_before_the_weights_are_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`auto` and a budget that only nf4 meets: the run says so, and its teacher has never been whole."""
    plan, seen = Planner.plan, []

    def tight(self: Planner, *args: object, **kwargs: object) -> object:
        if self.config.frozen_weights != "nf4":
            raise UserError("too little")
        return plan(self, *args, **kwargs)

    def describe(config: Config, teacher: object, prompts: list) -> str:
        seen.append((config.frozen_weights, teacher.frozen, sum(type(m) is Linear for m in teacher.unet.modules())))
        return ""

    monkeypatch.setattr(Planner, "plan", tight)
    monkeypatch.setattr("rapm.train.describe", describe)
    assert run(place, "auto", "auto", "--vram", "4G", "--dry-run") == 0
    embeddings = sum(name.endswith("time_emb_proj") for name in tiny_unet("sd1").lora_targets())
    assert seen == [("nf4", "nf4", embeddings)]
    assert "frozen weights: linear layers in nf4 (4 bits), convolutions in int8" in capsys.readouterr().out
    assert run(place, "auto", "full", "--vram", "4G", "--dry-run") == 2


def test_style_loras_are_fused_first(tiny_teacher: Callable, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """The codes are those of the sum, and the stock pipeline has the whole sum."""
    base = tiny_teacher("sd1")
    style = trained(base.unet, seed=9)
    export_lora(tmp_path, style, base, config=CONFIG, steps_done=1)
    options = dict(device="cpu", dtype=torch.float32, loras=[str(tmp_path)])
    whole, low = (load_teacher(str(tiny_folders["sd1"]), frozen=mode, **options) for mode in ("full", "int8"))
    expected = low_precision(copy.deepcopy(whole.unet), "int8").state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in low.unet.state_dict().items())
    stock, fused = low.stock_pipeline().unet.state_dict(), whole.unet.state_dict()
    assert all(torch.allclose(x, fused[name], atol=1e-6) for name, x in stock.items())
