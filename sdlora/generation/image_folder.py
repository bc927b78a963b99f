"""A folder of drawn images: numbered on, and nothing in it is overwritten."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, SdloraError
from ..files import refuse_bad_names, replacing, write_problem
from .png_info import parse_parameters, read_parameters, save_png
from .render import GeneratedImage, GenerateRequest

if TYPE_CHECKING:
    from PIL.Image import Image


def make_folder(folder: Path) -> None:
    """Create the folder for images if it is missing.

    Raises:
        OutputError: when it is a file, or cannot be created.
    """
    if folder.is_file():
        raise OutputError(f"{folder}: is a file, but images need a folder; choose another --output")
    refuse_bad_names(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {write_problem(error)}") from error


def write_numbered(folder: Path, generated: GeneratedImage, text: str) -> Path:
    """Write an image with its settings as ``00001-SEED.png``, with the next free number; return the file."""
    file = _reserve(folder, r"(\d{5,})-\d+\.png", lambda number: f"{number:05d}-{generated.request.seed}.png")
    with _giving_back(file):
        save_png(generated.image, file, text)
    return file


def write_sheet(folder: Path, sheet: Image) -> Path:
    """Write a grid of images as ``grid-0001.png``, with the next free number; return the file."""
    file = _reserve(folder, r"grid-(\d{4,})\.png", lambda number: f"grid-{number:04d}.png")
    with _giving_back(file), replacing(file) as temporary:
        sheet.save(temporary, format="PNG")
    return file


def drawn_before(folder: Path, wanted: Mapping[str, GenerateRequest]) -> dict[str, Path]:
    """Return the images that a folder holds already, by their settings."""
    seeds = {str(request.seed) for request in wanted.values()}
    known = {tuple(parse_parameters(text).items()): text for text in wanted}
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"\d{5,}-(\d+)\.png", file.name)
        if match is None or match[1] not in seeds:
            continue
        with contextlib.suppress(SdloraError):  # a damaged image is drawn again, beside it
            text = known.get(tuple(read_parameters(file).items()))
            if text is not None and opened(file).size == (wanted[text].width, wanted[text].height):
                files.setdefault(text, file)
    return files


def opened(file: Path) -> Image:
    """Return an image that was written here."""
    from ..data.reading.decoding import opened_image

    with opened_image(file) as loaded:
        return loaded.image.convert("RGB")


def _reserve(folder: Path, pattern: str, name: Callable[[int], str]) -> Path:
    """Create an empty file with the number after the highest one; no other process can get the same."""
    try:
        numbers = [int(match[1]) for file in folder.iterdir() if (match := re.fullmatch(pattern, file.name))]
        for number in itertools.count(max(numbers, default=0) + 1):
            file = folder / name(number)
            with contextlib.suppress(FileExistsError):
                file.open("xb").close()
                return file
    except OSError as error:
        raise OutputError(f"{folder}: {write_problem(error)}") from error
    raise AssertionError("numbers do not end")


@contextlib.contextmanager
def _giving_back(file: Path) -> Iterator[None]:
    """Remove a reserved file if it could not be filled."""
    try:
        yield
    except BaseException:
        file.unlink(missing_ok=True)
        raise
