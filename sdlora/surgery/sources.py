"""From adapter files to canonical adapters for surgery, and from results to proven files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey, Update
from ..adapters.kinds.full import Difference
from ..adapters.kinds.table import KINDS, title_of
from ..adapters.plain import to_plain
from ..config.schema import Precision
from ..errors import AdapterFileError, OutputError
from ..files import parse_json, refuse_bad_names
from ..formats import adapter_files, dropping
from ..formats.detection import known_family, stated_family
from ..formats.folding import own_dtype
from ..formats.proof import write_proven
from ..formats.table import find_format
from ..number_formats import dtype_name, dtype_of
from .on_base import BaseWeight, delta_on

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo

Progress = Callable[[int, int], None]
"""Called with (modules done, modules in all)."""

RECORD = "sdlora.surgery"
"""Header entry with what was done, as JSON."""
_SHARED_ENTRIES = (
    *("ss_base_model_version", "ss_sd_model_name", "ss_new_sd_model_hash", "ss_resolution", "ss_clip_skip"),
    *("modelspec.resolution", "modelspec.prediction_type", "modelspec.license", "modelspec.author"),
    *("modelspec.encoder_layer", "sdlora.base_digest"),
)


@dataclass(frozen=True)
class Written:
    """Files of a finished operation and the proof in one line."""

    files: tuple[Path, ...]
    proof: str


def silent(_done: int, _total: int) -> None:
    """Take progress without showing it."""


@dataclass(frozen=True)
class Opened:
    """An adapter that surgery works on.

    Attributes:
        path: where it came from.
        weights: as plain low-rank pairs.
        info: its name and header.
        dtype: number format of the file's factors, float32 where they differ.
        converted: kind -> modules that were turned into plain pairs, without any loss.
        on_base: updates that depend on the base's weights, as they are; empty where no base is given.
        vectors: what changes norms and biases, which no pair can hold.
        embeddings: textual-inversion embeddings that its file brings along.
        notes: what users are told about it.
    """

    path: Path
    weights: AdapterWeights
    info: AdapterInfo
    dtype: torch.dtype
    converted: Mapping[str, int]
    on_base: AdapterWeights = field(default_factory=lambda: AdapterWeights({}))
    vectors: AdapterWeights = field(default_factory=lambda: AdapterWeights({}))
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def matrices(self) -> AdapterWeights:
        """Everything but the vectors."""
        return AdapterWeights({**self.weights.updates, **self.on_base.updates})


_TO_LORA = "turn it into a plain LoRA first: sdlora convert FILE --to-lora --base BASE --rank N"


def open_adapters(
    paths: Sequence[Path],
    family: str | None = None,
    drop: Sequence[str] = (),
    *,
    has_base: bool = False,
    remedy: str = _TO_LORA,
) -> list[Opened]:
    """Read adapters that are to be worked on; other kinds become plain pairs where that is exact.

    Args:
        paths: files or folders.
        family: what the user says they are for.
        drop: kinds of layers that are left out; see :func:`sdlora.formats.dropping.words`.
        has_base: whether the base's weights are at hand, so that kinds that need them are taken.
        remedy: what to do about them otherwise, for messages.

    Raises:
        AdapterFileError: when one cannot be read, has no exact plain form, or two are for different
            families.
        ConfigError: for a word that leaves nothing out.
    """
    read = [(path, adapter_files.read_adapter(path)) for path in paths]
    for word in drop:
        if not any(dropping.holds(adapter, word) for _, adapter in read):
            dropping.without(paths[0], read[0][1], [word])  # says what is wrong with it
    opened = [_opened(path, adapter, family, drop, has_base, remedy) for path, adapter in read]
    known = [(source.path, source.info.family) for source in opened if source.info.family]
    for path, family in known[1:]:
        if family != known[0][1]:
            raise AdapterFileError(
                f"{path}: is for {family}, but {known[0][0]} is for {known[0][1]}; combine adapters of one "
                "model family"
            )
    return opened


def _opened(
    path: Path, whole: AdapterFile, family: str | None, drop: Sequence[str], has_base: bool, remedy: str
) -> Opened:
    """Return one adapter, sorted by what can be done with its updates."""
    adapter, notes = dropping.without(path, whole, [w for w in drop if dropping.holds(whole, w)])
    vectors = {key: u for key, u in adapter.weights.updates.items() if len(u.shape) == 1}
    matrices = {key: u for key, u in adapter.weights.updates.items() if key not in vectors}
    on_base = {key: update for key, update in matrices.items() if update.needs_base}
    needy = next((u for u in (*matrices.values(), *vectors.values()) if u.needs_base), None)
    if needy is not None and not has_base:
        raise AdapterFileError(
            f"{path}: is a {title_of(needy)}, whose update depends on the base's weights and is not of low "
            f"rank; {remedy}"
        )
    rest = AdapterWeights({key: update for key, update in matrices.items() if key not in on_base})
    converted = {kind: count for kind, count in rest.kinds().items() if kind != LowRankPair.kind}
    plain, _ = to_plain(rest)
    return Opened(
        *(path, plain, with_family(path, adapter, family).info, own_dtype(whole.weights), converted),
        *(AdapterWeights(on_base), AdapterWeights(vectors), adapter.embeddings, notes),
    )


def with_family(path: Path, adapter: AdapterFile, family: str | None) -> AdapterFile:
    """Return an adapter with the family that the user says it is for, where it does not tell itself.

    Raises:
        ConfigError: for a family that there is not.
        AdapterFileError: when it is not for that one.
    """
    stated = stated_family(path, adapter.weights, adapter.info.family, family)
    return replace(adapter, info=replace(adapter.info, family=stated))


def kind_notes(adapters: Sequence[Opened]) -> tuple[str, ...]:
    """Return what was said of adapters that were of another kind than plain LoRA."""
    told = [note for adapter in adapters for note in adapter.notes]
    taken = [
        f"{adapter.path}: {count} {KINDS[kind].title} modules were taken as plain LoRA of rank up to "
        f"{max(adapter.weights.ranks())}, which loses nothing"
        for adapter in adapters
        for kind, count in adapter.converted.items()
    ]
    return (*told, *taken)


def summed_vectors(
    adapters: Sequence[tuple[Opened, Callable[[ModuleKey], float]]],
    dtype: torch.dtype,
    base: BaseWeight | None = None,
) -> dict[ModuleKey, Update]:
    """Return the weighted sum of the differences of norms and biases, exact but for one rounding.

    Args:
        adapters: each with the strength of a module.
        dtype: of the result.
        base: gives the base's values, where kinds that need them were taken.
    """
    sums: dict[ModuleKey, Tensor] = {}
    for adapter, strength in adapters:
        for key, update in adapter.vectors.all_items():
            term = delta_on(key, update, base).double() * strength(key)
            sums[key] = sums[key] + term if key in sums else term
    return {key: Difference(total.to(dtype)) for key, total in sums.items() if bool(total.any())}


def all_embeddings(adapters: Sequence[Opened]) -> dict[str, Tensor]:
    """Return the embeddings of all adapters.

    Raises:
        AdapterFileError: when two have one of the same name.
    """
    embeddings: dict[str, Tensor] = {}
    for adapter in adapters:
        for key, tensor in adapter.embeddings.items():
            if key in embeddings and not torch.equal(embeddings[key], tensor):
                raise AdapterFileError(
                    f"{adapter.path}: its embedding `{key}` is another one than that of the same name in "
                    "another adapter; leave them out with --drop embedding"
                )
            embeddings[key] = tensor
    return embeddings


def family_of(adapters: Sequence[Opened]) -> FamilyInfo:
    """Return the family that the adapters are for.

    Raises:
        AdapterFileError: when none of them says, or this version does not know it.
    """
    name = next((adapter.info.family for adapter in adapters if adapter.info.family), None)
    return known_family(adapters[0].path, name)


def number_format(asked: Precision | None, adapters: Sequence[Opened]) -> torch.dtype:
    """Return the number format to write: the one asked for, else that of the sources, float32 if mixed.

    Raises:
        ConfigError: for an unknown one.
    """
    if asked is not None:
        return dtype_of(asked)
    dtypes = {adapter.dtype for adapter in adapters}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def check_target(target: Path, format: str, overwrite: bool, sources: Iterable[Path]) -> None:
    """Check that a result can be written without losing anything.

    Raises:
        ConfigError: for an unknown format.
        OutputError: when the file exists, is one of the sources, or has the wrong kind of name.
    """
    is_folder = find_format(format).is_folder
    refuse_bad_names(target)
    refuse_source(target, sources)
    is_file_name = target.suffix == ".safetensors"
    if is_folder and is_file_name:
        raise OutputError(f"{target}: {format} needs a folder; give --output without .safetensors")
    if not is_folder and not is_file_name:
        raise OutputError(f"{target}: give --output the name of the file, ending in .safetensors")
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists; nothing was overwritten. Give another --output, or --overwrite")


def refuse_source(target: Path, sources: Iterable[Path]) -> None:
    """Check that a result is not written over one of the files it is made from.

    Raises:
        OutputError: when it would be.
    """
    for source in sources:
        if target.exists() and source.exists() and target.samefile(source):
            raise OutputError(
                f"{target}: is one of the inputs, which is never written over; choose another --output"
            )


def write_adapter(
    adapter: AdapterFile,
    family: FamilyInfo,
    target: Path,
    format: str,
    dtype: torch.dtype,
    base: Mapping[ModuleKey, tuple[int, ...]] | None = None,
) -> Written:
    """Write an adapter under a temporary name, read it back and compare, and only then put it in place.

    Args:
        base: shapes of the base's layers, for the proof; those of its family's true model when None.

    Raises:
        AdapterFileError: when the format cannot hold it, or the proof fails (nothing is left then).
        OutputError: when the place cannot be written.
    """
    written = write_proven(adapter, format, target, dtype, family, base=base)
    proof = written.proof
    assert proof is not None
    line = (
        f"{proof.num_modules} modules read back by {' and '.join(proof.read_by)}, largest delta difference "
        f"{proof.largest_difference:.1e} in {dtype_name(dtype)}"
    )
    return Written(written.files, line)


def result_info(
    adapters: Sequence[Opened],
    name: str,
    record: Mapping[str, object],
    *,
    keep_all: bool,
) -> AdapterInfo:
    """Return name, trigger words and header entries of a result.

    Args:
        adapters: what it was made from.
        name: of the result.
        record: what was done.
        keep_all: keep all entries of the single source; else only those that all sources agree on and that
            still hold for a combination.
    """
    words = tuple(dict.fromkeys(word for a in adapters for word in a.info.trigger_words))
    first = adapters[0].info.metadata
    if keep_all:
        entries = dict(first)
        past = entries.get(RECORD)
    else:
        entries = {
            key: first[key]
            for key in _SHARED_ENTRIES
            if key in first and all(a.info.metadata.get(key) == first[key] for a in adapters)
        }
        past = None
        entries["modelspec.merged_from"] = ", ".join(a.info.name for a in adapters)
        entries["modelspec.title"] = name
    entries[RECORD] = json.dumps([*_history(past), dict(record)], ensure_ascii=False, separators=(",", ":"))
    family = next((a.info.family for a in adapters if a.info.family), None)
    return AdapterInfo(family=family, name=name, trigger_words=words, metadata=entries)


def fingerprints(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Return the name and the hash of the tensor data of each source, for the record."""
    prints = []
    for path in paths:
        prints.append({"file": path.name, "sha256": adapter_files.OpenAdapter(path).data_hash()})
    return prints


def _history(text: str | None) -> list[object]:
    try:
        tree = parse_json(text or "[]", finite=False)
    except ValueError:
        return []
    return tree if isinstance(tree, list) else []
