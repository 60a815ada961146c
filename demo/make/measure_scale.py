"""Measure the factor that brings an autoencoder's latents to unit variance: 1 / (standard deviation over a manifest).

python demo/make/measure_scale.py RUN/checkpoints/last.safetensors --data_root DATA --txt_file DATA/train_set_items.json
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.util import UserError, run_entry_point  # noqa: E402


def main(argv: list[str]) -> None:
    """Print the factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="run of configs/model/autoencoder_*.yaml, with its config inside")
    parser.add_argument("--data_root", default=".", help="folder that the manifest's paths are relative to")
    parser.add_argument("--txt_file", required=True, help="manifest whose images (`target`) are measured")
    parser.add_argument("--images", type=int, default=512, help="how many images, evenly spaced (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    import torch

    from ldm.data.dataset import to_tensor
    from ldm.data.images import read_image
    from ldm.data.manifest import read_manifest
    from ldm.data.transforms import normalize_batch
    from ldm.weights.load import load_method, read_model_config
    config = read_model_config(args.ckpt)
    if "autoencoder" not in config["model"]["params"]:
        raise UserError(f"{args.ckpt}: no autoencoder config inside. Expected the export of an autoencoder run.")
    network = load_method(args.ckpt, config, "cpu").first_stage_model
    paths = sorted({row.image for row in read_manifest(args.txt_file, args.data_root, check_files=False)})
    latents, batches = [], {}
    for path in paths[::max(1, len(paths) // args.images)]:
        image = to_tensor(read_image(path))
        batches.setdefault(tuple(image.shape), []).append(image)
    for images in batches.values():  # of one size each
        for batch in torch.stack(images).split(args.batch_size):
            with torch.inference_mode():
                latent = network.encode(normalize_batch({"image": batch}, "cpu")["image"]).sample()
            latents.append(latent.transpose(0, 1).flatten(1))  # (C, N)
    values = torch.cat(latents, dim=1)  # (C, N)
    print(f"standard deviation by channel: {', '.join(f'{s:.3f}' for s in values.std(1).tolist())}", file=sys.stderr)
    print(f"mean by channel: {', '.join(f'{s:.3f}' for s in values.mean(1).tolist())}", file=sys.stderr)
    print(f"{1.0 / values.std().item():.5f}")


if __name__ == "__main__":
    run_entry_point(main)
