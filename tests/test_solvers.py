"""Multistep solvers against diffusers and a closed form; guidance; settings and their flags."""

import argparse
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from denoisers import STABLE, flow_of_gaussian, gaussian_denoiser, wavy, wavy_denoiser

from ldm.diffusion.path import FlowPath, Level
from ldm.diffusion.spacing import FROM_ZERO, SPACINGS, spaced_timesteps
from ldm.sampling.guidance import guide
from ldm.sampling.modes import METHOD_SETTINGS, MODES, Sampling, add_sampling_flags, choose_sampling, make_sampling
from ldm.sampling.noise import sample_noise
from ldm.sampling.samplers import sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v"])
@pytest.mark.parametrize("end", ["clean", "first"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_equal_diffusers(name, num_steps, end, prediction_type, record_property):
    diffusers = pytest.importorskip("diffusers")
    is_unipc = name.startswith("UniPC")
    other = getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        final_sigmas_type={"clean": "zero", "first": "sigma_min"}[end],
        prediction_type={"v": "v_prediction"}.get(prediction_type, prediction_type),
        **({} if is_unipc else {"euler_at_final": True}),
    )  # fmt: skip
    other.set_timesteps(num_steps)
    noise, levels = sample_noise((4, 8, 8), [5]), STABLE.levels(num_steps, "trailing", end)
    assert other.timesteps.tolist() == [level.time for level in levels[:-1]]
    expected = noise
    for timestep in other.timesteps:
        expected = other.step(wavy(expected, timestep[None]), timestep, expected).prev_sample
    actual = sample(wavy_denoiser(prediction_type), noise, levels, "unipc" if is_unipc else "dpmpp_2m")
    record_property("difference", float((actual - expected).abs().max()))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [2, 3, 20])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_on_a_flow_equal_diffusers(name, num_steps):
    """On the levels that diffusers takes, which begin a little below pure noise."""
    diffusers = pytest.importorskip("diffusers")
    is_unipc = name.startswith("UniPC")
    other = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0,
                                     **({} if is_unipc else {"euler_at_final": True}))  # fmt: skip
    other.set_timesteps(num_steps)
    levels = [Level(float(t), 1 - s, s, s) for t, s in zip([*other.timesteps, 0], other.sigmas.tolist(), strict=True)]
    expected = noise = sample_noise((4, 8, 8), [5])
    for timestep in other.timesteps:
        expected = other.step(wavy(expected, timestep[None]), timestep, expected).prev_sample
    actual = sample(wavy_denoiser("velocity"), noise, levels, "unipc" if is_unipc else "dpmpp_2m")
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("strength", [0.01, 0.4, 0.99])
def test_starting_from_an_image_equals_diffusers(strength):
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                    clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    other.set_timesteps(50)
    count = max(int(50 * strength + 0.5), 1)  # as its image-to-image pipelines do, but never nothing
    noise, start = sample_noise((4, 8, 8), [5, 6]), sample_noise((4, 8, 8), [7, 8])
    expected = other.add_noise(start, noise, other.timesteps[-count:][:1])
    for timestep in other.timesteps[-count:]:
        expected = other.step(wavy(expected, timestep[None]), timestep, expected).prev_sample
    levels = STABLE.levels(50, strength=strength)
    torch.testing.assert_close(sample(wavy_denoiser(), noise, levels, start=start), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "unipc", "dpmpp_2m", "ddpm"])
def test_a_weak_start_stays_near_its_image(solver):
    """A network that knows nothing of the start is asked little; one that always says `start` finds it again."""
    noise, start = sample_noise((1, 8, 8), [0, 1]), sample_noise((1, 8, 8), [2, 3])
    visited = []

    def denoise(x, level):
        visited.append(level.time)
        return start

    draw = lambda shape: torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))  # noqa: E731
    result = sample(denoise, noise, STABLE.levels(20, "trailing", "clean", 0.3), solver, draw=draw, start=start)
    torch.testing.assert_close(result, start, atol=1e-4, rtol=1e-4)
    assert visited == [299, 249, 199, 149, 99, 49]


@pytest.mark.parametrize("path", [STABLE, FlowPath()], ids=["discrete", "flow"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_order_two_on_a_gaussian(solver, path):
    """Where DDIM's error halves with twice the steps, theirs falls to a quarter; and 20 steps beat 50 of DDIM."""
    noise = sample_noise((1, 8, 8), [0, 1, 2])

    def error(solver, num_steps):
        # From the last level but one on a flow, whose end both solvers reach in a step of order one.
        levels = path.levels(num_steps, "uniform_lambda") if path is STABLE else path.levels(num_steps, "trailing")[:-1]
        expected = flow_of_gaussian(noise, levels[0], levels[-1])
        return float((sample(gaussian_denoiser(), noise, levels, solver) - expected).abs().mean())

    assert 1.6 < error("ddim", 10) / error("ddim", 20) < 2.6
    assert error(solver, 10) / error(solver, 20) > 3
    assert error(solver, 20) < 0.5 * error("ddim", 50)


def test_spacings():
    alphas = STABLE.alphas_cumprod
    assert spaced_timesteps(20, alphas) == list(range(1, 1000, 50))
    assert spaced_timesteps(4, alphas, "trailing") == [249, 499, 749, 999]
    for spacing in SPACINGS:
        for num_steps in (1, 2, 7, 20, 333, 999):
            timesteps = spaced_timesteps(num_steps, alphas, spacing)
            assert len(timesteps) == num_steps and timesteps == sorted(set(timesteps))
            assert timesteps[0] >= (spacing not in FROM_ZERO) and timesteps[-1] <= 999
    chosen = alphas[spaced_timesteps(10, alphas, "uniform_lambda")]
    gaps = np.diff(np.log(chosen / (1 - chosen)))
    assert gaps.std() < 0.1 * abs(gaps.mean())
    with pytest.raises(ValueError, match="not possible"):
        spaced_timesteps(1000, alphas, "trailing")
    with pytest.raises(ValueError, match="'karras' is unknown"):
        spaced_timesteps(20, alphas, "karras")


class Branches:
    """Answers of known branches: branch i of a sample gives factor i times the latent. Notes what it was asked."""

    def __init__(self, *factors):
        self.factors, self.counts = torch.tensor(factors), []

    def __call__(self, latent, timestep, count):
        self.counts.append(count)
        assert len(latent) == len(timestep) and len(latent) % count == 0
        return latent * self.factors[-count:].repeat_interleave(len(latent) // count).reshape(-1, 1, 1, 1)


def test_every_scale_moves_by_what_its_condition_changes():
    latent, level = sample_noise((1, 2, 2), [0, 1]), STABLE.level(400)
    predict = Branches(2.0, 5.0, 4.0, 7.0)  # without prompt, without mask, without reference, with all
    expected = 7 + (9 - 1) * (7 - 2) + (3 - 1) * (7 - 5) + (0.5 - 1) * (7 - 4)
    torch.testing.assert_close(guide(predict, [9.0, 3.0, 0.5])(latent, level), expected * latent)
    torch.testing.assert_close(guide(predict, [])(latent, level), 7 * latent)
    assert predict.counts == [4, 1]


def test_guidance_is_left_out_outside_its_interval():
    latent, predict = sample_noise((1, 2, 2), [0]), Branches(1.0, 2.0)
    denoise = guide(predict, [3.0], interval=(0.2, 0.6))
    for timestep, factor in ((199, 2.0), (200, 4.0), (600, 4.0), (601, 2.0)):
        torch.testing.assert_close(denoise(latent, STABLE.level(timestep)), factor * latent)
    assert predict.counts == [1, 2, 2, 1]
    for interval in ((0.6, 0.2), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match="guidance interval"):
            guide(predict, [3.0], interval=interval)


def test_rescaled_guidance_has_the_spread_of_the_conditional_answer():
    latent, level = sample_noise((3, 8, 8), [0, 1]), STABLE.level(5)

    def predict(latent, _, count):
        return torch.cat([latent.flip(1) if i < count - 1 else latent for i, latent in enumerate(latent.chunk(count))])

    full, plain = guide(predict, [])(latent, level), guide(predict, [9.0])(latent, level)
    rescaled = guide(predict, [9.0], rescale=1.0)(latent, level)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), full.std((1, 2, 3)))
    torch.testing.assert_close(guide(predict, [9.0], rescale=0.3)(latent, level), 0.3 * rescaled + 0.7 * plain)


def test_flags_start_from_a_mode_and_each_changes_its_field():
    def choose(*flags, **own):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_sampling_flags(parser.add_argument_group("sampling"))
        return choose_sampling(parser.parse_args([str(flag) for flag in flags]), Sampling(guidance_scale=4.0, **own))

    assert choose("--mode", "exact") == Sampling(guidance_scale=4.0)
    assert choose() == replace(MODES["fast"], guidance_scale=4.0) == choose("--mode", "fast")
    assert choose("--scale", 2) == replace(MODES["fast"], guidance_scale=2)
    # upstream's flags mean upstream's walk, and a model's own walk stays
    assert choose("--ddim_steps", 50, "--ddim_eta", 0) == Sampling(guidance_scale=4.0)
    assert choose(num_steps=30) == Sampling(guidance_scale=4.0, num_steps=30)
    assert MODES["exact"].to_dict().items() >= {"solver": "ddim", "num_steps": 50, "eta": 0.0, "end": "first"}.items()
    turbo = choose("--mode", "turbo", "--no-share_control", "--num_steps", 9)
    assert (turbo.solver, turbo.num_steps, turbo.method["share_control"]) == (MODES["turbo"].solver, 9, False)
    assert turbo.method["reuse_every"] == MODES["turbo"].method["reuse_every"] > 1
    changes = {
        "solver": ["--solver", "unipc"], "num_steps": ["--ddim_steps", 7], "eta": ["--ddim_eta", 0.5],
        "spacing": ["--spacing", "trailing"], "end": ["--end", "clean", "--solver", "dpmpp_2m"],
        "guidance_scale": ["--scale", 1], "hint_scale": ["--hint_scale", 2],
        "reference_scale": ["--reference_scale", 2],
        "guidance_interval": ["--guidance_interval", 0.1, 0.7], "guidance_rescale": ["--guidance_rescale", 0.7],
        "share_control": ["--share_control"], "reuse_every": ["--reuse_every", 3], "strength": ["--strength", 0.5],
        "recolour_start": ["--recolour_start", "--strength", 0.5],
    }  # fmt: skip
    assert set(changes) == {field.name for field in fields(Sampling)} - {"method", "rectify"} | set(METHOD_SETTINGS)
    plain = choose("--mode", "exact").to_dict()
    for name, flags in changes.items():
        assert choose("--mode", "exact", *flags).to_dict()[name] != plain.get(name), name


@pytest.mark.parametrize(
    "change",
    [{"solver": "plms"}, {"num_steps": 0}, {"eta": 1.5}, {"solver": "unipc", "eta": 0.5},
     {"solver": "ddpm", "end": "first"}, {"spacing": "uniform", "end": "first"}, {"spacing": "karras"},
     {"guidance_scale": 0}, {"guidance_interval": (0.7, 0.1)}, {"guidance_rescale": 2}, {"strength": 0},
     {"strength": 1.1}, {"recolour_start": True}],
)  # fmt: skip
def test_impossible_settings_are_named(change):
    with pytest.raises(ValueError, match=rf"sampling: {list(change)[-1]} is"):
        Sampling(**change)


def test_records_of_settings_are_flat_as_they_always_were():
    changed = make_sampling(MODES["exact"], {"reuse_every": 3, "eta": 0.5, "guidance_interval": [0.1, 0.7]})
    assert changed == Sampling(eta=0.5, guidance_interval=(0.1, 0.7), method={"reuse_every": 3})
    record = changed.to_dict()
    assert {name: record[name] for name in METHOD_SETTINGS} == {**METHOD_SETTINGS, "reuse_every": 3}
    assert "method" not in record and "strength" not in record
