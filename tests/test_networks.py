"""The networks at tiny size: names, shapes, closed forms, couplings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT, model_params, randomize
from torch import Tensor, nn

from cldm.all_in_attention import AllInAttentionBlock, AllInAttentionUNet
from cldm.control import ControlBranch, Features
from cldm.look import pool_statistics
from cldm.tisynth import TISynth
from demo.make import fit_patches
from ldm.modules.attention import CrossAttention
from ldm.modules.autoencoder import AutoencoderKL, DiagonalGaussian, PatchAutoencoder
from ldm.modules.unet import UNet
from ldm.sampling.modes import Sampling
from ldm.util import UserError
from ldm.weights.load import build_skeleton

# The lower level has no transformer, like the 8 x 8 level of SD1.5.
UNET = {"in_channels": 4, "model_channels": 8, "num_res_blocks": 1, "attention_resolutions": [1],
        "channel_mult": [1, 2], "num_heads": 2, "context_dim": 6}  # fmt: skip
COUPLINGS = ("upstream", "residual")


def inputs(height: int = 8, width: int = 12, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, 4, height, width, generator=generator)
    return latent, torch.tensor([3, 700])[:batch], torch.randn(batch, 5, 6, generator=generator)


def random_features(unet: UNet, height: int = 8, width: int = 12) -> Features:
    sizes = [(height, width)] * 2 + [(height // 2, width // 2)] * 3
    maps = [torch.randn(2, c, *size) for c, size in zip(unet.feature_channels, sizes, strict=True)]
    return Features(maps, [torch.randn_like(m) for m in maps])


def test_upstream_config_has_the_published_names_and_shapes():
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/model/tisynth_sd15_upstream.yaml"))
    method = build_skeleton(config)
    lines = (ROOT / "tests/data/tisynth_sd15_keys.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    expected = {key: tuple(int(size) for size in shape.split("x")) for key, shape in rows}
    found = {key: tuple(value.shape) for key, value in method.state_dict().items()}
    assert len(expected) == 1963
    assert found == expected
    assert method.size_factor == 64
    assert sum(p.numel() for p in method.model.diffusion_model.parameters()) == 920_189_764


def test_cross_attention_is_multi_head_attention():
    torch.manual_seed(0)
    layer = CrossAttention(12, 10, heads=3, head_dim=4)
    query, source = torch.randn(2, 7, 12), torch.randn(2, 5, 10)
    expected, _ = F.multi_head_attention_forward(
        query.transpose(0, 1), source.transpose(0, 1), source.transpose(0, 1), 12, 3, None, torch.zeros(36), None, None,
        False, 0.0, layer.to_out[0].weight, layer.to_out[0].bias, use_separate_proj_weight=True,
        q_proj_weight=layer.to_q.weight, k_proj_weight=layer.to_k.weight, v_proj_weight=layer.to_v.weight)  # fmt: skip
    torch.testing.assert_close(layer(query, source), expected.transpose(0, 1))


def naive_attention(layer: CrossAttention, query: Tensor, source: Tensor) -> Tensor:
    heads = []
    split = lambda linear, x: linear(x).chunk(layer.heads, dim=-1)  # noqa: E731
    for q, k, v in zip(split(layer.to_q, query), split(layer.to_k, source), split(layer.to_v, source), strict=True):
        heads.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return layer.to_out(torch.cat(heads, dim=-1))


def test_all_in_attention_order():
    """Reference, mask, itself, text, feed-forward; another order gives other numbers."""
    torch.manual_seed(0)
    block = randomize(AllInAttentionBlock(8, 2, 4, 6, 10, normalise_sources=False, zero_out=False), 0.5)
    x, context = torch.randn(2, 6, 8), torch.randn(2, 5, 6)
    hint, reference = torch.randn(2, 10, 2, 3), torch.randn(2, 10, 2, 3)
    tokens = {"reference": reference.flatten(2).transpose(1, 2), "mask": hint.flatten(2).transpose(1, 2)}

    def naive(order: tuple[str, ...]) -> Tensor:
        h = x
        for step in order:
            if step == "reference":
                h = h + naive_attention(block.attn00_ls_trainable, block.norm00_trainable(h), tokens[step])
            elif step == "mask":
                h = h + naive_attention(block.attn01_ssl_trainable, block.norm01_trainable(h), tokens[step])
            elif step == "self":
                h = h + naive_attention(block.attn1, block.norm1(h), block.norm1(h))
            else:
                h = h + naive_attention(block.attn2, block.norm2(h), context)
        value, gate = block.ff.net[0].proj(block.norm3(h)).chunk(2, dim=-1)
        return h + block.ff.net[2](value * F.gelu(gate))

    result = block(x, context, hint, reference)
    torch.testing.assert_close(result, naive(("reference", "mask", "self", "text")), rtol=1e-4, atol=1e-4)
    assert (result - naive(("mask", "reference", "self", "text"))).abs().max() > 0.01


def test_all_in_attention_closed_form():
    """With zero queries attention is a mean: x + 2 mean(reference) + 5 mean(hint), by the published names."""
    block = AllInAttentionBlock(4, 1, 4, 6, 4, normalise_sources=False, zero_out=False)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    for layer, factor in ((block.attn00_ls_trainable, 2.0), (block.attn01_ssl_trainable, 5.0)):
        nn.init.eye_(layer.to_v.weight)
        layer.to_out[0].weight.data = torch.eye(4) * factor
    x, hint, reference = torch.randn(1, 6, 4), torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2, 3)
    expected = x + 2 * reference.mean((2, 3))[:, None] + 5 * hint.mean((2, 3))[:, None]
    torch.testing.assert_close(block(x, torch.randn(1, 5, 6), hint, reference), expected)


def test_upstream_coupling_drops_levels_without_a_transformer():
    torch.manual_seed(0)
    unet = randomize(AllInAttentionUNet("upstream", **UNET))
    assert unet.attended() == [True, True, False, False, True]
    hint, reference = random_features(unet), random_features(unet)
    before = unet(*inputs(), hint, reference)
    for i, is_used in enumerate(unet.attended()):
        for branch in (0, 1):
            features = [Features(f.raw, list(f.projected)) for f in (hint, reference)]
            features[branch].projected[i] = torch.zeros_like(hint.projected[i])
            assert torch.equal(unet(*inputs(), *features), before) != is_used, (i, branch)
    raw = Features([torch.zeros_like(m) for m in hint.raw], hint.projected)
    assert torch.equal(unet(*inputs(), raw, reference), before)  # upstream never looks at them


def test_residual_coupling_uses_every_feature():
    torch.manual_seed(0)
    unet = randomize(AllInAttentionUNet("residual", **UNET))
    hint, reference = random_features(unet), random_features(unet)
    before = unet(*inputs(), hint, reference)
    for i, is_attended in enumerate(unet.attended()):
        for kind in (("projected", "raw") if is_attended else ("projected",)):
            features = Features(list(hint.raw), list(hint.projected))
            getattr(features, kind)[i] = torch.zeros_like(hint.raw[i])
            assert (unet(*inputs(), features, reference) - before).abs().max() > 1e-5, (i, kind)


def test_residual_coupling_starts_as_the_unet_without_control():
    torch.manual_seed(0)
    unet, plain = AllInAttentionUNet("residual", **UNET), randomize(UNet(**UNET))
    missing = unet.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all("trainable" in name for name in missing)
    branches = [ControlBranch(5, (1, 2, 1), (8,) * 7, **UNET), ControlBranch(4, (1, 1, 1), (8,) * 7, **UNET)]
    latent, timestep, context = inputs()
    hint = branches[0](latent, timestep, context, torch.randn(2, 5, 16, 24))
    reference = branches[1](latent, timestep, context, torch.randn(2, 4, 8, 12))
    assert torch.equal(unet(latent, timestep, context, hint, reference), plain(latent, timestep, context))


def test_control_branch_strides_and_zero_start():
    branch = ControlBranch(3, (2, 2, 2), (8,) * 7, **UNET)
    features = branch(*inputs(), torch.randn(2, 3, 64, 96))
    shapes = [(8, 8, 12), (8, 8, 12), (8, 4, 6), (16, 4, 6), (16, 4, 6)]
    assert [tuple(m.shape[1:]) for m in features.projected] == shapes
    assert [m.shape for m in features.raw] == [m.shape for m in features.projected]
    assert all(not m.any() for m in features.projected) and all(m.any() for m in features.raw)
    assert [m.stride for m in branch.input_hint_block if isinstance(m, nn.Conv2d)] == [
        (1, 1), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1)]  # fmt: skip
    with pytest.raises(ValueError, match=r"hint \(32, 32\) becomes \(4, 4\).*latent is \(8, 12\)"):
        branch(*inputs(), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["tisynth_sd15_upstream", "tisynth_sd15"])
def test_any_size_that_the_factor_divides(name: str):
    torch.manual_seed(0)
    method = randomize(TISynth(**model_params(name, reference_augment=None)), 0.1).eval()
    assert method.size_factor == 4
    for height, width in ((4, 12), (20, 8)):
        noise = torch.randn(1, *method.noise_shape(height, width))
        batch = {"mask": torch.randint(0, 5, (1, height, width)), "prompt": ["a road"],
                 "reference": torch.rand(1, 3, height, width) * 2 - 1}  # fmt: skip
        image = method.sample(batch, noise, Sampling(num_steps=2, guidance_scale=2.0))
        assert image.shape == (1, 3, height, width) and image.isfinite().all()
    for height, width in ((6, 8), (8, 10), (0, 8)):
        with pytest.raises(ValueError, match=rf"image size {height} x {width}: .*multiples of 4"):
            method.noise_shape(height, width)


@pytest.mark.parametrize("name", ["tisynth_sd15_upstream", "tisynth_sd15"])
def test_all_conditions_arrive(name: str):
    torch.manual_seed(0)
    method = randomize(TISynth(**model_params(name, reference_augment=None, sample_reference=False)), 0.4).eval()
    batch = {"mask": torch.zeros(1, 8, 8, dtype=torch.int64), "prompt": ["road"], "reference": torch.zeros(1, 3, 8, 8)}
    others = {"mask": batch["mask"] + 3, "prompt": ["water"], "reference": batch["reference"] + 0.5}
    latent, timestep = torch.randn(1, 4, 4, 4), torch.tensor([500])
    before = method.predict_noise(latent, timestep, **method.conditions(batch))
    for key, value in others.items():
        after = method.predict_noise(latent, timestep, **method.conditions({**batch, key: value}))
        assert (after - before).abs().max() > 1e-5 * before.abs().max(), key


def test_statistics_of_a_latent_are_those_of_numpy():
    latent = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    values = latent.numpy()
    windows = values.reshape(2, 3, 2, 4, 4, 4).mean((3, 5))
    expected = np.concatenate([values.mean((2, 3)), values.std((2, 3)), windows.std((2, 3))], 1)
    np.testing.assert_allclose(pool_statistics(latent), expected, rtol=1e-5)
    moved = latent.flip(2, 3).roll((4, 8), (2, 3))  # places do not count
    torch.testing.assert_close(pool_statistics(moved), pool_statistics(latent))
    assert not pool_statistics(torch.ones(1, 3, 2, 2))[:, 3:].any()  # smaller than a window


def statistics_batch(count: int = 3) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {"mask": torch.randint(0, 5, (count, 8, 8), generator=generator), "prompt": ["road"] * count,
            "reference": torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1}  # fmt: skip


def test_reference_statistics_start_without_effect_and_learn_from_the_first_step():
    torch.manual_seed(0)
    method = TISynth(**model_params("tisynth_mini", reference_dropout=0.0, joint_dropout=0.0)).train()
    statistics = method.reference_statistics
    for name, parameter in randomize(method).named_parameters():  # a trained network, but for the new layer
        if name.startswith("reference_statistics.out"):
            nn.init.zeros_(parameter)
    conditions, latent, timestep = method.conditions(statistics_batch()), torch.randn(3, 4, 4, 4), torch.full((3,), 400)
    look = conditions.pop("look")
    assert look.shape == (3, 3, method.model.diffusion_model.embedding_dim) and not look.any()
    plain = method.predict_noise(latent, timestep, **conditions)
    found = method.predict_noise(latent, timestep, **conditions, look=look)
    assert torch.equal(found, plain)
    found.square().sum().backward()
    assert statistics.out.weight.grad.abs().amin(1).gt(0).float().mean() > 0.9  # all three networks, from step 1
    trained = {id(p) for p in method.trainable_groups()["reference"]}
    assert {id(p) for p in statistics.parameters()} <= trained
    moved = [torch.zeros_like(look) for _ in range(3)]
    for network in range(3):  # U-Net, mask branch, reference branch
        moved[network][:, network] = 1.0
        assert (method.predict_noise(latent, timestep, **conditions, look=moved[network]) - plain).abs().max() > 1e-4


def test_dropped_references_have_no_statistics():
    method = randomize(TISynth(**model_params("tisynth_mini", reference_dropout=0.5, joint_dropout=0.0)))
    batch = statistics_batch(40)
    torch.manual_seed(1)
    conditions = method.train().conditions(batch)
    is_lost = ~conditions["reference_latent"].flatten(1).any(1)
    assert 8 < is_lost.sum() < 32
    assert torch.equal(~conditions["look"].flatten(1).any(1), is_lost)  # although the hidden layer has a bias
    conditions = method.eval().conditions(batch)
    assert conditions["look"].flatten(1).any(1).all()
    null = method.null_conditions(conditions, ["prompt", "mask"])
    assert null["look"] is conditions["look"]
    assert not method.null_conditions(conditions, ["reference"])["look"].any()
    upstream = TISynth(**model_params("tisynth_sd15_upstream"))
    assert not any("statistics" in name for name in upstream.state_dict())
    assert "look" not in upstream.eval().conditions(batch)


def test_training_prompts_without_a_class_are_dropped_ones():
    method = TISynth(**model_params("tisynth_mini", prompt_dropout=0.0, mask_dropout=0.0, joint_dropout=0.0)).train()
    batch = {**statistics_batch(3), "prompt": ["a satellite image", "", "a satellite image of road"]}
    empty, dropped, named = method.conditions(batch)["context"]
    assert torch.equal(empty, dropped) and not torch.equal(empty, named)


def test_autoencoder_shapes_and_posterior():
    autoencoder = AutoencoderKL(ch=8, ch_mult=[1, 2, 2], num_res_blocks=1, z_channels=3, embed_dim=5)
    posterior = autoencoder.encode(torch.rand(2, 3, 16, 24) * 2 - 1)
    assert posterior.mean.shape == posterior.logvar.shape == posterior.sample().shape == (2, 5, 4, 6)
    assert autoencoder.decode(posterior.mean).shape == (2, 3, 16, 24)
    assert (autoencoder.downsampling, autoencoder.latent_channels) == (4, 5)
    mean, logvar = torch.full((1, 1, 2, 1), 2.0), torch.full((1, 1, 2, 1), 0.0)
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), torch.tensor([4.0]))  # 2 elements of 2^2 / 2
    clamped = DiagonalGaussian.from_moments(torch.tensor([0.0, 1e3]).view(1, 2, 1, 1))
    assert clamped.logvar.item() == 20.0


def smooth_images(count: int = 6, size: int = 24) -> torch.Tensor:
    """Images whose patches have a few strong components, in [-1, 1]."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").div(2).clamp(-1, 1) + 0.1


def test_patch_autoencoder_keeps_what_a_singular_value_decomposition_keeps():
    images, kept = smooth_images(), 7
    autoencoder = PatchAutoencoder(channels=kept, ch=8, ch_mult=[1, 2, 2])
    shares = autoencoder.fit(images)
    latent = autoencoder.encode(images).mean
    assert latent.shape == (6, kept, 6, 6) and autoencoder.downsampling == 4
    torch.testing.assert_close(latent.square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
    # numpy on patches cut by hand: 3 x 4 x 4 numbers each
    mean = images.mean((0, 2, 3), keepdim=True).numpy()
    centred = images.numpy() - mean
    patches = np.stack([centred[n, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4].ravel()
                        for n in range(6) for y in range(6) for x in range(6)])
    _, singular, axes = np.linalg.svd(patches.astype(np.float64), full_matrices=False)
    expected = patches @ axes[:kept].T @ axes[:kept]
    restored = autoencoder.decode(latent).detach().numpy() - mean  # the decoder adds nothing before it is trained
    found = np.stack([restored[n, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4].ravel()
                      for n in range(6) for y in range(6) for x in range(6)])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(shares.numpy(), singular[:kept]**2 / (singular**2).sum(), rtol=1e-6)
    assert np.abs(expected - patches).max() > 1e-3  # seven components do leave something out


def test_patch_autoencoder_restores_from_neighbours_what_least_squares_does():
    images = smooth_images() + 0.1 * torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    autoencoder = PatchAutoencoder(channels=4, ch=8, ch_mult=[1, 2, 2], context=1)
    autoencoder.fit(images)
    latent = autoencoder.encode(images).mean
    padded = np.pad(latent.numpy().astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    places = [(n, y, x) for n in range(6) for y in range(6) for x in range(6)]
    around = np.stack([padded[n, :, y:y + 3, x:x + 3].ravel() for n, y, x in places])
    centred = (images - images.mean((0, 2, 3), keepdim=True)).numpy()
    patches = np.stack([centred[n, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4].ravel() for n, y, x in places])
    expected = around @ np.linalg.lstsq(around, patches, rcond=None)[0]
    restored = autoencoder.decode(latent).detach().numpy() - images.mean((0, 2, 3), keepdim=True).numpy()
    found = np.stack([restored[n, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4].ravel() for n, y, x in places])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert autoencoder.decode(latent[:, :, :2]).shape == (6, 3, 8, 24)
    alone = PatchAutoencoder(channels=4, ch=8, ch_mult=[1, 2, 2])
    alone.fit(images)
    torch.testing.assert_close(alone.encode(images).mean, latent)  # the encoder does not know the context
    assert (alone.decode(latent) - images).square().mean().item() > 1.01 * np.square(found - patches).mean()


def test_the_way_back_is_fitted_anew_for_a_given_encoder(tmp_path: Path):
    for number, image in enumerate(smooth_images(size=32)):
        levels = (image.permute(1, 2, 0).clamp(-1, 1) * 127.5 + 127.5).byte()
        Image.fromarray(levels.numpy()).save(tmp_path / f"{number}.png")
    rows = [{"source": f"{n}.png", "target": f"{n}.png", "prompt": ""} for n in range(6)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))

    def fit(out: str, *extra: str, channels: int = 4, context: int = 0) -> dict[str, Tensor]:
        params = {"channels": channels, "ch": 8, "ch_mult": [1, 2, 2], "context": context}
        autoencoder = {"target": "ldm.modules.autoencoder.PatchAutoencoder", "params": params}
        model = {"target": "ldm.methods.autoencoder.AutoencoderMethod", "params": {"autoencoder": autoencoder}}
        OmegaConf.save(OmegaConf.create({"model": model}), tmp_path / "config.yaml")
        fit_patches.main([str(tmp_path / "config.yaml"), str(tmp_path / out), "--data_root", str(tmp_path),
                          "--txt_file", str(tmp_path / "rows.json"), *extra])
        return load_file(tmp_path / out)

    first = fit("a.safetensors")
    second = fit("b.safetensors", "--encoder", str(tmp_path / "a.safetensors"), context=1)
    back = "first_stage_model.synthesis"
    assert first[back].shape == (4, 3, 4, 4) and second[back].shape == (4, 3, 12, 12)
    assert all(torch.equal(first[name], second[name]) for name in first if name != back)
    with pytest.raises(UserError, match=r"a.safetensors: 2 tensors .* \(first: first_stage_model.analysis\)"):
        fit("c.safetensors", "--encoder", str(tmp_path / "a.safetensors"), channels=5)


def test_patch_autoencoder_whitens_as_told_and_trains_its_decoder_only():
    images = smooth_images()
    spread = {}
    for whitening in (0.0, 0.5, 1.0):
        autoencoder = PatchAutoencoder(channels=5, ch=8, ch_mult=[1, 2, 2])
        autoencoder.fit(images, whitening)
        spread[whitening] = autoencoder.encode(images).mean.square().mean((0, 2, 3))
    torch.testing.assert_close(spread[1.0], torch.ones(5), rtol=1e-3, atol=0)
    torch.testing.assert_close(spread[0.5] / spread[0.5][0], (spread[0.0] / spread[0.0][0]).sqrt(), rtol=1e-3, atol=0)
    assert all(name.startswith("decoder.") for name, _ in autoencoder.named_parameters())
    assert {"mean", "analysis", "synthesis"} < set(autoencoder.state_dict())


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_activation_checkpointing_changes_no_gradient(coupling: str):
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        unet = randomize(AllInAttentionUNet(coupling, **UNET, use_checkpoint=use_checkpoint))
        branch = randomize(ControlBranch(4, (1, 1, 1), (8,) * 7, **UNET, use_checkpoint=use_checkpoint))
        for name, parameter in unet.named_parameters():  # a frozen body in front of trained layers
            parameter.requires_grad_("trainable" in name)
        latent, timestep, context = inputs()
        features = branch(latent, timestep, context, latent + 1)
        unet(latent, timestep, context, features, features).square().sum().backward()
        trained = [*unet.named_parameters(), *branch.named_parameters()]
        gradients.append({name: p.grad for name, p in trained if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_bad_settings_are_refused():
    for changes, message in (
        ({"coupling": "both"}, "coupling: 'both' is unknown"),
        ({"train": ["unet", "decoder"]}, "train: decoder is unknown"),
        ({"guidance_drops": ["hint"]}, "guidance_drops: hint is unknown"),
        ({"unet": {**model_params("tisynth_tiny")["unet"], "num_heads": 3}}, "num_heads=3 does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            TISynth(**model_params("tisynth_tiny", **changes))
    text_encoder = model_params("tisynth_tiny")["text_encoder"]
    text_encoder["params"]["frozen"] = True
    with pytest.raises(ValueError, match="text encoder is frozen"):
        TISynth(**model_params("tisynth_tiny", train=["text"], text_encoder=text_encoder))
