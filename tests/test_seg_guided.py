"""Segmentation-guided diffusion against diffusers: the network, its weights, and both ways of sampling."""

from pathlib import Path

import pytest
import torch
from denoisers import LINEAR, of_time
from pixel import make

from ldm.sampling.guidance import make_denoiser
from ldm.sampling.modes import Sampling
from ldm.sampling.noise import sample_noise
from ldm.sampling.samplers import sample
from ldm.weights.checkpoint import open_checkpoint, save_safetensors
from ldm.weights.load import load_method, read_model_config
from scripts import convert_checkpoint

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("old_names", [False, True])
@torch.no_grad()
def test_weights_of_diffusers_give_its_outputs(old_names: bool, tmp_path: Path):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=32, in_channels=4, out_channels=3, layers_per_block=2, block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")).eval()  # fmt: skip
    for parameter in theirs.parameters():  # as after training: norms that scale, attention that matters
        parameter += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "weights/unet")
    if old_names:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        weights = {}
        for name, value in theirs.state_dict().items():
            for new, before in old.items():
                name = name.replace(f".{new}.", f".{before}.")
            weights[name] = value
        save_safetensors(tmp_path / "weights/unet/diffusion_pytorch_model.safetensors", weights)
    convert_checkpoint.main([str(tmp_path / "weights"), str(tmp_path / "ours.safetensors"), "--class_table", "mini"])
    ours = load_method(tmp_path / "ours.safetensors", read_model_config(tmp_path / "ours.safetensors"), "cpu")
    assert ours.hint_mode == "single255" and len(open_checkpoint(tmp_path / "weights").tensors) == len(
        theirs.state_dict())  # fmt: skip
    for height, width in ((32, 32), (16, 48)):
        latent, timestep = torch.randn(2, 3, height, width), torch.tensor([3, 981])
        mask = torch.randint(0, 5, (2, height, width))
        hint = ours.conditions({"mask": mask})["hint"]
        expected = theirs(torch.cat([latent, mask[:, None] / 255], 1), timestep).sample
        found = ours.predict_noise(latent, timestep, hint)
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def network(latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """No model of anything, but smooth, and so far off that clipping matters."""
    return torch.tanh(2 * latent) * torch.cos(timestep.reshape(-1, 1, 1, 1) / 300)


@pytest.mark.parametrize("num_steps", [4, 50])
def test_ddim_is_that_of_diffusers(num_steps: int):
    """With use_clipped_model_output, which its pipeline leaves off: the noise that goes with the clipped image."""
    other = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02)  # clips, ends at 1, leading spacing
    other.set_timesteps(num_steps)
    levels = LINEAR.levels(num_steps, "leading0", "clean")
    assert other.timesteps.tolist() == [level.time for level in levels[:-1]]
    noise = expected = sample_noise((3, 8, 8), [5])
    for timestep in other.timesteps:
        answer = network(expected, timestep[None])
        expected = other.step(answer, timestep, expected, use_clipped_model_output=True).prev_sample
    found = sample(make_denoiser(of_time(network), "epsilon", 1.0), noise, levels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("num_steps", [4, 1000])
def test_ddpm_is_that_of_diffusers(num_steps: int, is_learned: bool, monkeypatch: pytest.MonkeyPatch):
    kind = "learned_range" if is_learned else "fixed_small"
    other = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type=kind)
    other.set_timesteps(num_steps)
    noises = iter(torch.randn(num_steps, 1, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    kept = list(torch.randn(num_steps, 1, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noises))

    def both(latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        answer = network(latent, timestep)
        return torch.cat([answer, torch.sin(latent)], 1) if is_learned else answer

    start = expected = sample_noise((3, 4, 4), [5])
    for timestep in other.timesteps:
        expected = other.step(both(expected, timestep[None]), timestep, expected).prev_sample
    drawn = iter(kept)
    denoise, levels = make_denoiser(of_time(both), "epsilon", 1.0, True), LINEAR.levels(num_steps, "leading0", "clean")
    found = sample(denoise, start, levels, "ddpm", draw=lambda shape: next(drawn))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert len(list(drawn)) == 1  # the last step adds no noise


def test_the_default_has_the_timesteps_and_the_end_of_the_published_sampler():
    """Not its way of clipping: diffusers' pipeline keeps the noise of the unclipped image (see docs/methods.md)."""
    assert make("seg_guided_tiny").own_sampling == Sampling(
        "ddim", 50, spacing="leading0", end="clean", guidance_scale=1.0)  # fmt: skip
