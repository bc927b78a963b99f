"""Baking adapters into a checkpoint, and taking them out again.

Each weight is computed in float32 (``W + sum of strength * dW``) and rounded once to the format it is
stored in. The result has the layout of the input: an LDM single file or a diffusers folder. The inverse
subtracts, which restores the weights to within the two roundings, not bit for bit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..adapters.canonical import AdapterFile, LowRankPair, ModuleKey, Update
from ..adapters.kinds.table import title_of
from ..adapters.strength import Strength
from ..errors import AdapterFileError, ConfigError, ModelError, OutputError
from ..families.facts import is_text_encoder
from ..files import refuse_bad_names, replacing, size_text
from ..formats import adapter_files, dropping
from ..tensor_file import DTYPE_NAMES, Header
from .baked import baked_adapters, baked_records, entries_after
from .checkpoints import Checkpoint, Site, open_checkpoint, variant_of, wide_dtype
from .report import ModuleChange, SurgeryReport, relative, sorted_changes
from .rewriting import Scratch, rewrite
from .sources import Progress, refuse_source, silent
from .strengths import ModuleStrength, check_blocks

_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".pb", ".h5")


@dataclass(frozen=True)
class _Term:
    """One adapter's share in a module."""

    module: ModuleKey
    site: Site
    update: Update
    strength: float


@dataclass
class _Baking:
    """Which tensors change and by what; collects the errors."""

    with_errors: bool
    terms: dict[tuple[Path, str], list[_Term]] = field(default_factory=dict)
    changes: dict[ModuleKey, ModuleChange] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    scratch: Scratch = field(default_factory=Scratch)

    def keys(self, header: Header) -> frozenset[str]:
        return frozenset(key for path, key in self.terms if path == header.path)

    def change(self, header: Header, key: str, stored: Tensor) -> None:
        """Add the updates to a stored tensor in place: computed wide, rounded once."""
        by_module: dict[ModuleKey, list[_Term]] = {}
        for term in self.terms[header.path, key]:
            by_module.setdefault(term.module, []).append(term)
        wide = self.scratch.tensor("wide", stored.shape, wide_dtype(stored.dtype)).copy_(stored)
        plain = all(isinstance(term.update, LowRankPair) for term in self.terms[header.path, key])
        original = wide if plain and not self.with_errors else wide.clone()
        for terms in by_module.values():
            site = terms[0].site
            _add(_rows(site, wide), terms, _rows(site, original))
        stored.copy_(wide)
        for module, terms in by_module.items():
            self._note(module, terms, original, stored)

    def _note(self, module: ModuleKey, terms: Sequence[_Term], before: Tensor, after: Tensor) -> None:
        norm = error = None
        if self.with_errors:
            site = terms[0].site
            old = _rows(site, before).double()
            exact = _add(torch.zeros_like(old), terms, _rows(site, before))
            norm = float(exact.norm())
            error = relative(float((_rows(site, after).double() - old - exact).norm()), norm)
        with self.lock:
            self.changes[module] = ModuleChange(module, None, None, norm, error)


def bake_checkpoint(
    checkpoint: Path,
    adapters: Sequence[tuple[Path, Strength]],
    output: Path,
    *,
    blocks: Sequence[Mapping[str, float]] = (),
    inverse: bool = False,
    overwrite: bool = False,
    report: bool = False,
    progress: Progress = silent,
) -> SurgeryReport:
    """Write a checkpoint with adapters added to its weights, or subtracted.

    Args:
        checkpoint: an LDM-layout ``.safetensors`` file or a diffusers folder.
        adapters: (file, strength) of each adapter, of any kind and format.
        output: the new file, or the new folder; never the input.
        blocks: block -> factor for each adapter; see :mod:`sdlora.surgery.strengths`.
        inverse: subtract what baking at these strengths added.
        overwrite: replace an existing file; folders are never replaced.
        report: also measure how much of each update the rounding spoils.
        progress: called with the bytes done.

    Raises:
        ModelError: when the checkpoint cannot be read, lacks a module of an adapter, or values do not fit.
        AdapterFileError: when an adapter cannot be read or does not fit.
        ConfigError: for settings without effect.
        OutputError: when the place exists, is the input, or cannot be written.
    """
    started = time.perf_counter()
    if not adapters:
        raise ConfigError("bake needs adapters: give --adapter FILE:STRENGTH")
    model = open_checkpoint(checkpoint)
    _check_target(model, output, overwrite, [path for path, _ in adapters])
    opened = [adapter_files.read_adapter(path) for path, _ in adapters]
    factors = blocks or [{}] * len(adapters)
    strengths = [ModuleStrength(s, b) for (_, s), b in zip(adapters, factors, strict=True)]
    check_blocks([(source.weights, strength) for source, strength in zip(opened, strengths, strict=True)])
    baking = _Baking(report)
    sign = -1.0 if inverse else 1.0
    for (path, _), adapter, strength in zip(adapters, opened, strengths, strict=True):
        _plan(model, path, adapter, strength, sign, baking)
    if not baking.terms:
        raise ConfigError("every strength is 0, so the result would equal the input; give another strength")
    records = baked_records(adapters, factors)
    notes = _notes(model, records, inverse) + _untouched(adapters, opened)
    files = (
        [_bake_file(model, output, baking, records, inverse, progress)]
        if model.layout == "file"
        else _bake_folder(model, output, baking, records, inverse, progress, notes)
    )
    return SurgeryReport(
        "bake" if not inverse else "bake --inverse",
        tuple(files),
        sorted_changes(baking.changes.values()),
        report,
        time.perf_counter() - started,
        tuple(notes),
        details={"layout": model.layout, "family": model.family.name, "inverse": inverse},
    )


def _untouched(adapters: Sequence[tuple[Path, Strength]], opened: Sequence[AdapterFile]) -> list[str]:
    """Return notes on what in the adapters' files changes no weight."""
    pairs = zip(adapters, opened, strict=True)
    return [note for (path, _), adapter in pairs for note in dropping.untouched(path, adapter)]


def _plan(
    model: Checkpoint,
    path: Path,
    adapter: AdapterFile,
    strength: ModuleStrength,
    sign: float,
    baking: _Baking,
) -> None:
    for module, update in adapter.weights.all_items():
        value = sign * strength.of(module)
        if value == 0.0:
            continue
        if sign < 0 and update.needs_base:
            raise AdapterFileError(
                f"{path}: is a {title_of(update)}, which rescales whole weights; it cannot be taken out "
                "again, use the original checkpoint"
            )
        sites = model.sites(module)
        if len({variant_of(site.header.path) for site in sites}) < len(model.variants(module.component)):
            raise ModelError(_missing(model, path, module))
        for site in sites:
            try:
                fitted = update.in_shape(site.shape)
            except ValueError:
                raise AdapterFileError(
                    f"{path}: {module.path} is {update.shape} in the adapter but {site.shape} in "
                    f"{model.path}; use the base it was trained on"
                ) from None
            terms = baking.terms.setdefault((site.header.path, site.stored_key.key), [])
            terms.append(_Term(module, site, fitted, value))


def _missing(model: Checkpoint, path: Path, module: ModuleKey) -> str:
    if module.component not in model.components:
        if not is_text_encoder(module.component):
            return f"{model.path}: has no {module.component}; give a complete checkpoint"
        return (
            f"{model.path}: has no {module.component}, which {path} changes; give {path.name}:STRENGTH:0 to "
            f"bake the {model.family.denoiser.title} alone, or a complete checkpoint"
        )
    return (
        f"{model.path} ({model.family.title}): has no {module.component}.{module.path}, which {path} "
        "changes; use the base it was trained on"
    )


def _rows(site: Site, stored: Tensor) -> Tensor:
    """Return a module's weight as a view into the tensor that holds it, (out, rest)."""
    if site.stored_key.third is not None:
        rows = stored.shape[0] // 3
        stored = stored[site.stored_key.third * rows : (site.stored_key.third + 1) * rows]
    return stored.T if site.stored_key.transposed else stored.view(stored.shape[0], -1)


def _add(target: Tensor, terms: Sequence[_Term], weight: Tensor) -> Tensor:
    """Add the sum of strength * dW of a module to a matrix in place, in its number format.

    Args:
        target: (out, rest), float32 or float64.
        terms: of this module.
        weight: the module's stored weight, (out, rest), for updates that need it.
    """
    dtype = target.dtype
    plain = [(t.update, t.strength) for t in terms if isinstance(t.update, LowRankPair)]
    if plain:  # all in one product
        up = torch.cat([p.up.flatten(1).to(dtype) * (s * p.alpha / p.rank) for p, s in plain], 1)
        target.addmm_(up, torch.cat([p.down.flatten(1).to(dtype) for p, _ in plain]))
    for term in terms:
        if not isinstance(term.update, LowRankPair):
            base = weight.reshape(term.site.shape).to(torch.promote_types(torch.float32, dtype))
            target += term.update.delta(base).to(dtype).reshape(weight.shape) * term.strength
    return target


def _bake_file(
    model: Checkpoint,
    output: Path,
    baking: _Baking,
    records: Sequence[Mapping[str, Any]],
    inverse: bool,
    progress: Progress,
) -> Path:
    [header] = model.headers
    _rewrite(header, output, baking, records, inverse, _Counter(progress, header.num_bytes))
    return output


def _bake_folder(
    model: Checkpoint,
    output: Path,
    baking: _Baking,
    records: Sequence[Mapping[str, Any]],
    inverse: bool,
    progress: Progress,
    notes: list[str],
) -> list[Path]:
    """Write a new folder: the changed components' weights are rewritten, everything else is copied."""
    changed = {path for path, _ in baking.terms}
    components = {path.parent for path in changed}
    left_out: list[str] = []
    copied: list[Path] = []
    weights = {header.path: header for header in model.headers}
    for file in sorted(path for path in model.path.rglob("*") if path.is_file()):
        name = file.relative_to(model.path)
        other = file.suffix in _OTHER_WEIGHTS and file.parent in components
        loose = file.parent == model.path and file.suffix in (".safetensors", *_OTHER_WEIGHTS)
        unknown = file.suffix == ".safetensors" and file.parent in components and file not in weights
        if other or loose or unknown:
            left_out.append(str(name))
        elif not any(part.startswith(".") for part in name.parts):
            copied.append(file)
    if left_out:
        notes.append(f"not copied, since they hold the weights without the adapters: {', '.join(left_out)}")
    counter = _Counter(progress, sum(file.stat().st_size for file in copied))
    with replacing(output) as folder:
        folder.mkdir(parents=True)
        for file in copied:
            place = folder / file.relative_to(model.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            if file in changed:
                _rewrite(weights[file], place, baking, records, inverse, counter)
            else:
                shutil.copyfile(file, place)
                counter.advance(file.stat().st_size)
    return [output / file.relative_to(model.path) for file in sorted(changed)]


class _Counter:
    """Adds up bytes for the progress."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, count: int) -> None:
        self._done += count
        self._progress(min(self._done, self._total), self._total)


def _rewrite(
    header: Header,
    target: Path,
    baking: _Baking,
    records: Sequence[Mapping[str, Any]],
    inverse: bool,
    counter: _Counter,
) -> None:
    rewrite(
        header,
        target,
        entries_after(header.metadata, records, inverse),
        baking.keys(header),
        lambda key, stored: baking.change(header, key, stored),
        counter.advance,
    )


def _notes(model: Checkpoint, records: Sequence[Mapping[str, Any]], inverse: bool) -> list[str]:
    notes = []
    if any(key.startswith("model_ema.") for key in model.headers[0].tensors):
        notes.append("the checkpoint also holds averaged weights (model_ema), which were left as they are")
    stored = {
        DTYPE_NAMES[spec.dtype]
        for header in model.headers
        for spec in header.tensors.values()
        if spec.dtype.is_floating_point
    }
    if inverse:
        notes.append(
            "subtracting restores each weight to within the rounding of both steps "
            f"({', '.join(sorted(stored))}), not bit for bit; the original checkpoint is exact"
        )
        baked = baked_adapters(model.headers[0].metadata)
        for record in records:
            if record not in baked:
                notes.append(
                    f"the header does not say that {record['file']} was baked in at this strength; it was "
                    "subtracted all the same"
                )
    elif stored & {"F8_E4M3", "F8_E5M2"}:
        notes.append("fp8 weights are so coarse that most of an adapter is lost in rounding; see --report")
    return notes


def _check_target(model: Checkpoint, output: Path, overwrite: bool, adapters: Sequence[Path]) -> None:
    refuse_bad_names(output)
    refuse_source(output, [model.path, *adapters])
    if model.layout == "file":
        if output.suffix != ".safetensors":
            raise OutputError(f"{output}: give --output the name of the new file, ending in .safetensors")
        if output.exists() and not overwrite:
            raise OutputError(
                f"{output}: exists; nothing was overwritten. Give another --output, or --overwrite"
            )
        needed = model.headers[0].num_bytes
    else:
        if output.exists():
            raise OutputError(f"{output}: exists; give --output a new folder for the model")
        if model.path.resolve() in output.resolve().parents:
            raise OutputError(f"{output}: lies inside the model it is made from; choose another --output")
        needed = sum(file.stat().st_size for file in model.path.rglob("*") if file.is_file())
    parent = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{output}: needs {size_text(needed)}, but {parent} has {size_text(free)} free; free some space "
            "or choose another --output"
        )
