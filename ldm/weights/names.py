"""Names of weights: those of any kind of file to ours, which are CompVis' and the published TISynth's."""
import re
from collections.abc import Iterable, Mapping

from ldm.util import UserError

# Part of a diffusers folder -> prefix of its weights in our (CompVis') layout.
PARTS = {"unet": "model.diffusion_model.", "controlnet": "control_model.", "vae": "first_stage_model.",
         "text_encoder": "cond_stage_model.transformer."}
TEXT = PARTS["text_encoder"]
OUR_PREFIXES = (*PARTS.values(), "ssl_stage_model.", "network.")
WRAPPERS = ("module.", "method.", "_orig_mod.")
CLIP_STARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
BRANCH_STARTS = ("time_embed.", "input_blocks.", "middle_block.", "input_hint_block.", "zero_convs.",
                 "middle_block_out.")
# What bare names of a single network begin with -> what they lack; the first that fits counts.
BARE = (
    (("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out."), PARTS["unet"]),
    (("diffusion_model.",), "model."),
    (("transformer.text_model.",), "cond_stage_model."),
    (("text_model.",), TEXT),
    (CLIP_STARTS, f"{TEXT}text_model."),
    (("encoder.conv_", "encoder.down.", "encoder.mid.", "encoder.norm_out.", "decoder.", "quant_conv.",
      "post_quant_conv."), PARTS["vae"]),
)
DIFFUSERS_SIGNS = {"controlnet": "controlnet_cond_embedding.", "vae": "encoder.down_blocks.", "unet": "up_blocks."}
# reason -> pattern of names that no network of ours has
SET_ASIDE = {
    "position ids, which are counted anew": re.compile(r"(.*\.)?position_ids"),
    "the image side of CLIP": re.compile(
        r"(cond_stage_model\.transformer\.)?(vision_model|visual_projection|text_projection|logit_scale)(\..*)?"),
    "training losses": re.compile(r"(first_stage_model\.)?loss\..*"),
}
# Layers inside residual blocks and attention: diffusers' name -> ours. `query` to `proj_attn` are old names there.
UNET_LAYERS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "conv_shortcut": "skip_connection", "query": "to_q", "key": "to_k",
               "value": "to_v", "proj_attn": "to_out.0"}
VAE_LAYERS = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
              "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}

OPEN_CLIP = "cond_stage_model.model."  # SD2's text encoder in files of its authors
OPEN_CLIP_NAMES = {"token_embedding.weight": "embeddings.token_embedding.weight",
                   "positional_embedding": "embeddings.position_embedding.weight",
                   "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}
OPEN_CLIP_LAYERS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
                    "attn.out_proj": "self_attn.out_proj"}


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


def rename_open_clip(names: dict[str, str]) -> str:
    """Give open_clip's text encoder the names of CLIP's, in place; the last block, which SD2 does not use, goes.

    The three parts of a joint projection have the same name in the file. Returns a note, empty if there is none.
    """
    found = {name[len(OPEN_CLIP):]: names.pop(name) for name in list(names) if name.startswith(OPEN_CLIP)}
    last, left_out = largest(found, r"transformer\.resblocks\.(\d+)\."), 0
    for inner, key in found.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", inner)
        if inner in OPEN_CLIP_NAMES:
            ours = [OPEN_CLIP_NAMES[inner]]
        elif match and int(match[1]) < last:
            layers = [f"self_attn.{part}_proj" for part in "qkv"] if match[2] == "attn.in_proj" else [
                OPEN_CLIP_LAYERS.get(match[2], match[2])]
            ours = [f"encoder.layers.{match[1]}.{layer}.{match[3]}" for layer in layers]
        else:
            ours, left_out = [], left_out + 1
        for one in ours:
            add_name(names, f"{TEXT}text_model.{one}", key)
    return f"set aside {left_out}: the last block and the rest of open_clip that SD2 does not use" if found else ""


def add_prefixes(names: Mapping[str, str]) -> dict[str, str]:
    """Give tensors of a single network the prefix that it has in a whole model (see to_our_names)."""
    bare = [name for name in names if not name.startswith(OUR_PREFIXES)]
    for part, sign in DIFFUSERS_SIGNS.items():
        if any(name.startswith(sign) for name in bare):
            full = from_diffusers(part, bare)
            break
    else:
        is_branch = any(name.startswith(("input_hint_block.", "zero_convs.")) for name in bare)
        places = ((BRANCH_STARTS, PARTS["controlnet"]), *BARE) if is_branch else BARE
        full = {name: next((prefix for starts, prefix in places if name.startswith(starts)), "") + name
                for name in bare}
    result: dict[str, str] = {}
    for name, key in names.items():
        new = full.get(name, name)
        if new.startswith(TEXT) and new[len(TEXT):].startswith(CLIP_STARTS):  # transformers 5 leaves that level out
            new = f"{TEXT}text_model.{new[len(TEXT):]}"
        add_name(result, new, key)
    return result


def merge_ema(names: dict[str, str], averaged: dict[str, str], known: Iterable[str], use_ema: bool) -> str:
    """Put averaged weights in the place of the plain ones where asked or where there are no plain ones.

    Latent diffusion's averages are called `model_ema.` and the name of the parameter without its dots. `names` (our
    name -> name in the file) is changed; returns a note.
    """
    if not use_ema and any(name.startswith(PARTS["unet"]) for name in names):
        return (f"set aside {len(averaged)}: averaged weights (the plain ones are taken; convert_checkpoint.py --ema "
                "takes these)")
    full: dict[str, str] = {}
    for name in sorted({name for name in (*names, *known) if name.startswith("model.")}):
        full.setdefault("model_ema." + name.removeprefix("model.").replace(".", ""), name)
    matched = {full[name]: key for name, key in averaged.items() if name in full}
    rest = [name for name in averaged if name not in full and name not in ("model_ema.decay", "model_ema.num_updates")]
    if not matched or rest:
        raise UserError(f"checkpoint: of {len(averaged)} averaged weights (model_ema.) {len(matched)} have a name here "
                        f"({', '.join(rest[:2]) or 'there are none'}). Leave out --ema, or give the fitting --config.")
    names.update(matched)
    return f"took {len(matched)} averaged weights (model_ema.)"


def from_diffusers(part: str, names: Iterable[str]) -> dict[str, str]:
    """Our full names of one part's tensors.

    Args:
        part: `unet`, `controlnet` or `vae`.
        names: names in the files of the part, as diffusers writes them.
    Returns:
        Their name -> our name with prefix; names that are not understood get the prefix only.
    """
    names = list(names)
    if part == "vae":
        prefixes, layers = vae_prefixes(1 + largest(names, r"encoder\.down_blocks\.(\d+)\.")), VAE_LAYERS
    else:
        attending = {int(m[1]) for name in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        blocks = 1 + largest(names, r"down_blocks\.0\.resnets\.(\d+)\.")
        prefixes, layers = unet_prefixes(1 + largest(names, r"down_blocks\.(\d+)\."), blocks, attending), UNET_LAYERS
    result = {}
    for name in names:
        cuts = [i for i, letter in enumerate(name, start=1) if letter == "."]
        start = next((name[:i] for i in reversed(cuts) if name[:i] in prefixes), "")
        layer, _, leaf = name[len(start):].rpartition(".")
        if any(kind in start for kind in ("resnets", "attentions")):
            layer = layers.get(layer, layer)
        result[name] = PARTS[part] + prefixes.get(start, "") + (f"{layer}.{leaf}" if layer else leaf)
    return result


def largest(names: Iterable[str], pattern: str) -> int:
    """Largest number that the pattern finds in the names, -1 if none."""
    return max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


def unet_prefixes(levels: int, blocks: int, attending: set[int]) -> dict[str, str]:
    """Prefixes of the U-Net and of control branches: diffusers' -> ours.

    Args:
        levels: resolutions.
        blocks: residual blocks a level in the encoder.
        attending: levels of the decoder, counted as diffusers does from the smallest, that have transformers.
    """
    table = {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
             "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
             "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
             "mid_block.resnets.1.": "middle_block.2.", "controlnet_mid_block.": "middle_block_out.0.",
             "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
             "controlnet_cond_embedding.conv_out.": "input_hint_block.14."}
    table |= {f"controlnet_cond_embedding.blocks.{k}.": f"input_hint_block.{2 * k + 2}." for k in range(6)}
    table |= {f"controlnet_down_blocks.{j}.": f"zero_convs.{j}.0." for j in range(levels * (blocks + 1))}
    for level in range(levels):
        down, up, first = f"down_blocks.{level}.", f"up_blocks.{level}.", level * (blocks + 1)
        for i in range(blocks):
            table |= {f"{down}resnets.{i}.": f"input_blocks.{first + i + 1}.0.",
                      f"{down}attentions.{i}.": f"input_blocks.{first + i + 1}.1."}
        table[f"{down}downsamplers.0.conv."] = f"input_blocks.{first + blocks + 1}.0.op."
        for i in range(blocks + 1):
            table |= {f"{up}resnets.{i}.": f"output_blocks.{first + i}.0.",
                      f"{up}attentions.{i}.": f"output_blocks.{first + i}.1."}
        table[f"{up}upsamplers.0.conv."] = f"output_blocks.{first + blocks}.{1 + (level in attending)}.conv."
    return table


def vae_prefixes(levels: int) -> dict[str, str]:
    """Prefixes of the autoencoder: diffusers' -> ours. Its decoder counts levels the other way round there."""
    table = {}
    for half, ours, theirs in (("encoder", "down", "down_blocks"), ("decoder", "up", "up_blocks")):
        table |= {f"{half}.conv_norm_out.": f"{half}.norm_out.",
                  f"{half}.mid_block.resnets.0.": f"{half}.mid.block_1.",
                  f"{half}.mid_block.resnets.1.": f"{half}.mid.block_2.",
                  f"{half}.mid_block.attentions.0.": f"{half}.mid.attn_1."}
        for level in range(levels):
            there = f"{half}.{theirs}.{level if half == 'encoder' else levels - 1 - level}."
            table |= {f"{there}resnets.{i}.": f"{half}.{ours}.{level}.block.{i}." for i in range(16)}
            table[f"{there}{ours}samplers.0.conv."] = f"{half}.{ours}.{level}.{ours}sample.conv."
    return table
