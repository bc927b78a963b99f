"""Comparing two adapters: cosine, norms and distance of their updates, by module and by block.

Everything is computed from the factors: ``<dW1, dW2> = trace((U1^T U2) (D2 D1^T))`` takes two matrices of
rank x rank, in float64; no update is built. A cosine of 1 means the same direction at any strength, 0
nothing in common, -1 the opposite.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from ..errors import OutputError
from ..files import refuse_bad_names
from .factors import Factors, common_shape, distance, factors_of, inner_product
from .heatmap import draw_heatmap
from .report import table_text
from .similarity import Likeness, grouped, together
from .sources import Opened, Progress, kind_notes, open_adapters, refuse_source, silent
from .strengths import block_of
from .workers import in_order


@dataclass(frozen=True)
class AdapterDiff:
    """Two adapters compared.

    Attributes:
        sources: the two files.
        modules: module -> comparison.
        with_modules: whether people asked for each module.
        only_in: number of modules that only the first has, and that only the second has.
        image: the heat map, if one was drawn.
        seconds: wall time.
        notes: what the user should know.
    """

    sources: tuple[Path, Path]
    modules: Mapping[ModuleKey, Likeness]
    with_modules: bool
    only_in: tuple[int, int]
    image: Path | None
    seconds: float
    notes: tuple[str, ...]

    @property
    def total(self) -> Likeness:
        """Return the comparison of the whole adapters."""
        return together(list(self.modules.values()))

    def blocks(self) -> dict[tuple[str, str], Likeness]:
        """Return {(component, block): comparison}, in the order of the modules."""
        return grouped(self.modules, lambda module: (module.component, block_of(module)))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; the modules only where they were asked for."""
        values: dict[str, Any] = {
            "operation": "diff",
            "sources": [str(source) for source in self.sources],
            "total": self.total.to_dict(),
            "only_in_first": self.only_in[0],
            "only_in_second": self.only_in[1],
            "blocks": [
                {"component": component, "block": block, **likeness.to_dict()}
                for (component, block), likeness in self.blocks().items()
            ],
            "image": self.image and str(self.image),
            "seconds": round(self.seconds, 2),
            "notes": list(self.notes),
        }
        if self.with_modules:
            values["modules"] = [
                {"component": module.component, "module": module.path, **likeness.to_dict()}
                for module, likeness in self.modules.items()
            ]
        return values

    def render(self) -> str:
        """Return the comparison for a terminal."""
        table = Table(title=f"A = {self.sources[0]}\nB = {self.sources[1]}", title_justify="left")
        table.add_column("component")
        table.add_column("module" if self.with_modules else "block", overflow="fold")
        for name in ("layers", "cosine", "|A|", "|B|", "|A - B|"):
            table.add_column(name, justify="right")
        if self.with_modules:
            for module, likeness in self.modules.items():
                table.add_row(module.component, module.path, *_cells(likeness))
        else:
            for (component, block), likeness in self.blocks().items():
                table.add_row(component, block, *_cells(likeness))
        table.add_section()
        table.add_row("all", "", *_cells(self.total))
        lines = [table_text(table)]
        for name, count in zip("AB", self.only_in, strict=True):
            if count:
                lines.append(f"{count} modules are only in {name}")
        lines += [f"note: {note}" for note in self.notes]
        if self.image is not None:
            lines.append(str(self.image))
        return "\n".join(lines)


def _vector_notes(adapters: Sequence[Opened]) -> list[str]:
    """Return notes on differences of norms and biases, which have no factors to compare."""
    return [
        f"{adapter.path}: {len(adapter.vectors)} differences of norms and biases were not compared"
        for adapter in adapters
        if len(adapter.vectors)
    ]


def diff_adapters(
    source: Path,
    other: Path,
    *,
    image: Path | None = None,
    overwrite: bool = False,
    report: bool = False,
    progress: Progress = silent,
) -> AdapterDiff:
    """Compare two adapters of one model family.

    Args:
        source: adapter file or folder of any format.
        other: the same.
        image: PNG to draw a heat map into, block by kind of layer.
        overwrite: replace an existing image.
        report: list every module, not only the blocks.
        progress: called after each module.

    Raises:
        AdapterFileError: when one cannot be read, or they are not for the same layers.
        OutputError: when the image exists or cannot be written.
    """
    started = time.perf_counter()
    if image is not None:
        _check_image(image, (source, other), overwrite)
    adapters = open_adapters([source, other])
    first, second = (adapter.weights for adapter in adapters)
    modules = dict(compared(first, second, progress))
    if image is not None:
        draw_heatmap(modules, (source.name, other.name), image)
    shared = len(set(first.pairs) & set(second.pairs))
    return AdapterDiff(
        (source, other),
        modules,
        report,
        (len(first) - shared, len(second) - shared),
        image,
        time.perf_counter() - started,
        (*kind_notes(adapters), *_vector_notes(adapters)),
    )


def compared(
    first: AdapterWeights, other: AdapterWeights, progress: Progress = silent
) -> Iterator[tuple[ModuleKey, Likeness]]:
    """Yield each module of either adapter with its comparison, sorted by module.

    Raises:
        AdapterFileError: when a layer has different shapes in them.
    """
    modules = sorted(set(first.pairs) | set(other.pairs))
    work = in_order(lambda m: likeness_of(m, first.pairs.get(m), other.pairs.get(m)), modules)
    for done, (module, likeness) in enumerate(zip(modules, work, strict=True), 1):
        yield module, likeness
        progress(done, len(modules))


def likeness_of(module: ModuleKey, first_pair: LowRankPair | None, other: LowRankPair | None) -> Likeness:
    """Return the comparison of one module's updates.

    Raises:
        AdapterFileError: when their shapes differ.
    """
    first, second = (None if pair is None else factors_of(pair) for pair in (first_pair, other))
    if first is None or second is None:
        norm, other_norm = _norm(first), _norm(second)
        return Likeness(norm, other_norm, 0.0, norm + other_norm)
    common_shape([first.shape, second.shape], f"the adapters for `{module.component}.{module.path}`")
    return Likeness(first.norm(), second.norm(), inner_product(first, second), distance(first, second))


def _check_image(image: Path, sources: Sequence[Path], overwrite: bool) -> None:
    if image.suffix.lower() != ".png":
        raise OutputError(f"{image}: the heat map is a PNG; give --image a name ending in .png")
    refuse_bad_names(image)
    refuse_source(image, sources)
    if image.exists() and not overwrite:
        raise OutputError(f"{image}: exists; nothing was overwritten. Give another name, or --overwrite")


def _norm(factors: Factors | None) -> float:
    return 0.0 if factors is None else factors.norm()


def _cells(likeness: Likeness) -> tuple[str, ...]:
    cosine = likeness.cosine
    return (
        str(likeness.num_modules),
        "" if cosine is None else f"{cosine:+.4f}",
        f"{likeness.norm:.4g}",
        f"{likeness.other_norm:.4g}",
        f"{likeness.distance:.4g}",
    )
