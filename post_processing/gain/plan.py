"""The plan of a gain measurement: what can be trained on (the table of arms), and the stages that lead there."""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from post_processing.gain.recolour import write_recoloured_set
from post_processing.gain.sets import (
    link_references,
    write_masks,
    write_random_drop,
    write_real_set,
    write_synthesized,
    write_targets,
)
from post_processing.gain.stages import Stage

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Arm:
    """One way to train a segmentor; a new one is a row of ARMS.

    Attributes:
        name: on the command line and as a folder.
        label: in tables and figures.
        data: flags of train_segmentor.py; {real}, {generated}, {recoloured}, {unfiltered}, {resampled} stand for the
            manifests of the real pairs, of the masks to generate from, of their images in the colours of references,
            and of the synthesized pairs before and after filter and resample, {targets} for unlabelled images,
            {synthetic_ratio} and {noise_matrix} for the flags' values.
        needs: stages that must be finished before, besides `sets`.
        first: flags for the first half of the steps, if that is a training of its own; the second half goes on from
            its weights.
    """

    name: str
    label: str
    data: tuple[str, ...]
    needs: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


REAL = ("--train_txt_file", "{real}")
RATIO = ("--synthetic_ratio", "{synthetic_ratio}")
UNFILTERED = (*REAL, "--synthetic_txt_file", "{unfiltered}", *RATIO)
RESAMPLED = (*REAL, "--synthetic_txt_file", "{resampled}", *RATIO)
CORRECTED = ("--noise_correction", "hoc")
SELF_TRAINING = ("--target_txt_file", "{targets}")
ARMS = {arm.name: arm for arm in (
    Arm("real", "real", REAL),
    Arm("joint", "real + synthesized, filtered and resampled", RESAMPLED, ("resample",)),
    Arm("synthetic", "synthesized only, filtered and resampled", ("--synthetic_txt_file", "{resampled}"),
        ("resample",)),
    Arm("unfiltered", "real + synthesized, neither filtered nor resampled", UNFILTERED, ("unfiltered",)),
    Arm("dlc", "real + unfiltered, noise corrected", (*UNFILTERED, *CORRECTED), ("unfiltered",)),
    Arm("dlc_audit", "real + unfiltered, noise corrected as audited",
        (*UNFILTERED, "--noise_matrix", "{noise_matrix}"), ("unfiltered",)),
    Arm("smooth", "real + unfiltered, labels smoothed", (*UNFILTERED, "--label_smoothing", "0.1"), ("unfiltered",)),
    Arm("random_drop", "real + unfiltered, random pixels dropped",
        (*REAL, "--synthetic_txt_file", "{random_drop}", *RATIO), ("random_drop",)),
    Arm("rectified", "real + synthesized with a guide, neither filtered nor resampled",
        (*REAL, "--synthetic_txt_file", "{rectified}", *RATIO), ("rectified",)),
    Arm("dlc_filtered", "real + filtered and resampled, noise corrected", (*RESAMPLED, *CORRECTED), ("resample",)),
    Arm("self_training", "real, self-training on the references", (*REAL, *SELF_TRAINING), ("targets",)),
    Arm("unfiltered_self_training", "real + unfiltered, self-training on the references",
        (*UNFILTERED, *SELF_TRAINING), ("unfiltered", "targets")),
    Arm("dlc_self_training", "real + unfiltered, noise corrected, self-training",
        (*UNFILTERED, *CORRECTED, *SELF_TRAINING), ("unfiltered", "targets")),
    Arm("copy_paste", "real, with copy-paste", (*REAL, "--augment", "copy_paste")),
    Arm("cutmix", "real, with CutMix", (*REAL, "--augment", "cutmix")),
    Arm("mixed", "real + the mixtures themselves, not generated", (*REAL, "--synthetic_txt_file", "{painted}", *RATIO),
        ("masks",)),
    Arm("recolour", "real + the images of the masks in the colours of the references, no generator",
        (*REAL, "--synthetic_txt_file", "{recoloured}", *RATIO), ("recolour",)),
    Arm("pretrain", "half the steps on synthesized, then half on real", REAL, ("resample",),
        first=("--synthetic_txt_file", "{resampled}")),
)}  # fmt: skip
LABELS = {arm.name: arm.label for arm in ARMS.values()}
DEFAULT_ARMS = "real,joint,synthetic,unfiltered,copy_paste,cutmix"


def files_of(folder: Path) -> list[str]:
    """Config and weights of the segmentor that was trained there."""
    return [str(folder / name) for name in ("config.json", "segmentor.pth")]


class Plan:
    """The stages of a measurement and where their results lie.

    Args:
        args: parsed command line of measure_gain.py.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.outdir = Path(args.outdir).absolute()
        root = Path(args.data_root).absolute()
        self.root = str(root)
        self.real = args.real_txt_file or str(root / "train_set_items.json")
        self.test = os.path.abspath(args.test_txt_file or root / "test_set_items.json")
        if args.held_out:  # the test tiles are not looked at
            self.test = str(self.outdir / "sets/held_out.json")
        self.val = args.val_txt_file and os.path.abspath(args.val_txt_file)
        is_file = Path(args.class_table).is_file()
        self.table = os.path.abspath(args.class_table) if is_file else args.class_table
        self.config = os.path.abspath(args.config if Path(args.config).is_file() else ROOT / args.config)
        self.mask_root = str(self.outdir / "masks") if args.mix_masks else self.root
        self.has_references = bool(args.references or args.held_out) or args.real_fraction < 1
        self.manifests = {
            "real": str(self.outdir / "sets/real.json"),
            "recoloured": str(self.outdir / "recolour/train_set_items.json"),
            "painted": str(self.outdir / "masks/synthesis.json"),
            "unfiltered": str(self.outdir / "unfiltered/train_set_items.json"),
            "resampled": str(self.outdir / "resample/set/train_set_items.json"),
            "random_drop": str(self.outdir / "random_drop/train_set_items.json"),
            "rectified": str(self.outdir / "rectified/train_set_items.json"),
            "targets": str(self.outdir / "targets/targets.json"),
        }
        self.first = f"real/seed_{args.seeds[0]}"  # its segmentor filters
        # On the tiles that it was trained on its losses are low, and the filter too strict.
        self.folds = args.hardness_folds if args.hardness_folds is not None else 0 if self.val else 3

    def stages(self) -> list[Stage]:
        """All stages that the arms need, each after what it needs."""
        preparations = {stage.name: stage for stage in self.preparations()}
        wanted, open_names = {"sets"}, [name for arm in self.args.arms for name in ARMS[arm].needs]
        while open_names:
            name = open_names.pop()
            if name in preparations and name not in wanted:
                wanted.add(name)
                open_names += preparations[name].needs
        stages = [stage for name, stage in preparations.items() if name in wanted]
        trainings = [self.training(arm, seed) for seed in self.args.seeds for arm in self.args.arms]
        trainings.sort(key=lambda stage: stage.name != self.first)
        return [stages[0], trainings[0], *stages[1:], *trainings[1:]]

    def preparations(self) -> list[Stage]:
        """The stages before trainings, whether an arm needs them or not."""
        args, first = self.args, self.outdir / self.first
        base = files_of(first)
        given = [os.path.abspath(path) for path in args.references if Path(path).is_file()]
        run, masks, iou, chosen = (
            str(self.outdir / name) for name in ("synthesis", "filter/masks", "resample/iou", "resample/set"))
        copies = () if self.has_references else ("--num_per_mask", str(args.num_per_mask))
        rectified_run = str(self.outdir / "rectified_synthesis")
        generate = (args.python, "inference.py", "--ckpt", os.path.abspath(args.ckpt), "--data_root", self.mask_root,
                    "--txt_file", self.manifests["painted"], "--outdir", run, *copies,
                    *shlex.split(args.inference_args))  # fmt: skip
        # The guide saw the real training pairs and nothing else, as the segmentor that filters.
        rectify = (args.python_seg, "-W", "ignore", *(rectified_run if part == run else part for part in generate[1:]),
                   "--guide", *base, *shlex.split(args.rectify_args))  # fmt: skip
        guides = [path for path in shlex.split(args.rectify_args) if Path(path).is_file()]  # of a --guide of the user's
        filter_command = (
            args.python_seg, "-W", "ignore", "-m", "post_processing.filter", *base, "--run", run, *self.judged(),
            "--data_root", self.root, "--filtered-mask-path", masks, "--classes", self.table,
            *shlex.split(args.filter_args),
        )  # fmt: skip
        resample_command = (
            args.python_seg, "-W", "ignore", "-m", "post_processing.resample", "--filtered-mask-path", masks, "--iou",
            f"{iou}/results.json", "--out-dir", chosen, "--overwrite", *shlex.split(args.resample_args),
        )  # fmt: skip
        # Which classes are poor must not be read off the test tiles.
        score = self.scoring(base, self.val or self.manifests["real"], iou)
        keys = ("references", "num_masks", "balance", "num_per_mask", "mix_masks")
        predict = (args.python_seg, "-W", "ignore", "scripts/predict_masks.py", "--segmentor", *base, "--images",
                   str(self.outdir / "shares/images"), "--outdir", str(self.outdir / "shares"))  # fmt: skip
        # Older folders do not have these.
        new = {key: value for key, value in (("held_out", args.held_out), ("scene_regex", args.scene_regex),
                                             ("folds", self.folds)) if value}  # fmt: skip
        # What --match_shares alone changes hangs on the stage `shares`.
        matched = {"match_references": True, "match_shares": args.match_shares} if args.match_references else {}
        folds = [self.fold(number) for number in range(self.folds)]
        table = [self.table] if Path(self.table).is_file() else []
        return [
            # Everything hangs on this stage, and so on the content of the class table.
            Stage("sets", action=lambda: write_real_set(self), inputs=(self.real, *table), settings=new | {
                key: getattr(args, key) for key in ("real_fraction", "class_table")}),
            Stage("shares", (predict,), ("sets", self.first), tuple(given), action=lambda: link_references(self),
                  settings={"references": args.references}),
            Stage("masks", (), ("sets", *(("shares",) if args.match_shares or args.match_references else ())),
                  tuple(given), action=lambda: write_masks(self), settings=matched | {
                      key: getattr(args, key) for key in keys}),
            Stage("recolour", needs=("masks",), action=lambda: write_recoloured_set(self)),
            Stage("synthesis", (generate,), ("masks",), (args.ckpt,), is_sharded=True),
            *folds,
            Stage("filter", (filter_command,), ("synthesis", self.first, *(fold.name for fold in folds))),
            Stage("resample", (score, resample_command), ("filter",)),
            Stage("rectified_synthesis", (rectify,), ("masks", self.first), (args.ckpt, *guides), is_sharded=True),
            Stage("rectified", needs=("rectified_synthesis",),
                  action=lambda: write_synthesized(self, "rectified", "rectified_synthesis")),
            Stage("unfiltered", needs=("synthesis",), action=lambda: write_synthesized(self, "unfiltered")),
            Stage("random_drop", needs=("filter",), action=lambda: write_random_drop(self)),
            Stage("targets", (), ("sets",), tuple(given), action=lambda: write_targets(self),
                  settings={"references": args.references}),
        ]  # fmt: skip

    def judged(self) -> list[str]:
        """Flags of the filter: real pairs, not trained on if there are any, whose losses make its class means."""
        if self.folds:
            return [word for number in range(self.folds)
                    for word in ("--fold", *files_of(self.outdir / self.fold(number).name),
                                 str(self.outdir / f"sets/fold_{number}.json"))]
        if self.val and self.args.hardness_folds is None:
            return ["--hardness_txt_file", self.val]
        return ["--real_txt_file", self.manifests["real"]]

    def fold(self, number: int) -> Stage:
        """Training on all real pairs but those of a fold."""
        name = f"fold_{number}"
        command = self.train(self.outdir / name, self.args.steps, self.args.seeds[0],
                             ["--train_txt_file", str(self.outdir / f"sets/not_{name}.json")])
        return Stage(name, (command,), ("sets",), (self.config,))

    def train(self, folder: Path, steps: int, seed: int, flags: Sequence[str]) -> tuple[str, ...]:
        """Command that trains a segmentor."""
        args = self.args
        return (args.python_seg, "-W", "ignore", "scripts/train_segmentor.py", "--config", self.config, "--class_table",
                self.table, "--data_root", self.root, *flags, "--work_dir", str(folder), "--max_steps", str(steps),
                "--batch_size", str(args.batch_size), "--seed", str(seed), "--resume",
                *shlex.split(args.train_args))  # fmt: skip

    def scoring(self, segmentor: Sequence[str], manifest: str, outdir: str) -> tuple[str, ...]:
        """Command that scores a segmentor on real pairs."""
        return (self.args.python_seg, "-W", "ignore", "scripts/evaluate.py", "segmentor", "--segmentor", *segmentor,
                "--real", manifest, "--real_root", self.root, "--outdir", outdir)  # fmt: skip

    def training(self, arm_name: str, seed: int) -> Stage:
        """Training of one segmentor, and its scores on the test tiles."""
        args, arm, name = self.args, ARMS[arm_name], f"{arm_name}/seed_{seed}"
        folder = self.outdir / name
        half = args.steps // 2 if arm.first else 0
        halves = [(folder / "first_half", half, arm.first)] if half else []
        start = ("--init_from", str(folder / "first_half/segmentor.pth")) if half else ()
        validate = ["--val_txt_file", self.val, "--val_interval", str(max(1, args.steps // 4))] if self.val else []
        audited = args.noise_matrix and os.path.abspath(args.noise_matrix)
        values = {**self.manifests, "synthetic_ratio": args.synthetic_ratio, "noise_matrix": audited}
        commands = [
            self.train(place, steps, seed, [*(flag.format(**values) for flag in data), *extra, *validate])
            for place, steps, data, extra in [*((*it, ()) for it in halves),
                                              (folder, args.steps - half, arm.data, start)]
        ]  # fmt: skip
        commands.append(self.scoring(files_of(folder), self.test, str(folder / "test")))
        inputs = [self.config, *([] if args.held_out else [self.test]), *([self.val] if self.val else [])]
        inputs += [audited] if "{noise_matrix}" in arm.data else []
        return Stage(name, tuple(commands), ("sets", *arm.needs), tuple(inputs))
