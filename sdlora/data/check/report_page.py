"""The doctor's report as one HTML file that works offline, light and dark, on paper and on a phone.

Every image is shown with the exact part that training keeps. Without JavaScript only the filter of the
images is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from ...files import ASSETS, write_text
from ..reading.measure import Progress
from .doctor import TRAINED, ExaminedImage, Report
from .findings import SEVERITIES, Finding, Severity
from .report_charts import bucket_chart, length_chart, tag_chart
from .thumbnails import thumbnails

_PAGE = ASSETS / "report"
_SIDE = 300  # px of the longer side of a thumbnail
MOST_IMAGES = 600
"""Images shown on a page; those with findings come first."""
_MOST_ROWS, _MOST_BUTTONS = 300, 10
_TONES: dict[Severity, str] = {"error": "error", "warning": "warning", "note": "note"}


def write_report_page(report: Report, file: Path, progress: Progress | None = None) -> None:
    """Write the page; images with findings come first where there are too many to show all.

    Raises:
        OutputError: when the file cannot be written.
    """
    shown = _chosen_images(report)
    anchors = {examined.item.name: f"p{number}" for number, examined in enumerate(shown)}
    findings = _by_image(report.findings)
    images = thumbnails([(examined.item, examined.masked) for examined in shown], _SIDE, progress)
    cards = [
        _card(examined, image, findings.get(examined.item.name, []), anchors[examined.item.name])
        for examined, image in zip(shown, images, strict=True)
    ]
    hidden = len(report.images) - len(shown)
    page = Template((_PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        style=(_PAGE / "page.css").read_text(encoding="utf-8"),
        script=(_PAGE / "page.js").read_text(encoding="utf-8"),
        title=escape(report.folder.resolve().name or str(report.folder)),
        path=escape(str(report.folder.resolve())),
        about=escape(_about(report)),
        tone="error" if report.harmful else "warning" if report.count("warning") else "good",
        verdict=escape(report.verdict()),
        facts="".join(_facts(report)),
        findings=_findings(report, anchors),
        sizes=escape(_sizes(report)),
        buckets=bucket_chart(report.buckets) if report.buckets else '<p class="sub">None.</p>',
        lengths=length_chart([examined.tokens for examined in report.images]),
        captions=escape(_caption_line(report)),
        tags=tag_chart(report.tags, report.num_images) if report.tags else '<p class="sub">None.</p>',
        buttons="".join(_buttons(shown, findings)),
        cards="".join(cards),
        shown=f"{len(shown)} of {len(report.images)}; those with findings first. "
        if hidden
        else f"All {len(shown)}. ",
        legend=" ".join(_legend(report)),
    )
    write_text(file, page)


def _about(report: Report) -> str:
    """Return the base and resolution that the images are prepared for."""
    base = report.base or "no base was named, so the sizes are those usual for Stable Diffusion 1"
    return f"{base}, {report.resolution} px"


def _sizes(report: Report) -> str:
    also = "".join(f" and {resolution}" for resolution in report.more_resolutions)
    return f"Width \u00d7 height trained at, for {report.resolution}{also} px."


def _legend(report: Report) -> Iterator[str]:
    yield "The part inside the line is trained on; the dark part is cut away."
    if report.crops_move:
        yield "The line shows the middle crop; data.crop=random moves it at each visit."
    if any(examined.masked for examined in report.images):
        yield "Tinted parts are masked out."
    if any(examined.item.focus for examined in report.images):
        yield "The dot is the point that the crop keeps."


def _chosen_images(report: Report) -> list[ExaminedImage]:
    """Return the images to show in their own order, those with findings preferred."""
    findings = _by_image(report.findings)
    ranked = sorted(report.images, key=lambda examined: examined.item.name not in findings)
    names = {examined.item.name for examined in ranked[:MOST_IMAGES]}
    return [examined for examined in report.images if examined.item.name in names]


def _by_image(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    by_image: dict[str, list[Finding]] = {}
    for finding in findings:
        by_image.setdefault(finding.where, []).append(finding)
    return by_image


def _facts(report: Report) -> Iterator[str]:
    values: list[tuple[str, str, str]] = [("", f"{report.num_trained:,}", "images to train on")]
    if report.num_held_out:
        values.append(("", f"{report.num_held_out:,}", "held out"))
    if report.num_unusable:
        values.append(("error", f"{report.num_unusable:,}", "images not usable"))
    for severity in SEVERITIES:
        count = report.count(severity)
        tone = _TONES[severity] if count else ""
        values.append((tone, f"{count:,}", severity if count == 1 else f"{severity}s"))
    values.append(("", f"{len(report.buckets)}", "bucket" if len(report.buckets) == 1 else "buckets"))
    if report.num_visits != report.num_trained:
        values.append(("", f"{report.num_visits:,}", "visits per epoch"))
    if report.num_batches is not None:
        short = f"batches per epoch, {report.num_short_batches} short"
        values.append(("", f"{report.num_batches:,}", short))
    values.append(("", f"{report.captions.mean_tokens:g}", "tokens per caption"))
    for tone, value, name in values:
        kind = f' class="tone {tone}"' if tone else ""
        yield f"<div{kind}><b>{value}</b><span>{escape(name)}</span></div>"


def _findings(report: Report, anchors: dict[str, str]) -> str:
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault((finding.severity, finding.kind), []).append(finding)
    if not groups:
        return '<p class="sub">Nothing was found.</p>'
    return "".join(_group(severity, kind, members, anchors) for (severity, kind), members in groups.items())


def _group(severity: Severity, kind: str, members: Sequence[Finding], anchors: dict[str, str]) -> str:
    fixes = {finding.fix for finding in members}
    common = members[0].fix if len(fixes) == 1 else ""
    rows = []
    for finding in members[:_MOST_ROWS]:
        name = escape(finding.where)
        anchor = anchors.get(finding.where)
        where = f'<a href="#{anchor}"><code>{name}</code></a>' if anchor else f"<code>{name}</code>"
        fix = "" if common else f"; <i>{escape(finding.fix)}</i>"
        rows.append(f"<div>{where}<span>{escape(finding.what)}{fix}</span></div>")
    if len(members) > _MOST_ROWS:
        rows.append(f"<div><i>and {len(members) - _MOST_ROWS} more</i></div>")
    opened = " open" if severity == "error" else ""
    return (
        f'<details{opened}><summary><span class="pill {_TONES[severity]}">{severity}</span>'
        f'<b>{escape(kind)}</b><span class="count">{len(members)}</span>'
        f'<span class="fix">{escape(common)}</span></summary>'
        f'<div class="rows">{"".join(rows)}</div></details>'
    )


def _caption_line(report: Report) -> str:
    captions = report.captions
    text = f"{report.caption_sources()}. "
    if report.trigger_word:
        text += f"The trigger word {report.trigger_word} is put in front of {captions.trigger_added}. "
    return text + f"The longest has {captions.max_tokens} tokens."


def _kinds(examined: ExaminedImage, findings: Sequence[Finding]) -> list[str]:
    """Return the words an image can be filtered by: its role, if not simply trained on, and its findings."""
    role = [examined.role] if examined.role != "trained" else []
    return [*role, *dict.fromkeys(finding.kind for finding in findings)]


def _buttons(shown: Sequence[ExaminedImage], findings: dict[str, list[Finding]]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for examined in shown:
        for kind in _kinds(examined, findings.get(examined.item.name, [])):
            counts[kind] = counts.get(kind, 0) + 1
    yield '<button type="button" data-kind="">all</button>'
    for kind, count in sorted(counts.items(), key=lambda pair: -pair[1])[:_MOST_BUTTONS]:
        name = escape(kind, quote=True)
        yield f'<button type="button" data-kind="{name}">{name} {count}</button>'


def _card(examined: ExaminedImage, image: str | None, findings: Sequence[Finding], anchor: str) -> str:
    item = examined.item
    role = "" if examined.role == "trained" else f'<span class="pill">{examined.role}</span>'
    pills = role + "".join(
        f'<span class="pill {_TONES[finding.severity]}" title="{escape(finding.what)}">'
        f"{escape(finding.kind)}</span>"
        for finding in findings
    )
    words = escape(examined.caption)
    caption = f'<p title="{words}">{words}</p>' if words else '<p class="empty">no caption</p>'
    text = escape(f"{item.name} {examined.caption}".lower())
    kinds = escape("|".join(_kinds(examined, findings)))
    return (
        f'<figure id="{anchor}" data-kinds="{kinds}" data-text="{text}">'
        f'<div class="frame">{_frame(examined, image)}</div><figcaption>'
        f'<span class="name" title="{escape(item.name)}">{escape(item.name)}</span>'
        f'<span class="size">{_size_line(examined)}</span>'
        f'{caption}<span class="pills">{pills}</span></figcaption></figure>'
    )


def _size_line(examined: ExaminedImage) -> str:
    """Return an image's size, the sizes it is trained at, the share cut away and how often it counts."""
    item, placement = examined.item, examined.placement
    buckets = dict.fromkeys([placement.bucket, *(other.bucket for other in examined.further)])
    line = f"{item.width} &times; {item.height} &rarr; "
    line += " and ".join(f"{width} &times; {height}" for height, width in buckets)
    if placement.cropped_share >= 0.005:
        line += f", {placement.cropped_share:.0%} cut away"
    often = item.repeats > 1 and examined.role in TRAINED
    return line + (f", {item.repeats} visits per epoch" if often else "")


def _frame(examined: ExaminedImage, image: str | None) -> str:
    """Return the image with the part that is cut away darkened, and a line around the part that is kept."""
    if image is None:
        return '<span class="gone">changed since the check</span>'
    item = examined.item
    left, top, right, bottom = (f"{side:.2f}" for side in examined.box)
    whole = f"M0 0H{item.width}V{item.height}H0Z"
    kept = f"M{left} {top}H{right}V{bottom}H{left}Z"
    return (
        f'<svg viewBox="0 0 {item.width} {item.height}" role="img" aria-label="{escape(item.name)}">'
        f'<image href="{image}" width="{item.width}" height="{item.height}" preserveAspectRatio="none"/>'
        f'<path class="dim" d="{whole}{kept}"/><path class="kept" d="{kept}"/>{_dot(examined)}</svg>'
    )


def _dot(examined: ExaminedImage) -> str:
    """Return a mark at the point of interest: a line of length 0, so that it is a round dot at any size."""
    item = examined.item
    if item.focus is None:
        return ""
    x, y = item.focus[0] * item.width, item.focus[1] * item.height
    return f'<path class="dot" d="M{x:.2f} {y:.2f}h0"/>'
