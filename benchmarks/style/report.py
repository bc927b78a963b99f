"""What was found, as text, JSON and images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdlora.demonstration.demo import SHOWN
from sdlora.files import replacing, write_json, write_text
from sdlora.generation.grids import grid

from .compare import BASE, Comparison, Row
from .measure import MEASURES, Interval, Measured

if TYPE_CHECKING:
    from PIL.Image import Image

_PERCENT = ("named", "named_in_five", "closer", "copied")
_TABLE = ("style", "named", "closer", "likeness", "nearest", "copied")
_COMPARED = ("style", "named", "closer", "likeness", "nearest")
_COLUMNS = 10
_COLOURS = ("#1f5f99", "#d1495b", "#3a8f5c", "#8c6bb1", "#c98a1b", "#555555")


def write_report(comparison: Comparison, folder: Path) -> str:
    """Write ``report.md``, ``report.json`` and the images; return the text."""
    text = "\n\n".join(sections(comparison)) + "\n"
    write_text(folder / "report.md", text)
    write_json(folder / "report.json", to_json(comparison))
    _save(sheet(comparison), folder / "images.png")
    chart(comparison, folder / "chart.png")
    if any(len(row.strengths) > 1 for row in comparison.rows):
        sweep(comparison, folder / "sweep.png")
    if comparison.rows:
        _save(nearest(comparison.rows[0], comparison), folder / "nearest.png")
    return text


def sections(comparison: Comparison) -> Iterator[str]:
    """Yield the report's parts: what it is, the table, differences, strengths, notes."""
    facts = comparison.facts
    yield f"# Style benchmark: {comparison.style.name} on {comparison.base}"
    yield (
        f"{len(comparison.items)} held-out subjects, one image each, {facts['drawing_steps']} steps at "
        f"guidance {facts['guidance']:g}. In brackets: 90 % bootstrap intervals over the subjects. What the "
        "columns mean: benchmarks/style/README.md."
    )
    if not comparison.yardstick.measurable:
        yield (
            "STYLE NOT MEASURABLE: the base draws nearly in this style, so the unit of the style score "
            "is mostly chance; the other columns hold."
        )
    yield main_table(comparison)
    if len(comparison.rows) > 1:
        yield differences(comparison)
    if any(len(row.strengths) > 1 for row in comparison.rows):
        yield strengths(comparison)
    flagged = [row.entry.name for row in comparison.rows if row.measured.flagged]
    if flagged:
        yield f"COPYING: {', '.join(flagged)}: more images repeat training images than chance explains."
    if "named" not in comparison.true.draws:
        yield "Subject kept was not measured: there was no judge (--no-icons)."


def main_table(comparison: Comparison) -> str:
    """Return the entries at strength 1 between the references, as Markdown."""
    heads = ["", "steps", "wall s", *(MEASURES[name] for name in _TABLE)]
    lines = [_line(heads), _line(["---"] * len(heads))]
    ceiling = comparison.yardstick.ceiling()
    lines.append(_line(["true images", "", "", *_cells(comparison.true, ceiling, reference=True)]))
    for row in comparison.rows:
        entry = row.entry
        seconds = "" if entry.seconds is None else f"{entry.seconds:.0f}"
        steps = "" if entry.steps is None else str(entry.steps)
        at = "" if abs(row.shown - 1) < 1e-9 else f" at {row.shown:g}"
        lines.append(_line([f"**{entry.name}**{at}", steps, seconds, *_cells(row.measured)]))
    for name, (_, measured) in comparison.references.items():
        lines.append(_line([name, "", "", *_cells(measured)]))
    notes = [f"- {row.entry.name}: {row.entry.settings}" for row in comparison.rows if row.entry.settings]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def differences(comparison: Comparison) -> str:
    """Return how far the first entry is above each other one, subject by subject."""
    first = comparison.rows[0]
    heads = [f"{first.entry.name} above", *(MEASURES[name] for name in _COMPARED)]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in comparison.rows[1:]:
        intervals = [first.measured.difference(row.measured, name) for name in _COMPARED]
        shown = [
            _shown(interval, name, signed=True) for interval, name in zip(intervals, _COMPARED, strict=True)
        ]
        lines.append(_line([row.entry.name, *shown]))
    return "\n".join(["Differences, same subjects and seeds:", "", *lines])


def strengths(comparison: Comparison) -> str:
    """Return style and subject by strength; the recommended strength is marked."""
    values = sorted({strength for row in comparison.rows for strength in row.strengths})
    heads = ["style / subject named, by strength", *(f"{value:g}" for value in values), "recommended"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in comparison.rows:
        if row.recommended is None:
            continue
        cells = [_style_and_subject(row.strengths.get(value)) for value in values]
        cells = [
            f"**{cell}**" if value == row.recommended else cell
            for value, cell in zip(values, cells, strict=True)
        ]
        lines.append(_line([row.entry.name, *cells, f"{row.recommended:g}"]))
    return "\n".join(lines)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "style": comparison.style.name,
        "base": comparison.base,
        **comparison.facts,
        "style_measurable": comparison.yardstick.measurable,
        "copying_bar": round(comparison.yardstick.bar, 4),
        "ceiling": comparison.yardstick.ceiling().to_dict(),
        "true": _measures(comparison.true),
        "references": {name: _measures(measured) for name, (_, measured) in comparison.references.items()},
        "entries": [_entry(row) for row in comparison.rows],
    }


def _entry(row: Row) -> dict[str, Any]:
    entry = row.entry
    return {
        "name": entry.name,
        "adapter": None if entry.adapter is None else str(entry.adapter),
        "images": None if entry.images is None else str(entry.images),
        "steps": entry.steps,
        "seconds": None if entry.seconds is None else round(entry.seconds, 1),
        "settings": entry.settings,
        "recommended_strength": row.recommended,
        "flagged_as_copying": row.measured.flagged,
        "strengths": {f"{strength:g}": _measures(measured) for strength, measured in row.strengths.items()},
    }


def _measures(measured: Measured) -> dict[str, Any]:
    figures = {name: measured.figure(name) for name in MEASURES}
    values: dict[str, Any] = {
        name: figure.to_dict() for name, figure in figures.items() if figure is not None
    }
    values["style_groups"] = {name: round(value, 4) for name, value in measured.style.groups.items()}
    return values


def _cells(measured: Measured, style: Interval | None = None, reference: bool = False) -> list[str]:
    """Return the cells of a row; ``reference``: of the true images, which are near to themselves anyway."""
    cells = []
    for name in _TABLE:
        figure = style if name == "style" and style is not None else measured.figure(name)
        cells.append("" if reference and name in ("closer", "likeness") else _shown(figure, name))
    return cells


def _shown(figure: Interval | None, name: str, signed: bool = False) -> str:
    if figure is None:
        return "not measured"
    sign = "+" if signed else ""
    if name in _PERCENT:
        value, low, high = (
            f"{100 * value_of:{sign}.0f}" for value_of in (figure.value, figure.low, figure.high)
        )
        return f"{value} % ({low}..{high})"
    return f"{figure.value:{sign}.2f} ({figure.low:{sign}.2f}..{figure.high:{sign}.2f})"


def _style_and_subject(measured: Measured | None) -> str:
    if measured is None:
        return ""
    subject = measured.figure("named")
    return f"{measured.style.value:.2f} / " + ("?" if subject is None else f"{100 * subject.value:.0f} %")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- images ----------------------------------------------------------------------------------------------


def sheet(comparison: Comparison) -> Image:
    """Return a sheet of some subjects: base, every entry, true."""
    names = [item.path.stem for item in comparison.items]
    chosen = [i for i, name in enumerate(names) if name in SHOWN]
    if len(chosen) < min(4, len(names)):
        count = min(_COLUMNS, len(names))
        chosen = [i * len(names) // count for i in range(count)]
    rows: list[tuple[str, Sequence[Image]]] = [(BASE, comparison.references[BASE][0])]
    for row in comparison.rows:
        rows.append((f"{row.entry.name}, strength {row.shown:g}", row.images[row.shown]))
    rows.append(("true", comparison.yardstick.true))
    images = [images[i] for _, images in rows for i in chosen]
    columns = [names[i].replace("-", " ") for i in chosen]
    title = f"{comparison.style.name}: held-out subjects"
    return grid(images, len(chosen), [label for label, _ in rows], columns, title)


def nearest(row: Row, comparison: Comparison) -> Image:
    """Return the images of an entry that come closest to a training image, with that one below."""
    measured, images = row.measured, row.images[row.shown]
    likenesses = measured.per_subject["nearest"]
    order = np.argsort(-likenesses, kind="stable")[:_COLUMNS].tolist()
    above = [images[i] for i in order]
    below = [comparison.yardstick.training[measured.closest[i]] for i in order]
    names = [comparison.items[i].path.stem.replace("-", " ") for i in order]
    heads = [f"{name} {likenesses[i]:.2f}" for i, name in zip(order, names, strict=True)]
    title = f"{row.entry.name}: nearest to training images; bar {comparison.yardstick.bar:.2f}"
    return grid([*above, *below], len(order), ["drawn", "nearest training image"], heads, title)


def chart(comparison: Comparison, file: Path) -> None:
    """Write a PNG with every measure of every entry and reference, with its interval."""
    from matplotlib.figure import Figure

    sets: list[tuple[str, Measured, str]] = [
        (row.entry.name, row.measured, _COLOURS[i % len(_COLOURS)]) for i, row in enumerate(comparison.rows)
    ]
    sets += [(name, measured, "#b9b9b9") for name, (_, measured) in comparison.references.items()]
    sets.insert(0, ("true images", comparison.true, "#222222"))
    figure = Figure(figsize=(13, 1.2 + 0.32 * len(sets)), dpi=110, layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for panel, name in zip(panels, ("style", "named", "closer", "copied"), strict=True):
        for place, (_, measured, colour) in enumerate(sets):
            interval = measured.figure(name)
            if place == 0 and name == "style":
                interval = comparison.yardstick.ceiling()
            if interval is None or (place == 0 and name == "closer"):
                continue
            spread = [[max(interval.value - interval.low, 0)], [max(interval.high - interval.value, 0)]]
            panel.errorbar(interval.value, place, xerr=spread, fmt="o", color=colour, capsize=3)
        panel.set_title(MEASURES[name], fontsize=10)
        panel.set_yticks(range(len(sets)), [label for label, _, _ in sets], fontsize=9)
        panel.grid(True, axis="x", color="#eeeeee")
        panel.set_axisbelow(True)
        panel.set_xlim((-1, 1.1) if name == "style" else (-0.03, 1.03))
    panels[0].invert_yaxis()
    figure.suptitle(f"{comparison.style.name}: {len(comparison.items)} held-out subjects, 90 % intervals")
    with replacing(file) as temporary:
        figure.savefig(temporary)


def sweep(comparison: Comparison, file: Path) -> None:
    """Write a PNG of style and subject by strength; the ring marks the recommended strength."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = [row for row in comparison.rows if row.recommended is not None]
    for i, row in enumerate(drawn):
        colour = _COLOURS[i % len(_COLOURS)]
        for panel, name in ((left, "style"), (right, "named")):
            base = comparison.references[BASE][1].figure(name)
            points = {s: measured.figure(name) for s, measured in sorted(row.strengths.items())}
            known = {s: interval for s, interval in {0.0: base, **points}.items() if interval is not None}
            if not known:
                continue
            values = [interval.value for interval in known.values()]
            panel.plot(list(known), values, color=colour, marker="o", markersize=4, label=row.entry.name)
            low, high = (
                [interval.low for interval in known.values()],
                [interval.high for interval in known.values()],
            )
            panel.fill_between(list(known), low, high, color=colour, alpha=0.12, linewidth=0)
            if row.recommended in known:
                ring = known[row.recommended].value
                panel.plot(row.recommended, ring, "o", markersize=11, markerfacecolor="none", color=colour)
    for panel, title in ((left, "style (0 base, 1 true)"), (right, "subject named")):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("strength")
        panel.grid(True, color="#eeeeee")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(f"{comparison.style.name}: by strength; rings: recommended")
    with replacing(file) as temporary:
        figure.savefig(temporary)


def _save(sheet: Image, file: Path) -> None:
    with replacing(file) as temporary:
        sheet.save(temporary, format="PNG")
