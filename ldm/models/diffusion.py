"""What all diffusion methods share: training loss, sampling, previews. A method adds its network and its conditions."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.objective import loss_weight, training_target
from ldm.diffusion.schedule import make_schedule, q_sample
from ldm.sampling.ddim import ddim_sample, ddim_timesteps
from ldm.sampling.guidance import with_guidance


class DiffusionMethod(nn.Module):
    """A generator that learns to remove noise from the latents of images.

    A subclass defines `encode_image`, `encode_moments`, `decode_latent`, `latent_shape`, `size_factor`, `conditions`,
    `null_conditions`, `predict_noise` and `trainable_groups`.

    Args:
        schedule: arguments of make_schedule.
        prediction_type: what the network predicts: `epsilon`, `v` or `x0`.
        min_snr_gamma: clamp of the signal-to-noise weight (Hang et al. 2023); None = every timestep counts the same.
        guidance_scale: what inference.py and the previews use unless told otherwise; how strong a model wants it
            depends on what its unconditional half does without.
    """

    size_factor: int

    def __init__(self, schedule: Mapping[str, Any] | None = None, prediction_type: str = "epsilon",
                 min_snr_gamma: float | None = None, guidance_scale: float = 9.0) -> None:
        super().__init__()
        self.schedule = make_schedule(**(schedule or {}))
        self.prediction_type, self.min_snr_gamma = prediction_type, min_snr_gamma
        self.guidance_scale = guidance_scale
        for name, values in self.schedule.buffers().items():
            self.register_buffer(name, values)

    def encode_image(self, image: Tensor) -> Tensor:
        """Latent of an image: (B, 3, H, W) in [-1, 1] -> (B, C, h, w), about unit variance."""
        raise NotImplementedError

    def encode_moments(self, moments: Tensor) -> Tensor:
        """Latent from cached moments: (B, 2C, h, w) -> (B, C, h, w); only for methods with an autoencoder."""
        raise NotImplementedError

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Image of a latent: (B, C, h, w) -> (B, 3, H, W) float32 in about [-1, 1]."""
        raise NotImplementedError

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of this size, which size_factor divides."""
        raise NotImplementedError

    def conditions(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of predict_noise for a batch; drops some at random while training."""
        raise NotImplementedError

    def null_conditions(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """The same keywords for the unconditional half of guidance."""
        raise NotImplementedError

    def predict_noise(self, latent: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
        """Output of the network (of kind prediction_type), a tensor like latent."""
        raise NotImplementedError

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named groups of the parameters that train."""
        raise NotImplementedError

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the noise that a sample of this image size starts from.

        Raises:
            ValueError: if height or width is not a multiple of size_factor.
        """
        if height % self.size_factor or width % self.size_factor or min(height, width) < self.size_factor:
            raise ValueError(f"image size {height} x {width}: this model needs multiples of {self.size_factor}. "
                             "Crop or pad the masks, or give --H and --W.")
        return self.latent_shape(height, width)

    def training_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss of a batch with timestep and noise drawn from torch's global generator.

        Args:
            batch: `image` (B, 3, H, W) float32 in [-1, 1], or `moments` (B, 2C, h, w) of a LatentCache; and what
                `conditions` needs.
        Returns:
            Scalar loss, and its parts for the log: `mse` (unweighted).
        """
        with torch.no_grad():
            latent = (self.encode_moments(batch["moments"]) if "moments" in batch else
                      self.encode_image(batch["image"])).float()
        timestep = torch.randint(self.schedule.num_timesteps, (len(latent),), device=latent.device)
        noise = torch.randn_like(latent)
        noisy = q_sample(latent, timestep, noise, self.schedule)
        prediction = self.predict_noise(noisy, timestep, **self.conditions(batch)).float()
        target = training_target(latent, noise, timestep, self.schedule, self.prediction_type)
        error = (prediction - target).square().flatten(1).mean(1)  # (B,)
        weight = loss_weight(timestep, self.schedule, self.prediction_type, self.min_snr_gamma)
        return (weight * error).mean(), {"mse": error.mean().detach()}

    @torch.no_grad()
    def sample(self, batch: Mapping[str, Any], noise: Tensor, num_steps: int = 50, guidance_scale: float | None = None,
               eta: float = 0.0, draw: Callable[[Sequence[int]], Tensor] | None = None) -> Tensor:
        """Paint images with DDIM.

        Args:
            batch: what `conditions` needs, after normalize_batch.
            noise: (B, *noise_shape) standard normal; decides the result together with the conditions.
            num_steps: DDIM steps.
            guidance_scale: 1 = no guidance; None = the model's own.
            eta, draw: see ddim_sample.
        Returns:
            Images (B, 3, H, W) float32 in [-1, 1].
        """
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        conditions = self.conditions(batch)
        denoise = with_guidance(self.predict_noise, conditions, self.null_conditions(conditions), guidance_scale)
        steps = ddim_timesteps(num_steps, self.schedule.num_timesteps)
        latent = ddim_sample(denoise, noise, steps, self.schedule, eta, self.prediction_type, draw)
        image = self.decode_latent(latent).float()
        # Clamping would hide infinities; NaN marks every broken value for whoever writes the file.
        return torch.where(image.isfinite(), image, torch.nan).clamp(-1.0, 1.0)

    @torch.no_grad()
    def preview(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pictures for the grid of a training run: mask, reference, real image, sample with fixed noise."""
        mask, image = batch["mask"], batch["image"]
        shape = (len(mask), *self.noise_shape(*mask.shape[-2:]))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        colours = torch.tensor([*self.class_table.colours, (0, 0, 0)], device=mask.device) / 127.5 - 1.0
        drawn = colours[mask.clamp(max=self.class_table.num_classes)].permute(0, 3, 1, 2)
        sample = self.sample(batch, noise.to(mask.device), num_steps=20)
        return {"mask": drawn, "reference": batch["reference"], "real": image, "sample": sample}
