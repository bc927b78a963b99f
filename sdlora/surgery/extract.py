"""Extracting a LoRA from the difference of two checkpoints.

Module by module: read both weights, subtract in float32, keep the leading part of the singular value
decomposition (:mod:`sdlora.surgery.dense`). Nothing but one module's weights is in memory. What a LoRA
cannot hold (norms, biases, embeddings, layers outside the targets) is measured, too, and reported.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.canonical import AdapterFile, AdapterInfo, ModuleKey
from ..config.schema import AdapterConfig, Precision, Targets
from ..errors import ConfigError, ModelError, shown
from ..families.facts import is_text_encoder
from ..number_formats import dtype_name, dtype_of, writable_dtypes
from ..tensor_file import Header, all_finite
from .checkpoints import Checkpoint, Site, open_checkpoint, read_tensor, variant_of
from .dense import cut_matrix
from .factors import Cut
from .methods import layer_seed
from .report import SurgeryReport
from .result import Part, finish
from .sources import RECORD, Progress, check_target, silent, write_adapter
from .workers import in_order


@dataclass(frozen=True)
class LeftOut:
    """What else differs between two checkpoints besides the extracted modules.

    Attributes:
        squares: sum of the squared differences.
        tensors: tensor -> norm of its difference, the largest first.
    """

    squares: float
    tensors: tuple[tuple[str, float], ...]


def extract_adapter(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    targets: Targets | None = None,
    text_encoders: bool = True,
    format: str = "webui",
    dtype: Precision | None = None,
    overwrite: bool = False,
    report: bool = False,
    progress: Progress = silent,
) -> SurgeryReport:
    """Write a LoRA that turns one checkpoint into another, as far as its size allows.

    Args:
        base: the checkpoint the LoRA will be used on; a single file or a diffusers folder.
        tuned: the checkpoint it should give; its layout may be the other one.
        output: the new file, or the folder for ``peft``.
        rank: at most this rank in each module.
        energy: share of each difference's squared norm to keep.
        error: largest relative Frobenius error of each difference; instead of ``energy``.
        targets: ``attention``, ``linear`` or ``all`` layers of the U-Net; as in training when None.
        text_encoders: whether the text encoders' layers are extracted as well.
        format: a key of :data:`sdlora.formats.table.FORMATS`.
        dtype: number format; that of the tuned checkpoint when None.
        overwrite: replace an existing file.
        report: also measure each module's error, rounding included.
        progress: called after each module.

    Raises:
        ModelError: when a checkpoint cannot be read, or they do not go together.
        ConfigError: for sizes that are missing or contradict each other, or equal checkpoints.
        OutputError: when the file exists or cannot be written.
    """
    started = time.perf_counter()
    cut = Cut(rank, energy, error)
    check_target(output, format, overwrite, [base, tuned])
    first, second = open_checkpoint(base), open_checkpoint(tuned)
    modules = extracted_modules(first, second, targets, text_encoders)
    number, unchanged = _number_format(dtype, second, modules), list[ModuleKey]()
    parts = extracted(first, second, modules, cut, unchanged, progress)
    weights, changes = finish(parts, format, number, with_errors=report)
    if not weights.pairs:
        raise ConfigError(
            f"{tuned}: has the same weights as {base} in all {len(modules)} layers asked for, so there is "
            "nothing to extract; give another checkpoint or more --targets"
        )
    left_out = what_is_left(first, second, modules) if first.layout == second.layout else None
    info = _info(first, tuned, cut, output.stem)
    written = write_adapter(AdapterFile(weights, info), first.family, output, format, number)
    covered = math.fsum((change.norm or 0.0) ** 2 for change in changes)
    details = {"dtype": dtype_name(number), "format": format, "family": first.family.name}
    details |= _details(unchanged, covered, left_out)
    seconds, notes = time.perf_counter() - started, _notes(unchanged, covered, left_out)
    return SurgeryReport("extract", written.files, changes, report, seconds, notes, written.proof, details)


def _info(base: Checkpoint, tuned: Path, cut: Cut, name: str) -> AdapterInfo:
    """Return what the header says about the result."""
    record = {
        "operation": "extract",
        "base": base.path.name,
        "tuned": tuned.name,
        **{key: value for key, value in vars(cut).items() if value is not None},
    }
    entries = {RECORD: json.dumps([record], ensure_ascii=False, separators=(",", ":"))}
    entries |= {"ss_sd_model_name": base.path.name}
    return AdapterInfo(family=base.family.name, name=name, metadata=entries)


def _details(unchanged: Sequence[ModuleKey], covered: float, left_out: LeftOut | None) -> dict[str, Any]:
    """Return what scripts want to know about everything that was not extracted."""
    return {
        "unchanged_modules": len(unchanged),
        "covered_share": None if left_out is None else covered / (covered + left_out.squares),
        "left_out": None if left_out is None else [list(tensor) for tensor in left_out.tensors],
    }


def extracted_modules(
    base: Checkpoint, tuned: Checkpoint, targets: Targets | None, text_encoders: bool
) -> list[ModuleKey]:
    """Return the modules that both checkpoints have and the targets name, in the order of the files.

    Raises:
        ModelError: when the checkpoints are of different families or shapes.
    """
    if base.family.name != tuned.family.name:
        raise ModelError(
            f"{tuned.path}: is {tuned.family.title}, but {base.path} is {base.family.title}; give two "
            "checkpoints of one family"
        )
    preset = targets or AdapterConfig().targets
    known = set(base.modules)
    chosen = []
    for module in tuned.modules:
        endings = base.family.targets.get(module.component, {}).get(preset, ())
        wanted = text_encoders or not is_text_encoder(module.component)
        if wanted and module in known and f".{module.path}".endswith(tuple(endings)):
            if base.sites(module)[0].shape != tuned.sites(module)[0].shape:
                raise ModelError(
                    f"{tuned.path}: {module.component}.{module.path} is {tuned.sites(module)[0].shape} there "
                    f"but {base.sites(module)[0].shape} in {base.path}; give two checkpoints of one model"
                )
            chosen.append(module)
    if not chosen:
        raise ModelError(f"{tuned.path}: shares no layer of --targets {preset} with {base.path}")
    return chosen


def extracted(
    base: Checkpoint,
    tuned: Checkpoint,
    modules: Sequence[ModuleKey],
    cut: Cut,
    unchanged: list[ModuleKey],
    progress: Progress = silent,
) -> Iterator[Part]:
    """Yield the difference of each module that changed, cut to size; the others go into ``unchanged``.

    Raises:
        ModelError: when a weight is not finite.
    """

    def part_of(module: ModuleKey) -> Part | None:
        site = tuned.sites(module)[0]
        difference = _matrix(site) - _matrix(base.sites(module)[0])
        if not all_finite(difference):
            raise ModelError(
                f"{tuned.path}: {module.component}.{module.path} or its counterpart in {base.path} holds NaN "
                "or infinite values; use another checkpoint"
            )
        if not bool(difference.any()):
            return None
        factors, norm, lost = cut_matrix(difference, site.shape, cut, layer_seed(0, module))
        return Part(module, factors, None, norm, lost)

    for done, (module, part) in enumerate(zip(modules, in_order(part_of, modules), strict=True), 1):
        if part is None:
            unchanged.append(module)
        else:
            yield part
        progress(done, len(modules))


def what_is_left(base: Checkpoint, tuned: Checkpoint, modules: Sequence[ModuleKey]) -> LeftOut:
    """Return what else differs between two checkpoints of one layout; VAE and averaged weights aside."""
    taken = {(site.header.path, site.stored_key.key) for m in modules for site in tuned.sites(m)[:1]}
    differences: dict[str, float] = {}
    for base_header, other in _matching(base, tuned):
        keys = [
            key
            for key, spec in other.tensors.items()
            if (other.path, key) not in taken
            and key in base_header.tensors
            and base_header.tensors[key].shape == spec.shape
            and spec.dtype.is_floating_point
            and not key.startswith(("first_stage_model.", "model_ema."))
        ]
        for key, norm in zip(keys, in_order(partial(_distance, base_header, other), keys), strict=True):
            if norm > 0.0:
                differences[key] = norm
    ordered = sorted(differences.items(), key=lambda item: -item[1])
    return LeftOut(math.fsum(norm**2 for norm in differences.values()), tuple(ordered))


def _matching(base: Checkpoint, tuned: Checkpoint) -> list[tuple[Header, Header]]:
    """Return the matching files of two checkpoints of one layout, one variant of each component."""
    if base.layout == "file":
        return [(base.headers[0], tuned.headers[0])]
    by_place = {(h.path.parent.name, h.path.name): h for h in base.headers}
    first = {
        component: min(tuned.variants(component) & base.variants(component), default=None)
        for component in tuned.components
    }
    return [
        (by_place[place], header)
        for header in tuned.headers
        if (place := (header.path.parent.name, header.path.name)) in by_place
        and variant_of(header.path) == first[header.path.parent.name]
    ]


def _distance(base: Header, tuned: Header, key: str) -> float:
    base_tensor, other = read_tensor(base, key), read_tensor(tuned, key)
    return float((other.double() - base_tensor.double()).norm())


def _matrix(site: Site) -> Tensor:
    return site.read().flatten(1)


def _number_format(asked: Precision | None, tuned: Checkpoint, modules: Sequence[ModuleKey]) -> torch.dtype:
    if asked is not None:
        return dtype_of(asked)
    dtypes = {tuned.sites(module)[0].spec.dtype for module in modules}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(writable_dtypes()) else torch.float32


def _notes(unchanged: Sequence[ModuleKey], covered: float, left_out: LeftOut | None) -> tuple[str, ...]:
    notes = []
    if unchanged:
        notes.append(f"{len(unchanged)} layers are the same in both checkpoints and were left out")
    if left_out is None:
        notes.append("the layouts differ, so changes outside the extracted layers were not measured")
    elif left_out.tensors:
        share = covered / (covered + left_out.squares)
        names = ", ".join(f"`{shown(name)}`" for name, _ in left_out.tensors[:3])
        notes.append(
            f"the extracted layers hold {100 * share:.2f} % of the squared difference of U-Net and text "
            f"encoders; {len(left_out.tensors)} other tensors differ, most of all {names}"
        )
    return tuple(notes)
