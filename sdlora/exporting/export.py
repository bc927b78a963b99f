"""Exporting adapters, with proof: every file is read back and compared before it gets its name.

Also what goes beside a file for WebUI: the preview image and the card with the trigger words.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters.canonical import AdapterFile
from ..config.schema import Config, Precision
from ..config.toml import load_config
from ..errors import AdapterFileError, ConfigError, OutputError
from ..files import name_problem, refuse_bad_names, replacing
from ..formats import adapter_files, dropping
from ..formats.clients import Support
from ..formats.detection import known_family, stated_family
from ..formats.folding import own_dtype
from ..formats.privacy import without_private
from ..formats.proof import Proof, Written, compare, write_proven
from ..formats.table import FORMATS, find_format
from ..number_formats import dtype_name, dtype_of
from ..run_folder import IMAGE_ENDINGS, RunFolder, list_checkpoints
from .webui_card import card_image, other_preview, write_card

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo

_PROGRAM_STEMS = {"adapter", "adapter_model", "pytorch_lora_weights"}


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
        problems: with what lies beside the adapter.
        notes: what was left out.
    """

    files: tuple[Path, ...]
    format: str
    dtype: str
    source: str
    proof: Proof | None
    model_hash: str
    clients: tuple[Support, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def adapter(self) -> Path:
        """The adapter's own file, or its folder for PEFT."""
        return self.files[0].parent.parent if FORMATS[self.format].is_folder else self.files[0]

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
            "notes": list(self.notes),
            "clients": {support.client: list(support.reasons) or "full" for support in self.clients},
        }


@dataclass(frozen=True)
class Source:
    """An adapter to export, with what the files around it say.

    Attributes:
        adapter: the most exact numbers that exist of it.
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
    drop: Sequence[str] = (),
    verify: bool = True,
    family: str | None = None,
) -> ExportReport:
    """Write an adapter in a format, with preview and card for ``webui``, and prove that it is right.

    Args:
        source: a run folder, or an adapter file or folder of any format.
        format: a key of :data:`sdlora.formats.table.FORMATS`.
        output: folder to write into, or a path ending in ``.safetensors`` for the file itself; may be left
            out when ``webui_folder`` is given.
        dtype: number format; the run's setting, or the source's own, when None.
        preview: image for the card; the run's newest sample when None.
        webui_folder: a WebUI's own folder, or its ``models/Lora``, to put the files into as well.
        overwrite: replace files that exist.
        name: of the adapter; the run's or the source file's own when None.
        preferred_strength: strength that looks best, for the card; the source's own when None.
        private: leave out what describes the training images (folder names, captions, tags, file names).
        drop: kinds of layers that are left out; see :func:`sdlora.formats.dropping.words`.
        verify: load the file through our reader, diffusers and PEFT and compare every update.
        family: what the adapter is for, where it does not tell.

    Raises:
        AdapterFileError: when the source cannot be read, or the proof fails (nothing is left then).
        OutputError: when a file exists, or the place cannot be written.
        ConfigError: for an unknown format, number format or name.
    """
    lora_folder = _lora_folder(format, webui_folder)
    place = output or lora_folder
    if place is None:
        raise ConfigError("export needs a place: give --output DIR (or --webui DIR)")
    opened = open_source(source)
    chosen = _check_name(opened.name if name is None else name)
    whole, notes = dropping.without(source, opened.adapter, drop)
    alias = name or _name_by_hand(output) or opened.adapter.info.name or chosen
    adapter = _renamed(whole, alias, preferred_strength)
    stated = stated_family(source, adapter.weights, adapter.info.family, family)
    info, adapter = known_family(source, stated), replace(adapter, info=replace(adapter.info, family=stated))
    adapter = _shareable(adapter) if private else adapter
    target = _target(format, place, chosen)
    image = _image_for(format, target, preview or opened.preview, private)
    _refuse_taken(format, target, image is not None, lora_folder, overwrite)
    written = write_proven(adapter, format, target, _dtype(dtype, opened.dtype), info, verify=verify)
    report = replace(_report(written, format, _dtype(dtype, opened.dtype), str(opened.path)), notes=notes)
    if FORMATS[format].has_card:
        report = replace(report, files=(*report.files, *write_card(adapter, target, info, image)))
    if lora_folder is not None:
        report = replace(report, files=(*report.files, *_copy_into(lora_folder, report.files)))
    return report


def _name_by_hand(output: Path | None) -> str | None:
    """Return the name of a file that was named by hand; with another alias, two files would share one."""
    return output.stem if output is not None and output.suffix == ".safetensors" else None


def _shareable(adapter: AdapterFile) -> AdapterFile:
    """Return an adapter whose header does not describe the training images."""
    kept = without_private(adapter.info.metadata)
    return replace(adapter, info=replace(adapter.info, metadata=kept))


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

    What WebUI reads gets a preview and a card; if these cannot be written, the report says so.

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
    number_format, format = _dtype(dtype, torch.float16), info.adapter_format
    image = card_image(preview, private=private) if FORMATS[format].has_card else None
    written = write_proven(adapter, format, target, number_format, info)
    report = _report(written, format, number_format, "the trained weights")
    if not FORMATS[format].has_card:
        return report
    try:
        return replace(report, files=(*report.files, *write_card(adapter, target, info, image)))
    except OutputError as error:  # the adapter itself is there, and proven
        return replace(report, problems=(f"the card beside the adapter is missing: {error}",))


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
        if stem in _PROGRAM_STEMS and name_problem(adapter.info.name) is None:
            stem = adapter.info.name
        sibling = next(
            (source.with_suffix(s) for s in IMAGE_ENDINGS if source.with_suffix(s).is_file()), None
        )
        return Source(adapter, source, stem, own_dtype(adapter.weights), sibling)
    config = load_config(run.config_file)
    adapter, path = _run_adapter(run, config)
    preview = run.newest_preview()
    return Source(adapter, path, config.output.name, dtype_of(config.output.dtype), preview)


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


def _report(written: Written, format: str, dtype: torch.dtype, source: str) -> ExportReport:
    return ExportReport(
        written.files, format, dtype_name(dtype), source, written.proof, written.model_hash, written.clients
    )


def _lora_folder(format: str, webui_folder: Path | None) -> Path | None:
    """Return a WebUI's folder for adapters, if one was named, after checking the format.

    Raises:
        ConfigError: for an unknown format, or one that WebUI does not read.
        OutputError: when it is not a WebUI folder.
    """
    has_card = find_format(format).has_card
    if webui_folder is None:
        return None
    if not has_card:
        raise ConfigError(f"--format {format}: WebUI reads only its own format; give --format webui")
    return find_lora_folder(webui_folder)


def _image_for(format: str, target: Path, preview: Path | None, private: bool) -> bytes | None:
    """Return the image for the card; None if it gets none, or has a preview under another name already."""
    if not FORMATS[format].has_card:
        return None
    image = card_image(preview, private=private)
    return None if other_preview(target) is not None else image


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


def _dtype(asked: Precision | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if asked is None:
        return default
    return asked if isinstance(asked, torch.dtype) else dtype_of(asked)


def _check_name(name: str) -> str:
    if problem := name_problem(name):
        raise ConfigError(f"--name {name!r}: {problem}; give the name of a file without its ending")
    return name


def _target(format: str, output: Path, name: str) -> Path:
    if output.suffix == ".safetensors" and not output.is_dir():
        if FORMATS[format].is_folder:
            raise OutputError(f"{output}: {format} needs a folder; give --output without .safetensors")
        return output
    if output.is_file():
        raise OutputError(f"{output}: is a file, but export needs a folder; choose another --output")
    file_name = FORMATS[format].file_name
    assert file_name is not None
    return output / file_name.format(name=name)


def _refuse_taken(
    format: str, target: Path, has_image: bool, lora_folder: Path | None, overwrite: bool
) -> None:
    """Refuse files that exist, unless they are to be replaced, and names that not every system takes."""
    refuse_bad_names(target)
    planned = [target]
    if FORMATS[format].has_card:
        planned += [target.with_suffix(ending) for ending in (".json", *((".png",) if has_image else ()))]
    if lora_folder is not None:
        planned += [lora_folder / file.name for file in planned if file.parent != lora_folder]
    taken = next((file for file in planned if file.exists()), None)
    if taken is not None and not overwrite:
        raise OutputError(f"{taken}: exists; nothing was overwritten. Give another --name, or --overwrite")


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
