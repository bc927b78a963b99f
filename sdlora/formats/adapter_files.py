"""Adapter files in every supported format, to and from the canonical adapter.

Each format is one module with an ``encode``; all single files are read by :mod:`.single_file`, whatever
their spelling. Which format a file has is told from its keys, never from its name. A new format is one
module and one line in :data:`FORMATS`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, ModuleKey, Update
from ..errors import AdapterFileError, OutputError
from ..families.table import component_names
from ..files import replacing, write_json
from ..tensor_file import PICKLE_SUFFIXES, Header, Load, opened, read_header, shapes_only, write_tensors
from . import diffusers, folding, foreign, hashes, kinds, metadata, peft, single_file, webui
from .detection import detect_family
from .keys import spellings

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        title: what users call it.
        write: (adapter, target, dtype, family) -> the files written; None for formats that are only read.
        read: (header, loader of tensors) -> modules and their updates, one at a time.
        is_folder: whether an adapter is a folder rather than one file.
    """

    title: str
    write: Callable[[AdapterFile, Path, torch.dtype, FamilyInfo], list[Path]] | None
    read: Callable[[Header, Load], Iterator[tuple[ModuleKey, Update]]] = single_file.read_modules
    is_folder: bool = False


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter in any format: a ``.safetensors`` file, or a PEFT folder.

    Raises:
        AdapterFileError: when it is missing, damaged, of a kind that is not supported, or not an adapter.
    """
    headers = _headers(path)
    weights = _collected(path, headers, opened)
    info = _info(path, headers, weights)
    return AdapterFile(kinds.as_in_base(weights, info.family), info)


def read_modules(path: Path) -> Iterator[tuple[ModuleKey, Update]]:
    """Yield the modules of an adapter in any format, holding one of them at a time.

    Raises:
        AdapterFileError: as :func:`read_adapter`.
    """
    for header in _headers(path):
        with opened(header) as load:
            yield from READERS[_sniff(header)].read(header, load)


def read_outline(path: Path) -> AdapterFile:
    """Return an adapter without its values: meta tensors for factors, and the alphas the file itself holds.

    The alphas are those that other programs find, not those we recorded. Reads the header and single
    numbers only, so it is quick for files of any size.

    Raises:
        AdapterFileError: as :func:`read_adapter`.
    """
    headers = _headers(path)
    unrecorded = [
        replace(header, metadata={k: v for k, v in header.metadata.items() if k != folding.RECORDED_ALPHAS})
        for header in headers
    ]
    weights = _collected(path, unrecorded, shapes_only)
    info = _info(path, headers, weights)
    return AdapterFile(kinds.with_projections(weights, info.family), info)


def _collected(
    path: Path, headers: list[Header], opening: Callable[[Header], AbstractContextManager[Load]]
) -> AdapterWeights:
    updates: dict[ModuleKey, Update] = {}
    for header in headers:
        with opening(header) as load:
            decoded = dict(READERS[_sniff(header)].read(header, load))
        twice = set(decoded) & set(updates)
        if twice:
            raise AdapterFileError(
                f"{path}: {len(twice)} modules are in two of its folders; keep one of them"
            )
        updates.update(decoded)
    return AdapterWeights(updates)


def _info(path: Path, headers: list[Header], weights: AdapterWeights) -> AdapterInfo:
    entries: dict[str, str] = {}
    for header in headers:
        entries.update(header.metadata)
    name = entries.get("ss_output_name", "None")
    return AdapterInfo(
        family=detect_family(weights, entries),
        name=path.stem if name in ("None", "") else name,
        trigger_words=metadata.trigger_words(entries),
        metadata=entries,
    )


def write_adapter(
    adapter: AdapterFile, format: str, target: Path, dtype: torch.dtype, info: FamilyInfo
) -> list[Path]:
    """Write an adapter atomically and return the files.

    Args:
        adapter: what to write; its ``info.metadata`` goes into the header.
        format: a key of :data:`FORMATS`.
        target: the file, or for ``peft`` the folder; an adapter that is there is replaced.
        dtype: number format of the factors.
        info: the family, for names and version entries.

    Raises:
        AdapterFileError: when the format cannot hold the adapter.
        OutputError: when the place cannot be written.
    """
    if not adapter.weights.updates:
        raise AdapterFileError(f"{target}: the adapter has no modules, so there is nothing to write")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise AdapterFileError(f"{target}: adapters are written as fp32, fp16 or bf16, not {dtype}")
    zero = next((module for module, update in adapter.weights.all_items() if update.alpha == 0.0), None)
    if zero is not None:
        raise AdapterFileError(
            f"{target}: module `{zero.component}.{zero.path}` has alpha 0, which clients read differently "
            "(as nothing, or as the rank); leave the module out"
        )
    write = FORMATS[format].write
    assert write is not None
    return write(adapter, target, dtype, info)


def sniff(path: Path) -> str:
    """Return the format of an adapter file or folder by the keys inside, reading no tensor.

    Raises:
        AdapterFileError: as :func:`read_adapter`.
    """
    return _sniff(_headers(path)[0])


def read_headers(path: Path) -> list[Header]:
    """Return the checked headers of an adapter: one for a file, one a component for a PEFT folder.

    Raises:
        AdapterFileError: when there is no adapter, or a header is damaged.
    """
    return _headers(path)


def _headers(path: Path) -> list[Header]:
    if not path.is_dir():
        return [read_header(path)]
    folders = [path / component for component in peft.components_in(path)] or [path]
    if not (folders[0] / peft.CONFIG_FILE).is_file():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        hint = f"name one of its files ({', '.join(files[:3])})" if files else "name a .safetensors file"
        raise AdapterFileError(f"{path}: is a folder without {peft.CONFIG_FILE}; {hint} or a PEFT folder")
    for folder in folders:
        if not (folder / peft.WEIGHTS_FILE).exists() and any(
            file.suffix in PICKLE_SUFFIXES for file in folder.iterdir()
        ):
            raise AdapterFileError(
                f"{folder}: has its weights only as a pickle (.bin), which can run code when opened; load it "
                f"with peft and save_pretrained(..., safe_serialization=True) to get {peft.WEIGHTS_FILE}"
            )
    return [read_header(folder / peft.WEIGHTS_FILE) for folder in folders]


def _sniff(header: Header) -> str:
    keys = list(header.tensors)
    is_lora = foreign.has_lora(keys)
    if not is_lora and foreign.is_checkpoint(keys):
        raise foreign.not_an_adapter(header.path, header.tensors)
    kind = foreign.other_kind(keys)
    if kind is not None:
        raise foreign.unsupported(header.path, kind, keys)
    if any(key.startswith(peft.PREFIX) for key in keys):
        return "peft"
    if formats := spellings(keys):
        return formats[0]
    if is_lora:
        raise foreign.unknown_keys(header.path, keys)
    raise foreign.not_an_adapter(header.path, header.tensors)


def _write_webui(adapter: AdapterFile, target: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
    tensors, more = webui.encode(str(target), adapter.weights, info, dtype)
    entries = metadata.for_file(adapter, info, more)
    write_tensors(target, tensors, hashes.with_hashes(tensors, entries))
    return [target]


def _write_diffusers(adapter: AdapterFile, target: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
    tensors, more = diffusers.encode(str(target), adapter.weights, info, dtype)
    write_tensors(target, tensors, metadata.for_file(adapter, info, more))
    return [target]


def _write_peft(adapter: AdapterFile, target: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
    entries = metadata.for_file(adapter, info, {"format": "pt"})
    files: list[Path] = []
    with replacing(target) as folder:
        for component in adapter.weights.components():
            tensors, config = peft.encode(str(target), adapter.weights, component, dtype)
            write_tensors(folder / component / peft.WEIGHTS_FILE, tensors, entries)
            write_json(folder / component / peft.CONFIG_FILE, config)
            files += [target / component / peft.CONFIG_FILE, target / component / peft.WEIGHTS_FILE]
        make_room(target)
    return files


def make_room(target: Path) -> None:
    """Make room for a folder, but only where nothing but a PEFT adapter of ours would be lost."""
    if not target.exists():
        return
    ours = {target / c for c in component_names()} | {
        target / c / file for c in component_names() for file in (peft.CONFIG_FILE, peft.WEIGHTS_FILE)
    }
    if not target.is_dir() or set(target.rglob("*")) - ours:
        raise OutputError(
            f"{target}: exists and holds other files; nothing was overwritten. Choose another --output"
        )
    shutil.rmtree(target)


FORMATS: dict[str, Format] = {
    "webui": Format("WebUI (kohya)", _write_webui),
    "diffusers": Format("diffusers", _write_diffusers),
    "peft": Format("PEFT", _write_peft, peft.read_modules, is_folder=True),
}
"""Formats that are written and read."""

READERS: dict[str, Format] = FORMATS | {
    "comfyui": Format("ComfyUI (generic keys)", None),
    "lycoris": Format("LyCORIS wrapper (lycoris_ keys)", None),
}
"""All formats that are read, also those that every client reads better in another one."""
