"""Generate images for the rows of a manifest: a mask, a prompt and a reference become an image.

Everything is checked before the model is loaded. An interrupted run, started again, ends with the same files.
"""

import argparse
import logging
import sys
from pathlib import Path

from ldm.cli import add_classes, natural, positive_int, shard
from ldm.sampling.modes import add_sampling_flags
from ldm.util import run_entry_point

logger = logging.getLogger(__name__)

EXIT_DAMAGED = 3


def build_parser() -> argparse.ArgumentParser:
    """Command line of inference.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", help="weights: .safetensors or .ckpt; needed to generate")
    add("--config", help="model yaml; only needed if the checkpoint has no config inside")
    add("--allow_modules", action="append", default=[], metavar="MODULE", help="module of your own that the config may "
        "name, once or more often; else networks of this project only")
    add("--tokenizer_dir", help="local folder of CLIP's tokenizer; default: the model's, else open_clip's")
    add("--vectors", help="folder of the prompts' vectors (scripts/encode_prompts.py), for CRFM; default: the "
        "training's")
    add("--prompt_pieces", type=positive_int, help="read prompts that are longer than the text encoder's limit in up "
        "to so many pieces (of 75 tokens for CLIP); default: the model's own")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    add("--precision", choices=["auto", "full", "autocast"], default="auto", help="full = float32, autocast = bfloat16 "
        "where it is safe; auto = autocast on CUDA, full elsewhere")
    add("--compile", action="store_true", help="compile the blocks of the network; for long runs")
    add("--C", type=positive_int, help="latent channels; checked against the model")
    add("--f", type=positive_int, help="pixels per latent; checked against the model")

    add = parser.add_argument_group("data").add_argument
    add("--data_root", default=".", help="folder that the manifest's paths are relative to")
    add("--txt_file", "--train_txt_file", help="manifest: JSON lines with source, prompt, ref_image; needed to "
        "generate")
    add_classes(add, "of masks with other ids on disk than the model's", dest="dataset")
    add("--H", type=positive_int, help="height to generate; default: the mask's")
    add("--W", type=positive_int, help="width to generate; default: the mask's")
    add("--bad_rows", choices=["stop", "skip"], default="stop", help="stop: one error lists all bad rows before the "
        "model is loaded; skip: they go to failures.jsonl")
    add("--follow_links", action="store_true", help="files may be links that lead out of --data_root")
    add("--num_workers", type=natural, help="processes that read images, 0 = the main one; 4 on CUDA")

    sampling = parser.add_argument_group("sampling")
    add_sampling_flags(sampling)
    add = sampling.add_argument
    add("--seed", type=natural, default=42, help="a sample's noise follows from seed, row and copy")
    add("--fixed_code", action="store_true", help="the same noise, that of --seed, for every sample")
    add("--num_per_mask", type=positive_int, default=1, help="images per row, each with own noise")
    add("--batch_size", type=positive_int, default=8, help="images at once on a GPU, halved if memory ends; a CPU "
        "generates 2 at once, whatever this says")

    add = parser.add_argument_group("output").add_argument
    add("--outdir", default="outputs", help="folder for images/, index.jsonl and run.json")
    add("--ext", choices=["png", "jpg"], default="png", help="png is lossless, jpg is q95 4:4:4")
    add("--format", choices=["folder"], default="folder", help=argparse.SUPPRESS)
    add("--overwrite", action="store_true", help="generate finished images again, do not skip them")
    add("--status", action="store_true", help="say how far the run in --outdir is, and stop")
    add("--verify", action="store_true", help="check sizes and hashes in --outdir, requeue what is damaged, and stop")
    add("--debug", action="store_true", help="show the traceback of an error")

    add = parser.add_argument_group("several processes").add_argument
    add("--shard", type=shard, help="i/n: generate shards i, i+n, ... (i from 0); default: from torchrun, srun or the "
        "SLURM array, else all")
    add("--shard_size", type=positive_int, help="rows a shard; default: 512, or fewer where not all processes would "
        "have one")
    add("--engine", choices=["local", "ray"], default="local", help="ray: actors on a Ray cluster")
    add("--ray_workers", type=positive_int, help="actors; default: one a GPU, else 1")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check everything, then generate.

    Returns:
        0 if this process is done with its shards; 3 if samples failed (see failures.jsonl; --status says 3 then, too)
        or --verify found damage; 4 if the output cannot be read or written; 130 or 143 after a signal. The same command
        goes on where this one ended.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.debug:
        logging.getLogger().setLevel(logging.DEBUG)
    missing = [flag for flag, value in (("--ckpt", args.ckpt), ("--txt_file", args.txt_file)) if value is None]
    if missing and not (args.status or args.verify):
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if args.status or args.verify:
        from ldm.generation.report import describe_run, verify_run

        text, bad = (verify_run if args.verify else describe_run)(Path(args.outdir))
        print(text)
        return EXIT_DAMAGED if bad else 0
    # torch takes seconds to import: only after the command line is known to be right.
    from ldm.generation.machine import Stopped, stop_on_signals
    from ldm.generation.plan import make_plan
    from ldm.generation.worker import run, run_on_ray

    try:
        with stop_on_signals():
            return run_on_ray(args) if args.engine == "ray" else run(make_plan(args))
    except Stopped as stop:
        print(f"stopped by {stop}; the same command goes on from here", file=sys.stderr)
        return stop.code


if __name__ == "__main__":
    run_entry_point(main)
