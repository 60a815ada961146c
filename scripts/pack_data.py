"""Pack a prepared data set into one small file, so that a training can be carried to a machine without the data.

    python scripts/pack_data.py OUT/data mini_data.zip --perceptual OUT/lpips_vgg16.safetensors
    sh scripts/train_mini.sh mini_data.zip OUT        # reads it

Images become WebP, masks PNG; manifests, class table and, in half precision and without its last stage, the perceptual
loss's weights go with them. Rows that do not fit under the limit are left out, drawn evenly.
"""
import argparse
import io
import json
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import positive_float, positive_int  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402

MANIFESTS = ("train_set_items.json", "ground_set_items.json", "val_set_items.json")
PERCEPTUAL = "lpips_vgg16.safetensors"
IMAGES = ("target", "ref_image")
SPARE = 0.02  # of the limit, for the zip's own tables and manifests


def encode(path: Path, is_image: bool, quality: int) -> bytes:
    """An image as WebP, or a mask as PNG, its numbers as they are."""
    from PIL import Image

    from ldm.data.classes import read_raw_mask
    from ldm.data.images import read_image
    file = io.BytesIO()
    if is_image:
        Image.fromarray(read_image(path)).save(file, "WEBP", quality=quality, method=6)
    else:
        Image.fromarray(read_raw_mask(path)).save(file, "PNG", optimize=True)
    return file.getvalue()


def shrink_perceptual(path: Path) -> bytes:
    """Weights of the perceptual loss in half precision, without the stage at the lowest resolution."""
    from safetensors.torch import load_file, save
    tensors = load_file(str(path))
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("heads."))
    dropped = (f"heads.{last}", *(f"convs.{index}." for index in (10, 11, 12)))
    return save({name: value.half() for name, value in tensors.items() if not name.startswith(dropped)})


def packed_name(name: str, is_image: bool) -> str:
    """Name of a file in the pack."""
    return str(Path(name).with_suffix(".webp" if is_image else ".png"))


def pack(data: Path, out: Path, perceptual: Path | None, quality: int, limit: float) -> str:
    """Write the pack (see the module); returns a line about it.

    Raises:
        UserError: if there is no training manifest, two files would get one name, or nothing fits.
    """
    rows = {name: [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines() if line.strip()]
            for name in MANIFESTS if (data / name).is_file()}  # fmt: skip
    if not rows.get(MANIFESTS[0]):
        raise UserError(f"{data}: no rows in {MANIFESTS[0]}. Expected a folder of scripts/prepare_dataset.py.")
    wanted = {packed_name(row[key], key in IMAGES): (row[key], key in IMAGES) for part in rows.values()
              for row in part for key in ("source", *IMAGES) if key in row}  # fmt: skip
    if len(wanted) < len({name for name, _ in wanted.values()}):
        raise UserError(f"{data}: files that differ in their ending only cannot be packed. Rename them.")
    with ThreadPoolExecutor() as pool:
        encoded = dict(zip(wanted, pool.map(
            lambda item: encode(data / item[0], item[1], quality), wanted.values()), strict=True))
    extra = {PERCEPTUAL: shrink_perceptual(perceptual)} if perceptual else {}
    extra |= {name: (data / name).read_bytes() for name in ("classes.yaml",) if (data / name).is_file()}
    room = limit * (1 - SPARE) - sum(map(len, extra.values()))
    files: dict[str, bytes] = {}
    lines = {}
    for name, part in reversed(rows.items()):  # validation first: it is small
        kept, total = [], len(part)
        for position in sorted(range(total), key=lambda i: (i * 0.6180339887498949) % 1):  # evenly over the manifest
            row = {key: packed_name(value, key in IMAGES) if key in ("source", *IMAGES) else value
                   for key, value in part[position].items()}
            new = {row[key] for key in ("source", *IMAGES) if key in row} - files.keys()
            size = sum(len(encoded[key]) + 200 for key in new) + len(json.dumps(row))
            if size <= room:
                room -= size
                files |= {key: encoded[key] for key in new}
                kept.append((position, row))
        lines[name] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in sorted(kept, key=lambda x: x[0]))
        if not kept:
            raise UserError(f"{out}: not one row of {name} fits into {limit / 1e6:g} MB. Raise --limit_mb.")
    partial = out.with_name(f".{out.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
        for name, content in {**files, **extra}.items():
            file.writestr(name, content)
        for name, content in lines.items():
            file.writestr(name, content, zipfile.ZIP_DEFLATED)
    partial.replace(out)
    kept = {name: content.count("\n") for name, content in lines.items()}
    return (f"{out}: {out.stat().st_size / 1e6:.1f} MB, {len(files)} files, "
            + ", ".join(f"{kept[name]} of {len(rows[name])} rows in {name}" for name in rows))


def main(argv: list[str]) -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of prepared tiles with train_set_items.json")
    parser.add_argument("out", type=Path, help="file to write, .zip")
    parser.add_argument("--perceptual", type=Path, help="file of demo/make/convert_lpips.py")
    parser.add_argument("--quality", type=positive_int, default=80, help="of the WebP images (default: %(default)s)")
    parser.add_argument("--limit_mb", type=positive_float, default=40.0, help="largest file (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    print(pack(args.data, args.out, args.perceptual, args.quality, args.limit_mb * 1e6))


if __name__ == "__main__":
    run_entry_point(main)
