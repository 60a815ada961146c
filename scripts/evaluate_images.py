"""The commands `distribution` and `diversity` of evaluate.py: distances between sets of images, and within one."""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.util import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

Extract = Callable[["torch.Tensor"], "torch.Tensor"]


def add_commands(commands: Any, style: dict[str, Any]) -> None:
    """Add both commands to the subparsers of evaluate.py."""
    sets = commands.add_parser("distribution", help="FID and KID to real images, with a floor", description="Features "
                               "are those of ImageNet's MobileNetV2 from PyPI unless a flag names another network.",
                               **style)  # fmt: skip
    sets.add_argument("--run", required=True, help="--outdir of inference.py")
    sets.add_argument("--real", required=True, help="manifest of real images (target)")
    sets.add_argument("--real_root", help="where the paths of --real start; default: its folder")
    network = sets.add_mutually_exclusive_group()  # without: ImageNet's MobileNetV2
    network.add_argument("--inception", help="pt_inception-2015-12-05-6726825d.pth: FID and KID as published")
    network.add_argument("--segmentor", nargs=2, metavar=("CONFIG", "CKPT"), help="features of a segmentor instead")
    network.add_argument("--vgg", help="file of demo/make/convert_lpips.py: features of ImageNet's VGG16 instead")
    sets.add_argument("--subsets", type=int, default=100, help="subsets that KID is the mean of")
    sets.add_argument("--subset_size", type=int, default=1000, help="images in each, at most half of the smaller set")
    sets.add_argument("--seed", type=int, default=0, help="seed of subsets and parts")
    sets.set_defaults(measure=measure_distribution)

    diversity = commands.add_parser("diversity", help="LPIPS between samples of one mask and reference", **style)
    diversity.add_argument("--run", required=True, help="--outdir of inference.py with --num_per_mask 2 or more")
    diversity.add_argument("--vgg", required=True, help="file of demo/make/convert_lpips.py")
    diversity.set_defaults(measure=measure_diversity)


def load_extractor(args: argparse.Namespace) -> tuple[str, Extract]:
    """Name of the feature network and the function from uint8 images (B, 3, H, W) to features (B, D)."""
    import torch

    from ldm.cli import choose_device

    device = choose_device(args.device)
    if args.inception:
        from post_processing.evaluation.inception import InceptionFeatures

        network = InceptionFeatures(args.inception).to(device)
        return "Inception v3 (2048)", torch.no_grad()(lambda images: network(images.to(device)))
    if args.segmentor:
        from post_processing.evaluation.images import segmentor_features
        from post_processing.segmentation.segmentor import load_segmentor

        segmentor = load_segmentor(*args.segmentor, device=device)
        return f"segmentor {Path(args.segmentor[1]).name}", lambda images: segmentor_features(segmentor, images)
    if not args.vgg:
        from post_processing.evaluation.images import load_mobilenet, mobilenet_features

        mobilenet = load_mobilenet().to(device)
        return "MobileNetV2 (320)", lambda images: mobilenet_features(mobilenet, images.to(device))
    from ldm.modules.perceptual import PerceptualLoss

    vgg = PerceptualLoss(args.vgg).to(device)
    return "VGG16 relu5_3 (512)", torch.no_grad()(
        lambda images: vgg.features(images.to(device) / 127.5 - 1)[-1].mean(dim=(2, 3))
    )


def read_features(
    paths: Sequence[Path], extract: Extract, args: argparse.Namespace
) -> tuple["np.ndarray", list[tuple[int, int]]]:
    """Features of image files, (N, D) float32, in the order of the files, and the (height, width) that occur."""
    import numpy as np

    from ldm.data.images import image_size
    from post_processing.run_index import group_batches, read_image_batch

    sizes = [image_size(path) for path in paths]
    found: dict[Path, np.ndarray] = {}
    with ThreadPoolExecutor(args.num_threads) as pool:
        for size, batch in group_batches(paths, sizes, args.batch_size):
            rows = extract(read_image_batch(batch, size, pool)).float().cpu().numpy()
            found.update(zip(batch, rows, strict=True))
    return np.stack([found[path] for path in paths]), sorted(set(sizes))


def measure_distribution(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """FID and KID of a run to real images; returns results and a table."""
    from ldm.data.manifest import read_manifest
    from post_processing.evaluation.images import compare_sets
    from post_processing.run_index import read_run

    samples, run = read_run(args.run, args.data_root)
    rows = read_manifest(args.real, args.real_root or Path(args.real).parent, need=("image",), check_files=False)
    name, extract = load_extractor(args)
    real, real_sizes = read_features(sorted({row.image for row in rows}), extract, args)
    synthesized, sizes = read_features([sample.image for sample in samples], extract, args)
    results = compare_sets(real, synthesized, args.seed, subsets=args.subsets, subset_size=args.subset_size)
    note = ("Comparable with FIDs and KIDs of this network on the same real images only." if args.inception else
            "These are not the published FID and KID: another network. Compare them with each other only.")  # fmt: skip
    fingerprint = run.get("settings", {})
    results = {"measure": "distribution", "features": name, "columns": real.shape[1], "note": note, **results,
               "sizes": {"real": real_sizes, "synthesized": sizes},
               "arguments": {key: value for key, value in vars(args).items() if key != "measure"},
               "checkpoint": fingerprint}  # fmt: skip
    return results, distribution_table(results)


def distribution_table(results: dict[str, Any]) -> str:
    """Markdown text of distribution."""
    lines = ["| sets | images | FID | KID x 1000 (sd of subsets) |", "|---|---|---|---|"]
    for key, label in (("all", "real, synthesized"), ("same_size", "part of the real, as many synthesized"),
                       ("floor", "part of the real, as many other real (floor)")):  # fmt: skip
        row = results[key]
        lines.append(f"| {label} | {row['images'][0]}, {row['images'][1]} | {row['fid']:.3f} "
                     f"| {1000 * row['kid']:.3f} ({1000 * row['kid_sd']:.3f}) |")  # fmt: skip
    text = "\n".join(lines) + f"\n\nFeatures: {results['features']}. {results['note']}\n"
    smallest = min(results["all"]["images"])
    if smallest < results["columns"]:
        text += f"FID of {smallest} images in {results['columns']} features is far above that of large sets: use KID.\n"
    if results["sizes"]["real"] != results["sizes"]["synthesized"]:
        text += f"Sizes differ ({results['sizes']}): part of the distance is that of resolution.\n"
    return text


def measure_diversity(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Mean LPIPS between samples painted from the same mask and reference; returns results and a table."""
    import numpy as np
    import torch

    from ldm.cli import choose_device
    from ldm.modules.perceptual import PerceptualLoss
    from post_processing.evaluation.images import mean_pair_distances
    from post_processing.run_index import read_image_batch, read_run

    samples, run = read_run(args.run, args.data_root)
    device = choose_device(args.device)
    lpips = PerceptualLoss(args.vgg).to(device)
    groups: dict[Any, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault((sample.mask, sample.reference, sample.size), []).append(number)
    with ThreadPoolExecutor(args.num_threads) as pool, torch.no_grad():
        means = list(mean_pair_distances(
            groups,
            lambda numbers: read_image_batch([samples[n].image for n in numbers], samples[numbers[0]].size, pool).to(
                device) / 127.5 - 1,
            lpips,
        ).values())  # fmt: skip
    if not means:
        raise UserError(f"--run {args.run}: one sample a mask and reference. Expected two or more. Paint with "
                        "--num_per_mask 4.")  # fmt: skip
    pairs = sum(len(one) * (len(one) - 1) // 2 for one in groups.values())
    error = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    results = {"measure": "diversity", "metric": "LPIPS (VGG16, version 0.1)", "lpips": float(np.mean(means)),
               "standard_error": error, "groups": len(means), "pairs": pairs,
               "arguments": {key: value for key, value in vars(args).items() if key != "measure"},
               "checkpoint": run.get("settings", {})}  # fmt: skip
    plus = "" if error is None else f" ± {error:.4f} (standard error over masks)"
    return results, (f"LPIPS diversity {results['lpips']:.4f}{plus}: {pairs} pairs of samples of {len(means)} masks "
                     "with one reference each. 0 = all samples are the same; VGG16, not AlexNet.\n")  # fmt: skip
