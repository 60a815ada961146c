"""A tiny TISynth with random weights, rows to generate, and inference.py run on them in this process."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import inference
from ldm.util import instantiate_from_config, run_entry_point
from ldm.weights.checkpoint import save_safetensors

REPOSITORY = Path(inference.__file__).parent
MODEL = {
    "target": "cldm.tisynth.TISynth",
    "params": {
        "unet": {
            "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [1, 2], "channel_mult": [1, 2],
            "num_heads": 4, "context_dim": 32,
        },
        "autoencoder": {
            "target": "ldm.modules.autoencoder.AutoencoderKL",
            "params": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1},
        },
        "text_encoder": {
            "target": "ldm.modules.text.ClipTextEncoder",
            "params": {
                "vocab_size": 1024, "width": 32, "layers": 1, "heads": 2, "max_length": 16,
                "tokenizer": str(REPOSITORY / "configs/model/mini_tokenizer.json"),
            },
        },
        "class_table": "mini",
    },
}  # fmt: skip


def make_workspace(root: Path, sizes=((8, 8), (8, 16), (8, 8))) -> Path:
    """Write a checkpoint `tiny.safetensors`, and `rows.json` with a mask and a reference a row; returns root."""
    torch.manual_seed(0)
    method = instantiate_from_config(MODEL)
    for parameter in method.parameters():  # zero-initialised layers would hide conditions that do not arrive
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():  # random conditions say little: raise their voice above the rounding of pixels
        for name, parameter in method.named_parameters():
            if any(part in name for part in (".attn2.", "input_hint_block", "zero_convs")):
                parameter *= 4
    save_safetensors(root / "tiny.safetensors", method.state_dict(), OmegaConf.create({"model": MODEL}))
    random = np.random.default_rng(0)
    rows = []
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(random.integers(0, 5, (height, width), np.uint8)).save(root / f"mask_{index}.png")
        Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8)).save(root / f"ref_{index}.png")
        rows.append({"source": f"mask_{index}.png", "prompt": "a satellite image of road",
                     "ref_image": f"ref_{index}.png"})  # fmt: skip
    write_rows(root / "rows.json", rows)
    return root


def write_rows(path: Path, rows: list) -> None:
    """Write a manifest; strings are lines as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def arguments(workspace: Path, outdir: Path, *extra: str, manifest: str = "rows.json") -> list[str]:
    """Command line of inference.py for a workspace."""
    paths = {"--ckpt": workspace / "tiny.safetensors", "--data_root": workspace, "--txt_file": workspace / manifest}
    flags = [str(part) for pair in paths.items() for part in pair]
    return [*flags, "--outdir", str(outdir), "--ddim_steps", "2", "--device", "cpu", *extra]


def run(workspace: Path, outdir: Path, *extra: str, manifest: str = "rows.json") -> int:
    """Run inference.py's main in this process; returns the exit code."""
    with pytest.raises(SystemExit) as stop:
        run_entry_point(inference.main, arguments(workspace, outdir, *extra, manifest=manifest))
    return stop.value.code


def read_lines(path: Path) -> list[dict]:
    """Records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Images of an output folder by name."""
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "images").iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same after any history: all files but the statistics, the record of the run and locks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".lock" and path.name != "run.json"
            and path.parent.name != "shards"}  # fmt: skip


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """A grey PNG of a claimed size, with further chunks (name, content); `data` is what its pixels decompress to."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = (b"IDAT", zlib.compress(data) if data else b"")
    parts = [struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
             for name, content in (header, *chunks, body, (b"IEND", b""))]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def finished_shards(folder: Path) -> list[str]:
    """Names in the folder of statistics; nothing but statistics when a run is complete."""
    return sorted(path.name for path in (folder / "shards").iterdir())
