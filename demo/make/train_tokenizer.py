"""Train the mini model's byte-level BPE tokenizer on class names, prompt templates and remote-sensing words.

A model depends on the ids it was trained with: a new tokenizer needs a new model.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # lets `python demo/make/train_tokenizer.py` work as well as `python -m`
    sys.path.insert(0, str(ROOT))

from ldm.modules.tokenizer import byte_symbols  # noqa: E402

START, END = "<start>", "<end>"
TEMPLATES = (
    "a satellite image of {classes}",
    "an aerial image of {classes}",
    "a high resolution satellite image of {classes}",
    "a remote sensing image with {classes}",
    "a satellite image",
)
# Words of class names and templates come up in every prompt, so they win the contest for merges.
PROMPT_WEIGHT, WORD_WEIGHT = 10, 1


def read_class_names(folder: Path) -> tuple[list[str], list[str]]:
    """Names and prompt templates of all class tables.

    Args:
        folder: holds .yaml or .json class tables with the form that `ClassTable.load` reads.

    Returns:
        Class names (also the wording for prompts), and templates, both sorted and unique.

    Raises:
        FileNotFoundError: if the folder has no class tables.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".json"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no class tables. Expected .yaml or .json files. Check --classes.")
    from ldm.data.classes import ClassTable

    tables = [ClassTable.load(path) for path in paths]
    names = {name for table in tables for name in (*table.names, *table.prompt_names)}
    return sorted(names), sorted({table.prompt_template for table in tables})


def read_words(path: Path) -> list[str]:
    """Comma separated words and phrases of a text file; lines that begin with # are left out."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: word list not found. Check --words.")
    lines = path.read_text(encoding="utf-8").splitlines()
    words = (word.strip() for line in lines if not line.startswith("#") for word in line.split(","))
    return [word for word in words if word]


def make_corpus(class_names: list[str], templates: list[str], words: list[str]) -> list[str]:
    """Texts to learn merges from, in a fixed order.

    Every word comes with the space before it that it has inside a prompt.

    Args:
        class_names: names of classes.
        templates: prompts with a `{classes}` place.
        words: further words and phrases.

    Returns:
        Texts, repeated by their weight.
    """
    prompts = [template.replace("{classes}", "").strip() for template in (*TEMPLATES, *templates)]
    texts = [*prompts, *(f" {name}" for name in class_names), *(f" {name.lower()}" for name in class_names)]
    return texts * PROMPT_WEIGHT + [f" {word}" for word in words] * WORD_WEIGHT


def train_tokenizer(corpus: list[str], vocab_size: int) -> str:
    """Learn a byte-level byte-pair encoding that takes any text apart without loss.

    Args:
        corpus: texts to learn from.
        vocab_size: number of ids, at least 256 byte symbols and the start and the end token.

    Returns:
        The `tokenizers` json text; the start and end tokens have the last two ids.

    Raises:
        ValueError: if vocab_size is too small, or larger than the corpus has merges for.

    Source: Sennrich et al. 2016.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    symbols = byte_symbols()
    if vocab_size < len(symbols) + 2:
        raise ValueError(f"--vocab_size is {vocab_size}. Expected at least {len(symbols) + 2}.")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 2, min_frequency=1, initial_alphabet=symbols, special_tokens=[], show_progress=False
        ),
    )
    model = json.loads(learner.to_str())["model"]
    if len(model["vocab"]) != vocab_size - 2:
        raise ValueError(
            f"--vocab_size is {vocab_size}, the corpus gives only {len(model['vocab']) + 2}. Add words or lower it."
        )
    # The special tokens are in the vocabulary but not "added tokens", so no prompt can spell them.
    vocab = {**model["vocab"], START: vocab_size - 2, END: vocab_size - 1}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str(pretty=True)


def main() -> None:
    """Read the flags, train, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=Path, default=ROOT / "configs/classes", help="folder of class tables")
    parser.add_argument(
        "--words", type=Path, default=ROOT / "configs/model/mini_tokenizer_words.txt", help="comma separated words"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "configs/model/mini_tokenizer.json", help="file to write")
    parser.add_argument("--vocab_size", type=int, default=1024, help="number of token ids (default 1024)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args()
    try:
        if args.output.exists() and not args.overwrite:
            raise FileExistsError(f"{args.output} exists; models depend on it. Choose another --output or --overwrite.")
        class_names, templates = read_class_names(args.classes)
        corpus = make_corpus(class_names, templates, read_words(args.words))
        text = train_tokenizer(corpus, args.vocab_size)
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.output.write_text(text + "\n", encoding="utf-8")
    print(f"{args.output}: {args.vocab_size} tokens from {len(class_names)} class names and {len(set(corpus))} texts")


if __name__ == "__main__":
    main()
