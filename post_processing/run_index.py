"""What inference.py wrote (index.jsonl, run.json) read back, with all paths made absolute and checked."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import Pair
from ldm.files import Record
from ldm.run_folder import RunFolder
from ldm.util import UserError
from post_processing.segmentation.loading import Loaded, load_batches, resize_nearest


@dataclass(frozen=True)
class Sample(Pair):
    """A generated image with the mask and the reference that it was generated from (None if the run had none).

    Attributes:
        size: (height, width) of the image.
        record: its line of the index.
    """

    size: tuple[int, int] = (0, 0)
    record: Record = field(default_factory=dict, compare=False, repr=False)


def read_run(folder: str | Path, data_root: str | Path | None = None,
             check_files: bool = True) -> tuple[list[Sample], dict[str, Any]]:
    """Read the output folder of inference.py.

    Args:
        folder: its --outdir.
        data_root: where the paths of masks and references start; None = as inference.py noted it in run.json.
        check_files: look whether all files are there; False = whoever reads them says so.
    Returns:
        The samples in file order and the contents of run.json.
    Raises:
        FileNotFoundError: if the index is missing, or images that it names (all are counted, the first are named).
        UserError: for damaged lines (with their numbers) and an empty index.
    """
    folder = Path(folder)
    index = folder / "index.jsonl"
    if not index.is_file():
        raise FileNotFoundError(f"index not found: {index}. Expected the --outdir of inference.py. Check the path.")
    run = RunFolder(folder).read()
    if run.get("settings", {}).get("format") == "tar":  # of revisions before December 2026
        raise UserError(f"{folder}: its images are in tars. Expected files. Generate them again.")
    root = Path(data_root if data_root is not None else run.get("data_root", "."))
    samples: list[Sample] = []
    wrong: list[str] = []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
                image, reference = folder / record["image"], record.get("reference")
                samples.append(Sample(image, root / record["mask"], image.stem, root / reference if reference else None,
                                      (int(record["height"]), int(record["width"])), record))
            except (KeyError, TypeError, ValueError) as error:
                wrong.append(f"line {number}: {type(error).__name__} {error}")
    if wrong:
        raise UserError(f"{index}: {len(wrong)} damaged lines ({'; '.join(wrong[:5])}). Run inference.py again to mend "
                        "it.")
    if not samples:
        raise UserError(f"{index}: no samples. Expected the index of a finished run of inference.py.")
    if not check_files:
        return samples, run
    wanted = {path for sample in samples for path in (sample.image, sample.mask, sample.reference) if path}
    missing = sorted(str(path) for path in wanted if not path.is_file())
    if missing:
        raise FileNotFoundError(f"{index}: {len(missing)} files that it names are missing ({', '.join(missing[:3])}). "
                                f"Expected masks and references below {root}. Check --data_root.")
    return samples, run


def read_mask_at(path: Path, table: ClassTable, size: tuple[int, int]) -> np.ndarray:
    """Read a mask at the size that was generated, (H, W) uint8; nearest pixel, as inference.py brings it to size."""
    return resize_nearest(read_mask(path, table), size)


def run_batches(samples: Sequence[Sample], table: ClassTable, batch_size: int, workers: int) -> Iterator[list[Loaded]]:
    """Yield batches of samples with their masks (see load_batches); ValueError for an image of another size."""
    for batch in load_batches(samples, table, batch_size, workers, is_resized=True):
        for loaded in batch:
            if loaded.mask.shape != loaded.pair.size:
                raise ValueError(f"image {loaded.pair.image}: {loaded.mask.shape} pixels. Expected {loaded.pair.size} "
                                 "(height, width). Generate it again.")
        yield batch
