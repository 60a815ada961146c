"""The scale that brings the images of a set to 8 bits, measured over the whole set."""
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ldm.data.bands import Reading
from ldm.data.images import open_image
from ldm.data.prepare.sources import Source
from ldm.util import UserError

SAMPLES = 16_000_000  # pixels that are looked at in the whole set
PATCH = 256  # rows read at a time of scenes that have more than their share


def measure_scale(sources: Sequence[Source], reading: Reading, channels: int, low: float, high: float,
                  workers: int) -> Reading:
    """The reading with a scale of one (low, high) a band: these percentiles, 0..100, over a set.

    Images of 8 bits are not looked at, since they are not scaled; pixels without data do not count. Of large sets a
    regular part is looked at, the same in every run.

    Args:
        sources: the images of the set; of those with a mask if there are any, so references do not change the scale.
        reading: bands and nodata.
        channels: C of the tiles.
        low, high: percentiles.
        workers: threads.
    Raises:
        UserError: if there is nothing to scale, a file cannot be read, or all numbers are equal.
    """
    chosen = [source for source in sources if source.pair.mask is not None] or list(sources)
    share = max(SAMPLES // max(len(chosen), 1), 1024)
    with ThreadPoolExecutor(workers) as pool:
        found = [part for part in pool.map(lambda source: sample_image(source, reading, channels, share), chosen)
                 if part is not None and len(part)]
    if not found:
        raise UserError("--scale_percentiles: no image has more than 8 bits, so there is nothing to scale. Leave the "
                        "flag away.")
    if len({part.shape[1] for part in found}) > 1:
        raise UserError("--scale_percentiles: the images have different numbers of bands. Choose with --bands.")
    bounds = np.percentile(np.concatenate(found), [low, high], axis=0).T
    if (bounds[:, 0] >= bounds[:, 1]).any():
        raise UserError(f"--scale_percentiles {low:g} {high:g}: a band has the same number at both, "
                        f"{bounds[:, 0].tolist()}. Choose percentiles that are further apart, or --scale_range.")
    return replace(reading, scale=tuple((float(a), float(b)) for a, b in bounds))


def sample_image(source: Source, reading: Reading, channels: int, most: int) -> np.ndarray | None:
    """About `most` pixels of an image as they are stored, (N, B); None for 8 bits."""
    with open_image(source.pair.image, channels, reading) as image:
        info = image.info
        if info.dtype == "uint8" and info.bits == 8:
            return None
        count = max(1, -(-info.height * info.width // most))  # one pixel of so many
        parts = []
        if info.by_rows and info.height * info.width > 4 * most:
            blocks = max(1, most // (PATCH * info.width) or 1)
            tops = np.linspace(0, max(info.height - PATCH, 0), min(blocks + 1, -(-info.height // PATCH))).astype(int)
            count = max(1, -(-len(tops) * PATCH * info.width // most))
        else:
            tops = range(0, info.height, PATCH)
        for top in tops:
            values, valid = image.read_stored(int(top), min(int(top) + PATCH, info.height))
            pixels = (values.reshape(-1, values.shape[2]) if valid is None else values[valid])[::count]
            if pixels.dtype.kind == "f":
                pixels = pixels[np.isfinite(pixels).all(1)]
            parts.append(pixels)
    return np.concatenate(parts)
