"""Converting adapters: to another file format, number format, or from other kinds to plain LoRA.

Another format or number format changes an update by rounding only, which is proven after writing. LoCon
with Tucker factors, LoHa and LoKr have an exact plain form of a higher rank; where a size is given, SVD
cuts it to that size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.canonical import AdapterFile, AdapterWeights, LowRankPair, ModuleKey, Update
from ..adapters.kinds.table import title_of
from ..adapters.plain import as_plain
from ..config.schema import Precision
from ..errors import AdapterFileError, ConfigError
from ..formats import adapter_files, dropping
from ..formats.folding import own_dtype
from ..formats.kinds import drop_word
from ..number_formats import dtype_name
from .checkpoints import open_checkpoint
from .dense import cut_matrix
from .factors import Cut, cut_of, distance, factors_of
from .methods import layer_seed
from .on_base import BaseWeight, delta_on, fitted, weights_of
from .report import ModuleChange, SurgeryReport, relative, sorted_changes
from .result import Part, cut_part, finish
from .sources import (
    Opened,
    Progress,
    check_target,
    family_of,
    fingerprints,
    number_format,
    result_info,
    silent,
    with_family,
    write_adapter,
)
from .workers import in_order


def convert_adapter(
    source: Path,
    output: Path,
    *,
    format: str = "webui",
    dtype: Precision | None = None,
    family: str | None = None,
    to_lora: bool = False,
    base: Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    drop: Sequence[str] = (),
    overwrite: bool = False,
    report: bool = False,
    progress: Progress = silent,
) -> SurgeryReport:
    """Write an adapter in another format, number format or kind.

    Args:
        source: adapter file or folder of any format.
        output: the new file, or the folder for ``peft``.
        format: a key of :data:`sdlora.formats.table.FORMATS`.
        dtype, family: number format, and what it is for; the source's own when None.
        to_lora: turn other kinds into plain LoRA: exactly, or cut to a size. Kinds whose update depends on
            the base's weights, such as DoRA, need ``base`` and a size.
        base: checkpoint or diffusers folder the adapter was trained on; the proof is against its layers.
        rank: at most this rank in each module that is converted.
        energy: share of each update's sum of squared singular values to keep.
        error: largest relative Frobenius error of each update; instead of ``energy``.
        drop: kinds of layers that are left out; see :func:`sdlora.formats.dropping.words`.
        overwrite: replace an existing file.
        report: also measure each module's error, rounding included.
        progress: called after each module.

    Raises:
        AdapterFileError: when the source cannot be read, or the format cannot hold the result.
        ConfigError: for settings that contradict each other or have no effect.
        OutputError: when the file exists or cannot be written.
    """
    started = time.perf_counter()
    cut = cut_of(rank, energy, error)
    if not to_lora and cut is not None:
        raise ConfigError("a size has an effect with --to-lora only; sdlora resize cuts a plain LoRA")
    check_target(output, format, overwrite, [source])
    whole = with_family(source, adapter_files.read_adapter(source), family)
    adapter, notes = dropping.without(source, whole, drop)
    opened = Opened(source, adapter.weights, adapter.info, own_dtype(adapter.weights), {})
    made_for, number = family_of([opened]), number_format(dtype, [opened])
    if to_lora:
        weights, changes = _plain(opened, cut, base, format, number, report, progress)
        info = result_info([opened], output.stem, _record(opened), keep_all=True)
    else:
        weights, changes, info = adapter.weights, (), replace(adapter.info, name=output.stem)
    result, shapes = AdapterFile(weights, info, adapter.embeddings), _shapes_of(base)
    written = write_adapter(result, made_for, output, format, number, shapes)
    if not to_lora:
        changes = _rounding(adapter, output, report, progress)
    details = {"dtype": dtype_name(number), "format": format, "kinds": weights.kinds()}
    seconds = time.perf_counter() - started
    return SurgeryReport("convert", written.files, changes, report, seconds, notes, written.proof, details)


def _shapes_of(base: Path | None) -> dict[ModuleKey, tuple[int, ...]] | None:
    """Return the shapes of a base's layers, if a base is given."""
    return None if base is None else open_checkpoint(base).shapes


def _record(opened: Opened) -> dict[str, object]:
    """Return what was done, for the header of a plain LoRA."""
    kinds = {kind: n for kind, n in opened.weights.kinds().items() if kind != LowRankPair.kind}
    return {"operation": "to-lora", "sources": fingerprints([opened.path]), "kinds": kinds}


def plain_parts(
    weights: AdapterWeights, cut: Cut | None, base: BaseWeight | None, progress: Progress = silent
) -> Iterator[Part]:
    """Yield each module's update as plain factors; an update that is plain already is not cut.

    Raises:
        AdapterFileError: for an update that needs the base, without the base's weights or without a size.
    """

    def reduced(item: tuple[ModuleKey, Update]) -> Part:
        module, update = item
        if len(update.shape) == 1:
            raise AdapterFileError(
                f"`{module.component}.{module.path}` is a {title_of(update)} of a vector, which a LoRA "
                f"cannot hold; leave such layers out with --drop {drop_word(module, update)}"
            )
        if update.needs_base:
            return _part_on_base(module, update, cut, base)
        return cut_part(
            module, factors_of(as_plain(update).pair), None if isinstance(update, LowRankPair) else cut
        )

    for done, part in enumerate(in_order(reduced, weights.all_items()), 1):
        yield part
        progress(done, len(weights))


def _part_on_base(module: ModuleKey, update: Update, cut: Cut | None, base: BaseWeight | None) -> Part:
    """Return the plain factors of an update that depends on the base's weight, cut to a size."""
    where = f"`{module.component}.{module.path}` is a {title_of(update)}"
    if base is None:
        raise AdapterFileError(f"{where}, whose update depends on the base's weights; give --base")
    if cut is None and update.exact_factors:
        weight = base(module)
        return cut_part(module, factors_of(as_plain(fitted(module, update, weight), weight).pair), None)
    if cut is None:
        raise AdapterFileError(
            f"{where}, whose update is not of low rank, so it cannot be plain exactly; give --rank, --energy "
            "or --error"
        )
    delta = delta_on(module, update, base)
    factors, norm, lost = cut_matrix(delta.flatten(1), tuple(delta.shape), cut, layer_seed(0, module))
    return Part(module, factors, update.rank, norm, lost)


def _plain(
    opened: Opened,
    cut: Cut | None,
    base: Path | None,
    format: str,
    number: torch.dtype,
    report: bool,
    progress: Progress,
) -> tuple[AdapterWeights, tuple[ModuleChange, ...]]:
    if opened.weights.is_plain:
        raise ConfigError(f"--to-lora: {opened.path} is a plain LoRA already; leave it out")
    parts = plain_parts(opened.weights, cut, None if base is None else weights_of(base), progress)
    return finish(parts, format, number, with_errors=report)


def _rounding(
    adapter: AdapterFile, output: Path, report: bool, progress: Progress
) -> tuple[ModuleChange, ...]:
    """Return each module as it is in the new file; its rounding error only where that is asked for."""
    back = adapter_files.read_adapter(output).weights if report else adapter.weights
    changes = []
    for done, (module, update) in enumerate(adapter.weights.all_items(), 1):
        change = ModuleChange(module, update.rank, update.rank)
        if report:
            change = _measured(change, update, back.updates[module])
        changes.append(change)
        progress(done, len(adapter.weights))
    return sorted_changes(changes)


def _measured(change: ModuleChange, update: Update, other: Update) -> ModuleChange:
    if isinstance(update, LowRankPair) and isinstance(other, LowRankPair):
        first = factors_of(update)
        norm, error = first.norm(), distance(first, factors_of(other))
        return replace(change, rank_after=other.rank, norm=norm, error=relative(error, norm))
    if update.needs_base:
        return change  # its update is not defined without the base
    first_delta, second_delta = update.delta().double().flatten(1), other.delta().double().flatten(1)
    norm = float(first_delta.norm())
    return replace(change, norm=norm, error=relative(float((first_delta - second_delta).norm()), norm))
