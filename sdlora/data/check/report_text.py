"""The doctor's report for a terminal: counts, a chart of buckets, and findings with how to fix them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .doctor import Report, Role
from .findings import SEVERITIES, Finding, Severity
from .repair import Change

_LINES_PER_KIND = 8
_BAR_WIDTH = 30
_MOST_BUCKETS = 24
_COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan"}
_LEAST_WIDTH = 100
_NAMES = 4


def print_report(report: Report) -> None:
    """Show the report on stdout, in colour where that is a terminal."""
    _print(_report(report))


def print_changes(output: Path, changes: Sequence[Change]) -> None:
    """Show on stdout what was changed in a repaired copy."""
    table = Table(
        title=Text(f"repaired copy: {output}", style="bold"), title_justify="left", box=box.SIMPLE_HEAD
    )
    for head in ("file", "what was done", "in the copy"):
        table.add_column(head, overflow="fold")
    for change in changes:
        table.add_row(Text(change.name), Text(change.what), Text(change.written or "-"))
    if not changes:
        table.add_row("", "nothing needed repair", "")
    _print(table)


def _print(what: RenderableType) -> None:
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(what)
    else:  # a file or a pipe has no width
        console.print(Text(_plain(what)), soft_wrap=True)


def _plain(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=_LEAST_WIDTH, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _report(report: Report) -> RenderableType:
    colour = "red" if report.harmful else "yellow" if report.count("warning") else "green"
    parts: list[RenderableType] = [Text(str(report.folder), style="bold"), _summary(report), _buckets(report)]
    for severity in SEVERITIES:
        parts += _findings(report, severity)
    return Group(*parts, Text(report.verdict(), style=f"bold {colour}"))


def _summary(report: Report) -> Table:
    captions = report.captions
    unusable = f", {report.num_unusable} unusable" if report.num_unusable else ""
    table = Table.grid(padding=(0, 2, 0, 0))
    visits = f", {report.num_visits} visits per epoch" if report.num_visits != report.num_images else ""
    table.add_row("  images", f"{report.num_images}{unusable}{visits}")
    if report.base:
        table.add_row("  base", report.base)
    if report.num_held_out:
        table.add_row("  held out", _some_names(report, "held out"))
    if any(image.role == "regularisation" for image in report.images):
        table.add_row("  regularisation", _some_names(report, "regularisation"))
    table.add_row("  captions", report.caption_sources())
    if report.trigger_word:
        table.add_row("  trigger", f"{report.trigger_word} (put in front of {captions.trigger_added})")
    table.add_row("  tokens", f"{captions.mean_tokens} on average, {captions.max_tokens} at most")
    if report.num_batches is not None:
        table.add_row(
            "  batches", f"{report.num_batches} per epoch, {report.num_short_batches} of them short"
        )
    return table


def _some_names(report: Report, role: Role) -> Text:
    names = [image.item.name for image in report.images if image.role == role]
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return Text(f"{len(names)}: {', '.join(names[:_NAMES])}{more}")


def _sizes(report: Report) -> str:
    """Return the resolutions of the buckets."""
    also = "".join(f" and {resolution}" for resolution in report.more_resolutions)
    guess = "" if report.base else "; --base shows those of your base"
    return f"{report.resolution}{also} px (width x height{guess})"


def _buckets(report: Report) -> RenderableType:
    table = Table.grid(padding=(0, 1, 0, 0))
    most = max((bucket.num_images for bucket in report.buckets), default=1)
    shown = sorted(report.buckets, key=lambda bucket: -bucket.num_images)[:_MOST_BUCKETS]
    for bucket in report.buckets:
        if bucket in shown:
            height, width = bucket.bucket
            bar = "█" * max(1, round(_BAR_WIDTH * bucket.num_images / most))
            table.add_row(Text(f"{f'{width}x{height}':>12}"), Text(bar, style="blue"), f"{bucket.num_images}")
    hidden = len(report.buckets) - len(shown)
    if hidden > 0:
        table.add_row("", f"and {hidden} smaller buckets", "")
    head = Text(f"buckets at {_sizes(report)}", style="bold")
    return Padding(Group(head, table), (1, 0, 0, 0))


def _findings(report: Report, severity: Severity) -> Iterator[RenderableType]:
    kinds: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.severity == severity:
            kinds.setdefault(finding.kind, []).append(finding)
    if not kinds:
        return
    title = f"{severity.upper()}S ({report.count(severity)})"
    table = Table(
        title=Text(title, style=f"bold {_COLOURS[severity]}"), title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("what", style=_COLOURS[severity], no_wrap=True)
    table.add_column("where", overflow="fold")
    table.add_column("details")
    for kind, members in kinds.items():
        _add_kind(table, kind, members)
    yield Padding(table, (1, 0, 0, 0))


def _add_kind(table: Table, kind: str, members: Sequence[Finding]) -> None:
    fixes = Counter(finding.fix for finding in members)
    for number, finding in enumerate(members[:_LINES_PER_KIND]):
        fix = f"; {finding.fix}" if len(fixes) > 1 else ""
        name = f"{kind} ({len(members)})" if len(members) > 1 else kind
        # Text, because names may hold what rich takes for markup
        table.add_row(name if number == 0 else "", Text(finding.where), Text(f"{finding.what}{fix}"))
    if len(members) > _LINES_PER_KIND:
        more = f"and {len(members) - _LINES_PER_KIND} more (all with --json or --html FILE)"
        table.add_row("", "", Text(more, style="dim"))
    if len(fixes) == 1:
        table.add_row("", "", Text(f"→ {members[0].fix}", style="italic"))
