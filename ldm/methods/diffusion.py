"""What all diffusion methods share: training loss, sampling, previews. A method adds its network and its conditions."""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.transforms import recolour
from ldm.diffusion.objective import loss_weight, variational_bound
from ldm.diffusion.path import DiscretePath, Path
from ldm.diffusion.prediction import target_of
from ldm.methods.base import Method
from ldm.sampling.guidance import Correct, PredictBranches, Run, guide, join_branches, make_denoiser
from ldm.sampling.modes import MODES, Sampling, make_sampling
from ldm.sampling.rectify import choose_levels
from ldm.sampling.samplers import Denoise, sample
from ldm.util import instantiate_from_config

SCALES = {"hint_scale": ("prompt", "mask"), "reference_scale": ("reference",)}  # setting -> what its branch drops


class DiffusionMethod(Method):
    """A generator that learns to remove noise from images, or from their latents, on any path.

    A subclass defines `encode_image`, `encode_moments`, `decode_latent`, `latent_shape`, `size_factor`, `class_table`,
    `conditions`, `null_conditions`, `predict_noise` and `trainable_groups`.

    Args:
        schedule: arguments of DiscretePath.
        path: config of another path, such as FlowPath, in its place.
        prediction_type: what the network predicts, of path.predictions; None = the first of these, `epsilon` on a
            discrete path and `velocity` on a flow.
        min_snr_gamma: clamp of the signal-to-noise weight (Hang et al. 2023); None = every timestep counts the same.
        guidance_scale: what inference.py and the previews use unless told otherwise; how strong a model wants it
            depends on what its unconditional half does without.
        sampling: fields of Sampling that inference.py starts from where they differ from the mode `exact`.
    """

    takes: tuple[str, ...] = ("prompt", "reference")
    clip: float | None = None  # bound of clean values while sampling; latents have none
    has_learned_variance = False  # predict_noise returns twice the channels, see learned_log_variance
    decode_batch = 8  # images decoded at once: the decoder's features are larger than those of a whole step
    # Weight of the mask (with the prompt, which names its classes) and of the reference, on top of guidance_scale.
    sampling_settings: Mapping[str, Any] = {"hint_scale": 1.0, "reference_scale": 1.0}
    own_sampling: Sampling = None  # in the place of the property of Method

    def __init__(self, schedule: Mapping[str, Any] | None = None, path: Mapping[str, Any] | None = None,
                 prediction_type: str | None = None, min_snr_gamma: float | None = None, guidance_scale: float = 9.0,
                 sampling: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if schedule is not None and path is not None:
            raise ValueError("model.params: both schedule and path are given. Expected one: schedule is that of a "
                             "discrete path. Leave one out.")
        self.path: Path = DiscretePath(**(schedule or {})) if path is None else instantiate_from_config(path)
        self.prediction_type = prediction_type or self.path.predictions[0]
        if self.prediction_type not in self.path.predictions:
            raise ValueError(f"prediction_type: {self.prediction_type!r} is not possible on a "
                             f"{type(self.path).__name__}. Expected one of {', '.join(self.path.predictions)}.")
        self.min_snr_gamma = min_snr_gamma
        self.own_sampling = make_sampling(MODES["exact"], {**self.path.sampling, "guidance_scale": guidance_scale,
                                                           **(sampling or {})})
        unknown = sorted(set(self.own_sampling.method) - set(self.sampling_settings))
        if unknown:
            raise ValueError(f"model.params.sampling: {', '.join(unknown)} is unknown. Expected fields of Sampling "
                             f"or {', '.join(self.sampling_settings)}.")
        for name, values in self.path.vectors().items():
            self.register_buffer(name, values)

    def encode_image(self, image: Tensor) -> Tensor:
        """Latent of an image: (B, 3, H, W) in [-1, 1] -> (B, C, h, w), about unit variance."""
        raise NotImplementedError

    def encode_moments(self, moments: Tensor) -> Tensor:
        """Latent from cached moments: (B, 2C, h, w) -> (B, C, h, w); only for methods with an autoencoder."""
        raise NotImplementedError

    def encode_start(self, image: Tensor) -> Tensor:
        """Latent that a strength below 1 starts from, the same whenever computed; shapes as encode_image."""
        return self.encode_image(image)

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Image of a latent: (B, C, h, w) -> (B, 3, H, W) float32 in about [-1, 1]; differentiable."""
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
        """Output of the network.

        Args:
            latent: on the path, (B, C, h, w).
            timestep: times of the path, (B,): int64 on a discrete path, float32 in (0, T] on a flow.
            conditions: from `conditions`.
        Returns:
            Prediction of kind prediction_type, like latent; with learned variance twice its channels.
        """
        raise NotImplementedError

    def prepare(self, branches: Sequence[Mapping[str, Any]], sampling: Sampling = MODES["exact"]) -> PredictBranches:
        """Bind the conditions of all branches of guidance for one run of a sampler.

        Args:
            branches: results of `conditions` and `null_conditions`, B samples each; the last has all conditions.
            sampling: settings, of which a method may have its own.
        Returns:
            Predictions for the last n branches (see PredictBranches).
        """
        joined = join_branches(branches)

        def predict(latent: Tensor, timestep: Tensor, count: int) -> Tensor:
            return self.predict_noise(latent, timestep, **{key: value[-len(latent):] for key, value in joined.items()})

        return predict

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the noise that a sample of this image size starts from.

        Raises:
            ValueError: if height or width is not a multiple of size_factor.
        """
        if height % self.size_factor or width % self.size_factor or min(height, width) < self.size_factor:
            raise ValueError(f"image size {height} x {width}: this model needs multiples of {self.size_factor}. "
                             "Crop or pad the masks, or give --H and --W.")
        return self.latent_shape(height, width)

    def check(self, sampling: Sampling) -> None:
        """Also the levels that the settings ask for, and the scales (see Method)."""
        super().check(sampling)
        if sampling.recolour_start and (self.image_channels != 3 or "reference" not in self.takes):
            raise ValueError("--recolour_start: this model has no references in colour. Leave the flag out.")
        for name in SCALES:
            scale = self.setting(sampling, name)
            if not 0 < scale < math.inf:
                raise ValueError(f"sampling: {name} is {scale!r}. Expected above 0.")
        levels = self.levels(sampling)
        if sampling.rectify is None:
            return
        choose_levels(sampling, levels)
        if sampling.rectify.rule == "clamped" and "velocity" not in self.path.predictions:
            raise ValueError("--rectify_preset: upstream is a rule for velocities of a flow. Expected default for this "
                             "model. Leave the flag out.")

    def setting(self, sampling: Sampling, name: str) -> Any:
        """Value of one of sampling_settings."""
        return sampling.method.get(name, self.sampling_settings[name])

    def levels(self, sampling: Sampling) -> list:
        """Levels that a sampler visits with these settings (see Path.levels)."""
        return self.path.levels(sampling.num_steps, sampling.spacing, sampling.end, sampling.strength)

    def training_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss of a batch with times and noise drawn from torch's global generator.

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
        time = self.path.draw_times(len(latent), latent.device)
        noise = torch.randn_like(latent)
        factors = self.path.factors(time, latent)
        noisy = factors[0] * latent + factors[1] * noise
        prediction = self.predict_noise(noisy, time, **self.conditions(batch)).float()
        prediction, values = prediction.tensor_split([latent.shape[1]], dim=1)
        target = target_of(self.prediction_type, latent, noise, *factors)
        error = (prediction - target).square().flatten(1).mean(1)  # (B,)
        weight = loss_weight(*factors, self.prediction_type, self.min_snr_gamma)
        loss, parts = (weight * error).mean(), {"mse": error.mean().detach()}
        if self.has_learned_variance:
            bound = variational_bound(prediction, values, latent, noisy, time, self.path).mean()
            loss, parts["vb"] = loss + bound * self.path.num_timesteps / 1000, bound.detach()
        return loss, parts

    def sample(self, batch: Mapping[str, Any], noise: Tensor, sampling: Sampling | None = None,
               draw: Callable[[Sequence[int]], Tensor] | None = None, correct: Correct | None = None) -> Tensor:
        """Generate images.

        Args:
            batch: what `conditions` needs, after normalize_batch; with a strength below 1 also `image`.
            noise: (B, *noise_shape) standard normal; decides the result together with the conditions.
            sampling: solver, steps, guidance and savings; None = the method's own.
            draw: fresh noise for ddpm and for eta > 0, see samplers.sample.
            correct: a correction of clean latents between the network and the sampler, see guidance.Correct.
        Returns:
            Images (B, image_channels, H, W) float32 in [-1, 1].
        """
        latent = self.sample_latent(batch, noise, sampling, draw, correct)
        with torch.no_grad():
            image = torch.cat([self.decode_latent(part).float() for part in latent.split(self.decode_batch)])
            # Clamping would hide infinities; NaN marks every broken value for whoever writes the file.
            return torch.where(image.isfinite(), image, torch.nan).clamp(-1.0, 1.0)

    def sample_latent(self, batch: Mapping[str, Any], noise: Tensor, sampling: Sampling | None = None,
                      draw: Callable[[Sequence[int]], Tensor] | None = None,
                      correct: Correct | None = None) -> Tensor:
        """Latents of images, (B, C, h, w) float32; arguments as for `sample`."""
        sampling = sampling or self.own_sampling
        if sampling.rectify is not None and correct is None:
            raise ValueError("sampling: rectify is set, but there is no guide. Give one with --guide.")
        if sampling.strength < 1 and "image" not in batch:
            raise ValueError("strength is below 1, but there is no image to start from. Give every row a target, or "
                             "strength 1.")
        levels = self.levels(sampling)
        # Gradients are off where the networks run and nowhere else: a correction may want those of its own.
        with evaluating(self):  # in training mode `conditions` would drop some
            with torch.no_grad():
                start = self.encode_start(start_image(batch, sampling)) if sampling.strength < 1 else None
                conditions = self.conditions(batch)
            denoise = self.denoiser(conditions, sampling)
            if correct is not None:
                denoise = correct(denoise, Run(batch, sampling, self.path, levels, self.decode_latent))
            return sample(denoise, noise, levels, sampling.solver, sampling.eta, draw, start)

    def denoiser(self, conditions: Mapping[str, Any], sampling: Sampling) -> Denoise:
        """The network under guidance as samplers want it: `denoise(x, level) -> x0`, without gradients.

        Args:
            conditions: from `conditions`.
            sampling: guidance and savings.
        """
        own = self.own_sampling.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
        scales = [(own, None), *((self.setting(sampling, name), drops) for name, drops in SCALES.items())]
        scales = [(scale, drops) for scale, drops in scales if scale != 1]
        with torch.no_grad():
            branches = [self.null_conditions(conditions, drops) for _, drops in scales] + [conditions]
            predict = self.prepare(branches, sampling)
        predict = guide(predict, [scale for scale, _ in scales], sampling.guidance_interval, sampling.guidance_rescale)
        return make_denoiser(torch.no_grad()(predict), self.prediction_type, self.clip, sampling.solver == "ddpm")

    @torch.no_grad()
    def preview(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Images for the grid of a training run: mask, reference if any, real image, sample with fixed noise."""
        mask, image = batch["mask"], batch["image"]
        shape = (len(mask), *self.noise_shape(*mask.shape[-2:]))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        colours = torch.tensor([*self.class_table.colours, (0, 0, 0)], device=mask.device) / 127.5 - 1.0
        drawn = colours[mask.clamp(max=self.class_table.num_classes)].permute(0, 3, 1, 2)
        sampled = self.sample(batch, noise.to(mask.device), replace(self.own_sampling, solver="ddim", num_steps=20))
        reference = {"reference": batch["reference"]} if "reference" in batch else {}
        return {"mask": drawn, **reference, "real": image, "sample": sampled}


def start_image(batch: Mapping[str, Any], sampling: Sampling) -> Tensor:
    """The image that a strength below 1 starts from, (B, C, H, W) in [-1, 1]."""
    return recolour(batch["image"], batch["reference"]) if sampling.recolour_start else batch["image"]


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
