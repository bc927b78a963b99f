"""The facts about each image file, from decoding it in full: on all cores, once for each content.

A truncated file has a perfect header, so only decoding tells. Pillow, hashing and numpy work without
Python's lock, so threads use all cores. The facts are remembered in the index; memory holds one
decoded image a thread, however many files there are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import PIL

from ...files import parse_json
from .image_files import PIXELS_VERSION, decode, read_file
from .index import ImageIndex
from .items import Trait
from .likeness import Likeness, likeness_of
from .listing import FoundFile
from .lookahead import ahead
from .problems import Problem, Unusable
from .sharpness import Detail, detail_of

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) while a folder is read."""

# Raise it when other facts are measured or other files accepted; another Pillow may decode differently.
_FACTS = "2"
_AHEAD = 4  # files that wait for each thread


@dataclass(frozen=True)
class Measured:
    """An image's facts: size in px after EXIF rotation, digest of the bytes, looks."""

    height: int
    width: int
    digest: str
    traits: tuple[Trait, ...]
    likeness: Likeness
    detail: Detail


def measure_all(
    files: Sequence[FoundFile], progress: Progress | None = None, index_file: Path | None = None
) -> list[Measured | Problem]:
    """Return the facts about each file, or why it cannot be used, in the order of ``files``.

    Args:
        files: images to read.
        progress: called after each file.
        index_file: remembers facts between runs; None to read everything.
    """
    measurements: list[Measured | Problem] = []
    workers = max(1, min(32, os.cpu_count() or 1, len(files)))
    version = f"{_FACTS} {PIXELS_VERSION} Pillow {PIL.__version__}"
    with (
        warnings.catch_warnings(),
        ImageIndex(index_file, version) as index,
        ThreadPoolExecutor(workers) as pool,
    ):
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd EXIF and TIFF tags
        for file, status, facts in ahead(_started(files, index, pool), workers * _AHEAD):
            if isinstance(facts, Measured):
                measurements.append(facts)
            else:
                measurements.append(result := facts.result())
                if status and isinstance(result, Measured):
                    index.put(file.path, status, _to_json(result))
            if progress is not None:
                progress(len(measurements), len(files))
    return measurements


def _started(
    files: Sequence[FoundFile], index: ImageIndex, pool: ThreadPoolExecutor
) -> Iterator[tuple[FoundFile, os.stat_result | None, Future[Measured | Problem] | Measured]]:
    """Yield each file with its state before it is read, and its facts or the future that gives them."""
    for file in files:
        status = _status(file.path)
        noted = index.get(file.path, status) if status else None
        known = _from_json(noted) if noted else None
        yield file, status, known or pool.submit(_measure, file)


def _measure(file: FoundFile) -> Measured | Problem:
    try:
        data = read_file(file.path, file.name)
        image, traits = decode(data, file.name, "#ffffff")
    except Unusable as error:
        return error.problem
    digest = hashlib.sha256(data).hexdigest()
    return Measured(image.height, image.width, digest, traits, likeness_of(image), detail_of(image))


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None  # reading it says what is wrong


def _to_json(facts: Measured) -> str:
    return json.dumps(
        {
            "height": facts.height,
            "width": facts.width,
            "digest": facts.digest,
            "traits": facts.traits,
            "hashes": [facts.likeness.bits, facts.likeness.mirrored],
            "thumbnail": base64.b64encode(facts.likeness.thumbnail).decode("ascii"),
            "detail": facts.detail,
        }
    )


def _from_json(text: str) -> Measured | None:
    """Return the facts of an entry of the index; None for one that is damaged, which is measured again."""
    try:
        facts = parse_json(text)
        bits, mirrored = facts["hashes"]
        return Measured(
            facts["height"],
            facts["width"],
            facts["digest"],
            tuple(facts["traits"]),
            Likeness(bits, mirrored, base64.b64decode(facts["thumbnail"])),
            tuple((side, variance) for side, variance in facts["detail"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
