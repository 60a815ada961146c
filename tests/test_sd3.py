"""The transformer with a mask stream: against the stock one and a restatement, its gradients, adapters, weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("diffusers")

from cldm.sd3 import MaskTransformer, merge_lora
from ldm.util import UserError
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.files import StoredTensor
from ldm.weights.sd35 import NETWORK, adopt, split_table
from scripts.make_tiny_sd35 import TRANSFORMER
from tests.tiny import randomize

FULL = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip


def make_inputs(batch: int = 2, height: int = 12, width: int = 16) -> tuple[Tensor, ...]:
    """Latent, timestep, context, pooled vector, latent of a mask."""
    draw = torch.Generator().manual_seed(3)
    sizes = ((batch, 4, height, width), (batch, 9, 64), (batch, 32), (batch, 4, height, width))
    latent, context, pooled, mask = (torch.randn(size, generator=draw) for size in sizes)
    return latent, torch.tensor([900.5, 31.0])[:batch], context, pooled, mask


def make_network(**options) -> MaskTransformer:
    return randomize(MaskTransformer(TRANSFORMER, **options)).eval()


def make_stock(network: MaskTransformer):
    from diffusers import SD3Transformer2DModel

    stock = SD3Transformer2DModel(**TRANSFORMER).eval()
    own = {name: value for name, value in network.base.state_dict().items() if name.split(".")[-1] not in (
        "columns", "rows")}  # fmt: skip
    missing, unexpected = stock.load_state_dict(own, strict=False)
    assert (missing, unexpected) == (["pos_embed.pos_embed"], [])
    return stock


@torch.no_grad()
def test_without_a_mask_it_is_the_stock_transformer():
    network = make_network()
    stock = make_stock(network)
    columns, rows = split_table(stock.state_dict()["pos_embed.pos_embed"])
    assert torch.equal(columns, network.base.pos_embed.columns) and torch.equal(rows, network.base.pos_embed.rows)
    assert "pos_embed.pos_embed" not in network.base.state_dict() and network.base.config.pos_embed_max_size == 24
    for size in ((12, 16), (48, 2)):
        latent, timestep, context, pooled, mask = make_inputs(2, *size)
        expected = stock(latent, context, pooled, timestep, return_dict=False)[0]
        assert torch.equal(network(latent, timestep, context, pooled), expected)
        tokens = network.base.pos_embed(latent).contiguous()
        nothing = tokens.new_zeros(2, 0, 32)
        assert torch.equal(network.run_blocks(tokens, nothing, timestep, context, pooled, size), expected)
        assert not torch.allclose(network(latent, timestep, context, pooled, mask), expected, atol=1e-2)
    with pytest.raises(UserError, match="25 x 1 patches. Expected at most 24"):
        network(torch.randn(1, 4, 50, 2), timestep[:1], context[:1], pooled[:1], torch.randn(1, 4, 50, 2))
    with pytest.raises(UserError, match="no product of rows and columns"):
        split_table(torch.randn(1, 16, 8))


def restated(network: MaskTransformer, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, mask: Tensor,
             use_image_modulation: bool) -> Tensor:
    """The equations once more, head by head and stream by stream, from the state_dict alone."""
    w = network.state_dict()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def heads(x: Tensor, name: str, normed: str | None) -> Tensor:
        x = linear(x, name).reshape(*x.shape[:2], 4, 8).permute(0, 2, 1, 3)
        return x if normed is None else rms(x, normed)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v
        return found.permute(0, 2, 1, 3).reshape(len(q), -1, 32)

    def feed(x: Tensor, first: str, second: str) -> Tensor:
        return linear(F.gelu(linear(x, first), approximate="tanh"), second)

    def patches(x: Tensor, name: str) -> Tensor:
        x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
        table = torch.cat([torch.cat([w["base.pos_embed.columns"][8 + j], w["base.pos_embed.rows"][9 + i]])[None]
                           for i in range(6) for j in range(8)])
        return x.flatten(2).transpose(1, 2) + table

    embedding = F.silu(network.base.time_text_embed(timestep, pooled))
    x, m, c = patches(latent, "base.pos_embed.proj"), patches(mask, "mask_proj"), linear(context,
                                                                                        "base.context_embedder")
    for i in range(3):
        block, own, is_last = f"base.transformer_blocks.{i}.", f"mask_blocks.{i}.", i == 2
        s1, a1, g1, s2, a2, g2, *dual = linear(embedding, block + "norm1.linear")[:, None].chunk(9 if i < 2 else 6, -1)
        modulation = linear(embedding, block + "norm1_context.linear")[:, None].chunk(2 if is_last else 6, -1)
        of_mask = linear(embedding, own + "norm1")[:, None].chunk(2 if is_last else 6, -1)
        nx = norm(x) * (1 + a1) + s1
        shift, scale = modulation[:2][::-1] if is_last else modulation[:2]  # scale comes first in the last block
        nc, nm = norm(c) * (1 + scale) + shift, norm(m) * (1 + of_mask[1]) + of_mask[0]
        q = [heads(nx, block + "attn.to_q", block + "attn.norm_q"),
             heads(nc, block + "attn.add_q_proj", block + "attn.norm_added_q")]
        if not is_last:
            q.append(heads(nm, own + "to_q", own + "norm_q"))
        k = [heads(nx, block + "attn.to_k", block + "attn.norm_k"),
             heads(nc, block + "attn.add_k_proj", block + "attn.norm_added_k"), heads(nm, own + "to_k", own + "norm_k")]
        v = [heads(nx, block + "attn.to_v", None), heads(nc, block + "attn.add_v_proj", None),
             heads(nm, own + "to_v", None)]
        found = attend(torch.cat(q, 2), torch.cat(k, 2), torch.cat(v, 2))
        ox, oc, om = found[:, :48], found[:, 48:57], found[:, 57:]
        if i < 2:
            n2 = norm(x) * (1 + dual[1]) + dual[0]
            x2 = attend(*(heads(n2, f"{block}attn2.to_{p}", f"{block}attn2.norm_{p}" if p != "v" else None)
                          for p in "qkv"))  # fmt: skip
            second = dual[2] * linear(x2, block + "attn2.to_out.0")
        x = x + g1 * linear(ox, block + "attn.to_out.0") + (second if i < 2 else 0)
        x = x + g2 * feed(norm(x) * (1 + a2) + s2, block + "ff.net.0.proj", block + "ff.net.2")
        if not is_last:
            c = c + modulation[2] * linear(oc, block + "attn.to_add_out")
            c = c + modulation[5] * feed(norm(c) * (1 + modulation[4]) + modulation[3], block + "ff_context.net.0.proj",
                                         block + "ff_context.net.2")
            m = m + of_mask[2] * linear(om, own + "to_out")
            s, a, g = (s2, a2, g2) if use_image_modulation else of_mask[3:]
            m = m + g * feed(norm(m) * (1 + a) + s, own + "ff.0", own + "ff.2")
    scale, shift = linear(embedding, "base.norm_out.linear")[:, None].chunk(2, -1)
    out = linear(norm(x) * (1 + scale) + shift, "base.proj_out").reshape(2, 6, 8, 2, 2, 4)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 12, 16)


@pytest.mark.parametrize("modulation", ["own", "image"])
@torch.no_grad()
def test_it_computes_the_equations(modulation: str):
    network = make_network(mlp_modulation=modulation).double()
    inputs = [value.double() for value in make_inputs()]
    network.base.time_text_embed.time_proj.float()
    expected = restated(network, *inputs, modulation == "image")
    assert torch.allclose(network(*inputs), expected, atol=1e-9)
    other = restated(network, *inputs, modulation == "own")
    assert not torch.allclose(other, expected, atol=1e-3)


def gradients(network: MaskTransformer, inputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    network.zero_grad()
    network(*inputs).square().mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}


def test_all_that_trains_has_a_gradient():
    network = make_network()
    kept = gradients(network, make_inputs())
    trained = {f"base.{name}" for name in network.image_parameters()}
    trained |= {name for name, _ in network.named_parameters() if name.startswith("mask_")}
    assert all(kept[name] is not None and kept[name].any() for name in trained)
    text = ("add_q_proj", "norm_added_q")  # nothing reads the text behind the last block
    assert {name for name, grad in kept.items() if not grad.any()} == {
        name for name in kept if name.startswith("base.transformer_blocks.2.attn.") and name.split(".")[4] in text}
    network.use_checkpoint = True
    again = gradients(network, make_inputs())
    assert all(torch.equal(again[name], grad) for name, grad in kept.items() if grad is not None)


def test_mask_tokens_start_as_image_tokens():
    network = make_network()
    torch.nn.init.zeros_(network.mask_proj.weight)
    network.start_mask_stream()
    latent, timestep, context, pooled, _ = make_inputs()
    block, stream = network.base.transformer_blocks[0], network.mask_blocks[0]
    tokens = network.base.pos_embed(latent)
    assert torch.equal(tokens, network.base.pos_embed.embed(latent, network.mask_proj))
    embedding = network.base.time_text_embed(timestep, pooled)
    normed, gate, *rest = block.norm1(tokens, emb=embedding)[:5]
    own = stream.modulate(tokens, embedding)
    assert torch.allclose(own[0], normed, atol=1e-5) and torch.allclose(own[1][:, 0], gate, atol=1e-5)
    assert all(torch.allclose(a[:, 0], b, atol=1e-5) for a, b in zip(own[2:], rest, strict=True))
    before = [p.clone() for p in network.mask_parameters()]
    randomize(network.base, 0.1)
    network.start_mask_stream()  # it has weights already
    assert all(torch.equal(a, b) for a, b in zip(before, network.mask_parameters(), strict=True))
    fresh = MaskTransformer(TRANSFORMER, init="random")
    assert not fresh.mask_proj.weight.any()
    fresh.start_mask_stream()
    assert fresh.mask_proj.weight.any() and not torch.equal(fresh.mask_proj.weight, fresh.base.pos_embed.proj.weight)


def test_adapters_start_at_zero_and_can_be_merged(tmp_path: Path):
    pytest.importorskip("peft")
    network = make_network(use_checkpoint=True)
    inputs = make_inputs()
    before = network(*inputs).detach()
    plain = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(0)
    network.add_lora(4)
    assert torch.equal(network(*inputs), before)
    names = [name for name, _ in network.named_parameters() if ".lora_" in name]
    assert len(names) == 2 * (3 * 4 + 2 * 4 + 3 * 2) and not any("mask" in name or "add_" in name for name in names)
    found = gradients(network, inputs)
    assert all(found[name] is not None for name in names)
    assert all(found[name].any() for name in names if "lora_B" in name)
    for parameter in network.lora_parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    tuned = network(*inputs).detach()
    assert not torch.allclose(tuned, before, atol=1e-3)
    merged = MaskTransformer(TRANSFORMER).eval()
    merged.load_state_dict(merge_lora(network.state_dict()))
    assert torch.allclose(merged(*inputs), tuned, atol=1e-5) and set(merged.state_dict()) == set(plain)
    network.base.save_lora_adapter(tmp_path, "crfm")  # the file that other programs read
    other = MaskTransformer(TRANSFORMER).eval()
    other.load_state_dict(plain)
    other.base.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(other(*inputs), tuned)


def upstream_state(network: MaskTransformer) -> dict[str, Tensor]:
    """What the public code saves of such a network: trained weights under its names, the last block whole."""
    result = {}
    for i, (block, stream) in enumerate(zip(network.base.transformer_blocks, network.mask_blocks, strict=True)):
        place = f"mmdit_blocks.{i}."
        pairs = [("sd3_block.norm1.linear", block.norm1.linear), ("sd3_block.ff.net.0.proj", block.ff.net[0].proj),
                 ("sd3_block.ff.net.2", block.ff.net[2])]
        for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"):
            pairs += [(f"attn.sd3_attn.{name}", block.attn.get_submodule(name))]
            pairs += [(f"attn2.{name}", block.attn2.get_submodule(name))] if block.use_dual_attention else []
            own = name.removesuffix(".0")
            lost = torch.nn.Linear(32, 32) if own != "norm_q" else type(stream.norm_k)(8, 1e-6)
            pairs += [(f"attn.{name}", getattr(stream, own, lost))]
        if stream.is_last:
            pairs += [("ff.net.0.proj", torch.nn.Linear(32, 128)), ("ff.net.2", torch.nn.Linear(128, 32))]
        else:
            pairs += [("ff.net.0.proj", stream.ff[0]), ("ff.net.2", stream.ff[2])]
        for name, module in pairs:
            result |= {f"{place}{name}.{leaf}": value for leaf, value in module.state_dict().items()}
        for leaf, value in stream.norm1.state_dict().items():
            rest = value.new_zeros(6 * 32 - len(value), *value.shape[1:])
            result[f"{place}norm1.linear.{leaf}"] = torch.cat([value, rest])
    for name, module in (("sd3_transformer.pos_embed.proj", network.base.pos_embed.proj),
                         ("sd3_transformer.norm_out.linear", network.base.norm_out.linear),
                         ("sd3_transformer.proj_out", network.base.proj_out),
                         ("msk_pos_embed.proj", network.mask_proj)):
        result |= {f"{name}.{leaf}": value for leaf, value in module.state_dict().items()}
    return result


def test_weights_of_the_public_code_find_their_places():
    network = make_network()
    state = upstream_state(network)
    assert len(state) == 16 * 3 + 10 * 2 + 16 * 3 + 8  # 906 with 24 blocks of which 13 have dual attention
    stored = {name: StoredTensor(tuple(v.shape), v.dtype, lambda v=v: v) for name, v in state.items()}
    found, notes = adopt(stored)
    own = {f"{NETWORK}{name}": value for name, value in network.state_dict().items()}
    trained = {f"{NETWORK}base.{name}" for name in network.image_parameters()}
    trained |= {name for name in own if name.startswith(f"{NETWORK}mask_")}
    assert set(found) == trained and "set aside 9 of the last block" in notes[0]
    assert all(torch.equal(value.read(), own[name]) and value.shape == tuple(own[name].shape)
               for name, value in found.items())
    others = {f"{NETWORK}mask_proj.weight": stored["msk_pos_embed.proj.weight"]}
    assert adopt(others) == (others, [])


def test_a_folder_of_sd35_fills_transformer_and_autoencoder(tmp_path: Path):
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from ldm.modules import autoencoder
    from ldm.modules.blocks import set_norm_groups
    from scripts.make_tiny_sd35 import VAE

    torch.manual_seed(0)
    stock, vae = SD3Transformer2DModel(**TRANSFORMER), AutoencoderKL(**VAE).eval()
    stock.pos_embed.pos_embed.copy_(stock.pos_embed.pos_embed.bfloat16())  # a table as files of 16 bits have it
    stock.save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "text_encoder").mkdir()
    tensors = {name: stored.read() for name, stored in open_checkpoint(tmp_path).tensors.items()}
    alone = open_checkpoint(tmp_path / "transformer").tensors
    assert set(alone) == {name for name in tensors if name.startswith(NETWORK)}
    network = MaskTransformer(TRANSFORMER).eval()
    missing, unexpected = network.load_state_dict(
        {name.removeprefix(NETWORK): v for name, v in tensors.items() if name.startswith(NETWORK)}, strict=False)
    assert not unexpected and all(name.startswith("mask_") for name in missing)
    latent, timestep, context, pooled, _ = make_inputs()
    with torch.no_grad():
        assert torch.equal(network(latent, timestep, context, pooled),
                           stock(latent, context, pooled, timestep, return_dict=False)[0])
        ours = autoencoder.AutoencoderKL(ch=8, ch_mult=[1, 1, 2, 2], num_res_blocks=1, use_quant=False).eval()
        set_norm_groups(ours, 4)
        ours.load_state_dict({name.removeprefix("first_stage_model."): v for name, v in tensors.items()
                              if not name.startswith(NETWORK)})
        image = torch.rand(1, 3, 32, 32) * 2 - 1
        posterior, theirs = ours.encode(image), vae.encode(image).latent_dist
        assert torch.allclose(posterior.mean, theirs.mean, atol=1e-5)
        assert torch.allclose(ours.decode(theirs.mean), vae.decode(theirs.mean).sample, atol=1e-5)


def test_sizes_of_the_real_model():
    with torch.device("meta"):
        network = MaskTransformer(FULL)
    count = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    assert count(network.base.parameters()) == 2_243_171_520
    assert count(network.image_parameters().values()) == 1_239_529_152
    # 33,047,104 less than with a last block like the others, as the public code has it.
    assert count(network.mask_parameters()) == 986_824_640 == 1_019_871_744 - 33_047_104
    pytest.importorskip("peft")
    network.add_lora(16)
    names = {name.partition(".lora_")[0] for name, _ in network.named_parameters() if ".lora_" in name}
    assert len(names) == 196 and count(network.lora_parameters()) == 13_172_736
