"""SDM: the network at its beginning, its hybrid loss, learned variances and respaced sampling."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from denoisers import LINEAR, STABLE, of_time
from pixel import make
from torch import Tensor

from cldm.spade import SpadeNorm
from ldm.diffusion.objective import learned_log_variance, variational_bound
from ldm.diffusion.spacing import SPACINGS, spaced_timesteps
from ldm.sampling.guidance import guide, make_denoiser
from ldm.sampling.noise import SampleNoise, sample_noise
from ldm.sampling.samplers import posterior, sample


def noised(image: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    signal, factor = LINEAR.factors(timestep, image)
    return signal * image + factor * noise


def test_the_network_begins_at_zero():
    torch.manual_seed(0)
    method = make("sdm_tiny", std=None)
    batch = {"image": torch.rand(16, 3, 16, 16) * 2 - 1, "mask": torch.randint(0, 5, (16, 16, 16))}
    out = method.predict_noise(batch["image"], torch.arange(16), **method.conditions(batch))
    assert out.shape == (16, 6, 16, 16) and not out.any()
    loss, parts = method.training_loss(batch)
    assert 0.9 < parts["mse"] < 1.1
    torch.testing.assert_close(loss.detach(), parts["mse"] + parts["vb"])
    loss.backward()
    assert all(p.grad is not None for p in method.trainable_groups()["unet"])


def test_only_middle_and_decoder_see_the_mask():
    method = make("sdm_tiny")
    unet, seen = method.model.diffusion_model, []
    spades = [name for name, module in unet.named_modules() if isinstance(module, SpadeNorm)]
    assert spades and not [name for name in spades if name.startswith("input_blocks")]
    for name in spades:
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    latent, timestep = torch.randn(2, 3, 8, 12), torch.tensor([5, 700])
    hint = torch.rand(2, method.hint_channels, 8, 12)
    first = method.predict_noise(latent, timestep, hint)
    assert sorted(seen) == sorted(spades)
    assert (first - method.predict_noise(latent, timestep, hint.flip(3))).abs().max() > 1e-3
    norm = SpadeNorm(8, 3, hidden=4)
    h, hint = torch.randn(2, 8, 4, 4), torch.rand(2, 3, 8, 8)
    shared = F.relu(norm.mlp_shared[0](hint[:, :, ::2, ::2]))  # nearest
    expected = F.group_norm(h, norm.norm.num_groups) * (1 + norm.mlp_gamma(shared)) + norm.mlp_beta(shared)
    torch.testing.assert_close(norm(h, hint), expected)


@pytest.mark.parametrize("num_steps", [2, 4, 25, 300])
def test_respacing_keeps_the_noise_levels(num_steps: int):
    """Any levels make a process whose own betas multiply up to them; all of them make the process itself."""
    for spacing in SPACINGS:
        levels = LINEAR.levels(num_steps, spacing, "clean")
        betas = [posterior(here, there)[0] for here, there in zip(levels, levels[1:], strict=False)]
        timesteps = spaced_timesteps(num_steps, LINEAR.alphas_cumprod, spacing)
        np.testing.assert_allclose(np.cumprod(1 - np.array(betas[::-1])), LINEAR.alphas_cumprod[timesteps], rtol=1e-10)
    levels = LINEAR.levels(1000, "uniform", "clean")[::-1]  # clean, 0, 1, ...
    found = np.array([posterior(here, there) for there, here in zip(levels, levels[1:], strict=False)])
    np.testing.assert_allclose(found[:, 0], LINEAR.betas, rtol=1e-8)
    np.testing.assert_allclose(found[:, 1], LINEAR.vectors()["posterior_variance"], rtol=1e-5, atol=1e-12)
    assert spaced_timesteps(4, LINEAR.alphas_cumprod, "uniform") == [0, 333, 666, 999]
    expected = [round(i * 999 / 299) for i in range(300)]  # no two are equal
    assert spaced_timesteps(300, LINEAR.alphas_cumprod, "uniform") == expected


def log_variance(value: float, timestep: Tensor) -> Tensor:
    values = torch.full((len(timestep), 1, 1, 1), value)
    ends = (LINEAR.gather(name, timestep, values) for name in ("log_least_variance", "log_betas"))
    return learned_log_variance(values, *ends).flatten()


def test_learned_variance_lies_between_the_posterior_and_beta():
    timestep = torch.tensor([1, 500, 999])
    for value, name in ((-1.0, "posterior_variance"), (1.0, "betas")):
        found = log_variance(value, timestep).exp()
        torch.testing.assert_close(found, LINEAR.vectors()[name][timestep])
    # Timestep 0 has no posterior variance: that of timestep 1 stands for it.
    least = log_variance(-1.0, torch.tensor([0])).item()
    assert least == pytest.approx(math.log(LINEAR.vectors()["posterior_variance"][1]), rel=1e-5)


def test_variational_bound_of_one_number():
    """KL of two normals, and at timestep 0 the mass in the bin of a level, both worked out for one pixel."""
    image, noise, timestep = torch.tensor([[[[25 / 127.5 - 1]]]]), torch.tensor([[[[0.7]]]]), torch.tensor([400])
    noisy = noised(image, timestep, noise)
    epsilon, value = torch.tensor([[[[0.4]]]]), torch.tensor([[[[0.3]]]])
    abar, before, beta = LINEAR.alphas_cumprod[400], LINEAR.alphas_cumprod[399], LINEAR.betas[400]
    least = beta * (1 - before) / (1 - abar)
    variance = math.exp(0.65 * math.log(beta) + 0.35 * math.log(least))
    clean = (noisy.item() - (1 - abar) ** 0.5 * 0.4) / abar**0.5
    gap = before**0.5 * beta / (1 - abar) * (image.item() - clean)
    expected = 0.5 * (math.log(variance / least) - 1 + least / variance + gap**2 / variance) / math.log(2)
    found = variational_bound(epsilon, value, image, noisy, timestep, LINEAR).item()
    assert found == pytest.approx(expected, rel=1e-3)

    timestep = torch.tensor([0])
    for level in (0, 25, 255):
        image = torch.tensor([[[[level / 127.5 - 1]]]])
        noisy = noised(image, timestep, noise)
        clean = (noisy.item() - 0.01 * 0.4) / (1 - 1e-4) ** 0.5
        deviation = math.exp(0.5 * (0.65 * math.log(1e-4) + 0.35 * math.log(LINEAR.vectors()["posterior_variance"][1])))
        mass = lambda x, clean=clean, deviation=deviation: 0.5 * math.erfc((clean - x) / deviation / 2**0.5)  # noqa: E731
        upper = 1.0 if level == 255 else mass(image.item() + 1 / 255)
        lower = 0.0 if level == 0 else mass(image.item() - 1 / 255)
        found = variational_bound(epsilon, value, image, noisy, timestep, LINEAR).item()
        assert found == pytest.approx(-math.log2(upper - lower), rel=2e-3, abs=1e-4)


def test_the_bound_teaches_nothing_but_the_variance():
    epsilon, values = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    image, timestep = torch.zeros(2, 3, 4, 4), torch.tensor([0, 600])
    noisy = noised(image, timestep, torch.randn_like(image))
    variational_bound(epsilon, values, image, noisy, timestep, LINEAR).sum().backward()
    assert epsilon.grad is None and values.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("num_steps", [1, 4, 30])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_who_knows_the_image_finds_it(spacing: str, num_steps: int):
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1

    def oracle(latent: Tensor, timestep: Tensor) -> Tensor:
        abar = torch.from_numpy(LINEAR.alphas_cumprod)[timestep].float().reshape(-1, 1, 1, 1)
        return (latent - abar.sqrt() * image) / (1 - abar).sqrt()

    denoise, levels = make_denoiser(of_time(oracle), "epsilon"), LINEAR.levels(num_steps, spacing, "clean")
    for solver in ("ddim", "ddpm"):
        found = sample(denoise, sample_noise((3, 4, 4), [0, 1]), levels, solver, draw=SampleNoise([0, 1]))
        torch.testing.assert_close(found, image, atol=1e-3, rtol=1e-3)


def test_guidance_leaves_the_learned_variance_alone():
    null, full = torch.randn(2, 6, 2, 2), torch.randn(2, 6, 2, 2)
    latent, level = torch.randn(2, 3, 2, 2), LINEAR.level(9)
    guided = guide(lambda *_: torch.cat([null, full]), [1.5])
    prediction = guided(latent, level)
    torch.testing.assert_close(prediction[:, :3], null[:, :3] + 1.5 * (full[:, :3] - null[:, :3]))
    assert torch.equal(prediction[:, 3:], full[:, 3:])
    assert make_denoiser(guided, "epsilon")(latent, level).shape == latent.shape
    assert torch.equal(make_denoiser(guided, "epsilon", 1.0, True)(latent, level)[:, 3:], full[:, 3:])


def test_infinities_do_not_become_white():
    denoise = make_denoiser(lambda x, _: x * torch.inf, "epsilon", 1.0)
    assert sample(denoise, torch.ones(1, 3, 2, 2), STABLE.levels(2)).isnan().all()
