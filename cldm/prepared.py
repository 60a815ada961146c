"""TISynth with everything computed in advance that stays the same over the steps of a sampler."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cldm.control import ControlBranch, Features
from ldm.modules.attention import FixedContext

if TYPE_CHECKING:
    from cldm.tisynth import TISynth


class PreparedTISynth:
    """Answers of a TISynth for the branches of guidance; for one walk of a sampler.

    Stems of hints and reference latents, and the text's keys and values of all layers are computed once. With the
    defaults, answers are those of predict_noise.

    Args:
        method: in evaluation mode.
        branches: `context`, `hint`, `reference_latent` (and `look` if the method has it) of every branch, B samples
            each; the last has all conditions.
        share_control: run a control branch for the last branch only, where all branches give it the same hint (or
            reference). An approximation: the others' text would have changed its features a little.
        reuse_every: run the encoder and the control branches at the first of every so many calls, and only the decoder
            at the others. An approximation (Li et al. 2023, Faster Diffusion).
    """

    def __init__(self, method: "TISynth", branches: Sequence[Mapping[str, Tensor]], share_control: bool = False,
                 reuse_every: int = 1) -> None:
        self.method, self.reuse_every = method, reuse_every
        self.context = FixedContext(torch.cat([branch["context"] for branch in branches]))
        size = branches[-1]["reference_latent"].shape[-2:]
        self.stems, self.is_shared = [], []
        for network, key in ((method.control_model, "hint"), (method.ssl_stage_model, "reference_latent")):
            known = {id(branch[key]): branch[key] for branch in branches}
            stems = {number: network.stem(hint, size) for number, hint in known.items()}
            self.stems.append(torch.cat([stems[id(branch[key])] for branch in branches]))
            self.is_shared.append(share_control and len(known) == 1)
        self.looks: tuple[Tensor | None, ...] = (None, None, None)  # of U-Net, mask branch, reference branch
        if "look" in branches[-1]:
            self.looks = torch.cat([branch["look"] for branch in branches]).unbind(1)
        self.calls = 0
        self.kept: tuple[list[Tensor], Features, Features] | None = None

    def __call__(self, latent: Tensor, timestep: Tensor, count: int) -> Tensor:
        """Prediction of the last `count` branches (see ldm.sampling.guidance.guide).

        Args:
            latent: noised, (count * B, C, h, w).
            timestep: (count * B,) int64.
            count: number of branches.
        Returns:
            Prediction, (count * B, C, h, w).
        """
        unet, rows = self.method.model.diffusion_model, len(latent)
        context, embedding = self.context.last(rows), unet.embed_timestep(timestep, last(self.looks[0], rows))
        # Guidance that sets in again wants branches that were not kept.
        if self.calls % self.reuse_every == 0 or self.kept is None or len(self.kept[0][0]) < rows:
            hint, reference = (self.run_branch(index, latent, timestep, context, count) for index in (0, 1))
            self.kept = list(unet.encode(latent, embedding, context)), hint, reference
        self.calls += 1
        skips, hint, reference = self.kept
        if self.reuse_every == 1:
            self.kept = None  # the features are by far the largest tensors
        return unet.decode(take(skips, rows), embedding, context, *(Features(take(f.raw, rows), take(f.projected, rows))
                                                                   for f in (hint, reference)))

    def run_branch(self, index: int, latent: Tensor, timestep: Tensor, context: FixedContext, count: int) -> Features:
        """Features of the mask branch (0) or the reference branch (1)."""
        network: ControlBranch = (self.method.control_model, self.method.ssl_stage_model)[index]
        rows = len(latent)
        used = rows // count if self.is_shared[index] else rows
        features = network.features(latent[-used:], timestep[-used:], context.last(used), self.stems[index][-used:],
                                    last(self.looks[1 + index], used))
        if used == rows:
            return features
        return Features(*([tensor.repeat(count, 1, 1, 1) for tensor in tensors] for tensors in features))


def take(features: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The last `rows` samples of every feature map."""
    return [tensor[-rows:] for tensor in features]


def last(tensor: Tensor | None, rows: int) -> Tensor | None:
    """The last `rows` samples, if there are any."""
    return None if tensor is None else tensor[-rows:]
