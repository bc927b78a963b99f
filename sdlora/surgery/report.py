"""What an operation did to each module, as a table for people and as JSON values."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..adapters.canonical import ModuleKey

TABLE_WIDTH = 120


@dataclass(frozen=True)
class ModuleChange:
    """What became of one module.

    Attributes:
        module: which one.
        rank_before: rank that went in, summed over several adapters; None for a full weight.
        rank_after: rank that came out; None for a full weight.
        norm: Frobenius norm of the exact result.
        error: norm of (what was written - the exact result) over ``norm``; None when it was not asked for.
    """

    module: ModuleKey
    rank_before: int | None
    rank_after: int | None
    norm: float | None = None
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "component": self.module.component,
            "module": self.module.path,
            "rank_before": self.rank_before,
            "rank_after": self.rank_after,
            "norm": self.norm,
            "relative_error": self.error,
        }


@dataclass(frozen=True)
class SurgeryReport:
    """What one operation wrote and how exact it is.

    Attributes:
        operation: ``merge``, ``resize``, ...
        files: everything written.
        changes: module by module.
        with_errors: whether the errors were measured (``--report``).
        seconds: wall time.
        notes: what the user should know, in whole sentences.
        proof: one line on the comparison after writing, where there was one.
        details: more facts for JSON.
    """

    operation: str
    files: tuple[Path, ...]
    changes: tuple[ModuleChange, ...]
    with_errors: bool
    seconds: float
    notes: tuple[str, ...] = ()
    proof: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def total_error(self) -> float | None:
        """Return the relative Frobenius error of all modules together."""
        measured = [(c.error, c.norm) for c in self.changes if c.error is not None and c.norm is not None]
        whole = math.hypot(*(norm for _, norm in measured)) if measured else 0.0
        if not measured or whole == 0.0:
            return 0.0 if measured else None
        return math.hypot(*(error * norm for error, norm in measured)) / whole

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; the modules only where their errors were asked for."""
        errors = [change.error for change in self.changes if change.error is not None]
        values: dict[str, Any] = {
            "operation": self.operation,
            "files": [str(file) for file in self.files],
            "num_modules": len(self.changes),
            "ranks_after": counts(c.rank_after for c in self.changes if c.rank_after is not None),
            "seconds": round(self.seconds, 2),
            "notes": list(self.notes),
            "proof": self.proof,
            **self.details,
        }
        if self.with_errors:
            values |= {
                "relative_error": self.total_error,
                "largest_relative_error": max(errors, default=None),
                "modules": [change.to_dict() for change in self.changes],
            }
        return values

    def render(self) -> str:
        """Return the report for a terminal: files, a line on what was done, the table if asked for."""
        lines = [str(file) for file in self.files]
        ranks = counts(c.rank_after for c in self.changes if c.rank_after is not None)
        what = f"{self.operation}: {len(self.changes)} modules"
        if ranks:
            what += f", rank {_spread(ranks)}"
        if self.total_error is not None:
            what += f", relative error {self.total_error:.2e} over all"
            what += f", at most {max(c.error or 0.0 for c in self.changes):.2e} in one module"
        lines.append(f"{what}, {self.seconds:.1f} s")
        if self.proof:
            lines.append(f"proof: {self.proof}")
        lines += [f"note: {note}" for note in self.notes]
        if self.with_errors:
            lines.append(table_text(self._table()))
        return "\n".join(lines)

    def _table(self) -> Table:
        table = Table(title=f"{self.operation}, module by module", title_justify="left")
        table.add_column("component")
        table.add_column("module", overflow="fold")
        for name in ("rank", "norm", "relative error"):
            table.add_column(name, justify="right")
        for change in self.changes:
            table.add_row(
                change.module.component,
                change.module.path,
                _ranks(change),
                "" if change.norm is None else f"{change.norm:.4g}",
                "" if change.error is None else f"{change.error:.2e}",
            )
        return table


def table_text(table: Table) -> str:
    """Return a table as plain text, the same whatever the terminal."""
    stream = io.StringIO()
    Console(file=stream, width=TABLE_WIDTH, color_system=None, legacy_windows=False).print(table)
    return stream.getvalue().rstrip()


def counts(values: Iterable[int]) -> dict[str, int]:
    """Return {value: how often}, ascending, with keys as JSON wants them."""
    counted: dict[int, int] = {}
    for value in values:
        counted[value] = counted.get(value, 0) + 1
    return {str(value): counted[value] for value in sorted(counted)}


def relative(error: float, norm: float) -> float:
    """Return error / norm; where the norm is 0: 0 without an error, infinity with one."""
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / norm


def sorted_changes(changes: Iterable[ModuleChange]) -> tuple[ModuleChange, ...]:
    """Return the changes by module."""
    return tuple(sorted(changes, key=lambda change: change.module))


def _spread(ranks: dict[str, int]) -> str:
    values: Sequence[int] = [int(rank) for rank in ranks]
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _ranks(change: ModuleChange) -> str:
    if change.rank_after is None:
        return "" if change.rank_before is None else str(change.rank_before)
    if change.rank_before is None or change.rank_before == change.rank_after:
        return str(change.rank_after)
    return f"{change.rank_before} -> {change.rank_after}"
