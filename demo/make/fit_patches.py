"""Fit the encoder of a PatchAutoencoder to the images of a manifest, and write it as weights that train.py starts from.

    python demo/make/fit_patches.py configs/model/autoencoder_patch_mini.yaml patches.safetensors --data_root DATA \
        --txt_file DATA/train_set_items.json

The decoder in the file is the linear way back; train.py --pretrain_path patches.safetensors trains it. With --encoder
MODEL, encoder and trained decoder are those of MODEL and only the linear way back is fitted anew: generators of its
latents stay as they are, and it gets the config's context.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.cli import positive_int  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402


def main(argv: list[str]) -> None:
    """Fit, save, and print what the channels keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="yaml whose model.params.autoencoder is a PatchAutoencoder")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("--data_root", default=".", help="folder that the manifest's paths are relative to")
    parser.add_argument("--txt_file", required=True, help="manifest whose images (`target`) are looked at")
    parser.add_argument("--encoder", metavar="MODEL", help="whole model, or output of this script, whose encoder stays")
    parser.add_argument("--images", type=positive_int, default=1500,
                        help="how many, evenly spaced (default: %(default)s)")
    parser.add_argument("--whitening", type=float, default=0.5, help="see PatchAutoencoder.fit (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    import torch
    from omegaconf import OmegaConf

    from ldm.data.dataset import to_tensor
    from ldm.data.images import read_image
    from ldm.data.manifest import read_manifest
    from ldm.data.transforms import normalize_batch
    from ldm.modules.autoencoder import PatchAutoencoder
    from ldm.util import check_targets, instantiate_from_config, load_config
    from ldm.weights.checkpoint import save_safetensors
    model = OmegaConf.to_container(load_config([args.config]).model)
    check_targets(model, f"--config {args.config}")
    network = instantiate_from_config(model["params"]["autoencoder"])
    if not isinstance(network, PatchAutoencoder):
        raise UserError(f"{args.config}: its autoencoder is a {type(network).__name__}. Expected a PatchAutoencoder.")
    paths = sorted({row.image for row in read_manifest(args.txt_file, args.data_root, check_files=False)})
    chosen = torch.linspace(0, len(paths) - 1, min(args.images, len(paths))).long().tolist()
    images = [to_tensor(read_image(paths[number])) for number in chosen]
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        raise UserError(f"{args.txt_file}: images of {len(sizes)} sizes. Expected tiles of one size.")
    pixels = normalize_batch({"image": torch.stack(images)}, "cpu")["image"]
    if args.encoder:
        account = adopt_encoder(network, args.encoder)
        network.fit_way_back(pixels)
    else:
        kept = network.fit(pixels, args.whitening)
        account = (f"{len(kept)} components keep {kept.sum():.2%} of the variance of {network.downsampling} x "
                   f"{network.downsampling} patches")
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise UserError(f"{args.txt_file}: its images do not vary. Expected images of more than one colour.")
    weights = {f"first_stage_model.{name}": value for name, value in network.state_dict().items()}
    save_safetensors(args.out, weights, OmegaConf.create({"model": model}))
    print(f"{len(images)} images; {account}; wrote {args.out}")


def adopt_encoder(network: "PatchAutoencoder", path: str) -> str:  # noqa: F821
    """Load all of a file's autoencoder but its linear way back; says what was done.

    UserError if the file lacks a part, or has one of another shape.
    """
    from ldm.weights.checkpoint import open_whole
    own = {name: value for name, value in network.state_dict().items() if name != "synthesis"}
    stored = {name: tensor for file in open_whole(path) for name, tensor in file.tensors.items()}
    stored = {name: stored.get(f"first_stage_model.{name}") for name in own}
    bad = [name for name, value in own.items() if stored[name] is None or stored[name].shape != value.shape]
    if bad:
        raise UserError(f"--encoder {path}: {len(bad)} tensors of this PatchAutoencoder are not in it, or of another "
                        f"shape (first: first_stage_model.{bad[0]}). Give a model with the same channels and widths.")
    network.load_state_dict({name: tensor.read() for name, tensor in stored.items()}, strict=False)
    return f"the way back of {path}'s encoder was fitted, the rest kept"


if __name__ == "__main__":
    run_entry_point(main)
