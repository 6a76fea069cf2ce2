"""The embedded teacher, its scenes, its judge, and the figures that `rapm evaluate` makes of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from exports import rewrite

import rapm.sample
from rapm.evaluate.embedded import Evaluation, Row, Sampler, frechet_distance, table, teacher_samplers
from rapm.export.lora_file import WEIGHTS
from rapm.memory import cards
from rapm.memory.planner import Planner
from rapm.sample import sample
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import noise
from rapm.zoo import EMBEDDED, JUDGE, scenes
from rapm.zoo.judge import load_judge, mistakes
from rapm.zoo.make_teacher import Drawer, write_tokenizer


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("embedded", device="cpu", dtype=torch.float32)


def words(index: int) -> tuple[dict[int, tuple[str, str]], str]:
    """place -> (colour, kind) and the background, read back from the caption's text."""
    text = scenes.caption(index)
    thing = r"a (\w+) (\w+)"
    background = re.search(r"on a (\w+) background", text)[1]
    for relation, one, two in scenes.RELATIONS:
        if found := re.match(f"{thing} {relation} {thing} on a", text):
            return {one: found.groups()[:2], two: found.groups()[2:]}, background
    for place, (name, _) in enumerate(scenes.PLACES):
        if found := re.match(f"{thing} {name} on a", text):
            return {place: found.groups()}, background
    raise AssertionError(text)


def test_the_caption_says_what_the_scene_holds():
    numbers = [*range(40), *torch.randint(scenes.CAPTIONS, (300,)).tolist(), scenes.SINGLES - 1, scenes.SINGLES]
    scene = scenes.objects(torch.tensor(numbers))
    for row, index in enumerate(numbers):
        there, background = words(index)
        assert scenes.BACKGROUNDS[scene.background[row]] == background
        for place in range(len(scenes.PLACES)):
            kind, colour = int(scene.kind[row, place]), int(scene.colour[row, place])
            if place in there:
                assert there[place] == (list(scenes.COLOURS)[colour], scenes.KINDS[kind])
            else:
                assert kind == colour == -1


def test_captions_are_distinct_and_one_in_ten_is_held_out():
    texts = [scenes.caption(i) for i in range(0, scenes.CAPTIONS, 37)]
    assert len(set(texts)) == len(texts)
    assert 0.08 < sum(map(scenes.held_out, texts)) / len(texts) < 0.12
    seen, unseen = (scenes.draw_captions(200, seed=3, unseen=flag) for flag in (False, True))
    assert seen == scenes.draw_captions(200, seed=3)
    assert len(set(seen)) == 200 and not set(seen) & set(unseen)
    assert all(scenes.held_out(scenes.caption(i)) for i in unseen)


def test_a_picture_shows_its_caption():
    index = torch.tensor([scenes.SINGLES // 2 + 4 * i for i in range(16)])
    pictures = scenes.render(index, torch.Generator().manual_seed(0))
    assert pictures.shape == (16, 3, 64, 64) and pictures.min() >= -1 and pictures.max() <= 1
    assert torch.equal(pictures, scenes.render(index, torch.Generator().manual_seed(0)))
    assert not torch.equal(pictures, scenes.render(index, torch.Generator().manual_seed(1)))
    scene = scenes.objects(index)
    palette = torch.tensor(list(scenes.COLOURS.values())) * 2 - 1
    for picture, kinds, colours in zip(pictures, scene.kind, scene.colour, strict=True):
        for place, (_, (x, y)) in enumerate(scenes.PLACES):
            column, row = (round((v + 1) * 32) for v in (x, y))
            window = picture[:, row - 13 : row + 13, column - 13 : column + 13].flatten(1)
            if kinds[place] >= 0:  # many of its pixels are near the named colour
                near = (window - palette[colours[place]][:, None]).abs().amax(0) < 0.3
                assert near.sum() > 40


def test_the_digits_are_split():
    (train, _), (test, _) = scenes.digit_bank(True), scenes.digit_bank(False)
    assert (len(train), len(test)) == (1437, 360)
    assert torch.cdist(test.flatten(1), train.flatten(1)).min() > 0


def test_the_judge_reads_real_renders():
    """On held-out captions and digits, at least 97% of each attribute."""
    drawer = Drawer(torch.device("cpu"), 5, unseen=True)
    index = drawer.captions(512)
    wrong = mistakes(load_judge()(drawer.pictures(index)), scenes.objects(index))
    assert all(1 - float(part.float().mean()) >= 0.97 for part in wrong.values())


def test_the_judge_sees_mistakes():
    """Pictures of other captions: every attribute is mostly wrong."""
    drawer = Drawer(torch.device("cpu"), 5)
    index = drawer.captions(64)
    wrong = mistakes(load_judge()(drawer.pictures(index)), scenes.objects(index.roll(7)))
    assert all(float(part.float().mean()) > 0.4 for part in wrong.values())


def test_the_folder_is_a_stock_pipeline_of_at_most_12_mb():
    from diffusers import StableDiffusionPipeline

    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) + JUDGE.stat().st_size <= 12e6
    assert {path.suffix for path in files} == {".json", ".txt", ".safetensors"}
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red seven on the left on a plain background", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()


def test_the_tokenizer_has_a_token_for_every_word(teacher, tmp_path):
    tokenizer = teacher.pipe.tokenizer
    assert all(len(tokenizer(word).input_ids) == 3 for word in scenes.WORDS)
    longest = max(len(tokenizer(scenes.caption(i)).input_ids) for i in range(0, scenes.CAPTIONS, 501))
    assert longest <= tokenizer.model_max_length
    write_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (EMBEDDED / "tokenizer" / name).read_bytes()


def test_prompt_and_guidance_change_the_picture(teacher):
    """The right colour is there with its prompt; another prompt and another guidance give another picture."""
    prompts = [f"a {c} circle in the center on a plain background" for c in ("red", "green", "blue")]
    text, uncond = teacher.encode(prompts), teacher.encode_negative()
    start = noise(1, (1, *teacher.latent_shape())).repeat(3, 1, 1, 1)

    def draw(guidance):
        z = sample(teacher.unet, teacher.schedule, text, start, 8, guidance=guidance, uncond=uncond)
        return teacher.decode(z).float()

    guided, unguided = draw(7.5), draw(1.0)
    middle = guided[:, 24:40, 24:40].mean((1, 2))  # B 3
    assert middle.argmax(1).tolist() == [0, 1, 2]
    assert (guided - unguided).abs().mean() > 2


def test_frechet_distance():
    x, y = torch.randn(400, 5) @ torch.randn(5, 5), torch.randn(300, 5) + 1
    cx, cy = np.cov(x.numpy().T.astype(float)), np.cov(y.numpy().T.astype(float))
    root = scipy.linalg.sqrtm(cx @ cy).real
    expected = ((x.double().mean(0) - y.double().mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(5 * 4, rel=1e-5)


def test_evaluation(teacher):
    """Small numbers; the teacher is its own floor, and a LoRA that does nothing is the unguided teacher."""
    evaluation = Evaluation(teacher, reference_steps=8, guidance=7.5, pairs=8, batch=8)
    floor = evaluation.floor
    assert (floor.d, floor.rmse, floor.calls) == (0, 0, 16) and floor.fd > 0
    guided, unguided = map(evaluation.row, teacher_samplers(7.5, 4))
    assert (guided.calls, unguided.calls) == (8, 4)
    nothing = {name: (torch.ones(1, layer.weight.shape[1]), torch.zeros(len(layer.weight), 1))
               for name, layer in teacher.unet.lora_targets().items() if layer.weight.dim() == 2}  # fmt: skip
    same = evaluation.row(Sampler("nothing", 4, lora=nothing))
    assert same.fd == pytest.approx(unguided.fd, rel=1e-4) and same.rmse == pytest.approx(unguided.rmse, rel=1e-4)
    assert guided.rmse > 0 and guided.fd != unguided.fd
    lines = table([floor, guided]).splitlines()
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in lines)


def test_evaluate_command(tmp_path, monkeypatch, capsys):
    """On a card where a walk has three pictures, and the UNet waits."""
    from rapm.cli import main

    draw, sample, walked = Planner.draw, rapm.sample.sample, []
    (tmp_path / "tiny.toml").write_text(
        "trajectories = 2\nvalidation_prompts = 1\nfine_steps = 2\nmax_train_steps = 1\nlora_rank = 1\n"
    )
    run = tmp_path / "run"
    assert main(["train", "--output_dir", str(run), "--config", str(tmp_path / "tiny.toml")]) == 0
    monkeypatch.setattr(cards, "allowed", lambda device: 3 * cards.GIB)
    monkeypatch.setattr(Planner, "draw", lambda *given: replace(draw(*given), unet_waits=True, solve_batch=3))
    monkeypatch.setattr(  # only now: what training imports would keep it
        rapm.sample, "sample", lambda *given, **more: walked.append(len(given[3])) or sample(*given, **more)
    )
    assert main(["evaluate", "--run", str(run), "--pairs", "4", "--batch", "4"]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert walked == [3, 1] * 8  # the halves of the teacher's many steps, and six more rows
    names = ["teacher 8", "teacher 4 guided", "teacher 4 unguided", "student 4", "student 1", "student 2", "student 8"]
    assert [row["name"] for row in report["rows"]] == names
    assert set(report["rows"][0]) == set(Row.__dataclass_fields__)
    own = report["protocol"]["weights"]
    assert own.startswith(f"{WEIGHTS} sha256 ")
    rewrite(run / WEIGHTS, lambda tensors, _: [x.mul_(2) for x in tensors.values()])
    (run / WEIGHTS).rename(tmp_path / "other.safetensors")  # and it needs none of its own
    words = ["evaluate", "--run", str(run), "--lora", str(tmp_path / "other.safetensors"), "--pairs", "4"]
    assert main(words) == 0
    other = json.loads((run / "evaluation.json").read_text())["protocol"]["weights"]
    assert other.startswith(f"{tmp_path / 'other.safetensors'} sha256 ") and other[-16:] != own[-16:]
    assert main(["evaluate", "--run", str(run), "--pairs", "5"]) == 2
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--lora", "none"]) == 2
    assert "leave out --lora none" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_evaluation_needs_a_judge(teacher, monkeypatch):
    from rapm.errors import UserError

    monkeypatch.setattr(type(teacher), "location", Path("elsewhere/teacher"))
    with pytest.raises(UserError, match="has no judge beside it"):
        Evaluation(teacher, reference_steps=8, guidance=7.5, pairs=4)
