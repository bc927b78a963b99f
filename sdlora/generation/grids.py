"""Labelled grids of images, and the loss curve. Pillow and matplotlib are imported on use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replacing

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont
    from PIL.Image import Image

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_LEGIBLE = 176  # px a cell needs beside labels of _TEXT px
_TEXT, _TITLE, _GAP, _MARGIN = 16, 20, 6, 12
_LABEL_WIDTH = 190
_FEW_POINTS = 60
_PAPER, _INK, _FRAME = "#ffffff", "#222222", "#dddddd"
_RAW, _SMOOTH, _HELD_OUT, _RATE = "#b9cfe4", "#1f5f99", "#d1495b", "#777777"


def grid(
    images: Sequence[Image],
    columns: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str | None = None,
) -> Image:
    """Return images laid out in rows, with legible labels.

    Small images are enlarged by a whole factor of at most 3; all cells are as large as the largest
    image. Long labels are wrapped, and shortened with an ellipsis if even that is not enough.

    Args:
        images: the images, row by row; the last row may be short.
        columns: images in a row.
        row_labels: none, or one for each row, shown at the left.
        column_labels: none, or one for each column, shown at the top.
        title: one line above everything.

    Raises:
        ValueError: if there is nothing to show, or the number of labels is wrong.
    """
    from PIL import Image as Pil
    from PIL import ImageDraw

    rows = math.ceil(len(images) / columns) if columns > 0 else 0
    if rows == 0:
        raise ValueError(f"a grid needs images and columns, not {len(images)} and {columns}")
    if len(row_labels) not in (0, rows) or len(column_labels) not in (0, columns):
        raise ValueError(
            f"{rows} x {columns} images, but {len(row_labels)} row and {len(column_labels)} column labels"
        )
    cells = _enlarged(images)
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    font, line = _font(_TEXT), _line_height(_TEXT)
    heads = [_wrap(text, font, width, 3) for text in column_labels]
    sides = [_wrap(text, font, _LABEL_WIDTH, height // line) for text in row_labels]

    left = _MARGIN + _widest(sides, font)
    page_width = left + columns * (width + _GAP) - _GAP + _MARGIN
    top = _MARGIN + (_line_height(_TITLE) + _GAP if title else 0)
    top += max((len(head) for head in heads), default=0) * line + (_GAP if heads else 0)
    page = Pil.new("RGB", (page_width, top + rows * (height + _GAP) - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        shown = _shorten(title, _font(_TITLE), page_width - 2 * _MARGIN)
        draw.text((_MARGIN, _MARGIN), shown, fill=_INK, font=_font(_TITLE))
    for column, head in enumerate(heads):
        _write_lines(
            draw, head, left + column * (width + _GAP) + width / 2, top - _GAP - len(head) * line, "ma"
        )
    for row, side in enumerate(sides):
        _write_lines(draw, side, _MARGIN, top + row * (height + _GAP) + (height - len(side) * line) / 2, "la")
    for i, cell in enumerate(cells):
        x, y = left + i % columns * (width + _GAP), top + i // columns * (height + _GAP)
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_FRAME)
        page.paste(cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
    return page


def side_by_side(images: Sequence[Image]) -> Image:
    """Return images of one size in a row without gaps, to be taken apart again.

    Raises:
        ValueError: if there are none.
    """
    from PIL import Image as Pil

    if not images:
        raise ValueError("a row needs images")
    width, height = images[0].size
    row = Pil.new("RGB", (width * len(images), height))
    for number, image in enumerate(images):
        row.paste(image, (number * width, 0))
    return row


def steps_by_prompts(rows: Mapping[int, Sequence[Image]], prompts: Sequence[str], file: Path) -> None:
    """Write a PNG of a run's previews: a row for each step, a column for each prompt.

    Args:
        rows: optimizer step -> its previews in the order of ``prompts``.
        prompts: what the columns show.
        file: where the PNG goes; an old one is replaced.

    Raises:
        OutputError: when the file cannot be written.
    """
    images = [image for step in sorted(rows) for image in rows[step]]
    sheet = grid(images, len(prompts), [f"step {step}" for step in sorted(rows)], prompts)
    with replacing(file) as temporary:
        sheet.save(temporary, format="PNG")


def loss_curve(
    points: Sequence[tuple[int, float, float]], validation: Sequence[tuple[int, float]], file: Path
) -> None:
    """Write a PNG of the loss, raw and smoothed, with held-out measurements, above the learning rate.

    The smooth line is an exponential mean over a twentieth of the run, corrected for its start (Kingma and Ba
    2015, section 3). The loss axis ends just above 99 % of the raw points.

    Args:
        points: (step, loss, learning rate) of every step, ascending.
        validation: (step, held-out loss), ascending; may be empty.
        file: where the PNG goes; an old one is replaced.

    Raises:
        OutputError: when the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.0, 5.0), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4.5, 1.0))
    steps, losses, rates = ([point[i] for point in points] for i in range(3))
    dots = "." if len(points) <= _FEW_POINTS else ""  # a single point would make no line
    upper.plot(steps, losses, color=_RAW, marker=dots, linewidth=0.9, label="training, every step")
    upper.plot(steps, _smooth(losses), color=_SMOOTH, linewidth=2.0, label="training, smoothed")
    if validation:
        upper.plot(
            [step for step, _ in validation],
            [loss for _, loss in validation],
            color=_HELD_OUT,
            marker="o",
            markersize=5,
            linewidth=1.2,
            label="held-out images",
        )
    upper.set_ylabel("loss")
    upper.set_ylim(0, _upper_limit(losses, [loss for _, loss in validation]))
    upper.legend(frameon=False, loc="upper right")
    lower.plot(steps, rates, color=_RATE, marker=dots, linewidth=1.4)
    lower.set_ylim(0, max(rates, default=1.0) * 1.15 or 1.0)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_xlim(0, 1.01 * max([*steps, *(step for step, _ in validation)], default=1))
    for axes in (upper, lower):
        _tidy(axes)
    figure.align_ylabels()
    with replacing(file) as temporary:
        figure.savefig(temporary)


@dataclass(frozen=True)
class Curve:
    """What is drawn of one run.

    Attributes:
        label: its name.
        losses: (step, loss), ascending.
        validation: (step, held-out loss), ascending; may be empty.
        rates: (step, learning rate), ascending.
    """

    label: str
    losses: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float]]
    rates: Sequence[tuple[int, float]]


def compare_curves(curves: Sequence[Curve], file: Path) -> None:
    """Write a PNG of several runs over each other: smoothed loss, held-out loss and learning rate.

    Args:
        curves: one a run.
        file: where the PNG goes; an old one is replaced.

    Raises:
        OutputError: when the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    held_out = any(curve.validation for curve in curves)
    figure = Figure(figsize=(9.0, 7.5 if held_out else 5.5), dpi=110, layout="constrained")
    rows = 3 if held_out else 2
    panels = list(figure.subplots(rows, 1, sharex=True, height_ratios=(3.0, 3.0, 1.0)[3 - rows :]))
    colours = colormaps["tab10"].resampled(10)
    for number, curve in enumerate(curves):
        look: dict[str, Any] = {"color": colours(number % 10), "label": curve.label}
        steps = [step for step, loss in curve.losses if math.isfinite(loss)]
        smooth = _smooth([loss for _, loss in curve.losses if math.isfinite(loss)])
        panels[0].plot(steps, smooth, linewidth=1.8, **look)
        if held_out:
            panels[1].plot(*_axes_of(curve.validation), linewidth=1.4, marker="o", markersize=4, **look)
        panels[-1].plot(*_axes_of(curve.rates), linewidth=1.4, **look)
    panels[0].set_ylabel("loss, smoothed")
    panels[0].legend(frameon=False, loc="upper right")
    if held_out:
        panels[1].set_ylabel("held-out loss")
    panels[-1].set_ylabel("learning rate")
    panels[-1].set_xlabel("step")
    panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        _tidy(axes)
    figure.align_ylabels()
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png")


def _axes_of(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _tidy(axes: Any) -> None:
    axes.grid(True, color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _smooth(values: Sequence[float]) -> list[float]:
    keep = 1.0 - 1.0 / max(1.0, len(values) / 20)
    smoothed: list[float] = []
    mean, weight = 0.0, 0.0
    for value in values:
        mean = keep * mean + (1.0 - keep) * value
        weight = keep * weight + (1.0 - keep)
        smoothed.append(mean / weight)
    return smoothed


def _upper_limit(losses: Sequence[float], validation: Sequence[float]) -> float:
    ordered = sorted(losses)
    almost_all = ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0
    return 1.12 * max([almost_all, *validation]) or 1.0


def _enlarged(images: Sequence[Image]) -> list[Image]:
    from PIL import Image as Pil

    largest = max(max(image.size) for image in images)
    factor = min(3, max(1, math.ceil(_LEGIBLE / largest)))
    converted = [image.convert("RGB") for image in images]
    if factor == 1:
        return converted
    return [
        image.resize((image.width * factor, image.height * factor), Pil.Resampling.LANCZOS)
        for image in converted
    ]


def _write_lines(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: float, y: float, anchor: str) -> None:
    for i, text in enumerate(lines):
        draw.text((x, y + i * _line_height(_TEXT)), text, fill=_INK, font=_font(_TEXT), anchor=anchor)


def _font(size: int) -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _line_height(size: int) -> int:
    return math.ceil(size * 1.3)


def _widest(labels: Sequence[Sequence[str]], font: Font) -> int:
    widths = [font.getlength(text) for lines in labels for text in lines]
    return math.ceil(max(widths)) + 2 * _GAP if widths else 0


def _wrap(text: str, font: Font, width: int, most_lines: int) -> list[str]:
    """Break a text at spaces into at most ``most_lines`` lines of ``width`` px, shortened where needed."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    most_lines = max(1, most_lines)
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], " ".join(lines[most_lines - 1 :])]
    return [_shorten(line, font, width) for line in lines]


def _shorten(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
