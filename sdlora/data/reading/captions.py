"""Captions as files and names give them: text files, the trigger word, the words of a file's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .image_files import read_file
from .items import CaptionSource
from .problems import Problem, Unusable

CAPTION_ENDINGS = frozenset({".txt", ".caption"})
MAX_CAPTION_BYTES = 64 * 1024


@dataclass(frozen=True)
class Caption:
    """The lines of an image's caption, without trigger word, and where they come from."""

    lines: tuple[str, ...]
    source: CaptionSource


@dataclass(frozen=True)
class CaptionRules:
    """What an image's caption is taken from if there are several possibilities.

    Attributes:
        from_files: whether text and metadata files count; if not, only names do.
        fallback: caption of images without one of their own, instead of the words of their name.
        wordless: whether an empty caption will do, because there is a trigger word.
    """

    from_files: bool = True
    fallback: str | None = None
    wordless: bool = False


def with_trigger(caption: str, trigger_word: str | None) -> str:
    """Return the caption with the trigger word in it, put in front as ``TRIGGER, caption`` if it lacks it."""
    if trigger_word is None or has_word(caption, trigger_word):
        return caption
    return f"{trigger_word}, {caption}" if caption else trigger_word


def has_word(caption: str, word: str) -> bool:
    """Return whether the caption has the word (or phrase) as a whole, in any case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


def words_of(stem: str) -> str:
    """Return the words of a file's stem: ``teapot_small-02`` gives ``teapot small``.

    Counters at the end are dropped, and so are names that cameras and downloads give (``IMG_0123``,
    ``3f2a90bc11d2``): they say nothing about the image.
    """
    words = re.sub(r"[_\-\s]+", " ", stem).strip()
    words = re.sub(r"(\s*\(\d+\)|(^|\s+)\d+)+$", "", words).strip()
    if re.fullmatch(
        r"(img|image|dsc[nf]?|pxl|photo|pict?|picture|scan|screenshot|untitled|unnamed)\d*", words, re.I
    ):
        return ""
    if re.fullmatch(r"(?=.*\d)[0-9a-f]{8,}( [0-9a-f]{4,})*", words, re.I):
        return ""
    return words


def caption_of(
    name: str,
    files: Sequence[tuple[Path, str]],
    metadata: tuple[tuple[str, ...], str] | None,
    folder_words: str | None,
    rules: CaptionRules,
) -> Caption | Problem:
    """Return an image's caption, from the first of: its file, metadata, setting, folder's name, its own name.

    Args:
        name: the image's name from the folder, with forward slashes.
        files: path and name of the caption files beside it.
        metadata: what a metadata file says about it, and where.
        folder_words: what its folder's name says.
        rules: which of these count.
    """
    files, metadata = (files, metadata) if rules.from_files else ((), None)
    if len(files) > 1:
        names = " and ".join(path.name for path, _ in files)
        return Problem("bad caption", name, f"has two caption files, {names}", "delete one of them")
    if files and metadata and metadata[0]:
        what = f"has a caption in {files[0][0].name} and in {metadata[1]}"
        return Problem("bad caption", name, what, "delete one of them")
    if files:
        path, shown = files[0]
        read = _read_caption(path, shown)
        if isinstance(read, Problem):
            return read
        return Caption(read, "txt" if path.suffix.lower() == ".txt" else "caption")
    if metadata and metadata[0]:
        return Caption(metadata[0], "metadata")
    stem = name.rpartition("/")[2].rpartition(".")[0]
    choices: list[tuple[str | None, CaptionSource]] = [
        (rules.fallback, "setting"),
        (folder_words, "folder name"),
    ]
    for text, source in choices:
        if text:
            return Caption((text,), source)
    words = words_of(stem)
    if not words and not rules.wordless:
        what = "has no caption, and its file name says nothing"
        fix = f"write `{stem}.txt` beside it, or set data.trigger_word"
        return Problem("no caption", name, what, fix)
    return Caption((words,) if words else (), "file name")


def _read_caption(path: Path, name: str) -> tuple[str, ...] | Problem:
    try:
        data = read_file(path, name, MAX_CAPTION_BYTES)
    except Unusable as error:
        return replace(error.problem, kind="bad caption")
    fix = "save it as UTF-8 text"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start} is not"
        return Problem("bad caption", name, f"is not UTF-8 text ({hint})", fix)
    if "\0" in text:
        return Problem("bad caption", name, "holds zero bytes, so it is not UTF-8 text", fix)
    return tuple(line.strip() for line in text.splitlines() if line.strip())
