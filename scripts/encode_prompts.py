"""Encode the prompts of manifests once, with the text encoders of Stable Diffusion 3.5, for train.py and inference.py.

    python scripts/encode_prompts.py --sd35 stable-diffusion-3.5-medium --txt_file data/train_set_items.json \
        data/val_set_items.json --outdir data/vectors

Every distinct prompt is encoded once, and the empty one, which guidance needs. Several processes may share the work
(--shard i/n); one that is stopped goes on where it ended.
"""
import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import choose_device, positive_int, shard  # noqa: E402
from ldm.data.manifest import ManifestError, parse_rows  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sd35", required=True, help="folder of Stable Diffusion 3.5 in diffusers' layout; only text encoders and "
        "tokenizers are read")
    add("--txt_file", nargs="+", required=True, type=Path, help="manifests (JSON lines) whose prompts are wanted")
    add("--outdir", required=True, type=Path, help="folder for the vectors: model.params.vectors_dir, and --vectors")
    add("--without_t5", action="store_true", help="zeros in the place of T5's vectors; saves 10 GB of memory")
    add("--t5_tokens", type=positive_int, default=256, help="vectors of T5 a prompt (default: %(default)s, as in the "
        "stock pipeline); fewer make every step cheaper, and images a little different")
    add("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of encoders and vectors (default: "
        "%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--upstream_layout", metavar="NAME", help="also write NAME/0.safetensors ... and NAME/index_.jsonl, a file a "
        "row of the one --txt_file, as the public code of CRFM reads them")
    add("--shard", type=shard, default=(0, 1), help="i/n: this process is number i (from 0) of n")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def read_prompts(path: Path) -> list[str]:
    """Prompts of a manifest, row by row; ManifestError listing all rows without one."""
    if not path.is_file():
        raise FileNotFoundError(f"manifest not found: {path}. Expected a JSON-lines file. Check --txt_file.")
    problems: list[tuple[int, str]] = []
    rows = parse_rows(path, path.parent, {"prompt"}, problems)
    if problems:
        raise ManifestError(path, path.parent, sorted(problems))
    return [row.prompt for row in rows]


def main(argv: list[str]) -> None:
    """Encode what is missing."""
    args = build_parser().parse_args(argv)
    if args.upstream_layout and len(args.txt_file) != 1:
        raise UserError(f"--upstream_layout: {len(args.txt_file)} manifests. Expected one. Run once for each.")
    prompts = {prompt for path in args.txt_file for prompt in read_prompts(path)} | {""}
    from tqdm import tqdm

    from ldm.data.vectors import open_vectors, vector_path, write_upstream_layout, write_vectors
    from ldm.modules.text_hf import PromptEncoder

    encoder = PromptEncoder(args.sd35, choose_device(args.device), args.dtype, not args.without_t5, args.t5_tokens)
    open_vectors(args.outdir, encoder.fingerprint())
    first, step = args.shard
    todo = [prompt for prompt in sorted(prompts)[first::step] if not vector_path(args.outdir, prompt).is_file()]
    if todo:
        encoder.load()
    for prompt in tqdm(todo, desc="prompts", disable=not todo):
        write_vectors(vector_path(args.outdir, prompt), *encoder.encode(prompt))
    missing = sum(not vector_path(args.outdir, prompt).is_file() for prompt in prompts)
    logger.info("%s: %d prompts encoded now, %d of %d are there", args.outdir, len(todo), len(prompts) - missing,
                len(prompts))
    if args.upstream_layout and not missing:
        lines = args.txt_file[0].read_text(encoding="utf-8-sig").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        logger.info("rows are in %s", write_upstream_layout(args.outdir, args.upstream_layout, rows))
    elif args.upstream_layout:
        logger.info("--upstream_layout: %d prompts are left to other processes; run this again when they have ended",
                    missing)


if __name__ == "__main__":
    run_entry_point(main)
