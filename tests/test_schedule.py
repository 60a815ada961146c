"""Noise schedules against their definitions."""

import numpy as np
import pytest
import torch

from ldm.diffusion.schedule import BUFFER_NAMES, make_schedule, q_sample, to_epsilon, to_x0, velocity


def test_default_is_the_schedule_of_stable_diffusion():
    schedule = make_schedule()
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-12)
    assert schedule.alphas_cumprod[999] == pytest.approx(0.0046601, abs=5e-8)
    assert schedule.betas[[0, 999]] == pytest.approx([0.00085, 0.012])


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
def test_buffers_are_finite_and_the_posterior_obeys_bayes(kind):
    schedule = make_schedule(kind=kind, num_timesteps=100)
    buffers = schedule.buffers()
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
    np.testing.assert_allclose(make_schedule(kind="cosine").alphas_cumprod[:900], curve, rtol=1e-9)


def test_q_sample_is_per_sample_and_has_the_right_variance():
    schedule = make_schedule()
    timestep = torch.tensor([0, 999])
    latent = torch.full((2, 4, 64, 64), 3.0)
    noised = q_sample(latent, timestep, torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)), schedule)
    for index, t in enumerate(timestep.tolist()):
        alpha = schedule.alphas_cumprod[t]
        assert noised[index].mean().item() == pytest.approx(3 * alpha**0.5, abs=0.03)
        assert noised[index].var().item() == pytest.approx(1 - alpha, rel=0.05)


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v"])
def test_every_prediction_type_gives_back_noise_and_latent(kind):
    schedule = make_schedule()
    generator = torch.Generator().manual_seed(1)
    latent, noise = (torch.randn(4, 2, 3, 5, generator=generator) for _ in range(2))
    timestep = torch.tensor([0, 10, 500, 999])
    noisy = q_sample(latent, timestep, noise, schedule)
    prediction = {"epsilon": noise, "x0": latent, "v": velocity(latent, noise, timestep, schedule)}[kind]
    torch.testing.assert_close(to_epsilon(prediction, noisy, timestep, schedule, kind), noise, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(to_x0(prediction, noisy, timestep, schedule, kind), latent, atol=1e-4, rtol=1e-4)


def test_first_use_in_inference_mode_leaves_training_possible():
    schedule = make_schedule()
    timestep = torch.tensor([5])
    latent = torch.ones(1, 1, 2, 2)
    with torch.inference_mode():
        to_x0(latent, latent, timestep, schedule, "v")
    prediction = latent.clone().requires_grad_()
    to_x0(prediction, latent, timestep, schedule, "v").sum().backward()
    assert prediction.grad is not None


@pytest.mark.parametrize("arguments", [{"kind": "sqrt"}, {"num_timesteps": 0}, {"end": 1.5}, {"start": 0}])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="make_schedule"):
        make_schedule(**arguments)


@pytest.mark.parametrize("timestep", [[-1, 0], [0, 1000], [3]])
def test_bad_timesteps_are_refused(timestep):
    latent = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="timestep"):
        q_sample(latent, torch.tensor(timestep), latent, make_schedule())
