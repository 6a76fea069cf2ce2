"""What a run measures of its student: closeness in the teacher's own features, pictures against the teacher's."""

from __future__ import annotations

import pytest
import tiny
import torch

from rapm.config import Config
from rapm.evaluate.validate import COMPONENTS, FEWEST, Features, Validation, contrast, saturation
from rapm.lora import LoRA
from rapm.step import Step
from rapm.store import Store
from rapm.teacher import Teacher, load_teacher
from rapm.trajectories import Negatives, prepare
from rapm.unet import Text

CONFIG = Config(steps=2, fine_steps=1, guidance=3.0, lora_rank=1, trajectories=FEWEST + 2, validation_prompts=2,
                solve_batch=8, fd_samples=FEWEST, resolution=(64, 64))  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny.tiny_pipeline("sd1", tmp_path_factory.mktemp("sd1"))
    return load_teacher(str(folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def store(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Store:
    prompts = [f"{i} things" for i in range(CONFIG.trajectories)]
    return prepare(tmp_path_factory.mktemp("store"), teacher, prompts, CONFIG, progress=False)


@pytest.fixture(scope="module")
def validation(teacher: Teacher, store: Store) -> Validation:
    return Validation(teacher, store, CONFIG, Negatives(teacher, ""))


def student(teacher: Teacher, store: Store, size: float) -> dict[tuple[int, int], Step]:
    """The steps of a student that is `size` away from the teacher."""
    lora = LoRA(teacher.unet, 1)
    with torch.no_grad():
        lora.flat += size * torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(1))
    uncond = teacher.encode_negative("", CONFIG.resolution)
    return {(64, 64): Step(teacher.unet, lora, teacher.schedule, CONFIG, store[0], uncond)}


def test_the_teachers_own_pictures_are_the_unit(teacher, store):
    """Mean 0 and covariance 1 in every component, whatever the scale of the taps."""
    trajectories = [store[i] for i in range(len(store))]
    ends, text = torch.stack([t.positions[-1] for t in trajectories]), Text.cat([t.text for t in trajectories])
    features = Features(teacher, [(ends[:20], text.rows(0, 20)), (ends[20:], text.rows(20, 40))])
    x = features.reference
    assert x.shape == (len(store), COMPONENTS)
    assert torch.allclose(x.mean(0), torch.zeros(COMPONENTS).double(), atol=1e-6)
    assert torch.allclose(torch.cov(x.T), torch.eye(COMPONENTS).double(), atol=1e-4)
    assert torch.allclose(features(ends[3:5], text.rows(3, 5)), x[3:5], atol=1e-4)


def test_a_student_further_away_scores_worse_and_nothing_is_changed(teacher, store, validation):
    near, far = student(teacher, store, 0.01), student(teacher, store, 0.3)
    weights = [near[64, 64].lora.flat, near[64, 64].discriminators.flat]
    before = [x.clone() for x in weights]
    good, bad = validation(near), validation(far)
    assert all(map(torch.equal, before, weights))
    assert bad.figures["val_fd"] > 2 * good.figures["val_fd"]
    assert bad.figures["val_rmse"] > good.figures["val_rmse"]
    assert good.figures["val_fd_floor"] == bad.figures["val_fd_floor"] < good.figures["val_fd"]
    assert validation(near).figures == good.figures  # the same noise each time
    names = {"val_saturation", "val_contrast", "val_diversity", "val_disc_rel_slot1", "val_acc_abs_fake"}
    assert names <= good.figures.keys()
    assert len(good.pictures) == 2 and good.pictures[0].shape == (64, 64, 3)
    rows = validation.rows
    assert list(rows) == ["teacher, 2 steps", "teacher, 2 steps"][:1]  # with one fine step both are the same
    assert all(len(row) == 2 for row in rows.values())


def test_too_few_trajectories_have_no_distance(teacher, store):
    config = CONFIG.replace(fd_samples=FEWEST - 1)
    few = Validation(teacher, store, config, Negatives(teacher, ""))
    figures = few(student(teacher, store, 0.01)).figures
    assert "val_fd" not in figures and "val_diversity" not in figures and "val_saturation" in figures


def test_batches_are_of_one_size(teacher):
    class Mixed(list):
        def resolution(self, i: int) -> tuple[int, int]:
            return [(64, 64), (64, 96)][i in (3, 4, 5)]

    mixed = Validation(teacher, Mixed(range(12)), CONFIG.replace(solve_batch=2), Negatives(teacher, ""))
    assert [indices for indices, _ in mixed._batches([1, 3, 4, 5, 7, 9])] == [[1, 7], [9], [3, 4], [5]]
    assert all(indices == batch for indices, batch in mixed._batches(range(12)))


def test_saturation_and_contrast():
    grey, red = torch.full((4, 4, 3), 128, dtype=torch.uint8), torch.zeros(4, 4, 3, dtype=torch.uint8)
    red[..., 0] = 255
    assert (saturation(grey), contrast(grey), saturation(red)) == (0, 0, 1)
    halves = torch.zeros(4, 4, 3, dtype=torch.uint8)
    halves[:2] = 255
    assert contrast(halves) == pytest.approx(0.5, rel=0.05) and saturation(halves) == 0
