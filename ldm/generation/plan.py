"""What a run of inference.py is going to do, with everything checked that can be checked before the model is loaded."""

import hashlib
import logging
import os
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ldm.cli import choose_device
from ldm.data.classes import ClassTable
from ldm.data.images import image_size
from ldm.data.manifest import Row, read_manifest
from ldm.files import Record, file_sha256
from ldm.generation.guide import guide_fingerprint, load_guide
from ldm.generation.machine import find_share
from ldm.generation.store import ShardStore
from ldm.methods.base import Method
from ldm.sampling.modes import Sampling, choose_sampling
from ldm.sampling.noise import sample_seed
from ldm.util import UserError
from ldm.weights.load import build_skeleton, read_model_config

logger = logging.getLogger(__name__)

SHARD_SIZE = 512  # rows; some minutes of one GPU at SD1.5's size
LONGEST_NAME = 255  # bytes in a file name, on all common file systems


@dataclass(frozen=True)
class Job:
    """One image to generate: its row, the seed of its own random stream, and its line of the index.

    The line has `row, copy, seed, image, height, width` among others.
    """

    row: Row
    noise_seed: int
    record: Record

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.record["height"], self.record["width"]


@dataclass(frozen=True)
class Plan:
    """A checked run.

    Attributes:
        settings: the command line of inference.py.
        sampling: how to sample.
        config: of the model.
        table: class table that masks are read with.
        rows: good rows of the manifest.
        bad_rows: records of rows that are left out, with a `reason`.
        use_autocast: bfloat16 where it is safe.
        device: where to compute.
        fingerprint: what decides the images.
        layout: `rows`, `shard_size` and `copies` of the run.
        numbers: shards that this process generates, finished ones left out; their files were checked.
    """

    settings: Namespace
    sampling: Sampling
    config: dict[str, Any]
    table: ClassTable
    rows: list[Row]
    bad_rows: list[Record]
    use_autocast: bool
    device: str
    fingerprint: dict[str, Any]
    layout: dict[str, int]
    numbers: list[int]

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.settings.outdir)

    def store(self) -> ShardStore:
        """The output folder and the shards on disk."""
        return ShardStore(self.folder, self.fingerprint, {
            "arguments": vars(self.settings), "sampling": self.sampling.to_dict(), "config": self.config,
            "data_root": os.path.abspath(self.settings.data_root), "class_table": self.table.to_dict()})  # fmt: skip

    def bounds(self, number: int) -> tuple[int, int]:
        """First row of a shard, and the first of the next one."""
        first = number * self.layout["shard_size"]
        return first, min(first + self.layout["shard_size"], self.layout["rows"])

    def jobs(self, number: int, copies: int) -> tuple[list[Job], list[Record]]:
        """What there is to generate of a shard, with so many images a row.

        Returns:
            A job for every copy of every good row; and a record with a `reason` for every copy of the other rows, among
            them those whose mask was lost since the run began.
        """
        first, end = self.bounds(number)
        read_size = cache(image_size)
        jobs, bad = [], [record for record in self.bad_rows if first <= record["row"] < end]
        begin, stop = (bisect_left(self.rows, bound, key=lambda row: row.index) for bound in (first, end))
        for row in self.rows[begin:stop]:
            try:
                size = read_size(row.mask)
            except (UserError, FileNotFoundError) as error:
                reason = f"{row.mask}: cannot be read any more ({error}). Bring it back and start this again."
                bad.append({"row": row.index, "copy": 0, "line": row.line, "reason": reason})
                logger.warning("row %d: no image: %s", row.index, reason)
                continue
            for copy in range(copies):
                record = make_record(self.settings, row, copy, size)
                record["checkpoint_sha256"] = self.fingerprint["checkpoint_sha256"]
                jobs.append(Job(row, self.settings.seed if self.settings.fixed_code else record["seed"], record))
        return jobs, [record | {"copy": copy} for record in bad for copy in range(copies)]


def make_record(settings: Namespace, row: Row, copy: int, own_size: tuple[int, int]) -> Record:
    """Line of the index for one image."""
    number = sample_seed(settings.seed, row.index, copy)
    height, width = size_of(settings) or own_size
    image = f"images/{image_name(row.mask.stem, number, settings.ext)}"
    record = {
        "row": row.index, "copy": copy, "seed": number, "image": image,
        "mask": _below(row.mask, settings.data_root), "reference": _below(row.reference, settings.data_root),
        "prompt": row.prompt, "width": width, "height": height,
    }  # fmt: skip
    return record if (height, width) == own_size else record | {"resized_from": list(own_size)}


def image_name(stem: str, number: int, extension: str) -> str:
    """File name of an image; the number alone makes it unique, so a stem that is too long may be cut."""
    ending = f"_seed_{number}.{extension}"
    kept = os.fsencode(stem)[: LONGEST_NAME - len(ending)]
    return kept.decode(errors="ignore") + ending


def _below(path: Path | None, root: str) -> str | None:
    return None if path is None else Path(os.path.relpath(path, root)).as_posix()


def size_of(settings: Namespace) -> tuple[int, int] | None:
    """(height, width) to generate; None = the masks' own."""
    return None if settings.H is None else (settings.H, settings.W)


def make_plan(settings: Namespace, has_gpu: bool | None = None, processes: int = 1) -> Plan:
    """Check a command line and the files that it names.

    Args:
        settings: the command line of inference.py; without --shard, the share of this process follows from what
            started it.
        has_gpu: whether the machines that will generate have GPUs; None = this machine generates.
        processes: how many will generate these shards; a new run has one for each, if the rows suffice.

    Raises:
        UserError, FileNotFoundError, FileExistsError: saying what is wrong; nothing was written yet.
    """
    settings = Namespace(**vars(settings))  # a copy: some values are filled in
    if settings.shard is None:
        settings.shard = find_share() if settings.engine == "local" else (0, 1)
    config = read_config(settings)
    device = str(choose_device(settings.device)) if has_gpu is None else ("cuda" if has_gpu else "cpu")
    use_autocast = settings.precision == "autocast" or (settings.precision == "auto" and device.startswith("cuda"))
    method = build_skeleton(config)
    if method.image_channels not in (1, 3):
        settings.ext = "npy"
    sampling = choose_sampling(settings, method.own_sampling)
    check_settings(settings, sampling, method)
    ignored = sorted({"prompt", "reference"} - set(method.takes))
    if ignored:
        logger.info("%s does not look at the manifest's %s", type(method).__name__, " and ".join(ignored))
    table = choose_table(settings.dataset, method.class_table)
    layout = plan_layout(settings, processes)
    store = ShardStore(Path(settings.outdir))
    numbers = [number for number in range(settings.shard[0], -(-layout["rows"] // layout["shard_size"]),
                                          settings.shard[1])
               if settings.overwrite or store.is_unfinished(number, layout["copies"])]  # fmt: skip
    need = (*method.takes, *(["image"] if sampling.strength < 1 else []))
    rows, bad_rows = read_rows(settings, table, method, need, numbers, layout)
    if "prompt" in method.takes:
        method.check_prompts({row.prompt for row in rows})
    fingerprint = make_fingerprint(settings, config, table, rows, use_autocast, sampling) | method.fingerprint()
    plan = Plan(settings, sampling, config, table, rows, bad_rows, use_autocast, device, fingerprint, layout, numbers)
    plan.store().check()
    return plan


def read_config(settings: Namespace) -> dict[str, Any]:
    """Config of the generator that a command line names, with what its flags change in it (see read_model_config)."""
    config = read_model_config(settings.ckpt, settings.config, settings.allow_modules)
    for flag, argument, value in (("tokenizer_dir", "tokenizer_dir", settings.tokenizer_dir),
                                  ("prompt_pieces", "max_pieces", settings.prompt_pieces)):  # fmt: skip
        if value:
            set_text_encoder(config, flag, argument, value)
    if settings.vectors:
        config["model"].setdefault("params", {})["vectors_dir"] = settings.vectors
    return config


def set_text_encoder(config: dict[str, Any], flag: str, argument: str, value: Any) -> None:
    """Put the value of a flag into the config of the model's text encoder."""
    text = config["model"].get("params", {}).get("text_encoder")
    if text is None:
        raise UserError(f"--{flag}: {value} is of no use, the model has no text encoder. Leave the flag out.")
    text.setdefault("params", {})[argument] = value


def check_settings(settings: Namespace, sampling: Sampling, method: Method) -> None:
    """Raise UserError where flags do not fit the model or each other."""
    height, width, factor = settings.H, settings.W, method.size_factor
    if (height is None) != (width is None):
        raise UserError(f"--H {height} --W {width}: only one is given. Expected both or none. Add the other.")
    if height and (height % factor or width % factor):
        raise UserError(
            f"--H {height} --W {width}: the model cannot generate this size. Expected multiples of {factor}."
        )
    channels, rows, _ = method.noise_shape(factor, factor)
    for flag, given, actual in (("--C", settings.C, channels), ("--f", settings.f, factor // rows)):
        if given not in (None, actual):
            raise UserError(f"{flag}: {given} is not the model's. Expected {actual}. Leave the flag out.")
    method.check(sampling)
    if settings.guide:
        load_guide(settings.guide, method, "cpu", settings.allow_modules)


def choose_table(dataset: str | None, own: ClassTable) -> ClassTable:
    """Class table that masks are read with: --classes, which must have as many classes as the model's, or the model's.

    By default masks are stored as those of the training were; --classes is for masks numbered or coloured otherwise.
    """
    table = ClassTable.load(dataset) if dataset else own
    if table.num_classes != own.num_classes:
        raise UserError(
            f"--classes: {dataset} has {table.num_classes} classes. Expected {own.num_classes}, as the model's"
            f" table {own.name}. Use a table with the model's classes."
        )
    return table


def plan_layout(settings: Namespace, processes: int = 1) -> dict[str, int]:
    """Rows, rows a shard and copies of the run; a run that was begun keeps its size of shards and its copies.

    A new run of few rows gets smaller shards, so that every process of --shard i/n has one, and each of `processes`.
    """
    path = Path(settings.txt_file)
    if not path.is_file():
        raise FileNotFoundError(f"manifest not found: {path}. Expected a JSON-lines file. Check --txt_file.")
    rows = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    fair = max(1, -(-rows // max(processes, settings.shard[1])))
    size = settings.shard_size or min(SHARD_SIZE, fair)
    old = ShardStore(Path(settings.outdir)).read().get("layout") or {}
    if settings.shard_size and old.get("shard_size", settings.shard_size) != settings.shard_size:
        raise FileExistsError(f"--shard_size: {settings.shard_size} is not that of the run in {settings.outdir}. "
                              f"Expected {old['shard_size']}. Leave the flag out.")
    return {"rows": rows, "shard_size": old.get("shard_size", size),
            "copies": max(settings.num_per_mask, old.get("copies", 0))}  # fmt: skip


def read_rows(settings: Namespace, table: ClassTable, method: Method, need: Sequence[str],
              numbers: Sequence[int], layout: dict[str, int]) -> tuple[list[Row], list[Record]]:
    """Rows of the manifest with what they need; the files of those that this process generates are checked.

    Returns:
        Good rows, and records of bad ones with --bad_rows skip; else one error lists all bad rows.
    """
    open_shards = set(numbers)
    problems: list[tuple[int, str]] | None = [] if settings.bad_rows == "skip" else None
    rows = read_manifest(
        settings.txt_file, settings.data_root, need=need, table=table, size_factor=method.size_factor,
        size=size_of(settings), decode=lambda row: row // layout["shard_size"] in open_shards, problems=problems,
        follow_links=settings.follow_links,
    )  # fmt: skip
    if not problems:
        return rows, []
    lines = Path(settings.txt_file).read_bytes().splitlines()
    index_of = {line: i for i, line in enumerate(n for n, content in enumerate(lines, start=1) if content.strip())}
    found: dict[int, Record] = {}
    for line, text in problems:
        record = found.setdefault(line, {"row": index_of[line], "copy": 0, "line": line, "reason": text})
        if record["reason"] != text:
            record["reason"] += f" {text}"
    logger.warning("%d rows are left out, see failures.jsonl", len(found))
    return rows, list(found.values())


def hash_of(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def without_places(node: Any) -> Any:
    """A config without folders that decide nothing by their name (see Method.fingerprint)."""
    if isinstance(node, dict):
        return {key: without_places(value) for key, value in node.items() if key != "vectors_dir"}
    return node


def make_fingerprint(settings: Namespace, config: dict[str, Any], table: ClassTable, rows: Sequence[Row],
                     use_autocast: bool, sampling: Sampling) -> dict[str, Any]:
    """What decides the images; two runs may share an output folder only if they agree in it.

    Not part of it: what changes rounding at most (device, batch size, --compile) or nothing (processes, engine, number
    of copies). Of the files that rows name, sizes are compared, not contents: reading a million would take hours.
    """
    inputs = hashlib.sha256(Path(settings.txt_file).read_bytes())
    if settings.bad_rows == "stop":  # with "skip", a file that is mended later must not make it another run
        for path in sorted({path for row in rows for _, path in row.files.values()}):
            inputs.update(f"{_below(path, settings.data_root)} {path.stat().st_size}\n".encode())
    return {
        "checkpoint_sha256": file_sha256(settings.ckpt),
        "config_sha256": hash_of(without_places(config)),
        "inputs_sha256": inputs.hexdigest(), "bad_rows": settings.bad_rows,
        "class_table": f"{table.name} {hash_of(table.to_dict())[:16]}", "H": settings.H, "W": settings.W,
        "precision": "autocast" if use_autocast else "full", "seed": settings.seed,
        "fixed_code": settings.fixed_code, "ext": settings.ext, "format": settings.format,
        **sampling.to_dict(), **(guide_fingerprint(settings.guide, settings.allow_modules) if settings.guide else {}),
    }  # fmt: skip
