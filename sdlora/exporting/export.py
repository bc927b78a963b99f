"""Exporting adapters, with proof: every file is read back and compared before it gets its name.

Also what goes beside a file for WebUI: the preview image and the card with the trigger words.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from ..adapters.canonical import AdapterFile
from ..config.schema import Config, Precision
from ..config.toml import load_config
from ..errors import AdapterFileError, ConfigError, OutputError
from ..families.table import FAMILIES, family_info
from ..files import replacing
from ..formats import adapter_files
from ..formats.clients import Support
from ..formats.folding import own_dtype
from ..formats.privacy import without_private
from ..formats.proof import Proof, compare, prove, support_of
from ..run_folder import IMAGE_ENDINGS, RunFolder, list_checkpoints
from ..tensor_file import data_sha256
from .webui_card import card_image, other_preview, write_card

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TARGETS = {"webui": "{name}.safetensors", "diffusers": "{name}-diffusers.safetensors", "peft": "{name}-peft"}
_PROGRAM_STEMS = {"adapter", "adapter_model", "pytorch_lora_weights"}
_PLAIN = r'[^\\/:*?"<>|\x00-\x1f]'
_NAME = re.compile(rf"^(?!\.)(?!(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)){_PLAIN}{{1,100}}$(?<![. ])")
"""File names that every system takes: no separators, none of Windows' devices, no dot or space at the end."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and the proof that it holds the trained adapter.

    Attributes:
        files: all files written, the adapter first.
        format: of the adapter.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        source: the file the numbers came from.
        proof: the comparison; None where none was asked for.
        model_hash: SHA-256 of the tensor data, as WebUI and kohya hash adapters.
        clients: which programs load it fully.
    """

    files: tuple[Path, ...]
    format: str
    dtype: str
    source: str
    proof: Proof | None
    model_hash: str
    clients: tuple[Support, ...]

    @property
    def adapter(self) -> Path:
        """The adapter's own file, or its folder for PEFT."""
        return self.files[0].parent.parent if adapter_files.FORMATS[self.format].is_folder else self.files[0]

    def proof_line(self) -> str:
        """Return the proof in one line for people."""
        proof = self.proof
        if proof is None:
            return "not read back (--no-verify)"
        return (
            f"{proof.num_modules} modules, {proof.num_keys} keys, largest delta difference "
            f"{proof.largest_difference:.1e} ({proof.relative_difference:.1e} relative; {self.dtype} "
            f"rounding allows {proof.tolerance:.1e}), read back by {' and '.join(proof.read_by)}"
        )

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            "files": [str(file) for file in self.files],
            "format": self.format,
            "dtype": self.dtype,
            "source": self.source,
            **(self.proof.to_dict() if self.proof else {}),
            "proof": self.proof_line(),
            "model_hash": self.model_hash,
            "clients": {support.client: list(support.reasons) or "full" for support in self.clients},
        }


@dataclass(frozen=True)
class Source:
    """An adapter to export, with what its surroundings say.

    Attributes:
        adapter: the most exact numbers there are.
        path: where they came from.
        name: for the files.
        dtype: number format to write when none is asked for.
        preview: image that shows it, if there is one.
    """

    adapter: AdapterFile
    path: Path
    name: str
    dtype: torch.dtype
    preview: Path | None


def export_adapter(
    source: Path,
    format: str,
    output: Path | None = None,
    *,
    dtype: Precision | torch.dtype | None = None,
    preview: Path | None = None,
    webui_folder: Path | None = None,
    overwrite: bool = False,
    name: str | None = None,
    preferred_strength: float | None = None,
    private: bool = False,
    verify: bool = True,
) -> ExportReport:
    """Write an adapter in a format, with preview and card for ``webui``, and prove that it is right.

    Args:
        source: a run folder, or an adapter file or folder of any format.
        format: a key of :data:`sdlora.formats.FORMATS`.
        output: folder to write into, or a path ending in ``.safetensors`` for the file itself; may be left
            out when ``webui_folder`` is given.
        dtype: number format; the run's setting, or the source's own, when None.
        preview: image for the card; the run's newest sample when None.
        webui_folder: a WebUI's own folder, or its ``models/Lora``, to put the files into as well.
        overwrite: replace files that exist.
        name: of the adapter; the run's or the source file's own when None.
        preferred_strength: strength that looks best, for the card; the source's own when None.
        private: leave out what describes the training images (folder names, captions, tags, file names).
        verify: load the file through our reader, diffusers and PEFT and compare every update.

    Raises:
        AdapterFileError: when the source cannot be read, or the proof fails (nothing is left then).
        OutputError: when a file exists, or the place cannot be written.
        ConfigError: for an unknown format, number format or name.
    """
    if format not in adapter_files.FORMATS:
        raise ConfigError(
            f"--format {format}: is not a format; give one of {', '.join(adapter_files.FORMATS)}"
        )
    if webui_folder is not None and format != "webui":
        raise ConfigError(f"--format {format}: WebUI reads only its own format; give --format webui")
    lora_folder = find_lora_folder(webui_folder) if webui_folder is not None else None
    place = output or lora_folder
    if place is None:
        raise ConfigError("export needs a place: give --output DIR (or --webui DIR)")
    opened = open_source(source)
    chosen = _check_name(name) if name is not None else opened.name
    adapter = _renamed(opened.adapter, name or opened.adapter.info.name or chosen, preferred_strength)
    info = _family(adapter, source)
    if private:
        kept = without_private(adapter.info.metadata)
        adapter = replace(adapter, info=replace(adapter.info, metadata=kept))
    target = _target(format, place, chosen)
    image = card_image(preview or opened.preview, private=private) if format == "webui" else None
    if image is not None and other_preview(target) is not None:
        image = None  # the one that is there stays the card's image
    planned = _planned(target, format, image is not None)
    if lora_folder is not None:
        planned += [lora_folder / file.name for file in planned if file.parent != lora_folder]
    taken = next((file for file in planned if file.exists()), None)
    if taken is not None and not overwrite:
        raise OutputError(f"{taken}: exists; nothing was overwritten. Give another --name, or --overwrite")
    number_format = _dtype(dtype, opened.dtype)
    report = _write_proven(adapter, format, target, number_format, info, str(opened.path), verify=verify)
    if format == "webui":
        report = replace(report, files=(*report.files, *write_card(adapter, target, info, image)))
    if lora_folder is not None:
        report = replace(report, files=(*report.files, *_copy_into(lora_folder, report.files)))
    return report


def write_finished(
    adapter: AdapterFile,
    target: Path,
    dtype: Precision | torch.dtype,
    info: FamilyInfo,
    preview: Path | None = None,
    *,
    private: bool = False,
) -> ExportReport:
    """Write a trained adapter in its family's format, proven; replaces what is there.

    What WebUI reads gets a preview and a card.

    Args:
        adapter: fp32 masters, with the header entries of :func:`sdlora.formats.metadata.build_header`.
        target: path of the ``.safetensors`` file.
        dtype: number format of the file.
        info: the base's family.
        preview: image for the card.
        private: leave the settings out of the preview; ``adapter`` brings its own header.

    Raises:
        AdapterFileError: when the written file does not hold the adapter (it is removed then).
        OutputError: when the place cannot be written.
    """
    number_format = _dtype(dtype, torch.float16)
    image = card_image(preview, private=private) if info.adapter_format == "webui" else None
    report = _write_proven(adapter, info.adapter_format, target, number_format, info, "the trained weights")
    if info.adapter_format != "webui":
        return report
    return replace(report, files=(*report.files, *write_card(adapter, target, info, image)))


def open_source(source: Path) -> Source:
    """Read the adapter of a run folder, or an adapter file or folder.

    In a run folder the checkpoint of the last step holds the fp32 masters of the finished file, and is
    taken if it agrees with it; an unfinished run gives its newest checkpoint.

    Raises:
        AdapterFileError: when there is no adapter, or it cannot be read.
        ConfigError: when the run's settings cannot be read.
    """
    run = RunFolder(source)
    if not run.exists():
        adapter = adapter_files.read_adapter(source)
        stem = source.name if source.is_dir() else source.stem
        if stem in _PROGRAM_STEMS and _NAME.match(adapter.info.name):
            stem = adapter.info.name
        sibling = next(
            (source.with_suffix(s) for s in IMAGE_ENDINGS if source.with_suffix(s).is_file()), None
        )
        return Source(adapter, source, stem, own_dtype(adapter.weights), sibling)
    config = load_config(run.config_file)
    adapter, path = _run_adapter(run, config)
    preview = run.newest_preview()
    return Source(adapter, path, config.output.name, DTYPES[config.output.dtype], preview)


def find_lora_folder(folder: Path) -> Path:
    """Return a WebUI's ``models/Lora`` (ComfyUI's ``models/loras``), given its folder or that folder itself.

    Raises:
        OutputError: when it is neither.
    """
    inside = folder / "models" / "Lora"
    for known in (inside, folder / "models" / "loras"):
        if known.is_dir():
            return known
    if folder.is_dir() and folder.name.lower() in ("lora", "loras"):
        return folder
    if (folder / "models").is_dir() and any((folder / file).is_file() for file in ("webui.py", "launch.py")):
        return inside  # WebUI itself makes it at its first start
    state = "is not a WebUI folder" if folder.is_dir() else "is not a folder"
    raise OutputError(
        f"{folder}: {state}; give the folder that holds webui.py and models/, or its models/Lora folder"
    )


def _write_proven(
    adapter: AdapterFile,
    format: str,
    target: Path,
    dtype: torch.dtype,
    info: FamilyInfo,
    source: str,
    *,
    verify: bool = True,
) -> ExportReport:
    """Write under a temporary name, prove, and only then put it in place."""
    with replacing(target) as temporary:
        try:
            written = adapter_files.write_adapter(adapter, format, temporary, dtype, info)
            proof: Proof | None = None
            if verify:
                proof, clients = prove(adapter.weights, temporary, format, dtype, info)
            else:
                clients = support_of(temporary, format, info)
        except AdapterFileError as error:
            raise AdapterFileError(str(error).replace(str(temporary), str(target))) from error
        headers = adapter_files.read_headers(temporary)
        model_hash = data_sha256(headers[0].path, headers[0].data_offset)
        if adapter_files.FORMATS[format].is_folder:
            adapter_files.make_room(target)
    dtype_name = next(name for name, value in DTYPES.items() if value == dtype)
    files = tuple(target / file.relative_to(temporary) if file != temporary else target for file in written)
    return ExportReport(files, format, dtype_name, source, proof, model_hash, clients)


def _run_adapter(run: RunFolder, config: Config) -> tuple[AdapterFile, Path]:
    finished = run.adapter_file(config.output.name)
    checkpoints = [saved for saved in list_checkpoints(run.checkpoints) if saved.adapter_file.is_file()]
    if not finished.is_file():
        if checkpoints:
            path = checkpoints[-1].adapter_file
            return adapter_files.read_adapter(path), path
        raise AdapterFileError(
            f"{run.path}: holds neither {finished.name} nor a checkpoint; train to its first checkpoint"
        )
    adapter = adapter_files.read_adapter(finished)
    steps = adapter.info.metadata.get("ss_steps", "None")
    for checkpoint in checkpoints:
        path = checkpoint.adapter_file
        if str(checkpoint.step) != steps:
            continue
        exact = adapter_files.read_adapter(path).weights
        try:
            compare(exact, adapter.weights, own_dtype(adapter.weights), str(finished))
        except AdapterFileError:
            return adapter, finished  # not the same training: the finished file is what was asked for
        return AdapterFile(exact, adapter.info), path
    return adapter, finished


def _renamed(adapter: AdapterFile, name: str, preferred_strength: float | None) -> AdapterFile:
    entries = dict(adapter.info.metadata)
    if preferred_strength is not None:
        entries["sdlora.preferred_strength"] = f"{preferred_strength:g}"
    return replace(adapter, info=replace(adapter.info, name=name, metadata=entries))


def _family(adapter: AdapterFile, source: Path) -> FamilyInfo:
    family = adapter.info.family
    if family is None:
        raise AdapterFileError(
            f"{source}: does not tell which base model it is for (no cross-attention layers, no header entry "
            "`ss_base_model_version`); export it with the program that trained it"
        )
    if family not in FAMILIES:
        raise AdapterFileError(
            f"{source}: is for the model family `{family}`, which this version cannot export; it knows "
            f"{', '.join(FAMILIES)}"
        )
    return family_info(family)


def _dtype(asked: Precision | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if asked is None:
        return default
    dtype = asked if isinstance(asked, torch.dtype) else DTYPES.get(asked)
    if dtype not in DTYPES.values():
        raise ConfigError(
            f"--dtype {asked}: is not a number format; give one of {', '.join(get_args(Precision))}"
        )
    assert dtype is not None
    return dtype


def _check_name(name: str) -> str:
    if not _NAME.match(name):
        raise ConfigError(
            f'--name {name!r}: must be a plain file name without \\ / : * ? " < > |, not a device of Windows'
        )
    return name


def _target(format: str, output: Path, name: str) -> Path:
    if output.suffix == ".safetensors" and not output.is_dir():
        if adapter_files.FORMATS[format].is_folder:
            raise OutputError(f"{output}: {format} needs a folder; give --output without .safetensors")
        return output
    if output.is_file():
        raise OutputError(f"{output}: is a file, but export needs a folder; choose another --output")
    return output / _TARGETS[format].format(name=name)


def _planned(target: Path, format: str, has_image: bool) -> list[Path]:
    if format != "webui":
        return [target]
    cards = [target.with_suffix(".json")]
    if has_image:
        cards.append(target.with_suffix(".png"))
    return [target, *cards]


def _copy_into(folder: Path, files: Sequence[Path]) -> list[Path]:
    copies = []
    for file in files:
        copy = folder / file.name
        if copy.resolve() == file.resolve():
            continue
        with replacing(copy) as temporary, file.open("rb") as reading, temporary.open("wb") as writing:
            shutil.copyfileobj(reading, writing)
            writing.flush()
            os.fsync(writing.fileno())
        copies.append(copy)
    return copies
