"""Numbers that are not finite are caught where they arise, named, and harm nothing: one injection for each stage."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from rapm import step as step_module
from rapm.checkpoint import load_checkpoint, save_checkpoint
from rapm.cli import main
from rapm.config import Config
from rapm.errors import ExportError, RunError, UserError
from rapm.evaluate.embedded import frechet_distance
from rapm.evaluate.validate import Features
from rapm.export.files import FILES, export_lora, verify_export
from rapm.export.lora_file import read_lora
from rapm.finite import PROBES, describe, first_stage
from rapm.lora import LoRA
from rapm.solver import Walk
from rapm.step import Step
from rapm.store import METADATA, Store, Trajectory, _sealed, verify
from rapm.teacher import Teacher, load_teacher
from rapm.train import Figures, validate
from rapm.training import Training
from rapm.trajectories import prepare
from rapm.unet import Text

CONFIG = Config(
    steps=2, fine_steps=2, guidance=3.0, lora_rank=2, trajectories=3, validation_prompts=1, seed=3, resolution=(64, 64),
    solve_batch=2, replay_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Callable) -> Teacher:
    return tiny_teacher("sd1")


@pytest.fixture(scope="module")
def store(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return solved(teacher, tmp_path_factory.mktemp("store"))


def solved(teacher: Teacher, folder: Path) -> Store:
    return prepare(folder, teacher, ["a cat", "a dog", "a house"], CONFIG, progress=False)


def make(teacher: Teacher, trajectory: Trajectory, **changes) -> Step:
    config = CONFIG.replace(**changes)
    lora = LoRA(teacher.unet, 2)
    with torch.no_grad():  # a student that has moved
        lora.flat += 0.02 * torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(1)).to(
            lora.flat.device
        )
    step = Step(teacher.unet, lora, teacher.schedule, config, trajectory, teacher.encode_negative())
    again(step, trajectory)
    step.slot.zero_()
    step.key[1] = 8
    return step


def again(step: Step, trajectory: Trajectory) -> None:
    """The second slot of the fifth iteration, with nothing told yet."""
    step.load(trajectory, 4)
    step.draw(torch.Generator().manual_seed(2), 4)
    step.fault.zero_()
    step.slot += 1
    step.key[1] += 1


def output(step, patch, bad):
    made = step.student
    patch.setattr(step, "student", lambda *arguments: made(*arguments) * bad)


def relative_target(step, patch, bad):
    made = step.target
    patch.setattr(step, "target", lambda *arguments, **options: made(*arguments, **options) * bad)


def absolute_target(step, patch, bad):
    step.positions[1:, 0, 3, 3] = bad


def features_of(image):
    def inject(step, patch, bad):
        """In the first feature: the network carries it to the last."""
        renoised = step.renoised

        def spoilt(*arguments):
            x, *rest = renoised(*arguments)
            x[image, 0, 0, 0] = bad
            return x, *rest

        patch.setattr(step, "renoised", spoilt)

    return inject


def last_feature(step, patch, bad):
    """As an overflow of the last layer alone."""
    features = step.unet.features

    def spoilt(*arguments, **options):
        taps = features(*arguments, **options)
        taps[-1][:, 0, 0, 0] = bad
        return taps

    patch.setattr(step.unet, "features", spoilt)


def logits_of(side):
    def inject(step, patch, bad):
        with torch.no_grad():
            step.discriminators.flat[side] = math.nan  # an infinite weight is NaN after the norm, or none at all

    return inject


def of(function, place, index):
    """In a number of what a function of the step returns."""

    def inject(step, patch, bad):
        original = getattr(step_module, function)

        def spoilt(*arguments, **options):
            found = original(*arguments, **options)
            (found if place is None else found[place])[index] = bad
            return found

        patch.setattr(step_module, function, spoilt)

    return inject


STAGES = {
    "output": (output, "the network's output at the student's position"),
    "relative target": (relative_target, "the relative target"),
    "absolute target": (absolute_target, "the absolute target"),
    "features, fake": (features_of(0), "the features of the student's position"),
    "features, real relative": (features_of(1), "the features of the relative target"),
    "features, real absolute": (features_of(2), "the features of the absolute target"),
    "last feature": (last_feature, "the features of the student's position"),
    "logits, relative": (logits_of(0), "the logits of D_rel"),
    "logits, absolute": (logits_of(1), "the logits of D_abs"),
    "huber_rel": (of("position_loss", 1, 0), "huber_rel, the relative distance"),
    "huber_abs": (of("position_loss", 1, 1), "huber_abs, the absolute distance"),
    "gen_rel": (of("disc_head", 0, 0), "gen_rel, the student's term against D_rel"),
    "gen_abs": (of("disc_head", 0, 1), "gen_abs, the student's term against D_abs"),
    "disc_rel": (of("disc_head", 1, 0), "disc_rel, the loss of D_rel"),
    "disc_abs": (of("disc_head", 1, 1), "disc_abs, the loss of D_abs"),
    "sum": (lambda step, patch, bad: step.adversarial.fill_(bad), "the sum of the student's losses"),
    "LoRA gradient": (of("position_gradient", None, (0, 0, 0, 0)), "the LoRA's gradient"),
    "head gradient": (of("disc_head", 3, (1, 5)), "the heads' gradient"),
}


def weights_of(step: Step) -> list[torch.Tensor]:
    """Copies of all that an update changes; NaN is put in by tests only, and stays as it is."""
    moments = [
        x for adam in (step.optimizer, step.head_optimizer) for state in adam.state.values() for x in state.values()
    ]
    found = [step.lora.flat, step.discriminators.flat, *step.replay.buffers(), *moments]
    return [x.detach().nan_to_num(nan=7.0).clone() for x in found]


@pytest.mark.parametrize("stage", STAGES)
def test_a_slot_names_the_stage_and_changes_nothing(teacher, store, monkeypatch, stage):
    inject, words = STAGES[stage]
    step = make(teacher, store[0])
    step()  # so that there are moments
    for skipped, bad in enumerate((math.nan, math.inf), start=1):
        with monkeypatch.context() as patch:
            inject(step, patch, bad)
            kept = weights_of(step)
            step()
        assert describe(step.fault.tolist(), 2) == (5, f"not finite in slot 2 of 2, which was skipped: {words}")
        lora, heads, *others = weights_of(step)
        assert torch.equal(lora, kept[0]) and torch.equal(heads, kept[1])
        assert all(x.isfinite().all() for x in others)
        assert (float(step.skipped), float(step.worst)) == (skipped, skipped)
        assert step.sums.isfinite().all()
        again(step, store[0])


def test_every_probe_has_a_stage_and_the_first_one_wins():
    assert first_stage([]) == ""
    words = {first_stage([name]) for name in PROBES}
    assert len(words) == len(PROBES) and "" not in words
    assert first_stage(PROBES) == "the network's output at the student's position"


def test_the_first_skipped_slot_is_the_one_that_is_told(teacher, store):
    step = make(teacher, store[0])
    step.adversarial.fill_(math.nan)
    step()
    step.positions[:] = math.nan
    step()
    iteration, words = describe(step.fault.tolist(), 2)
    assert iteration == 5 and "slot 1 of 2" in words and words.endswith("the sum of the student's losses")


def test_without_discriminators(teacher, store, monkeypatch):
    step = make(teacher, store[0], adversarial_relative=0.0, adversarial_absolute=0.0)
    step()
    assert not step.fault.any()
    step.positions[2] = math.nan
    step()
    assert describe(step.fault.tolist(), 2)[1].endswith("huber_abs, the absolute distance")


@pytest.mark.gpu
def test_a_captured_slot_names_the_stage(tiny_teacher, tmp_path):
    teacher = tiny_teacher("sd1", torch.bfloat16, "cuda")
    trajectory = solved(teacher, tmp_path)[0]
    step = make(teacher, trajectory)
    step()
    slot = step.captured()
    for inject, words in (STAGES["absolute target"], STAGES["logits, absolute"], STAGES["sum"]):
        step.load(trajectory, 4)
        kept = step.discriminators.flat.detach().clone()
        inject(step, None, math.nan)
        step.fault.zero_()
        slot()
        assert describe(step.fault.tolist(), 2) == (5, f"not finite in slot 1 of 2, which was skipped: {words}")
        step.adversarial.fill_(1)
        with torch.no_grad():
            step.discriminators.flat.copy_(kept)


def test_a_run_names_the_stage(tmp_path, monkeypatch, capsys):
    """On the terminal, in metrics.jsonl, and where it gives up."""
    folder = tiny.tiny_pipeline("sd1", tmp_path / "teacher")
    renoised = Step.renoised

    def spoilt(self, *arguments):
        x, *rest = renoised(self, *arguments)
        x[2] += torch.where(self.key[1] >= 6, math.nan, 0.0)  # from the fourth iteration's first slot on
        return x, *rest

    monkeypatch.setattr(Step, "renoised", spoilt)
    settings = {"trajectories": 3, "steps": 2, "fine_steps": 1, "guidance": 1.0, "log_steps": 2,
                "validation_prompts": 1, "resolution": "[64, 64]", "validation_steps": 100}  # fmt: skip
    (tmp_path / "settings.toml").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    words = ["train", "--teacher", folder, "--prompts", tmp_path / "prompts.txt", "--output_dir", tmp_path / "run",
             "--config", tmp_path / "settings.toml", "--report_to", "none", "--max_train_steps", "40"]  # fmt: skip
    assert main([str(word) for word in words]) == 1
    stage = "not finite in slot 1 of 2, which was skipped: the features of the absolute target"
    error = capsys.readouterr().err
    assert f"warning: iteration 4: {stage}" in error
    assert f"20 updates in a row were not finite, up to iteration 14 (iteration 13: {stage}): lower" in error
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if stage in line.get("warning", "")]
    assert [line["iteration"] for line in told] == [4, 5, 7, 9, 11, 13]
    assert lines[0]["skipped"] == 0 and math.isfinite(lines[-1].get("skipped", 0))


def test_while_solving(teacher, tmp_path, monkeypatch):
    call, calls = Walk.__call__, []

    def spoilt(self):
        call(self)
        calls.append(self)
        if len(calls) == 3:  # the second slot's first fine step
            self.z[1, 0, 0, 0] = math.inf

    monkeypatch.setattr(Walk, "__call__", spoilt)
    with pytest.raises(RunError, match=r"trajectory 1 \('a dog'\): not finite: the teacher's walk in slot 2 of 2"):
        solved(teacher, tmp_path)
    assert not list(tmp_path.glob("shard-*"))


def test_a_position_too_large_for_the_stored_dtype(teacher, tmp_path, monkeypatch):
    call = Walk.__call__
    monkeypatch.setattr(Walk, "__call__", lambda self: (call(self), self.z.mul_(1e5)))
    with pytest.raises(RunError, match=r"trajectory 0 .*slot 1 of 2.*trajectory_dtype float32"):
        prepare(tmp_path, teacher, ["a cat"], CONFIG.replace(trajectory_dtype="float16"), progress=False)


@pytest.mark.parametrize("name", ["positions", "fine", "hidden"])
def test_a_stored_trajectory(teacher, tmp_path, name):
    """One that was written so: its hash is right."""
    solved(teacher, tmp_path)
    (path,) = tmp_path.glob("shard-*")
    with safe_open(path, framework="pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors[name][1].view(-1)[2] = math.nan
    path.write_bytes(_sealed(tensors, {key: x for key, x in header.items() if key != "sha256"}))
    store = Store.open(tmp_path)
    assert store[0].prompt == "a cat"
    with pytest.raises(UserError, match=f"not finite: {name} of trajectory 1, in {path.name}: delete that file"):
        store[1]
    assert verify(tmp_path) == [f"{path.name}: holds {name} that are not finite: delete it, it will be computed again"]
    path.unlink()
    solved(teacher, tmp_path)
    assert verify(tmp_path) == [] and (tmp_path / METADATA).exists()


def test_prompt_embeddings(teacher, monkeypatch):
    encode = teacher._encode_prompt

    def spoilt(prompt, **options):
        positive, negative = encode(prompt, **options)[:2]
        if negative is not None:
            negative[0, 0, 0] = math.nan
        positive[-1, 0, 0] = math.nan
        return positive, negative

    monkeypatch.setattr(teacher, "_encode_prompt", spoilt)
    with pytest.raises(RunError, match=r"not finite: the embeddings \(hidden\) of the prompt 'a dog'"):
        teacher.encode(["a cat", "a dog"])
    with pytest.raises(RunError, match=r"not finite: the embeddings \(hidden\) of the prompt 'rain'"):
        teacher.encode_negative("rain")


def test_embeddings_too_large_for_the_network(tiny_teacher, monkeypatch):
    teacher = tiny_teacher("sd1", torch.float16)
    encode = teacher._encode_prompt
    monkeypatch.setattr(teacher, "_encode_prompt", lambda *a, **o: [encode(*a, **o)[0] * 1e6, None])
    with pytest.raises(RunError, match=r"not finite: .* in torch.float16: use mixed_precision bf16 or no"):
        teacher.encode(["a cat"])


@pytest.mark.parametrize(
    "part, name",
    [
        ("unet/diffusion_pytorch_model", "mid_block.resnets.0.conv1.weight"),
        ("text_encoder/model", "encoder.layers.0.mlp.fc1.weight"),
        ("vae/diffusion_pytorch_model", "decoder.conv_in.weight"),
    ],
)
def test_a_teachers_weights(tmp_path, part, name):
    path = tiny.tiny_pipeline("sd1", tmp_path) / f"{part}.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key].view(-1)[3] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite") as caught:
        load_teacher(str(tmp_path), device="cpu", dtype=torch.float32)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["lora", "heads.flat", "adam.lora.0.exp_avg", "replay.tap0"])
def test_a_checkpoint(teacher, store, tmp_path, name):
    training = Training(teacher, store, CONFIG)
    training.iterate()
    state = training.state()
    path = save_checkpoint(tmp_path, state, 1, CONFIG)
    load_checkpoint(path, CONFIG)
    state[name].detach().view(-1)[0] = math.nan
    path = save_checkpoint(tmp_path, state, 2, CONFIG)
    with pytest.raises(UserError, match=f"{path}: {name} holds numbers that are not finite: give an earlier"):
        load_checkpoint(path, CONFIG)


@pytest.mark.parametrize("end, part", [(".lora_down.weight", "down"), (".lora_up.weight", "up"), (".alpha", "up")])
def test_a_lora_file(teacher, tmp_path, end, part):
    lora = LoRA(teacher.unet, 2)
    with torch.no_grad():
        lora.flat += 1
    export_lora(tmp_path, lora.export(), teacher, config=CONFIG, steps_done=1)
    tensors = load_file(tmp_path / FILES[0])
    key = next(key for key in tensors if key.endswith(end))
    tensors[key].view(-1)[0] = math.nan
    save_file(tensors, tmp_path / FILES[0])
    with pytest.raises(UserError, match=f"{part} of .* holds numbers that are not finite") as caught:
        read_lora(tmp_path / FILES[0], teacher.unet)
    assert str(tmp_path / FILES[0]) in str(caught.value)


def test_an_export_that_its_dtype_cannot_hold(teacher, tmp_path):
    lora = LoRA(teacher.unet, 2)
    with torch.no_grad():
        lora.flat += 1e5
    weights = lora.export()
    export_lora(tmp_path, weights, teacher, config=CONFIG, steps_done=1, dtype=torch.float16)
    noise = torch.zeros(1, *teacher.latent_shape((64, 64)))
    with pytest.raises(ExportError, match=r"does not read back: .* holds numbers that are not finite"):
        verify_export(tmp_path, teacher, weights, prompts=["a cat"], noise=noise, steps=2)


def test_a_distance_of_what_is_not_finite_is_none(teacher, store, tmp_path, monkeypatch):
    x = torch.randn(40, 3)
    assert math.isnan(frechet_distance(x * math.nan, x)) and math.isnan(frechet_distance(x, x * math.inf))
    text = Text.cat([t.text for t in store])
    with pytest.raises(RunError, match="not finite: the teacher's features of its own pictures"):
        Features(teacher, [(torch.stack([t.positions[-1] for t in store]) * math.nan, text)])
    assert not validated(Training(teacher, store, CONFIG), tmp_path, monkeypatch, math.nan).exists()
    assert validated(Training(teacher, store, CONFIG), tmp_path, monkeypatch, 1.0).exists()


def validated(training: Training, folder: Path, patch: pytest.MonkeyPatch, fd: float) -> Path:
    """checkpoint-best after a validation whose distance is `fd`."""
    from rapm.log import Log

    measured = training.measure()
    patch.setattr(training, "measure", lambda: dataclasses.replace(measured, figures=measured.figures | {
        "val_fd": fd, "val_fd_floor": 1.0}))  # fmt: skip
    with Log(folder, "none") as log:
        validate(training, folder, log, Figures(training, log, tqdm(disable=True)), training.state())
    return folder / "checkpoint-best"
