"""What a measurement of the gain trains on and generates: labelled real pairs, masks with references, mixed masks."""

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ldm.data.classes import ClassTable, read_mask, read_raw_mask
from ldm.data.images import IMAGE_SUFFIXES, read_image
from ldm.data.manifest import Row, read_manifest, write_manifest
from ldm.data.prepare.sources import choose_groups
from ldm.files import atomic_write, link_or_copy
from ldm.util import UserError
from post_processing.run_index import read_run
from post_processing.segmentation.dataset import class_weights
from post_processing.segmentation.loading import load_pair
from post_processing.segmentation.mixing import choose_box
from post_processing.selection.rules import encode_mask

if TYPE_CHECKING:
    from post_processing.gain.plan import Plan
    from post_processing.run_index import Sample

logger = logging.getLogger(__name__)

TILE_OFFSET = re.compile(r"_\d{4,}_\d{4,}$")  # what prepare_dataset.py adds to the name of an image
SPLIT_SEED = 23
NEAREST = 16  # references that one is drawn of, with --match_references
CANDIDATES = 64  # masks that one is chosen of, to come near to given shares
MAX_BLACK = 0.05  # share of pixels that are 0 in every band, up to which an image is a reference: more is a hole
LEAST_SHARE = 0.01  # of a mask's pixels; a class with fewer does not make the mask worth generating


def split_real(plan: "Plan") -> tuple[list[Row], list[Row], list[Row]]:
    """Real pairs that keep their labels, those that do not, and those that are held out; each pair once.

    All three in whole groups: what the names have in common before the offsets of their tiles, or what --scene_regex
    finds in them.
    """
    args = plan.args
    rows = read_manifest(plan.real, plan.root, need=("image",), table=ClassTable.load(plan.table))
    rows = list({(row.image, row.mask): row for row in rows}.values())  # rows may differ in the reference only
    rest, held_out = split_groups(rows, 1 - args.held_out, args.scene_regex, 3)
    real, others = split_groups(rest, args.real_fraction, None, 0)
    return real, others, held_out


def split_groups(rows: Sequence[Row], fraction: float, pattern: str | None, draw: int) -> tuple[list[Row], list[Row]]:
    """A share of the rows in whole groups, and the others; `draw` numbers the random draw."""
    if fraction == 1:
        return list(rows), []
    groups = [group_of(row, pattern) for row in rows]
    tiles = [SimpleNamespace(group=group) for group in groups]
    chosen = choose_groups(tiles, fraction, np.random.default_rng([SPLIT_SEED, draw]))
    return ([row for row, group in zip(rows, groups, strict=True) if group in chosen],
            [row for row, group in zip(rows, groups, strict=True) if group not in chosen])  # fmt: skip


def group_of(row: Row, pattern: str | None) -> str:
    """Image or scene that a tile is of; UserError if the pattern finds none."""
    name = Path(row.mask_name).stem
    if pattern is None:
        return TILE_OFFSET.sub("", name)
    match = re.search(pattern, name)
    if match is None:
        raise UserError(f"--scene_regex {pattern}: finds nothing in {name}. Expected one that fits all names.")
    return match.group(match.re.groups and 1)


def write_real_set(plan: "Plan") -> None:
    """Write the manifests of the labelled real pairs, of those that are held out, and of the folds."""
    real, others, held_out = split_real(plan)
    write_pairs(plan, plan.manifests["real"], real)
    if plan.args.held_out:
        write_pairs(plan, plan.test, held_out)
    names = sorted({group_of(row, plan.args.scene_regex) for row in real})
    if len(names) < plan.folds:
        raise UserError(f"--hardness_folds {plan.folds}: the {len(real)} real pairs are of {len(names)} images. "
                        "Expected at least as many as folds. Set it to 0, or give --val_txt_file.")
    order = np.random.default_rng([SPLIT_SEED, 4]).permutation(len(names))
    fold_of = {names[place]: number % max(plan.folds, 1) for number, place in enumerate(order)}
    numbers = [fold_of[group_of(row, plan.args.scene_regex)] for row in real]
    for fold in range(plan.folds):
        for name, is_wanted in ((f"fold_{fold}", True), (f"not_fold_{fold}", False)):
            rows = [row for row, number in zip(real, numbers, strict=True) if (number == fold) == is_wanted]
            write_pairs(plan, str(plan.outdir / f"sets/{name}.json"), rows)
    logger.info("%d of %d real pairs are labelled, %d more held out", len(real), len(real) + len(others), len(held_out))


def write_pairs(plan: "Plan", path: str, rows: Sequence[Row]) -> None:
    """Write a manifest of real pairs."""
    write_manifest(path, [{"source": row.mask_name, "target": str(relative(row.image, plan.root))} for row in rows])


def list_references(plan: "Plan", split: tuple[list[Row], ...] | None = None) -> list[str]:
    """All references, paths below the data root: those of --references, and images that lost their labels.

    Images that are held out are among them only where there are no others of --references. Those with holes are left
    out (see MAX_BLACK): a generator takes over the black, and where references are matched by class, it is dark water.
    """
    _, others, held_out = split or split_real(plan)
    rows = [*others, *([] if plan.args.references else held_out)]
    found = [*find_references(plan.args.references, Path(plan.root)),
             *(str(relative(row.image, plan.root)) for row in rows)]  # fmt: skip
    whole = [name for name in found if black_share(Path(plan.root) / name) <= MAX_BLACK]
    if found and not whole:
        raise UserError(f"--references: all {len(found)} images are black (0 in every band) in more than "
                        f"{MAX_BLACK:.0%} of their pixels. Expected images without holes. Check the paths.")
    if len(whole) < len(found):
        logger.info("%d of %d references are left out: more than %d %% of their pixels are black",
                    len(found) - len(whole), len(found), 100 * MAX_BLACK)  # fmt: skip
    return whole


@lru_cache(maxsize=2**18)
def black_share(path: Path) -> float:
    """Share of an image's pixels that are 0 in every band."""
    return float((read_image(path, None) == 0).all(-1).mean())


def link_references(plan: "Plan") -> None:
    """Gather all references in one folder, under numbers, for the prediction of their class shares."""
    folder, names = plan.outdir / "shares/images", list_references(plan)
    record, listed = plan.outdir / "shares/references.txt", "".join(f"{name}\n" for name in names)
    if not record.is_file() or record.read_text("utf-8") != listed:  # the numbers are those of other images
        shutil.rmtree(plan.outdir / "shares/masks", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    atomic_write(record, listed)
    for number, name in enumerate(names):
        link_or_copy(Path(plan.root) / name, folder / f"{number:06d}{Path(name).suffix}")


def read_reference_pixels(folder: Path) -> np.ndarray:
    """Pixels of every class in each reference, as predict_masks.py wrote them: (N, K); UserError if there are none."""
    table = ClassTable.load(str(folder / "classes.yaml"))
    # By the numbers of link_references; .tif where the references have a place on Earth.
    masks = sorted(path for path in (folder / "masks").iterdir() if path.suffix in (".png", ".tif"))
    pixels = np.array([np.bincount(read_mask(mask, table).ravel(), minlength=256)[: table.num_classes]
                       for mask in masks])  # fmt: skip
    if not pixels.any():
        raise UserError(f"{folder}: no pixel has a class. Expected predicted masks of references.")
    return pixels


def nearest_references(mask: np.ndarray, pixels: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the references whose class shares are nearest (L1) to those of a mask.

    Args:
        mask: (H, W) uint8, 255 = ignored.
        pixels: (N, K), see read_reference_pixels; a reference without any is as far as can be.
        count: how many, in ascending distance.
    """
    total, wanted = pixels.sum(1), np.bincount(mask.ravel(), minlength=256)[: pixels.shape[1]]
    distance = np.abs(pixels / total.clip(1)[:, None] - wanted / max(wanted.sum(), 1)).sum(1)
    return np.where(total > 0, distance, 2).argsort(kind="stable")[:count]


def write_masks(plan: "Plan") -> None:
    """Write the manifest of the masks to generate with their references; with --mix_masks also the masks themselves."""
    args, table = plan.args, ClassTable.load(plan.table)
    split = split_real(plan)
    real, pool = split[0], list_references(plan, split)
    pixels = read_reference_pixels(plan.outdir / "shares") if args.match_shares or args.match_references else None
    if pixels is not None and len(pixels) != len(pool):
        raise UserError(f"{plan.outdir / 'shares'}: shares of {len(pixels)} references, but there are {len(pool)} "
                        "now. Expected those of an unchanged --references. Choose a new --outdir.")
    shares = pixels.sum(0) / pixels.sum() if args.match_shares else None
    near = max(NEAREST, args.num_per_mask)

    def choose_from(mask: np.ndarray) -> np.ndarray | int:
        return nearest_references(mask, pixels, near) if args.match_references else len(pool)

    if plan.has_references and len(pool) < args.num_per_mask:
        raise UserError(f"--references: {len(pool)} images. Expected at least --num_per_mask {args.num_per_mask}.")
    prompts, chosen = choose_masks(real, table, args.num_masks, args.balance, shares)
    random, items, pairs = np.random.default_rng([SPLIT_SEED, 2]), [], []
    for place in chosen:
        item = {"source": real[place].mask_name, "target": str(relative(real[place].image, plan.root)),
                "prompt": prompts[place]}  # fmt: skip
        numbers = random.choice(choose_from(read_mask(real[place].mask, table)), args.num_per_mask,
                                replace=False) if pool else []  # fmt: skip
        items += [{**item, "ref_image": pool[number]} for number in numbers] if pool else [item]
        pairs += [real[place]] * (len(numbers) or 1)
    if args.mix_masks:
        matched = (lambda mask: [pool[number] for number in choose_from(mask)]) if args.match_references else None
        items = write_mixtures(Path(plan.mask_root), items, pairs, plan.root, table, matched)
    write_manifest(plan.manifests["painted"], items)
    logger.info("%d rows to generate, %d references", len(items), len(pool))


def write_synthesized(plan: "Plan", name: str, run: str = "synthesis",
                      choose_dropped: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
    """Write all synthesized images as a training set; they are linked, not copied.

    Args:
        plan: the measurement.
        name: folder of the set, and its key in the plan's manifests.
        run: folder of the images.
        choose_dropped: called with each mask (H, W) uint8, gives the pixels (H, W) bool to ignore; None = none are.
    """
    folder, (samples, table) = plan.outdir / name, read_samples(plan, run)
    for part in ("images", "masks"):
        (folder / part).mkdir(exist_ok=True)
    rows = []
    for sample in samples:
        loaded = load_pair(sample, table, is_resized=True)
        image, mask = f"images/{sample.image.name}", f"masks/{sample.image.stem}.png"
        dropped = choose_dropped(loaded.mask) if choose_dropped else np.zeros(loaded.mask.shape, bool)
        atomic_write(folder / mask, encode_mask(loaded.raw, dropped, table))
        (folder / image).unlink(missing_ok=True)
        link_or_copy(sample.image, folder / image)
        rows.append({"source": mask, "target": image})
    write_manifest(plan.manifests[name], rows)


def read_samples(plan: "Plan", run: str = "synthesis") -> "tuple[list[Sample], ClassTable]":
    """Synthesized images of a run with their masks, and the class table of these."""
    samples, record = read_run(plan.outdir / run)
    return samples, ClassTable.load(record.get("class_table") or plan.table)


def write_random_drop(plan: "Plan") -> None:
    """Write all synthesized images, with as many random pixels of each class dropped as the filter dropped in all.

    What the filter gains over this is worth of its choice, not of its strictness.
    """
    samples, table = read_samples(plan)
    pixels, kept = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for sample in samples:
        loaded = load_pair(sample, table, is_resized=True)
        pixels += np.bincount(loaded.mask.ravel(), minlength=256)
        filtered = plan.outdir / f"filter/masks/{sample.image.stem}.png"
        mask = read_mask(filtered, table) if filtered.is_file() else loaded.mask  # one that was not judged
        kept += np.bincount(mask.ravel(), minlength=256)
    random, left = np.random.default_rng([SPLIT_SEED, 3]), np.stack([pixels - kept, kept])  # to drop and to keep

    def choose(mask: np.ndarray) -> np.ndarray:
        is_dropped = np.zeros(mask.size, bool)
        for number in range(table.num_classes):
            places = np.flatnonzero(mask == number)
            count = random.hypergeometric(*left[:, number], len(places)) if len(places) else 0
            is_dropped[random.choice(places, count, replace=False)] = True
            left[:, number] -= count, len(places) - count
        return is_dropped.reshape(mask.shape)

    write_synthesized(plan, "random_drop", choose_dropped=choose)
    logger.info("dropped %d of %d pixels at random, as many of each class as the filter",
                (pixels - kept)[: table.num_classes].sum(), pixels[: table.num_classes].sum())  # fmt: skip


def write_targets(plan: "Plan") -> None:
    """Write the manifest of the references as unlabelled images of the target, for self-training."""
    images = list_references(plan)
    if not images:
        raise UserError("--references: none. Expected unlabelled images of the target, for the arms of self-training.")
    write_manifest(plan.manifests["targets"], [{"target": image} for image in dict.fromkeys(images)])


def write_mixtures(folder: Path, items: Sequence[dict[str, str]], pairs: Sequence[Row], root: str, table: ClassTable,
                   matched: Callable[[np.ndarray], list[str]] | None = None) -> list[dict[str, str]]:
    """Write new layouts: into each mask, and alike into its image, a box of another pair of the draw is pasted.

    What is pasted where follows from the place in the list alone (CutMix, Yun et al. 2019).

    Args:
        folder: gets masks/, images/ and references/, so that all paths of the result start there.
        items: entries of a manifest, one for each image to generate.
        pairs: the real pair of each.
        root: where the references of the items start.
        table: class table of the masks.
        matched: references to draw one from, for a mixed mask (H, W); None = keep that of the item.
    Returns:
        Entries of a manifest; `target` is the mixed image, which --strength starts from.
    """
    for name in ("masks", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    mixed = []
    for number, (item, pair) in enumerate(zip(items, pairs, strict=True)):
        random = np.random.RandomState([SPLIT_SEED, number])  # has the methods of numpy's global generator
        (image, raw, mask), other = (
            [read_image(row.image, None).copy(), read_raw_mask(row.mask, table).copy(),
             read_mask(row.mask, table).copy()]
            for row in (pair, pairs[random.randint(len(pairs))])
        )
        height, width = np.minimum(mask.shape, other[2].shape)  # where they differ, what both have takes part
        chosen = choose_box(height, width, random)
        for here, there in zip((image, raw, mask), other, strict=True):
            here[:height, :width][chosen] = there[:height, :width][chosen]
        name = f"{number:06d}.png"
        (folder / "masks" / name).write_bytes(encode_mask(raw, np.zeros((1, 1), bool), table))
        image_name = f"images/{number:06d}.{'png' if image.shape[2] == 3 else 'npy'}"
        if image.shape[2] == 3:
            Image.fromarray(image).save(folder / image_name)
        else:
            np.save(folder / image_name, image)
        mixed.append({"source": f"masks/{name}", "target": image_name, "prompt": table.prompt(mask)})
        if "ref_image" in item:
            source = random.choice(matched(mask)) if matched else item["ref_image"]
            reference = f"references/{source}"  # the whole path: names may repeat in other folders
            mixed[-1]["ref_image"] = reference
            if not (folder / reference).exists():
                (folder / reference).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(Path(root) / source, folder / reference)
    return mixed


def choose_masks(rows: Sequence[Row], table: ClassTable, count: int | None, balance: float,
                 shares: np.ndarray | None = None) -> tuple[list[str], list[int]]:
    """Draw the masks to generate from: the chance of one is the sum over its classes of (share in the set) ** -balance.

    Args:
        rows: labelled pairs.
        table: classes of the masks.
        count: masks; None = all that have a class.
        balance: 0 = all masks alike, higher prefers those of many and of rare classes.
        shares: (K,) class shares that the drawn masks should have together, in place of balance.
    Returns:
        The prompt of every row, and the places of the drawn rows in ascending order.
    """
    pixels, prompts = np.zeros((len(rows), 256)), []
    for place, row in enumerate(rows):
        mask = read_mask(row.mask, table)
        pixels[place] = np.bincount(mask.ravel(), minlength=256)
        prompts.append(row.prompt or table.prompt(mask))
    pixels = pixels[:, : table.num_classes]
    is_there = pixels > LEAST_SHARE * pixels.sum(1, keepdims=True)
    weights = is_there @ np.array(class_weights(pixels.sum(0), balance))
    usable = int(np.count_nonzero(weights))
    size = min(count or usable, usable)
    if shares is not None:
        return prompts, sorted(draw_shares(pixels, shares, size))
    drawn = np.random.default_rng([SPLIT_SEED, 1]).choice(len(rows), size, replace=False, p=weights / weights.sum())
    return prompts, sorted(map(int, drawn))


def draw_shares(pixels: np.ndarray, shares: np.ndarray, count: int) -> list[int]:
    """Draw masks whose class shares together come near to given ones.

    One mask after the other: of some random candidates the one that brings the sum nearest (L1), so that masks of all
    kinds have a chance.

    Args:
        pixels: (N, K) pixels of each class; masks without any are never drawn.
        shares: (K,) wanted, sum 1.
        count: masks, at most as many as have a class.
    Returns:
        Places of the drawn masks.
    """
    random, drawn = np.random.default_rng([SPLIT_SEED, 1]), []
    left = np.flatnonzero(pixels.any(1))
    mixes = pixels / pixels.sum(1, keepdims=True).clip(1)
    total = np.zeros(len(shares))
    for number in range(1, count + 1):
        some = random.choice(left, min(CANDIDATES, len(left)), replace=False)
        best = some[np.abs((total + mixes[some]) / number - shares).sum(1).argmin()]
        total += mixes[best]
        left = left[left != best]
        drawn.append(int(best))
    return drawn


def find_references(sources: Sequence[str], root: Path) -> list[str]:
    """Reference images of folders and manifests, relative to the data root, each once.

    Raises:
        UserError: if a folder does not lie below the data root or holds no image.
    """
    found: list[str] = []
    for source in sources:
        if Path(source).is_dir():
            paths = sorted(path for path in Path(source).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        else:
            paths = [row.image for row in read_manifest(source, root, need=("image",), check_files=False)]
        if not paths:
            raise UserError(f"--references {source}: no images. Expected {', '.join(IMAGE_SUFFIXES)}. Check the path.")
        found += [str(relative(path, str(root))) for path in paths]
    return list(dict.fromkeys(found))


def relative(path: Path, root: str) -> Path:
    """A path relative to the data root; UserError if it does not lie below."""
    try:
        return path.absolute().relative_to(root)
    except ValueError:
        raise UserError(f"{path}: does not lie below --data_root {root}. Expected all images there.") from None
