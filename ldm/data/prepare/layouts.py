"""How published data sets lie on disk, one small object each: folders, names, class table and fixed splits."""
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.classes import MaskRules
from ldm.data.prepare.sources import SPLITS, SourceFolder
from ldm.util import UserError

POTSDAM_TRAIN = {f"{row}_{column}" for row, columns in (
    (2, (10, 11, 12)), (3, (10, 11, 12)), (4, (10, 11, 12)), (5, (10, 11, 12)), (6, range(7, 13)), (7, range(7, 13)),
) for column in columns}  # fmt: skip
POTSDAM_TEST = {"2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13", "6_14", "6_15",
                "7_13"}
POTSDAM_IMAGES = {"RGB": "2_Ortho_RGB", "IRRG": "3_Ortho_IRRG", "RGBIR": "4_Ortho_RGBIR"}
VAIHINGEN_TRAIN = {1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37}
VAIHINGEN_TEST = {2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38}


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk.

    Attributes:
        about: one line for the help.
        find: the folders of a source, from the flags of prepare_dataset.py; FileNotFoundError or UserError if they are
            not there.
        takes: which of `root`, `images`, `masks` it needs.
        may_take: which of them it may use beside.
        table: class table of its masks; None = must be given.
        split_of: fixed split of a name, None for a name of no list; None = no fixed split.
        group: regular expression whose first group is the group of a name, unless another one is given.
        rules: how its masks are decoded unless flags say otherwise.
        products: kinds of images to choose from, the first is the default.
    """

    about: str
    find: Callable[[Namespace], list[SourceFolder]]
    takes: tuple[str, ...] = ("root",)
    may_take: tuple[str, ...] = ()
    table: str | None = None
    split_of: Callable[[str], str | None] | None = None
    group: str | None = None
    rules: MaskRules = MaskRules()
    products: tuple[str, ...] = ()


def find_folder(root: Path, names: Sequence[str], flag: str = "--root") -> Path:
    """The one folder in root whose name starts (in any case) with one of the words; UserError for none or several."""
    if not root.is_dir():
        raise FileNotFoundError(f"--root: folder not found: {root}. Check the path.")
    words = tuple(name.lower() for name in names)
    found = sorted(path for path in root.iterdir() if path.is_dir() and path.name.lower().startswith(words))
    exact = [path for path in found if path.name.lower() in words]
    found = exact if len(exact) == 1 else found
    if len(found) != 1:
        raise UserError(f"--root {root}: {len(found)} folders named {'/'.join(names)}* "
                        f"({', '.join(path.name for path in found)}). Expected one. Choose it with {flag}.")
    return found[0]


def find_splits(preset: str, image_root: Path, mask_root: Path, images: str, masks: str, **options: Any) -> list[
        SourceFolder]:
    """Folders `images` and `masks` (with {} for the split) of the splits that are there; UserError if none is."""
    found = []
    for split in SPLITS:
        names = [split, "valid"] if split == "val" else [split]
        for name in names:
            pair = image_root / images.format(name), mask_root / masks.format(name)
            if pair[0].exists() or pair[1].exists():
                found.append(SourceFolder(split, *pair, **options))
                break
    if not found:
        names = f"{image_root / images.format('train')} and {mask_root / masks.format('train')}"
        raise UserError(f"--preset {preset}: neither train nor val nor test is there. Expected {names}. Check the "
                        "path.")
    return found


def leave_out_unlabelled(folders: Sequence[SourceFolder]) -> list[SourceFolder]:
    """Without the folders whose masks are not published or whose images are not there; each is said."""
    kept = []
    for folder in folders:
        lacking = [path for path in (folder.images, folder.masks) if path is not None and not path.exists()]
        if lacking:
            there = folder.masks if lacking[0] == folder.images else folder.images
            kind = "images" if lacking[0] == folder.images else "masks"
            print(f"{there}: left out, there are no {kind} in {lacking[0]}")
        else:
            kept.append(folder)
    return kept


def find_pair(places: Namespace, images: Sequence[str], masks: Sequence[str], root: Path | None = None,
              split: str = "train", image_suffix: str | None = None, mask_suffix: str = "",
              may_lack_masks: bool = False) -> SourceFolder:
    """--images and --masks, or what find_folder finds below the root; the suffixes unless flags give others."""
    root = root or places.root
    return SourceFolder(split, places.images or find_folder(root, images, "--images"),
                        places.masks or find_folder(root, masks, "--masks"),
                        places.image_suffix if image_suffix is None else image_suffix,
                        mask_suffix if places.mask_suffix is None else places.mask_suffix, may_lack_masks)


def find_images_masks(places: Namespace) -> list[SourceFolder]:
    """images/ and masks/, or both in train/, val/, test/."""
    root, suffixes = places.root, (places.image_suffix, places.mask_suffix or "")
    if (root / "images").is_dir():
        return [SourceFolder("train", root / "images", root / "masks", *suffixes)]
    return find_splits("images_masks", root, root, "{}/images", "{}/masks", image_suffix=suffixes[0],
                       mask_suffix=suffixes[1])


def find_data_mask(places: Namespace) -> list[SourceFolder]:
    """IMAGES/<split> and MASKS/all/<split>; masks alone, to sample from, are common there."""
    folders = find_splits("data_mask", places.images, places.masks, "{}", "all/{}", image_suffix=places.image_suffix,
                          mask_suffix=places.mask_suffix or "")
    without = [folder for folder in folders if not folder.images.exists()]
    leave_out_unlabelled(without)
    return [folder for folder in folders if folder not in without]


def find_fusu(places: Namespace) -> list[SourceFolder]:
    """Below the root, or below its train/, val/, test/."""
    splits = [split for split in SPLITS if (places.root / split).is_dir()]
    parts = [(split, places.root / split) for split in splits] or [("train", places.root)]
    return [find_pair(places, ("image", "img"), ("label", "mask", "annotation"), root, split) for split, root in parts]


def split_of_potsdam(name: str) -> str | None:
    """Published split of `top_potsdam_2_10` (24 train, 14 test)."""
    match = re.search(r"potsdam_0*(\d+)_0*(\d+)", name)
    key = f"{match[1]}_{match[2]}" if match else ""
    return "train" if key in POTSDAM_TRAIN else "test" if key in POTSDAM_TEST else None


def split_of_vaihingen(name: str) -> str | None:
    """Published split of `top_mosaic_09cm_area1` (16 train, 17 test)."""
    match = re.search(r"area(\d+)", name)
    area = int(match[1]) if match else 0
    return "train" if area in VAIHINGEN_TRAIN else "test" if area in VAIHINGEN_TEST else None


def find_isaid(places: Namespace) -> list[SourceFolder]:
    """<split>/images[/images] with <split>/Semantic_masks[/images[/images]]; test has no masks."""
    folders = []
    for split in ("train", "val"):
        part = places.root / split
        images, masks = deepest(part / "images"), deepest(part / "Semantic_masks")
        if images.exists() or masks.exists():
            folders.append(SourceFolder(split, images, masks, "", "_instance_color_RGB"))
    if not folders:
        raise UserError(f"--preset isaid: neither train nor val is in {places.root}. Expected train/images and "
                        "train/Semantic_masks. Check the path.")
    return folders


def deepest(folder: Path) -> Path:
    """The folder itself, or the `images` that it wraps, as archives unpack them."""
    while (folder / "images").is_dir():
        folder = folder / "images"
    return folder


def find_deepglobe(places: Namespace) -> list[SourceFolder]:
    """train/ with 119_sat.jpg and 119_mask.png side by side; valid/ and test/ have no masks."""
    found = find_splits("deepglobe", places.root, places.root, "{}", "{}", image_suffix="_sat", mask_suffix="_mask")
    kept = []
    for folder in found:
        if any(folder.images.glob("*_mask.*")):
            kept.append(folder)
        else:
            print(f"{folder.images}: left out, there are no masks in it")
    if not kept:
        raise UserError(f"--preset deepglobe: no *_mask.png in {places.root}. Expected train/119_mask.png. Check the "
                        "path.")
    return kept


def find_open_earth_map(places: Namespace) -> list[SourceFolder]:
    """<region>/images and <region>/labels; regions without labels (test) are left out."""
    regions = sorted(path.parent for path in places.root.glob("*/images") if path.is_dir())
    if not regions:
        raise UserError(f"--preset open_earth_map: no region in {places.root}. Expected aachen/images, aachen/labels, "
                        "... Check the path.")
    return leave_out_unlabelled([SourceFolder("train", region / "images", region / "labels", may_lack_masks=True)
                                 for region in regions])


def find_inria(places: Namespace) -> list[SourceFolder]:
    """train/images and train/gt; test has no masks."""
    root = places.root / "AerialImageDataset"
    root = root if root.is_dir() else places.root
    return [SourceFolder("train", root / "train/images", root / "train/gt")]


def split_of_inria(name: str) -> str | None:
    """The authors' validation set: images 1 to 5 of every city."""
    match = re.search(r"^[a-z-]+?(\d+)$", name)
    return None if match is None else "val" if int(match[1]) <= 5 else "train"


LAYOUTS: dict[str, Layout] = {
    "folders": Layout("--images and --masks", lambda p: [] if p.images is None else [
        SourceFolder("train", p.images, p.masks, p.image_suffix, p.mask_suffix or "")], ("images", "masks")),
    "loveda": Layout("ROOT/{Train,Val}/{Rural,Urban}/{images_png,masks_png}", lambda p: [
        SourceFolder(split.lower(), p.root / split / domain / "images_png", p.root / split / domain / "masks_png")
        for split in ("Train", "Val") for domain in p.domains], table="loveda"),
    "gid": Layout("large images in ROOT/image*, masks named *_label in ROOT/label* or ROOT/annotation*", lambda p: [
        find_pair(p, ("image",), ("label", "annotation"), mask_suffix="_label")], may_take=("images", "masks")),
    "fusu": Layout("ROOT/image* and ROOT/label*, or both in ROOT/{train,val,test}", find_fusu,
                   may_take=("images", "masks"), table="fusu"),
    "potsdam": Layout("ROOT/2_Ortho_RGB (or 3_Ortho_IRRG, 4_Ortho_RGBIR, see --product) and ROOT/5_Labels*, 24 images "
                      "train, 14 test", lambda p: [find_pair(
        p, (POTSDAM_IMAGES[p.product],), ("5_Labels",), None, "train", f"_{p.product}", "_label", may_lack_masks=True)],
        may_take=("images", "masks"), table="potsdam", split_of=split_of_potsdam, products=tuple(POTSDAM_IMAGES)),
    "vaihingen": Layout("ROOT/top and ROOT/gt* or ROOT/*ground_truth*, 16 images train, 17 test", lambda p: [
        find_pair(p, ("top",), ("gt", "ISPRS_semantic_labeling_Vaihingen_ground_truth"), may_lack_masks=True)],
        may_take=("images", "masks"), table="vaihingen", split_of=split_of_vaihingen),
    "whu_building": Layout("ROOT/{train,val,test}/{image,label}", lambda p: find_splits(
        "whu_building", p.root, p.root, "{}/image", "{}/label"), table="whu_building"),
    "whu_opt_sar": Layout("ROOT/optical (or sar, see --product) and ROOT/lbl", lambda p: [
        find_pair(p, (p.product,), ("lbl",))], may_take=("images", "masks"), table="whu_opt_sar",
        products=("optical", "sar")),
    "isaid": Layout("ROOT/{train,val}/images and ROOT/{train,val}/Semantic_masks", find_isaid, table="isaid"),
    "deepglobe": Layout("ROOT/train with N_sat.jpg and N_mask.png", find_deepglobe, table="deepglobe",
                        rules=MaskRules(nearest_colour=220)),  # by its readme channels are cut at 128
    "open_earth_map": Layout("ROOT/REGION/{images,labels}; lists by --split_file train=ROOT/train.txt val=ROOT/val.txt",
                             find_open_earth_map, table="open_earth_map", group=r"^(.*)_\d+$"),
    "inria": Layout("ROOT/train/{images,gt}, images 1 to 5 of a city are val", find_inria, table="inria",
                    split_of=split_of_inria),
    "shared": Layout("ROOT/{img,label}_{train,val,test}", lambda p: find_splits(
        "shared", p.root, p.root, "img_{}", "label_{}")),
    "images_masks": Layout("ROOT/images and ROOT/masks, or both in ROOT/{train,val,test}", find_images_masks),
    "data_mask": Layout("IMAGES/{train,val,test} and MASKS/all/{train,val,test}", find_data_mask, ("images", "masks")),
}  # fmt: skip
