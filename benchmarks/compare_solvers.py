"""How far each solver, at each number of steps, ends from DDIM with nearly all timesteps.

    python benchmarks/compare_solvers.py --ckpt models/tisynth_mini.safetensors --data_root demo
        --txt_file demo/demo.json

The same noise, conditions and guidance everywhere. Distances are root mean square differences of latents, in units of
the reference's standard deviation, as mean over the samples.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from ldm.data.dataset import PairDataset  # noqa: E402
from ldm.data.manifest import read_manifest  # noqa: E402
from ldm.data.transforms import normalize_batch  # noqa: E402
from ldm.diffusion.spacing import FROM_ZERO, SPACINGS  # noqa: E402
from ldm.sampling.modes import Sampling  # noqa: E402
from ldm.sampling.noise import sample_noise  # noqa: E402
from ldm.weights.load import load_method, read_model_config  # noqa: E402


def main() -> None:
    """Print the table as markdown, and every line as JSON into --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--config")
    parser.add_argument("--data_root", default=".")
    parser.add_argument("--txt_file", required=True)
    parser.add_argument("--count", type=int, default=4, help="rows, evenly spaced over the manifest")
    parser.add_argument("--reference_steps", type=int, default=999)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15, 20])
    parser.add_argument("--scale", type=float, help="guidance scale; default: the model's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="file for the lines as JSON")
    args = parser.parse_args()
    method = load_method(args.ckpt, read_model_config(args.ckpt, args.config), args.device)
    rows = read_manifest(args.txt_file, args.data_root, need=("reference", "prompt"), table=method.class_table)
    rows = rows[:: max(1, len(rows) // args.count)][: args.count]
    dataset = PairDataset(rows, method.class_table, reference="manifest")
    batch = normalize_batch(torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))]), args.device)
    noise = sample_noise(method.noise_shape(*batch["mask"].shape[-2:]), range(len(dataset)), args.device)

    def latent(sampling: Sampling) -> torch.Tensor:
        return method.sample_latent(batch, noise, replace(sampling, guidance_scale=args.scale))

    reference = latent(Sampling(num_steps=args.reference_steps))
    arms = [Sampling(num_steps=steps) for steps in (*args.steps, 50, 100)]
    for steps, solver, spacing, end in itertools.product(
        args.steps, ("dpmpp_2m", "unipc"), [s for s in SPACINGS if s not in FROM_ZERO], ("first", "clean")
    ):
        arms.append(Sampling(solver, steps, spacing=spacing, end=end))
    print(f"| solver | steps | spacing | end | distance to DDIM-{args.reference_steps} |\n|---|---|---|---|---|")
    lines = []
    for arm in arms:
        difference = (latent(arm) - reference).square().mean((1, 2, 3)).sqrt() / reference.std((1, 2, 3))
        distance = float(difference.mean())
        lines.append(arm.to_dict() | {"distance": distance})
        print(f"| {arm.solver} | {arm.num_steps} | {arm.spacing} | {arm.end} | {distance:.4f} |", flush=True)
    if args.out:
        Path(args.out).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
