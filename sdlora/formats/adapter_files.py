"""Adapter files in every format, to and from the canonical adapter, by the table of formats.

A file's format follows from its keys, never from its name. Each file's header is read once and its keys are
parsed once (:class:`OpenAdapter`), whatever is asked for afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey, Update
from ..errors import AdapterFileError, shown
from ..files import list_files
from ..number_formats import PRECISIONS, writable_dtypes
from ..tensor_file import Header, Load, data_sha256, opened, read_header, shapes_only
from . import folding, foreign, metadata
from .base_shapes import as_in_base
from .detection import detect_family
from .format_code import FormatCode
from .keys import FileKeys, Groups
from .peft import CONFIG_FILE
from .table import FORMATS

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo


class OpenAdapter:
    """An adapter's files: a file has one header, a PEFT folder one for each component.

    Args:
        path: the file or folder.

    Raises:
        AdapterFileError: when there is no adapter, or a header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers = [read_header(file) for file in _tensor_files(path)]
        self._keys = [FileKeys(header.tensors, header.path, header.tensors) for header in self.headers]

    @cached_property
    def keys(self) -> FileKeys:
        """All keys of all files."""
        if len(self._keys) == 1:
            return self._keys[0]
        specs = {key: spec for header in self.headers for key, spec in header.tensors.items()}
        return FileKeys([key for keys in self._keys for key in keys.names], self.path, specs)

    @cached_property
    def format(self) -> str:
        """The format, by the keys in the file.

        Raises:
            AdapterFileError: when it is of a kind that is not supported, or not an adapter.
        """
        return _sniff(self.headers[0], self._keys[0])

    def modules(self) -> Iterator[tuple[ModuleKey, Update]]:
        """Yield the modules with their updates; only one of them is in memory at a time.

        Raises:
            AdapterFileError: for keys that belong to no module, or an incomplete module.
        """
        for header, (code, groups) in zip(self.headers, self._grouped, strict=True):
            with opened(header) as load:
                yield from code.read(header, groups, load)

    def read(self) -> AdapterFile:
        """Return the adapter.

        Raises:
            AdapterFileError: as :meth:`modules`.
        """
        weights = self._collected(self.headers, opened)
        info = self._info(weights)
        return AdapterFile(as_in_base(weights, info.family), info, self._embeddings())

    @cached_property
    def outline(self) -> AdapterFile:
        """The adapter without its values: meta tensors for factors, and the alphas the file itself holds.

        The alphas are those that other programs see, not those in our own header entry. Only single numbers
        are read, so it is quick for files of any size.

        Raises:
            AdapterFileError: as :meth:`modules`.
        """
        unrecorded = [
            replace(
                header, metadata={k: v for k, v in header.metadata.items() if k != folding.RECORDED_ALPHAS}
            )
            for header in self.headers
        ]
        weights = self._collected(unrecorded, shapes_only)
        info = self._info(weights)
        # plain pairs stay in the dimensions of the file, which some programs go by
        plain = {k: update for k, update in weights.updates.items() if isinstance(update, LowRankPair)}
        return AdapterFile(AdapterWeights({**as_in_base(weights, info.family).updates, **plain}), info)

    def _embeddings(self) -> dict[str, Tensor]:
        embeddings: dict[str, Tensor] = {}
        for header, keys in zip(self.headers, self._keys, strict=True):
            if keys.embeddings:
                with opened(header) as load:
                    embeddings |= {key: load(key) for key in keys.embeddings}
        return embeddings

    def data_hash(self) -> str:
        """Return the SHA-256 (hex) of the first file's tensors, which WebUI calls the hash."""
        return data_sha256(self.headers[0].path, self.headers[0].data_offset)

    @cached_property
    def _grouped(self) -> list[tuple[FormatCode, Groups]]:
        pairs = []
        for header, keys in zip(self.headers, self._keys, strict=True):
            code = FORMATS[_sniff(header, keys)].code()
            pairs.append((code, code.group(header, keys)))
        return pairs

    def _collected(
        self, headers: Sequence[Header], opening: Callable[[Header], AbstractContextManager[Load]]
    ) -> AdapterWeights:
        updates: dict[ModuleKey, Update] = {}
        for header, (code, groups) in zip(headers, self._grouped, strict=True):
            with opening(header) as load:
                file_updates = dict(code.read(header, groups, load))
            twice = set(file_updates) & set(updates)
            if twice:
                raise AdapterFileError(
                    f"{self.path}: {len(twice)} modules are in two of its folders; keep one of them"
                )
            updates.update(file_updates)
        return AdapterWeights(updates)

    def _info(self, weights: AdapterWeights) -> AdapterInfo:
        entries: dict[str, str] = {}
        for header in self.headers:
            entries.update(header.metadata)
        name = entries.get("ss_output_name", "None")
        return AdapterInfo(
            family=detect_family(weights, entries),
            name=self.path.stem if name in ("None", "") else name,
            trigger_words=metadata.trigger_words(entries),
            stray=tuple(key for keys in self._keys for key in keys.stray),
            metadata=entries,
        )


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter in any format: a ``.safetensors`` file, or a PEFT folder.

    Raises:
        AdapterFileError: when it is missing, damaged, of a kind that is not supported, or not an adapter.
    """
    return OpenAdapter(path).read()


def write_adapter(
    adapter: AdapterFile, format: str, target: Path, dtype: torch.dtype, info: FamilyInfo
) -> list[Path]:
    """Write an adapter atomically and return the files.

    Args:
        adapter: what to write; its ``info.metadata`` goes into the header.
        format: a key of :data:`sdlora.formats.table.FORMATS`, one that is written.
        target: the file, or the folder for ``peft``; an existing adapter is replaced.
        dtype: number format of the factors.
        info: the family, for names and version entries.

    Raises:
        AdapterFileError: when the format cannot hold the adapter.
        OutputError: when the place cannot be written.
    """
    if not adapter.weights.updates:
        raise AdapterFileError(f"{target}: the adapter has no modules, so there is nothing to write")
    if dtype not in writable_dtypes():
        raise AdapterFileError(f"{target}: adapters are written as {' or '.join(PRECISIONS)}, not {dtype}")
    code = FORMATS[format].code()
    assert code.write is not None, "formats that are only read are not offered"
    if adapter.embeddings and not code.holds_embeddings:
        names = ", ".join(f"`{name}`" for name in embedding_names(adapter.embeddings))
        raise AdapterFileError(
            f"{target}: comes with the embedding {names}, which {FORMATS[format].title} has no place for; "
            "leave it out with --drop embedding, or export as webui"
        )
    weights = folding.without_zero_alphas(as_in_base(adapter.weights, info.name))
    return code.write(replace(adapter, weights=weights), target, dtype, info)


def embedding_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the embeddings that an adapter's file brings along."""
    return list(dict.fromkeys(shown(key.split(".")[1]) for key in keys))


def _tensor_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    for format in FORMATS.values():
        if format.is_folder and (files := format.code().files(path)):
            return files
    names = [file.name for file in list_files(path, ".safetensors") if file.parent == path]
    names += sorted(file.parent.parent.name for file in path.glob(f"*/*/{CONFIG_FILE}"))
    hint = f"name one of its files ({', '.join(names[:3])})" if names else "name a .safetensors file"
    raise AdapterFileError(f"{path}: is a folder without {CONFIG_FILE}; {hint} or a PEFT folder")


def _sniff(header: Header, file_keys: FileKeys) -> str:
    keys = file_keys.names
    is_lora = foreign.has_lora(keys)
    if not is_lora and foreign.is_checkpoint(keys):
        raise foreign.not_an_adapter(header.path, header.tensors)
    kind = foreign.other_kind(keys)
    if kind is not None:
        raise foreign.unsupported(header.path, *kind, keys)
    claims = {name: format.code().claims(file_keys) for name, format in FORMATS.items()}
    format = min(claims, key=lambda name: (-claims[name], name))
    if claims[format]:
        return format
    if is_lora:
        raise foreign.unknown_keys(header.path, keys)
    raise foreign.not_an_adapter(header.path, header.tensors)
