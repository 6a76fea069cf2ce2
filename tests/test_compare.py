"""FID, KID and CLIP score on real models: the libraries' own code on a small network and a small CLIP."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import rapm.sample
from rapm.cli import main
from rapm.config import Config
from rapm.errors import UserError
from rapm.evaluate import compare as module
from rapm.evaluate import embedded
from rapm.evaluate.captions import read_captions
from rapm.evaluate.compare import compare
from rapm.evaluate.metrics import fid, kid, moments, square
from rapm.export.files import export_lora
from rapm.loading.families import model_of
from rapm.lora import LoRA
from rapm.memory import cards, host
from rapm.memory.planner import Planner
from rapm.store import Store
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import prepare

PROMPTS = [f"a picture of {i} things" for i in range(8)]


class Network(nn.Module):
    """FID's network in small: 6 fixed numbers of a picture n 3 H W, uint8."""

    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        x = x.float() / 255
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small CLIP as transformers saves one."""
    import transformers

    folder, size = tmp_path_factory.mktemp("clip"), dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                                         num_attention_heads=2)  # fmt: skip
    last = len(tiny._vocabulary()) - 1
    text = dict(size, vocab_size=last + 1, max_position_embeddings=77, bos_token_id=last - 1, eos_token_id=last)
    vision = dict(size, image_size=32, patch_size=16)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(image_processor=images, tokenizer=tiny._tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run on a tiny teacher: store, LoRA and settings."""
    root = tmp_path_factory.mktemp("run")
    teacher = load_teacher(str(tiny.tiny_pipeline("sd1", root / "teacher")), device="cpu", dtype=torch.float32)
    config = Config().replace(
        teacher=teacher.source, steps=2, fine_steps=1, trajectories=8, validation_prompts=2, guidance=3.0,
        output_dir=str(root / "run"), resolution=(64, 64),
    )  # fmt: skip
    prepare(root / "run" / "trajectories", teacher, PROMPTS, config, progress=False)
    lora = LoRA(teacher.unet, 1)
    with torch.no_grad():
        lora.flat += 0.05 * torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(1))
    export_lora(root / "run", lora.export(), teacher, config=config, steps_done=1)
    (root / "run" / "config.toml").write_text(config.to_toml())
    return root / "run"


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write in."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def coco(path: Path, images: int) -> Path:
    annotations = [
        dict(image_id=i, id=10 * i + k, caption=f"image {i},\n caption {k}") for i in range(images) for k in range(5)
    ]
    path.write_text(json.dumps({"images": [dict(id=i) for i in range(images)], "annotations": annotations}))
    return path


def pixels(paths: list[Path]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths])


def frechet(x: Tensor, y: Tensor) -> float:
    x, y = x.double().numpy(), y.double().numpy()
    cx, cy = np.cov(x.T), np.cov(y.T)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * scipy.linalg.sqrtm(cx @ cy).real))


def test_captions_are_drawn_one_an_image_and_alike_everywhere(tmp_path):
    path = coco(tmp_path / "captions_val2014.json", 40)
    ten, twenty = read_captions(path, 10), read_captions(path, 20)
    assert twenty[:10] == ten and len({c.key for c in twenty}) == 20
    assert [c.key for c in ten] != sorted(c.key for c in ten)
    assert all(c.text.startswith(f"image {c.key}, caption ") for c in twenty)
    assert len({c.text[-1] for c in twenty}) > 1  # not always an image's first
    assert [c.text for c in ten[:3]] == ["image 38, caption 1", "image 19, caption 2", "image 33, caption 3"]


def test_captions_of_a_csv(tmp_path):
    path = tmp_path / "captions.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "caption"], [1, "a cat, sitting"], [2, " "], [3, "zwei Hunde"]])
    assert sorted(c.text for c in read_captions(path, 9)) == ["a cat, sitting", "zwei Hunde"]
    (tmp_path / "other.csv").write_text("name\nx\n")
    (tmp_path / "run.json").write_text('{"annotations": 3}')
    (tmp_path / "number.json").write_text('{"annotations": [{"image_id": 1, "id": 1, "caption": 5}]}')
    (tmp_path / "deep.json").write_text("[" * 10**5)
    for wrong in ("other.csv", "missing.json", "run.json", "number.json", "deep.json"):
        with pytest.raises(UserError, match=f"{wrong} cannot be read"):
            read_captions(tmp_path / wrong, 9)


def test_fid_and_kid_are_the_published_formulas():
    x, y = torch.randn(80, 6), 0.5 * torch.randn(60, 6) + 1
    assert fid(x, y) == pytest.approx(frechet(x, y), rel=1e-5)
    statistics = y.double().mean(0), torch.cov(y.double().T)
    assert fid(x, statistics) == pytest.approx(fid(x, y), rel=1e-6)
    same = [kid(torch.randn(40, 6), torch.randn(40, 6)) for _ in range(4)]
    assert min(same) < 0 < 10 * max(same) < kid(x, y)  # unbiased: on both sides of 0


def test_square_is_the_centre(tmp_path):
    image = Image.new("RGB", (30, 10), "red")
    image.paste((0, 0, 255), (10, 0, 20, 10))
    assert square(image, 5).tobytes() == bytes([0, 0, 255]) * 25


def test_to_the_teacher(folder, clip):
    """Other noise for the student, the store's endpoints for the teacher, and each figure from those very pictures."""
    text = compare(folder, clip=clip, network=Network())
    report = json.loads((folder / "evaluation.json").read_text())
    (entry,) = report["figures"]
    rows, protocol = {row["name"]: row for row in entry["rows"]}, entry["protocol"]
    names = [
        "student, 2 steps",
        "student, 2 steps, half the prompts",
        "teacher, half the prompts (the floor)",
        "teacher",
    ]
    assert list(rows) == names and all(name in text for name in names)
    assert protocol["samples"] == 8 and "too high by about c / n" in protocol["bias"]
    assert {"torch", "torchmetrics", "transformers", "seed", "device", "rapm-fast"} <= protocol.keys()
    (theirs,), (mine,) = (list((folder / "evaluation").glob(f"{kind}-*/pictures")) for kind in ("teacher", "student"))
    x, y = (pixels(sorted(p.iterdir())) for p in (mine, theirs))
    store, config = Store.open(folder / "trajectories"), Config.from_toml(folder / "config.toml")
    teacher = load_teacher(config["teacher"], device="cpu", dtype=torch.float32)
    ends = teacher.decode(torch.stack([t.positions[-1] for t in store])).permute(0, 3, 1, 2)
    assert (ends.int() - y.int()).abs().max() <= 1
    network = Network()
    assert rows["student, 2 steps"]["FID"] == pytest.approx(frechet(network(x), network(y)), rel=1e-3)
    floor = rows["teacher, half the prompts (the floor)"]
    assert floor["FID"] == pytest.approx(frechet(network(y[::2]), network(y[1::2])), rel=1e-3, abs=1e-6)
    assert floor["samples"] == 4 and -100 < rows["teacher"]["CLIP"] < 100


def test_pictures_of_shortcuts_are_others(folder, monkeypatch):
    """The teacher's are decoded from stored latents: of how its weights are held they do not depend."""
    for shortcuts in ({}, {"frozen_weights": "int8"}, {"frozen_weights": "int8", "decoded": "in tiles"}):
        monkeypatch.setattr(Teacher, "shortcuts", property(lambda _, found=shortcuts: found))
        compare(folder, clip=None, network=Network())
    jobs = [[*(folder / "evaluation").glob(f"{kind}-*")] for kind in ("teacher", "student")]
    assert [*map(len, jobs)] == [2, 3]


def test_a_kill_costs_a_batch_and_the_same_command_goes_on(folder, tmp_path, monkeypatch, clip):
    captions, draw, calls = coco(tmp_path / "captions_val2014.json", 9), module._draw, []
    (tmp_path / "val2014" / "sub").mkdir(parents=True)
    for i in range(5):
        noise = torch.randint(0, 256, (40 + i, 60, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "val2014" / "sub" / f"{i}.png")
    job = dict(captions=captions, reference=tmp_path / "val2014", samples=7, batch=2)

    def killed(*arguments):
        calls.append(len(arguments[3]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(module, "_draw", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(folder, clip=clip, network=Network(), **job)
    (pictures,) = (folder / "evaluation").glob("captions-*/pictures")
    kept = {path: path.stat().st_mtime_ns for path in pictures.iterdir()}
    assert len(kept) == 4 and all(Image.open(path).size == (256, 256) for path in kept)
    compare(folder, clip=clip, network=Network(), **job)
    assert calls == [2, 2, 2, 2, 1]  # the killed batch again, and the rest
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    (entry,) = json.loads((folder / "evaluation.json").read_text())["figures"]
    assert entry["protocol"]["samples"] == entry["rows"][0]["samples"] == 7
    assert {"FID", "KID x1000", "CLIP"} <= entry["rows"][0].keys()
    assert entry["protocol"]["reference"] == "val2014, 5 images"
    # In one go, on another machine as it were: the same figures.
    shutil.rmtree(folder / "evaluation")
    compare(folder, clip=clip, network=Network(), **job)
    (again,) = json.loads((folder / "evaluation.json").read_text())["figures"]  # in the place of the first
    for name, value in entry["rows"][0].items():
        assert again["rows"][0][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    features = [load_file(p)["values"] for p in (folder / "evaluation").glob("*/features/*.safetensors")]
    assert sorted(len(x) for x in features) == [1, 7]  # FID's for each picture, CLIP's sum of the chunk


@pytest.mark.parametrize("mode", ["full", "int8"])
def test_on_a_small_card_the_parts_take_turns(folder, tmp_path, monkeypatch, clip, mode):
    """The networks that look at pictures too; figures say where the weights have fewer bits."""
    job = dict(captions=coco(tmp_path / "captions.json", 5), clip=clip, batch=4)
    np.savez(tmp_path / "stats.npz", mu=np.full(6, 0.5), sigma=np.eye(6))
    compare(folder, reference=tmp_path / "stats.npz", network=Network(), **job)
    shutil.rmtree(folder / "evaluation")
    for name, value in (("CONTEXT", 0), ("WORKSPACE", 0), ("DECODE", 8)):
        monkeypatch.setattr(cards, name, value)
    config = Config.of_run(folder)
    planner = Planner(model_of(config.teacher), config, mode=mode)
    walks = planner.sizes.weights + planner.sizes.largest + 2.5 * planner._forward(1)
    monkeypatch.setattr(cards, "allowed", lambda device: int(cards.SLACK * walks))
    monkeypatch.setattr(host, "limit", lambda: None)
    waiting, walked, seen = [], [], []
    wait, sample, see = Teacher.waiting, rapm.sample.sample, module.clip_score
    monkeypatch.setattr(Teacher, "waiting", lambda *given: waiting.append(given[1]) or wait(*given))
    monkeypatch.setattr(
        rapm.sample, "sample", lambda *given, **more: walked.append(len(given[3])) or sample(*given, **more)
    )
    monkeypatch.setattr(module, "clip_score", lambda *given, **more: seen.append(len(waiting)) or see(*given, **more))
    compare(folder, reference=tmp_path / "stats.npz", network=Network(), **job)
    assert len(waiting) == 1 + 2 + 2 and all(waiting) and walked == [2, 2, 1] and seen == [5]  # text, VAE, networks
    figures = json.loads((folder / "evaluation.json").read_text())["figures"]
    if mode == "full":  # the same protocol, and the same pictures
        assert len(figures) == 1 and "frozen_weights" not in figures[0]["protocol"]
    else:
        assert figures[1]["protocol"]["frozen_weights"] == "int8" and len(figures) == 2


@pytest.mark.parametrize("damage", [b"", b'{"figures": [', b"[]", b'{"figures": [{"rows": []}]}', b"\xff", None])
def test_what_the_figures_are_to_be_added_to_is_read_first(tmp_path, capsys, monkeypatch, damage):
    """Cut, not ours, or a folder: no evaluation is made that has no place, on either way to one."""
    path = tmp_path / "evaluation.json"
    path.mkdir() if damage is None else path.write_bytes(damage)
    for where in (module, embedded):
        monkeypatch.setattr(where, "teacher_to_draw", lambda *given, **more: pytest.fail("the work has begun"))
    for teacher in ("embedded", "another"):
        (tmp_path / "config.toml").write_text(Config().replace(teacher=teacher).to_toml())
        assert main(["evaluate", "--run", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path} is to have the figures too, and cannot be read" in line and line.endswith("move it away")


def spoiled(path: Path, how: str) -> None:
    """Statistics that nobody can use."""
    np.savez_compressed(path, mu=np.zeros(6), sigma=np.eye(6))
    data = path.read_bytes()
    if how == "flipped":
        path.write_bytes(data[:60] + bytes(255 - x for x in data[60:90]) + data[90:])
    elif how == "packed as nobody does":  # in the directory of the archive, where a reader looks
        place = data.index(b"PK\1\2") + 10
        path.write_bytes(data[:place] + b"\x63" + data[place + 1 :])
    elif how == "an array":
        with path.open("wb") as file:
            np.save(file, np.eye(6))
    elif isinstance(how, int):
        path.write_bytes(data[:how])
    else:
        np.savez(path, **{"scalar": dict(mu=0.0, sigma=np.eye(6)), "a row": dict(mu=np.zeros((1, 6)), sigma=np.eye(6)),
                          "words": dict(mu="mu", sigma="sigma"), "half": dict(mu=np.zeros(6))}[how])  # fmt: skip


@pytest.mark.parametrize("how", [0, 3, 100, "flipped", "packed as nobody does", "an array", "scalar", "a row", "words",
                                 "half"])  # fmt: skip
def test_statistics_that_are_damaged(tmp_path, how):
    spoiled(tmp_path / "stats.npz", how)
    with pytest.raises(UserError, match=r"reference: .*stats\.npz (is no \.npz with|has mu)"):
        moments(tmp_path / "stats.npz")


def test_a_disk_too_small_is_known_before_a_picture_is_drawn(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    statistics = tmp_path / "stats.npz"
    np.savez(statistics, mu=np.full(6, 0.5), sigma=np.eye(6))
    for captions in (None, coco(tmp_path / "captions.json", 4)):
        with pytest.raises(UserError, match="MiB free"):
            compare(folder, captions=captions, reference=statistics, clip=None, network=Network())


def test_a_clip_score_alone_needs_neither_reference_nor_fids_network(folder, tmp_path, clip):
    compare(folder, captions=coco(tmp_path / "captions.json", 4), clip=clip)
    (entry,) = json.loads((folder / "evaluation.json").read_text())["figures"]
    assert entry["rows"][0].keys() == {"name", "samples", "CLIP"} and entry["protocol"]["reference"] == "none"


def test_statistics_as_reference_and_the_teacher_as_subject(folder, tmp_path):
    captions = coco(tmp_path / "captions.json", 5)
    np.savez(tmp_path / "stats.npz", mu=np.full(6, 0.5), sigma=np.eye(6))
    job = dict(captions=captions, reference=tmp_path / "stats.npz", clip=None, network=Network())
    student, teacher = (compare(folder, lora=lora, **job) for lora in (None, Path("none")))
    assert "student, 2 steps" in student and "teacher, 2 steps" in teacher and "guidance: 3.0" in teacher
    assert len(json.loads((folder / "evaluation.json").read_text())["figures"]) == 2
    own = compare(folder, lora=Path("none"), clip=None, network=Network())
    assert "| teacher, 2 steps, half the prompts | 4 |" in own  # from other noise than the store's
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    shutil.rmtree(folder / "evaluation")
    with pytest.raises(UserError, match="5 features, FID's network has 6"):
        compare(folder, **job)
    (tmp_path / "real").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "real" / name).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        compare(folder, **{**job, "reference": tmp_path / "real"})
    assert not list((folder / "evaluation").rglob("0*.png"))  # before anything was drawn


def test_the_command_says_what_is_missing_before_any_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rapm.evaluate.metrics.find_spec", lambda name: None if name == "torch_fidelity" else name)
    for extra, message in (
        ([], "torch_fidelity is not installed: pip install rapm-fast[eval]"),
        (["--captions", str(tmp_path / "none.json")], "none.json cannot be read"),
        (["--captions", str(coco(tmp_path / "c.json", 4)), "--reference", str(tmp_path / "empty")], "holds 0 images"),
    ):
        assert main(["evaluate", "--run", str(folder), *extra]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("rapm.evaluate.metrics.find_spec", lambda name: name)
    (tmp_path / "other.pth").write_bytes(b"a pickle that runs code")
    assert main(["evaluate", "--run", str(folder), "--inception", str(tmp_path / "other.pth")]) == 2
    assert "another pickle is not read" in capsys.readouterr().err
    for extra in (["--pairs", "8"], ["--reference", str(tmp_path)]):
        assert main(["evaluate", "--run", str(folder), *extra]) == 2
        assert f"{extra[0]} belongs to" in capsys.readouterr().err
    assert not (folder / "evaluation").exists()
    with pytest.raises(UserError, match="nothing to measure"):
        compare(folder, captions=tmp_path / "c.json", clip=None)
    with pytest.raises(UserError, match="no CLIP"):
        compare(folder, clip=str(tmp_path), network=Network())
