"""Speed of the filter without the network: tiles/s next to a class loop as TISynth's filter.py has it.

Both arms read the same files, get the same scores from the same (cheap) model, measure the class means on the real
tiles and write filtered masks of the synthesized ones. The time inside the model is taken off both. CPU seconds are
counted, so that other load on the machine does not matter; one thread computes.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.data.classes import ClassTable  # noqa: E402
from ldm.data.images import Pair  # noqa: E402
from post_processing.segmentation.loading import load_pair  # noqa: E402
from post_processing.segmentation.segmentor import Segmentor  # noqa: E402
from post_processing.selection.hardness import measure_hardness  # noqa: E402
from post_processing.selection.rules import PixelFilter  # noqa: E402


class TimedModel(torch.nn.Module):
    """Scores as a fixed random map of 8 x 8 mean colours; notes how long it takes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.decode_head = SimpleNamespace(num_classes=count)
        weight = torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 3
        self.weight = torch.nn.Parameter(weight)

    def data_preprocessor(self, data: dict, training: bool) -> dict:
        """Scale as mmseg's preprocessor does."""
        return {"inputs": torch.stack(data["inputs"]).float() / 128 - 1}

    def inference(self, inputs: torch.Tensor, metas: list) -> torch.Tensor:
        """Scores at the size of the images."""
        scores = F.conv2d(F.avg_pool2d(inputs, 8), self.weight)
        return F.interpolate(scores, inputs.shape[-2:], mode="bilinear", align_corners=False).contiguous()


class TimedSegmentor(Segmentor):
    """Counts the CPU seconds inside logits(), which are the network's."""

    seconds = 0.0

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """See Segmentor.logits."""
        begun = time.thread_time()
        result = super().logits(images)
        self.seconds += time.thread_time() - begun
        return result


def draw_tiles(folder: Path, count: int, size: int, classes: int, seed: int, ext: str) -> list[Pair]:
    """Tiles with texture, and masks of smooth areas with 5 % ignored."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    items = []
    for number in range(count):
        areas = Image.fromarray(random.integers(0, 256, (size // 32, size // 32), np.uint8))
        field = np.asarray(areas.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        mask = (field * classes / 256).astype(np.uint8).clip(0, classes - 1)
        mask[: size // 20] = 255
        noise = Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).filter(ImageFilter.GaussianBlur(3))
        image = np.asarray(noise, np.float32) * 2 - 128 + field[..., None] / 2
        paths = folder / f"{number}_seed_1.{ext}", folder / f"{number}.png"
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(paths[0], quality=95)
        Image.fromarray(mask).save(paths[1])
        items.append(Pair(*paths))
    return items


def run_class_loop(segmentor: Segmentor, real: list[Pair], synthesized: list[Pair], out: Path) -> tuple[float, float]:
    """Image by image, with a loop over the classes and .item() in it; returns the CPU seconds of the two passes."""
    count = segmentor.class_table.num_classes
    sums, pixels = [0.0] * count, [0.0] * count

    def losses(item: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        image = torch.from_numpy(np.array(Image.open(item.image).convert("RGB"))).permute(2, 0, 1)[None]
        mask = torch.from_numpy(np.array(Image.open(item.mask))).long()[None]
        return F.cross_entropy(segmentor.logits(image), mask, ignore_index=255, reduction="none"), mask

    begun, network = time.process_time(), segmentor.seconds
    for item in real:
        loss, mask = losses(item)
        for index in range(count):
            sums[index] += loss[mask == index].sum().item()
            pixels[index] += (mask == index).sum().item()
    middle, middle_network = time.process_time(), segmentor.seconds
    means = [total / (number + 1e-5) for total, number in zip(sums, pixels, strict=True)]
    for item in synthesized:
        loss, mask = losses(item)
        for index in range(count):
            mask[(mask == index) & (loss > 1.25 * means[index])] = 255
        Image.fromarray(mask[0].numpy().astype(np.uint8)).save(out / f"{item.image.stem}.png")
    ended = time.process_time()
    return middle - begun - (middle_network - network), ended - middle - (segmentor.seconds - middle_network)


def run_ours(segmentor: Segmentor, real: list[Pair], synthesized: list[Pair], out: Path,
             batch_size: int) -> tuple[float, float]:
    """The filter as it is, reports included; returns the CPU seconds of the two passes."""
    begun, network = time.process_time(), segmentor.seconds
    hardness = measure_hardness({}, segmentor, real, batch_size, 1)
    middle, middle_network = time.process_time(), segmentor.seconds
    (out / "work").mkdir()
    pixel_filter = PixelFilter(hardness.limits(1.25), segmentor.class_table, out, batch_size, 1)
    pixel_filter.run(segmentor, out / "work", synthesized)
    ended = time.process_time()
    return middle - begun - (middle_network - network), ended - middle - (segmentor.seconds - middle_network)


def main() -> None:
    """Compare the masks, then the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tiles", type=int, default=24, help="real ones, and as many synthesized")
    parser.add_argument("--size", type=int, default=512, help="edge of a tile in pixels")
    parser.add_argument("--classes", type=int, nargs="+", default=[5, 24, 150], help="numbers of classes to try")
    parser.add_argument("--ext", choices=["jpg", "png"], default="jpg", help="of the tiles; TISynth's are jpg")
    parser.add_argument("--batch_size", type=int, default=4, help="of our arm")
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    for count in args.classes:
        classes = [{"id": i, "name": f"class {i}", "colour": [i, 0, 1]} for i in range(count)]
        table = ClassTable.load({"name": "bench", "classes": classes})
        segmentor = TimedSegmentor(TimedModel(count), table)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            real = draw_tiles(folder / "real", args.tiles, args.size, count, 0, args.ext)
            synthesized = draw_tiles(folder / "syn", args.tiles, args.size, count, 1, args.ext)
            times: dict[str, list[tuple[float, float]]] = {"class loop": [], "ours": []}
            for number in range(args.rounds):
                outs = folder / f"loop{number}", folder / f"ours{number}"
                for out in outs:
                    out.mkdir()
                times["class loop"].append(run_class_loop(segmentor, real, synthesized, outs[0]))
                times["ours"].append(run_ours(segmentor, real, synthesized, outs[1], args.batch_size))
            begun = time.process_time()
            for item in real:
                load_pair(item, table)
            reading = 1e3 * (time.process_time() - begun) / args.tiles
            differing = dropped = pixels = 0
            for item in synthesized:
                theirs, ours = (np.asarray(Image.open(out / f"{item.image.stem}.png")) for out in outs)
                differing += int((theirs != ours).sum())
                dropped += int((ours == 255).sum() - (np.asarray(Image.open(item.mask)) == 255).sum())
                pixels += ours.size
        share = f"{dropped / pixels:.1%} of the pixels dropped"
        print(f"{count} classes: {differing} of {pixels:,} pixels differ between the arms' masks, {share}")
        best = {arm: [min(values) / args.tiles for values in zip(*passes, strict=True)]
                for arm, passes in times.items()}  # fmt: skip
        for arm, (means, masks) in best.items():
            print(f"  {arm:10}  class means {1e3 * means:6.1f} ms/tile, masks {1e3 * masks:6.1f} ms/tile, "
                  f"both {2 / (means + masks):6.1f} tiles/s")  # fmt: skip
        print(f"  of both passes of both arms, {reading:.1f} ms/tile are the decoding of tile and mask")
        print(f"  ours is {sum(best['class loop']) / sum(best['ours']):.2f} times as fast "
              f"(load {os.getloadavg()[0]:.1f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
