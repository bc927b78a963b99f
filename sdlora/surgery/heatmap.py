"""A comparison of two adapters as an image: one cell for each block and kind of layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..adapters.canonical import ModuleKey
from ..families.facts import component_order, is_text_encoder
from ..files import replacing
from .similarity import Likeness, grouped
from .strengths import block_of

_CELL_INCHES = 0.34
_LONGEST_SIDE_INCHES = 60.0
_MOST_DOUBLINGS = 3.0


def draw_heatmap(modules: Mapping[ModuleKey, Likeness], names: tuple[str, str], file: Path) -> None:
    """Draw cosine and ratio of norms for each block (rows) and kind of layer (columns), atomically.

    Cells without a layer, or where one adapter has none, stay grey.

    Args:
        modules: the comparison by module.
        names: of the two adapters, for the titles.
        file: the PNG.

    Raises:
        OutputError: when it cannot be written.
    """
    cells = grouped(modules, lambda module: (_row(module), kind_of(module)))
    order = sorted(modules, key=_flow_order)
    rows = list(dict.fromkeys(_row(module) for module in order))
    columns = list(dict.fromkeys(kind_of(module) for module in order))
    cosines, ratios = (numpy.full((len(rows), len(columns)), numpy.nan) for _ in range(2))
    for (row, column), likeness in cells.items():
        if likeness.cosine is not None:
            at = rows.index(row), columns.index(column)
            cosines[at] = likeness.cosine
            ratios[at] = math.log2(likeness.other_norm / likeness.norm)
    width = min(_LONGEST_SIDE_INCHES, 5 + 2 * _CELL_INCHES * len(columns))
    height = min(_LONGEST_SIDE_INCHES, 2.5 + _CELL_INCHES * len(rows))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"A = {names[0]}\nB = {names[1]}", fontsize=9, parse_math=False)
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        ("cosine of A and B", cosines, "RdBu_r", 1.0),
        ("log2 of |B| / |A|", ratios, "PuOr_r", _MOST_DOUBLINGS),
    )
    for axis, (title, values, colours, limit) in zip(axes, panels, strict=True):
        axis.set_facecolor("0.85")
        image = axis.imshow(values, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        figure.colorbar(image, ax=axis, shrink=0.6)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def kind_of(module: ModuleKey) -> str:
    """Return what sort of layer a module is, the same in all blocks: ``attn1.to_q``, ``conv1``."""
    inside = re.sub(
        r"^(?:text_model\.)?.*?(?:layers|resnets|attentions|upsamplers|downsamplers)\.\d+\.", "", module.path
    )
    inside = re.sub(r"^transformer_blocks\.\d+\.", "", inside)
    return inside.removesuffix(".0")


def _row(module: ModuleKey) -> str:
    block = block_of(module)
    return block.replace("text_encoder", "te", 1) if is_text_encoder(module.component) else block


def _flow_order(module: ModuleKey) -> tuple[tuple[bool, str], int, list[tuple[int, str]]]:
    """Order modules as data flows, in, down, middle, up, out, and the text encoders after the U-Net."""
    root = module.path.split(".", 1)[0]
    place = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3, "conv_norm_out": 4, "conv_out": 5}.get(root, 0)
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in module.path.split(".")]
    return component_order(module.component), place, parts
