"""How upstream samples, written anew as the other side of a comparison; no part of the product uses it.

The semantics are upstream's: attention as two matrix products with the scores in float32 and a softmax between them
(what it does without xformers), two passes of the network in each step of guidance, and nothing kept between steps:
the stems of mask and reference and the keys and values of the text are computed in each of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from cldm.control import ControlBranch
from cldm.tisynth import TISynth
from ldm.modules.attention import CrossAttention
from ldm.modules.autoencoder import ConvAttention


def naive_cross_attention(layer: CrossAttention, query: Tensor, context: Tensor | None = None) -> Tensor:
    """(B, N, C) and (B, M, D) -> (B, N, C) with all scores in memory at once."""
    source = query if context is None else context

    def heads_first(x: Tensor) -> Tensor:
        return layer.split_heads(x).flatten(0, 1).contiguous()  # (B * heads, N, d)

    q, k, v = heads_first(layer.to_q(query)), heads_first(layer.to_k(source)), heads_first(layer.to_v(source))
    with torch.autocast("cuda", enabled=False):
        scores = torch.einsum("bnd,bmd->bnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    del q, k
    out = torch.einsum("bnm,bmd->bnd", scores.softmax(-1).to(v.dtype), v)
    out = out.unflatten(0, (-1, layer.heads)).transpose(1, 2).flatten(2)
    return layer.to_out(out)


def naive_conv_attention(layer: ConvAttention, h: Tensor) -> Tensor:
    """The autoencoder's attention with all scores in memory at once, (B, C, h, w) -> the same."""
    normed = layer.norm(h)
    q, k, v = layer.q(normed).flatten(2), layer.k(normed).flatten(2), layer.v(normed).flatten(2)  # (B, C, N)
    weights = (torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5).softmax(-1)
    return h + layer.proj_out(torch.bmm(v, weights.transpose(1, 2)).unflatten(2, h.shape[-2:]))


@contextmanager
def attention_of(kind: str) -> Iterator[None]:
    """Within it, all networks attend in the `naive` way, or by `sdpa` as ours do."""
    if kind == "sdpa":
        yield
        return
    with mock.patch.object(CrossAttention, "forward", naive_cross_attention), \
            mock.patch.object(ConvAttention, "forward", naive_conv_attention):
        yield


def predict(method: TISynth, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """One pass of the network with upstream's coupling: features are handed over behind their projections, then pop."""
    unet, context = method.model.diffusion_model, conditions["context"]

    def project(branch: ControlBranch, hint: Tensor) -> list[Tensor]:
        stem, embedding = branch.input_hint_block(hint), branch.embed_timestep(timestep)
        features, h = [], None
        for conv, h in zip(branch.zero_convs, branch.encode(latent, embedding, context, stem), strict=True):
            features.append(conv(h))
        return [*features, branch.middle_block_out(branch.middle_block(h, embedding, context=context))]

    hints = project(method.control_model, conditions["hint"])
    references = project(method.ssl_stage_model, conditions["reference_latent"])
    embedding = unet.embed_timestep(timestep)
    skips = list(unet.encode(latent, embedding, context))
    h = unet.middle_block(skips[-1], embedding, context=context, hint=hints.pop(), reference=references.pop())
    for block in unet.output_blocks:
        h = block(torch.cat([h, skips.pop()], dim=1), embedding, context=context, hint=hints.pop(),
                  reference=references.pop())
    return unet.out(h)


@torch.no_grad()
def sample_latent(method: TISynth, conditions: Mapping[str, Tensor], null: Mapping[str, Tensor], noise: Tensor,
                  num_steps: int = 50, guidance_scale: float = 9.0, attention: str = "naive") -> Tensor:
    """DDIM with guidance of `conditions` against `null`.

    Args:
        method: with upstream's coupling and prediction type epsilon.
        conditions, null: `context`, `hint`, `reference_latent`.
        noise: (B, C, h, w) float32.
        num_steps: steps, T // num_steps apart, as upstream spaces them.
        guidance_scale: weight of the conditions.
        attention: `naive` or `sdpa`.

    Returns:
        Latent, (B, C, h, w) float32.
    """
    alphas = method.alphas_cumprod.float()
    steps = torch.arange(0, len(alphas), len(alphas) // num_steps) + 1
    previous = torch.cat([torch.zeros(1, dtype=torch.long), steps[:-1]])
    latent = noise
    with attention_of(attention):
        for step, before in zip(steps.flip(0), previous.flip(0), strict=True):
            timestep = torch.full((len(noise),), int(step), device=noise.device)
            wanted = predict(method, latent, timestep, conditions).float()
            unwanted = predict(method, latent, timestep, null).float()
            noise_pred = unwanted + guidance_scale * (wanted - unwanted)
            alpha, alpha_before = alphas[step], alphas[before]
            clean = (latent - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
            latent = alpha_before.sqrt() * clean + (1 - alpha_before).sqrt() * noise_pred
    return latent
