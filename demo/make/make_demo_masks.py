"""Draw the masks of demo/ and their manifest: four made-up places in the class table `mini`.

Usage: python -m demo.make.make_demo_masks [--out demo] [--size 128]
The places are ours and no copy of a real one; the same seed draws the same masks on every machine.
"""
import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from ldm.data.classes import ClassTable
from ldm.data.manifest import write_manifest

BUILDING, LAND, ROAD, VEGETATION, WATER = range(5)
UNIT = 128  # the places are described on a 128 x 128 board

Point = tuple[float, float]


class Board:
    """A mask to draw on, in units of 1/128 of its side.

    Args:
        size: side of the mask in pixels.
        ground: class id everywhere at first.
    """

    def __init__(self, size: int, ground: int):
        self.scale = size / UNIT
        self.mask = Image.new("L", (size, size), ground)
        self._draw = ImageDraw.Draw(self.mask)

    def area(self, points: list[Point], label: int) -> None:
        """Fill a polygon."""
        self._draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=label)

    def box(self, x: float, y: float, width: float, height: float, label: int, turn: float = 0.0) -> None:
        """Fill a rectangle given by its centre and turned by some radians."""
        cos, sin = math.cos(turn), math.sin(turn)
        corners = [(-width, -height), (width, -height), (width, height), (-width, height)]
        self.area([(x + (u * cos - v * sin) / 2, y + (u * sin + v * cos) / 2) for u, v in corners], label)

    def line(self, points: list[Point], width: float, label: int) -> None:
        """Draw a path of constant width with round joints."""
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        radius = width * self.scale / 2
        self._draw.line(scaled, fill=label, width=max(1, round(width * self.scale)))
        for x, y in scaled:
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=label)

    def clump(self, x: float, y: float, radius: float, label: int, rng: random.Random) -> None:
        """Fill an uneven round patch, such as a group of trees."""
        angles = [2 * math.pi * k / 12 for k in range(12)]
        reach = [radius * rng.uniform(0.7, 1.15) for _ in angles]
        self.area([(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, reach, strict=True)], label)


def draw_houses(board: Board, rng: random.Random, left: float, top: float, right: float, bottom: float) -> None:
    """Fill a block of a settlement with plots: a villa or an L-shaped house, a garden, bare ground between."""
    columns, rows = max(1, round((right - left) / 14)), max(1, round((bottom - top) / 14))
    for column in range(columns):
        for row in range(rows):
            x = left + (column + 0.5) * (right - left) / columns
            y = top + (row + 0.5) * (bottom - top) / rows
            if rng.random() < 0.7:
                board.clump(x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), rng.uniform(4, 6), VEGETATION, rng)
            width, height = rng.uniform(6, 9), rng.uniform(5.5, 8)
            board.box(x, y, width, height, BUILDING)
            if rng.random() < 0.4:
                board.box(x + width / 2, y + height / 2, width * 0.6, height * 0.6, BUILDING)


def draw_town(size: int, rng: random.Random) -> Image.Image:
    """Streets at right angles, blocks of villas with gardens, one park with a pond."""
    board = Board(size, LAND)
    streets = [(-4, 30), (36, 62), (68, 94), (100, 132)]  # blocks between the streets, in both directions
    for i, (left, right) in enumerate(streets):
        for j, (top, bottom) in enumerate(streets):
            if (i, j) == (2, 1):
                board.box(81, 49, 24, 24, VEGETATION)
                board.clump(84, 51, 6, WATER, rng)
            else:
                draw_houses(board, rng, left + 1, top + 1, right - 1, bottom - 1)
    for middle in (33, 65, 97):
        wide = 6 if middle == 65 else 4
        board.line([(middle, -8), (middle, 136)], wide, ROAD)
        board.line([(-8, middle), (136, middle)], wide, ROAD)
    return board.mask


def draw_coast(size: int, rng: random.Random) -> Image.Image:
    """Sea, a beach, a coast road, scrub and a few houses."""
    board = Board(size, LAND)
    shore = [(48 + 9 * math.sin(y / 19) + 4 * math.sin(y / 7 + 1), y) for y in range(-8, 137, 3)]
    board.area([(x + 17, y) for x, y in shore] + [(136, 136), (136, -8)], VEGETATION)
    for _ in range(14):
        board.clump(rng.uniform(84, 126), rng.uniform(2, 126), rng.uniform(3, 8), LAND, rng)
    board.area([*shore, (-8, 136), (-8, -8)], WATER)
    road = [(x + 26, y) for x, y in shore]
    for k in range(5, len(road) - 4, 7):
        x, y = road[k]
        turn = math.atan2(road[k + 1][1] - road[k - 1][1], road[k + 1][0] - road[k - 1][0])
        board.box(x + 11, y, 10, 9, LAND, turn)
        board.box(x + 11, y, 8, 6.5, BUILDING, turn)
    board.line(road, 4.5, ROAD)
    board.line([(road[22][0], road[22][1]), (104, 66), (136, 74)], 3.5, ROAD)
    return board.mask


def draw_river(size: int, rng: random.Random) -> Image.Image:
    """A river between fields, a bridge and a village at the crossing."""
    board = Board(size, VEGETATION)
    for column in range(5):  # a patchwork of fields: some bare, some green
        for row in range(5):
            if rng.random() < 0.45:
                board.box(8 + column * 29, 8 + row * 29, 25, 25, LAND, 0.12)
    river = [(x, 46 + 15 * math.sin(x / 24) + 4 * math.sin(x / 9)) for x in range(-8, 137, 3)]
    board.line(river, 20, VEGETATION)
    board.line(river, 14, WATER)
    board.box(84, 98, 52, 36, LAND)
    draw_houses(board, rng, 60, 82, 81, 115)
    draw_houses(board, rng, 88, 82, 109, 115)
    board.line([(84.5, -8), (84.5, 136)], 5, ROAD)
    board.line([(-8, 121), (136, 117)], 4, ROAD)
    return board.mask


def draw_harbour(size: int, rng: random.Random) -> Image.Image:
    """Quays and basins, large halls, tanks and an access road."""
    board = Board(size, LAND)
    board.area([(-8, -8), (136, -8), (136, 24), (98, 26), (96, 66), (80, 66), (78, 28), (48, 30), (46, 74), (28, 74),
                (26, 33), (-8, 36)], WATER)
    for x, y, width, height in [(12, 58, 18, 26), (62, 50, 18, 28), (110, 46, 16, 26), (68, 113, 44, 13),
                                (116, 84, 14, 10), (114, 113, 20, 14)]:
        board.box(x, y, width, height, BUILDING)
    for x, y in [(12, 98), (27, 98), (12, 113), (27, 113)]:
        angles = [2 * math.pi * k / 24 for k in range(24)]
        board.area([(x + 6 * math.cos(a), y + 6 * math.sin(a)) for a in angles], BUILDING)
    for x in range(44, 98, 9):
        board.clump(x, 100, 3.6, VEGETATION, rng)
    board.box(64, 126, 140, 6, VEGETATION)
    board.line([(-8, 84), (60, 84), (88, 92), (136, 94)], 6, ROAD)
    board.line([(41, 84), (41, 136)], 4.5, ROAD)
    board.line([(100, 92), (100, 136)], 4.5, ROAD)
    board.line([(88, 92), (88, 72), (102, 62), (124, 62)], 3.5, ROAD)
    return board.mask


# What is drawn, and the left and top edge of the window that the demo shows, as shares of the drawing. A whole drawing
# on 128 pixels has houses half as large as in the tiles that the small model was trained on.
PLACES: dict[str, tuple[Callable[[int, random.Random], Image.Image], float, float]] = {
    "town": (draw_town, 0.40, 0.12), "coast": (draw_coast, 0.30, 0.30), "river": (draw_river, 0.42, 0.28),
    "harbour": (draw_harbour, 0.10, 0.22),
}
ZOOM = 1.8


def main() -> None:
    """Write label/*.png and demo.json: every mask with every reference of ref/."""
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--size", type=int, default=UNIT, help="side of the masks in pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the places (default: 0)")
    args = parser.parse_args()
    references = sorted(path.name for path in (args.out / "ref").glob("*.[jp][pn]g"))
    if not references:
        parser.error(f"--out: no .jpg or .png in {args.out / 'ref'}. Put at least one reference image there.")
    table = ClassTable.load("mini")
    (args.out / "label").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (draw, left, top) in PLACES.items():
        whole = draw(round(args.size * ZOOM), random.Random(f"{name} {args.seed}"))
        x, y = round(left * whole.width), round(top * whole.height)
        mask = whole.crop((x, y, x + args.size, y + args.size))
        mask.save(args.out / "label" / f"{name}.png", optimize=True)
        prompt = table.prompt(np.asarray(mask))
        rows += [{"source": f"label/{name}.png", "prompt": prompt, "ref_image": f"ref/{ref}"} for ref in references]
    write_manifest(args.out / "demo.json", rows)
    print(json.dumps({"masks": len(PLACES), "rows": len(rows), "folder": str(args.out)}))


if __name__ == "__main__":
    main()
