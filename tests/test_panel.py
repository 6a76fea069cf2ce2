"""What a person reads while a run trains: warnings once an episode, the panel, the last lines."""

from __future__ import annotations

import pytest

from rapm.report.panel import DRIFTS, ENOUGH, Watch, best_line, panel

FIGURES = dict(
    val_rmse=0.5, val_fd=2.0, val_fd_floor=1.0, val_saturation=1.0, val_contrast=1.0, val_diversity=0.9,
    val_acc_rel_real=0.6, val_acc_rel_fake=0.5, val_acc_abs_real=0.5, val_acc_abs_fake=0.7,
)  # fmt: skip


def test_a_warning_is_said_once_an_episode():
    watch = Watch()
    assert watch(FIGURES) == []
    said = [watch({**FIGURES, "val_saturation": value}) for value in (1.4, 1.5, 1.0, 0.6)]
    assert [len(x) for x in said] == [1, 0, 0, 1]
    assert said[0][0].startswith("saturation is 1.40 of the teacher's (0.75 to 1.3 is usual): ")


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(val_contrast=0.5), "contrast is 0.50"),
        (dict(val_diversity=0.3), "two seeds differ 0.30 times"),
        (dict(val_acc_rel_real=1.0, val_acc_rel_fake=0.96), "D_rel is right in 0.98"),
        (dict(val_acc_abs_real=1.0, val_acc_abs_fake=0.96), "D_abs is right in 0.98"),
    ],
)
def test_each_figure_that_drifts_is_named(values, words):
    (warning,) = Watch()({**FIGURES, **values})
    assert words in warning


def test_gradient_norms_are_compared_with_their_own_median():
    watch = Watch()
    for i in range(ENOUGH):
        assert watch({"grad_norm": 1.0 + i % 2, "head_grad_norm": 0.1}) == []
    (warning,) = watch({"grad_norm": 30.0, "head_grad_norm": 0.2})
    assert "the LoRA's gradient norm is 20.00 times its median" in warning
    assert watch({"grad_norm": 1.0, "head_grad_norm": 0.1}) == []


def test_skipped_updates_and_a_rising_distance():
    watch = Watch()
    assert watch({"skipped": 1.0}, 40) == []  # one in forty
    (warning,) = watch({"skipped": 11.0}, 40)
    assert "0.25 of the last updates" in warning
    assert watch({"skipped": 11.0}, 40) == []
    assert watch(dict(val_fd=2.0)) == watch(dict(val_fd=1.0)) == watch(dict(val_fd=1.4)) == []
    (warning,) = watch(dict(val_fd=1.6))
    assert "FD is 1.60 times the least" in warning


def test_every_drift_has_a_range_and_advice():
    assert len({drift.figure for drift in DRIFTS}) == len(DRIFTS)
    assert all(drift.low < 1 < drift.high or drift.high < 1 for drift in DRIFTS)
    assert all(drift.words.count("{:.2f}") == 1 and drift.advice for drift in DRIFTS)


def test_the_panel_says_what_there_is():
    text = panel(400, {**FIGURES, "grad_norm": 0.5, "head_grad_norm": 2.0}, (200, 1.5))
    for words in ("iteration 400", "FD 2.00 (the teacher's own 1.00, best 1.50 at 200)", "diversity between seeds 0.90",
                  "D_rel sees 60% of real, 50% of fake", "LoRA 0.5, heads 2"):  # fmt: skip
        assert words in text
    few = {name: value for name, value in FIGURES.items() if name not in ("val_fd", "val_fd_floor", "val_diversity")}
    assert "FD" not in panel(1, few, None)


def test_the_last_lines_name_the_best(tmp_path):
    assert "too few trajectories" in best_line(tmp_path, 9, None, None)
    assert "the closest to the teacher of all validations" in best_line(tmp_path, 9, 1.5, (9, 1.5))
    assert "iteration 6 was closer" in best_line(tmp_path, 9, 1.5, (6, 1.2))
    assert "--checkpoint best" in best_line(tmp_path, 9, 1.5, (6, 1.2))
