"""Samplers against closed forms and a second implementation; noise and guidance against their promises."""

import pytest
import torch

from ldm.diffusion.schedule import make_schedule, velocity
from ldm.sampling.ddim import ddim_sample, ddim_timesteps
from ldm.sampling.guidance import with_guidance
from ldm.sampling.noise import SampleNoise, sample_noise, sample_seed

MEAN, DEVIATION = 1.5, 0.4


def gaussian_denoiser(schedule, deviation=DEVIATION):
    """Exact noise prediction when the data are N(MEAN, deviation^2)."""

    def denoise(latent, timestep):
        alpha = torch.from_numpy(schedule.alphas_cumprod)[timestep].float().reshape(-1, 1, 1, 1)
        return (1 - alpha).sqrt() * (latent - alpha.sqrt() * MEAN) / (alpha * deviation**2 + 1 - alpha)

    return denoise


def test_timesteps_are_upstreams():
    assert ddim_timesteps(50) == list(range(1, 1000, 20))
    assert ddim_timesteps(1) == [1]


@pytest.mark.parametrize("num_steps", [1, 7, 30, 333, 999])
def test_there_are_as_many_timesteps_as_asked_for(num_steps):
    timesteps = ddim_timesteps(num_steps)
    assert len(set(timesteps)) == num_steps and timesteps == sorted(timesteps)
    assert timesteps[0] == 1 and timesteps[-1] <= 999


@pytest.mark.parametrize("num_steps", [-3, 0, 1000, 5000])
def test_impossible_counts_are_refused(num_steps):
    with pytest.raises(ValueError, match="not possible"):
        ddim_timesteps(num_steps)


@pytest.mark.parametrize("num_steps", [2, 9, 50])
def test_ddim_is_exact_for_a_point(num_steps):
    # With a single possible latent the probability flow is a straight line, which any number of steps follows exactly.
    schedule = make_schedule()
    timesteps = ddim_timesteps(num_steps)
    noise = sample_noise((2, 4, 4), [0, 1])
    result = ddim_sample(gaussian_denoiser(schedule, deviation=0.0), noise, timesteps, schedule)
    first, last = schedule.alphas_cumprod[0], schedule.alphas_cumprod[timesteps[-1]]
    expected = first**0.5 * MEAN + ((1 - first) / (1 - last)) ** 0.5 * (noise - last**0.5 * MEAN)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_ddim_follows_the_probability_flow_of_a_gaussian():
    schedule = make_schedule()
    timesteps = ddim_timesteps(999)
    noise = sample_noise((1, 8, 8), [0, 1, 2])
    result = ddim_sample(gaussian_denoiser(schedule), noise, timesteps, schedule)
    first, last = schedule.alphas_cumprod[0], schedule.alphas_cumprod[timesteps[-1]]
    spread = [(alpha * DEVIATION**2 + 1 - alpha) ** 0.5 for alpha in (first, last)]
    expected = first**0.5 * MEAN + (noise - last**0.5 * MEAN) * spread[0] / spread[1]
    torch.testing.assert_close(result, expected, atol=0.01, rtol=0.01)
    coarse = ddim_sample(gaussian_denoiser(schedule), noise, ddim_timesteps(10), schedule)
    assert (coarse - expected).abs().mean() > 4 * (result - expected).abs().mean()


def test_random_steps_keep_the_distribution_and_each_samples_own_noise():
    schedule = make_schedule()
    shape, timesteps = (1, 48, 48), ddim_timesteps(250)

    def sample(seeds):
        draw = SampleNoise(seeds)
        return ddim_sample(gaussian_denoiser(schedule), draw(shape), timesteps, schedule, eta=1.0, draw=draw)

    result = sample([3, 4])
    assert result.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert result.std().item() == pytest.approx(DEVIATION, rel=0.05)
    torch.testing.assert_close(sample([4])[0], result[1])


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
def test_prediction_types_agree(prediction_type):
    schedule = make_schedule()
    denoise = gaussian_denoiser(schedule)

    def converted(latent, timestep):
        epsilon = denoise(latent, timestep)
        alpha = torch.from_numpy(schedule.alphas_cumprod)[timestep].float().reshape(-1, 1, 1, 1)
        clean = (latent - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        return clean if prediction_type == "x0" else velocity(clean, epsilon, timestep, schedule)

    noise, timesteps = sample_noise((1, 4, 4), [7]), ddim_timesteps(20)
    expected = ddim_sample(denoise, noise, timesteps, schedule)
    actual = ddim_sample(converted, noise, timesteps, schedule, prediction_type=prediction_type)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_ddim_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    other.set_timesteps(50)
    schedule, noise = make_schedule(), sample_noise((4, 8, 8), [5])

    def denoise(latent, timestep):
        return torch.tanh(latent) * torch.cos(timestep.reshape(-1, 1, 1, 1) / 300)

    expected = noise
    for timestep in other.timesteps:
        expected = other.step(denoise(expected, timestep[None]), timestep, expected).prev_sample
    assert other.timesteps.tolist() == ddim_timesteps(50)[::-1]
    actual = ddim_sample(denoise, noise, ddim_timesteps(50), schedule)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"timesteps": [21, 1]}, "ascending"), ({"timesteps": []}, "ascending"), ({"timesteps": [1, 1000]}, "1000"),
     ({"eta": 0.5}, "draw is missing"), ({"eta": 1.5}, "eta is 1.5"), ({"prediction_type": "score"}, "score")],
)  # fmt: skip
def test_ddim_refuses_what_it_cannot_walk(change, message):
    schedule = make_schedule()
    arguments = {"timesteps": [1, 21], "schedule": schedule} | change
    with pytest.raises(ValueError, match=message):
        ddim_sample(gaussian_denoiser(schedule), torch.zeros(1, 1, 2, 2), **arguments)


def test_noise_belongs_to_the_sample():
    batch = sample_noise((4, 3, 5), [11, 12, 13])
    assert batch.shape == (3, 4, 3, 5)
    torch.testing.assert_close(sample_noise((4, 3, 5), [13])[0], batch[2], rtol=0, atol=0)
    assert not torch.equal(batch[0], batch[1])
    numbers = {sample_seed(42, row, copy) for row in range(50) for copy in range(20)}
    assert len(numbers) == 1000 and sample_seed(42, 7, 0) == 49


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (0, -1, 0), (0, 10_000_000, 0), (0, 0, -1), (2**63, 0, 0)])
def test_impossible_seeds_are_refused(arguments):
    with pytest.raises(ValueError, match="sample_seed"):
        sample_seed(*arguments)


def test_guidance_is_the_weighted_sum_of_both_branches_in_one_call():
    calls = []

    def predict(latent, timestep, context, hints):
        calls.append(len(latent))
        return latent * context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) + hints[0] + timestep.reshape(-1, 1, 1, 1)

    latent, timestep = sample_noise((1, 2, 2), [0, 1]), torch.tensor([3, 4])
    given = {"context": torch.rand(2, 3, 4), "hints": [torch.rand(2, 1, 2, 2)]}
    null = {"context": torch.zeros(2, 3, 4), "hints": [torch.zeros(2, 1, 2, 2)]}
    with_, without = predict(latent, timestep, **given), predict(latent, timestep, **null)
    calls.clear()
    expected = without + 9 * (with_ - without)
    torch.testing.assert_close(with_guidance(predict, given, null, 9.0)(latent, timestep), expected)
    torch.testing.assert_close(with_guidance(predict, given, null, 1.0)(latent, timestep), with_)
    torch.testing.assert_close(with_guidance(predict, given, null, 0.0)(latent, timestep), without)
    assert calls == [4, 2, 4]


@pytest.mark.parametrize("null", [{}, {"context": None}, {"context": torch.zeros(1, 3, 4)}])
def test_guidance_refuses_conditions_that_do_not_match(null):
    with pytest.raises(ValueError, match="with_guidance"):
        with_guidance(lambda *_, **__: None, {"context": torch.zeros(2, 3, 4)}, null, 2.0)
