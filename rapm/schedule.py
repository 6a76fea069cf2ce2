"""The teacher's noise schedule, and DDIM as linear maps: z_s = a z_t + b out. Pure functions, float64 on the CPU.

Positions are diffusers' timesteps t = 0 .. T-1; a negative one is the end of the walk, where abar = abar(0)
(`set_alpha_to_one=False`). abar is the cumulative alpha product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rapm.errors import UserError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

PREDICTIONS = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
MOST_TIMESTEPS = 2**16
# What a scheduler_config.json says about the teacher; the rest is about the sampler, which the recipe decides.
NOISE_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                "rescale_betas_zero_snr")  # fmt: skip


def recipe_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """The stock sampler that everything here equals: DDIM "trailing", with the betas and prediction type of `config`.

    `config` is a scheduler_config.json of any sampler. UserError for one that is not a DDPM noise schedule.
    """
    from diffusers import DDIMScheduler

    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"scheduler: prediction_type {prediction!r} is not supported: {' or '.join(PREDICTIONS)}")
    betas = config.get("beta_schedule")
    if config.get("trained_betas") is None and betas not in BETA_SCHEDULES:
        raise UserError(f"scheduler: beta_schedule {betas!r} is not supported: {', '.join(BETA_SCHEDULES)}")
    known = {key: config[key] for key in NOISE_FIELDS if key in config}
    _check_betas(known)
    scheduler = DDIMScheduler(**known, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False)
    abar = scheduler.alphas_cumprod
    if not (len(abar) == scheduler.config.num_train_timesteps and abar[0] > 0 and (abar.diff() <= 0).all()):
        raise UserError("scheduler: its betas are no noise schedule: the signal must fall with each training timestep")
    if prediction == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
        raise UserError(
            "scheduler: zero terminal SNR (rescale_betas_zero_snr) needs prediction_type v_prediction: "
            "epsilon says nothing about the image where the input is pure noise"
        )
    return scheduler


def _check_betas(config: Mapping[str, Any]) -> None:
    """UserError for what diffusers could not make betas of."""
    T = config.get("num_train_timesteps", 1)
    if type(T) is not int or not 0 < T <= MOST_TIMESTEPS:
        raise UserError(f"scheduler: num_train_timesteps {T} is not a number from 1 to {MOST_TIMESTEPS}")
    trained = config.get("trained_betas")
    if trained is not None and not (isinstance(trained, list) and trained):
        raise UserError("scheduler: trained_betas is not a list of numbers")
    ends = {key: config[key] for key in ("beta_start", "beta_end") if key in config}
    for key, beta in [*ends.items(), *(("trained_betas", beta) for beta in trained or [])]:
        if type(beta) not in (int, float) or not 0 <= beta <= 1:
            raise UserError(f"scheduler: {key} has {beta!r}, not a number from 0 to 1")


@dataclass(frozen=True, eq=False)
class Schedule:
    """abar by timestep, and what the network predicts."""

    abar: Tensor  # T, float64
    prediction: str  # "epsilon" or "v_prediction"

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> Schedule:
        """From diffusers' scheduler_config.json, with the very numbers of `recipe_scheduler`. UserError as there."""
        scheduler = recipe_scheduler(scheduler_config)
        return cls(scheduler.alphas_cumprod.double(), scheduler.config.prediction_type)

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.abar)

    def at(self, t: int) -> float:
        """abar(t); the final position for t < 0."""
        return self.abar[max(t, 0)].item()


def trailing_steps(T: int, n: int) -> list[tuple[int, int]]:
    """The (t, s) pairs, t -> s, that stock DDIM "trailing" walks in `n` steps; the last s is at most 0.

    s = t - T // n; where n does not divide T, the stock's next t may be one less than s.
    """
    timesteps = np.round(np.arange(T, 0, -T / n)).astype(int) - 1  # floats, rounded half to even: the stock's
    return [(t, t - T // n) for t in timesteps.tolist()]


def step_coefficients(schedule: Schedule, t: int, s: int) -> tuple[float, float]:
    """(a, b) of one DDIM step z_s = a z_t + b out, with the raw output of the network (docs/METHOD.md, Notation).

    With z_t = sqrt(abar) x + sqrt(1 - abar) eps and v = sqrt(abar) eps - sqrt(1 - abar) x, a v-prediction step is a
    rotation, finite at abar(t) = 0 too.
    """
    signal_t, noise_t = _signal_noise(schedule.at(t))
    signal_s, noise_s = _signal_noise(schedule.at(s))
    if schedule.prediction == "v_prediction":
        return signal_s * signal_t + noise_s * noise_t, noise_s * signal_t - signal_s * noise_t
    a = signal_s / signal_t
    return a, noise_s - a * noise_t


def renoise_coefficients(schedule: Schedule, t_n: int, u: int) -> tuple[float, float]:
    """(sqrt(r), sqrt(1 - r)), r = abar(u) / abar(t_n): x at t_n becomes sqrt(r) x + sqrt(1 - r) xi at the noisier u."""
    return _signal_noise(schedule.at(u) / schedule.at(t_n))


def _signal_noise(abar: float) -> tuple[float, float]:
    return math.sqrt(abar), math.sqrt(1 - abar)
