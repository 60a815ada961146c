"""Class balance of synthesized pictures before and after filtering and resampling: numbers, table and picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.data.classes import ClassTable
from post_processing.selection.choice import Candidate

STAGES = {"painted": "all pictures, masks as painted", "filtered": "all pictures, filtered masks",
          "resampled": "chosen pictures, filtered masks"}  # fmt: skip
BAR_COLOURS = {"painted": (190, 190, 190), "filtered": (120, 160, 210), "resampled": (30, 90, 170)}
ROW_HEIGHT, BAR_HEIGHT, BAR_WIDTH, NAME_WIDTH = 40, 11, 420, 190


def balance_of(candidates: Sequence[Candidate], kept: Sequence[Candidate], table: ClassTable) -> dict[str, Any]:
    """Count pixels and pictures of each class at the three stages.

    Returns:
        `pictures` and `masks` (stage -> number), `classes`: name -> stage -> {pixels, share (of the labelled pixels),
        pictures (that show the class)}.
    """
    counts = {
        "painted": [one.before for one in candidates],
        "filtered": [one.after for one in candidates],
        "resampled": [one.after for one in kept],
    }
    classes: dict[str, Any] = {name: {} for name in table.names}
    for stage, rows in counts.items():
        pixels, pictures = np.sum(rows, axis=0), np.sum([row > 0 for row in rows], axis=0)
        for index, name in enumerate(table.names):
            share = round(float(pixels[index] / max(1, pixels.sum())), 6)
            classes[name][stage] = {"pixels": int(pixels[index]), "share": share, "pictures": int(pictures[index])}
    masks, masks_kept = ({one.mask for one in ones} for ones in (candidates, kept))
    return {
        "pictures": {"painted": len(candidates), "filtered": len(candidates), "resampled": len(kept)},
        "masks": {"painted": len(masks), "filtered": len(masks), "resampled": len(masks_kept)},
        "classes": classes,
    }


def describe_balance(summary: Mapping[str, Any]) -> str:
    """Markdown table of a balance: share of the labelled pixels, and pictures that show the class."""
    lines = ["| class | " + " | ".join(f"{stage}: share | pictures" for stage in STAGES) + " |",
             "|---|" + "---:|" * (2 * len(STAGES))]  # fmt: skip
    for name, row in summary["classes"].items():
        cells = " | ".join(f"{row[stage]['share']:.2%} | {row[stage]['pictures']}" for stage in STAGES)
        lines.append(f"| {name} | {cells} |")
    totals = " | ".join(f"| {summary['pictures'][stage]}" for stage in STAGES)
    return "\n".join(lines) + f"\n| all | {totals} |\n"


def draw_balance(summary: Mapping[str, Any], table: ClassTable) -> Image.Image:
    """Bars of the class shares at the three stages, one row a class, with the class's colour before its name."""
    legend = 22 * len(STAGES) + 14
    picture = Image.new("RGB", (NAME_WIDTH + BAR_WIDTH + 70, legend + ROW_HEIGHT * table.num_classes + 8), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    for place, (stage, text) in enumerate(STAGES.items()):
        top = 8 + 22 * place
        draw.rectangle((8, top, 22, top + 14), fill=BAR_COLOURS[stage])
        draw.text((30, top + 1), f"{text} ({summary['pictures'][stage]})", fill="black", font=font)
    longest = max(row[stage]["share"] for row in summary["classes"].values() for stage in STAGES) or 1
    for place, (name, colour) in enumerate(zip(table.names, table.colours, strict=True)):
        top = legend + ROW_HEIGHT * place
        draw.rectangle((8, top + 10, 22, top + 24), fill=colour, outline="black")
        draw.text((30, top + 11), name[:26], fill="black", font=font)
        for number, stage in enumerate(STAGES):
            share = summary["classes"][name][stage]["share"]
            left, upper = NAME_WIDTH, top + 1 + BAR_HEIGHT * number
            right = left + round(BAR_WIDTH * share / longest)
            draw.rectangle((left, upper, right, upper + BAR_HEIGHT - 2), fill=BAR_COLOURS[stage])
            draw.text((right + 5, upper - 2), f"{share:.1%}", fill="black", font=font)
    return picture
