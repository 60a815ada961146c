"""Control-rectify sampling: a guide looks at the clean latent of a step, and its gradient moves it towards the mask.

A closure round the denoiser, for every path, prediction and solver but ddpm. With z = signal * x0 + noise * e, guide S,
decoder D and mask y:

    L = mean over pixels of CE(S(D(x0)), y)                          of a sample, ignored pixels left out
    G = g / rms(g),  g = dL / dx0                                    the network is not differentiated
    x0' = x0 - scale * noise * rms(V) * G                            V: velocity of the path

so that a step is `scale` relative to the velocity, whatever path, guide and noise level, and the sampler takes x0' and
the noise that goes with it. A sample's step never depends on its neighbours.

Source: Yang et al., arXiv 2512.16740 (TODSynth), whose own rule is `clamped`: v' = clamp(V + scale * noise * g, -1, 1).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.path import Level
from ldm.sampling.guidance import Run
from ldm.sampling.modes import Rectify, Sampling
from ldm.sampling.samplers import Denoise

IGNORED = 255  # in masks after normalize_batch
COLUMNS = ("loss", "loss_after", "gradient", "velocity", "clamped")  # means over samples that were rectified


class Guide(Protocol):
    """A frozen, differentiable segmentor.

    Attributes:
        sees: `images`, (B, C, H, W) float in [0, 1], or `latents`, clean latents (B, C, h, w).
        channels: C.
        class_table: its classes.
    """

    sees: str
    channels: int
    class_table: Any

    def __call__(self, inputs: Tensor) -> Tensor:
        """Class scores (B, K, h, w), with a graph; where h, w are not the mask's, they are resized bilinearly."""


class Rectifier:
    """A correction (see ldm.sampling.guidance.Correct), and the record of what it did.

    Args:
        settings: see Rectify.
        guide: classes as the masks'.
        batch_size: samples that are decoded with gradients at once.
    """

    def __init__(self, settings: Rectify, guide: Guide, batch_size: int = 8) -> None:
        self.settings, self.guide, self.batch_size = settings, guide, batch_size
        self.pending: list[tuple[Level, float, Tensor]] = []
        self.totals: dict[float, dict[str, Any]] = {}

    def __call__(self, denoise: Denoise, run: Run) -> Denoise:
        """Bind it to one run of a sampler."""
        scales, self.pending = choose_levels(run.sampling, run.levels), []

        def rectified(x: Tensor, level: Level) -> Tensor:
            clean = denoise(x, level)
            scale = scales.get(level)
            return clean if scale is None else self.correct(clean, x, level, scale, run)

        return rectified

    def correct(self, clean: Tensor, x: Tensor, level: Level, scale: float, run: Run) -> Tensor:
        """The corrected clean latents; those of samples without a usable gradient as they are."""
        mask = run.batch["mask"]
        parts = [self.gradient(*part, run) for part in zip(clean.split(self.batch_size), mask.split(self.batch_size),
                                                            strict=True)]
        loss, gradient = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        velocity = run.path.velocity(x, clean, level)
        size, spread = rms(gradient), rms(velocity)
        is_usable = size.isfinite() & (size > 0) & spread.isfinite()
        clamped = torch.zeros_like(loss)
        if self.settings.rule == "clamped":
            moved = velocity + scale * level.noise * gradient
            clamped = (moved.abs() > 1).flatten(1).float().mean(1)
            corrected = x - level.noise * moved.clamp(-1, 1)
        else:
            corrected = clean - scale * level.noise * spread * gradient / size
        corrected = torch.where(is_usable, corrected, clean)
        after = self.gradient(corrected, mask, run, with_gradient=False)[0] if self.settings.log else loss * torch.nan
        columns = (loss, after, size.flatten(), spread.flatten(), clamped, is_usable.flatten().float())
        self.pending.append((level, scale, torch.stack(columns, 1)))
        return corrected

    def gradient(self, clean: Tensor, mask: Tensor, run: Run, with_gradient: bool = True) -> tuple[Tensor, Tensor]:
        """Loss of each sample, (B,), and its gradient, like the clean latents (B, C, h, w); float32.

        The mask is (B, H, W) int64, 0..K-1 or 255. Without with_gradient the gradient is zero.
        """
        # A caller's inference mode or no_grad would leave the gradient out without a word, and tensors out of graphs.
        with torch.inference_mode(False), torch.set_grad_enabled(with_gradient):
            leaf, mask = clean.detach().clone().requires_grad_(with_gradient), mask.clone()
            inputs = leaf if self.guide.sees == "latents" else ((run.decode(leaf) + 1) / 2).clamp(0, 1)
            scores = self.guide(inputs).float()
            if scores.shape[-2:] != mask.shape[-2:]:
                scores = F.interpolate(scores, mask.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(scores, mask, ignore_index=IGNORED, reduction="none")  # (B, H, W), 0 where ignored
            counted = mask != IGNORED
            if self.settings.loss == "wrong":
                counted = counted & (scores.argmax(1) != mask)
            loss = (loss * counted).sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)
            if not with_gradient or not loss.requires_grad:
                return loss.detach(), torch.zeros_like(clean)
            return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0].float()

    def settle(self, count: int) -> None:
        """Enter the last run of a sampler into the record; samples behind `count` only filled its batch up."""
        for level, scale, rows in self.pending:
            used = rows[:count, -1:]
            total = self.totals.setdefault(level.time, {"time": level.time, "scale": scale, "samples": 0, "used": 0.0,
                                                        "sums": 0.0})
            total["samples"] += count
            total["used"] = total["used"] + used.sum()  # on the device: nobody waits for it here
            total["sums"] = total["sums"] + torch.where(used > 0, rows[:count, :-1], 0.0).sum(0)
        self.pending = []

    def report(self) -> list[dict[str, Any]]:
        """What was done since the last report, a record a level, noisy levels first.

        `samples`, `skipped` of them (no gradient, or none that is finite: they kept the plain step), and means over the
        others: `loss` of the guide before, `loss_after` (only with Rectify.log), rms of `gradient` and `velocity`, and
        with the rule `clamped` the share of values that were `clamped`.
        """
        records = []
        for total in sorted(self.totals.values(), key=lambda total: -total["time"]):
            used = float(total["used"])
            means = dict(zip(COLUMNS, (total["sums"] / max(used, 1)).tolist(), strict=True)) if used else {}
            means = {name: float(f"{value:.6g}") for name, value in means.items() if value == value}
            if self.settings.rule != "clamped":
                means.pop("clamped", None)
            records.append({"time": total["time"], "scale": total["scale"], "samples": total["samples"],
                            "skipped": total["samples"] - round(used), **means})
        self.totals = {}
        return records


def choose_levels(sampling: Sampling, levels: Sequence[Level]) -> dict[Level, float]:
    """Levels that are rectified, of a sampler's and its end -> scale of the step; ValueError if there are none."""
    settings, levels = sampling.rectify, levels[:-1]
    group = sampling.method.get("reuse_every", 1)  # a window never begins amid evaluations that share features
    low, high = settings.window
    chosen = {}
    for index, level in enumerate(levels):
        first = index - index % group
        if first < settings.steps if settings.steps else low <= levels[first].share <= high:
            falling = 1 - (index + 1) / len(levels)
            chosen[level] = settings.scale * (falling if settings.schedule == "falling" else 1.0)
    if not chosen:
        raise ValueError(f"--rectify_window: {low} to {high} holds none of the {len(levels)} steps, which are at "
                         f"{', '.join(f'{level.share:.3f}' for level in levels[:4])}, ... Expected one at least. Widen "
                         "it, or take more --num_steps.")
    return chosen


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square of each sample: (B, C, h, w) -> (B, 1, 1, 1)."""
    return tensor.square().mean((1, 2, 3), keepdim=True).sqrt()
