"""Train an MMSegmentation segmentor: any config of configs/mmseg, any class table, no copied files.

Trains on real pairs (--train_txt_file), on synthesized ones (--synthetic_txt_file), or on both at a fixed ratio. The
length is in optimizer steps, whatever the number of pairs. A config with its own train_dataloader, such as
demo/mmseg/fusu_joint.py, is used as it is.

Writes to --work_dir: config.json (the resolved config) and segmentor.pth (weights and class table, plain tensors). The
two are what evaluate.py and the filter take. mmengine's own logs and checkpoints lie beside them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.cli import add_classes, positive_float, positive_int  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402
from post_processing.segmentation.dlc_training import ESTIMATORS  # noqa: E402
from post_processing.segmentation.mixing import MIXES  # noqa: E402
from post_processing.segmentation.training import train_segmentor  # noqa: E402


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the training; `given` holds the names of those on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--config", default="configs/mmseg/small.py", help="mmengine config of the model; a .py file is code and is run"
    )
    add_classes(add, "of the masks")
    add("--data_root", default=".", help="where the paths of the manifests of real pairs start")
    add("--train_txt_file", help="JSON-lines manifest of real training pairs")
    add("--val_txt_file", help="manifest of validation pairs; scored at the end and every --val_interval steps")
    add("--image_folder", help="folder of real training images, instead of a manifest")
    add("--mask_folder", help="folder of masks with the stems of the images")
    add("--synthetic_txt_file", help="manifest of synthesized pairs, as resample.py writes")
    add("--synthetic_root", help="where its paths start (default: its folder)")
    add("--synthetic_ratio", type=positive_float, default=1.0, help="synthesized images for each real one in every "
        "batch when both are given: 1 = half and half, 3 = three quarters; the numbers of files do not matter")
    add("--augment", choices=("none", *MIXES), default="none", help="mix pairs of the training set, half of the time")
    add("--noise_correction", choices=ESTIMATORS, default="none", help="correct the loss of synthesized pixels by "
        "how often their labels are wrong: found by hoc (neighbours in feature space, no further labels), audit (masks "
        "that a person corrected), teacher (a segmentor of real pairs), or learned")  # fmt: skip
    add("--noise_matrix", help="noise.json of an estimate, instead of --noise_correction; in force from the start")
    add("--audit", help="folder of scripts/audit_masks.py with corrected masks")
    add("--teacher", nargs=2, metavar=("CONFIG", "CKPT"), help="segmentor trained on real pairs")
    add("--warm_up_share", type=float, default=0.5, help="share of the steps before hoc estimates, or learned learns")
    add("--label_smoothing", type=float, default=0.0, help="share of the loss of synthesized pixels that asks "
        "for equal probabilities")  # fmt: skip
    add("--noise_border", type=int, default=0, help="pixels from a class border that get an estimate of their own")
    add("--target_txt_file", help="unlabelled images of another place, a manifest (target) or a folder: self-training "
        "with a teacher's labels for them")  # fmt: skip
    add("--on_latents", metavar="CKPT", help="train a guide on this generator's latents instead: a few convolutions, "
        "minutes on a CPU, for inference.py --guide WORK_DIR/guide.safetensors")  # fmt: skip
    add("--work_dir", required=True, help="output folder")
    add("--max_steps", type=positive_int, help="optimizer steps (default: the config's)")
    add("--batch_size", type=positive_int, help="tiles a step (default: the config's)")
    add("--learning_rate", type=float, help="peak rate (default: the config's)")
    add("--init_backbone", help="imagenet (MobileNetV2), none or a file of weights (default: the config's)")
    add("--init_from", help="segmentor.pth to start from: pre-training on synthesized pairs, fine-tuning on real ones")
    add("--class_balance", type=float, help="exponent of the class weights, 0 = none (default: the config's)")
    add("--val_interval", type=int, default=500, help="steps between validations")
    add("--num_workers", type=int, default=0, help="loader processes")
    add("--threads", type=int, default=0, help="CPU threads, 0 = torch's choice")
    add("-s", "--seed", type=int, default=23, help="seed of weights, order and augmentation")
    add("-r", "--resume", action="store_true", help="go on from the last checkpoint in --work_dir")
    add("--overwrite", action="store_true", help="allow a --work_dir that holds a finished training")
    add("-d", "--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse fills in no default where there is a value
    args.given = [name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None]
    return args


def main(argv: list[str] | None = None) -> None:
    """Train and write config.json and segmentor.pth, or guide.safetensors."""
    args = parse_arguments(argv)
    if args.on_latents:
        train_guide(args)
    else:
        train_segmentor(args)


GUIDE_FLAGS = ("on_latents", "work_dir", "classes", "data_root", "train_txt_file", "image_folder", "mask_folder",
               "max_steps", "batch_size", "learning_rate", "num_workers", "threads", "seed", "overwrite", "debug")


def train_guide(args: argparse.Namespace) -> None:
    """Train a guide on latents of real pairs (see ldm.training.latent_guide)."""
    import torch

    from ldm.data.classes import ClassTable
    from ldm.training.latent_guide import train_latent_guide
    from post_processing.segmentation.dataset import list_pairs

    others = [f"--{name}" for name in args.given if name not in GUIDE_FLAGS]
    if others or not args.classes:
        raise UserError(f"--on_latents: {', '.join(others) or '--classes is missing'}. Expected --classes and pairs, "
                        "steps, batch size, learning rate and seed alone. Change the command.")
    out = Path(args.work_dir) / "guide.safetensors"
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"--work_dir: {out} exists. Choose another folder, or add --overwrite.")
    if args.threads:
        torch.set_num_threads(args.threads)
    table = ClassTable.load(args.classes)
    pairs = list_pairs(table, manifest=args.train_txt_file, data_root=args.data_root, image_folder=args.image_folder,
                       mask_folder=args.mask_folder)
    steps = {name: getattr(args, name) for name in ("max_steps", "batch_size", "learning_rate")}
    files = [(pair.image, pair.mask) for pair in pairs]
    train_latent_guide(args.on_latents, files, table, out, **{k: v for k, v in steps.items() if v is not None},
                       seed=args.seed, num_workers=args.num_workers,
                       device="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    run_entry_point(main)
