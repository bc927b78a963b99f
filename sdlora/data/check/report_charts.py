"""The charts of the report page, as inline SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ..batching.buckets import BucketCount
from ..reading.tokens import CHUNK_TOKENS

_WIDTH = 560
_ROW = 26
_MOST_BUCKETS, _MOST_TAGS, _MOST_BINS = 24, 20, 32
_TIMES = "\u00d7"
_LABEL = 26  # characters of a tag that are shown


def bucket_chart(buckets: Sequence[BucketCount]) -> str:
    """Return one row for each bucket: its shape, its size, how many images it has."""
    chosen = sorted(buckets, key=lambda bucket: -bucket.num_images)[:_MOST_BUCKETS]
    rows = [bucket for bucket in buckets if bucket in chosen]
    most = max((bucket.num_images for bucket in rows), default=1)
    parts = []
    for number, bucket in enumerate(rows):
        height, width = bucket.bucket
        scale = 19 / max(height, width)
        middle = number * _ROW + _ROW / 2
        shape = (
            f'<rect class="shape" x="{14 - width * scale / 2:.1f}" y="{middle - height * scale / 2:.1f}" '
            f'width="{width * scale:.1f}" height="{height * scale:.1f}" rx="1.5"/>'
        )
        visits = f", {bucket.num_visits} visits per epoch" if bucket.num_visits != bucket.num_images else ""
        title = f"{width} x {height} px: {bucket.num_images} images{visits}"
        parts.append(
            shape + _bar_row(f"{width} {_TIMES} {height}", 36, 128, middle, bucket.num_images, most, title)
        )
    return _chart(len(rows) * _ROW, parts, "images in each bucket")


def tag_chart(tags: Sequence[tuple[str, int]], num_images: int) -> str:
    """Return one row for each tag with the number of captions that have it, in two columns."""
    half = (min(len(tags), _MOST_TAGS) + 1) // 2
    columns = (tags[:half], tags[half:_MOST_TAGS])
    return "".join(_tag_column(column, num_images) for column in columns if column)


def _tag_column(tags: Sequence[tuple[str, int]], num_images: int) -> str:
    parts = []
    for number, (tag, count) in enumerate(tags):
        middle = number * _ROW + _ROW / 2
        label = tag if len(tag) <= _LABEL else tag[: _LABEL - 1] + "…"
        title = f"{tag}: {count} of {num_images} captions"
        parts.append(_bar_row(label, 0, 184, middle, count, max(1, num_images), title))
    return _chart(len(tags) * _ROW, parts, "captions with each tag")


def length_chart(tokens: Sequence[int]) -> str:
    """Return a histogram of caption lengths, with a line at the 75 tokens the text encoder sees at once."""
    longest = max((*tokens, CHUNK_TOKENS + 4))
    step = 5 * math.ceil((longest + 1) / _MOST_BINS / 5)
    counts = [0] * (longest // step + 1)
    for count in tokens:
        counts[count // step] += 1
    height, left, foot = 200.0, 34.0, 24.0
    wide, most = (_WIDTH - left) / len(counts), max((*counts, 1))
    parts = [
        f'<line class="axis" x1="{left}" x2="{_WIDTH}" y1="{height - foot}" y2="{height - foot}"/>',
        f'<text x="{left - 8}" y="16" text-anchor="end">{most}</text>',
        f'<text x="{left - 8}" y="{height - foot}" text-anchor="end">0</text>',
    ]
    for number, count in enumerate(counts):
        x, tall = left + number * wide, (height - foot - 8) * count / most
        kind = "bar over" if number * step > CHUNK_TOKENS else "bar"
        title = f"{number * step} to {number * step + step - 1} tokens: {count} captions"
        parts.append(
            f'<rect class="{kind}" x="{x + 1:.1f}" y="{height - foot - tall:.1f}" rx="2" '
            f'width="{max(1, wide - 2):.1f}" height="{tall:.1f}"><title>{title}</title></rect>'
        )
    for value in range(0, len(counts) * step + 1, max(step, 25 * math.ceil(longest / 150))):
        parts.append(
            f'<text x="{left + value / step * wide:.1f}" y="{height - 6}" text-anchor="middle">{value}</text>'
        )
    limit = left + (CHUNK_TOKENS + 1) / step * wide
    parts.append(f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{height - foot}"/>')
    side, shift = ("end", -6) if limit > _WIDTH / 2 else ("start", 6)
    parts.append(
        f'<text x="{limit + shift:.1f}" y="12" text-anchor="{side}">{CHUNK_TOKENS} tokens at once</text>'
    )
    return _chart(height, parts, "captions by their length in tokens")


def _bar_row(label: str, at: float, start: float, middle: float, count: int, most: int, title: str) -> str:
    full = _WIDTH - start - 52
    wide = max(3.0, full * count / most)
    return (
        f"<g><title>{escape(title)}</title>"
        f'<text class="label" x="{at}" y="{middle + 4}">{escape(label)}</text>'
        f'<rect class="track" x="{start}" y="{middle - 7}" width="{full}" height="14" rx="4"/>'
        f'<rect class="bar" x="{start}" y="{middle - 7}" width="{wide:.1f}" height="14" rx="4"/>'
        f'<text x="{start + full + 10}" y="{middle + 4}">{count}</text></g>'
    )


def _chart(height: float, parts: Sequence[str], what: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(what)}">'
        f"{''.join(parts)}</svg>"
    )
