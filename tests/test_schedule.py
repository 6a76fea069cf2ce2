import math

import pytest
import torch

from rapm.errors import UserError
from rapm.schedule import Schedule, recipe_scheduler, renoise_coefficients, step_coefficients, trailing_steps

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
CONFIGS = {
    "sd": SD,
    "sd v": {**SD, "prediction_type": "v_prediction"},
    "zero terminal SNR": {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "linear": dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", num_train_timesteps=400),
    "cosine": dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "trained": dict(trained_betas=torch.linspace(0.001, 0.02, 1000).tolist()),
    "of another sampler": {**SD, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading",
                           "interpolation_type": "linear", "use_karras_sigmas": True, "thresholding": True},
}  # fmt: skip
STEPS = [1, 2, 3, 4, 5, 6, 7, 8, 40]


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_equals_stock_ddim(name, n):
    from diffusers import DDIMScheduler

    config = {key: value for key, value in CONFIGS[name].items() if not key.startswith("_") and key != "thresholding"}
    stock = DDIMScheduler.from_config(
        config, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False, thresholding=False
    )
    stock.set_timesteps(n)
    schedule = Schedule.from_config(CONFIGS[name])
    steps = trailing_steps(len(schedule), n)
    assert [t for t, _ in steps] == stock.timesteps.tolist()
    assert len(steps) == n and steps[-1][1] <= 0

    random = torch.Generator().manual_seed(n)
    z = torch.randn(2, 4, 8, 8, generator=random, dtype=torch.float64)
    for t, s in steps:
        out = torch.randn(z.shape, generator=random, dtype=torch.float64)
        expected = stock.step(out, t, z).prev_sample
        a, b = step_coefficients(schedule, t, s)
        # the stock computes sqrt(abar) and sqrt(1 - abar) in fp32: 1 - abar(0) = 8.5e-4 keeps 7e-5 of itself
        torch.testing.assert_close(a * z + b * out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        z = expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_perfect_network_stays_on_the_path(name):
    """z_t = sqrt(abar) x + sqrt(1 - abar) eps at every t, when `out` is the exact eps or v: no rounding but fp64's."""
    schedule = Schedule.from_config(CONFIGS[name])
    random = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 50, generator=random, dtype=torch.float64)
    for t, s in trailing_steps(len(schedule), 5):
        (signal, noise), (signal_s, noise_s) = (
            (math.sqrt(schedule.at(u)), math.sqrt(1 - schedule.at(u))) for u in (t, s)
        )
        out = eps if schedule.prediction == "epsilon" else signal * eps - noise * x
        a, b = step_coefficients(schedule, t, s)
        z_s = a * (signal * x + noise * eps) + b * out
        torch.testing.assert_close(z_s, signal_s * x + noise_s * eps, rtol=1e-11, atol=1e-11)


def test_abar_is_the_schedule_of_stable_diffusion_in_float64():
    schedule = Schedule.from_config(SD)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert schedule.abar.dtype == torch.float64 and schedule.abar.device.type == "cpu"
    torch.testing.assert_close(schedule.abar, torch.cumprod(1 - betas, 0), rtol=1e-5, atol=0)
    assert schedule.at(-1) == schedule.at(-250) == schedule.at(0) == schedule.abar[0].item()


def test_the_coarse_grid_is_in_the_fine_grid():
    coarse, fine = trailing_steps(1000, 4), trailing_steps(1000, 40)
    assert coarse == [(999, 749), (749, 499), (499, 249), (249, -1)]
    assert [(fine[i][0], fine[i + 9][1]) for i in range(0, 40, 10)] == coarse


def test_zero_terminal_snr_is_finite_and_starts_from_noise_alone():
    schedule = Schedule.from_config(CONFIGS["zero terminal SNR"])
    assert schedule.at(999) == 0
    for n in STEPS:
        assert all(map(math.isfinite, sum((step_coefficients(schedule, *ts) for ts in trailing_steps(1000, n)), ())))
    a, b = step_coefficients(schedule, 999, 749)  # v = -x there
    assert (a, b) == (math.sqrt(1 - schedule.at(749)), -math.sqrt(schedule.at(749)))
    assert renoise_coefficients(schedule, 749, 999) == (0, 1)


@pytest.mark.parametrize(("t_n", "u"), [(749, 800), (499, 748), (-1, 0), (-1, 249), (249, 249)])
def test_renoising_reaches_the_marginal_of_u(t_n, u):
    """sqrt(r) (sqrt(abar_t) x + sqrt(1 - abar_t) eps) + sqrt(1 - r) xi has signal sqrt(abar_u), variance 1 - abar_u."""
    schedule = Schedule.from_config(SD)
    keep, add = renoise_coefficients(schedule, t_n, u)
    assert keep * math.sqrt(schedule.at(t_n)) == pytest.approx(math.sqrt(schedule.at(u)), rel=1e-12)
    assert keep**2 * (1 - schedule.at(t_n)) + add**2 == pytest.approx(1 - schedule.at(u), rel=1e-12)


def test_renoising_by_nothing_changes_nothing():
    assert renoise_coefficients(Schedule.from_config(SD), 249, 249) == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not supported: epsilon or v_prediction"),
        ({"beta_schedule": "exponential"}, "beta_schedule 'exponential' is not supported: scaled_linear, linear"),
        ({"beta_schedule": None}, "beta_schedule None is not supported"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR .* needs prediction_type v_prediction"),
    ],
)
def test_an_unsupported_scheduler_is_a_user_error(change, message):
    with pytest.raises(UserError, match=message) as error:
        Schedule.from_config({**SD, **change})
    assert "\n" not in str(error.value)


def test_the_recipe():
    config = recipe_scheduler(CONFIGS["of another sampler"]).config
    wanted = dict(SD, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False, thresholding=False,
                  prediction_type="epsilon")  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
