"""Class balance of synthesized images before and after filtering and resampling: numbers, table and image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm.cli import markdown_table
from ldm.data.classes import ClassTable
from post_processing.selection.choice import Candidate

STAGES = {"painted": "all images, masks as generated", "filtered": "all images, filtered masks",
          "resampled": "chosen images, filtered masks"}  # fmt: skip
BAR_COLOURS = {"painted": "silver", "filtered": "#78a0d2", "resampled": "#1e5aaa"}


def balance_of(candidates: Sequence[Candidate], kept: Sequence[Candidate], table: ClassTable) -> dict[str, Any]:
    """Count pixels and images of each class at the three stages.

    Returns:
        `images` and `masks` (stage -> number), `classes`: name -> stage -> {pixels, share (of the labelled pixels),
        images (that show the class)}.
    """
    counts = {
        "painted": [one.before for one in candidates],
        "filtered": [one.after for one in candidates],
        "resampled": [one.after for one in kept],
    }
    classes: dict[str, Any] = {name: {} for name in table.names}
    for stage, rows in counts.items():
        pixels, images = np.sum(rows, axis=0), np.sum([row > 0 for row in rows], axis=0)
        for index, name in enumerate(table.names):
            share = round(float(pixels[index] / max(1, pixels.sum())), 6)
            classes[name][stage] = {"pixels": int(pixels[index]), "share": share, "pictures": int(images[index])}
    masks, masks_kept = ({one.mask for one in ones} for ones in (candidates, kept))
    return {
        "pictures": {"painted": len(candidates), "filtered": len(candidates), "resampled": len(kept)},
        "masks": {"painted": len(masks), "filtered": len(masks), "resampled": len(masks_kept)},
        "classes": classes,
    }


def describe_balance(summary: Mapping[str, Any]) -> str:
    """Markdown table of a balance: share of the labelled pixels, and images that show the class."""
    rows = [[name, *(cell for stage in STAGES for cell in (f"{row[stage]['share']:.2%}", row[stage]["pictures"]))]
            for name, row in summary["classes"].items()]  # fmt: skip
    rows.append(["all", *(cell for stage in STAGES for cell in ("", summary["pictures"][stage]))])
    return markdown_table(["class", *(head for stage in STAGES for head in (f"{stage}: share", "images"))], rows)


def draw_balance(summary: Mapping[str, Any], table: ClassTable) -> Image.Image:
    """Bars of the class shares at the three stages, a group of bars a class, its name in the class's colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.5 + 0.5 * table.num_classes), layout="constrained")
    axes = figure.add_subplot(xlabel="share of the labelled pixels")
    places = np.arange(table.num_classes)
    for number, (stage, text) in enumerate(STAGES.items()):
        shares = [summary["classes"][name][stage]["share"] for name in table.names]
        bars = axes.barh(places + 0.27 * number, shares, 0.25, color=BAR_COLOURS[stage],
                         label=f"{text} ({summary['pictures'][stage]})")  # fmt: skip
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=7)
    axes.set_yticks(places + 0.27, table.names)
    for label, colour in zip(axes.get_yticklabels(), table.colours, strict=True):
        label.set_bbox({"facecolor": np.array(colour) / 255, "alpha": 0.4, "linewidth": 0})
    axes.invert_yaxis()
    axes.margins(x=0.12)
    figure.legend(loc="outside upper left", frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
