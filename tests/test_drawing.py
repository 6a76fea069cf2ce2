"""Pictures on a small card: what gives way, that they stay the same, and one line where nothing helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

import rapm.sample
from rapm.cli import main
from rapm.config import Config
from rapm.errors import UserError
from rapm.export.files import export_lora
from rapm.loading import single_file
from rapm.loading.families import model_of
from rapm.lora import LoRA
from rapm.memory import cards, host
from rapm.memory.cards import GIB
from rapm.memory.drawing import drawn, teacher_to_draw
from rapm.memory.planner import Planner
from rapm.teacher import Teacher, load_teacher
from rapm.unet import Text, UNet

CPU = torch.device("cpu")
SDXL = Config.preset("sdxl").replace(guidance=1.0)
NUMBERS = 185_000_000  # of SDXL's LoRA of rank 64
SEEDS = ["--seeds", "0", "1", "2", "3", "4"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """config, rows, mode -> a card on which the UNet of that mode walks `rows` pictures, and no more; its bytes.

    Counted by a tiny teacher's own sizes: nothing else takes any, but the VAE, 256 bytes a pixel.
    """
    for name, value in (("CONTEXT", 0), ("WORKSPACE", 0), ("DECODE", 256)):
        monkeypatch.setattr(cards, name, value)
    monkeypatch.setattr(host, "limit", lambda: None)

    def has(config: Config, rows: int, mode: str = "full") -> int:
        planner = Planner(model_of(config.teacher), config, mode=mode)
        walks = planner.sizes.weights + planner.sizes.largest + planner._forward(rows) + planner._forward(1) / 2
        size = int(cards.SLACK * walks)
        monkeypatch.setattr(cards, "allowed", lambda device: size)
        return size

    return has


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the UNet was laid after it was loaded, and how many pictures each walk had."""
    found: list[str] = []
    lay, sample = UNet.lay, rapm.sample.sample

    def laid(self: UNet, device: torch.device | str) -> UNet:
        if not self.conv_in.weight.is_meta:
            found.append("away" if isinstance(device, str) else "back")
        return lay(self, device)

    def walked(unet, schedule, text, noise, steps, **options):
        assert {len(x) for x in text if x is not None} == {len(noise)}
        found.append(f"walk {len(noise)}")
        return sample(unet, schedule, text, noise, steps, **options)

    monkeypatch.setattr(UNet, "lay", laid)
    monkeypatch.setattr(rapm.sample, "sample", walked)
    return found


def pixels(path: Path) -> torch.Tensor:
    image = Image.open(path)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


@pytest.mark.parametrize(
    "gib, mode, unet_waits, tiled, batch",
    [
        (16, "full", False, False, 4),
        (10, "full", True, False, 4),  # the decoding would not fit beside it
        (8, "full", True, False, 4),
        (7, "full", True, False, 2),
        (5.5, "int8", True, False, 4),  # what a card of 6 GB leaves
        (4.85, "int8", True, True, 2),
        (4.8, "int8", True, True, 1),
    ],
)
def test_what_gives_way_on_sdxl(monkeypatch, gib, mode, unet_waits, tiled, batch) -> None:
    monkeypatch.setattr(host, "limit", lambda: None)
    planner, plan = drawn(model_of("sdxl"), SDXL, int(gib * GIB), 4, NUMBERS)
    found = planner.config.frozen_weights, plan.unet_waits, plan.tiled, plan.solve_batch
    assert found == (mode, unet_waits, tiled, batch)


@pytest.mark.parametrize("name, side", [("sdxl", 1024), ("sdxl", 768), ("sd21", 768), ("sd15", 512), ("sd15", 1024)])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_every_card_from_the_smallest_on_draws(monkeypatch, name, side, guidance) -> None:
    """What waits aside or comes in fewer bits leaves room for what is there beside it."""
    monkeypatch.setattr(host, "limit", lambda: None)
    made: dict[str, Planner] = {}  # each takes a second
    monkeypatch.setattr("rapm.memory.drawing.Planner", lambda *given, mode, host: made.get(mode) or made.setdefault(
        mode, Planner(*given, mode=mode, host=host)))  # fmt: skip
    config = Config.preset("sdxl" if name == "sdxl" else "sd15").replace(resolution=(side, side), guidance=guidance)
    with pytest.raises(UserError, match=rf"has 0\.50 GiB .* draw {side}x{side} with {name}, for which ") as error:
        drawn(model_of(name), config, GIB // 2, 4)
    smallest = float(str(error.value).split("for which ")[1].split()[0])
    order = []
    for budget in range(int(smallest * GIB), 18 * GIB, GIB):
        planner, plan = drawn(model_of(name), config, budget, 4)
        sizes, rows = planner.sizes, plan.solve_batch * (1 + (guidance > 1))
        beside = cards.CONTEXT + sizes.weights * (not plan.unet_waits)
        assert beside + sizes.text <= budget
        assert beside + sizes.vae + cards.DECODE * (cards.TILE**2 if plan.tiled else side**2) <= budget
        assert cards.CONTEXT + sizes.weights + planner._forward(rows) <= budget and 1 <= plan.solve_batch <= 4
        order.append(["nf4", "int8", "full"].index(planner.config.frozen_weights))
    assert order == sorted(order) and order[-1] == 2 and not plan.unet_waits and plan.solve_batch == 4


def test_a_host_without_room_keeps_the_unet_on_the_card(monkeypatch) -> None:
    monkeypatch.setattr(host, "limit", lambda: 8 * GIB)
    planner, plan = drawn(model_of("sdxl"), SDXL, 10 * GIB, 4)
    assert planner.config.frozen_weights == "full" and plan.tiled and not plan.unet_waits


def test_what_looks_at_pictures_is_a_visitor_too(monkeypatch) -> None:
    monkeypatch.setattr(host, "limit", lambda: None)
    assert not drawn(model_of("sdxl"), SDXL, 12 * GIB, 4)[1].unet_waits
    assert drawn(model_of("sdxl"), SDXL, 12 * GIB, 4, visitor=8 * GIB)[1].unet_waits


def test_what_is_allowed_is_free_and_within_the_cap(monkeypatch) -> None:
    share = [1.0]
    for name, value in (
        ("mem_get_info", lambda *_: (9 * GIB, 24 * GIB)), ("memory_reserved", lambda *_: GIB),
        ("get_device_properties", lambda *_: type("Properties", (), {"total_memory": 24 * GIB})),
        ("get_per_process_memory_fraction", lambda *_: share[0]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: share.__setitem__(0, part))
    gpu = torch.device("cuda", 0)
    assert cards.allowed(gpu) == cards.automatic(gpu) == 10 * GIB + cards.CONTEXT - cards.DISPLAY
    cards.cap(gpu, 8 * GIB)
    assert abs(cards.allowed(gpu) - 8 * GIB) <= 1
    assert cards.allowed(CPU) is None


def test_sample_on_a_small_card_draws_the_same_pictures(card, moves, tiny_folders, tmp_path, capsys) -> None:
    """With a LoRA, guidance and seeds; the UNet waits once for the parts of a batch together."""
    folder = tiny_folders["sdxl"]
    teacher = load_teacher(str(folder), device="cpu", dtype=torch.float32)
    lora = LoRA(teacher.unet, 2)
    with torch.no_grad():
        lora.flat.copy_(0.1 * torch.randn(lora.flat.shape))
    export_lora(tmp_path / "lora", lora.export(), teacher, config=Config(), steps_done=1)
    options = ["--lora", str(tmp_path / "lora"), "--steps", "2", "--guidance", "3", *SEEDS]
    command = ["sample", "a cat", "--teacher", str(folder), *options, "--output"]
    assert main([*command, str(tmp_path / "large.png")]) == 0
    assert moves == ["walk 4", "walk 1"]
    moves.clear()
    card(Config(teacher=str(folder), guidance=3.0), 2 * 2 + 1)  # and half a row, which the LoRA's numbers fill
    assert main([*command, str(tmp_path / "small.png")]) == 0
    texts = ["away", "back"] * 2
    assert moves == [*texts, "walk 2", "walk 2", "away", "back", "walk 1", "away", "back"]
    assert (pixels(tmp_path / "large.png") - pixels(tmp_path / "small.png")).abs().max() <= 1  # batches may round
    assert "note" not in capsys.readouterr().err


def test_a_file_that_says_nothing_is_planned_for_at_its_size(card, moves, tiny_folders, tmp_path, monkeypatch) -> None:
    """SD2's smaller one is known only when its network has been asked, for which no text encoder visits."""
    monkeypatch.setattr(single_file, "BASES", tiny.bases({"sd2": tiny_folders["sd2"]}, tmp_path / "bases"))
    monkeypatch.setattr(Teacher, "visiting", lambda *_: pytest.fail("visited before there was a plan"))
    file = tiny.single_file(tiny_folders["sd2"], tmp_path / "model.safetensors")
    budget = card(Config(teacher=str(tiny_folders["sd2"])), 2)
    monkeypatch.setattr(cards, "DECODE", 1)
    config = Config(teacher=str(file), guidance=1.0)
    teacher = teacher_to_draw(config, CPU, batch=64)
    assert teacher.default_resolution == (80, 80) and not moves
    plan = drawn(model_of(str(tiny_folders["sd2"])), config.replace(resolution=(80, 80)), budget, 64)[1]
    assert (teacher.unet_waits, teacher.walk_batch) == (plan.unet_waits, plan.solve_batch) and plan.solve_batch > 2


def test_fewer_bits_are_said(card, tiny_folders, tmp_path, capsys) -> None:
    folder = tiny_folders["sd1"]
    card(Config(teacher=str(folder)), 1, "int8")
    command = ["sample", "a cat", "--teacher", str(folder), "--batch", "1", "--output", str(tmp_path / "a.png")]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'a.png'}\n"
    assert err.count("note: ") == 1 and "linear layers in int8" in err and "a near one" in err


def test_a_card_that_is_too_small_is_one_line_before_the_unet_is_read(tiny_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cards, "allowed", lambda device: GIB)
    monkeypatch.setattr("rapm.teacher.fill", lambda *_, **__: pytest.fail("the weights were read"))
    assert main(["sample", "a cat", "--teacher", str(tiny_folders["sd1"]), "--output", str(tmp_path / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rapm: the card has 1.00 GiB for this process, too little to draw 128x128 with ")
    assert not (tmp_path / "a.png").exists()


def test_tiles_are_those_of_a_run(card, tiny_folders, monkeypatch, capsys) -> None:
    """Of TILE pixels a side; the VAE's own would be as large as what it was trained on."""
    config = Config(teacher=str(tiny_folders["sd1"]), resolution=(64, 64))
    card(config, 4)
    monkeypatch.setattr(cards, "TILE", 32)
    monkeypatch.setattr("rapm.teacher.TILE", 32)
    monkeypatch.setattr(cards, "DECODE", 2**11)  # 8 MiB for a picture, 2 for a tile
    teacher = teacher_to_draw(config, CPU, batch=1)
    assert teacher.unet_waits and teacher.pipe.vae.use_tiling and teacher.pipe.vae.tile_latent_min_size == 4
    assert "decoded in tiles" in capsys.readouterr().err
    assert teacher.decode(torch.randn(1, 4, 8, 8)).shape == (1, 64, 64, 3)
    assert teacher.shortcuts == {"decoded": "in tiles"}


def test_a_vae_without_tiles(tiny_folders, monkeypatch) -> None:
    """Some of diffusers' have none: figures say nothing of them, and a card that needs them is told so."""
    teacher = load_teacher(str(tiny_folders["sd1"]), device="cpu", dtype=torch.float32)
    teacher.pipe.vae = torch.nn.Module()
    assert teacher.shortcuts == {}
    with pytest.raises(UserError, match=r"its VAE \(Module\) cannot decode in tiles"):
        teacher.decode_in_tiles()


def test_a_walk_in_parts_has_each_pictures_own_negative_prompt(tiny_folders) -> None:
    teacher = load_teacher(str(tiny_folders["sd1"]), device="cpu", dtype=torch.float32)
    text = teacher.encode(["a cat", "a dog", "a cow"])
    uncond = Text.cat([teacher.encode_negative(prompt) for prompt in ("grey", "red", "blue")])
    start = torch.randn(3, *teacher.latent_shape())
    whole = rapm.sample.sample_with(teacher, text, start, 2, guidance=5.0, uncond=uncond)
    teacher.walk_batch = 1
    parts = rapm.sample.sample_with(teacher, text, start, 2, guidance=5.0, uncond=uncond)
    others = rapm.sample.sample_with(teacher, text, start, 2, guidance=5.0, uncond=uncond.rows(0, 1))
    off = [float((x - whole).norm() / whole.norm()) for x in (parts, others)]
    assert off[0] < 1e-4 < 1e-3 < off[1], off  # batches may round
