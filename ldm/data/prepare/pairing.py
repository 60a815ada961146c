"""Which references go with which masks."""
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from ldm.data.prepare.tiling import Tile
from ldm.util import UserError


def pick(tile: Tile, pool: Sequence[Tile], order: Iterable[int], count: int) -> list[Tile]:
    """The first `count` tiles of a pool in an order that show no ground of `tile`; fewer when there are not as many."""
    return list(islice((pool[index] for index in order if not tile.overlaps(pool[index])), count))


def class_mix(tiles: Sequence[Tile]) -> np.ndarray:
    """Class shares of tiles, (N, K) float64; rows sum to 1, or are 0 where every pixel is ignored."""
    counts = np.array([tile.counts[:-1] for tile in tiles], np.float64)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def make_rows(tile: Tile, references: Sequence[Tile | None]) -> list[dict[str, str]]:
    """Manifest rows of a tile, one a reference (None = a row without reference)."""
    base = {"source": tile.mask, "target": tile.image, "prompt": tile.prompt, **tile.place}
    return [base if reference is None else {**base, "ref_image": reference.image} for reference in references]


def pair_for_training(tiles: Sequence[Tile], kind: str, count: int, rng: np.random.Generator) -> tuple[list[dict], int]:
    """Make the rows of a training or validation manifest.

    Args:
        tiles: tiles of one split; they are also the candidates, so a split never looks into another.
        kind: `none`, `same_group` (a reference of the tile's group) or `random` (of any group).
        count: rows, each with another reference, a tile; fewer where a group has not as many other tiles.
        rng: random generator.
    Returns:
        Rows, and the number of tiles left out because no other tile could be their reference.
    """
    if kind == "none":
        return [row for tile in tiles for row in make_rows(tile, [None])], 0
    pools: dict[str, list[Tile]] = defaultdict(list)
    for tile in tiles:
        pools[tile.source.group if kind == "same_group" else ""].append(tile)
    rows: list[dict] = []
    left_out = 0
    for tile in tiles:
        pool = pools[tile.source.group if kind == "same_group" else ""]
        references = pick(tile, pool, rng.permutation(len(pool)), count)
        rows += make_rows(tile, references)
        left_out += not references
    return rows, left_out


def pair_for_inference(tiles: Sequence[Tile], kind: str, pool: Sequence[Tile], count: int,
                       rng: np.random.Generator) -> list[dict]:
    """Make the rows of an inference manifest, `count` for each tile whose mask is to be generated.

    Args:
        tiles: tiles with masks.
        kind: `random`, `folder` (both drawn from the pool) or `nearest_mix` (least L1 distance of the class shares,
            equal ones in random order).
        pool: candidates for references; nearest_mix uses those with labelled pixels.
        count: references a mask.
        rng: random generator.
    Raises:
        UserError: if the pool has not enough tiles for some mask.
    """
    if kind == "nearest_mix":
        pool = [tile for tile in pool if tile.is_labelled]
    pool_mix = class_mix(pool) if kind == "nearest_mix" and pool else None
    rows: list[dict] = []
    for tile in tiles:
        order = rng.permutation(len(pool))
        if pool_mix is not None:
            distance = np.abs(pool_mix - class_mix([tile])).sum(1)  # (N,)
            order = order[np.argsort(distance[order].round(9), kind="stable")]
        references = pick(tile, pool, order, count)
        if len(references) < count:
            raise UserError(f"--pair {kind}: {len(references)} references for {tile.mask}, expected {count}, from "
                            f"{len(pool)} candidates. Lower --refs_per_mask or give more images.")
        rows += make_rows(tile, references)
    return rows
