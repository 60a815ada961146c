"""Write a folder with the layout of Stable Diffusion 3.5 and random weights of 1.3 MB, to try the commands on.

    python scripts/make_tiny_sd35.py tiny_sd35
    python scripts/encode_prompts.py --sd35 tiny_sd35 --txt_file rows.json --outdir vectors

The real folder has the same parts (transformer, vae, scheduler, three text encoders and tokenizers) and 2.2 billion
parameters more; this one knows nothing, and its images are noise until it is trained.
"""
import argparse
import json
import string
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.util import UserError, run_entry_point  # noqa: E402

TRANSFORMER = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 32, "pooled_projection_dim": 32,
    "pos_embed_max_size": 24, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
    "sample_size": 64, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
START, END, LENGTH = "<|startoftext|>", "<|endoftext|>", 77
# A merge may only make what the vocabulary has.
MERGES = ("o a", "oa d</w>", "r oad</w>", "e r</w>", "w a", "wa t", "wat er</w>")
SPOKEN = ("road", "water", "a", "satellite", "image", "of", "land", "forest")


def clip_vocabulary() -> dict[str, int]:
    """Tokens of the two CLIP tokenizers: 64, the last two special."""
    letters = ["!", ",", ",</w>", *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    tokens = [*letters, *(merge.replace(" ", "") for merge in MERGES), START, END]
    return {token: number for number, token in enumerate(tokens)}


def write_clip_tokenizer(folder: Path, pad: str, is_json: bool) -> None:
    """Write a CLIP tokenizer as transformers 5 does (tokenizer.json), or as SD3.5's folder has it (two lists)."""
    from transformers import CLIPTokenizer

    vocabulary = clip_vocabulary()
    if is_json:
        merges = [tuple(merge.split()) for merge in MERGES]
        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=LENGTH).save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "bos_token": START, "eos_token": END,
              "unk_token": END, "pad_token": pad}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def make_t5_tokenizer():  # noqa: ANN201 (transformers is imported late)
    """A T5 tokenizer that spells, and knows a few words."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    pieces += [(letter, -6.0) for letter in string.ascii_lowercase + ","]
    pieces += [(f"▁{word}", -5.0) for word in SPOKEN]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def write_folder(out: Path, seed: int, is_json: bool) -> None:
    """Write all parts (see the module)."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    vocabulary = clip_vocabulary()
    for part, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        write_clip_tokenizer(out / part, pad, is_json)
    tokenizer = make_t5_tokenizer()
    tokenizer.save_pretrained(out / "tokenizer_3")
    clip = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": LENGTH, "projection_dim": 16,
            "bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END]}
    for part, pad in (("text_encoder", END), ("text_encoder_2", "!")):
        config = CLIPTextConfig(**clip, pad_token_id=vocabulary[pad])
        CLIPTextModelWithProjection(config).save_pretrained(out / part)
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=8, d_ff=64, num_layers=2, num_heads=8,
                            feed_forward_proj="gated-gelu")).save_pretrained(out / "text_encoder_3")
    SD3Transformer2DModel(**TRANSFORMER).save_pretrained(out / "transformer")
    AutoencoderKL(**VAE).save_pretrained(out / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(out / "scheduler")
    clip, models = "CLIPTextModelWithProjection", {
        "scheduler": "FlowMatchEulerDiscreteScheduler", "transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
    words = {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": "T5EncoderModel",
             "tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"}
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.41.0",
             **{part: ["diffusers", name] for part, name in models.items()},
             **{part: ["transformers", name] for part, name in words.items()}}
    (out / "model_index.json").write_text(json.dumps(index, indent=1))  # last: the folder is complete


def main(argv: list[str]) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--json_tokenizers", action="store_true",
                        help="CLIP's tokenizers as tokenizer.json instead of vocab.json and merges.txt")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out}: is there already. Expected a new folder. Remove it, or name another.")
    write_folder(args.out, args.seed, args.json_tokenizers)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"wrote {args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_entry_point(main)
