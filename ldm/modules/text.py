"""Text encoder: CLIP's text transformer, of SD1.5, SD2.1 and the mini model."""
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.tokenizer import PromptTokenizer, load_tokenizer
from ldm.weights.files import read_folder

NAME_PREFIXES = ("text_model.", "transformer.text_model.", "cond_stage_model.transformer.text_model.", "")


def quick_gelu(hidden: Tensor) -> Tensor:
    """Sigmoid approximation of GELU that CLIP was trained with (Hendrycks and Gimpel 2016)."""
    return hidden * torch.sigmoid(1.702 * hidden)


ACTIVATIONS: dict[str, Callable] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class ClipTextEncoder(nn.Module):
    """Prompts to context: the last hidden state of CLIP's text transformer after the final layer norm.

    The names of its parameters are those of Hugging Face's CLIPTextModel under `transformer.`, which is how SD1.x
    checkpoints hold them under `cond_stage_model.`. The defaults are CLIP ViT-L/14.

    Args:
        vocab_size: rows of the token embedding.
        width: channels D of the context.
        layers: number of transformer blocks.
        heads: attention heads; must divide width.
        max_length: tokens L of a prompt, start and end token included.
        activation: `quick_gelu` (CLIP by OpenAI) or `gelu`.
        tokenizer: `clip` or the path of a `tokenizers` json file, see `load_tokenizer`.
        tokenizer_dir: folder of CLIP's tokenizer files; None takes weights_dir if it has them, else open_clip's file.
        pad: `end` (SD1.5) or the id that pads (open_clip: 0).
        weights_dir: local folder of a CLIPTextModel or CLIPModel; None starts from random values, for instance because
            a checkpoint is loaded later.
        frozen: no gradients, always in evaluation mode; False keeps the parameters trainable and `encode`
            differentiable.
        max_pieces: a longer prompt goes on in further pieces, up to so many, whose contexts stand behind one another.
    Raises:
        ValueError: if the sizes do not fit each other, or the weights do not fit the sizes.
        FileNotFoundError: if weights_dir has no weights.
    Source: Radford et al. 2021.
    """

    def __init__(self, vocab_size: int = 49408, width: int = 768, layers: int = 12, heads: int = 12,
                 max_length: int = 77, activation: str = "quick_gelu", tokenizer: str = "clip",
                 tokenizer_dir: str | None = None, pad: str | int = "end", weights_dir: str | None = None,
                 frozen: bool = True, max_pieces: int = 1) -> None:
        super().__init__()
        if max_pieces < 1:
            raise ValueError(f"text encoder: max_pieces is {max_pieces}. Expected 1 or more.")
        if width % heads:
            raise ValueError(f"text encoder: width {width} is not divisible by heads {heads}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"text encoder: activation is {activation!r}. Expected one of {sorted(ACTIVATIONS)}.")
        self.heads, self.max_length, self.activation = heads, max_length, activation
        self.frozen, self.max_pieces = frozen, max_pieces
        self._tokenizer_settings = {"tokenizer": tokenizer, "tokenizer_dir": tokenizer_dir, "pad": pad}
        self._weights_dir = None if weights_dir is None else Path(weights_dir).expanduser()
        self.transformer = nn.Module()  # the published weights have this level
        self.transformer.text_model = ClipTextTransformer(
            vocab_size, width, layers, heads, max_length, ACTIVATIONS[activation])
        if self._weights_dir is not None:
            self.load_weights(self._weights_dir)
        if frozen:
            self.requires_grad_(False).eval()

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer; it is loaded at the first use, so read it once to find missing files early.

        Raises:
            FileNotFoundError: if its files are missing.
            ValueError: if it has more tokens than the embedding.
        """
        settings = dict(self._tokenizer_settings)
        if settings["tokenizer"] == "clip" and settings["tokenizer_dir"] is None and self._weights_dir is not None:
            if any((self._weights_dir / name).is_file() for name in ("merges.txt", "tokenizer.json")):
                settings["tokenizer_dir"] = str(self._weights_dir)
        tokenizer = load_tokenizer(**settings, max_length=self.max_length)
        vocab_size = self.transformer.text_model.embeddings.token_embedding.num_embeddings
        if max(tokenizer.vocab_size, tokenizer.pad_id + 1) > vocab_size:
            raise ValueError(
                f"text encoder: the tokenizer {settings['tokenizer']} has {tokenizer.vocab_size} tokens (pad id "
                f"{tokenizer.pad_id}), the embedding {vocab_size} rows. Set vocab_size to match.")
        return tokenizer

    def encode(self, prompts: list[str], pieces: int | None = None) -> Tensor:
        """Encode prompts on the module's device.

        Args:
            prompts: B strings; longer ones are truncated, shorter ones padded.
            pieces: of every prompt; None = what the longest needs, at most max_pieces.
        Returns:
            Context, (B, pieces * L, D), in the module's dtype; each piece is encoded for itself.
        """
        pieces = pieces or self.count_pieces(prompts)
        token_ids = self.tokenizer(prompts, pieces).to(next(self.parameters()).device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self(token_ids.unflatten(1, (pieces, -1)).flatten(0, 1)).unflatten(0, (-1, pieces)).flatten(1, 2)

    def count_pieces(self, prompts: list[str]) -> int:
        """Pieces that the longest of the prompts needs, at most max_pieces."""
        return 1 if self.max_pieces == 1 else min(self.max_pieces, self.tokenizer.count_pieces(prompts))

    def describe_cut(self, prompts: list[str]) -> str:
        """Say which of the prompts lose what (see PromptTokenizer.describe_cut); empty if none does."""
        return self.tokenizer.describe_cut(prompts, self.max_pieces)

    def train(self, mode: bool = True) -> "ClipTextEncoder":
        """Switch the mode; a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids, (B, L) int64 in [0, vocab_size), L at most max_length, to context, (B, L, width)."""
        if token_ids.shape[1] > self.max_length:
            raise ValueError(f"text encoder: {token_ids.shape[1]} tokens. Expected at most {self.max_length}.")
        return self.transformer.text_model(token_ids)

    def load_weights(self, folder: Path) -> None:
        """Load a Hugging Face CLIP folder; every text tensor must be there and fit, image tensors are skipped.

        Args:
            folder: holds weights, and config.json to check heads and activation against.
        Raises:
            FileNotFoundError: if there are no weights.
            ValueError: if tensors are missing, left over or of other shapes, or config.json disagrees.
        """
        self.check_clip_config(folder / "config.json")
        file = read_folder(folder)
        if file is None:
            raise FileNotFoundError(f"text encoder: no weights in {folder}. Expected model.safetensors or "
                                    "pytorch_model.bin. Check weights_dir.")
        model = self.transformer.text_model
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(f"text encoder: {folder} cannot be loaded on the meta device. Build it on a real device.")
        prefix = next((p for p in NAME_PREFIXES if f"{p}embeddings.token_embedding.weight" in file.tensors), "")
        own = {name.removeprefix(prefix): stored for name, stored in file.only(prefix).tensors.items()}
        missing = sorted(expected.keys() - own.keys())
        wrong = [f"{name} {own[name].shape} instead of {shape}" for name, shape in expected.items()
                 if name in own and own[name].shape != shape]
        surplus = sorted(name for name in own if name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
                         and name not in expected and not name.endswith("position_ids"))
        if missing or wrong or surplus:
            raise ValueError(
                f"{file.name}: does not fit the text encoder. Missing ({len(missing)}): {missing[:4]}; other shape "
                f"({len(wrong)}): {wrong[:4]}; left over ({len(surplus)}): {surplus[:4]}. Set width, layers, "
                "vocab_size and max_length as in the folder's config.json.")
        model.load_state_dict({name: own[name].read() for name in expected})

    def check_clip_config(self, path: Path) -> None:
        """ValueError where config.json names other heads or another activation, which no tensor's shape tells."""
        if not path.is_file():
            return
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        for key, name in (("num_attention_heads", "heads"), ("hidden_act", "activation")):
            ours = getattr(self, name)
            if config.get(key, ours) != ours:
                raise ValueError(f"{path}: {key} is {config[key]!r}, the text encoder has {ours!r}. Set {name} to "
                                 "match.")


class ClipTextTransformer(nn.Module):
    """The network (see ClipTextEncoder)."""

    def __init__(self, vocab_size: int, width: int, layers: int, heads: int, max_length: int, activation: Callable):
        super().__init__()
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(vocab_size, width),
                                         "position_embedding": nn.Embedding(max_length, width)})
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(ClipBlock(width, heads, activation, layers) for _ in range(layers))})
        self.final_layer_norm = nn.LayerNorm(width)
        nn.init.normal_(self.embeddings["token_embedding"].weight, std=0.02)
        nn.init.normal_(self.embeddings["position_embedding"].weight, std=0.01)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, width)."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        hidden = self.embeddings["token_embedding"](token_ids)  # (B, L, D)
        hidden = hidden + self.embeddings["position_embedding"](positions)
        for block in self.encoder["layers"]:
            hidden = block(hidden)
        return self.final_layer_norm(hidden)


class ClipBlock(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, activation: Callable, layers: int):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")})
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.layer_norm2 = nn.LayerNorm(width)
        for layer in (self.self_attn["out_proj"], self.mlp["fc2"]):
            # Keeps the variance of the residual stream independent of the depth.
            nn.init.normal_(layer.weight, std=(2 * layers * layer.in_features) ** -0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, width) -> the same."""
        normed = self.layer_norm1(hidden)  # (B, L, D)
        query, key, value = (self.self_attn[f"{name}_proj"](normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for name in "qkv")  # (B, heads, L, D / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.self_attn["out_proj"](attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(hidden))))
