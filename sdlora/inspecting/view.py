"""An adapter's summary as text for a terminal, and its norms by block as an image."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapters.kinds.table import KINDS
from ..errors import OutputError, shown
from ..families.facts import is_text_encoder
from ..files import refuse_bad_names, replacing, size_text
from ..formats.clients import Support
from ..formats.table import FORMATS
from .inspection import AdapterSummary

_BAR = 32
_COLOURS = ("cyan", "magenta", "yellow", "green")
_CHART_COLOURS = ("#1f77b4", "#d62728", "#ff7f0e", "#2ca02c")
"""For the denoiser, and for the text encoders by number."""


def render(summary: AdapterSummary, *, width: int = 140, colour: bool = False, plain: bool = False) -> str:
    """Return a summary as text.

    Args:
        summary: what was found out.
        width: columns of the terminal; longer lines are folded.
        colour: mark the bars of the components with colours.
        plain: draw bars of ``#`` instead of block characters, for terminals that lack these.
    """
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=max(width, 60),
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        legacy_windows=False,
    )
    console.print(_table([(label, shown(text, 200)) for label, text in _fields(summary)]))
    if summary.settings:
        console.print("\ntraining")
        console.print(_table([(k, _short(v)) for k, v in summary.settings.items()], indent=2))
    if summary.has_values:
        console.print("\nsize of the update by block (Frobenius norm)")
        console.print(_bars(summary, plain=plain))
    console.print("\nloads fully in")
    console.print(_table([(support.client, _verdict(support)) for support in summary.clients], indent=2))
    if not summary.has_values:
        console.print("\nheader entries")
        rows = [(shown(key, 60), shown(text, 300)) for key, text in sorted(summary.entries.items())]
        console.print(_table(rows or [("none", "")], indent=2))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def draw_norms(summary: AdapterSummary, image: Path) -> None:
    """Draw the size of the updates by block as bars into a new PNG, atomically.

    Raises:
        OutputError: when the image exists, or cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    refuse_bad_names(image)
    if image.suffix.lower() != ".png":
        raise OutputError(f"{image}: the chart is a PNG; give --chart a name ending in .png")
    if image.exists():
        raise OutputError(f"{image}: exists; nothing was overwritten. Choose another name after --chart")
    blocks = summary.blocks
    figure = Figure(figsize=(9, min(60.0, 1.6 + 0.26 * len(blocks))), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for component in dict.fromkeys(block.component for block in blocks):
        rows = [i for i, block in enumerate(blocks) if block.component == component]
        colour = _CHART_COLOURS[_number(component)]
        axis.barh(rows, [blocks[i].norm for i in rows], color=colour, label=component)
    axis.set_yticks(
        range(len(blocks)), [f"{block.block} ({block.num_modules})" for block in blocks], fontsize=7
    )
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlabel("Frobenius norm of the updates (layers in brackets)", fontsize=8)
    rank, alpha = _counts(summary.ranks), _counts({f"{a:g}": n for a, n in summary.alphas.items()})
    title = f"{shown(summary.name, 60)}: {summary.family or 'unknown family'}, rank {rank}, alpha {alpha}"
    figure.suptitle(shown(title, 120), fontsize=9, parse_math=False)
    axis.legend(fontsize=8)
    with replacing(image) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _fields(summary: AdapterSummary) -> list[tuple[str, str]]:
    layers = ", ".join(f"{count} in {component}" for component, count in summary.modules.items())
    hash_note = {True: "", False: " (the header says another!)", None: ""}[summary.hash_matches]
    if not summary.has_values and summary.model_hash:
        hash_note = " (by the header)"
    title = FORMATS[summary.format].title
    return [
        ("file", f"{summary.path} ({_size(summary.num_bytes)})"),
        ("format", f"{title}, {summary.num_keys} tensors, {_counts(summary.dtypes)}"),
        ("family", summary.family or "not stated in the file"),
        ("name", summary.name),
        ("base", summary.base or "not stated in the file"),
        ("kind", _counts({KINDS[kind].title: count for kind, count in summary.kinds.items()})),
        ("layers", layers),
        ("rank", _counts(summary.ranks)),
        ("alpha", _counts({f"{alpha:g}": count for alpha, count in summary.alphas.items()})),
        ("trigger words", ", ".join(summary.trigger_words) or "none recorded"),
        ("tags", ", ".join(f"{tag} ({count})" for tag, count in summary.tags[:8]) or "none recorded"),
        ("hash", f"{summary.model_hash[:12] or 'not stated in the file'}{hash_note}"),
    ]


def _bars(summary: AdapterSummary, *, plain: bool) -> Table:
    norms = [block.norm for block in summary.blocks if math.isfinite(block.norm)]
    largest = max(norms, default=0.0) or 1.0  # values near a number format's end have no finite norm
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=0)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(width=_BAR)
    table.add_column(no_wrap=True)
    for block_norm in summary.blocks:
        size = block_norm.norm if math.isfinite(block_norm.norm) else largest
        colour = _COLOURS[_number(block_norm.component)]
        bar: Bar | Text = Bar(largest, 0, size, width=_BAR, color=colour)
        if plain:
            bar = Text("#" * max(1 if size > 0 else 0, round(_BAR * size / largest)))
        label = Text(f"{block_norm.component} {shown(block_norm.block, 60)}")
        layers = f"{block_norm.num_modules} layer{'' if block_norm.num_modules == 1 else 's'}"
        table.add_row(Text(""), label, Text(f"{block_norm.norm:.4g}"), bar, Text(layers))
    return table


def _table(rows: Iterable[tuple[str, str]], indent: int = 0) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(" " * indent + label), Text(text))
    return table


def _short(value: str) -> str:
    """Return a header value in a form fit for a table: long decimal fractions are rounded."""
    if not re.fullmatch(r"-?\d+\.\d{6,17}", value):
        return shown(value, 120)
    return f"{float(value):.5g}"


def _counts(counts: Mapping[str, int] | Mapping[int, int]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count}x)" for value, count in counts.items())


def _verdict(support: Support) -> str:
    verdict = "yes" if support.full else "no: " + "; ".join(support.reasons)
    return f"{verdict}; {support.hint}" if support.hint else verdict


def _size(num_bytes: int) -> str:
    return size_text(num_bytes, 1) if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def _number(component: str) -> int:
    """Return 0 for a denoiser, and its number for a text encoder."""
    if not is_text_encoder(component):
        return 0
    return min(int(component.rpartition("_")[2]) if component[-1].isdigit() else 1, len(_COLOURS) - 1)
