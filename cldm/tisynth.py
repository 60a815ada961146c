"""TISynth: a latent diffusion model steered by a mask, a reference image and a prompt."""
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cldm.all_in_attention import AllInAttentionUNet
from cldm.control import STEM_WIDTHS, ControlBranch, Features
from cldm.look import ReferenceStatistics
from ldm.data.transforms import encode_mask, hint_channels
from ldm.methods.base import WeightGroup
from ldm.methods.latent import LatentDiffusion, check_names
from ldm.modules.attention import FixedContext
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.modules.blocks import set_norm_groups
from ldm.sampling.modes import MODES, Sampling
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

GROUPS = ("unet", "all_in_attention", "control", "reference", "text")
UNET, ENCODER = "model.diffusion_model.", ("time_embed.", "input_blocks.", "middle_block.")
TEXT_HINT = ("Give --pretrain_path a file that has the text encoder (an SD1.5 checkpoint, a diffusers folder, a "
             "folder of CLIP), or set model.params.text_encoder.params.weights_dir to a local folder of CLIP ViT-L/14.")


class TISynth(LatentDiffusion):
    """Two control branches (mask, reference) round a U-Net whose decoder attends to both.

    Sub-modules carry the names of the published checkpoints, so that the state_dict is theirs:
    `model.diffusion_model` U-Net, `control_model` mask branch, `ssl_stage_model` reference branch,
    `first_stage_model` autoencoder, `cond_stage_model` text encoder. Only `reference_statistics` is ours alone.

    Args:
        unet: arguments of UNetEncoder, shared by the U-Net and both branches.
        autoencoder: config of the autoencoder; frozen (see LatentDiffusion).
        text_encoder: config of the text encoder.
        class_table: name, file or mapping (see ClassTable.load).
        hint_mode: `rgb_id` (upstream), `palette` or `one_hot`.
        coupling: `upstream` or `residual` (see AllInAttentionUNet).
        train: groups that train, of GROUPS. `unet` is all of the U-Net except the all-in-attention tensors.
        stem_widths: widths of the stems of both branches.
        norm_groups: groups of the group norms of U-Net, branches and autoencoder whose channels it divides (Stable
            Diffusion: 32, at any width). Elsewhere, and with None: 32, or fewer where channels are less than 128.
        reference_statistics: give all residual blocks the statistics of the reference latent, beside the timestep (see
            ReferenceStatistics; trains with the group `reference`). Upstream has no such thing.
        latent: see LatentDiffusion.

    Settings of its own for sampling, both approximations:
        share_control: run a control branch once for all branches of guidance that have its condition.
        reuse_every: run encoder and control branches at every n-th step only; 1 = always.
    """

    sampling_settings = {**LatentDiffusion.sampling_settings, "share_control": False, "reuse_every": 1}

    def __init__(self, unet: Mapping[str, Any], autoencoder: Mapping[str, Any], text_encoder: Mapping[str, Any],
                 class_table: str | Mapping[str, Any], hint_mode: str = "one_hot", coupling: str = "residual",
                 train: Sequence[str] = ("all_in_attention", "control", "reference"),
                 stem_widths: Sequence[int] = STEM_WIDTHS, norm_groups: int | None = None,
                 reference_statistics: bool = False, **latent: Any) -> None:
        super().__init__(autoencoder, class_table, **latent)
        check_names("train", train, GROUPS)
        self.hint_mode, self.train_groups = hint_mode, tuple(train)
        self.cond_stage_model = instantiate_from_config(text_encoder)
        text = text_encoder.get("params") or {}
        self.prefilled = ("cond_stage_model.",) if text.get("weights_dir") else ()
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
        self.register_buffer("logvar", torch.zeros(self.path.num_timesteps))  # published files carry it
        if norm_groups is not None:
            set_norm_groups(self, norm_groups)
        self.size_factor = self.first_stage_model.downsampling * self.model.diffusion_model.downsampling

    def stem_strides(self) -> tuple[int, int, int]:
        """Strides that take a hint to the latent's resolution."""
        factor = self.first_stage_model.downsampling
        if factor not in (1, 2, 4, 8):
            raise ValueError(f"autoencoder: downsampling {factor} is not possible here. Expected 1, 2, 4 or 8.")
        return tuple(2 if factor >= 2 ** (i + 1) else 1 for i in range(3))

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
            drop = self.draw_drops(len(mask))  # prompt, mask, reference
            # A prompt that names no class becomes the dropped one: its words would tell unlabelled sets from labelled.
            prompts = ["" if lost or prompt == self.class_table.prompt_empty else prompt
                       for prompt, lost in zip(prompts, drop[0], strict=True)]
            keep = (~drop).to(hint.device, hint.dtype)[:, :, None, None, None]
            hint, reference_latent = hint * keep[1], reference_latent * keep[2]
            look = None if look is None else look * keep[2].flatten(2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text" in self.train_groups):
            context = self.encode_prompts(prompts)
        conditions = {"context": context, "hint": hint, "reference_latent": reference_latent}
        return conditions if look is None else {**conditions, "look": look}

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Context of prompts, (B, L, D); each prompt is encoded once in its life where there is a condition_cache."""
        encoder = self.cond_stage_model
        pieces = encoder.count_pieces(prompts)
        if self.training or self.condition_cache is None:
            return encoder.encode(prompts, pieces)
        return self.cached([("prompt", prompt, pieces) for prompt in prompts],
                           lambda i: encoder.encode([prompts[i]], pieces))

    def check_prompts(self, prompts: Collection[str]) -> None:
        """Load the tokenizer, whose files may be missing (see Method), and warn of prompts that will be cut."""
        cut = self.cond_stage_model.describe_cut(sorted(prompts))
        if cut:
            logger.warning("%s. Shorten them, or let longer ones go on in further pieces: inference.py --prompt_pieces "
                           "N, model.params.text_encoder.params.max_pieces=N in training.", cut)

    def batch_kind(self, prompt: str) -> int:
        """Pieces of a prompt (see Method): beside a longer one its context would be another, with empty pieces."""
        return self.cond_stage_model.count_pieces([prompt])

    def null_conditions(self, conditions: Mapping[str, Tensor],
                        drops: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Conditions without some of `prompt`, `mask`, `reference` (see DiffusionMethod); the others stay the same."""
        drops = self.guidance_drops if drops is None else drops
        null = dict(conditions)
        if "prompt" in drops:
            empty, length = self.encode_prompts([""]), conditions["context"].shape[1]
            null["context"] = empty.repeat(1, length // empty.shape[1], 1).expand_as(conditions["context"])
        for drop, key in (("mask", "hint"), ("reference", "reference_latent"), ("reference", "look")):
            if drop in drops and key in null:
                null[key] = torch.zeros_like(conditions[key])
        return null

    def check(self, sampling: Sampling) -> None:
        """Also reuse_every (see Method)."""
        super().check(sampling)
        if self.setting(sampling, "reuse_every") < 1:
            raise ValueError(f"sampling: reuse_every is {sampling.method['reuse_every']!r}. Expected at least 1.")

    def prepare(self, branches: Sequence[Mapping[str, Tensor]],
                sampling: Sampling = MODES["exact"]) -> "PreparedTISynth":
        """Predictions for the branches of guidance with all that stays the same computed now (see PreparedTISynth)."""
        return PreparedTISynth(self, branches, self.setting(sampling, "share_control"),
                               self.setting(sampling, "reuse_every"))

    def weight_groups(self) -> tuple[WeightGroup, ...]:
        """Names of the parts, which of them start as copies, and what may differ (see Method)."""
        branch = {"stem": "input_hint_block.", "copy_of": UNET, "copied": ENCODER}
        return (WeightGroup("all-in-attention", UNET, contains="trainable"), WeightGroup("U-Net", UNET),
                WeightGroup("mask branch", "control_model.", **branch),
                WeightGroup("reference branch", "ssl_stage_model.", **branch), *super().weight_groups(),
                WeightGroup("text encoder", "cond_stage_model.", remedy=TEXT_HINT))

    def weight_notes(self) -> list[str]:
        """A remark on every control branch whose zero-initialised layers let nothing through yet."""
        own = dict(self.named_parameters())
        notes = []
        for prefix, attention, group, what in (
                ("control_model.", "attn01_ssl_trainable", "mask branch", "mask"),
                ("ssl_stage_model.", "attn00_ls_trainable", "reference branch", "reference image")):
            gates = [p for name, p in own.items()
                     if name.startswith((f"{prefix}zero_convs.", f"{prefix}middle_block_out."))]
            # Where the decoder attends to features in front of the zero-convolutions, its own outputs must be zero too.
            outputs = [p for name, p in own.items() if f"{attention}.to_out." in name]
            gates += outputs if any("hint_norm_trainable" in name for name in own) else []
            if not any(p.is_meta or p.any() for p in gates):
                notes.append(f"warning: all zero-convolutions of the {group} are zero: the {what} has no effect yet")
        return notes

    def training_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss (see DiffusionMethod)."""
        return super().training_loss(self.encode_together(batch))

    def predict_noise(self, latent: Tensor, timestep: Tensor, context: Tensor, hint: Tensor,
                      reference_latent: Tensor, look: Tensor | None = None) -> Tensor:
        """Prediction of kind prediction_type (see DiffusionMethod and `conditions`).

        `look` is what reference_statistics adds to the timestep embeddings of U-Net, mask and reference branch.
        """
        unet, mask, reference = (None, None, None) if look is None else look.unbind(1)
        context = self.control_model.join_context(context, self.ssl_stage_model, self.model.diffusion_model)
        from_mask = self.control_model(latent, timestep, context, hint, mask)
        from_reference = self.ssl_stage_model(latent, timestep, context, reference_latent, reference)
        return self.model.diffusion_model(latent, timestep, context, from_mask, from_reference, unet)


class PreparedTISynth:
    """Predictions of a TISynth for the branches of guidance, in one run of a sampler.

    Stems of hints and reference latents, and the text's keys and values of all layers are computed once. With the
    defaults, predictions are those of predict_noise.

    Args:
        method: in evaluation mode.
        branches: `context`, `hint`, `reference_latent` (and `look` if the method has it) of every branch, B samples
            each; the last has all conditions.
        share_control: run a control branch for the last branch only, where all branches give it the same hint (or
            reference). An approximation: the others' text would have changed its features a little.
        reuse_every: run the encoder and the control branches at the first of every so many calls, and only the decoder
            at the others. An approximation (Li et al. 2023, Faster Diffusion).
    """

    def __init__(self, method: TISynth, branches: Sequence[Mapping[str, Tensor]], share_control: bool = False,
                 reuse_every: int = 1) -> None:
        self.unet, self.reuse_every, self.calls = method.model.diffusion_model, reuse_every, 0
        self.context = FixedContext(torch.cat([branch["context"] for branch in branches]))
        self.look, *looks = (torch.cat([branch["look"] for branch in branches]).unbind(1) if "look" in branches[-1]
                             else (None, None, None))
        self.controls = []  # network, stem, look, whether it runs for the last branch only
        for network, key, look in ((method.control_model, "hint", looks[0]),
                                   (method.ssl_stage_model, "reference_latent", looks[1])):
            known = {id(branch[key]): branch[key] for branch in branches}
            stems = {number: network.stem(hint, branches[-1]["reference_latent"].shape[-2:])
                     for number, hint in known.items()}
            stem = torch.cat([stems[id(branch[key])] for branch in branches])
            self.controls.append((network, stem, look, share_control and len(known) == 1))
        self.kept: tuple[Sequence[Tensor], ...] | None = None  # features: of the encoder, and two of each branch

    def __call__(self, latent: Tensor, timestep: Tensor, count: int) -> Tensor:
        """Prediction of the last `count` branches (see ldm.sampling.guidance.PredictBranches)."""
        rows = len(latent)
        context, embedding = self.context.last(rows), self.unet.embed_timestep(timestep, last(self.look, rows))
        # Guidance that sets in again wants branches that were not kept.
        if self.calls % self.reuse_every == 0 or self.kept is None or len(self.kept[0][0]) < rows:
            features = (self.run_control(*control, latent, timestep, count) for control in self.controls)
            maps = [tensors for both in features for tensors in both]
            self.kept = (list(self.unet.encode(latent, embedding, context)), *maps)
        self.calls += 1
        skips, *maps = ([last(tensor, rows) for tensor in tensors] for tensors in self.kept)
        if self.reuse_every == 1:
            self.kept = None  # the features are by far the largest tensors
        return self.unet.decode(skips, embedding, context, Features(*maps[:2]), Features(*maps[2:]))

    def run_control(self, network: ControlBranch, stem: Tensor, look: Tensor | None, is_shared: bool, latent: Tensor,
                    timestep: Tensor, count: int) -> Features:
        """Features of a control branch for the last `count` branches."""
        used = len(latent) // count if is_shared else len(latent)
        features = network.features(latent[-used:], timestep[-used:], self.context.last(used), stem[-used:],
                                    last(look, used))
        if used == len(latent):
            return features
        return Features(*([tensor.repeat(count, 1, 1, 1) for tensor in tensors] for tensors in features))


def last(tensor: Tensor | None, rows: int) -> Tensor | None:
    """The last `rows` samples, if there are any."""
    return None if tensor is None else tensor[-rows:]
