"""Adapter files in every supported format, to and from the canonical adapter.

Each format is one module with two pure functions, ``encode`` and ``decode``. Which format a file has is
told from its keys, never from its name. A new format is one module and one line in :data:`FORMATS`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters.base import COMPONENTS, AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from ..errors import AdapterFileError, OutputError
from ..files import replacing, write_json
from ..tensor_file import PICKLE_SUFFIXES, Header, read_header, read_tensors, write_tensors
from . import diffusers, foreign, metadata, peft, webui
from .detection import detect_family

if TYPE_CHECKING:
    from ..families.base import FamilyInfo


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        title: what users call it.
        matches: tells whether keys are in this format.
        write: (adapter, target, dtype, family) -> the files written.
        read: header -> weights.
        is_folder: whether an adapter is a folder rather than one file.
    """

    title: str
    matches: Callable[[Iterable[str]], bool]
    write: Callable[[AdapterFile, Path, torch.dtype, FamilyInfo], list[Path]]
    read: Callable[[Header], AdapterWeights]
    is_folder: bool = False


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter in any format: a ``.safetensors`` file, or a PEFT folder.

    Raises:
        AdapterFileError: when it is missing, damaged, of a kind that is not supported, or not an adapter.
    """
    headers = _headers(path)
    pairs: dict[ModuleKey, LowRankPair] = {}
    entries: dict[str, str] = {}
    for header in headers:
        found = FORMATS[_sniff(header)].read(header)
        twice = set(found.pairs) & set(pairs)
        if twice:
            raise AdapterFileError(
                f"{path}: {len(twice)} modules are in two of its folders; keep one of them"
            )
        pairs.update(found.pairs)
        entries.update(header.metadata)
    weights = AdapterWeights(pairs)
    name = entries.get("ss_output_name", "None")
    info = AdapterInfo(
        family=detect_family(weights, entries),
        name=path.stem if name in ("None", "") else name,
        trigger_words=metadata.trigger_words(entries),
        metadata=entries,
    )
    return AdapterFile(weights, info)


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
    if not adapter.weights.pairs:
        raise AdapterFileError(f"{target}: the adapter has no modules, so there is nothing to write")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise AdapterFileError(f"{target}: adapters are written as fp32, fp16 or bf16, not {dtype}")
    return FORMATS[format].write(adapter, target, dtype, info)


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


def weights_as_stored(path: Path) -> AdapterWeights:
    """Return an adapter with the alphas that other programs find in the file, not those we recorded.

    Raises:
        AdapterFileError: as :func:`read_adapter`.
    """
    pairs: dict[ModuleKey, LowRankPair] = {}
    for header in _headers(path):
        pairs.update(FORMATS[_sniff(header)].read(replace(header, metadata={})).pairs)
    return AdapterWeights(pairs)


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
    if foreign.is_checkpoint(keys):
        raise foreign.not_an_adapter(header.path, header.tensors)
    kind = foreign.other_kind(keys)
    if kind is not None:
        raise foreign.unsupported(header.path, kind, keys)
    for name, format in FORMATS.items():
        if format.matches(keys):
            return name
    if foreign.has_lora(keys):
        raise foreign.unknown_keys(header.path, keys)
    raise foreign.not_an_adapter(header.path, header.tensors)


def _write_webui(adapter: AdapterFile, target: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
    tensors, more = webui.encode(str(target), adapter.weights, info, dtype)
    entries = metadata.for_file(adapter, info, more)
    write_tensors(target, tensors, metadata.with_hashes(tensors, entries))
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
    ours = {target / c for c in COMPONENTS} | {
        target / c / file for c in COMPONENTS for file in (peft.CONFIG_FILE, peft.WEIGHTS_FILE)
    }
    if not target.is_dir() or set(target.rglob("*")) - ours:
        raise OutputError(
            f"{target}: exists and holds other files; nothing was overwritten. Choose another --output"
        )
    shutil.rmtree(target)


def _read_peft(header: Header) -> AdapterWeights:
    folder = header.path.parent
    component = folder.name if folder.name in COMPONENTS else None
    config = peft.read_config(folder / peft.CONFIG_FILE)
    return peft.decode(header.path, component, dict(read_tensors(header)), config)


def _reading(
    decode: Callable[[Path, Mapping[str, torch.Tensor], Mapping[str, str]], AdapterWeights],
) -> Callable[[Header], AdapterWeights]:
    return lambda header: decode(header.path, dict(read_tensors(header)), header.metadata)


FORMATS: dict[str, Format] = {
    "webui": Format("WebUI (kohya)", webui.matches, _write_webui, _reading(webui.decode)),
    "diffusers": Format("diffusers", diffusers.matches, _write_diffusers, _reading(diffusers.decode)),
    "peft": Format("PEFT", peft.matches, _write_peft, _read_peft, is_folder=True),
}
