"""Measure what synthesized pairs add to a segmentor on unseen real tiles.

Trains a base segmentor on the real pairs, generates images for masks of the real set in the look of unlabelled
references, filters and resamples the images, and trains on real and synthesized pairs (and on the comparisons of
--arms) for the same number of optimizer steps, with several seeds. Writes results.json, table.md and report.html to
--outdir. Finished stages are skipped when the command is given again; arms and seeds can be added.
"""

import argparse
import contextlib
import importlib
import io
import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.cli import add_classes, natural, positive_float, positive_int  # noqa: E402
from ldm.data.classes import ClassTable, same_names  # noqa: E402
from ldm.generation.plan import read_config  # noqa: E402
from ldm.sampling.modes import choose_sampling  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402
from ldm.weights.load import build_skeleton  # noqa: E402
from post_processing.gain.plan import ARMS, DEFAULT_ARMS, Plan  # noqa: E402
from post_processing.gain.report import write_report  # noqa: E402
from post_processing.gain.stages import Stage, StageRunner, make_slots  # noqa: E402

logger = logging.getLogger(__name__)
# Flags whose values are flags.
PASSED_ON = ("--inference_args", "--rectify_args", "--filter_args", "--resample_args", "--train_args")


def build_parser() -> argparse.ArgumentParser:
    """Command line of measure_gain.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("data").add_argument
    add_classes(add, "of all masks", dest="class_table", is_required=True)
    add("--data_root", required=True, help="where the paths of all manifests start")
    add("--real_txt_file", help="manifest of real training pairs; default: train_set_items.json in --data_root")
    add("--test_txt_file", help="manifest of unseen real pairs; default: test_set_items.json in --data_root")
    add("--val_txt_file", help="manifest of validation pairs: for the curves of the report, for the classes that count "
        "as poor, and for the class means of the filter")  # fmt: skip
    add("--held_out", type=float, default=0.0, help="to choose settings (ratio, margin, guidance, ...): this share of "
        "the real training pairs, in whole scenes, is not trained on and takes the place of the test pairs; its images "
        "are references where --references names none")
    add("--scene_regex", help="regular expression whose first group names the scene of a tile, for --held_out and "
        "folds; default: its name without the offsets of prepare_dataset.py")
    add("--references", nargs="+", default=[], help="unlabelled images of the target: folders below --data_root, or "
        "manifests, of which only the images (target) are used; none where the generator takes none")  # fmt: skip
    add("--real_fraction", type=float, default=1.0, help="share of the real pairs that is labelled, in whole images; "
        "the images of the others become references")  # fmt: skip
    add = parser.add_argument_group("synthesis").add_argument
    add("--ckpt", required=True, help="generator, for inference.py")
    add("--num_masks", type=positive_int, help="real masks to generate; default: all")
    add("--balance", type=float, default=0.5, help="prefer masks of many and of rare classes: the chance of a "
        "mask is the sum over its classes of (share of the class in the set) ** -balance")  # fmt: skip
    add("--match_shares", action="store_true", help="in place of --balance: draw masks whose class shares together are "
        "those that the base segmentor predicts on the references")
    add("--match_references", action="store_true", help="draw the references of a mask from those in which the base "
        "segmentor predicts the most similar class shares, so that a mask of water meets a reference with water")
    add("--mix_masks", action="store_true", help="generate new layouts: a box of another mask of the draw pasted into "
        "each (CutMix), anew for each row; `--inference_args '--strength 0.5'` starts from the images, mixed alike")
    add("--num_per_mask", type=positive_int, default=4, help="images of each mask, each with its own reference")
    add("--inference_args", default="", help="further flags of inference.py, in one string: '--mode fast --scale 2'")
    add("--rectify_args", default="", help="arm rectified: further flags of inference.py, such as "
        "'--rectify_scale 0.1'; the guide is the segmentor of the real pairs, or '--guide FILE'")
    add("--filter_args", default="", help="further flags of filter.py")
    add("--hardness_folds", type=natural, help="class means of the filter: from so many folds of the real pairs, each "
        "judged by a segmentor trained on the others; 0: from the pairs that the segmentor was trained on, as "
        "published. Default: from --val_txt_file, or 3 folds where there is none")
    add("--resample_args", default="", help="further flags of resample.py")
    add = parser.add_argument_group("segmentors").add_argument
    add("--config", default="configs/mmseg/small.py", help="mmseg config; a .py file is code and is run")
    add("--arms", type=names, default=DEFAULT_ARMS, help=f"what to train on, of: {', '.join(ARMS)}")
    add("--seeds", type=numbers, default="1,2,3", help="of the trainings; the first is the base segmentor's")
    add("--steps", type=positive_int, default=2000, help="optimizer steps of every training")
    add("--batch_size", type=positive_int, default=16, help="tiles a step")
    add("--synthetic_ratio", type=positive_float, default=1.0, help="synthesized images for each real one in a batch")
    add("--noise_matrix", help="for --arms dlc_audit: noise.json that audit_masks.py made of the unfiltered set")
    add("--train_args", default="", help="further flags of train_segmentor.py")
    add = parser.add_argument_group("running").add_argument
    add("--outdir", required=True, help="output folder")
    add("--parallel", type=positive_int, default=1, help="processes at once; each gets its share of the CPU cores")
    add("--gpus", type=lambda text: text.split(","), default=[], help="0,1,...: one process for each of these GPUs")
    add("--python", default=sys.executable, help="interpreter with the packages of requirements/demo.txt")
    add("--python_seg", default=sys.executable, help="interpreter with the packages of requirements/seg.txt")
    add("--dry_run", action="store_true", help="print the stages with their commands, and stop")
    add("--overwrite", action="store_true", help="run stages of other settings in --outdir again")
    add("-d", "--debug", action="store_true", help="show the traceback of an error")
    return parser


def join_values(argv: Sequence[str]) -> list[str]:
    """Write `--train_args VALUE` as one word: argparse would take a value such as --threads=1 for a flag of its own."""
    joined, words = [], iter(argv)
    for word in words:
        value = next(words, None) if word in PASSED_ON else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def names(text: str) -> list[str]:
    """Argument type: arms, comma-separated, `real` always among them and first."""
    given = text.split(",")
    unknown = sorted(set(given) - set(ARMS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: unknown. Expected some of {', '.join(ARMS)}.")
    return [arm for arm in ARMS if arm in given or arm == "real"]


def numbers(text: str) -> list[int]:
    """Argument type: distinct whole numbers, comma-separated."""
    values = [int(part) for part in text.split(",")]
    if len(set(values)) < len(values) or min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected distinct numbers from 0, such as 1,2,3.")
    return values


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for flags out of range and files that are not there."""
    rules = [
        (not 0 < args.real_fraction <= 1, f"--real_fraction {args.real_fraction}: expected above 0, at most 1"),
        (not 0 <= args.held_out < 1, f"--held_out {args.held_out}: expected 0 or more, below 1"),
        (args.hardness_folds == 1, "--hardness_folds 1: expected 0, or 2 and more"),
        ((args.match_shares or args.match_references or "recolour" in args.arms) and args.real_fraction == 1
         and not (args.references or args.held_out),
         "--match_shares, --match_references, --arms recolour: expected --references with it"),
        ("mixed" in args.arms and not args.mix_masks, "--arms mixed: expected --mix_masks with it"),
        (("dlc_audit" in args.arms) != bool(args.noise_matrix),
         "--arms dlc_audit: expected together with --noise_matrix"),
        (any("targets" in ARMS[arm].needs for arm in args.arms) and not args.references and args.real_fraction == 1,
         "--references: none. Expected unlabelled images of the target for arms of self-training"),
        *((args.steps < 2, f"--steps {args.steps}: expected 2 or more for --arms {arm}")
          for arm in args.arms if ARMS[arm].first),
        (not Path(args.data_root).is_dir(), f"--data_root {args.data_root}: folder not found"),
        *((not Path(path).is_file(), f"file not found: {path}") for path in (
            args.ckpt, args.real_txt_file or Path(args.data_root) / "train_set_items.json",
            *([] if args.held_out else [args.test_txt_file or Path(args.data_root) / "test_set_items.json"]),
            *filter(None, [args.val_txt_file, args.noise_matrix]),
        )),
        *((not Path(path).exists(), f"--references {path}: not found") for path in args.references),
    ]  # fmt: skip
    wrong = [text for is_wrong, text in rules if is_wrong]
    if wrong:
        raise UserError("; ".join(wrong) + ". See --help.")


# The scripts that they go to, as commands name them, and their modules.
SCRIPTS = {"inference.py": "inference", "scripts/train_segmentor.py": "scripts.train_segmentor",
           "post_processing.filter": "post_processing.filter",
           "post_processing.resample": "post_processing.resample"}  # fmt: skip
# What the plan gives them itself, and what would make other commands of them.
OWN_FLAGS = {
    "inference_args": ("ckpt", "data_root", "txt_file", "outdir", "num_per_mask", "shard", "status", "verify"),
    "filter_args": ("run", "data_root", "filtered_mask_path", "classes", "class_table"),
    "resample_args": ("filtered_mask_path", "iou", "out_dir"),
    "train_args": ("config", "classes", "class_table", "data_root", "train_txt_file", "synthetic_txt_file", "work_dir",
                   "max_steps", "batch_size", "seed"),
}  # fmt: skip


def check_passed_on(args: argparse.Namespace) -> None:
    """UserError for flags in --inference_args and the like that are this command's to give."""
    wrong = [f"--{name}: {word}" for name, own in OWN_FLAGS.items() for word in shlex.split(getattr(args, name))
             if word.startswith("--") and word[2:].split("=")[0].replace("-", "_") in own]  # fmt: skip
    if wrong:
        raise UserError(f"{'; '.join(wrong)}. Expected only flags that this command does not give itself. Leave them "
                        "out; it has flags of its own for most.")


def check_synthesis(args: argparse.Namespace, has_references: bool, table: str) -> None:
    """UserError for settings of the sampler and references that the generator cannot do with; loads no weights.

    Args:
        args: command line of inference.py.
        has_references: whether the rows that it gets name references.
        table: name or path of the masks' class table.
    """
    method = build_skeleton(read_config(args))
    try:
        method.check(choose_sampling(args, method.own_sampling))
    except ValueError as error:
        raise UserError(f"--inference_args: {error}") from error
    own = ClassTable.load(table).names
    if method.class_table and not same_names(method.class_table.names, own):
        raise UserError(f"--ckpt {args.ckpt}: its classes are {', '.join(method.class_table.names)}, those of "
                        f"--classes {', '.join(own)}. Expected a generator of these classes, in this order: it knows "
                        "them by their numbers.")
    if "reference" in method.takes and not has_references:
        raise UserError("--references: none. Expected unlabelled images, since the generator takes references.")


def check_commands(stages: Sequence[Stage], has_references: bool, table: str) -> None:
    """UserError for flags in --inference_args and the like that their scripts do not take: not after hours of work."""
    wrong, generating = {}, []
    for command in (command for stage in stages for command in stage.commands):
        script = next((part for part in command if part in SCRIPTS), None)
        if script is None:
            continue
        module = importlib.import_module(SCRIPTS[script])
        parse = getattr(module, "parse_arguments", None) or module.build_parser().parse_args
        words, text = command[command.index(script) + 1 :], io.StringIO()
        try:
            with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
                parsed = parse(words)
        except SystemExit:
            said = text.getvalue().rpartition("error: ")[2].strip() or "asks for help"
            wrong[f"{script}: {said}"] = None
            continue
        if script == "inference.py" and not parsed.guide:  # a guide is trained first
            generating.append(parsed)
    if wrong:
        raise UserError(f"flags that are passed on: {'; '.join(wrong)}. Expected flags of these scripts in "
                        f"{', '.join(PASSED_ON)}. See their --help.")
    for parsed in generating:
        check_synthesis(parsed, has_references, table)


def main(argv: list[str] | None = None) -> None:
    """Run the stages that are not finished, then write the report."""
    args = build_parser().parse_args(join_values(sys.argv[1:] if argv is None else argv))
    check_arguments(args)
    check_passed_on(args)
    plan = Plan(args)
    stages = plan.stages()
    check_commands(stages, plan.has_references, plan.table)
    runner = StageRunner(stages, plan.outdir, make_slots(len(args.gpus) or args.parallel, args.gpus))
    if args.dry_run:
        print(runner.describe())
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the running processes
    runner.run(args.overwrite)
    logger.info("%s\nwritten to %s", write_report(plan), plan.outdir / "report.html")


if __name__ == "__main__":
    run_entry_point(main)
