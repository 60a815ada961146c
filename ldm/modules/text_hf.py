"""The three text encoders of Stable Diffusion 3.5 out of a local folder; nothing is ever downloaded."""
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.files import file_sha256
from ldm.util import UserError

T5_TOKENS = 256
MIN_VOCABULARY = 0.99  # of the encoder's; T5's tokenizer knows 32,100 of 32,128
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PromptEncoder:
    """Vectors of prompts as the stock pipeline makes them, with the same prompt for all encoders.

    Args:
        folder: SD3.5 in diffusers' layout; of it text_encoder*, tokenizer*, transformer/config.json are read.
        device: where to compute.
        dtype: of encoders and vectors: `bf16`, `fp16` or `fp32`.
        use_t5: False puts zeros in the place of T5's vectors, as SD3.5 allows, and needs no text_encoder_3.
        t5_tokens: vectors of T5 a prompt; the stock pipeline has 256.
    Raises:
        UserError: if parts are missing, cannot be read, or do not belong together.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", dtype: str = "bf16",
                 use_t5: bool = True, t5_tokens: int = T5_TOKENS) -> None:
        self.folder, self.device, self.dtype, self.use_t5 = Path(folder), torch.device(device), dtype, use_t5
        self.t5_tokens = t5_tokens
        suffixes = ("", "_2", "_3") if use_t5 else ("", "_2")
        self.parts = [kind + suffix for suffix in suffixes for kind in ("tokenizer", "text_encoder")]
        missing = [part for part in (*self.parts, "transformer") if not (self.folder / part).is_dir()]
        if missing:
            raise UserError(f"{folder}: has no {', '.join(missing)}. Expected a folder of Stable Diffusion 3.5 in "
                            "diffusers' layout. Check the path" + ("." if "text_encoder" in missing or not use_t5
                                                                  else ", or leave T5 out: --without_t5."))
        self.width = int(read_part_config(self.folder / "transformer")["joint_attention_dim"])

    def load(self) -> None:
        """Load tokenizers and encoders."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        kinds = [(CLIPTokenizer, CLIPTextModelWithProjection)] * 2 + [(T5TokenizerFast, T5EncoderModel)] * self.use_t5
        self.encoders = [load_encoder(self.folder, suffix, *kind, DTYPES[self.dtype], self.device)
                         for suffix, kind in zip(("", "_2", "_3"), kinds, strict=False)]

    def fingerprint(self) -> dict[str, Any]:
        """What decides the vectors: digests of weights and tokenizers, number of T5's tokens, precision."""
        digests = {f"{part}/{file.name}": file_sha256(file)
                   for part in self.parts for file in sorted((self.folder / part).iterdir()) if file.is_file()}
        return {"files": digests, "t5_tokens": self.t5_tokens, "t5": self.use_t5, "dtype": self.dtype}

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Vectors of one prompt, which is encoded alone: neighbours in a batch would change its last bits.

        Returns:
            Context (1, L + t5_tokens, joint_attention_dim), L tokens of both CLIPs side by side, then T5's; and the
            pooled vector (1, P1 + P2) of both CLIPs. On the CPU.
        """
        clips, pooled = [], []
        for tokenizer, encoder in self.encoders[:2]:
            length = self.encoders[0][0].model_max_length
            found = encoder(tokenize(tokenizer, prompt, length).to(self.device), output_hidden_states=True)
            clips.append(found.hidden_states[-2])
            pooled.append(found.text_embeds)
        clip = torch.cat(clips, dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if self.use_t5:
            tokenizer, encoder = self.encoders[2]
            spoken = encoder(tokenize(tokenizer, prompt, self.t5_tokens).to(self.device))[0]
        else:
            spoken = clip.new_zeros(1, self.t5_tokens, self.width)
        return torch.cat([clip, spoken], dim=1).to("cpu", DTYPES[self.dtype]), torch.cat(pooled, dim=-1).cpu()


def tokenize(tokenizer: Any, prompt: str, length: int) -> Tensor:
    """Ids of a prompt, cut or filled up to a length: (1, length) int64."""
    return tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def read_part_config(folder: Path) -> dict[str, Any]:
    """Contents of the config.json of a part; UserError if it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read ({error}). Expected the config of a part of an "
                        "SD3.5 folder. Fetch it again.") from error


def load_encoder(folder: Path, suffix: str, tokenizer_class: Any, encoder_class: Any, dtype: torch.dtype,
                 device: torch.device) -> tuple[Any, nn.Module]:
    """Tokenizer and encoder of one number: no suffix, `_2` or `_3`.

    Raises:
        UserError: if they cannot be loaded, or the tokenizer is not the encoder's: without its files the library makes
            one of two tokens and says nothing.
    """
    where = folder / f"tokenizer{suffix}"
    if not (where / "tokenizer.json").is_file() and not ((where / "vocab.json").is_file()
                                                         and (where / "merges.txt").is_file()):
        raise UserError(f"{where}: not a tokenizer. Expected tokenizer.json, or vocab.json and merges.txt in it. Fetch "
                        "the folder again.")
    try:
        tokenizer = tokenizer_class.from_pretrained(where, local_files_only=True)
        encoder = encoder_class.from_pretrained(folder / f"text_encoder{suffix}", dtype=dtype, use_safetensors=True,
                                                local_files_only=True, low_cpu_mem_usage=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: text_encoder{suffix} or its tokenizer cannot be loaded ({error}). Expected the "
                        "parts of one SD3.5 folder. Fetch them again.") from error
    own, size = len(tokenizer), encoder.config.vocab_size
    if not MIN_VOCABULARY * size <= own <= size:
        raise UserError(f"{where}: a tokenizer of {own} tokens for an encoder of {size}. Expected the tokenizer of "
                        "this encoder. Fetch the folder again.")
    return tokenizer, encoder.to(device).eval().requires_grad_(False)
