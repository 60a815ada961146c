"""TISynth: a latent diffusion model steered by a mask, a reference image and a prompt."""
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cldm.all_in_attention import AllInAttentionUNet
from cldm.control import STEM_WIDTHS, ControlBranch
from cldm.look import ReferenceStatistics
from cldm.prepared import PreparedTISynth
from ldm.data.classes import ClassTable
from ldm.data.transforms import encode_mask, hint_channels
from ldm.methods.diffusion import DiffusionMethod
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.modules.blocks import set_norm_groups
from ldm.util import instantiate_from_config

GROUPS = ("unet", "all_in_attention", "control", "reference", "text")


class TISynth(DiffusionMethod):
    """Two control branches (mask, reference) round a U-Net whose decoder attends to both.

    Sub-modules carry the names of the published checkpoints, so that the state_dict is theirs:
    `model.diffusion_model` U-Net, `control_model` mask branch, `ssl_stage_model` reference branch,
    `first_stage_model` autoencoder, `cond_stage_model` text encoder. Only `reference_statistics` is ours alone.

    Args:
        unet: arguments of UNetEncoder, shared by the U-Net and both branches.
        autoencoder: config of the autoencoder; frozen.
        text_encoder: config of the text encoder.
        class_table: name, file or mapping (see ClassTable.load).
        hint_mode: `rgb_id` (upstream), `palette` or `one_hot`.
        coupling: `upstream` or `residual` (see AllInAttentionUNet).
        train: groups that train, of GROUPS. `unet` is all of the U-Net except the all-in-attention tensors.
        scale_factor: multiplies autoencoder latents to about unit variance.
        prompt_dropout, mask_dropout, reference_dropout: share of training samples that lose the condition. A sample
            that loses its mask loses its prompt too, since the prompt names the classes.
        joint_dropout: share of training samples that lose all three, on top.
        guidance_drops: conditions that the unconditional half of guidance does without: `prompt`, `mask`, `reference`.
        reference_augment: config of the augmentation of training references; None = none.
        stem_widths: widths of the stems of both branches.
        sample_reference: draw reference latents from the autoencoder's posterior (upstream; not reproducible between
            batch sizes) instead of taking its mean.
        norm_groups: groups of the group norms of U-Net, branches and autoencoder whose channels it divides (Stable
            Diffusion: 32, at any width). Elsewhere, and with None: 32, or fewer where channels are less than 128.
        reference_statistics: give all residual blocks the statistics of the reference latent, beside the timestep (see
            ReferenceStatistics; trains with the group `reference`). Upstream has no such thing.
        diffusion: see DiffusionMethod.
    """

    def __init__(self, unet: Mapping[str, Any], autoencoder: Mapping[str, Any], text_encoder: Mapping[str, Any],
                 class_table: str | Mapping[str, Any], hint_mode: str = "one_hot", coupling: str = "residual",
                 train: Sequence[str] = ("all_in_attention", "control", "reference"), scale_factor: float = 0.18215,
                 prompt_dropout: float = 0.0, mask_dropout: float = 0.0, reference_dropout: float = 0.0,
                 joint_dropout: float = 0.0,
                 guidance_drops: Sequence[str] = ("prompt",), reference_augment: Mapping[str, Any] | None = None,
                 stem_widths: Sequence[int] = STEM_WIDTHS, sample_reference: bool = False,
                 norm_groups: int | None = None, reference_statistics: bool = False, **diffusion: Any) -> None:
        super().__init__(**diffusion)
        check_names("train", train, GROUPS)
        check_names("guidance_drops", guidance_drops, ("prompt", "mask", "reference"))
        self.class_table = ClassTable.load(class_table)
        self.hint_mode, self.train_groups, self.scale_factor = hint_mode, tuple(train), scale_factor
        self.dropout = (prompt_dropout, mask_dropout, reference_dropout, joint_dropout)
        self.guidance_drops, self.sample_reference = tuple(guidance_drops), sample_reference
        self.first_stage_model = instantiate_from_config(autoencoder)
        self.cond_stage_model = instantiate_from_config(text_encoder)
        if "text" in train and self.cond_stage_model.frozen:
            raise ValueError("train: has `text`, but the text encoder is frozen. Set text_encoder.params.frozen=false, "
                             "or drop `text`.")
        channels = self.first_stage_model.latent_channels
        unet = {"in_channels": channels, **unet}
        self.model = nn.Module()
        self.model.diffusion_model = AllInAttentionUNet(coupling, out_channels=channels, **unet)
        self.control_model = ControlBranch(
            hint_channels(hint_mode, self.class_table), self.stem_strides(), stem_widths, **unet)
        self.ssl_stage_model = ControlBranch(channels, (1, 1, 1), stem_widths, **unet)
        self.reference_statistics = (
            ReferenceStatistics(channels, self.model.diffusion_model.embedding_dim) if reference_statistics else None)
        self.register_buffer("logvar", torch.zeros(self.schedule.num_timesteps))  # published files carry it
        if norm_groups is not None:
            set_norm_groups(self, norm_groups)
        self.reference_augment = None if reference_augment is None else instantiate_from_config(reference_augment)
        self.size_factor = self.first_stage_model.downsampling * self.model.diffusion_model.downsampling

    def stem_strides(self) -> tuple[int, int, int]:
        """Strides that take a hint to the latent's resolution."""
        factor = self.first_stage_model.downsampling
        if factor not in (1, 2, 4, 8):
            raise ValueError(f"autoencoder: downsampling {factor} is not possible here. Expected 1, 2, 4 or 8.")
        return tuple(2 if factor >= 2 ** (i + 1) else 1 for i in range(3))

    @property
    def text_encoder(self) -> nn.Module:
        """The text encoder (its name in checkpoints is cond_stage_model)."""
        return self.cond_stage_model

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """The groups named in `train`, without parameters that no gradient can reach.

        With upstream's coupling, features of decoder levels without a transformer are dropped; the projections that
        make them are left out here, since nothing depends on them.
        """
        unet = self.model.diffusion_model
        decoder = dict(unet.named_parameters())
        groups = {
            "unet": [p for name, p in decoder.items() if "trainable" not in name],
            "all_in_attention": [p for name, p in decoder.items() if "trainable" in name],
            "control": self.reached_parameters(self.control_model),
            "reference": [*self.reached_parameters(self.ssl_stage_model),
                          *(self.reference_statistics.parameters() if self.reference_statistics else ())],
            "text": list(self.cond_stage_model.parameters()),
        }
        return {name: groups[name] for name in GROUPS if name in self.train_groups}

    def reached_parameters(self, branch: ControlBranch) -> list[nn.Parameter]:
        """Parameters of a branch that the prediction depends on."""
        unet = self.model.diffusion_model
        attended = unet.attended()
        dropped = set() if unet.is_residual else {
            id(p) for conv, used in zip(branch.zero_convs, attended, strict=False) if not used
            for p in conv.parameters()}
        return [p for p in branch.parameters() if id(p) not in dropped]

    def encode_image(self, image: Tensor) -> Tensor:
        """Draw a scaled latent from the autoencoder's posterior (see DiffusionMethod)."""
        return self.first_stage_model.encode(image).sample() * self.scale_factor

    def encode_start(self, image: Tensor) -> Tensor:
        """Mean of the autoencoder's posterior, scaled (see DiffusionMethod)."""
        return self.first_stage_model.encode(image).mean * self.scale_factor

    def encode_moments(self, moments: Tensor) -> Tensor:
        """Draw a scaled latent from cached moments (see DiffusionMethod)."""
        return DiagonalGaussian.from_moments(moments.float()).sample() * self.scale_factor

    def pick_reference(self, posterior: DiagonalGaussian) -> Tensor:
        """Scaled latent of a reference, (B, C, h, w): the posterior's mean, or a draw with sample_reference."""
        return (posterior.sample() if self.sample_reference else posterior.mean) * self.scale_factor

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Image of a scaled latent (see DiffusionMethod)."""
        return self.first_stage_model.decode(latent / self.scale_factor).float()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of this size."""
        factor = self.first_stage_model.downsampling
        return self.first_stage_model.latent_channels, height // factor, width // factor

    def conditions(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Context, hint and reference latent of a batch.

        Args:
            batch: `prompt` list of B str, `mask` (B, H, W) int64, `reference` (B, 3, H, W) float32 in [-1, 1] or
                `reference_moments` (B, 2c, h, w) of a LatentCache. With a condition_cache, `reference_key` may name
                the references: a list of B values that are equal only where the references are.
        Returns:
            `context` (B, L, D), `hint` (B, C, H, W), `reference_latent` (B, c, h, w), and with reference_statistics
            `look` (B, 3, E), zero where the reference is dropped.
        """
        mask, prompts = batch["mask"], list(batch["prompt"])
        with torch.no_grad():
            hint = encode_mask(mask, self.hint_mode, self.class_table)
            if "reference_moments" in batch:
                posterior = DiagonalGaussian.from_moments(batch["reference_moments"].float())
                reference_latent = self.pick_reference(posterior)
            else:
                reference_latent = self.encode_reference(batch["reference"], batch.get("reference_key"))
        look = None if self.reference_statistics is None else self.reference_statistics(reference_latent)
        if self.training:
            drop = torch.rand(4, len(mask)) < torch.tensor(self.dropout)[:, None]
            drop = drop[:3] | drop[3]  # prompt, mask, reference
            # A prompt that names no class becomes the dropped one: its words would tell unlabelled sets from labelled.
            prompts = ["" if lost or prompt == self.class_table.prompt_empty else prompt
                       for prompt, lost in zip(prompts, drop[0] | drop[1], strict=True)]
            keep = (~drop).to(hint.device, hint.dtype)[:, :, None, None, None]
            hint, reference_latent = hint * keep[1], reference_latent * keep[2]
            look = None if look is None else look * keep[2].flatten(2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text" in self.train_groups):
            context = self.encode_prompts(prompts)
        conditions = {"context": context, "hint": hint, "reference_latent": reference_latent}
        return conditions if look is None else {**conditions, "look": look}

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Context of prompts, (B, L, D); each prompt is encoded once in its life where there is a condition_cache."""
        cache = None if self.training else self.condition_cache
        if cache is None:
            return self.cond_stage_model.encode(prompts)
        return torch.cat([cache.get(("prompt", p), lambda p=p: self.cond_stage_model.encode([p])) for p in prompts])

    def encode_reference(self, reference: Tensor, keys: Sequence[Hashable] | None) -> Tensor:
        """Scaled latents of references; those with a key are encoded once where there is a condition_cache.

        Args:
            reference: (B, 3, H, W) in [-1, 1]; augmented while training.
            keys: B names of the references, None = they have none.
        Returns:
            (B, C, h, w).
        """
        if self.training and self.reference_augment is not None:
            reference = self.reference_augment(reference)
        encode = self.first_stage_model.encode
        if self.training or self.sample_reference or self.condition_cache is None or keys is None:
            return self.pick_reference(encode(reference))
        size = tuple(reference.shape[-2:])
        return torch.cat([
            self.condition_cache.get(("reference", key, size), lambda one=one: self.pick_reference(encode(one)))
            for key, one in zip(keys, reference.split(1), strict=True)])

    def null_conditions(self, conditions: Mapping[str, Tensor],
                        drops: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Conditions without some; those that stay are the same tensors.

        Args:
            conditions: from `conditions`.
            drops: some of `prompt`, `mask`, `reference`; None = guidance_drops.
        """
        drops = self.guidance_drops if drops is None else drops
        null = dict(conditions)
        if "prompt" in drops:
            null["context"] = self.encode_prompts([""]).expand_as(conditions["context"])
        for drop, key in (("mask", "hint"), ("reference", "reference_latent"), ("reference", "look")):
            if drop in drops and key in null:
                null[key] = torch.zeros_like(conditions[key])
        return null

    def prepare(self, branches: Sequence[Mapping[str, Tensor]], share_control: bool = False,
                reuse_every: int = 1) -> PreparedTISynth:
        """Answers for the branches of guidance with all that stays the same computed now (see PreparedTISynth)."""
        return PreparedTISynth(self, branches, share_control, reuse_every)

    def predict_noise(self, latent: Tensor, timestep: Tensor, context: Tensor, hint: Tensor,
                      reference_latent: Tensor, look: Tensor | None = None) -> Tensor:
        """Output of the network.

        Args:
            latent: noised, (B, C, h, w).
            timestep: (B,) int64.
            context: (B, L, D) text embedding.
            hint: (B, K, H, W) encoded mask.
            reference_latent: (B, C, h, w) scaled.
            look: (B, 3, E), what reference_statistics adds to the timestep embeddings of U-Net, mask branch and
                reference branch.
        Returns:
            Prediction of kind prediction_type, (B, C, h, w).
        """
        unet, mask, reference = (None, None, None) if look is None else look.unbind(1)
        from_mask = self.control_model(latent, timestep, context, hint, mask)
        from_reference = self.ssl_stage_model(latent, timestep, context, reference_latent, reference)
        return self.model.diffusion_model(latent, timestep, context, from_mask, from_reference, unet)


def check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    """ValueError for names outside the known ones."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{argument}: {', '.join(unknown)} is unknown. Expected some of {', '.join(known)}.")
