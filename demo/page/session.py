"""What stands behind the page: a model that is loaded once, jobs that inference.py would repeat, and their files."""

import argparse
import json
import logging
import shlex
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.cli import choose_device
from ldm.data.classes import ClassTable
from ldm.data.manifest import Row, read_manifest
from ldm.diffusion.path import Level
from ldm.generation.generator import BatchGenerator, ConditionDataset, generate_batches, make_loader
from ldm.generation.guide import load_guide
from ldm.generation.plan import Job
from ldm.methods.diffusion import DiffusionMethod
from ldm.sampling.guidance import Run
from ldm.sampling.modes import Sampling, add_sampling_flags, choose_sampling
from ldm.sampling.noise import sample_seed
from ldm.sampling.rectify import Rectifier
from ldm.sampling.samplers import Denoise
from ldm.util import UserError
from ldm.weights.load import load_method, read_model_config

logger = logging.getLogger(__name__)

MOST_IMAGES = 24  # of one job: the page is for looking, inference.py for data sets
BATCH_SIZE = 4  # images at once on a GPU


class Cancelled(Exception):
    """Somebody pressed Cancel."""


@dataclass(frozen=True)
class Order:
    """One press of Generate.

    Args:
        mask: (H, W) uint8, ids of the model's class table, 255 where there is no class.
        references: names and images, (H, W, 3) uint8 each; one image a seed for each of them.
        prompt: text.
        seed: of inference.py.
        samples: images a reference, each with noise of its own.
        flags: of inference.py, how to sample.
        start: (H, W, 3) uint8 image of the mask's size that a strength below 1 starts from.
    """

    mask: np.ndarray
    references: Sequence[tuple[str, np.ndarray]]
    prompt: str
    seed: int
    samples: int
    flags: Sequence[str] = ()
    start: np.ndarray | None = None


class Studio:
    """A loaded model.

    Args:
        checkpoint: weights.
        config: model yaml where the checkpoint has none inside.
        device, precision: as inference.py's.
        guide: files of --guide, for orders that ask to rectify; empty = none.
    Raises:
        UserError, FileNotFoundError: if it cannot be loaded.
    """

    def __init__(self, checkpoint: str, config: str | None = None, device: str = "auto",
                 precision: str = "auto", guide: Sequence[str] = ()) -> None:
        self.checkpoint, self.config_file = str(checkpoint), config
        self.device = choose_device(device)
        self.use_autocast = precision == "autocast" or (precision == "auto" and self.device.type == "cuda")
        self.precision = precision
        self.method: DiffusionMethod = load_method(checkpoint, read_model_config(checkpoint, config), self.device)
        if self.method.image_channels not in (1, 3):
            raise UserError(f"--ckpt: {checkpoint} generates {self.method.image_channels} bands. Expected images that "
                            "a browser can show, of one or three. Use inference.py.")
        self.table: ClassTable = self.method.class_table
        self.guide_files = [str(file) for file in guide]
        self.guide = load_guide(self.guide_files, self.method, self.device) if guide else None

    def sampling(self, flags: Sequence[str]) -> Sampling:
        """Settings that these flags of inference.py mean for this model; UserError where one is not possible."""
        parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
        add_sampling_flags(parser.add_argument_group())
        try:
            given = parser.parse_args([flag for flag in flags if flag != "--fixed_code"])
            return choose_sampling(given, self.method.own_sampling)
        except (argparse.ArgumentError, SystemExit) as error:
            raise UserError(f"sampling {shlex.join(flags)}: {error}.") from error

    def generate(self, order: Order, folder: Path, on_step: Callable[[int, int], None]) -> Iterator[Path]:
        """Write an order's inputs to a folder, then its images one batch after another.

        Files: rows.json, label/, ref/ and, with strength, img/: a manifest for inference.py; command.txt: its command
        line, which gives the same images bit by bit on a CPU; images/.

        Args:
            order: what to generate.
            folder: an empty one.
            on_step: called before every evaluation of the network with (done, all); may raise Cancelled.
        Yields:
            Paths of finished images, references in their order, the seeds of one after another.
        Raises:
            UserError: for an order that the model cannot do; nothing was generated then.
        """
        sampling = self.sampling(order.flags)
        rows = self.write_inputs(order, folder, sampling)
        is_fixed = "--fixed_code" in order.flags
        height, width = order.mask.shape
        jobs = []
        for row in rows:
            for copy in range(order.samples):
                number = sample_seed(order.seed, row.index, copy)
                record = {"image": f"{row.index:02d}_seed_{number}.png", "height": height, "width": width}
                jobs.append(Job(row, order.seed if is_fixed else number, record))
        done = evaluations = 0

        def count() -> None:
            nonlocal done
            on_step(min(done, evaluations), evaluations)
            done += 1

        watch = Watch(count, Rectifier(sampling.rectify, self.guide) if sampling.rectify else None)
        batch_generator = BatchGenerator(self.method, sampling, self.device, self.use_autocast, BATCH_SIZE,
                                         rectifier=watch)
        batch_size = batch_generator.batch_size
        batches = -(-len(jobs) // batch_size)
        evaluations = max(1, round(sampling.num_steps * sampling.strength)) * batches
        loader = make_loader(ConditionDataset(self.method, self.table, None))
        (folder / "images").mkdir()
        for number, results in enumerate(generate_batches(batch_generator, loader, jobs, batch_size), start=1):
            if reasons := {result.reason for result in results if result.pixels is None}:
                raise UserError("; ".join(sorted(reasons)) + ". Choose a smaller guidance, or other files.")
            for job, pixels, _ in results:
                path = folder / "images" / job.record["image"]
                Image.fromarray(pixels).save(path)
                yield path
            done = number * evaluations // batches

    def write_inputs(self, order: Order, folder: Path, sampling: Sampling) -> list[Row]:
        """Write the manifest of an order with its files and the command; returns its checked rows."""
        takes_reference = "reference" in self.method.takes
        references = list(order.references) if takes_reference else [("", None)]
        if not references:
            raise UserError("no reference is chosen. Choose one or more below the mask, or add an image of your own.")
        if not order.samples * len(references) <= MOST_IMAGES:
            raise UserError(f"{order.samples} x {len(references)} images are many for a page. Expected {MOST_IMAGES} "
                            "at most. Choose fewer references or seeds, or use inference.py.")
        if sampling.strength < 1 and order.start is None:
            raise UserError(f"strength is {sampling.strength}, but there is no image to start from. Add one, or set "
                            "strength to 1.")
        files: dict[str, np.ndarray] = {"label/mask.png": self.table.colourise(order.mask)}
        lines = []
        for number, (_, image) in enumerate(references):
            line = {"source": "label/mask.png", "prompt": order.prompt}
            if takes_reference:
                line["ref_image"] = f"ref/{number:02d}.png"
                files[line["ref_image"]] = image
            if sampling.strength < 1:
                line["target"] = "img/start.png"
                files[line["target"]] = order.start
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        for name, values in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / name)
        manifest = folder / "rows.json"
        manifest.write_text("".join(lines), encoding="utf-8")
        (folder / "command.txt").write_text(self.command(order), encoding="utf-8")
        need = [*self.method.takes, *(["image"] if sampling.strength < 1 else [])]
        return read_manifest(manifest, folder, need=need, table=self.table, size_factor=self.method.size_factor)

    def command(self, order: Order) -> str:
        """What generates an order's images again, to be run in the repository."""
        words = ["python", "inference.py", "--ckpt", self.checkpoint,
                 *(["--config", self.config_file] if self.config_file else []), "--precision", self.precision,
                 "--data_root", "HERE", "--txt_file", "HERE/rows.json", "--outdir", "HERE/again",
                 "--seed", str(order.seed), "--num_per_mask", str(order.samples), *order.flags]  # fmt: skip
        return "# In the repository, with the folder that this file lies in for HERE:\n" + shlex.join(words) + "\n"


class Watch:
    """A correction (see ldm.sampling.guidance.Correct) that counts the steps of one that rectifies, or of none.

    `on_step` is called before every evaluation of the network; what it raises ends the sampling.
    """

    def __init__(self, on_step: Callable[[], None], rectifier: Rectifier | None) -> None:
        self.on_step, self.rectifier = on_step, rectifier

    def __call__(self, denoise: Denoise, run: Run) -> Denoise:
        """Bind it to one run of a sampler."""
        denoise = self.rectifier(denoise, run) if self.rectifier else denoise

        def watched(x: Tensor, level: Level) -> Tensor:
            self.on_step()
            return denoise(x, level)

        return watched

    def settle(self, count: int) -> None:
        """See Rectifier.settle."""
        if self.rectifier:
            self.rectifier.settle(count)


def pack(folder: Path) -> Path:
    """Zip of a job's folder beside it: images, manifest, inputs and command."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
    return path
