"""Sheets of images side by side with a line of text below each: previews of trainings, of runs and of gains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

GAP, TEXT_HEIGHT, FONT_SIZE = 6, 18, 13
BACKGROUND, INK, EMPTY = (255, 255, 255), (30, 30, 30), (235, 235, 235)


@dataclass(frozen=True)
class Cell:
    """A tile of a sheet.

    Args:
        image: (H, W) or (H, W, C) uint8, of more than three bands the first three are drawn; None = there is none.
        label: one line under the tile.
        is_mask: enlarge without mixing colours.
    """

    image: np.ndarray | None
    label: str = ""
    is_mask: bool = False


def draw_sheet(rows: Sequence[Sequence[Cell]], tile: int | None = None,
               legend: Sequence[tuple[str, tuple[int, int, int]]] = ()) -> Image.Image:
    """Draw the tiles with their labels, and colours with their names below.

    Args:
        rows: of cells; the first column is set apart.
        tile: width of a tile in pixels, None = that of the last image of the last row, from which its height follows.
        legend: names and (r, g, b).
    """
    shape = next(cell.image.shape for cell in reversed(rows[-1]) if cell.image is not None)
    tile = tile or shape[1]
    height = max(1, round(tile * shape[0] / shape[1]))
    step_x, step_y = tile + GAP, height + TEXT_HEIGHT + GAP
    width = GAP + step_x * max(len(line) for line in rows) + GAP
    font = ImageFont.load_default(FONT_SIZE)
    lines: list[list[tuple[int, str, tuple[int, int, int]]]] = [[]]
    x = GAP
    for name, colour in legend:
        needed = 30 + round(font.getlength(name))
        if x + needed > width and lines[-1]:
            lines.append([])
            x = GAP
        lines[-1].append((x, name, colour))
        x += needed
    bottom = GAP + step_y * len(rows)
    canvas = Image.new("RGB", (width, bottom + TEXT_HEIGHT * len(lines) * bool(legend) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for j, line in enumerate(rows):
        for i, cell in enumerate(line):
            x, y = GAP + i * step_x + (GAP if i else 0), GAP + j * step_y
            if cell.image is None:
                draw.rectangle((x, y, x + tile - 1, y + height - 1), fill=EMPTY)
            else:
                method = Image.Resampling.NEAREST if cell.is_mask else Image.Resampling.LANCZOS
                canvas.paste(ImageOps.pad(to_rgb(cell.image), (tile, height), method, BACKGROUND), (x, y))
            draw.text((x, y + height + 1), shorten(cell.label, tile, font), fill=INK, font=font)
    for number, line in enumerate(lines):
        for x, name, colour in line:
            y = bottom + number * TEXT_HEIGHT
            draw.rectangle((x, y + 3, x + 11, y + 14), fill=colour, outline=INK)
            draw.text((x + 16, y), name, fill=INK, font=font)
    return canvas


def to_rgb(image: np.ndarray) -> Image.Image:
    """An image that can be looked at: one of more than three bands by the first three, one of two by the first."""
    if image.ndim == 3:
        image = image[..., :3] if image.shape[2] >= 3 else image[..., 0]
    return Image.fromarray(image).convert("RGB")


def shorten(text: str, width: int, font: Any) -> str:
    """A text that fits into a width in pixels, with dots where its end is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
