"""CRFM: Stable Diffusion 3.5 steered by a mask, whose tokens join those of image and text; on a straight path.

Source: Yang et al. 2025 (arXiv 2512.16740). Where its public code departs from its equations, an argument has both, and
the default is what the equations say.
"""
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cldm.sd3 import TEXT_PARTS, MaskTransformer, merge_lora
from ldm.data.transforms import encode_mask, hint_channels
from ldm.data.vectors import PromptVectors
from ldm.files import digest_of
from ldm.methods.base import WeightGroup
from ldm.methods.latent import LatentDiffusion, check_names
from ldm.modules.blocks import set_norm_groups
from ldm.util import UserError
from ldm.weights.sd35 import BASE, NETWORK

GROUPS = ("image", "lora", "mask")
FLOW = {"target": "ldm.diffusion.path.FlowPath", "params": {"shift": 3.0}}


class CRFM(LatentDiffusion):
    """Rectified flow on SD3.5's latents with a stream of mask tokens.

    Args:
        transformer: arguments of diffusers' SD3Transformer2DModel.
        autoencoder, class_table: see LatentDiffusion.
        hint_mode: how a mask becomes the image whose latent the network sees: `palette`, `levels`, or
            `grey_upstream` (see encode_mask).
        train: groups that train, of GROUPS: `image` (what image tokens pass through), `lora` (low-rank adapters there
            instead), `mask` (the mask stream). Text stream and embeddings never train.
        lora_rank: of the adapters.
        vectors_dir: folder of the prompts' vectors (scripts/encode_prompts.py).
        frozen_dtype: precision, such as `bfloat16`, of the network's weights that do not train, and of exported ones;
            what trains has float32 weights. Needs mixed precision. None = float32 throughout.
        mlp_modulation, init, use_checkpoint: see MaskTransformer.
        sample_mask: draw the mask's latent from the autoencoder's posterior (upstream, also while sampling) instead of
            taking its mean.
        norm_groups: of the autoencoder (see set_norm_groups); None = as its class has them.
        scale_factor, shift_factor: SD3.5's, of vae/config.json.
        guidance_scale: 1 = off, as published; 2 to 4.5 for weights trained with prompt_dropout.
        path: of the flow, see FlowPath.
        latent: see LatentDiffusion.
    """

    takes = ("prompt",)
    autocast_dtype = None

    def __init__(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any],
                 class_table: str | Mapping[str, Any], hint_mode: str = "palette",
                 train: Sequence[str] = ("image", "mask"), lora_rank: int = 16, vectors_dir: str | None = None,
                 frozen_dtype: str | None = None, mlp_modulation: str = "own", init: str = "image",
                 use_checkpoint: bool = True, sample_mask: bool = False, norm_groups: int | None = 32,
                 scale_factor: float = 1.5305, shift_factor: float = 0.0609, guidance_scale: float = 1.0,
                 path: Mapping[str, Any] | None = None, **latent: Any) -> None:
        super().__init__(autoencoder=autoencoder, class_table=class_table, scale_factor=scale_factor,
                         shift_factor=shift_factor, guidance_scale=guidance_scale, path=path or FLOW, **latent)
        check_names("train", train, GROUPS)
        if {"image", "lora"} <= set(train):
            raise UserError("train: has both image and lora. Expected one of them, or only mask: adapters are for an "
                            "image stream that does not train. Drop one.")
        if hint_channels(hint_mode, self.class_table) != 3:
            raise UserError(f"hint_mode: {hint_mode!r} makes no image. Expected palette, levels or grey_upstream.")
        self.hint_mode, self.train_groups, self.lora_rank = hint_mode, tuple(train), lora_rank
        self.sample_mask, self.vectors_dir = sample_mask, vectors_dir
        if frozen_dtype not in (None, "bfloat16"):
            raise UserError(f"frozen_dtype: {frozen_dtype!r} is not possible. Expected bfloat16 or null.")
        self.frozen_dtype = None if frozen_dtype is None else torch.bfloat16
        if norm_groups is not None:
            set_norm_groups(self.first_stage_model, norm_groups)
        self.network = MaskTransformer(transformer, mlp_modulation, init, use_checkpoint)
        self.size_factor = self.first_stage_model.downsampling * self.network.patch_size

    def start_training(self) -> None:
        """Start the mask stream where no file had it, and add the adapters, if they train (see Method)."""
        self.network.start_mask_stream()
        if "lora" in self.train_groups and not self.network.lora_parameters():
            self.network.add_lora(self.lora_rank)
        if self.frozen_dtype:
            trained = {id(p) for group in self.trainable_groups().values() for p in group}
            for parameter in self.network.parameters():
                if id(parameter) not in trained:
                    parameter.data = parameter.data.to(self.frozen_dtype)

    def exported(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights for inference: adapters merged, the network in frozen_dtype (see Method)."""
        merged = merge_lora(state)
        parameters = {name for name in merged if name.startswith(NETWORK) and not name.endswith((".columns", ".rows"))}
        return {name: value.to(self.frozen_dtype) if self.frozen_dtype and name in parameters else value
                for name, value in merged.items()}

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """The groups named in `train`; adapters only once start_training has added them."""
        groups = {"image": list(self.network.image_parameters().values()), "lora": self.network.lora_parameters(),
                  "mask": self.network.mask_parameters()}
        return {name: groups[name] for name in GROUPS if name in self.train_groups}

    def weight_groups(self) -> tuple[WeightGroup, ...]:
        """Mask, text and image stream, autoencoder."""
        return (WeightGroup("mask stream", f"{NETWORK}mask_"),
                *(WeightGroup("text stream", BASE, part) for part in TEXT_PARTS),
                WeightGroup("image stream", BASE), *super().weight_groups())

    def blocks(self) -> list[nn.Module]:
        """The blocks of three streams, for torch.compile."""
        return list(self.network.mask_blocks)

    @cached_property
    def vectors(self) -> PromptVectors:
        """The vectors of prompts; UserError if the config names no folder."""
        if not self.vectors_dir:
            raise UserError("model.params.vectors_dir: no folder with the vectors of the prompts. Make it with "
                            "scripts/encode_prompts.py and name it: model.params.vectors_dir=DIR for train.py, "
                            "--vectors DIR for inference.py.")
        return PromptVectors(self.vectors_dir)

    def check_prompts(self, prompts: Collection[str]) -> None:
        """UserError where prompts lack vectors, among them the empty one where it is used (see Method)."""
        needs_empty = self.dropout[0] > 0 or self.dropout[1] > 0 or self.own_sampling.guidance_scale != 1
        config = self.network.base.config
        self.vectors.check({*prompts, *([""] if needs_empty else [])}, config.joint_attention_dim,
                             config.pooled_projection_dim)

    def fingerprint(self) -> dict[str, Any]:
        """What the vectors were made with (see Method)."""
        return {"vectors_sha256": digest_of(self.vectors.fingerprint())}

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Context (B, L, D) and pooled vectors (B, P) of prompts, as they are stored."""
        pairs = [self.vectors.read(prompt) for prompt in prompts]
        return tuple(torch.stack(parts).to(device, non_blocking=True) for parts in zip(*pairs, strict=True))

    @torch.no_grad()
    def encode_mask_latent(self, mask: Tensor) -> Tensor:
        """Scaled latent of the image of a mask: (B, H, W) int64, 0..K-1 or 255 -> (B, C, h, w)."""
        posterior = self.first_stage_model.encode(encode_mask(mask, self.hint_mode, self.class_table) * 2 - 1)
        return self.scaled(posterior.sample() if self.sample_mask else posterior.mean)

    def conditions(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Vectors of the prompts and latent of the mask; a sample that loses its mask gets one of ignored pixels.

        Args:
            batch: `prompt` list of B str, `mask` (B, H, W) int64.
        Returns:
            `context` (B, L, D), `pooled` (B, P), `mask_latent` (B, C, h, w).
        """
        mask, prompts = batch["mask"], list(batch["prompt"])
        if self.training:
            drop = self.draw_drops(len(mask))
            prompts = ["" if lost else prompt for prompt, lost in zip(prompts, drop[0].tolist(), strict=True)]
            mask = mask.masked_fill(drop[1].to(mask.device)[:, None, None], self.class_table.ignore_index)
        context, pooled = self.encode_prompts(prompts, mask.device)
        return {"context": context, "pooled": pooled, "mask_latent": self.encode_mask_latent(mask)}

    def null_conditions(self, conditions: Mapping[str, Tensor],
                        drops: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Conditions without some of `prompt` and `mask` (see DiffusionMethod)."""
        drops = self.guidance_drops if drops is None else drops
        null, like = dict(conditions), conditions["mask_latent"]
        if "prompt" in drops:
            context, pooled = self.encode_prompts([""], like.device)
            null["context"] = context.expand_as(conditions["context"])
            null["pooled"] = pooled.expand_as(conditions["pooled"])
        if "mask" in drops:
            height, width = (side * self.first_stage_model.downsampling for side in like.shape[-2:])
            ignored = torch.full((1, height, width), self.class_table.ignore_index, device=like.device)
            null["mask_latent"] = self.encode_mask_latent(ignored).expand_as(like)
        return null

    def predict_noise(self, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor,
                      mask_latent: Tensor) -> Tensor:
        """Velocity (see DiffusionMethod and `conditions`)."""
        tensors = latent, context, pooled, mask_latent
        if not torch.is_autocast_enabled(latent.device.type):  # weights may be of 16 bits, as their file is
            dtype = self.network.mask_proj.weight.dtype
            if self.network.base.context_embedder.weight.dtype != dtype:
                raise UserError("model.params.frozen_dtype: weights of two precisions need mixed precision. Expected "
                                "lightning.trainer.precision=bf16-mixed. Set it, or frozen_dtype=null.")
            tensors = [tensor.to(dtype) for tensor in tensors]
        latent, context, pooled, mask_latent = tensors
        return self.network(latent, timestep.to(latent.device), context, pooled, mask_latent)
