"""Noise correction in a training: flags become nodes of the config, and a hook that finds T on the way.

Warm-up with the plain loss, then one estimate of T from the network's features of the synthesized images, then the
corrected loss to the end. The optimizer and its schedule go on. Code of mmengine is imported late, so hooks are made by
functions, which its registry takes by their dotted paths.
"""

import argparse
import contextlib
import itertools
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.cli import choose_device
from ldm.data.classes import ClassTable, same_names
from ldm.data.images import Pair
from ldm.files import digest_of
from ldm.util import UserError, is_rank_zero
from post_processing.segmentation.audit import estimate_audit
from post_processing.segmentation.config import find_heads
from post_processing.segmentation.dataset import list_pairs
from post_processing.segmentation.dlc import (
    BORDER,
    CORRECTED_LOSS,
    MARK_DOMAIN,
    SYNTHETIC,
    check_capacity,
    decode_labels,
    find_losses,
)
from post_processing.segmentation.loading import load_batches, predict_batches
from post_processing.segmentation.noise import (
    LEAST_DIAGONAL,
    LEAST_POINTS,
    count_consensus,
    estimate_from_counts,
    estimate_from_teacher,
    estimate_hoc,
    make_noise_table,
    make_safe,
    read_noise,
    write_noise,
)
from post_processing.segmentation.segmentor import list_heads, load_segmentor, unwrap
from post_processing.segmentation.self_training import add_self_training

LOG = logging.getLogger(__name__)
NOISE_HOOK = "post_processing.segmentation.dlc_training.make_noise_hook"
ESTIMATORS = ("none", "hoc", "audit", "teacher", "learned")
NOISE_FLAGS = ("noise_correction", "noise_matrix", "audit", "teacher", "warm_up_share", "label_smoothing",
               "noise_border", "target_txt_file")  # fmt: skip
LEARNED_RATE = 5e-2  # of the parameters of a learned T
ROUNDS, ROUND_POINTS, LEAST_IMAGES, MOST_IMAGES = 5, 4000, 8, 32  # reservoir of HOC: points and images of a round
APART = 8  # pixels between two points of an image


def is_corrected(args: argparse.Namespace) -> bool:
    """Whether the command line asks for labels of several domains and the loss that reads them."""
    return corrects_synthetic(args) or bool(args.target_txt_file)


def corrects_synthetic(args: argparse.Namespace) -> bool:
    """Whether the command line asks for another loss on synthesized pixels."""
    return args.noise_correction != "none" or bool(args.noise_matrix) or args.label_smoothing > 0


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags of the noise correction that contradict each other or are out of range."""
    kind = args.noise_correction
    rules = [
        (corrects_synthetic(args) and not args.synthetic_txt_file,
         "--noise_correction, --noise_matrix, --label_smoothing: no synthesized pairs, whose labels they are about. "
         "Expected --synthetic_txt_file"),
        (bool(args.noise_matrix) and kind != "none", "--noise_matrix: gives T. Expected no --noise_correction with it"),
        ((kind == "audit") != bool(args.audit), "--audit: expected together with --noise_correction audit"),
        ((kind == "teacher") != bool(args.teacher), "--teacher: expected together with --noise_correction teacher"),
        (kind == "teacher" and not args.val_txt_file,
         "--noise_correction teacher: expected --val_txt_file, real tiles that the teacher was not trained on"),
        (not 0 <= args.warm_up_share < 1, f"--warm_up_share: {args.warm_up_share}. Expected at least 0, below 1"),
        (not 0 <= args.label_smoothing < 1, f"--label_smoothing: {args.label_smoothing}. Expected at least 0, below 1"),
        ("warm_up_share" in args.given and kind not in ("hoc", "learned"),
         "--warm_up_share: expected with --noise_correction hoc or learned; otherwise T is in force from the start"),
        (args.noise_border < 0, f"--noise_border: {args.noise_border}. Expected 0 or more pixels"),
        (args.noise_border > 0 and kind != "hoc" and not args.noise_matrix,
         "--noise_border: expected with --noise_correction hoc or --noise_matrix, which tell borders apart"),
        (bool(args.target_txt_file) and args.augment != "none",
         "--target_txt_file: mixes images by itself. Expected --augment none with it"),
        (args.noise_border > 0 and args.augment == "copy_paste",
         "--noise_border: copy_paste would take borders for classes of their own. Expected --augment none or cutmix"),
    ]  # fmt: skip
    wrong = [text for is_wrong, text in rules if is_wrong]
    if wrong:
        raise UserError("; ".join(wrong) + ". See --help.")


def name_correction(args: argparse.Namespace) -> str:
    """Flags that say how T is found, as they are given."""
    return "--noise_matrix" if args.noise_matrix else f"--noise_correction {args.noise_correction}"


def list_kept_flags(args: argparse.Namespace, table: ClassTable) -> dict[str, Any]:
    """Flags that a training keeps to its end, for config.json.

    Of files only what decides, since they may move: the names of the classes, T, and whether pairs are given.
    """
    flags = {name: getattr(args, name) for name in ("label_smoothing", "noise_border", "augment", "synthetic_ratio",
                                                    "warm_up_share")}  # fmt: skip
    flags["classes"] = ", ".join(table.names)
    if args.noise_matrix:
        found = sorted(read_noise(args.noise_matrix, table.names).items())
        diagonals = [" ".join(f"{value:.4g}" for value in matrix.diagonal().tolist()) for _, matrix in found]
        number = digest_of([(domain, matrix.tolist()) for domain, matrix in found])[:8]
        flags["noise_matrix"] = f"{number} of the diagonal {'; '.join(diagonals)}"
    return flags | {name: bool(getattr(args, name)) for name in ("synthetic_txt_file", "target_txt_file")}


def check_resumed(args: argparse.Namespace, kept: Mapping[str, Any]) -> None:
    """UserError if the training to be resumed found T in another way or learned from other labels.

    Its checkpoint and noise.json would win unseen, or its second half would be another training than its first.
    Trainings that did not note a flag (before this check) go on.
    """
    path, now = Path(args.work_dir) / "config.json", name_correction(args)
    if not (args.resume and path.is_file()):
        return
    noted = json.loads(path.read_text(encoding="utf-8"))
    was = noted.get("noise_correction", now)
    if was != now:
        raise UserError(f"--resume: the training in {args.work_dir} has {was}. Expected the same, not {now}. Go on "
                        "with that, or choose another --work_dir.")
    before = noted.get("kept_flags") or {}
    changed = [f"--{name} {before[name]}, not {value}" for name, value in kept.items()
               if before.get(name, value) != value]  # fmt: skip
    if changed:
        raise UserError(f"--resume: the training in {args.work_dir} was begun with {'; '.join(changed)}. Expected the "
                        "same. Go on with that, or choose another --work_dir.")


def add_noise_correction(config: Any, table: ClassTable, args: argparse.Namespace, nodes: Sequence[dict]) -> None:
    """Change a config in place: coded labels, the corrected loss in all heads, the hook that finds T, target images.

    Classes and class weights are filled in; `nodes` are those of the training sets.
    """
    check_capacity(table.num_classes, BORDER if args.noise_border else SYNTHETIC)
    for node in nodes:
        if node.get("is_synthetic"):
            mark = dict(type=MARK_DOMAIN, domain=SYNTHETIC, num_classes=table.num_classes, border=args.noise_border)
            node["pipeline"] = [mark, *node["pipeline"]]
    correct_losses(config, table.num_classes, args.label_smoothing, args.noise_correction == "learned")
    kind = args.noise_correction if args.noise_correction in ("hoc", "learned") else "fixed"
    start = int(config.max_steps * args.warm_up_share) if kind != "fixed" else 0
    domains = [SYNTHETIC, BORDER] if args.noise_border else [SYNTHETIC]
    matrices = {} if kind != "fixed" else find_matrices(table, args)
    lacking = [str(domain) for domain in domains if domain not in matrices]
    if args.noise_matrix and lacking:
        raise UserError(f"--noise_matrix {args.noise_matrix}: no matrix of domain {', '.join(lacking)}. Expected 1, "
                        "and with --noise_border also 2 (class borders). Give a noise.json of synthesized pairs.")
    hook = dict(
        type=NOISE_HOOK, kind=kind, names=list(table.names), start=start, seed=args.seed, domains=domains,
        matrices={str(domain): matrix.tolist() for domain, matrix in matrices.items()},
    )  # fmt: skip
    config.custom_hooks = [*(config.get("custom_hooks") or []), hook]
    if kind == "learned":
        parameters = dict(config.get("paramwise_cfg") or {})
        keys = dict(parameters.get("custom_keys") or {})
        keys["transition"] = dict(lr_mult=LEARNED_RATE / config.learning_rate, decay_mult=0.0)
        config.paramwise_cfg = {**parameters, "custom_keys": keys}
    if args.target_txt_file:
        add_self_training(config, args, table.num_classes)


def correct_losses(config: Any, num_classes: int, label_smoothing: float, is_learned: bool) -> None:
    """Replace the cross entropy of every head of a config by the corrected one; UserError for other losses."""
    for key, head in find_heads(config.model):
        loss = head.get("loss_decode") or dict(type="CrossEntropyLoss")
        is_plain = isinstance(loss, Mapping) and loss.get("type") in ("CrossEntropyLoss", CORRECTED_LOSS)
        if not is_plain or loss.get("use_sigmoid") or loss.get("use_mask"):
            raise UserError(f"--noise_correction: {key} {head.get('type')} has the loss {loss}. Expected "
                            "CrossEntropyLoss with softmax alone: no other loss reads labels of several domains.")
        head["loss_decode"] = dict(
            type=CORRECTED_LOSS, num_classes=num_classes, label_smoothing=label_smoothing, is_learned=is_learned,
            class_weight=loss.get("class_weight"), loss_weight=loss.get("loss_weight", 1.0),
        )  # fmt: skip


def check_heads(model: torch.nn.Module) -> None:
    """UserError unless all heads of a built model compute their losses as mmseg's BaseDecodeHead does."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    for head in list_heads(model):
        is_usual = isinstance(head, BaseDecodeHead) and type(head).loss_by_feat is BaseDecodeHead.loss_by_feat
        if not is_usual or head.sampler is not None or head.out_channels != head.num_classes:
            raise UserError(f"--noise_correction: {type(head).__name__} does not compute its loss for every pixel and "
                            "class by BaseDecodeHead.loss_by_feat. Expected a head such as SegformerHead or PSPHead.")


def find_matrices(table: ClassTable, args: argparse.Namespace) -> dict[int, torch.Tensor]:
    """T by domain where it is known before the training: from a file, an audit or a teacher; written to noise.json."""
    if args.noise_matrix:
        found = read_noise(args.noise_matrix, table.names)
        for domain, transition in found.items():
            weak = [f"{name}: right in {share:.0%} of its pixels; taken as given"
                    for name, share in zip(table.names, transition.diagonal().tolist(), strict=True)
                    if share < LEAST_DIAGONAL]  # fmt: skip
            log_estimate(transition, weak, table.names, f"{args.noise_matrix}, domain {domain}")
        return found
    path = Path(args.work_dir) / "noise.json"
    if args.resume and path.is_file():
        return read_noise(path, table.names)
    if args.noise_correction == "audit":
        transition, counts, notes = estimate_audit(args.audit, table)
    elif args.noise_correction == "teacher":
        transition, counts = ask_teacher(table, args)
        transition, notes = make_safe(transition, counts.sum(0), table.names)
    else:
        return {}
    log_estimate(transition, notes, table.names, args.noise_correction)
    if is_rank_zero():
        write_noise(path, {SYNTHETIC: transition}, table.names, args.noise_correction, notes=notes,
                    counts=counts.tolist())  # fmt: skip
    return {SYNTHETIC: transition}


def ask_teacher(table: ClassTable, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """T from a segmentor of real pairs (see estimate_from_teacher), and pixels by its prediction and given label."""
    teacher = load_segmentor(*args.teacher, device=choose_device("auto"), default_table=table)
    if not same_names(teacher.class_table.names, table.names):
        raise UserError(f"--teacher {args.teacher[1]}: knows {list(teacher.class_table.names)}. Expected "
                        f"{list(table.names)} of class table {table.name}. Train it with that table.")
    root = args.synthetic_root or Path(args.synthetic_txt_file).parent
    real = count_predictions(teacher, list_pairs(table, manifest=args.val_txt_file, data_root=args.data_root), table)
    synthetic = count_predictions(teacher, list_pairs(table, manifest=args.synthetic_txt_file, data_root=root), table)
    confusion = estimate_from_counts(real.T)  # one pixel more on the diagonal: a class that is not there is no noise
    return estimate_from_teacher(synthetic, confusion), synthetic


def count_predictions(segmentor: Any, pairs: Sequence[Pair], table: ClassTable) -> torch.Tensor:
    """Pixels by prediction k and given label j, (K, K) float64."""
    count = table.num_classes
    total = torch.zeros(count * (count + 1), device=segmentor.device)
    for _, prediction, masks in predict_batches(segmentor, load_batches(pairs, table, 8, 2)):
        codes = prediction.long() * (count + 1) + masks.long().clamp_max(count)  # column K: ignored
        total += torch.bincount(codes.flatten(), minlength=len(total))
    return total.view(count, count + 1)[:, :count].double().cpu()


def log_estimate(transition: torch.Tensor, notes: Sequence[str], names: Sequence[str], estimator: str) -> None:
    """Log T as a table, and what was replaced in it."""
    LOG.info("label noise of the synthesized pairs, by %s:\n%s", estimator, make_noise_table(transition, names))
    for note in notes:
        LOG.warning("label noise: %s", note)


def make_noise_hook(kind: str, names: Sequence[str], start: int, seed: int, domains: Sequence[int],
                    matrices: Mapping[str, Any]) -> Any:
    """Make the mmengine hook that gives the losses their T.

    Args:
        kind: `hoc` (estimated at step `start`), `learned` (from step `start` on) or `fixed` (`matrices`, at once).
        names: K names of the classes.
        start: optimizer steps of warm-up.
        seed: of the points.
        domains: whose T is estimated.
        matrices: domain -> rows of T.
    """
    from mmengine.dist import broadcast
    from mmengine.hooks import Hook

    class NoiseHook(Hook):
        priority = "HIGHEST"  # before what is logged is noted
        is_ready = kind == "fixed"

        def before_train(self, runner: Any) -> None:
            check_heads(unwrap(runner.model))
            if matrices:
                known = {int(domain): torch.tensor(rows) for domain, rows in matrices.items()}
                for loss in find_losses(unwrap(runner.model)):
                    loss.set_transition(known)

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            if self.is_ready or runner.iter < start:
                return
            self.is_ready, losses = True, find_losses(unwrap(runner.model))
            if bool(losses[0].is_estimated):  # a resumed training has T in its checkpoint
                return
            if kind == "learned":
                for loss in losses:
                    loss.set_transition({})
            else:
                self.estimate(runner, losses)

        def estimate(self, runner: Any, losses: Sequence[Any]) -> None:
            found = {domain: torch.eye(len(names), dtype=torch.float64) for domain in domains}
            if is_rank_zero():
                dataset = runner.train_dataloader.dataset
                dataset = getattr(dataset, "datasets", [dataset])[-1]  # the synthesized part of a joint set comes last
                counts = collect_consensus(unwrap(runner.model), dataset, seed, domains, len(names))
                found, notes, labels = {}, {}, {}
                for domain in domains:
                    labels[domain] = counts[domain].sum((1, 2))
                    estimate = estimate_hoc(counts[domain].cpu())
                    found[domain], notes[domain] = make_safe(estimate, labels[domain], names)
                    log_estimate(found[domain], notes[domain], names, f"hoc at step {runner.iter}, domain {domain}")
                write_noise(Path(runner.work_dir) / "noise.json", found, names, "hoc", seed=seed, step=runner.iter,
                            notes=notes, counts={d: labels[d].long().tolist() for d in domains})  # fmt: skip
            for domain in domains:
                found[domain] = found[domain].to(losses[0].transition)
                broadcast(found[domain])
            for loss in losses:
                loss.set_transition(found)

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            for key in [key for key in outputs or () if key.endswith("acc_seg")]:
                del outputs[key]  # mmseg counts coded labels as wrong

        def after_train(self, runner: Any) -> None:
            if kind == "learned":
                for number, loss in enumerate(find_losses(unwrap(runner.model))):
                    learned = loss.current_transition()[SYNTHETIC].detach()
                    loss.set_transition(dict.fromkeys(domains, learned))
                    if number == 0 and is_rank_zero():
                        log_estimate(learned, (), names, "training")
                        write_noise(Path(runner.work_dir) / "noise.json", {SYNTHETIC: learned}, names, "learned")

    return NoiseHook()


@contextlib.contextmanager
def private_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators for the block, and put them back: the training's draws go on as without it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@torch.no_grad()
def collect_consensus(model: torch.nn.Module, dataset: Any, seed: int, domains: Sequence[int],
                      num_classes: int) -> dict[int, torch.Tensor]:
    """Label triples of neighbouring points of the synthesized images, in the features before the classifier.

    Every round draws its own images, and in each a grid of points with a random offset; neighbours are sought within
    a round and a domain. What is drawn follows from the seed alone.

    Args:
        model: mmseg model, not wrapped.
        dataset: gives packed samples with coded labels.
        seed, domains, num_classes: of the draws; whose points are counted; K.
    Returns:
        domain -> (K, K, K) float64 counts on the CPU (see count_consensus).
    """
    was_training = model.training
    model.eval()
    generator = np.random.default_rng([seed, 0])
    counts = {domain: torch.zeros((num_classes,) * 3, dtype=torch.float64) for domain in domains}
    with private_randomness(seed):
        for _ in range(ROUNDS):
            order = iter(generator.permutation(len(dataset))[:MOST_IMAGES])
            found: dict[int, list] = {domain: [] for domain in domains}
            while min(sum(len(labels) for labels, _ in parts) for parts in found.values()) < ROUND_POINTS:
                samples = [dataset[int(index)] for index in itertools.islice(order, LEAST_IMAGES)]
                if not samples:
                    break
                for label, domain, features in read_points(model, samples, generator):
                    for own in domains:
                        found[own].append((label[domain == own], features[domain == own]))
            for domain, parts in found.items():
                label, features = (torch.cat(values) for values in zip(*parts, strict=True))
                chosen = torch.from_numpy(generator.permutation(len(label))[:ROUND_POINTS]).to(label.device)
                if len(chosen) >= LEAST_POINTS:
                    counts[domain] += count_consensus(label[chosen], features[chosen], num_classes).cpu()
    model.train(was_training)
    return counts


def read_points(model: torch.nn.Module, samples: Sequence[dict[str, Any]],
                generator: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield label (n,), domain (n,) and feature (n, D) of a grid of points of each image, ignored ones left out."""
    batch = {"inputs": [sample["inputs"] for sample in samples],
             "data_samples": [sample["data_samples"] for sample in samples]}  # fmt: skip
    batch = model.data_preprocessor(batch, training=True)  # pads to the size of a training
    kept: list[torch.Tensor] = []
    hook = list_heads(model)[-1].conv_seg.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        model(batch["inputs"], batch["data_samples"], mode="tensor")
    finally:
        hook.remove()
    if not kept:
        raise UserError(f"--noise_correction hoc: {type(list_heads(model)[-1]).__name__} does not classify by its "
                        "conv_seg, so its features are not known. Expected such a head, or T by audit or teacher.")
    stride = max(1, round(batch["inputs"].shape[-1] / kept[0].shape[-1]))
    step = -(-APART // stride)
    for features, sample in zip(kept[0], batch["data_samples"], strict=True):
        labels = sample.gt_sem_seg.data[None].float()
        labels = torch.nn.functional.interpolate(labels, size=features.shape[-2:], mode="nearest")[0, 0].long()
        top, left = generator.integers(step, size=2)
        label, domain, _, is_valid = decode_labels(labels[top::step, left::step])
        yield label[is_valid], domain[is_valid], features[:, top::step, left::step].movedim(0, -1)[is_valid]
