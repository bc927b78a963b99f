"""Which files of a folder are images and captions, in an order that depends on names only."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DatasetError, without_controls
from ...files import is_text
from ...run_folder import RunFolder, was_run
from .captions import CAPTION_ENDINGS
from .image_files import IMAGE_ENDINGS, UNREAD_IMAGE_ENDINGS
from .metadata_files import METADATA_NAMES, SIDECAR_ENDING
from .problems import Problem

_UTILITY_FOLDERS = frozenset({"__macosx", "@eadir"})  # thumbnails and forks left by macOS and Synology
_ARCHIVES = frozenset({".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".xz"})
_USED_ENDINGS = IMAGE_ENDINGS | CAPTION_ENDINGS | {SIDECAR_ENDING}
_NOT_CAPTIONS = frozenset(
    {"readme", "license", "licence", "notice", "copying", "authors", "changelog", "sources"}
)


@dataclass(frozen=True)
class FoundFile:
    """A file, and its path from the folder with forward slashes."""

    path: Path
    name: str

    @property
    def key(self) -> tuple[str, str]:
        """Folder and stem without case: what an image and its caption file share on every system."""
        folder, _, base = self.name.rpartition("/")
        return folder, unicodedata.normalize("NFC", base.rpartition(".")[0]).casefold()

    @property
    def whole_key(self) -> tuple[str, str]:
        """Folder and name without case: what ``cup.png`` shares with a caption called ``cup.png.txt``."""
        folder, _, base = self.name.rpartition("/")
        return folder, unicodedata.normalize("NFC", base).casefold()


@dataclass(frozen=True)
class Listing:
    """The files of a folder by their use, and what was not taken."""

    images: list[FoundFile]
    captions: dict[tuple[str, str], list[FoundFile]]
    problems: list[Problem]
    notes: list[str]
    others: Counter[str]
    folders: list[str]
    metadata: list[FoundFile]
    sidecars: dict[tuple[str, str], FoundFile]

    def captions_of(self, image: FoundFile) -> list[tuple[Path, str]]:
        """Return path and name of the caption files that share an image's stem, else its whole name."""
        files = self.captions.get(image.key) or self.captions.get(image.whole_key, [])
        return [(file.path, file.name) for file in files]

    def metadata_files(self) -> list[tuple[Path, str]]:
        """Return path and name of the metadata files."""
        return [(file.path, file.name) for file in self.metadata]

    def orphans(self) -> Iterator[str]:
        """Yield the caption files without an image; texts about the folder itself do not count."""
        imaged = {image.key if image.key in self.captions else image.whole_key for image in self.images}
        for key in sorted(set(self.captions) - imaged):
            if key[1] not in _NOT_CAPTIONS:
                yield from (file.name for file in self.captions[key])


def list_files(
    root: Path, recursive: bool, left_out: Sequence[Path] = (), *, follow_links: bool = False
) -> Listing:
    """Return the files in a folder, and in the folders inside it if ``recursive``, but not in ``left_out``.

    The folder itself may be a link. Links inside that lead out of it are problems, unless ``follow_links``:
    what a data set shows on a page, or brings into a file, is then what lies in its folder. A link to nothing
    is passed over with a note, where it is called like an image.

    Raises:
        DatasetError: when the folder is missing or is a file.
    """
    if not root.exists():
        address = str(root).startswith(("http:", "https:"))
        raise DatasetError(f"{root}: no such folder; {'download it first' if address else 'check the path'}")
    if root.suffix.lower() in _ARCHIVES and not root.is_dir():
        raise DatasetError(f"{root}: is an archive; unpack it, and give the folder")
    if not root.is_dir():
        raise DatasetError(f"{root}: is a file where a folder of images is needed; give the folder it is in")
    listing = Listing([], {}, [], [], Counter(), [], [], {})
    unread: Counter[str] = Counter()
    seen: set[str] = set()
    bounds = None if follow_links else Path(os.path.realpath(root))
    apart = {os.path.realpath(folder) for folder in left_out}

    def refused(error: OSError) -> None:
        where = _relative(Path(error.filename), root) or str(root)
        fix = "change its permissions or move it out"
        listing.problems.append(Problem("unreadable", where, f"cannot be opened ({error.strerror})", fix))

    for current, folders, names in os.walk(root, onerror=refused, followlinks=True):
        here, real = Path(current), os.path.realpath(current)
        if real in apart:
            folders[:] = []
            continue
        if bounds is not None and not Path(real).is_relative_to(bounds):
            listing.problems.append(_leads_out(_relative(here, root)))
            folders[:] = []
            continue
        if real in seen:  # links that form a circle, or two links to one place
            listing.notes.append(f"{_relative(here, root)}/: leads to a folder already read; taken once")
            folders[:] = []
            continue
        seen.add(real)
        files = [FoundFile(here / name, _relative(here / name, root)) for name in names]
        _sort_files(listing, [file for file in files if _stays(file, bounds, listing)], unread)
        wanted = _folders_to_enter(here, root, folders, listing)
        listing.folders.extend(_relative(here / name, root) for name in wanted)
        folders[:] = wanted if recursive else []
    listing.images.sort(key=lambda file: sort_key(file.name))
    for ending, count in sorted(unread.items()):
        listing.notes.append(f"{count} {ending} file(s) are not read; convert them to PNG to use them")
    return listing


def _sort_files(listing: Listing, files: Iterable[FoundFile], unread: Counter[str]) -> None:
    for file in sorted(files, key=lambda file: sort_key(file.name)):
        ending = file.path.suffix.lower()
        if file.path.name.startswith(".") or _unprintable(file.path, file.name, listing):
            continue
        if ending in IMAGE_ENDINGS:
            listing.images.append(file)
        elif ending in CAPTION_ENDINGS:
            listing.captions.setdefault(file.key, []).append(file)
        elif file.path.name in METADATA_NAMES:
            listing.metadata.append(file)
        elif ending == SIDECAR_ENDING:
            listing.sidecars[file.key] = file
        if ending not in IMAGE_ENDINGS:
            listing.others[ending or "files without ending"] += 1
        if ending in UNREAD_IMAGE_ENDINGS:
            unread[ending] += 1


def _stays(file: FoundFile, bounds: Path | None, listing: Listing) -> bool:
    """Return whether a file that would be used is there, and inside the folder; say so if it is not."""
    ending, path = file.path.suffix.lower(), file.path
    used = ending in _USED_ENDINGS or path.name in METADATA_NAMES
    if not used or path.name.startswith(".") or not path.is_symlink():
        return True
    if ending in IMAGE_ENDINGS and not os.path.exists(path):
        listing.notes.append(f"{file.name}: is a link to nothing, and passed over")
        return False
    if bounds is None or Path(os.path.realpath(path)).is_relative_to(bounds):
        return True
    listing.problems.append(_leads_out(file.name))
    return False


def _leads_out(name: str) -> Problem:
    fix = "put what it leads to in its place, or set data.follow_links=true"
    return Problem("unreadable", name, "is a link that leads out of the folder", fix)


def _folders_to_enter(here: Path, root: Path, names: Iterable[str], listing: Listing) -> list[str]:
    """Return the folders with data, without those that a run of ours or the operating system wrote."""
    wanted = []
    inside_run = was_run(here)
    for name in sorted(names, key=sort_key):
        relative = _relative(here / name, root)
        if name.startswith(".") or name.casefold() in _UTILITY_FOLDERS:
            continue
        if _unprintable(here / name, relative, listing):
            continue
        if was_run(here / name) or (
            inside_run and here / name in (RunFolder(here).samples, RunFolder(here).checkpoints)
        ):
            listing.notes.append(f"{relative}/: left out, it was written by a training run")
        elif Path(name).suffix.lower() in CAPTION_ENDINGS:
            fix = "rename the folder, or put a text file in its place"
            what = "is a folder where a caption file is expected"
            listing.problems.append(Problem("bad caption", relative, what, fix))
        else:
            wanted.append(name)
    return wanted


def _unprintable(path: Path, name: str, listing: Listing) -> bool:
    """Report a name that is not UTF-8: it could be neither shown nor written into a file."""
    if is_text(path.name):
        return False
    listing.problems.append(Problem("unreadable", name, "has a name that is not UTF-8", "rename it"))
    return True


def no_images(folder: Path, listing: Listing, recursive: bool) -> str:
    """Return why a folder yields nothing, and what to do."""
    for name in () if recursive else listing.folders:
        if any(path.suffix.lower() in IMAGE_ENDINGS for path in (folder / name).rglob("*")):
            return (
                f"{folder}: holds no images itself, but the folder `{name}` in it does; "
                "set data.recursive=true or give that folder"
            )
    held = [f"{count} {ending}" for ending, count in sorted(listing.others.items())]
    held += [f"{len(listing.folders)} folder(s)"] if listing.folders else []
    if any(ending in _ARCHIVES for ending in listing.others):
        held.append("which can be unpacked")
    endings = ", ".join(sorted(ending.lstrip(".") for ending in IMAGE_ENDINGS))
    what = f"holds no images, only {', '.join(held)}" if held else "is empty"
    return "; ".join([f"{folder}: {what}", *listing.notes, f"put images there ({endings})"])


def clashes(listing: Listing) -> list[Problem]:
    """Return images whose names differ only in the ending, and which would share a caption."""
    by_key: dict[tuple[str, str], list[str]] = {}
    for image in listing.images:
        by_key.setdefault(image.key, []).append(image.name)
    what, fix = "have one stem and would share a caption", "rename one of them"
    return [
        Problem("name clash", " and ".join(names), what, fix) for names in by_key.values() if len(names) > 1
    ]


def _relative(path: Path, root: Path) -> str:
    name = "" if path == root else path.relative_to(root).as_posix()
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")  # names that are not UTF-8
    return without_controls(text).replace(
        "\n", "\\n"
    )  # a name may hold commands for the terminal that shows it


def sort_key(name: str) -> tuple[str, str]:
    """Return the key that names are sorted by, the same on every system."""
    return unicodedata.normalize("NFC", name).casefold(), name
