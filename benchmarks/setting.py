"""What is measured: networks with random weights at three sizes, ours and diffusers' nearest, and inputs for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from cldm.control import STEM_WIDTHS
from cldm.tisynth import TISynth
from ldm.sampling.modes import Sampling
from ldm.sampling.samplers import sample

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """Size of the networks and of their inputs; layout and depth are those of Stable Diffusion 1.5 in all of them.

    All widths shrink alike, those of the stems too. With 8 heads at a width of 64 each head is 8 wide (SD1.5: 40 and
    more), which makes attention slower than its arithmetic; 2 heads come near the true head width, but have fewer
    scores.

    Args:
        width: of the first level of U-Net and branches (320).
        heads: of every attention (8).
        vae_width: of the autoencoder's first level (128).
        context: width of the text embedding (768).
        pixels: height and width of the image.
        batch: images at once.
    """

    width: int
    heads: int
    vae_width: int
    context: int
    pixels: int
    batch: int

    def stems(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Widths of a stem, (16, 32, ...) at the full size."""
        return tuple(max(4, round(width * self.width / 320 / 4) * 4) for width in widths)


SIZES = {
    "tiny": Size(32, 4, 32, 32, 64, 2),
    "cpu": Size(64, 8, 32, 768, 256, 2),
    "full": Size(320, 8, 128, 768, 512, 8),
}
TOKENS = 77


def wake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give zero-initialised layers random values, and stems a gain: what does not arrive hides differences."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.device.type != "meta" and not parameter.any():
                parameter.copy_(parameter[0].numel() ** -0.5 * torch.randn(parameter.shape, generator=generator))
            if "input_hint_block" in name and parameter.ndim == 4:
                parameter.mul_(3)  # eight layers of torch's own initialisation and SiLU leave next to nothing
    return module


def config_of(size: Size, config: str = "tisynth_sd15_upstream", use_checkpoint: bool = False,
              **changes: Any) -> dict[str, Any]:
    """A config of configs/model at another size; its text encoder is a small stand-in."""
    model = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/model/{config}.yaml"))["model"]
    params = model["params"]
    params["unet"] |= {"model_channels": size.width, "num_heads": size.heads, "context_dim": size.context,
                       "use_checkpoint": use_checkpoint}
    params["autoencoder"]["params"]["ch"] = size.vae_width
    params["stem_widths"] = list(size.stems(STEM_WIDTHS))
    params["text_encoder"]["params"] |= {"vocab_size": 1024, "width": size.context, "layers": 1, "heads": 2,
                                         "tokenizer": str(ROOT / "configs/model/mini_tokenizer.json")}
    params |= changes
    return {"model": model}


def make_ours(size: Size, device: str | torch.device, **options: Any) -> TISynth:
    """TISynth with random weights, frozen; options of config_of."""
    torch.manual_seed(0)
    with torch.device(device):
        method = TISynth(**config_of(size, **options)["model"]["params"])
    return wake(method).eval().requires_grad_(False)


def make_inputs(size: Size, method: TISynth, batch: int, device: str | torch.device) -> dict[str, Any]:
    """Conditions, null conditions and noise for a batch, in the keywords of TISynth.

    Returns:
        `conditions` and `null`: `context`, `hint`, `reference_latent` (the null differs in the context only, as
        upstream's); `noise` (B, 4, h, w) float32; `image` (B, 3, H, W) in [-1, 1].
    """
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    channels, side = method.first_stage_model.latent_channels, size.pixels // method.first_stage_model.downsampling
    hint_channels = method.control_model.input_hint_block[0].in_channels
    conditions = {"context": draw(batch, TOKENS, size.context),
                  "hint": draw(batch, hint_channels, size.pixels, size.pixels).sigmoid(),
                  "reference_latent": draw(batch, channels, side, side)}
    null = {**conditions, "context": draw(1, TOKENS, size.context).expand(batch, -1, -1)}
    return {"conditions": conditions, "null": null,
            "noise": draw(batch, channels, side, side), "image": draw(batch, 3, size.pixels, size.pixels).clamp(-1, 1)}


def sample_given(method: TISynth, conditions: Mapping[str, Any], noise: Tensor, sampling: Sampling) -> Tensor:
    """Latents for conditions that were computed before, (B, 4, h, w)."""
    return sample(method.denoiser(conditions, sampling), noise, method.levels(sampling), sampling.solver)


def make_diffusers(size: Size, device: str | torch.device, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """U-Net, two control nets and autoencoder of diffusers at the same widths: `unet, first, second, vae`."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    widths = tuple(size.width * factor for factor in (1, 2, 4, 4))
    shared: Mapping[str, Any] = {"block_out_channels": widths, "attention_head_dim": size.heads,
                                 "cross_attention_dim": size.context, "in_channels": 4}
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=size.pixels // 8, **shared)
        stems = size.stems((16, 32, 96, 256))
        branches = [ControlNetModel(conditioning_embedding_out_channels=stems, **shared) for _ in range(2)]
        vae = AutoencoderKL(block_out_channels=tuple(size.vae_width * factor for factor in (1, 2, 4, 4)),
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                            layers_per_block=2, latent_channels=4)
    nets = {"unet": unet, "first": branches[0], "second": branches[1], "vae": vae}
    return {name: wake(net.to(dtype)).eval().requires_grad_(False) for name, net in nets.items()}
