"""Measure what inference.py generated (does it follow the masks, the references?), and segmentors on real tiles.

`mask_following` judges the images with a segmentor trained on real tiles, between a ceiling (the same segmentor on
real test tiles) and a floor (the images against masks that are not theirs). `reference_following` compares statistics
of colours, and on request of features, of images generated for the same masks in the look of two sets of references.
`consistency` is the gate for faster sampling: it compares the mask following of runs with that of an exact run, image
by image. `segmentor` scores a segmentor on real test tiles. `distribution` (FID, KID) compares sets of images,
`diversity` (LPIPS) the samples of one mask, `appearance` contrast and texture, by which guidance is chosen. All write
results.json and results.md.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.cli import add_classes, positive_int  # noqa: E402
from ldm.files import atomic_write, write_json  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Command line of evaluate.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--data_root", help="where paths of masks and references start; default: as noted by inference.py"
    )
    common.add_argument("--outdir", help="folder for results.json and results.md; default: below the run")
    common.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    common.add_argument("--batch_size", type=positive_int, default=32, help="images at once")
    common.add_argument("--num_threads", type=positive_int, default=4, help="threads that read files")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    style = {"parents": [common], "formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    def command(name: str, text: str, **more: Any) -> Callable[..., Any]:
        return commands.add_parser(name, help=text, **style, **more).add_argument

    def add_segmentor(classes: str) -> None:
        add("--segmentor", nargs=2, required=True, metavar=("CONFIG", "CKPT"), help="as train_segmentor.py wrote")
        add_classes(add, classes)

    def add_real(text: str) -> None:
        add("--real", required=True, help=f"manifest of real {text}")
        add("--real_root", help="where the paths of --real start; default: its folder")

    add = command("mask_following", "mIoU of the images between floor and ceiling")
    add_segmentor("default: the one stored with the segmentor")
    add("--run", required=True, help="--outdir of inference.py")
    add_real("test tiles: source (mask) and target (image)")
    add("--shuffles", type=positive_int, default=5, help="shufflings that the floor is the mean of")
    add("--seed", type=int, default=0, help="seed of the shufflings")

    add = command("consistency", "does faster sampling follow the masks as well?")
    add_segmentor("default: the exact run's, else the one stored with the segmentor")
    add("--exact", required=True, help="--outdir of inference.py --mode exact")
    add("--run", nargs="+", required=True, help="--outdirs of the same rows, seed and checkpoint")
    add("--max_drop", type=float, default=0.5, help="points of mIoU that a mode may lose")
    add("--max_rare_drop", type=float, default=1.5, help="points of IoU that a rare class may lose")
    add("--rare", type=int, default=3, help="number of rarest classes to look at on their own")
    add("--draws", type=positive_int, default=2000, help="bootstrap draws for the intervals")
    add("--seed", type=int, default=0, help="seed of the draws")

    add = command("reference_following", "share of images nearer to their own reference")
    add("--run", nargs="+", required=True, help="one --outdir of inference.py, or two (set A, set B)")
    add("--set_a", help="pattern of reference paths in set A, such as 'dubai/*' (needed with one run)")
    add("--set_b", help="pattern of reference paths in set B, such as 'monterey/*'")
    add("--features", action="store_true", help="compare features of ImageNet's MobileNetV2 as well")

    add = command("segmentor", "OA, mIoU, mAcc and IoU of every class on real tiles")
    add_segmentor("default: the one stored with the segmentor")
    add_real("test tiles")

    add = command("distribution", "FID and KID to real images, with a floor", description="Features are those of "
                  "ImageNet's MobileNetV2 from PyPI unless a flag names another network.")  # fmt: skip
    add("--run", required=True, help="--outdir of inference.py")
    add_classes(add, "of --segmentor; default: the one stored with it")
    add_real("images (target), or a folder of images")
    network = add.__self__.add_mutually_exclusive_group()
    network.add_argument("--inception", help=argparse.SUPPRESS)  # of older command lines
    network.add_argument("--segmentor", nargs=2, metavar=("CONFIG", "CKPT"), help="features of a segmentor instead")
    network.add_argument("--vgg", help="file of demo/make/convert_lpips.py: features of ImageNet's VGG16 instead")
    add("--subsets", type=positive_int, default=100, help="subsets that KID is the mean of")
    add("--subset_size", type=int, default=1000, help="images in each, at most half of the smaller set")
    add("--seed", type=int, default=0, help="seed of subsets and parts")

    add = command("appearance", "clipped values, contrast and texture beside real images; no network")
    add("--run", required=True, help="--outdir of inference.py")
    add_real("images (target), or a folder of images")

    add = command("diversity", "LPIPS between samples of one mask and reference")
    add("--run", required=True, help="--outdir of inference.py with --num_per_mask 2 or more")
    add("--vgg", required=True, help="file of demo/make/convert_lpips.py")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and write results.json and results.md."""
    args = build_parser().parse_args(argv)
    if getattr(args, "inception", None):
        raise UserError("--inception: FID and KID of the published network are left to pytorch-fid. Install it apart "
                        "from this project (it brings torchvision) and run: python -m pytorch_fid RUN/images REAL")
    from post_processing.evaluation import following, gate, images  # torch takes seconds to import

    measure = {
        "mask_following": following.measure_mask_following,
        "reference_following": following.measure_reference_following,
        "segmentor": following.measure_segmentor, "consistency": gate.measure_consistency,
        "distribution": images.measure_distribution, "diversity": images.measure_diversity,
        "appearance": images.measure_appearance,
    }[args.command]  # fmt: skip
    results, table = measure(args)
    results = {"measure": args.command, **results, "arguments": vars(args)}
    place = Path(args.segmentor[1]).parent if args.command == "segmentor" else args.run
    outdir = Path(args.outdir or Path(place[0] if isinstance(place, list) else place) / args.command)
    outdir.mkdir(parents=True, exist_ok=True)
    write_json(outdir / "results.json", results)
    atomic_write(outdir / "results.md", table)
    logger.info("%s\nwritten to %s", table, outdir)


if __name__ == "__main__":
    run_entry_point(main)
