"""Autoencoders between images and latents: KL-regularised (Rombach et al. 2022, CompVis key names), and of patches."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.blocks import Upsample, group_norm, zero_module


@dataclass
class DiagonalGaussian:
    """Posterior of the encoder: independent normals.

    Attributes:
        mean: (B, C, h, w).
        logvar: natural log of the variance, same shape, clamped to [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Split the (B, 2C, h, w) output of the encoder into mean and log-variance."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self) -> Tensor:
        """Draw one latent a sample, (B, C, h, w)."""
        noise = torch.randn(self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, summed over C, h, w: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """Autoencoder whose latent is a factor 2**(len(ch_mult) - 1) smaller than the image.

    Args:
        ch: width of the first level.
        ch_mult: width of each level as a multiple of `ch`; each further level halves the resolution.
        num_res_blocks: residual blocks a level in the encoder (one more in the decoder).
        in_channels: channels of the image.
        z_channels: channels of the latent inside encoder and decoder.
        embed_dim: channels of the latent handed out.
        use_quant: 1x1 convolutions on both sides of the latent, as Stable Diffusion up to 2 has them and 3 has not;
            without, z_channels and embed_dim are the same.
    """

    def __init__(self, ch: int = 128, ch_mult: Sequence[int] = (1, 2, 4, 4), num_res_blocks: int = 2,
                 in_channels: int = 3, z_channels: int = 4, embed_dim: int = 4, use_quant: bool = True) -> None:
        super().__init__()
        if not use_quant and z_channels != embed_dim:
            raise ValueError(f"autoencoder: z_channels {z_channels}, embed_dim {embed_dim}. Expected the same without "
                             "use_quant. Correct the config.")
        self.downsampling = 2 ** (len(ch_mult) - 1)
        self.latent_channels = embed_dim
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, in_channels, 2 * z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, in_channels, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1) if use_quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1) if use_quant else nn.Identity()

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Posterior over unscaled latents (B, embed_dim, h, w) of an image (B, 3, H, W) in [-1, 1].

        H and W are multiples of `downsampling`, h and w smaller by it.
        """
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(image)))

    def decode(self, latent: Tensor) -> Tensor:
        """Image of an unscaled latent: (B, embed_dim, h, w) -> (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latent))


class PatchAutoencoder(nn.Module):
    """Autoencoder that encodes each patch by its principal components; a network repairs what they leave out.

    For small models: the encoder is fitted in seconds (`fit`), keeps mean colours exactly, and stays the same while the
    decoder trains, so that a generator of its latents need not wait for the decoder. The decoder starts as the linear
    way back. There is no posterior: its variance is zero up to rounding.

    Args:
        channels: principal components kept of a patch = channels of the latent.
        ch, ch_mult, num_res_blocks: of the decoder (see AutoencoderKL); patches have edges of 2**(len(ch_mult) - 1).
        context: how many latent pixels on each side of its own a patch is restored from by the linear way back. With 0
            patches know nothing of each other and leave a grid.
    """

    def __init__(self, channels: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int = 1,
                 context: int = 0) -> None:
        super().__init__()
        self.downsampling = 2 ** (len(ch_mult) - 1)
        self.latent_channels, self.context = channels, context
        reach = self.downsampling * (2 * context + 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("analysis", torch.zeros(channels, 3, self.downsampling, self.downsampling))
        self.register_buffer("synthesis", torch.zeros(channels, 3, reach, reach))
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, 3, channels)
        zero_module(self.decoder.conv_out)

    @torch.no_grad()
    def fit(self, images: Tensor, whitening: float = 0.5) -> Tensor:
        """Set the encoder and the linear way back from the patches of images.

        Args:
            images: (N, 3, H, W) float32 in [-1, 1]; H and W multiples of `downsampling`.
            whitening: 0 keeps the variances of the components, whose first, the brightness, is thirty times that of
                the second; 1 makes them equal. Latents have unit variance over all channels in any case.
        Returns:
            Share of the patches' variance that the channels keep, in the order of the channels, (channels,) float64.
        Source: Hotelling 1933 (principal components).
        """
        mean = images.double().mean((0, 2, 3))
        patches = F.pixel_unshuffle(images.double() - mean[:, None, None], self.downsampling)  # (N, 3 * p * p, h, w)
        patches = patches.permute(1, 0, 2, 3).flatten(1)
        variances, axes = torch.linalg.eigh(patches @ patches.T / patches.shape[1])
        variances, axes = variances.flip(0), axes.flip(1)  # largest first
        variances = variances.clamp(min=1e-12 * variances[0])  # rounding leaves some that are no number to divide by
        kept, axes = variances[:self.latent_channels], axes[:, :self.latent_channels].T
        largest = axes.abs().argmax(1, keepdim=True)
        axes = axes * axes.gather(1, largest).sign()  # an axis has no direction of its own; this one repeats
        scale = kept.pow(-whitening / 2)
        scale = scale / (kept * scale.square()).mean().sqrt()
        self.mean.copy_(mean)
        self.analysis.copy_((axes * scale[:, None]).unflatten(1, self.analysis.shape[1:]))
        self.fit_way_back(images)
        return kept / variances.sum()

    @torch.no_grad()
    def fit_way_back(self, images: Tensor) -> None:
        """Set the linear way back of the encoder as it is: least squares from latents to the pixels of a patch.

        Args:
            images: as for `fit`.
        """
        side, edge = 2 * self.context + 1, self.downsampling
        size = self.latent_channels * side**2
        gram, cross = torch.zeros(size, size).double(), torch.zeros(size, 3 * edge**2).double()
        for part in images.split(64):  # all at once they would take gigabytes
            around = F.unfold(self.pad(self.encode(part).mean), side).double()  # (n, size, h * w)
            pixels = F.pixel_unshuffle(part.double() - self.mean[:, None, None].double(), edge).flatten(2)
            gram += torch.einsum("nal,nbl->ab", around, around).cpu()
            cross += torch.einsum("nal,npl->ap", around, pixels).cpu()
        found = torch.linalg.lstsq(gram, cross, driver="gelsd").solution  # also where components never vary
        # A latent pixel to the left of a patch writes to its right: turned round, the blocks are a kernel.
        found = found.unflatten(0, (-1, side, side)).unflatten(3, (3, edge, edge)).flip(1, 2)
        self.synthesis.copy_(found.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))

    def pad(self, latent: Tensor) -> Tensor:
        """Latent with its borders repeated as far as the context reaches."""
        return F.pad(latent, (self.context,) * 4, mode="replicate") if self.context else latent

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Latent of an image as a posterior without variance; (B, 3, H, W) in [-1, 1] -> (B, channels, h, w)."""
        centred = image - self.mean[:, None, None]
        latent = F.conv2d(centred, self.analysis.to(image.dtype), stride=self.downsampling)
        return DiagonalGaussian(latent, torch.full_like(latent, -30.0))

    def decode(self, latent: Tensor) -> Tensor:
        """Image of a latent: (B, channels, h, w) -> (B, 3, H, W), about [-1, 1], not clamped."""
        linear = F.conv_transpose2d(self.pad(latent), self.synthesis.to(latent.dtype), stride=self.downsampling,
                                    padding=2 * self.context * self.downsampling)
        return linear + self.mean[:, None, None] + self.decoder(latent)


class Encoder(nn.Module):
    """Image -> (B, out_channels, h, w) moments."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, in_channels: int,
                 out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        width = ch
        self.down = nn.ModuleList()
        for level, multiple in enumerate(ch_mult):
            stage = nn.Module()
            stage.block = make_blocks(width, ch * multiple, num_res_blocks)
            width = ch * multiple
            if level < len(ch_mult) - 1:
                stage.downsample = PaddedDownsample(width)
            self.down.append(stage)
        self.mid = make_middle(width)
        self.norm_out = group_norm(width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, out_channels, h, w)."""
        h = self.conv_in(image)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent -> image."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, out_channels: int,
                 z_channels: int) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = make_middle(width)
        stages = []
        for level, multiple in reversed(list(enumerate(ch_mult))):
            stage = nn.Module()
            stage.block = make_blocks(width, ch * multiple, num_res_blocks + 1)
            width = ch * multiple
            if level > 0:
                stage.upsample = Upsample(width)
            stages.insert(0, stage)  # numbered by level: up.0 is the full resolution and runs last
        self.up = nn.ModuleList(stages)
        self.norm_out = group_norm(width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> (B, 3, H, W)."""
        h = self.conv_in(latent)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def make_blocks(width_in: int, width: int, count: int) -> nn.ModuleList:
    """Residual blocks of a level."""
    return nn.ModuleList(PlainResBlock(width if i else width_in, width) for i in range(count))


def make_middle(width: int) -> nn.Module:
    """Residual block, attention, residual block under the names of the published weights."""
    middle = nn.Module()
    middle.block_1 = PlainResBlock(width, width)
    middle.attn_1 = ConvAttention(width)
    middle.block_2 = PlainResBlock(width, width)
    return middle


class PlainResBlock(nn.Module):
    """Residual block without a timestep."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        residual = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(h))))))
        return residual + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else h)


class ConvAttention(nn.Module):
    """Single-head self-attention over positions, its projections kept as 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        normed = self.norm(h)
        q, k, v = (f(normed).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, h*w, C)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # (B, C, h*w)
        return h + self.proj_out(out.unflatten(2, h.shape[-2:]))


class PaddedDownsample(nn.Module):
    """Stride-2 convolution padded on the right and bottom only, as the published weights were trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(h, (0, 1, 0, 1)))
