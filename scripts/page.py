"""A page in your browser: draw a mask, choose references, look at what the model generates; and look into runs.

    python scripts/page.py --ckpt models/tisynth_mini.safetensors        # opens on http://127.0.0.1:7860

Nothing leaves this machine: the page is served to 127.0.0.1 unless --host says otherwise, and asks no other host.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.util import UserError, run_entry_point  # noqa: E402

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")


def build_parser() -> argparse.ArgumentParser:
    """Command line of page.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", default="models/tisynth_mini.safetensors", help="weights (default: %(default)s)")
    add("--config", default=None, help="model yaml; only needed if the checkpoint has no config inside")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, ... (default: %(default)s)")
    add("--precision", choices=["auto", "full", "autocast"], default="auto", help="as inference.py's")
    add("--guide", nargs="+", default=[], metavar="FILE", help="config and weights of a segmentor to rectify with, as "
        "inference.py's; adds a slider")
    add("--masks", default="demo/label", help="folder of masks to start from, in the model's classes "
        "(default: %(default)s)")
    add("--references", default="demo/ref", help="folder of images to choose from (default: %(default)s)")
    add("--runs", default="outputs", help="folder whose finished runs can be looked into (default: %(default)s)")
    add("--size", type=int, default=128, help="longest side of a mask in pixels: that of the training (default: 128)")
    add("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 lets others in your network use it, without a "
        "password (default: %(default)s)")
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def list_images(folder: str) -> list[Path]:
    """Images of a folder by name; none if there is no folder."""
    path = Path(folder)
    return sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else []


def main(argv: list[str] | None = None) -> None:
    """Load the model and serve the page until Ctrl-C."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from demo.page.session import Studio

    studio = Studio(args.ckpt, args.config, args.device, args.precision, args.guide)
    factor = studio.method.size_factor
    if args.size % factor or not factor <= args.size <= 1024:
        raise UserError(f"--size: {args.size} is not possible. Expected a multiple of {factor}, at most 1024.")
    try:
        from demo.page.app import Page
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}). Expected the packages of requirements/page.txt. Run "
                        "PYTHON=$(sh scripts/setup_env.sh demo page), or sh demo.sh --page.") from error
    page = Page(studio, list_images(args.masks), list_images(args.references), Path(args.runs), args.size)
    try:
        served = page.start(args.host, args.port)
    except OSError as error:
        raise UserError(f"--port: {args.port} on {args.host} cannot be served ({error}). Choose another.") from error
    try:
        served.block_thread()
    finally:
        page.close(served)


if __name__ == "__main__":
    run_entry_point(main)
