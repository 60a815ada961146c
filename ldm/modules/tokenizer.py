"""Prompts to token ids: CLIP's byte-pair encoding from a local vocabulary, or any `tokenizers` json file."""

import gzip
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
CLIP_VOCAB_SIZE = 49408
CHUNK = 10_000  # prompts that are looked at together
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
SPECIAL_TOKENS = ((CLIP_START, CLIP_END), ("<start>", "<end>"))
# Contractions, runs of letters, single digits, runs of other signs; white space only separates.
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class PromptTokenizer:
    """Turns prompts into rows of token ids of one fixed length.

    A row is: start token, the prompt's tokens, end token, padding. A prompt that is too long loses its last tokens,
    never the end token, or goes on in further pieces of the same form. Text that spells a special token is read as
    ordinary text.

    Args:
        backend: a `tokenizers.Tokenizer`; its post-processing, padding and truncation are not used.
        start_id, end_id: ids of the start and of the end token.
        pad_id: id that fills the row after the end token.
        max_length: length of a row, start and end token included, at least 3.
    Raises:
        ValueError: if max_length is below 3.
    """

    def __init__(self, backend, start_id: int, end_id: int, pad_id: int, max_length: int):
        if max_length < 3:
            raise ValueError(f"tokenizer: max_length is {max_length}. Expected at least 3 (start, one token, end).")
        self.backend = backend
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.max_length = max_length

    @property
    def vocab_size(self) -> int:
        """Number of rows that an embedding table needs: the largest id + 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(self, prompts: Sequence[str], pieces: int = 1) -> torch.Tensor:
        """Token ids of B prompts, (B, pieces * max_length) int64; TypeError if one string is given.

        Args:
            prompts: strings; an empty string is a valid prompt.
            pieces: rows a prompt; what does not fit in them is cut, and pieces that it does not reach are empty.
        """
        rows = []
        for ids in self.split_words(prompts):
            for start in range(0, pieces * self.room, self.room):
                row = [self.start_id, *ids[start : start + self.room], self.end_id]
                rows += row + [self.pad_id] * (self.max_length - len(row))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(prompts), pieces * self.max_length)

    @property
    def room(self) -> int:
        """Tokens of a prompt that one row holds."""
        return self.max_length - 2

    def split_words(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, all of them, without start and end; TypeError if one string is given."""
        if isinstance(prompts, str):
            raise TypeError(f"tokenizer: prompts is one string ({prompts[:40]!r}). Expected a list of strings.")
        return [encoding.ids for encoding in self.backend.encode_batch(list(prompts), add_special_tokens=False)]

    def count_pieces(self, prompts: Sequence[str]) -> int:
        """Rows that the longest of the prompts needs, at least 1."""
        return max((-(-len(ids) // self.room) for ids in self.split_words(prompts)), default=1) or 1

    def describe_cut(self, prompts: Sequence[str], pieces: int = 1) -> str:
        """Say how many prompts are cut, at which limit, and what the longest loses; empty if none is."""
        limit, count = pieces * self.room, 0
        ids: list[int] = []
        prompt = ""
        for start in range(0, len(prompts), CHUNK):  # the tokens of a million prompts need not fit into memory
            part = prompts[start : start + CHUNK]
            for found, text in zip(self.split_words(part), part, strict=True):
                count += len(found) > limit
                if len(found) > max(limit, len(ids)):
                    ids, prompt = found, text
        if not count:
            return ""
        start = limit
        while start and self.backend.decode(ids[start:], skip_special_tokens=False).startswith("\ufffd"):
            start -= 1  # a token may hold a part of a character, which is then lost as a whole
        lost = " ".join(self.backend.decode(ids[start:], skip_special_tokens=False).split())
        return (f"{count} of {len(prompts)} different prompts are longer than the {limit} tokens that the text "
                f"encoder reads, and lose their end. The longest has {len(ids)} tokens ({prompt[:40]!r}...) and loses "
                f"{lost[:120]!r}{'...' if len(lost) > 120 else ''}")


def load_tokenizer(tokenizer: str, *, tokenizer_dir: str | None = None, max_length: int = 77,
                   pad: str | int = "end") -> PromptTokenizer:
    """Load a tokenizer from local files only.

    Args:
        tokenizer: `clip`, or the path of a `tokenizers` json file (relative to the working directory or, failing
            that, to the repository) that holds `<start>` and `<end>` (or CLIP's) special tokens.
        tokenizer_dir: for `clip`: folder with vocab.json and merges.txt, or with tokenizer.json. None takes the
            vocabulary file of the installed open_clip package, which is read without importing the package.
        max_length: length of a row of ids.
        pad: `end` pads with the end token (Hugging Face's CLIP ViT-L/14, SD1.5), an int with that id (open_clip: 0).
    Returns:
        The tokenizer.
    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if the file is no tokenizer, has no special tokens, or `pad` is not understood.
    """
    backend = load_clip_backend(tokenizer_dir) if tokenizer == "clip" else read_json_backend(tokenizer)
    start_id, end_id = find_special_ids(backend, tokenizer)
    if pad != "end" and (isinstance(pad, bool) or not isinstance(pad, int) or pad < 0):
        raise ValueError(f"tokenizer: pad is {pad!r}. Expected 'end' or a token id.")
    result = PromptTokenizer(backend, start_id, end_id, end_id if pad == "end" else pad, max_length)
    if tokenizer == "clip" and result.vocab_size != CLIP_VOCAB_SIZE:
        raise ValueError(f"tokenizer: the CLIP vocabulary has {result.vocab_size} tokens. Expected {CLIP_VOCAB_SIZE}. "
                         f"Check the files in {tokenizer_dir}.")
    return result


def build_clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]]):
    """CLIP's tokenizer, a `tokenizers.Tokenizer`: lower-cased byte-level byte-pair encoding with `</w>` at word ends.

    `vocab` is token to id, `merges` are pairs in the order of their priority.

    Source: Radford et al. 2021, section 2.4; Sennrich et al. 2016.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE(
        vocab=vocab, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="", fuse_unk=False))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
    return backend


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes, in the order of CLIP's first 256 ids.

    Bytes with a visible Latin-1 character stand for themselves, the others get the characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in visible] + [chr(0x100 + index) for index in range(256 - len(visible))]


def read_open_clip_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token to id, and the merges in order, out of CLIP's gzipped merge list: a header, then one merge a line.

    Ids: 256 byte symbols, the same with `</w>`, one per merge, start token, end token.
    """
    symbols = byte_symbols()
    num_merges = CLIP_VOCAB_SIZE - 2 * len(symbols) - 2
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + num_merges]
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != num_merges or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{path}: not CLIP's merge list. Expected a header and {num_merges} lines of two tokens.")
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), CLIP_START, CLIP_END]
    return {token: index for index, token in enumerate(tokens)}, merges


def load_clip_backend(tokenizer_dir: str | None):
    """CLIP's tokenizer from a folder, or from the vocabulary of the installed open_clip (see load_tokenizer)."""
    if tokenizer_dir is None:
        return build_clip_backend(*read_open_clip_vocabulary(find_open_clip_file()))
    folder = Path(tokenizer_dir).expanduser()
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        # Only vocabulary and merges are taken: the rest of such files differs between releases of their writers.
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        vocab, merges = model["vocab"], model["merges"]
    else:
        raise FileNotFoundError(f"tokenizer: no CLIP tokenizer in {folder}. Expected vocab.json and merges.txt, or "
                                "tokenizer.json. Check tokenizer_dir.")
    return build_clip_backend(vocab, [tuple(merge.split() if isinstance(merge, str) else merge) for merge in merges])


def find_open_clip_file() -> Path:
    """CLIP's merge list in the installed open_clip, which is not imported; FileNotFoundError if there is none."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "tokenizer: CLIP's vocabulary was not found: tokenizer_dir is not set and open_clip is not installed. "
        "Set tokenizer_dir to a folder with vocab.json and merges.txt, or pip install --no-deps open_clip_torch==3.3.0 "
        "(without --no-deps it replaces packages).")


def read_json_backend(path: str):
    """The tokenizer of a json file (see load_tokenizer)."""
    from tokenizers import Tokenizer

    file = next((file for file in (Path(path).expanduser(), REPOSITORY_ROOT / path) if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"tokenizer: file not found: {path}. Expected 'clip' or a tokenizers json file, "
                                f"relative to the working directory or to {REPOSITORY_ROOT}.")
    try:
        backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{file}: not a tokenizers json file ({error}). Write one with train_tokenizer.py.") from error
    # Settings of the file would shorten or pad the ids before this module does.
    backend.no_truncation()
    backend.no_padding()
    return backend


def find_special_ids(backend, name: str) -> tuple[int, int]:
    """Ids of start and end token; ValueError if a vocabulary has none."""
    for start, end in SPECIAL_TOKENS:
        ids = backend.token_to_id(start), backend.token_to_id(end)
        if None not in ids:
            return ids
    expected = " or ".join(f"{start} and {end}" for start, end in SPECIAL_TOKENS)
    raise ValueError(f"tokenizer {name}: no start and end token in the vocabulary. Expected {expected}.")
