"""From a captioner's name (a folder, an ``.onnx`` file, a hub id) to its files here, and what it is.

Of a hub model only safetensors, ONNX, JSON and text files are fetched, into the hub's usual cache; no code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image

from ...errors import ModelError
from ...families.locating import CODE_SUFFIXES, is_hub_id
from ...files import parse_json

MAX_CONFIG_BYTES = 16 * 2**20
_TEXTS = (".json", ".txt", ".model", ".jinja")
_LISTS = ("selected_tags.csv", "tags.csv", "selected_tags.txt", "top_tags.txt", "tags.txt")


class Captioner(Protocol):
    """A model that says what images show.

    Attributes:
        name: for people.
        batch_size: how many images it takes at a time.
    """

    name: str
    batch_size: int

    def describe(self, images: Sequence[Image.Image]) -> list[list[str]]:
        """Return for each upright RGB image its tags, or one text."""

    def close(self) -> None:
        """Free the model's memory."""


@dataclass(frozen=True)
class TaggerFiles:
    """A tagger in ONNX and its list of tags."""

    model: Path
    tags: Path
    config: Path | None


@dataclass(frozen=True)
class ImageTextFiles:
    """A folder with a model of transformers."""

    folder: Path


def locate_captioner(name: str, tags: Path | None = None) -> TaggerFiles | ImageTextFiles:
    """Return the files of a captioner.

    Args:
        name: a folder, an ``.onnx`` file or a hub id.
        tags: list of tags of a tagger, if it does not lie beside it under a usual name.

    Raises:
        ModelError: when there is no such model, or it is of a kind that is not read.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() in CODE_SUFFIXES:
        raise ModelError(
            f"{name}: {path.suffix} files can run code when opened and are not read; use safetensors"
        )
    if path.is_file():
        if path.suffix.lower() != ".onnx":
            raise ModelError(f"{name}: is not an .onnx file; give a tagger's .onnx file or a model's folder")
        return _tagger(path, tags)
    if path.is_dir():
        return _in_folder(path, name, tags)
    if is_hub_id(name):
        return _in_folder(_from_hub(name), name, tags)
    raise ModelError(
        f"{name}: no such captioner; give a folder, a tagger's .onnx file, or a hub id (owner/name)"
    )


def read_config(file: Path) -> dict[str, Any]:
    """Return a model's JSON settings.

    Raises:
        ModelError: when they cannot be read, or are too large.
    """
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{file}: has more than 16 MiB, which no settings have")
        value = parse_json(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ModelError(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: is not a JSON object")
    return value


def _in_folder(folder: Path, name: str, tags: Path | None) -> TaggerFiles | ImageTextFiles:
    """Return the model in a folder; one with a list of tags beside an ``.onnx`` file is a tagger."""
    models = sorted(folder.glob("*.onnx"), key=lambda file: (file.name != "model.onnx", file.name))
    if models and (tags is not None or _list_beside(models[0]) is not None):
        return _tagger(models[0], tags)
    if not (folder / "config.json").is_file():
        what = f"holds {models[0].name}, but no list of its tags" if models else "holds no config.json"
        raise ModelError(
            f"{name}: {what}; give the folder of a transformers model (config.json, *.safetensors), or of a "
            "tagger (model.onnx, selected_tags.csv)"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{name}: is an adapter of another model; give the folder of a whole model")
    _refuse_code(folder, name)
    return ImageTextFiles(folder)


def _refuse_code(folder: Path, name: str) -> None:
    """Refuse a model that is not safetensors, or whose settings name code of the hub."""
    if not any(folder.glob("*.safetensors")):
        held = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in CODE_SUFFIXES)
        what = f"only {held[0]}, which can run code when opened" if held else "no weights"
        raise ModelError(f"{name}: holds {what}; use a version of the model with .safetensors weights")
    for file in sorted(folder.glob("*.json")):
        if file.name in ("config.json", "generation_config.json", "processor_config.json"):
            for key, value in _pairs(read_config(file)):
                if key.endswith("implementation") and isinstance(value, str) and "/" in value:
                    raise ModelError(
                        f"{name}: {file.name} asks for code of the hub ({key} {value}); none is run"
                    )


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield from ((str(key), inside) for key, inside in part.items())
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _tagger(model: Path, tags: Path | None) -> TaggerFiles:
    tag_list = tags or _list_beside(model)
    if tag_list is None or not tag_list.is_file():
        looked = tag_list or f"{', '.join(_LISTS[:2])} or {model.stem}.csv beside it"
        raise ModelError(f"{model}: the list of its tags is missing ({looked}); name it with --tag-list FILE")
    config = model.with_name("config.json")
    return TaggerFiles(model, tag_list, config if config.is_file() else None)


def _list_beside(model: Path) -> Path | None:
    names = (f"{model.stem}.csv", *_LISTS)
    return next((file for name in names if (file := model.with_name(name)).is_file()), None)


def _from_hub(source: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(source, local_files_only=True))
        names = HfApi().list_repo_files(source)
        return Path(snapshot_download(source, allow_patterns=wanted_files(names)))
    except Exception as error:
        try:
            return Path(snapshot_download(source, local_files_only=True))
        except Exception:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"{source}: neither a path here nor a model that the hub gives ({reason}); check the "
                "spelling and the network, or give a local folder"
            ) from error


def wanted_files(names: Sequence[str]) -> list[str]:
    """Return the files of a hub model that are read: a tagger and its list, or safetensors and texts."""
    top = [name for name in names if "/" not in name]
    models = [name for name in top if name.endswith(".onnx")]
    lists = [name for name in top if name in _LISTS or PurePosixPath(name).suffix == ".csv"]
    if models and lists:
        model = "model.onnx" if "model.onnx" in models else models[0]
        beside = (f"{model}_data", f"{model}.data")
        return [name for name in top if name in (model, *beside, "config.json") or name in lists]
    return [name for name in top if name.endswith((*_TEXTS, ".safetensors"))]
