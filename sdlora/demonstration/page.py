"""The before/after page: one self-contained HTML file that works offline, light and dark.

All images are data URLs, the slider is a few lines of plain JavaScript, and without JavaScript
everything but the slider is still there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ..files import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..judging.score import StyleScore


@dataclass(frozen=True)
class Swept:
    """A subject at every strength of the sweep, and its true image in the style."""

    subject: str
    images: tuple[Image, ...]
    true: Image


@dataclass(frozen=True)
class Compared:
    """A held-out subject: drawn by the base, drawn with the adapter, and its true image in the style."""

    subject: str
    base: Image
    adapter: Image
    true: Image


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        title: headline.
        lead: one or two sentences under it.
        facts: (value, what it is): the figures shown in large type.
        strengths: of the sweep, ascending, starting at 0.
        chosen: the recommended one of them.
        sweep: subjects to play with.
        compared: all subjects that were scored.
        scores: (strength, score) of the strengths that were measured.
        ceiling: what true images score against each other.
        notes: paragraphs of plain text that explain the score.
        groups: group of features -> what it looks at, for the table of partial scores.
        loss_curve: PNG file.
        details: (name, value) of the run.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    strengths: Sequence[float]
    chosen: float
    sweep: Sequence[Swept]
    compared: Sequence[Compared]
    scores: Sequence[tuple[float, StyleScore]]
    ceiling: float
    notes: Sequence[str]
    groups: Sequence[tuple[str, str]]
    loss_curve: Path
    details: Sequence[tuple[str, str]]


def write_page(page: Page, file: Path) -> None:
    """Write the page as one HTML file.

    Raises:
        OutputError: when the file cannot be written.
    """
    chosen_score = dict(page.scores)[page.chosen]
    text = _PAGE.substitute(
        style=_STYLE,
        script=_SCRIPT,
        title=escape(page.title),
        lead=escape(page.lead),
        facts="".join(f"<div><b>{escape(v)}</b><span>{escape(n)}</span></div>" for v, n in page.facts),
        last=len(page.strengths) - 1,
        start=list(page.strengths).index(page.chosen),
        chosen=f"{page.chosen:g}",
        strengths=",".join(f"{value:g}" for value in page.strengths),
        ticks="".join(
            f'<span class="{"best" if value == page.chosen else ""}">{value:g}</span>'
            for value in page.strengths
        ),
        stage=_stage(page),
        scale=_scale(chosen_score, page.ceiling),
        notes="".join(f"<p>{escape(note)}</p>" for note in page.notes),
        groups=_groups(page, chosen_score),
        chart=_chart(page),
        sweep=_sweep(page),
        compared="".join(_compared(subject) for subject in page.compared),
        count=len(page.compared),
        loss=_data_url(page.loss_curve.read_bytes()),
        details="".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in page.details),
    )
    write_text(file, text)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _image(image: Image, alt: str, extra: str = "") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    space = " " if extra else ""
    return f'<img src="{_data_url(buffer.getvalue())}" alt="{escape(alt)}"{space}{extra}>'


def _stage(page: Page) -> str:
    """Return the large images that the slider changes; the script takes their content from the sweep."""
    start = list(page.strengths).index(page.chosen)
    figures = []
    for number, row in enumerate(page.sweep):
        image = _image(row.images[start], row.subject, f'class="live" data-subject="{number}"')
        true = _image(row.true, f"true icon: {row.subject}", 'title="the true icon"')
        figures.append(
            f"<figure>{image}<figcaption><span>{escape(row.subject)}</span>{true}</figcaption></figure>"
        )
    return "".join(figures)


def _sweep(page: Page) -> str:
    heads = "".join(
        f'<th class="{"best" if value == page.chosen else ""}">{"base" if value == 0 else f"{value:g}"}</th>'
        for value in page.strengths
    )
    rows = []
    for number, row in enumerate(page.sweep):
        cells = ""
        for index, (value, image) in enumerate(zip(page.strengths, row.images, strict=True)):
            alt = f"{row.subject} at strength {value:g}"
            cells += f"<td>{_image(image, alt, f'data-s={number}-{index}')}</td>"
        true = _image(row.true, f"true icon: {row.subject}")
        rows.append(f'<tr><th>{escape(row.subject)}</th>{cells}<td class="true">{true}</td></tr>')
    return f"<table><tr><th></th>{heads}<th>true icon</th></tr>{''.join(rows)}</table>"


def _compared(compared: Compared) -> str:
    images = "".join(
        _image(image, f"{compared.subject}: {what}", 'loading="lazy"')
        for image, what in (
            (compared.base, "base"),
            (compared.adapter, "adapter"),
            (compared.true, "true icon"),
        )
    )
    return f"<figure><div>{images}</div><figcaption>{escape(compared.subject)}</figcaption></figure>"


def _scale(score: StyleScore, ceiling: float) -> str:
    """Return the line from the base's look (0) to the true style (1) with the score on it."""

    def place(value: float) -> float:
        return 100 * min(1.0, max(0.0, value))

    return (
        f'<div class="scale" role="img" aria-label="score {score.value:.2f} between 0 and 1">'
        f'<i class="range" style="left:{place(score.low):.1f}%;'
        f'width:{max(0.6, place(score.high) - place(score.low)):.1f}%"></i>'
        f'<i class="mark" style="left:{place(score.value):.1f}%"><b>{score.value:.2f}</b></i></div>'
        '<div class="ends"><span>0 &middot; the base&rsquo;s look</span>'
        f"<span>true icons among themselves: {ceiling:.2f} &middot; 1</span></div>"
    )


def _groups(page: Page, score: StyleScore) -> str:
    rows = []
    for name, what in page.groups:
        value = score.groups[name]
        width = 100 * min(1.0, max(0.0, value))
        rows.append(
            f"<tr><th>{escape(name)}</th><td>{escape(what)}</td>"
            f'<td class="bar"><i style="width:{width:.0f}%"></i></td><td>{value:.2f}</td></tr>'
        )
    return f'<table class="groups">{"".join(rows)}</table>'


_WIDE, _HIGH, _LEFT, _TOP = 520.0, 220.0, 44.0, 16.0


def _chart(page: Page) -> str:
    """Return an SVG: the score at each measured strength, with its interval."""
    most = max(page.strengths)
    least = min(0.0, *(score.low for _, score in page.scores))

    def x(strength: float) -> float:
        return _LEFT + (_WIDE - _LEFT - 20) * strength / most

    def y(value: float) -> float:
        return _TOP + (_HIGH - _TOP - 34) * (1.05 - max(value, least)) / (1.05 - least)

    lines = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDE - 12}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    ]
    lines += [
        f'<text x="{x(v):.1f}" y="{_HIGH - 14}" text-anchor="middle">{v:g}</text>' for v in page.strengths
    ]
    points = " ".join(f"{x(strength):.1f},{y(score.value):.1f}" for strength, score in page.scores)
    dots = [
        f'<line class="range" x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{y(at.low):.1f}" y2="{y(at.high):.1f}"/>'
        f'<circle class="{"best" if s == page.chosen else ""}" cx="{x(s):.1f}" cy="{y(at.value):.1f}" r="5">'
        f"<title>strength {s:g}: {at.value:.2f}</title></circle>"
        for s, at in page.scores
    ]
    return (
        f'<svg viewBox="0 0 {_WIDE:g} {_HIGH:g}" role="img" aria-label="score by strength">{"".join(lines)}'
        f'<polyline points="{points}"/>{"".join(dots)}</svg>'
    )


_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1c1b1a;--soft:#6d6a66;--line:#e5e1db;
--accent:#c2410c;--tint:#c2410c22;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){:root{--paper:#161514;--card:#211f1d;--ink:#f1eeea;--soft:#a8a29b;
--line:#383430;--accent:#fb923c;--tint:#fb923c2b}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink)}
main{max-width:1080px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:2.1rem;line-height:1.15;margin:0 0 8px;
letter-spacing:-.02em}h2{font-size:1.25rem;margin:0 0 4px;letter-spacing:-.01em}
p{margin:0 0 10px;max-width:72ch}
.lead{font-size:1.08rem;color:var(--soft);margin-bottom:24px}.sub{color:var(--soft);margin-bottom:16px}
section{background:var(--card);border:1px solid var(--line);border-radius:16px;padding:24px;margin:0 0 20px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:20px}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 18px}
.facts b{display:block;font-size:1.6rem;letter-spacing:-.02em;line-height:1.2}
.facts span{color:var(--soft);font-size:.88rem}
img{display:block;width:100%;background:#fff;border-radius:8px;border:1px solid var(--line)}
figure{margin:0}figcaption{font-size:.86rem;color:var(--soft);text-align:center;margin-top:4px}
.stage{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin-bottom:18px}
.stage figcaption{display:flex;justify-content:space-between;align-items:center;margin-top:6px;
font-size:.95rem}
.stage figcaption img{width:40px;border-radius:6px}
.dial{display:grid;grid-template-columns:auto 1fr;gap:4px 20px;align-items:center}
output{font-size:1.9rem;font-weight:700;min-width:5.4ch;font-variant-numeric:tabular-nums}
output small{display:block;font-size:.8rem;font-weight:400;color:var(--soft);line-height:1.2}
input[type=range]{width:100%;accent-color:var(--accent);height:28px;margin:0}
.ticks{grid-column:2;display:flex;justify-content:space-between;
color:var(--soft);font-size:.86rem;padding:0 2px}
.ticks span{width:3ch;text-align:center}.best{color:var(--accent);font-weight:700}
.scale{position:relative;height:14px;border-radius:7px;margin:44px 0 6px;
background:linear-gradient(90deg,var(--line),var(--accent))}
.scale i{position:absolute;top:0;height:14px}.range{background:#0003;border-radius:7px}
.scale .mark{width:4px;margin-left:-2px;top:-5px;height:24px;background:var(--ink);border-radius:2px}
.mark b{position:absolute;bottom:26px;left:50%;transform:translateX(-50%);font-style:normal;font-size:1.15rem}
.ends{display:flex;justify-content:space-between;color:var(--soft);font-size:.86rem;margin-bottom:16px}
.two{display:grid;grid-template-columns:1fr 1fr;gap:28px;align-items:start}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}svg .grid{stroke:var(--line)}
polyline{fill:none;stroke:var(--accent);stroke-width:2.5}circle{fill:var(--card);stroke:var(--accent);
stroke-width:2.5}circle.best{fill:var(--accent)}svg .range{stroke:var(--accent);stroke-width:7;opacity:.22}
table{border-collapse:separate;border-spacing:6px;width:100%}th{font-weight:500;font-size:.88rem;
color:var(--soft);text-align:center}tr th:first-child{text-align:left;white-space:nowrap}
th.best{color:var(--accent);font-weight:700}
.sweep{overflow-x:auto}.sweep td{min-width:64px}.sweep td.true{padding-left:12px}
.groups td{font-size:.88rem;color:var(--soft)}.groups .bar{width:34%}.groups th{color:var(--ink)}
.bar i{display:block;height:8px;border-radius:4px;background:var(--accent)}
.all{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:14px}
.all div{display:grid;grid-template-columns:repeat(3,1fr);gap:4px}
.loss{max-width:760px;border-radius:10px}dl{display:grid;grid-template-columns:auto 1fr;gap:4px 18px;margin:0;
font-size:.92rem}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:760px){.ticks{font-size:.72rem}.ticks span{width:auto}
.two{grid-template-columns:1fr}.stage{grid-template-columns:repeat(2,1fr)}}
"""

_SCRIPT = """
const dial=document.querySelector('input[type=range]'),out=document.querySelector('output b'),
say=document.querySelector('output small'),strengths=dial.dataset.values.split(','),best=dial.dataset.best,
live=[...document.querySelectorAll('img.live')];
function show(){const i=dial.value;out.textContent=strengths[i];
say.textContent=i==0?'the base alone':strengths[i]==best?'recommended':'strength';
for(const one of live)one.src=document.querySelector(`[data-s="${one.dataset.subject}-${i}"]`).src}
dial.addEventListener('input',show);show();
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<h1>$title</h1><p class="lead">$lead</p>
<div class="facts">$facts</div>
<section><h2>Turn the style up and down</h2>
<p class="sub">Subjects the adapter has never seen, each drawn from one seed; only the strength changes.
The small image is the true icon.</p>
<div class="stage">$stage</div>
<div class="dial"><output><b>$chosen</b><small>recommended</small></output>
<input type="range" min="0" max="$last" step="1" value="$start" data-values="$strengths" data-best="$chosen"
aria-label="strength"><div class="ticks">$ticks</div></div>
<noscript><p class="sub">The slider needs JavaScript; every strength is shown below.</p></noscript></section>
<section><h2>How far it came</h2>$scale<div class="two"><div>$notes</div><div>
<h2>Score by strength</h2>$chart</div></div>$groups</section>
<section><h2>The whole sweep</h2>
<p class="sub">One row for each subject, one column for each strength, the true icon last.</p>
<div class="sweep">$sweep</div></section>
<section><h2>All $count held-out subjects</h2>
<p class="sub">Base &middot; adapter at strength $chosen &middot; true icon.
None was left out.</p>
<div class="all">$compared</div></section>
<section><h2>How it was learned</h2><p class="sub">The loss of every step, and of held-out images.</p>
<img class="loss" src="$loss" alt="loss curve"></section>
<section><h2>The run</h2><dl>$details</dl></section>
</main><script>$script</script></body></html>
""")
