"""Tags of a whole folder counted and changed: replaced, removed, added, sorted, pruned.

Tags are the comma-separated parts of a caption. ``Long_Hair`` and ``long hair`` are one tag.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import ConfigError, DatasetError
from ..reading.captions import words_of
from ..reading.problems import Problem
from .caption_files import CaptionFolder
from .restore import recording
from .wording import tag_key, tags_of

Sorting = Literal["name", "frequency"]
MAX_IMPLICATIONS_BYTES = 64 * 2**20
_MOST_WORDS = 16  # of a tag; longer parts are sentences, which imply no tag
_NEGATIONS = frozenset({"no", "not", "without", "fake", "non"})
_LEFT, _RIGHT = ("antecedent_name", "tag", "from"), ("consequent_name", "implies", "to")


@dataclass(frozen=True)
class TagEdit:
    """What is done with the tags, in this order.

    Attributes:
        replace: tag -> what stands in its place (several tags if it holds commas; none if it is empty).
        remove: tags that go.
        add: tags that are put behind the others where they are missing.
        add_first: tags that are put in front where they are missing.
        once: keep only the first of equal tags.
        prune: leave out tags that another tag of the caption implies: those it ends with (``white shirt``
            implies ``shirt``), and those of ``implications``.
        implications: tag -> the tags that it implies.
        sort: by name, or the tags of most captions first.
        keep_first: how many tags stay in front whatever the sorting and pruning.
    """

    replace: Mapping[str, str] = field(default_factory=dict)
    remove: Collection[str] = ()
    add: Sequence[str] = ()
    add_first: Sequence[str] = ()
    once: bool = False
    prune: bool = False
    implications: Mapping[str, Collection[str]] = field(default_factory=dict)
    sort: Sorting | None = None
    keep_first: int = 0

    @property
    def changes_nothing(self) -> bool:
        """Whether no operation is asked for."""
        return not any(
            (self.replace, self.remove, self.add, self.add_first, self.once, self.prune, self.sort)
        )

    def of(self, tags: Sequence[str], counts: Mapping[str, int]) -> list[str]:
        """Return the tags of one caption after the edit.

        Args:
            tags: of the caption.
            counts: in how many captions each tag is, by its :func:`tag_key`.
        """
        put = {tag_key(old): tags_of(new) for old, new in self.replace.items()}
        gone = {tag_key(tag) for tag in self.remove}
        new = [part for tag in tags for part in put.get(tag_key(tag), [tag])]
        new = [tag for tag in new if tag_key(tag) not in gone]
        present = {tag_key(tag) for tag in new}
        new = [
            *(tag for tag in self.add_first if tag_key(tag) not in present),
            *new,
            *(tag for tag in self.add if tag_key(tag) not in present),
        ]
        if self.once:
            firsts: dict[str, str] = {}
            for tag in new:
                firsts.setdefault(tag_key(tag), tag)
            new = list(firsts.values())
        first, rest = new[: self.keep_first], new[self.keep_first :]
        if self.prune:
            implied = _implied(new, self.implications)
            rest = [tag for tag in rest if tag_key(tag) not in implied]
        if self.sort == "name":
            rest.sort(key=tag_key)
        elif self.sort == "frequency":
            rest.sort(key=lambda tag: (-counts.get(tag_key(tag), 0), tag_key(tag)))
        return [*first, *rest]


@dataclass(frozen=True)
class TagChange:
    """One image whose caption changes: its lines before and after."""

    image: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class TagFolder:
    """The tags of a folder's captions.

    Attributes:
        num_captions: images with a written caption.
        counts: tag, as it is first written -> in how many captions it is, the commonest first.
        notes: captions that cannot be read, and what was passed over.
    """

    def __init__(
        self,
        folder: Path,
        *,
        recursive: bool = True,
        follow_links: bool = False,
        column: str | None = None,
        bare: bool = False,
    ) -> None:
        """Read the captions; see :class:`sdlora.data.captioning.caption_files.CaptionFolder`.

        Args:
            folder: the data set.
            recursive: also look into folders inside.
            follow_links: also take what links lead to outside the folder.
            column: of a metadata file with the caption; the first known one when None.
            bare: images without a written caption count as captioned by the words of their file name, as
                training does; a change writes them a caption.

        Raises:
            DatasetError: when the folder cannot be read, or holds no images or no captions.
        """
        self._captions = CaptionFolder(folder, recursive=recursive, follow_links=follow_links, column=column)
        self.folder, self.notes = self._captions.folder, list(self._captions.notes)
        self._lines: dict[str, tuple[str, ...]] = {}
        for image in self._captions.images:
            written = self._captions.written(image)
            if isinstance(written, Problem):
                self.notes.append(str(written))
            elif written is not None:
                self._lines[image.name] = written.lines
            elif bare:
                words = words_of(image.path.stem)
                self._lines[image.name] = (words,) if words else ()
        if not self._lines:
            raise DatasetError(f"{folder}: no image has a caption yet; write some, or use `sdlora caption`")
        self.num_captions = len(self._lines)
        written_as: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        for lines in self._lines.values():
            tags = [tag for line in lines for tag in tags_of(line)]
            self._counts.update({tag_key(tag) for tag in tags})
            for tag in tags:
                written_as.setdefault(tag_key(tag), tag)
        by_count = sorted(self._counts.items(), key=lambda pair: (-pair[1], pair[0]))
        self.counts = {written_as[key]: count for key, count in by_count}

    def changes(self, edit: TagEdit) -> list[TagChange]:
        """Return the images whose captions an edit changes; nothing is written."""
        changed = []
        for name, lines in self._lines.items():
            after = tuple(
                line if (new := edit.of(tags_of(line), self._counts)) == tags_of(line) else ", ".join(new)
                for line in lines
            )
            if not lines and (added := edit.of([], self._counts)):
                after = (", ".join(added),)
            if after != lines:
                changed.append(TagChange(name, lines, tuple(line for line in after if line)))
        return changed

    def apply(self, changes: Sequence[TagChange], what: str) -> list[str]:
        """Write changed captions; return why some could not be written.

        Args:
            changes: as :meth:`changes` gave them.
            what: the edit in words, for undoing.

        Raises:
            OutputError: when the folder may not be written, or the disk is full.
        """
        images = {image.name: image for image in self._captions.images}
        if not changes:
            return []
        with recording(self.folder, what, {}) as recorder:
            wanted = {images[change.image]: change.after for change in changes}
            problems = self._captions.write(wanted, recorder)
            self._captions.flush(recorder)
            recorder.finish()
        return [str(problem) for problem in problems]


def read_implications(file: Path) -> dict[str, set[str]]:
    """Return tag -> tags that it implies from a CSV, as Danbooru exports its tag implications.

    Its columns are ``antecedent_name`` and ``consequent_name``, or ``tag`` and ``implies``.
    https://danbooru.donmai.us/wiki_pages/tag_implications

    Raises:
        ConfigError: when it is something else, or too large.
    """
    try:
        if file.stat().st_size > MAX_IMPLICATIONS_BYTES:
            raise ConfigError(f"{file}: has more than 64 MiB")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    implied: dict[str, set[str]] = {}
    try:
        titles = reader.fieldnames or []
        left, right = (next((name for name in names if name in titles), None) for names in (_LEFT, _RIGHT))
        if left is None or right is None:
            raise ConfigError(
                f"{file}: needs the columns antecedent_name and consequent_name, or tag and implies"
            )
        for row in reader:
            if row[left] and row[right]:
                implied.setdefault(tag_key(row[left]), set()).add(tag_key(row[right]))
    except csv.Error as error:
        raise ConfigError(f"{file} line {reader.line_num}: is not valid CSV ({error})") from None
    return implied


def _implied(tags: Sequence[str], implications: Mapping[str, Collection[str]]) -> set[str]:
    """Return the keys of the tags that others imply, in one step or several."""
    keys = {tag_key(tag) for tag in tags}
    implied: set[str] = set()
    for key in keys:
        words = key.split()
        if 1 < len(words) <= _MOST_WORDS and not _NEGATIONS.intersection(words):
            implied.update(" ".join(words[start:]) for start in range(1, len(words)))
        waiting, seen = list(implications.get(key, ())), {key}
        while waiting:
            consequence = waiting.pop()
            if consequence not in seen:
                seen.add(consequence)
                implied.add(consequence)
                waiting += implications.get(consequence, ())
    return implied & keys
