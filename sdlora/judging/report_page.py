"""The page that says which step and strength are best: one self-contained HTML file, without scripts.

All images are data URLs; a cell of the grid fills the window while it is the page's target (``#cell-3``).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ..events import Estimate
from ..files import write_text
from .verdict import Cell, Verdict, best_by_step

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_SIDE = 192  # px of an image in the page; the full ones are files
_COLUMNS = 4


@dataclass(frozen=True)
class Series:
    """One curve: (step, value with its interval); a line says what 0 means where it is in sight."""

    title: str
    about: str
    points: Sequence[tuple[int, Estimate]]


@dataclass(frozen=True)
class Report:
    """What the page shows.

    Attributes:
        title: headline.
        verdict: what was found.
        prompts: of the panel, those without the trigger word last.
        images: (source, strength) -> the panel's images; the base's under ``("base", 0)``.
        training: some of the training images.
        curves: drawn above the grid.
        facts: (value, what it is), in large type.
        settings: (name, value).
        commands: (what it does, command line).
    """

    title: str
    verdict: Verdict
    prompts: Sequence[str]
    images: Mapping[tuple[str, float], Sequence[Image]]
    training: Sequence[Image]
    curves: Sequence[Series] = ()
    facts: Sequence[tuple[str, str]] = ()
    settings: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()


def write_report_page(report: Report, file: Path) -> None:
    """Write the page as one HTML file.

    Raises:
        OutputError: when the file cannot be written.
    """
    verdict = report.verdict
    write_text(
        file,
        _PAGE.substitute(
            style=_STYLE,
            title=escape(report.title),
            lead=escape(verdict.reason[0].upper() + verdict.reason[1:] + "."),
            facts="".join(f"<div><b>{escape(v)}</b><span>{escape(n)}</span></div>" for v, n in report.facts),
            notes=_notes(verdict),
            curves="".join(map(_chart, report.curves)),
            grid=_grid(report),
            prompts="".join(f"<li>{escape(prompt)}</li>" for prompt in report.prompts),
            table=_table(verdict),
            settings="".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in report.settings),
            commands="".join(
                f"<dt>{escape(n)}</dt><dd><code>{escape(v)}</code></dd>" for n, v in report.commands
            ),
        ),
    )


def score_curve(verdict: Verdict) -> Series | None:
    """Return the score of each step at its best strength; None for adapters that are not steps of one run."""
    tops = best_by_step(verdict.cells)
    if len(tops) < 2 or len({cell.source for cell in tops}) < len(tops):
        return None
    about = "style moved times subject kept, each step at its best strength; 90 % interval over the prompts"
    return Series("Score", about, [(cell.step or 0, cell.score) for cell in tops])


def _notes(verdict: Verdict) -> str:
    if not verdict.notes:
        return ""
    items = "".join(f"<li>{escape(note[0].upper() + note[1:])}.</li>" for note in verdict.notes)
    return f'<section class="warn"><h2>To be kept in mind</h2><ul>{items}</ul></section>'


def _grid(report: Report) -> str:
    """Return the table of all cells: a row for each adapter, a column for each strength."""
    verdict = report.verdict
    strengths = sorted({cell.strength for cell in verdict.cells})
    sources = list(dict.fromkeys(cell.source for cell in verdict.cells))
    cells = {(cell.source, cell.strength): cell for cell in verdict.cells}
    heads = "".join(f'<th scope="col">{value:g}</th>' for value in strengths)
    rows, number = [], 0
    for source in sources:
        row = ""
        for strength in strengths:
            cell = cells.get((source, strength))
            if cell is None:
                row += "<td></td>"
                continue
            number += 1
            row += _cell(report, cell, number)
        rows.append(f'<tr><th scope="row">{escape(source)}</th>{row}</tr>')
    references = ""
    for name, images in (
        ("the base alone", report.images.get(("base", 0.0), ())),
        ("trained on", report.training),
    ):
        if images:
            number += 1
            references += (
                f'<tr><th scope="row">{name}</th><td colspan="2">{_shown(images, name, number)}</td></tr>'
            )
    return (
        f'<table class="cells"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'<table class="cells">{references}</table>'
    )


def _cell(report: Report, cell: Cell, number: int) -> str:
    best = cell is report.verdict.best or (cell.source, cell.strength) == (
        report.verdict.best.source,
        report.verdict.best.strength,
    )
    images = report.images.get((cell.source, cell.strength), ())
    shown = _shown(images, cell.name, number) if images else ""
    return (
        f'<td class="{"best" if best else ""}">{shown}<span>{cell.score.mean:.2f}'
        f"<small> {cell.score.low:.2f}&ndash;{cell.score.high:.2f}</small></span></td>"
    )


def _shown(images: Sequence[Image], name: str, number: int) -> str:
    return (
        f'<a class="cell" id="cell-{number}" href="#cell-{number}" title="{escape(name)}: click for large">'
        f'<img src="{_data_url(_montage(images))}" alt="{escape(name)}" loading="lazy"></a>'
        '<a class="close" href="#grid" aria-label="close">&times;</a>'
    )


def _montage(images: Sequence[Image]) -> Image:
    from PIL import Image as Pil

    small = []
    for image in images:
        copy = image.convert("RGB")
        copy.thumbnail((_MOST_SIDE, _MOST_SIDE))
        small.append(copy)
    columns = min(_COLUMNS, len(small))
    width, height = max(image.width for image in small), max(image.height for image in small)
    page = Pil.new("RGB", (columns * width, math.ceil(len(small) / columns) * height), "white")
    for number, image in enumerate(small):
        page.paste(image, (number % columns * width, number // columns * height))
    return page


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _table(verdict: Verdict) -> str:
    rows = []
    for cell in sorted(verdict.cells, key=lambda cell: -cell.score.mean):
        marks = {id(verdict.best): "best"} | (
            {id(verdict.runner_up): "runner-up"} if verdict.runner_up else {}
        )
        kept = "" if cell.kept is None else _span(cell.kept)
        drift = "" if cell.drift is None else f"{cell.drift:.0%}"
        values = (cell.source, f"{cell.strength:g}", _span(cell.score), _span(cell.style), kept, drift)
        mark = marks.get(id(cell), "")
        columns = "".join(f"<td>{escape(value)}</td>" for value in (*values, mark))
        rows.append(f'<tr class="{mark}">{columns}</tr>')
    heads = ("adapter", "strength", "score", "style", "subject kept", "drift without trigger", "")
    titles = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return f'<table class="scores"><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _span(value: Estimate) -> str:
    return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"


_WIDE, _HIGH, _LEFT, _TOP, _BOTTOM = 520.0, 230.0, 58.0, 14.0, 30.0


def _chart(series: Series) -> str:
    """Return an SVG of a curve with its intervals."""
    if not series.points:
        return ""
    steps = [step for step, _ in series.points]
    least = min(0.0, *(value.low for _, value in series.points))
    most = max(0.0, *(value.high for _, value in series.points))
    span, last = (most - least) or 1.0, max(steps) or 1

    def x(step: float) -> float:
        return _LEFT + (_WIDE - _LEFT - 16) * step / last

    def y(value: float) -> float:
        return _TOP + (_HIGH - _TOP - _BOTTOM) * (most - value) / span

    marks = sorted({least, 0.0, (least + most) / 2, most})
    lines = [
        f'<line class="{"zero" if v == 0 else "rule"}" x1="{_LEFT}" x2="{_WIDE - 12}" '
        f'y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>'
        for v in marks
        if v == 0 or abs(v) > 0.04 * span
    ]
    lines += [
        f'<text x="{x(step):.1f}" y="{_HIGH - 10}" text-anchor="middle">{step}</text>'
        for step in sorted({0, round(last / 2), last})
    ]
    band = [f"{x(s):.1f},{y(v.high):.1f}" for s, v in series.points]
    band += [f"{x(s):.1f},{y(v.low):.1f}" for s, v in reversed(series.points)]
    points = " ".join(f"{x(s):.1f},{y(v.mean):.1f}" for s, v in series.points)
    dots = "".join(
        f'<circle cx="{x(s):.1f}" cy="{y(v.mean):.1f}" r="4"><title>step {s}: {v.mean:.4g} ({v.low:.4g} to '
        f"{v.high:.4g})</title></circle>"
        for s, v in series.points
    )
    return (
        f'<figure><h3>{escape(series.title)}</h3><svg viewBox="0 0 {_WIDE:g} {_HIGH:g}" role="img" '
        f'aria-label="{escape(series.title)} by step">{"".join(lines)}<polygon points="{" ".join(band)}"/>'
        f'<polyline points="{points}"/>{dots}</svg><figcaption>{escape(series.about)}</figcaption></figure>'
    )


_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1c1b1a;--soft:#6d6a66;--line:#e5e1db;
--accent:#c2410c;--tint:#c2410c22;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){:root{--paper:#161514;--card:#211f1d;--ink:#f1eeea;--soft:#a8a29b;
--line:#383430;--accent:#fb923c;--tint:#fb923c2b}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink)}
main{max-width:1180px;margin:0 auto;padding:36px 20px 64px}
h1{font-size:1.9rem;line-height:1.15;margin:0 0 8px;letter-spacing:-.02em}
h2{font-size:1.2rem;margin:0 0 6px}h3{font-size:1rem;margin:0 0 4px}
p{margin:0 0 12px;max-width:90ch}.lead{font-size:1.05rem;color:var(--soft);margin-bottom:22px}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px;margin:0 0 18px}
.warn{border-color:var(--accent);background:var(--tint)}ul,ol{margin:0;padding-left:1.3em}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:18px}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px}
.facts b{display:block;font-size:1.5rem;line-height:1.2}
.facts span,.sub,figcaption{color:var(--soft);font-size:.88rem}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:20px}figure{margin:0}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}svg .rule{stroke:var(--line)}
svg .zero{stroke:var(--soft)}polygon{fill:var(--accent);opacity:.16}
polyline{fill:none;stroke:var(--accent);stroke-width:2.5}
circle{fill:var(--card);stroke:var(--accent);stroke-width:2.5}
.scroll{overflow-x:auto}table{border-collapse:separate;border-spacing:6px}
th{font-weight:500;font-size:.88rem;color:var(--soft);white-space:nowrap;text-align:left}
.cells td{min-width:170px;max-width:230px;vertical-align:top;font-size:.88rem;padding:4px;border-radius:10px;
border:2px solid transparent}.cells td.best{border-color:var(--accent);background:var(--tint)}
.cells span{display:block;text-align:center;font-weight:600}.cells small{font-weight:400;color:var(--soft)}
.cells thead th{text-align:center}img{display:block;width:100%;border-radius:6px;background:#fff}
.cell{display:block;cursor:zoom-in}.close{display:none}
.cell:target{cursor:default}.cell:target::before{content:"";position:fixed;inset:0;background:#000d;z-index:8}
.cell:target img{position:fixed;inset:0;margin:auto;width:96vw;height:92vh;object-fit:contain;
background:none;z-index:9}
.cell:target+.close{display:block;position:fixed;z-index:10;top:10px;right:18px;font-size:2.4rem;
line-height:1;color:#fff;text-decoration:none}
.scores{font-size:.9rem;font-variant-numeric:tabular-nums;border-spacing:14px 3px}
.scores .best{font-weight:700;color:var(--accent)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px;margin:0;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}code{font-size:.9rem}
@media(max-width:640px){dl{grid-template-columns:1fr}}
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<h1>$title</h1><p class="lead">$lead</p>
<div class="facts">$facts</div>
$notes
<section><h2>By step</h2><div class="curves">$curves</div></section>
<section id="grid"><h2>Checkpoints by strength</h2>
<p class="sub">The same prompts and seeds in every cell; below, its score with its 90&nbsp;% interval.
Click for large; full images lie in the folder <code>judging</code> beside this page.</p>
<div class="scroll">$grid</div>
<details><summary>The prompts, row by row</summary><ol>$prompts</ol></details></section>
<section><h2>Scores</h2><p class="sub">Style: 0 looks like the base, 1 like the training images.
Subject kept: 1 is the base&rsquo;s own drawing of the same prompt and seed, 0 is like that of any other
prompt. The score is their product.
Drift: how far prompts without the trigger word went towards the style.</p>
<div class="scroll">$table</div></section>
<section><h2>What next</h2><dl>$commands</dl></section>
<section><h2>Settings</h2><dl>$settings</dl></section>
</main></body></html>
""")
