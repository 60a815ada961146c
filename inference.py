"""Paint images for the rows of a manifest: a mask, a prompt and a reference become a picture.

Everything is checked before the model is loaded. An interrupted run, started again, ends with the same files.
"""

import argparse
import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.sampling.modes import Sampling, add_sampling_flags, choose_sampling
from ldm.util import UserError, run_entry_point

if TYPE_CHECKING:
    import torch

    from ldm.data.classes import ClassTable
    from ldm.data.manifest import Row
    from ldm.models.synthesis import Job
    from ldm.sampling.writer import ImageWriter, RecordFile

logger = logging.getLogger(__name__)

EXIT_FAILED_SAMPLES = 3


def build_parser() -> argparse.ArgumentParser:
    """Command line of inference.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt", required=True, help="weights: .safetensors or .ckpt")
    model.add_argument("--config", default=None, help="model yaml; only needed if the checkpoint has no config inside")
    model.add_argument(
        "--tokenizer_dir", default=None, help="local folder of CLIP's tokenizer; default: the model's, else open_clip's"
    )
    model.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    model.add_argument(
        "--precision", choices=["auto", "full", "autocast"], default="auto",
        help="full = float32, autocast = bfloat16 where it is safe; auto = autocast on CUDA, full elsewhere",
    )  # fmt: skip
    model.add_argument("--C", type=positive_int, default=None, help="latent channels; checked against the model")
    model.add_argument("--f", type=positive_int, default=None, help="pixels per latent; checked against the model")

    data = parser.add_argument_group("data")
    data.add_argument("--data_root", default=".", help="folder that the manifest's paths are relative to")
    data.add_argument(
        "--txt_file", "--train_txt_file", required=True, help="manifest: JSON lines with source, prompt, ref_image"
    )
    data.add_argument(
        "--dataset", default=None, help="class table (name or file) of masks with other ids on disk than the model's"
    )
    data.add_argument("--H", type=positive_int, default=None, help="height to paint; default: the mask's")
    data.add_argument("--W", type=positive_int, default=None, help="width to paint; default: the mask's")
    data.add_argument("--num_workers", type=natural, default=0, help="processes that read images; 0 = the main one")

    sampling = parser.add_argument_group("sampling")
    add_sampling_flags(sampling)
    sampling.add_argument("--seed", type=natural, default=42, help="a sample's noise follows from seed, row and copy")
    sampling.add_argument("--fixed_code", action="store_true", help="the same noise, that of --seed, for every sample")
    sampling.add_argument("--num_per_mask", type=positive_int, default=1, help="images per row, each with own noise")
    sampling.add_argument("--batch_size", type=positive_int, default=8, help="images painted at once")

    output = parser.add_argument_group("output")
    output.add_argument("--outdir", default="outputs", help="folder for images/, index.jsonl and run.json")
    output.add_argument("--ext", choices=["png", "jpg"], default="png", help="png is lossless, jpg is q95 4:4:4")
    output.add_argument("--shard", type=shard, default="0/1", help="i/n: paint rows i, i+n, i+2n, ... (i from 0)")
    output.add_argument("--overwrite", action="store_true", help="paint finished images again instead of skipping them")
    output.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def positive_int(text: str) -> int:
    """Argument type: whole number of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def natural(text: str) -> int:
    """Argument type: whole number of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def shard(text: str) -> tuple[int, int]:
    """Argument type: `i/n` with 0 <= i < n."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard. Expected i/n with 0 <= i < n, such as 0/4.")
    return int(first), int(count)


def _number(text: str, kind: type, is_valid: Any, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not possible. Expected {expected}.")
    return value


def main(argv: list[str] | None = None) -> int:
    """Check everything, then paint.

    Args:
        argv: arguments without the program name; None = sys.argv[1:].

    Returns:
        0 if all images are there, 3 if the model gave values that are no picture for some (see failures.jsonl).
    """
    args = build_parser().parse_args(argv)
    if args.debug:
        logging.getLogger().setLevel(logging.DEBUG)
    # torch takes seconds to import: only after the command line is known to be right.
    from ldm.models.loading import build_skeleton, load_method, read_model_config
    from ldm.sampling.writer import ImageWriter, RecordFile, check_run, open_run

    config = read_model_config(args.ckpt, args.config)
    if args.tokenizer_dir:
        use_tokenizer(config, args.tokenizer_dir)
    device, use_autocast = choose_device(args)
    skeleton = build_skeleton(config)
    sampling = choose_sampling(args, skeleton.guidance_scale)
    check_settings(args, skeleton, sampling)
    table = choose_table(args, skeleton.class_table)
    rows = read_rows(args, table, skeleton.size_factor)
    jobs = plan_jobs(args, rows)
    fingerprint = make_fingerprint(args, config, rows, use_autocast, sampling)
    outdir = Path(args.outdir)
    check_run(outdir, fingerprint)
    for job in jobs:
        job.record["checkpoint_sha256"] = fingerprint["checkpoint_sha256"]

    method = load_method(args.ckpt, config, device)
    details = {"arguments": vars(args), "data_root": os.path.abspath(args.data_root), "config": config}
    open_run(outdir, fingerprint, details | {"class_table": table.to_dict()})
    todo = [job for job in jobs if args.overwrite or not (outdir / job.record["image"]).is_file()]
    logger.info("%d images to paint, %d finished already", len(todo), len(jobs) - len(todo))
    index = RecordFile(outdir / "index.jsonl")
    with ImageWriter(outdir, index) as writer:
        failures = paint_jobs(args, method, table, todo, device, use_autocast, sampling, writer) if todo else []
    return settle_records(outdir, index, jobs, failures)


def use_tokenizer(config: dict[str, Any], folder: str) -> None:
    """Put the folder of --tokenizer_dir into the config of the model."""
    text = config["model"].get("params", {}).get("text_encoder")
    if text is None:
        raise UserError(f"--tokenizer_dir: {folder} is of no use, the model has no text encoder. Leave the flag out.")
    text.setdefault("params", {})["tokenizer_dir"] = folder


def settle_records(outdir: Path, index: "RecordFile", jobs: list["Job"], failures: list[dict[str, Any]]) -> int:
    """Leave index.jsonl and failures.jsonl complete and in order; returns the exit code."""
    from ldm.sampling.writer import RecordFile

    def key(record: dict[str, Any]) -> tuple[int, int]:
        return record["row"], record["copy"]

    failed, tried = {key(record) for record in failures}, {key(job.record) for job in jobs}
    finished = [job.record for job in jobs if key(job.record) not in failed]
    index.settle(finished, keep=lambda record: key(record) not in failed and (outdir / record["image"]).is_file())
    failure_file = RecordFile(outdir / "failures.jsonl")
    if failures or failure_file.path.exists():
        failure_file.settle(failures, keep=lambda record: key(record) not in tried)
    logger.info("%d images in %s", len(finished), outdir / "images")
    if not failures:
        return 0
    logger.error("error: %d samples are not finite and were not written, see %s", len(failures), failure_file.path)
    return EXIT_FAILED_SAMPLES


def choose_device(args: argparse.Namespace) -> tuple["torch.device", bool]:
    """The device to paint on, and whether to use autocast there."""
    import torch

    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device: {name} cannot be used ({reason}). Expected auto, cpu, cuda, ... Use auto."
        ) from error
    return device, args.precision == "autocast" or (args.precision == "auto" and device.type == "cuda")


def paint_jobs(
    args: argparse.Namespace,
    method: Any,
    table: "ClassTable",
    jobs: list["Job"],
    device: "torch.device",
    use_autocast: bool,
    sampling: Sampling,
    writer: "ImageWriter",
) -> list[dict[str, Any]]:
    """Paint with the settings of the command line; returns the records of failed samples."""
    import torch
    from torch.utils.data import DataLoader

    from ldm.models.synthesis import JobDataset, SamplerSettings, paint, plan_batches

    # Full precision means it: convolutions on CUDA would otherwise round their inputs to TF32.
    torch.backends.cudnn.allow_tf32 = args.precision != "full"
    loader = DataLoader(
        JobDataset(jobs, table, (args.H, args.W) if args.H else None),
        batch_sampler=plan_batches(jobs, args.batch_size),
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
    )
    settings = SamplerSettings(sampling, use_autocast)
    try:
        return paint(method, jobs, loader, settings, device, writer.submit)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"--batch_size: {args.batch_size} images at once do not fit into the memory of {device}. Expected fewer."
            " Run the same command with a smaller --batch_size; finished images stay."
        ) from error


def check_settings(args: argparse.Namespace, method: Any, sampling: Sampling) -> None:
    """Raise UserError where flags do not fit the model or each other."""
    from ldm.sampling.multistep import spaced_timesteps

    if (args.H is None) != (args.W is None):
        raise UserError(f"--H {args.H} --W {args.W}: only one is given. Expected both or none. Add the other.")
    factor = method.size_factor
    if args.H and (args.H % factor or args.W % factor):
        raise UserError(
            f"--H {args.H} --W {args.W}: the model cannot paint this size. Expected multiples of {factor}. Change them."
        )
    channels, height, _ = method.noise_shape(factor, factor)
    for flag, given, actual in (("--C", args.C, channels), ("--f", args.f, factor // height)):
        if given not in (None, actual):
            raise UserError(f"{flag}: {given} is not the model's. Expected {actual}. Leave the flag out.")
    spaced_timesteps(sampling.num_steps, method.schedule, sampling.spacing)
    # The tokenizer is loaded at its first use; missing files should show now.
    method.text_encoder.tokenizer([""])


def choose_table(args: argparse.Namespace, own: "ClassTable") -> "ClassTable":
    """Class table that masks are read with: --dataset, which must have as many classes as the model's, or the model's.

    By default masks are stored as those of the training were; --dataset is for masks numbered or coloured otherwise.
    """
    from ldm.data.classes import ClassTable

    table = ClassTable.load(args.dataset) if args.dataset else own
    if table.num_classes != own.num_classes:
        raise UserError(
            f"--dataset: {args.dataset} has {table.num_classes} classes. Expected {own.num_classes}, as the model's"
            f" table {own.name}. Use a table with the model's classes."
        )
    return table


def read_rows(args: argparse.Namespace, table: "ClassTable", size_factor: int) -> list["Row"]:
    """All rows of the manifest, their files checked; raises one error with all bad rows."""
    from ldm.data.manifest import read_manifest

    size = (args.H, args.W) if args.H else None
    need = ("reference", "prompt")
    return read_manifest(args.txt_file, args.data_root, need=need, table=table, size_factor=size_factor, size=size)


def plan_jobs(args: argparse.Namespace, rows: list["Row"]) -> list["Job"]:
    """One job for every copy of every row of this shard: its row, the seed of its noise and its line of the index."""
    from PIL import Image

    from ldm.models.synthesis import Job
    from ldm.sampling.noise import sample_seed

    first, count = args.shard
    sizes: dict[Path, tuple[int, int]] = {}
    jobs = []
    for row in rows[first::count]:
        if row.mask not in sizes:
            with Image.open(row.mask) as image:
                sizes[row.mask] = image.size
        width, height = (args.W, args.H) if args.H else sizes[row.mask]
        for copy in range(args.num_per_mask):
            number = sample_seed(args.seed, row.index, copy)
            record = {
                "row": row.index, "copy": copy, "seed": number,
                "image": f"images/{row.mask.stem}_seed_{number}.{args.ext}",
                "mask": _below(row.mask, args.data_root), "reference": _below(row.reference, args.data_root),
                "prompt": row.prompt, "width": width, "height": height,
            }  # fmt: skip
            jobs.append(Job(row, args.seed if args.fixed_code else number, record))
    return jobs


def _below(path: Path | None, root: str) -> str | None:
    return None if path is None else Path(os.path.relpath(path, root)).as_posix()


def make_fingerprint(
    args: argparse.Namespace, config: dict[str, Any], rows: list["Row"], use_autocast: bool, sampling: Sampling
) -> dict[str, Any]:
    """What decides the pictures; two runs may share an output folder only if they agree in it."""
    from ldm.checkpoint import file_sha256

    inputs = hashlib.sha256(Path(args.txt_file).read_bytes())
    for path in sorted({path for row in rows for path in (row.mask, row.reference) if path}):
        inputs.update(f"{_below(path, args.data_root)} {path.stat().st_size}\n".encode())
    return {
        "checkpoint_sha256": file_sha256(args.ckpt),
        "config_sha256": hashlib.sha256(repr(config).encode()).hexdigest(),
        "inputs_sha256": inputs.hexdigest(),
        "dataset": args.dataset, "H": args.H, "W": args.W, "precision": "autocast" if use_autocast else "full",
        "seed": args.seed, "fixed_code": args.fixed_code, "ext": args.ext, **sampling.to_dict(),
    }  # fmt: skip


if __name__ == "__main__":
    run_entry_point(main)
