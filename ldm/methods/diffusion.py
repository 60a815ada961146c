"""What all diffusion methods share: training loss, sampling, previews. A method adds its network and its conditions."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.objective import loss_weight, training_target, variational_bound
from ldm.diffusion.schedule import make_schedule, q_sample
from ldm.methods.conditions import ConditionCache
from ldm.sampling.guidance import PredictBranches, guide, join_branches
from ldm.sampling.modes import MODES, Sampling
from ldm.sampling.sampler import sample


class DiffusionMethod(nn.Module):
    """A generator that learns to remove noise from images, or from their latents.

    A subclass defines `encode_image`, `encode_moments`, `decode_latent`, `latent_shape`, `size_factor`, `conditions`,
    `null_conditions`, `predict_noise` and `trainable_groups`.

    Args:
        schedule: arguments of make_schedule.
        prediction_type: what the network predicts: `epsilon`, `v` or `x0`.
        min_snr_gamma: clamp of the signal-to-noise weight (Hang et al. 2023); None = every timestep counts the same.
        guidance_scale: what inference.py and the previews use unless told otherwise; how strong a model wants it
            depends on what its unconditional half does without.
        sampling: fields of Sampling that inference.py starts from where they differ from the mode `exact`.
    """

    size_factor: int
    takes: tuple[str, ...] = ("prompt", "reference")  # what a manifest must give the method beside the masks
    image_channels = 3
    clip: float | None = None  # bound of clean values while sampling; latents have none
    has_learned_variance = False  # predict_noise returns twice the channels, see learned_log_variance
    decode_batch = 8  # images decoded at once: the decoder's features are larger than those of a whole step

    # Set where the weights no longer change (load_method): keeps what was computed of prompts and references.
    condition_cache: ConditionCache | None = None

    def __init__(self, schedule: Mapping[str, Any] | None = None, prediction_type: str = "epsilon",
                 min_snr_gamma: float | None = None, guidance_scale: float = 9.0,
                 sampling: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.schedule = make_schedule(**(schedule or {}))
        self.prediction_type, self.min_snr_gamma = prediction_type, min_snr_gamma
        self.own_sampling = make_own_sampling(guidance_scale, sampling or {})
        for name, values in self.schedule.buffers().items():
            self.register_buffer(name, values)

    @property
    def guidance_scale(self) -> float:
        """The method's own guidance scale."""
        return self.own_sampling.guidance_scale

    def encode_image(self, image: Tensor) -> Tensor:
        """Latent of an image: (B, 3, H, W) in [-1, 1] -> (B, C, h, w), about unit variance."""
        raise NotImplementedError

    def encode_moments(self, moments: Tensor) -> Tensor:
        """Latent from cached moments: (B, 2C, h, w) -> (B, C, h, w); only for methods with an autoencoder."""
        raise NotImplementedError

    def encode_start(self, image: Tensor) -> Tensor:
        """Latent that a walk of a strength below 1 starts from, the same whenever asked; shapes as encode_image."""
        return self.encode_image(image)

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Image of a latent: (B, C, h, w) -> (B, 3, H, W) float32 in about [-1, 1]."""
        raise NotImplementedError

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of this size, which size_factor divides."""
        raise NotImplementedError

    def conditions(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of predict_noise for a batch; drops some at random while training."""
        raise NotImplementedError

    def null_conditions(self, conditions: Mapping[str, Any], drops: Sequence[str] | None = None) -> dict[str, Any]:
        """The same keywords without some of `prompt`, `mask`, `reference`; None = without those guidance drops."""
        raise NotImplementedError

    def predict_noise(self, latent: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
        """Output of the network (of kind prediction_type): like latent, with learned variance twice its channels."""
        raise NotImplementedError

    def prepare(self, branches: Sequence[Mapping[str, Any]], share_control: bool = False,
                reuse_every: int = 1) -> PredictBranches:
        """Bind the conditions of all branches of guidance for one walk of a sampler.

        Args:
            branches: results of `conditions` and `null_conditions`, B samples each.
            share_control, reuse_every: approximations; see Sampling.
        Returns:
            `predict(latent (n * B, C, h, w), timestep (n * B,), n)`, which answers for the last n branches.
        Raises:
            ValueError: for an approximation that the method does not have.
        """
        if share_control or reuse_every != 1:
            raise ValueError(f"{type(self).__name__}: cannot share control features or reuse those of another step. "
                             "Use --no-share_control --reuse_every 1.")
        joined = join_branches(branches)

        def predict(latent: Tensor, timestep: Tensor, count: int) -> Tensor:
            return self.predict_noise(latent, timestep, **{key: value[-len(latent):] for key, value in joined.items()})

        return predict

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
            Scalar loss, and its parts for the log: `mse` (unweighted), and `vb` where the variance is learned: a term
            of the variational bound, which counts a thousandth of the whole bound (Nichol and Dhariwal 2021, Eq. 16).
        """
        with torch.no_grad():
            latent = (self.encode_moments(batch["moments"]) if "moments" in batch else
                      self.encode_image(batch["image"])).float()
        timestep = torch.randint(self.schedule.num_timesteps, (len(latent),), device=latent.device)
        noise = torch.randn_like(latent)
        noisy = q_sample(latent, timestep, noise, self.schedule)
        prediction = self.predict_noise(noisy, timestep, **self.conditions(batch)).float()
        prediction, values = prediction.tensor_split([latent.shape[1]], dim=1)
        target = training_target(latent, noise, timestep, self.schedule, self.prediction_type)
        error = (prediction - target).square().flatten(1).mean(1)  # (B,)
        weight = loss_weight(timestep, self.schedule, self.prediction_type, self.min_snr_gamma)
        loss, parts = (weight * error).mean(), {"mse": error.mean().detach()}
        if self.has_learned_variance:
            bound = variational_bound(prediction, values, latent, noisy, timestep, self.schedule).mean()
            loss, parts["vb"] = loss + bound * self.schedule.num_timesteps / 1000, bound.detach()
        return loss, parts

    @torch.no_grad()
    def sample(self, batch: Mapping[str, Any], noise: Tensor, sampling: Sampling | None = None,
               draw: Callable[[Sequence[int]], Tensor] | None = None) -> Tensor:
        """Paint images.

        Args:
            batch: what `conditions` needs, after normalize_batch; with a strength below 1 also `image`.
            noise: (B, *noise_shape) standard normal; decides the result together with the conditions.
            sampling: solver, steps, guidance and savings; None = the method's own.
            draw: fresh noise for ddpm and for eta > 0, see ddim_sample.
        Returns:
            Images (B, image_channels, H, W) float32 in [-1, 1].
        """
        latent = self.sample_latent(batch, noise, sampling, draw)
        image = torch.cat([self.decode_latent(part).float() for part in latent.split(self.decode_batch)])
        # Clamping would hide infinities; NaN marks every broken value for whoever writes the file.
        return torch.where(image.isfinite(), image, torch.nan).clamp(-1.0, 1.0)

    @torch.no_grad()
    def sample_latent(self, batch: Mapping[str, Any], noise: Tensor, sampling: Sampling | None = None,
                      draw: Callable[[Sequence[int]], Tensor] | None = None) -> Tensor:
        """Latents of images, (B, C, h, w) float32; arguments as for `sample`."""
        with evaluating(self):  # in training mode `conditions` would drop some
            is_started = (sampling or self.own_sampling).strength < 1 and "image" in batch
            start = self.encode_start(batch["image"]) if is_started else None
            return self.walk(self.conditions(batch), noise, sampling, draw, start)

    @torch.no_grad()
    def walk(self, conditions: Mapping[str, Any], noise: Tensor, sampling: Sampling | None = None,
             draw: Callable[[Sequence[int]], Tensor] | None = None, start: Tensor | None = None) -> Tensor:
        """Latents from what `conditions` returned, (B, C, h, w) float32; for `start` see sampler.sample."""
        sampling = sampling or self.own_sampling
        own = self.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
        scales = [(own, None), (sampling.hint_scale, ["prompt", "mask"]), (sampling.reference_scale, ["reference"])]
        scales = [(scale, drops) for scale, drops in scales if scale != 1]
        branches = [self.null_conditions(conditions, drops) for _, drops in scales] + [conditions]
        predict = self.prepare(branches, sampling.share_control, sampling.reuse_every)
        denoise = guide(predict, [scale for scale, _ in scales], sampling.guidance_interval,
                        sampling.guidance_rescale, self.schedule.num_timesteps)
        return sample(denoise, noise, self.schedule, sampling, self.prediction_type, draw, clip=self.clip,
                      start=start)

    @torch.no_grad()
    def preview(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pictures for the grid of a training run: mask, reference if any, real image, sample with fixed noise."""
        mask, image = batch["mask"], batch["image"]
        shape = (len(mask), *self.noise_shape(*mask.shape[-2:]))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        colours = torch.tensor([*self.class_table.colours, (0, 0, 0)], device=mask.device) / 127.5 - 1.0
        drawn = colours[mask.clamp(max=self.class_table.num_classes)].permute(0, 3, 1, 2)
        painted = self.sample(batch, noise.to(mask.device), replace(self.own_sampling, solver="ddim", num_steps=20))
        reference = {"reference": batch["reference"]} if "reference" in batch else {}
        return {"mask": drawn, **reference, "real": image, "sample": painted}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within it; behind it each part has its own mode again, for frozen ones may have another."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def make_own_sampling(guidance_scale: float, changes: Mapping[str, Any]) -> Sampling:
    """The mode `exact` with a method's own guidance scale and changes; ValueError for a field that is not there."""
    try:
        return replace(MODES["exact"], guidance_scale=guidance_scale, **changes)
    except TypeError as error:
        raise ValueError(f"model.params.sampling: {error}. Expected fields of Sampling such as solver, num_steps.") \
            from error
