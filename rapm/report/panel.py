"""What a person reads while a run trains: a few lines at each validation, and a warning when something drifts."""

from __future__ import annotations

import shlex
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HISTORY = 50  # logged gradient norms whose median is what is usual
ENOUGH = 10  # of them, before anything is unusual


@dataclass(frozen=True)
class Drift:
    """A figure, the words that say it, the range in which it is usual, and what to do outside of it."""

    figure: str
    words: str
    low: float
    high: float
    advice: str


# The ratios are to the teacher's pictures of the same prompts and noise. The ranges are wide on purpose: a warning that
# every run gives is read by nobody. Where they come from is behind each line.
DRIFTS = (
    # A guided teacher's own 4 steps lie within 10% of its 40; what is visibly washed out or burnt is a quarter off.
    Drift("val_saturation", "saturation is {:.2f} of the teacher's", 0.75, 1.3,
          "the adversarial terms or the learning rate are too strong for this teacher"),
    Drift("val_contrast", "contrast is {:.2f} of the teacher's", 0.75, 1.3,
          "the adversarial terms or the learning rate are too strong for this teacher"),
    # Few-step students lose some of it (the embedded one keeps nine tenths); half is a collapse in sight.
    Drift("val_diversity", "two seeds differ {:.2f} times as much as the teacher's", 0.6, 1.7,
          "below: the student draws one picture a prompt, lower the adversarial terms; above: it has not learned yet"),
    # A head that is nearly always right is on the flat side of the hinge: its gradient says little. Chance is no fault.
    Drift("heads_rel", "D_rel is right in {:.2f} of all positions", 0.0, 0.95,
          "the heads outrun the student: lower head_learning_rate, or raise renoise"),
    Drift("heads_abs", "D_abs is right in {:.2f} of all positions", 0.0, 0.95,
          "the heads outrun the student: lower head_learning_rate, or raise renoise"),
    # Batch 1 is noisy: norms differ by a factor of three from slot to slot, means over log_steps by much less.
    Drift("grad_norm_ratio", "the LoRA's gradient norm is {:.2f} times its median", 0.0, 10.0,
          "lower learning_rate if it stays there"),
    Drift("head_grad_norm_ratio", "the heads' gradient norm is {:.2f} times its median", 0.0, 10.0,
          "lower head_learning_rate if it stays there"),
    # Skipped updates change nothing, and a few are usual in fp16; many are a run that stands still.
    Drift("skipped_share", "{:.2f} of the last updates were not finite and were skipped", 0.0, 0.05,
          "use mixed_precision bf16, or lower learning_rate"),
    # FD of 64 samples moves by some 10% from one validation to the next where the student does not.
    Drift("fd_ratio", "FD is {:.2f} times the least so far", 0.0, 1.5,
          "the student moves away from the teacher; checkpoint-best is kept"),
)  # fmt: skip


class Watch:
    """Warnings, each said once for as long as its figure is out of range."""

    def __init__(self) -> None:
        self._episodes: set[str] = set()
        self._norms: dict[str, deque[float]] = {name: deque(maxlen=HISTORY) for name in ("grad_norm", "head_grad_norm")}
        self._skipped = 0.0
        self._least = float("inf")

    def __call__(self, values: Mapping[str, float], slots: int = 0) -> list[str]:
        """The warnings that `values`, the figures of a log or of a validation, begin. `slots`: since the last log."""
        values, found = {**values, **self._derived(values, slots)}, []
        for drift in DRIFTS:
            value = values.get(drift.figure)
            if value is None:
                continue
            if drift.low <= value <= drift.high:
                self._episodes.discard(drift.figure)
            elif drift.figure not in self._episodes:
                self._episodes.add(drift.figure)
                usual = f"{drift.low:g} to {drift.high:g}" if drift.low else f"up to {drift.high:g}"
                found.append(f"{drift.words.format(value)} ({usual} is usual): {drift.advice}")
        return found

    def _derived(self, values: Mapping[str, float], slots: int) -> dict[str, float]:
        found = {}
        for side in ("rel", "abs"):
            if f"val_acc_{side}_real" in values:
                found[f"heads_{side}"] = (values[f"val_acc_{side}_real"] + values[f"val_acc_{side}_fake"]) / 2
        for name, past in self._norms.items():
            if values.get(name):
                if len(past) >= ENOUGH:
                    found[f"{name}_ratio"] = values[name] / statistics.median(past)
                past.append(values[name])
        if "skipped" in values and slots:
            found["skipped_share"] = (values["skipped"] - self._skipped) / slots
            self._skipped = values["skipped"]
        if "val_fd" in values:
            found["fd_ratio"] = values["val_fd"] / min(self._least, values["val_fd"])
            self._least = min(self._least, values["val_fd"])
        return found


def panel(iteration: int, values: Mapping[str, float], best: tuple[int, float] | None) -> str:
    """The latest figures in a few lines. `best`: iteration and FD of the best checkpoint, where there is one."""
    closeness = f"latent RMSE {values['val_rmse']:.3f}"
    if "val_fd" in values:
        kept = f", best {best[1]:.2f} at {best[0]}" if best else ""
        closeness = f"FD {values['val_fd']:.2f} (the teacher's own {values['val_fd_floor']:.2f}{kept}), {closeness}"
    pictures = f"saturation {values['val_saturation']:.2f}, contrast {values['val_contrast']:.2f}"
    if "val_diversity" in values:
        pictures += f", diversity between seeds {values['val_diversity']:.2f}"
    heads = "; ".join(
        f"D_{side} sees {values[f'val_acc_{side}_real']:.0%} of real, {values[f'val_acc_{side}_fake']:.0%} of fake"
        for side in ("rel", "abs")
    )
    rows = {"closeness": closeness, "pictures": f"{pictures} of the teacher's", "heads": f"{heads} (chance 50%)"}
    if "grad_norm" in values:
        rows["gradients"] = f"LoRA {values['grad_norm']:.3g}, heads {values['head_grad_norm']:.3g}"
    return "\n".join([f"iteration {iteration}", *(f"  {name:<10} {text}" for name, text in rows.items())])


def card_figures(figures: dict[str, float]) -> dict[str, float]:
    """What a model card says of a student, in words."""
    words = {
        "val_rmse": "latent RMSE to the teacher's endpoints", "val_saturation": "saturation, of the teacher's",
        "val_contrast": "contrast, of the teacher's", "val_diversity": "diversity between seeds, of the teacher's",
    }  # fmt: skip
    return {text: figures[name] for name, text in words.items() if name in figures}


def best_line(folder: Path, done: int, fd: float | None, best: tuple[int, float] | None) -> str:
    """Which checkpoint was the best and which one the files are: the user decides, since FD of few samples is noisy."""
    if fd is None or best is None:
        return f"the files are iteration {done}'s (no FD to the teacher: too few trajectories, or fd_samples is 0)"
    if best[1] >= fd:
        return f"the files are iteration {done}'s, the closest to the teacher of all validations (FD {fd:.2f})"
    return (
        f"the files are iteration {done}'s (FD {fd:.2f}); iteration {best[0]} was closer to the teacher "
        f"(FD {best[1]:.2f}): `rapm export --run {shlex.quote(str(folder))} --checkpoint best` writes that one instead"
    )
