"""Names of weights: files of other origin to ours, and the Stable Diffusion parts to diffusers' names and back."""
import re
from collections.abc import Iterable, Mapping

from ldm.util import UserError

# Part of a diffusers folder -> prefix of its weights in our (CompVis') layout.
PARTS = {"unet": "model.diffusion_model.", "controlnet": "control_model.", "vae": "first_stage_model.",
         "text_encoder": "cond_stage_model.transformer."}
TEXT = PARTS["text_encoder"]
OUR_PREFIXES = (*PARTS.values(), "ssl_stage_model.", "network.")
WRAPPERS = ("module.", "method.", "_orig_mod.")
BRANCH_STARTS = ("time_embed.", "input_blocks.", "middle_block.", "input_hint_block.", "zero_convs.",
                 "middle_block_out.")
UNET_STARTS = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
VAE_STARTS = ("encoder.conv_", "encoder.down.", "encoder.mid.", "encoder.norm_out.", "decoder.", "quant_conv.",
              "post_quant_conv.")
CLIP_STARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
DIFFUSERS_SIGNS = {"controlnet": "controlnet_cond_embedding.", "vae": "encoder.down_blocks.", "unet": "up_blocks."}
# reason -> pattern of names that no network of ours has
SET_ASIDE = {
    "position ids, which are counted anew": re.compile(r"(.*\.)?position_ids"),
    "the image side of CLIP": re.compile(
        r"(cond_stage_model\.transformer\.)?(vision_model|visual_projection|text_projection|logit_scale)(\..*)?"),
    "training losses": re.compile(r"(first_stage_model\.)?loss\..*"),
}
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
VAE_LAYERS = {"nin_shortcut": "conv_shortcut", "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
              "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


OPEN_CLIP = "cond_stage_model.model."  # SD2's text encoder in files of its authors
OPEN_CLIP_NAMES = {"token_embedding.weight": "embeddings.token_embedding.weight",
                   "positional_embedding": "embeddings.position_embedding.weight",
                   "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}
OPEN_CLIP_LAYERS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
                    "attn.out_proj": "self_attn.out_proj"}


def rename_open_clip(names: dict[str, str]) -> str:
    """Give open_clip's text encoder the names of CLIP's, in place; the last block, which SD2 does not use, goes.

    Args:
        names: our name -> name in the file. The three parts of a joint projection have the same name in the file.
    Returns:
        A note, empty if there is none in the file.
    """
    found = {name: key for name, key in names.items() if name.startswith(OPEN_CLIP)}
    last = largest((name[len(OPEN_CLIP):] for name in found), r"transformer\.resblocks\.(\d+)\.")
    left_out = 0
    for name, key in found.items():
        del names[name]
        inner = name[len(OPEN_CLIP):]
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", inner)
        if inner in OPEN_CLIP_NAMES:
            ours = [OPEN_CLIP_NAMES[inner]]
        elif match and int(match[1]) < last:
            layers = [f"self_attn.{part}_proj" for part in "qkv"] if match[2] == "attn.in_proj" else [
                OPEN_CLIP_LAYERS.get(match[2], match[2])]
            ours = [f"encoder.layers.{match[1]}.{layer}.{match[3]}" for layer in layers]
        else:
            left_out += 1
            continue
        for one in ours:
            add_name(names, f"{TEXT}text_model.{one}", key)
    return f"set aside {left_out}: the last block and the rest of open_clip that SD2 does not use" if found else ""


def to_our_names(keys: Iterable[str], known: Iterable[str] = (),
                 use_ema: bool = False) -> tuple[dict[str, str], list[str]]:
    """Find out what the tensors of a file are called here.

    Args:
        keys: names in the file.
        known: names of the network that is filled; restores the dots of averaged weights where the file cannot.
        use_ema: take averaged weights (`model_ema.`) in the place of the plain ones. They are taken anyway where the
            file has no others.
    Returns:
        Our name -> name in the file, and notes on what was set aside or renamed.
    Raises:
        UserError: if two tensors get one name, or averaged weights are asked for and there are none.
    """
    names: dict[str, str] = {}
    notes: list[str] = []
    for key in keys:
        name = key
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        add_name(names, name, key)
    for reason, pattern in SET_ASIDE.items():
        found = [name for name in names if pattern.fullmatch(name)]
        for name in found:
            del names[name]
        notes += [f"set aside {len(found)}: {reason}"] if found else []
    notes += [note] if (note := rename_open_clip(names)) else []
    averaged = {name: names.pop(name) for name in list(names) if name.startswith("model_ema.")}
    names = add_prefixes(names)
    if averaged or use_ema:
        notes.append(merge_ema(names, averaged, known, use_ema))
    return names, notes


def add_name(names: dict[str, str], name: str, key: str) -> None:
    """Enter a name; UserError if another tensor has it."""
    if name in names:
        raise UserError(f"checkpoint: {names[name]} and {key} are the same tensor ({name}). Expected one of them.")
    names[name] = key


def add_prefixes(names: Mapping[str, str]) -> dict[str, str]:
    """Give tensors of a single network the prefix that it has in a whole model (see to_our_names)."""
    bare = [name for name in names if not name.startswith(OUR_PREFIXES)]
    for part, sign in DIFFUSERS_SIGNS.items():
        if any(name.startswith(sign) for name in bare):
            renamed = from_diffusers(part, bare)
            break
    else:
        is_branch = any(name.startswith(("input_hint_block.", "zero_convs.")) for name in bare)
        renamed = {name: place_bare(name, is_branch) for name in bare}
    result: dict[str, str] = {}
    for name, key in names.items():
        new = renamed.get(name, name)
        if new.startswith(TEXT) and new[len(TEXT):].startswith(CLIP_STARTS):
            new = f"{TEXT}text_model.{new[len(TEXT):]}"
        add_name(result, new, key)
    return result


def place_bare(name: str, is_branch: bool) -> str:
    """Full name of a tensor that has no prefix; the name itself where it is not known."""
    if is_branch and name.startswith(BRANCH_STARTS):
        return PARTS["controlnet"] + name
    if name.startswith(UNET_STARTS):
        return PARTS["unet"] + name
    if name.startswith("diffusion_model."):
        return "model." + name
    if name.startswith("transformer.text_model."):
        return "cond_stage_model." + name
    if name.startswith("text_model."):
        return TEXT + name
    if name.startswith(CLIP_STARTS):
        return f"{TEXT}text_model.{name}"
    return PARTS["vae"] + name if name.startswith(VAE_STARTS) else name


def merge_ema(names: dict[str, str], averaged: dict[str, str], known: Iterable[str], use_ema: bool) -> str:
    """Put averaged weights in the place of the plain ones where asked or where there are no plain ones.

    Latent diffusion's averages are called `model_ema.` and the name of the parameter without its dots.

    Args:
        names: our name -> name in the file; changed.
        averaged: the same of the averages.
        known, use_ema: see to_our_names.
    Returns:
        A note.
    """
    candidates = {name for name in (*names, *known) if name.startswith("model.")}
    full: dict[str, str] = {}
    for name in sorted(candidates):
        full.setdefault("model_ema." + name.removeprefix("model.").replace(".", ""), name)
    matched = {full[name]: key for name, key in averaged.items() if name in full}
    rest = [name for name in averaged if name not in full and name not in ("model_ema.decay", "model_ema.num_updates")]
    has_plain = any(name.startswith(PARTS["unet"]) for name in names)
    if not use_ema and has_plain:
        return (f"set aside {len(averaged)}: averaged weights (the plain ones are taken; convert_checkpoint.py --ema "
                "takes these)")
    if not matched or rest:
        raise UserError(f"checkpoint: of {len(averaged)} averaged weights (model_ema.) {len(matched)} have a name here "
                        f"({', '.join(rest[:2]) or 'there are none'}). Leave out --ema, or give the fitting --config.")
    names.update(matched)
    return f"took {len(matched)} averaged weights (model_ema.)"


def to_diffusers(part: str, names: Iterable[str]) -> dict[str, str]:
    """Names of one part in diffusers' layout.

    Args:
        part: a key of PARTS.
        names: our names without the part's prefix.
    Returns:
        Our name -> diffusers' name; names without a counterpart (all-in-attention) are left out.
    """
    names = [name for name in names if "trainable" not in name]
    if part == "text_encoder":
        return {name: name for name in names}
    if part == "vae":
        pairs, inner = vae_pairs(1 + largest(names, r"encoder\.down\.(\d+)\.")), VAE_LAYERS
    else:
        downs = [int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name))]
        blocks = min(downs) - 1 if downs else largest(names, r"input_blocks\.(\d+)\.")
        attending = {int(m[1]) // (blocks + 1)
                     for name in names if (m := re.match(r"output_blocks\.(\d+)\.1\.norm", name))}
        pairs, inner = unet_pairs(len(downs) + 1, blocks, attending), RESNET
    return translate(names, pairs, inner)


def from_diffusers(part: str, names: Iterable[str]) -> dict[str, str]:
    """Our full names of one part's tensors.

    Args:
        part: a key of PARTS.
        names: names in the files of the part, as diffusers and transformers write them.
    Returns:
        Their name -> our name with prefix; names that are not understood get the prefix only.
    """
    names = list(names)
    if part == "text_encoder":
        return {name: TEXT + (f"text_model.{name}" if name.startswith(CLIP_STARTS) else name) for name in names}
    if part == "vae":
        pairs = vae_pairs(1 + largest(names, r"encoder\.down_blocks\.(\d+)\."))
        inner = {theirs: ours for ours, theirs in VAE_LAYERS.items()}
        inner |= {old: inner[new] for old, new in OLD_VAE_ATTENTION.items()}
    else:
        blocks = 1 + largest(names, r"down_blocks\.0\.resnets\.(\d+)\.")
        attending = {int(m[1]) for name in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        pairs = unet_pairs(1 + largest(names, r"down_blocks\.(\d+)\."), blocks, attending)
        # The attention of UNet2DModel has the names that it has there, of old those of OLD_VAE_ATTENTION.
        inner = {theirs: ours for ours, theirs in RESNET.items()} | OLD_VAE_ATTENTION
    found = translate(names, [(theirs, ours) for ours, theirs in pairs], inner)
    return {name: PARTS[part] + found.get(name, name) for name in names}


def largest(names: Iterable[str], pattern: str) -> int:
    """Largest number that the pattern finds in the names, -1 if none."""
    return max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


def translate(names: Iterable[str], pairs: Iterable[tuple[str, str]], inner: Mapping[str, str]) -> dict[str, str]:
    """Exchange the prefixes of names, and within residual blocks and the autoencoder's attention the layers' names."""
    table = dict(pairs)
    result = {}
    for name in names:
        cuts = [i for i, letter in enumerate(name, start=1) if letter == "."]
        start = next((name[:i] for i in reversed(cuts) if name[:i] in table), None)
        if start is None:
            continue
        layer, _, leaf = name[len(start):].rpartition(".")
        has_inner = any(part in start + table[start] for part in ("resnets", "attentions", "attn_1"))
        layer = inner.get(layer, layer) if has_inner else layer
        result[name] = f"{table[start]}{layer}.{leaf}" if layer else table[start] + leaf
    return result


def unet_pairs(levels: int, blocks: int, attending: set[int]) -> list[tuple[str, str]]:
    """Prefixes of the U-Net and of control branches: (ours, diffusers').

    Args:
        levels: resolutions.
        blocks: residual blocks a level in the encoder.
        attending: levels of the decoder, counted as diffusers does from the smallest, that have transformers.
    """
    pairs = [("time_embed.0.", "time_embedding.linear_1."), ("time_embed.2.", "time_embedding.linear_2."),
             ("input_blocks.0.0.", "conv_in."), ("out.0.", "conv_norm_out."), ("out.2.", "conv_out."),
             ("middle_block.0.", "mid_block.resnets.0."), ("middle_block.1.", "mid_block.attentions.0."),
             ("middle_block.2.", "mid_block.resnets.1."), ("middle_block_out.0.", "controlnet_mid_block."),
             ("input_hint_block.0.", "controlnet_cond_embedding.conv_in."),
             ("input_hint_block.14.", "controlnet_cond_embedding.conv_out.")]
    pairs += [(f"input_hint_block.{2 * k}.", f"controlnet_cond_embedding.blocks.{k - 1}.") for k in range(1, 7)]
    pairs += [(f"zero_convs.{j}.0.", f"controlnet_down_blocks.{j}.") for j in range(levels * (blocks + 1))]
    for level in range(levels):
        for i in range(blocks):
            ours, theirs = f"input_blocks.{1 + level * (blocks + 1) + i}", f"down_blocks.{level}"
            pairs += [(f"{ours}.0.", f"{theirs}.resnets.{i}."), (f"{ours}.1.", f"{theirs}.attentions.{i}.")]
        pairs.append((f"input_blocks.{(level + 1) * (blocks + 1)}.0.op.", f"down_blocks.{level}.downsamplers.0.conv."))
        for i in range(blocks + 1):
            ours, theirs = f"output_blocks.{level * (blocks + 1) + i}", f"up_blocks.{level}"
            pairs.append((f"{ours}.0.", f"{theirs}.resnets.{i}."))
            if level in attending:
                pairs.append((f"{ours}.1.", f"{theirs}.attentions.{i}."))
        pairs.append((f"{ours}.{2 if level in attending else 1}.conv.", f"{theirs}.upsamplers.0.conv."))
    return pairs


def vae_pairs(levels: int) -> list[tuple[str, str]]:
    """Prefixes of the autoencoder: (ours, diffusers'). Its decoder counts levels the other way round there."""
    pairs = [(f"{name}.", f"{name}.") for name in ("quant_conv", "post_quant_conv")]
    for half, ours, theirs in (("encoder", "down", "down_blocks"), ("decoder", "up", "up_blocks")):
        pairs += [(f"{half}.{name}.", f"{half}.{name}.") for name in ("conv_in", "conv_out")]
        pairs += [(f"{half}.norm_out.", f"{half}.conv_norm_out."),
                  (f"{half}.mid.block_1.", f"{half}.mid_block.resnets.0."),
                  (f"{half}.mid.block_2.", f"{half}.mid_block.resnets.1."),
                  (f"{half}.mid.attn_1.", f"{half}.mid_block.attentions.0.")]
        for level in range(levels):
            there = f"{half}.{theirs}.{level if half == 'encoder' else levels - 1 - level}"
            pairs += [(f"{half}.{ours}.{level}.block.{i}.", f"{there}.resnets.{i}.") for i in range(16)]
            pairs.append((f"{half}.{ours}.{level}.{ours}sample.conv.", f"{there}.{ours}samplers.0.conv."))
    return pairs
