"""Samplers against closed forms and a second implementation; noise and guidance against their promises."""

import pytest
import torch
from denoisers import DEVIATION, MEAN, STABLE, flow_of_gaussian, gaussian_denoiser, wavy, wavy_denoiser

from ldm.diffusion.path import DiscretePath, FlowPath
from ldm.diffusion.prediction import target_of
from ldm.diffusion.spacing import spaced_timesteps
from ldm.sampling.guidance import guide, join_branches, make_denoiser
from ldm.sampling.noise import SampleNoise, sample_noise, sample_seed
from ldm.sampling.samplers import SAMPLERS, sample


def ddim_timesteps(num_steps):
    return spaced_timesteps(num_steps, STABLE.alphas_cumprod)


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


@pytest.mark.parametrize("path", [STABLE, FlowPath(3.0)], ids=["discrete", "flow"])
@pytest.mark.parametrize("num_steps", [2, 9, 50])
def test_ddim_is_exact_for_a_point(num_steps, path):
    # With a single possible latent the probability flow is a straight line, which any number of steps follows exactly.
    levels = path.levels(num_steps)
    noise = sample_noise((2, 4, 4), [0, 1])
    result = sample(gaussian_denoiser(deviation=0.0), noise, levels)
    last, first = levels[-1], levels[0]
    expected = last.signal * MEAN + last.noise / first.noise * (noise - first.signal * MEAN)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", [STABLE, FlowPath(3.0)], ids=["discrete", "flow"])
def test_ddim_follows_the_probability_flow_of_a_gaussian(path):
    levels, noise = path.levels(999), sample_noise((1, 8, 8), [0, 1, 2])
    result, expected = sample(gaussian_denoiser(), noise, levels), flow_of_gaussian(noise, levels[0], levels[-1])
    torch.testing.assert_close(result, expected, atol=0.01, rtol=0.01)
    coarse = sample(gaussian_denoiser(), noise, path.levels(10))
    assert (coarse - expected).abs().mean() > 4 * (result - expected).abs().mean()


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("path", [STABLE, FlowPath()], ids=["discrete", "flow"])
def test_random_steps_keep_the_distribution_and_each_samples_own_noise(path, solver):
    shape, levels = (1, 48, 48), path.levels(250, end="clean")

    def run(seeds):
        draw = SampleNoise(seeds)
        return sample(gaussian_denoiser(), draw(shape), levels, solver, float(solver == "ddim"), draw)

    result = run([3, 4])
    assert result.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert result.std().item() == pytest.approx(DEVIATION, rel=0.05)
    torch.testing.assert_close(run([4])[0], result[1])


@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("path", [STABLE, FlowPath(3.0)], ids=["discrete", "flow"])
def test_prediction_types_agree(path, solver):
    """A network that predicts anything else of the same clean latent leads every sampler to the same place."""
    levels = path.levels(12, "trailing", "clean")
    expected = sample(gaussian_denoiser(), sample_noise((1, 4, 4), [7]), levels, solver, draw=SampleNoise([7]))
    for kind in path.predictions:
        def predict(x, level, kind=kind):
            clean = gaussian_denoiser()(x, level)
            return target_of(kind, clean, (x - level.signal * clean) / level.noise, level.signal, level.noise)

        noise, draw = sample_noise((1, 4, 4), [7]), SampleNoise([7])
        found = sample(make_denoiser(predict, kind), noise, levels, solver, draw=draw)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_ddim_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    other.set_timesteps(50)
    expected = noise = sample_noise((4, 8, 8), [5])
    for timestep in other.timesteps:
        expected = other.step(wavy(expected, timestep[None]), timestep, expected).prev_sample
    assert other.timesteps.tolist() == ddim_timesteps(50)[::-1]
    actual = sample(wavy_denoiser(), noise, STABLE.levels(50))
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_ddim_on_a_flow_is_euler():
    """x + (s' - s) v by hand in float64, and diffusers' scheduler of SD3 on the grid of its pipelines."""
    levels, noise = FlowPath(3.0).levels(7), sample_noise((4, 8, 8), [5]).double()
    denoise, expected = wavy_denoiser("velocity"), noise
    for here, there in zip(levels, levels[1:], strict=False):
        expected = expected + (there.noise - here.noise) * wavy(expected, torch.tensor([here.time]))
    actual = sample(denoise, noise, levels)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    other.set_timesteps(sigmas=torch.linspace(1, 0.001, 7).tolist())
    assert other.timesteps.tolist() == pytest.approx([level.time for level in levels[:-1]], rel=1e-5)
    theirs = noise.float()
    for timestep in other.timesteps:
        theirs = other.step(wavy(theirs, timestep[None]), timestep, theirs).prev_sample
    torch.testing.assert_close(actual.float(), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"levels": []}, "falling noise"), ({"levels": STABLE.levels(3)[::-1]}, "falling noise"),
     ({"eta": 0.5}, "draw is missing"), ({"solver": "ddpm"}, "draw is missing"), ({"eta": 1.5}, "eta is 1.5")],
)  # fmt: skip
def test_samplers_refuse_what_is_not_possible(change, message):
    with pytest.raises(ValueError, match=message):
        sample(gaussian_denoiser(), torch.zeros(1, 1, 2, 2), **{"levels": STABLE.levels(3), **change})
    for timesteps in ([], [21, 1], [0, 21], [1, 1000]):
        with pytest.raises(ValueError, match="ascending"):
            DiscretePath().levels_at(timesteps)


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
    calls, level = [], STABLE.level(300)

    def predict(latent, timestep, context, hint):
        calls.append(len(latent))
        return latent * context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) + hint + timestep.reshape(-1, 1, 1, 1)

    latent, timestep = sample_noise((1, 2, 2), [0, 1]), torch.tensor([300, 300])
    given = {"context": torch.rand(2, 3, 4), "hint": torch.rand(2, 1, 2, 2)}
    null = {"context": torch.zeros(2, 3, 4), "hint": torch.zeros(2, 1, 2, 2)}
    with_, without = predict(latent, timestep, **given), predict(latent, timestep, **null)
    calls.clear()
    both = join_branches([null, given])
    guided = guide(lambda x, time, _: predict(x, time, **both), [9.0])
    torch.testing.assert_close(guided(latent, level), without + 9 * (with_ - without))
    assert calls == [4]


@pytest.mark.parametrize("null", [{}, {"context": torch.zeros(1, 3, 4)}])
def test_guidance_refuses_conditions_that_do_not_match(null):
    with pytest.raises(ValueError, match="join_branches"):
        join_branches([null, {"context": torch.zeros(2, 3, 4)}])
