"""Two records side by side: which cases hold the same bits, and which values differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_SHOWN = 5  # differing values of a case that are named
_WIDTH = 100  # characters of a value that are shown


class Row(NamedTuple):
    """One case: ``same``, ``differs``, ``missing`` (only before) or ``new`` (only after)."""

    case: str
    verdict: str
    values: int
    differences: tuple[str, ...] = ()


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return a JSON value with whole words replaced in its keys and texts (old -> new)."""
    if not names:
        return value
    words = "|".join(re.escape(old) for old in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<![A-Za-z0-9_])(?:{words})(?![A-Za-z0-9_])")

    def respell(text: str) -> str:
        return pattern.sub(lambda match: names[match[0]], text)

    def walk(item: Any) -> Any:
        if isinstance(item, dict):
            return {respell(key): walk(value) for key, value in item.items()}
        if isinstance(item, list):
            return [walk(value) for value in item]
        return respell(item) if isinstance(item, str) else item

    return walk(value)


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
) -> list[Row]:
    """Compare the cases of two records.

    Args:
        before: case -> its values, of the older checkout.
        after: the same of the newer one.
        names: what was renamed on purpose (old -> new).
        without: keys that are not compared.
    """
    rows = []
    for case in [*before, *(case for case in after if case not in before)]:
        if case not in after:
            rows.append(Row(case, "missing", 0))
            continue
        new = dict(_leaves(after[case], without))
        if case not in before:
            rows.append(Row(case, "new", len(new)))
            continue
        old = dict(_leaves(renamed(before[case], names or {}), without))
        differences = tuple(_differences(old, new))
        rows.append(Row(case, "differs" if differences else "same", len(old), differences))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows for people, each with its first differences."""
    width = max((len(row.case) for row in rows), default=4)
    lines = [f"{'case':{width}}  verdict   values  differ"]
    for row in rows:
        lines.append(f"{row.case:{width}}  {row.verdict:8}  {row.values:6}  {len(row.differences):6}")
        lines += [f"    {text}" for text in row.differences[:_SHOWN]]
        if len(row.differences) > _SHOWN:
            lines.append(f"    ... and {len(row.differences) - _SHOWN} more")
    counts = {
        verdict: sum(row.verdict == verdict for row in rows)
        for verdict in ("same", "differs", "missing", "new")
    }
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return "\n".join(lines)


def _leaves(value: Any, without: Sequence[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, single value) of a JSON tree; an empty list or table counts as a value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if key not in without:
                yield from _leaves(item, without, f"{path} > {key}" if path else key)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _leaves(item, without, f"{path}[{number}]")
    else:
        yield path, value


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for path in [*old, *(path for path in new if path not in old)]:
        if path not in new:
            yield f"{path}: {_short(old[path])} -> nothing"
        elif path not in old:
            yield f"{path}: nothing -> {_short(new[path])}"
        elif repr(old[path]) != repr(new[path]):  # 1 is not 1.0, and NaN is NaN
            yield f"{path}: {_short(old[path])} -> {_short(new[path])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
