"""Images of a data set deleted, left out, turned, given a focus or a mask; each change can be put back.

What belongs to an image goes with it: its captions, its sidecar and its mask.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.data.check.quarter_turn import turned, turned_image
from sdlora.data.reading.captions import CAPTION_ENDINGS
from sdlora.data.reading.decoding import ImageFileError, decoded_image
from sdlora.data.reading.image_files import IMAGE_ENDINGS, load_alpha, read_file
from sdlora.data.reading.listing import FoundFile
from sdlora.data.reading.metadata_files import MAX_SIDECAR_BYTES, SIDECAR_ENDING, read_focus
from sdlora.data.reading.problems import Problem, Unusable
from sdlora.errors import ConfigError, DatasetError
from sdlora.files import parse_json

from . import image_bin
from .image_bin import EXCLUDED
from .server.allowed_paths import AllowedPaths, PathRefused

MASKS = ".masks"
"""Where the page keeps masks if the settings name no other folder: hidden, so no image of the data set."""
MOST_IMAGES = 10_000
"""Images of one request."""
MAX_MASK_SIDE = 4096
MOST_BYTES = 2**30
"""Of images turned by one request: all are in memory before the first is written."""
Point = tuple[float, float]


class ImageEdits:
    """The changes of images that the page makes. Its methods may be called from any thread."""

    def __init__(self, paths: AllowedPaths) -> None:
        """Change nothing yet."""
        self._paths = paths
        self._lock = threading.Lock()

    def delete(self, folder: Path, names: Sequence[str]) -> int:
        """Move images, with what belongs to them, into the data set's bin; return how many."""
        with self._lock:
            images = self._images(folder, names)
            removed = [name for image in images for name in self._family(folder, image)]
            image_bin.change(folder, f"{_count(images)} deleted", removed=tuple(dict.fromkeys(removed)))
            return len(images)

    def exclude(self, folder: Path, names: Sequence[str]) -> int:
        """Move images where training does not look, with what belongs to them; return how many."""
        with self._lock:
            images = self._images(folder, names)
            moved = {
                name: f"{EXCLUDED}/{name}"
                for image in images
                for name in self._family(folder, image, masks=False)
            }
            _refuse_taken(folder, moved.values())
            image_bin.change(folder, f"{_count(images)} excluded", moved=moved)
            return len(images)

    def include(self, folder: Path, names: Sequence[str]) -> int:
        """Take excluded images back into the data set; return how many.

        Args:
            folder: the data set.
            names: where they were in it.
        """
        with self._lock:
            images = [self._image(folder / EXCLUDED, name) for name in _checked(names)]
            apart = folder / EXCLUDED
            moved = {
                f"{EXCLUDED}/{name}": name
                for image in images
                for name in self._family(apart, image, masks=False)
            }
            _refuse_taken(folder, moved.values())
            image_bin.change(folder, f"{_count(images)} taken back", moved=moved)
            return len(images)

    def excluded(self, folder: Path) -> list[dict[str, Any]]:
        """Return the images that were left out, as ``{"name", "path", "changed"}``."""
        listed, apart = [], folder / EXCLUDED
        for current, folders, names in os.walk(apart):
            folders.sort()
            for name in sorted(names):
                file = Path(current, name)
                if file.suffix.lower() in IMAGE_ENDINGS and not file.is_symlink():
                    changed = file.stat().st_mtime_ns
                    shown = file.relative_to(apart).as_posix()
                    listed.append({"name": shown, "path": str(file), "changed": changed})
        return listed

    def turn(
        self, folder: Path, names: Sequence[str], quarters: int, masks: Path | None = None
    ) -> dict[str, Any]:
        """Turn images clockwise, with their masks and focus.

        Args:
            folder: the data set.
            names: of the images.
            quarters: 1, 2 or 3 quarter turns.
            masks: the folder of masks, inside of the data set; other masks are left alone.

        Returns:
            ``turned``, and ``anew``: the images that were compressed again.
        """
        if quarters not in (1, 2, 3):
            raise ConfigError("turn: give 1, 2 or 3 quarters")
        with self._lock:
            written: dict[str, bytes] = {}
            anew = []
            images = self._images(folder, names)
            if sum(image.stat().st_size for image in images) > MOST_BYTES:
                raise DatasetError(f"{_count(images)}: more than 1 GiB; turn fewer at once")
            for image in images:
                name = _name(folder, image)
                written[name], lossless = turned(_bytes(image), name, quarters)
                if not lossless:
                    anew.append(name)
                if mask := mask_of(masks, name) if masks and masks.is_relative_to(folder) else None:
                    written[_name(folder, mask)] = _png(
                        turned_image(_grey(_bytes(mask), mask.name), quarters)
                    )
                if (focus := self.focus_of(folder, name)) is not None:
                    x, y = focus
                    for _ in range(quarters):
                        x, y = 1 - y, x
                    sidecar = self._sidecar(image)
                    written[_name(folder, sidecar)] = _with_focus(sidecar, (x, y))
            image_bin.change(folder, f"{_count(images)} turned", written=written)
            return {"turned": len(images), "anew": anew}

    def focus_of(self, folder: Path, name: str) -> Point | None:
        """Return the point that an image's crop keeps, None where it is the middle."""
        sidecar = self._sidecar(self._image(folder, name))
        focus = read_focus(sidecar, sidecar.name) if sidecar.is_file() else None
        return None if isinstance(focus, Problem) else focus

    def set_focus(self, folder: Path, name: str, point: Sequence[float] | None) -> None:
        """Say in an image's sidecar which point its crop keeps; None for the middle.

        Raises:
            ConfigError: for a point that is not in the image.
            DatasetError: when there is a sidecar that cannot be read.
        """
        if point is not None and not (len(point) == 2 and all(0 <= float(share) <= 1 for share in point)):
            raise ConfigError("focus: give two numbers from 0 to 1")
        with self._lock:
            image = self._image(folder, name)
            sidecar = self._sidecar(image)
            if point is None and not sidecar.is_file():
                return
            data = _with_focus(sidecar, (float(point[0]), float(point[1])) if point else None)
            image_bin.change(folder, f"focus of {name}", written={_name(folder, sidecar): data})

    def set_mask(self, folder: Path, name: str, png: bytes, masks: Path) -> Path:
        """Write the mask of an image; return its file.

        Args:
            folder: the data set.
            name: of the image.
            png: white where it is trained on, black where not; as large as the image, or in its shape.
            masks: the folder of masks, inside of the data set.

        Raises:
            DatasetError: when it is no image, all black, or of another shape.
            ConfigError: for a folder of masks elsewhere.
        """
        _refuse_elsewhere(folder, masks)
        with self._lock:
            image = self._image(folder, name)
            mask = _grey(png, "mask")
            if max(mask.size) > MAX_MASK_SIDE:
                raise DatasetError(
                    f"mask: has {mask.width} x {mask.height} px; at most {MAX_MASK_SIDE} a side"
                )
            if mask.getextrema() == (0, 0):
                raise DatasetError(
                    "the mask is all black, so nothing would be trained; paint some of it white"
                )
            target = mask_of(masks, name) or _new_mask(masks, name)
            if target.suffix.lower() != ".png":
                raise DatasetError(f"{target.name}: is not a PNG; save it as PNG, or delete it first")
            written = {_name(folder, target): _png(mask)}
            image_bin.change(folder, f"mask of {_name(folder, image)}", written=written)
            return target

    def remove_mask(self, folder: Path, name: str, masks: Path) -> bool:
        """Move an image's mask into the bin; return whether it had one."""
        _refuse_elsewhere(folder, masks)
        with self._lock:
            mask = mask_of(masks, _name(folder, self._image(folder, name)))
            if mask is not None:
                image_bin.change(folder, f"mask of {name} removed", removed=(_name(folder, mask),))
            return mask is not None

    def masks_from_transparency(
        self,
        folder: Path,
        names: Sequence[str],
        masks: Path,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Write a mask for each image that is transparent somewhere and has none; return how many.

        Images that are transparent everywhere are passed over.
        """
        _refuse_elsewhere(folder, masks)
        with self._lock:
            written: dict[str, bytes] = {}
            images = self._images(folder, names)
            for done, image in enumerate(images, start=1):
                name = _name(folder, image)
                alpha = None if mask_of(masks, name) else load_alpha(image)
                if alpha is not None and alpha.getextrema() not in ((0, 0), (255, 255)):
                    written[_name(folder, _new_mask(masks, name))] = _png(alpha)
                if progress is not None:
                    progress(done, len(images))
            if written:
                image_bin.change(folder, f"{len(written)} masks from transparency", written=written)
            return len(written)

    def _images(self, folder: Path, names: Sequence[str]) -> list[Path]:
        return [self._image(folder, name) for name in _checked(names)]

    def _image(self, folder: Path, name: str) -> Path:
        """Return the path of an image of a folder.

        Raises:
            DatasetError: when it is something else, or a link.
            PathRefused: when its real place is not in the folder.
        """
        path = folder / name
        real = self._paths.writable(path)
        inside = real.is_relative_to(folder) and real == path
        if path.is_symlink() or not inside:
            raise PathRefused(
                f"{name}: is a link, or lies elsewhere; the page changes only files of the folder"
            )
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in IMAGE_ENDINGS:
            raise DatasetError(f"{name}: is not an image of this folder")
        if not path.is_file():
            raise DatasetError(f"{name}: there is no such image (any more); open the folder again")
        return path

    def _family(self, folder: Path, image: Path, *, masks: bool = True) -> Iterator[str]:
        """Yield the names of an image and of what belongs to it alone."""
        yield _name(folder, image)
        itself, others = FoundFile(image, image.name), 0
        beside = []
        for path in sorted(image.parent.iterdir()):
            file, ending = FoundFile(path, path.name), path.suffix.lower()
            others += path != image and ending in IMAGE_ENDINGS and file.key == itself.key
            if ending in CAPTION_ENDINGS and file.key in (itself.key, itself.whole_key):
                beside.append(path)
            if ending == SIDECAR_ENDING and file.key == itself.key:
                beside.append(path)
        mask = mask_of(folder / MASKS, _name(folder, image)) if masks else None
        if not others:  # two images of one stem share them
            yield from (_name(folder, path) for path in beside if path.is_file() and not path.is_symlink())
            if mask is not None:
                yield _name(folder, mask)

    def _sidecar(self, image: Path) -> Path:
        key = FoundFile(image, image.name).key
        for path in sorted(image.parent.iterdir()):
            if path.suffix.lower() == SIDECAR_ENDING and FoundFile(path, path.name).key == key:
                if path.is_symlink():
                    raise PathRefused(f"{path.name}: is a link; the page changes only files of the folder")
                return path
        return image.with_suffix(SIDECAR_ENDING)


def mask_folder(folder: Path, named: Path | None) -> Path:
    """Return the folder of masks of a data set: the one that the settings name, else its hidden one."""
    return named if named is not None else folder / MASKS


def mask_of(masks: Path | None, name: str) -> Path | None:
    """Return the mask of an image, None where it has none.

    Args:
        masks: the folder of masks.
        name: of the image, from its own folder, with forward slashes.
    """
    if masks is None:
        return None
    place = masks / Path(name).parent
    key = FoundFile(place, Path(name).name).key
    if not place.is_dir():
        return None
    for path in sorted(place.iterdir()):
        if (
            path.suffix.lower() in IMAGE_ENDINGS
            and FoundFile(path, path.name).key == key
            and not path.is_symlink()
        ):
            return path
    return None


def _new_mask(masks: Path, name: str) -> Path:
    return (masks / name).with_suffix(".png")


def _refuse_elsewhere(folder: Path, masks: Path) -> None:
    if not masks.is_relative_to(folder):
        raise ConfigError(f"{masks}: lies outside of the data set; the page writes masks only inside of it")
    if masks.is_symlink():
        raise ConfigError(f"{masks}: is a link; the page changes only files of the folder")


def _refuse_taken(folder: Path, names: Any) -> None:
    for name in names:
        if (folder / name).exists():
            raise DatasetError(f"{name}: is there already; rename one of them")


def _checked(names: Sequence[str]) -> list[str]:
    wanted = list(dict.fromkeys(names))
    if not wanted:
        raise DatasetError("choose an image first")
    if len(wanted) > MOST_IMAGES:
        raise DatasetError(f"{len(wanted)} images: change at most {MOST_IMAGES} at once")
    return wanted


def _count(images: Sequence[Path]) -> str:
    return images[0].name if len(images) == 1 else f"{len(images)} images"


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _bytes(file: Path) -> bytes:
    try:
        return read_file(file, file.name)
    except Unusable as error:
        raise DatasetError(str(error)) from error


def _grey(data: bytes, name: str) -> Image.Image:
    try:
        with decoded_image(data, name) as loaded:
            return loaded.image.convert("L")
    except ImageFileError as error:
        raise DatasetError(str(error)) from error


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _with_focus(sidecar: Path, point: Point | None) -> bytes:
    """Return a sidecar's text with another focus, all else in it kept."""
    held: Any = {}
    if sidecar.is_file():
        try:
            held = parse_json(read_file(sidecar, sidecar.name, MAX_SIDECAR_BYTES).decode("utf-8-sig"))
        except (ValueError, Unusable) as error:
            raise DatasetError(
                f"{sidecar.name}: cannot be read ({error}); correct it, or delete it"
            ) from None
        if not isinstance(held, dict):
            raise DatasetError(f"{sidecar.name}: is not a JSON object; correct it, or delete it")
    held.pop("focus", None)
    if point is not None:
        held["focus"] = [round(point[0], 4), round(point[1], 4)]
    return (json.dumps(held, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
