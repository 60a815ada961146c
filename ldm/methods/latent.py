"""What diffusion methods on the latents of an autoencoder share: scale and shift, caches of conditions, dropout."""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.classes import ClassTable
from ldm.methods.base import WeightGroup
from ldm.methods.diffusion import DiffusionMethod
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.util import UserError, instantiate_from_config

CONDITIONS = ("prompt", "mask", "reference")


class LatentDiffusion(DiffusionMethod):
    """A generator on scaled latents, z = (autoencoder's latent - shift_factor) * scale_factor.

    A subclass builds its networks and defines `conditions`, `null_conditions`, `predict_noise`, `trainable_groups` and
    `size_factor`. The autoencoder is `first_stage_model`, frozen.

    Args:
        autoencoder: config of the autoencoder: `encode(image) -> posterior with mean, logvar, sample()`, `decode`,
            `latent_channels`, `downsampling`.
        class_table: name, file or mapping (see ClassTable.load).
        scale_factor, shift_factor: bring latents to about unit variance and zero mean.
        prompt_dropout, mask_dropout, reference_dropout: share of training samples that lose the condition. A sample
            that loses its mask loses its prompt too, since the prompt names the classes.
        joint_dropout: share of training samples that lose all three, on top.
        guidance_drops: conditions that the unconditional half of guidance does without, of CONDITIONS.
        reference_augment: config of the augmentation of training references; None = none.
        sample_reference: draw reference latents from the autoencoder's posterior (upstream; not reproducible between
            batch sizes) instead of taking its mean.
        diffusion: see DiffusionMethod.
    """

    def __init__(self, autoencoder: Mapping[str, Any], class_table: str | Mapping[str, Any],
                 scale_factor: float = 0.18215, shift_factor: float = 0.0, prompt_dropout: float = 0.0,
                 mask_dropout: float = 0.0, reference_dropout: float = 0.0, joint_dropout: float = 0.0,
                 guidance_drops: Sequence[str] = ("prompt",), reference_augment: Mapping[str, Any] | None = None,
                 sample_reference: bool = False, **diffusion: Any) -> None:
        super().__init__(**diffusion)
        check_names("guidance_drops", guidance_drops, CONDITIONS)
        self.class_table = ClassTable.load(class_table)
        self.scale_factor, self.shift_factor = scale_factor, shift_factor
        self.dropout = (prompt_dropout, mask_dropout, reference_dropout, joint_dropout)
        self.guidance_drops, self.sample_reference = tuple(guidance_drops), sample_reference
        self.reference_augment = None if reference_augment is None else instantiate_from_config(reference_augment)
        self.first_stage_model = instantiate_from_config(autoencoder)

    def scaled(self, latent: Tensor) -> Tensor:
        """The autoencoder's latent, scaled."""
        return (latent - self.shift_factor) * self.scale_factor

    def encode_image(self, image: Tensor) -> Tensor:
        """Draw a scaled latent from the autoencoder's posterior (see DiffusionMethod)."""
        return self.scaled(self.first_stage_model.encode(image).sample())

    def encode_start(self, image: Tensor) -> Tensor:
        """Mean of the autoencoder's posterior, scaled (see DiffusionMethod)."""
        return self.scaled(self.first_stage_model.encode(image).mean)

    def encode_moments(self, moments: Tensor) -> Tensor:
        """Draw a scaled latent from cached moments (see DiffusionMethod)."""
        return self.scaled(DiagonalGaussian.from_moments(moments.float()).sample())

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Image of a scaled latent (see DiffusionMethod)."""
        return self.first_stage_model.decode(latent / self.scale_factor + self.shift_factor).float()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of this size."""
        factor = self.first_stage_model.downsampling
        return self.first_stage_model.latent_channels, height // factor, width // factor

    def cacheable_encoder(self) -> nn.Module:
        """The autoencoder, unless references are augmented (see Method)."""
        if self.reference_augment is not None:
            raise UserError("cache_latents: references are augmented anew in every step and cannot be cached. Set "
                            "model.params.reference_augment=null or training.cache_latents=null.")
        return self.first_stage_model

    def latent_space(self) -> str:
        """Hash of the autoencoder's weights, scale and shift (see Method)."""
        digest = hashlib.sha256(repr((self.scale_factor, self.shift_factor)).encode())
        for name, value in sorted(self.first_stage_model.state_dict().items()):
            content = value.detach().float().cpu().contiguous()
            digest.update(name.encode() + content.numpy().tobytes())
        return digest.hexdigest()

    def weight_groups(self) -> tuple[WeightGroup, ...]:
        """The autoencoder; subclasses put their networks in front."""
        return (WeightGroup("autoencoder", "first_stage_model."),)

    def draw_drops(self, count: int) -> Tensor:
        """Which of CONDITIONS each of so many training samples loses: (3, count) bool on the CPU."""
        drop = torch.rand(4, count) < torch.tensor(self.dropout)[:, None]
        drop = drop[:3] | drop[3]
        drop[0] |= drop[1]
        return drop

    def cached(self, keys: Sequence[Hashable], make: Callable[[int], Tensor]) -> Tensor:
        """Tensors (B, ...) of samples, each computed for its sample alone and once in a run (see condition_cache).

        Args:
            keys: what tells the samples' tensors apart, B of them, and from those of other calls.
            make: tensor (1, ...) of a sample, by its number.
        """
        return torch.cat([self.condition_cache.get(key, lambda i=i: make(i)) for i, key in enumerate(keys)])

    def encode_reference(self, reference: Tensor, keys: Sequence[Hashable] | None) -> Tensor:
        """Scaled latents (B, C, h, w) of references (B, 3, H, W) in [-1, 1], augmented while training.

        Those with a key, B names, are encoded once where there is a condition_cache; None = they have none.
        """
        if self.training and self.reference_augment is not None:
            reference = self.reference_augment(reference)
        encode = self.first_stage_model.encode
        if self.training or self.sample_reference or self.condition_cache is None or keys is None:
            return self.pick_reference(encode(reference))
        size = tuple(reference.shape[-2:])
        return self.cached([("reference", key, size) for key in keys],
                           lambda i: self.pick_reference(encode(reference[i:i + 1])))

    def encode_together(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A training batch whose image and reference, if they are of one size, went through the autoencoder at once.

        It has `moments` and `reference_moments` in their place, as a LatentCache gives them.
        """
        if "image" not in batch or "reference" not in batch or batch["image"].shape != batch["reference"].shape:
            return batch
        rest = {key: value for key, value in batch.items() if key not in ("image", "reference")}
        reference = batch["reference"]
        with torch.no_grad():
            if self.training and self.reference_augment is not None:
                reference = self.reference_augment(reference)
            posterior = self.first_stage_model.encode(torch.cat([batch["image"], reference]))
            moments, reference_moments = torch.cat([posterior.mean, posterior.logvar], dim=1).chunk(2)
        return {**rest, "moments": moments, "reference_moments": reference_moments}

    def pick_reference(self, posterior: DiagonalGaussian) -> Tensor:
        """Scaled latent of a reference, (B, C, h, w): the posterior's mean, or a draw with sample_reference."""
        return self.scaled(posterior.sample() if self.sample_reference else posterior.mean)


def check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    """ValueError for names outside the known ones."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{argument}: {', '.join(unknown)} is unknown. Expected some of {', '.join(known)}.")
