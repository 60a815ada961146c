"""Paths against their definitions, and the conversions of predictions on them."""

import numpy as np
import pytest
import torch

from ldm.diffusion.path import BUFFER_NAMES, DiscretePath, FlowPath
from ldm.diffusion.prediction import target_of, to_x0


def mix(path, latent, time, noise):
    signal, factor = path.factors(time, latent)
    return signal * latent + factor * noise


def test_default_is_the_schedule_of_stable_diffusion():
    schedule = DiscretePath()
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-12)
    assert schedule.alphas_cumprod[999] == pytest.approx(0.0046601, abs=5e-8)
    assert schedule.betas[[0, 999]] == pytest.approx([0.00085, 0.012])


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
def test_buffers_are_finite_and_the_posterior_obeys_bayes(kind):
    schedule = DiscretePath(kind=kind, num_timesteps=100)
    buffers = schedule.vectors()
    assert tuple(buffers) == BUFFER_NAMES
    assert all(tensor.shape == (100,) and tensor.dtype == torch.float32 for tensor in buffers.values())
    assert all(torch.isfinite(tensor).all() for tensor in buffers.values())
    # q(x_{t-1} | x_t, x_0) by precision weighting of q(x_t | x_{t-1}) and q(x_{t-1} | x_0).
    beta, before = schedule.betas[1:], schedule.alphas_cumprod[:-1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    expected = {
        "posterior_variance": 1 / precision,
        "posterior_mean_coef1": np.sqrt(before) / (1 - before) / precision,
        "posterior_mean_coef2": np.sqrt(1 - beta) / beta / precision,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(buffers[name][1:], values, rtol=1e-5)


def test_cosine_follows_its_curve():
    time = np.arange(1, 901) / 1000
    curve = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(DiscretePath(kind="cosine").alphas_cumprod[:900], curve, rtol=1e-9)


def test_q_sample_is_per_sample_and_has_the_right_variance():
    schedule = DiscretePath()
    timestep = torch.tensor([0, 999])
    latent = torch.full((2, 4, 64, 64), 3.0)
    noised = mix(schedule, latent, timestep, torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)))
    for index, t in enumerate(timestep.tolist()):
        alpha = schedule.alphas_cumprod[t]
        assert noised[index].mean().item() == pytest.approx(3 * alpha**0.5, abs=0.03)
        assert noised[index].var().item() == pytest.approx(1 - alpha, rel=0.05)


ALL_KINDS = [(path, kind) for path in (DiscretePath(), FlowPath(3.0)) for kind in path.predictions]


@pytest.mark.parametrize(("path", "kind"), ALL_KINDS)
def test_every_prediction_gives_back_the_clean_latent(path, kind):
    generator = torch.Generator().manual_seed(1)
    latent, noise = (torch.randn(4, 2, 3, 5, generator=generator) for _ in range(2))
    time = torch.tensor([0, 10, 500, 999])
    noisy, factors = mix(path, latent, time, noise), path.factors(time, latent)
    prediction = target_of(kind, latent, noise, *factors)
    torch.testing.assert_close(to_x0(prediction, noisy, *factors, kind), latent, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="the latent's"):
        to_x0(prediction[:1], noisy, *factors, kind)
    with pytest.raises(ValueError, match="unknown value 'score'"):
        to_x0(prediction, noisy, *factors, "score")


def test_first_use_in_inference_mode_leaves_training_possible():
    path, timestep = DiscretePath(), torch.tensor([5])
    latent = torch.ones(1, 1, 2, 2)
    with torch.inference_mode():
        path.factors(timestep, latent)
    prediction = latent.clone().requires_grad_()
    to_x0(prediction, latent, *path.factors(timestep, latent), "v").sum().backward()
    assert prediction.grad is not None


def test_velocity_is_the_derivative_of_a_flow():
    path, time = FlowPath(), torch.tensor([250.0, 700.0])
    latent, noise = torch.randn(2, 2, 1, 2, 2).unbind()
    change = mix(path, latent, time + 1, noise) - mix(path, latent, time, noise)
    torch.testing.assert_close(change * 1000, target_of("velocity", latent, noise, *path.factors(time, latent)),
                               atol=1e-3, rtol=1e-3)


def test_levels_of_a_flow():
    """SD3's grid (Esser et al. 2024, Eq. 23), and what a strength leaves of it."""
    levels = FlowPath(3.0).levels(4)
    u = np.linspace(1, 0.001, 4)
    assert [level.noise for level in levels[:-1]] == pytest.approx(3 * u / (1 + 2 * u))
    assert levels[0].signal == 0 and levels[-1].noise == 0
    assert all(level.time == pytest.approx(1000 * level.noise) and level.share == level.noise for level in levels)
    assert all(level.signal + level.noise == pytest.approx(1) for level in levels)
    assert [level.noise for level in FlowPath().levels(4, "trailing")] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert FlowPath(3.0).levels(20, "trailing", strength=0.3) == FlowPath(3.0).levels(20, "trailing")[-7:]
    assert len(FlowPath().levels(4, "trailing", strength=0.01)) == 2
    for arguments, message in (((4, "leading"), "spacing"), ((4, "uniform", "first"), "Add --end clean"),
                               ((0,), "num_steps")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            FlowPath().levels(*arguments)
    for wrong in ({"shift": 0.0}, {"times": "cosine"}, {"deviation": -1.0}):
        with pytest.raises(ValueError, match="FlowPath"):
            FlowPath(**wrong)


def test_training_times_of_a_flow():
    """Mean and tail of both distributions at SD3.5's shift against integrals worked out on a fine grid."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for path, share in ((FlowPath(3.0), u), (FlowPath(3.0, times="logit_normal"), None)):
        torch.manual_seed(0)
        drawn = path.draw_times(100_000, "cpu").numpy() / 1000
        assert drawn.dtype == np.float32 and drawn.min() > 0 and drawn.max() <= 1
        if share is None:
            share = 1 / (1 + np.exp(-torch.special.ndtri(torch.from_numpy(u)).numpy()))
        expected = 3 * share / (1 + 2 * share)
        assert drawn.mean() == pytest.approx(expected.mean(), abs=0.003)
        assert (drawn > 0.9).mean() == pytest.approx((expected > 0.9).mean(), abs=0.005)


@pytest.mark.parametrize("arguments", [{"kind": "sqrt"}, {"num_timesteps": 0}, {"end": 1.5}, {"start": 0}])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="schedule: "):
        DiscretePath(**arguments)


@pytest.mark.parametrize("timestep", [[-1, 0], [0, 1000], [3]])
def test_bad_timesteps_are_refused(timestep):
    latent = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="timestep"):
        DiscretePath().factors(torch.tensor(timestep), latent)
