"""The transformer of Stable Diffusion 3.5 with a third stream of tokens, the mask's, beside image and text."""
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.blocks import zero_module
from ldm.util import UserError

MLP_MODULATIONS, INITS = ("own", "image"), ("image", "random")
# Parts of the stock transformer that see text or time; CRFM leaves them as they are.
TEXT_PARTS = ("time_text_embed.", "context_embedder.", ".norm1_context.", ".add_q_proj.", ".add_k_proj.",
              ".add_v_proj.", ".to_add_out.", ".norm_added_q.", ".norm_added_k.", ".ff_context.")
LORA_TARGETS = r"transformer_blocks\.\d+\.(attn2?\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
ADAPTER = "crfm"


class PatchEmbedding(nn.Module):
    """Patches of a latent as tokens, with the position of each added; in the place of the stock one.

    The stock table of all positions has 226 M values at SD3.5's size, though it is made of two short ones: half of a
    token's vector follows from its column, half from its row.

    Args:
        proj: convolution of the patches.
        table_size: rows and columns of the stock table; smaller latents take its centre.
        base_size: patches that stand for one unit of length each.
    """

    def __init__(self, proj: nn.Conv2d, table_size: int, base_size: int) -> None:
        super().__init__()
        self.proj, self.table_size = proj, table_size
        positions = torch.arange(table_size, dtype=torch.float32) / (table_size / base_size)
        values = sincos(positions, proj.out_channels // 2)
        self.register_buffer("columns", values)  # (S, D / 2)
        self.register_buffer("rows", values.clone())  # of their own: files may have others

    def positions(self, height: int, width: int) -> Tensor:
        """Vectors of all positions of a grid of patches: (1, height * width, D), row by row.

        Raises:
            UserError: if the grid is larger than the table.
        """
        if max(height, width) > self.table_size:
            raise UserError(f"image size: {height} x {width} patches. Expected at most {self.table_size} each way, as "
                            "the model's table of positions has. Choose a smaller size.")
        top, left = ((self.table_size - side) // 2 for side in (height, width))
        columns = self.columns[None, left:left + width].expand(height, -1, -1)
        rows = self.rows[top:top + height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None]

    def embed(self, latent: Tensor, proj: nn.Module) -> Tensor:
        """Tokens of a latent through a projection of its own: (B, C, h, w) -> (B, N, D)."""
        tokens = proj(latent)
        positions = self.positions(*tokens.shape[-2:])
        tokens = tokens.flatten(2).transpose(1, 2)
        return (tokens + positions).to(tokens.dtype)

    def forward(self, latent: Tensor) -> Tensor:
        """Tokens of an image latent: (B, C, h, w) -> (B, N, D)."""
        return self.embed(latent, self.proj)


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines of positions (M,) at `width / 2` frequencies: (M, width) float32, computed in float64.

    Source: Vaswani et al. 2017, section 3.5.
    """
    count = width // 2
    frequencies = 1.0 / 10000 ** (torch.arange(count, dtype=torch.float64, device=positions.device) / count)
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class MaskStream(nn.Module):
    """Weights of the mask's tokens in one block.

    Args:
        width: D of all streams.
        heads: of the attention.
        is_last: behind the last block the mask's tokens are dropped: only what makes keys and values is there.
    """

    def __init__(self, width: int, heads: int, is_last: bool) -> None:
        super().__init__()
        from diffusers.models.normalization import RMSNorm

        self.heads, self.is_last = heads, is_last
        self.norm1 = nn.Linear(width, width * (2 if is_last else 6))  # shift, scale (, gate, shift, scale, gate)
        self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_k = RMSNorm(width // heads, eps=1e-6)
        if not is_last:
            self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
            self.norm_q = RMSNorm(width // heads, eps=1e-6)
            self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, block: nn.Module, *tokens: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One block of all three streams (see joint_block); what torch.compile takes as a whole."""
        return joint_block(block, self, *tokens)

    def modulate(self, tokens: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        """Normed tokens (B, M, D), and with more to come the gate of the attention, shift, scale, gate of the ff."""
        shift, scale, *rest = self.norm1(F.silu(embedding))[:, None].chunk(2 if self.is_last else 6, dim=-1)
        return normalise(tokens) * (1 + scale) + shift, *rest

    @torch.no_grad()
    def copy_image_stream(self, block: nn.Module) -> None:
        """Start from the image stream of the same block, so that mask tokens are in distribution from the start."""
        linear = block.norm1.linear  # its first six parts are those of attention and ff, also with dual attention
        pairs = [(self.to_k, block.attn.to_k), (self.to_v, block.attn.to_v), (self.norm_k, block.attn.norm_k)]
        if not self.is_last:
            pairs += [(self.to_q, block.attn.to_q), (self.to_out, block.attn.to_out[0]),
                      (self.norm_q, block.attn.norm_q), (self.ff[0], block.ff.net[0].proj),
                      (self.ff[2], block.ff.net[2])]
        for own, other in pairs:
            for name, parameter in own.named_parameters():
                parameter.copy_(getattr(other, name))
        self.norm1.weight.copy_(linear.weight[:len(self.norm1.weight)])
        self.norm1.bias.copy_(linear.bias[:len(self.norm1.bias)])


def normalise(tokens: Tensor) -> Tensor:
    """Layer norm without weights over the last axis."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


class MaskTransformer(nn.Module):
    """Velocity of a noised image latent, given text and the latent of a mask.

    The stock transformer of diffusers does the work, `base`; without a mask it is called as it is. With a mask, a block
    attends over the tokens of image, text and mask together, and each stream has its own projections.

    Args:
        transformer: arguments of diffusers' SD3Transformer2DModel (its config.json).
        mlp_modulation: whose shift, scale and gate the mask's feed-forward takes: `own`, or `image`, as the public code
            of CRFM does by a slip; only to use weights that were trained so.
        init: weights of the mask stream at the start of a training: `image` (those of the image stream) or `random`.
            Until start_mask_stream its projection of patches is zero, which no trained one is.
        use_checkpoint: keep only the inputs of blocks for the gradient and compute the rest again.
    """

    def __init__(self, transformer: Mapping[str, Any], mlp_modulation: str = "own", init: str = "image",
                 use_checkpoint: bool = False) -> None:
        super().__init__()
        from diffusers import SD3Transformer2DModel

        for name, value, known in (("mlp_modulation", mlp_modulation, MLP_MODULATIONS), ("init", init, INITS)):
            if value not in known:
                raise UserError(f"{name}: {value!r} is unknown. Expected one of {', '.join(known)}.")
        sizes = {"patch_size": 2, "sample_size": 128, "pos_embed_max_size": 96, **transformer}
        table, patch = sizes["pos_embed_max_size"], sizes["patch_size"]
        # Built with a table of one position: the stock one would take gigabytes while it is computed.
        self.base = SD3Transformer2DModel(**{**sizes, "sample_size": patch, "pos_embed_max_size": 1})
        self.base.register_to_config(sample_size=sizes["sample_size"], pos_embed_max_size=table)
        self.base.pos_embed = PatchEmbedding(self.base.pos_embed.proj, table, sizes["sample_size"] // patch)
        self.mlp_modulation, self.init, self.use_checkpoint = mlp_modulation, init, use_checkpoint
        width, blocks = self.base.inner_dim, self.base.transformer_blocks
        self.mask_proj = nn.Conv2d(self.base.config.in_channels, width, patch, stride=patch)
        self.mask_blocks = nn.ModuleList(
            MaskStream(width, self.base.config.num_attention_heads, block is blocks[-1]) for block in blocks)
        zero_module(self.mask_proj)

    @property
    def patch_size(self) -> int:
        """Latent pixels along the edge of a token."""
        return self.base.config.patch_size

    @torch.no_grad()
    def start_mask_stream(self) -> None:
        """Give the mask stream its first weights (see init), unless it has some already."""
        if self.mask_proj.weight.any():
            return
        if self.init == "random":
            self.mask_proj.reset_parameters()
        else:
            for stream, block in zip(self.mask_blocks, self.base.transformer_blocks, strict=True):
                stream.copy_image_stream(block)
            self.mask_proj.load_state_dict(self.base.pos_embed.proj.state_dict())

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor,
                mask_latent: Tensor | None = None) -> Tensor:
        """Velocity (B, C, h, w).

        Args:
            latent: noised image latent, (B, C, h, w).
            timestep: (B,) float, 1000 times the noise level.
            context, pooled: vectors of the prompt's tokens (B, L, joint_attention_dim), and (B, pooled_projection_dim).
            mask_latent: (B, C, h, w) latent of the mask's image; None = without a mask.
        """
        base = self.base
        if mask_latent is None:
            return base(latent, context, pooled, timestep, return_dict=False)[0]
        image = base.pos_embed(latent).contiguous()
        mask = base.pos_embed.embed(mask_latent, self.mask_proj).contiguous()
        return self.run_blocks(image, mask, timestep, context, pooled, latent.shape[-2:])

    def run_blocks(self, image: Tensor, mask: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor,
                   size: tuple[int, int]) -> Tensor:
        """Velocity (B, C, h, w) from tokens of image (B, N, D) and mask (B, M, D); `size` = (h, w)."""
        base = self.base
        embedding, text = base.time_text_embed(timestep, pooled), base.context_embedder(context)
        for block, stream in zip(base.transformer_blocks, self.mask_blocks, strict=True):
            arguments = (block, image, text, mask, embedding, self.mlp_modulation == "image")
            if self.use_checkpoint and torch.is_grad_enabled():
                image, text, mask = checkpoint(stream, *arguments, use_reentrant=False)
            else:
                image, text, mask = stream(*arguments)
        tokens = base.proj_out(base.norm_out(image, embedding))
        patch, (height, width) = self.patch_size, size
        tokens = tokens.reshape(len(tokens), height // patch, width // patch, patch, patch, base.out_channels)
        return torch.einsum("nhwpqc->nchpwq", tokens).reshape(len(tokens), base.out_channels, height, width)

    def image_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the base that image tokens pass through alone, by name; the rest sees text or time."""
        return {name: p for name, p in self.base.named_parameters()
                if not any(part in f".{name}" for part in TEXT_PARTS)}

    def mask_parameters(self) -> list[nn.Parameter]:
        """Parameters of the mask stream."""
        return [*self.mask_proj.parameters(), *self.mask_blocks.parameters()]

    def add_lora(self, rank: int) -> None:
        """Put low-rank adapters (Hu et al. 2021), which start at zero effect, beside the image stream's matrices.

        Their targets are renamed: load weights before this.
        """
        from peft import LoraConfig

        self.base.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                         target_modules=LORA_TARGETS), ADAPTER)

    def lora_parameters(self) -> list[nn.Parameter]:
        """Parameters of the adapters."""
        return [p for name, p in self.base.named_parameters() if ".lora_" in name]


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without adapters: each adapted matrix plus B A, for adapters of add_lora, whose alpha is their rank.

    Args:
        state: state_dict with or without adapters, whatever stands in front of its names.
    """
    result = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if f".lora_A.{ADAPTER}." in name:
            target = name.replace(f".lora_A.{ADAPTER}.", ".")
            change = state[name.replace(".lora_A.", ".lora_B.")].float() @ down.float()
            result[target] = (result[target].float() + change).to(result[target].dtype)
    return result


def joint_block(block: nn.Module, stream: MaskStream, image: Tensor, text: Tensor, mask: Tensor, embedding: Tensor,
                use_image_modulation: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One block of three streams.

    Args:
        block: diffusers' JointTransformerBlock.
        stream: the mask's weights.
        image, text, mask: tokens, (B, N, D), (B, L, D), (B, M, D).
        embedding: of timestep and pooled prompt, (B, D).
        use_image_modulation: see MaskTransformer.mlp_modulation.
    Returns:
        The three; text and mask are None behind the last block, where nothing needs them.
    """
    attention, is_dual = block.attn, block.use_dual_attention
    normed, gate, shift_ff, scale_ff, gate_ff, *dual = block.norm1(image, emb=embedding)
    if block.context_pre_only:
        normed_text, text_gates = block.norm1_context(text, embedding), ()
    else:
        normed_text, *text_gates = block.norm1_context(text, emb=embedding)
    normed_mask, *mask_gates = stream.modulate(mask, embedding)

    heads = attention.heads
    sources = [
        (normed, attention.to_q, attention.to_k, attention.to_v, attention.norm_q, attention.norm_k),
        (normed_text, attention.add_q_proj, attention.add_k_proj, attention.add_v_proj, attention.norm_added_q,
         attention.norm_added_k),
        (normed_mask, None if stream.is_last else stream.to_q, stream.to_k, stream.to_v,
         None if stream.is_last else stream.norm_q, stream.norm_k),
    ]
    queries = [project(tokens, to_q, norm, heads) for tokens, to_q, _, _, norm, _ in sources if to_q is not None]
    keys = [project(tokens, to_k, norm, heads) for tokens, _, to_k, _, _, norm in sources]
    values = [project(tokens, to_v, None, heads) for tokens, _, _, to_v, _, _ in sources]
    queries, keys, values = (torch.cat(parts, dim=2) for parts in (queries, keys, values))
    found = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2).to(queries.dtype)
    from_image, from_text, from_mask = found.tensor_split([image.shape[1], image.shape[1] + text.shape[1]], dim=1)

    image = image + gate[:, None] * attention.to_out[1](attention.to_out[0](from_image))
    if is_dual:
        image = image + dual[1][:, None] * block.attn2(hidden_states=dual[0])
    image = image + gate_ff[:, None] * block.ff(block.norm2(image) * (1 + scale_ff[:, None]) + shift_ff[:, None])
    if block.context_pre_only:
        return image, None, None
    text_gate, text_shift, text_scale, text_gate_ff = (part[:, None] for part in text_gates)
    text = text + text_gate * attention.to_add_out(from_text)
    text = text + text_gate_ff * block.ff_context(block.norm2_context(text) * (1 + text_scale) + text_shift)
    mask_gate, *mask_ff = mask_gates
    shift, scale, gate_mask = (p[:, None] for p in (shift_ff, scale_ff, gate_ff)) if use_image_modulation else mask_ff
    mask = mask + mask_gate * stream.to_out(from_mask)
    return image, text, mask + gate_mask * stream.ff(normalise(mask) * (1 + scale) + shift)


def project(tokens: Tensor, layer: nn.Module, norm: nn.Module | None, heads: int) -> Tensor:
    """Queries, keys or values of tokens: (B, N, D) -> (B, heads, N, D / heads)."""
    projected = layer(tokens).unflatten(-1, (heads, -1)).transpose(1, 2)
    return projected if norm is None else norm(projected)
