"""What a tagger's outputs mean: its list of tags, and which of them become a caption.

A list is the CSV beside the model (WD14 and its kin: columns ``name`` and ``category``, a line for each
output) or a text with one name a line. Categories are numbers on Danbooru: 0 general, 1 artist, 3 copyright,
4 character, 5 meta; WD14 adds 9 rating. https://danbooru.donmai.us/wiki_pages/api:tags
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ...errors import ConfigError, ModelError, shown
from .wording import tag_key, tidy, with_spaces

CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
MAX_LIST_BYTES = 64 * 2**20
MAX_TAGS = 1_000_000
MAX_TAG_LETTERS = 200
Order = Literal["confidence", "category", "name", "list"]
ORDERS: tuple[Order, ...] = get_args(Order)
_FIRST = ("rating", "character", "copyright", "artist", "general")
_OFF = float("inf")
DEFAULT_THRESHOLDS: Mapping[str, float] = {"general": 0.35, "character": 0.85, "rating": _OFF}
"""Those of WD14's own demo; the rating is left out unless asked for. Other categories have general's."""


@dataclass(frozen=True)
class Tag:
    """One output of a tagger."""

    name: str
    category: str


@dataclass(frozen=True)
class TagChoice:
    """Which tags become a caption, and how they are written.

    Attributes:
        thresholds: category -> least probability (0 to 1); infinity leaves the category out.
        blacklist: tags that are left out; case and underscores do not matter.
        underscores: keep them instead of spaces.
        order: ``confidence`` (the surest first), ``category`` (rating, character, copyright, artist, general,
            then the others, the surest first in each), ``name``, or ``list`` (as in the tagger's list).
    """

    thresholds: Mapping[str, float] = field(default_factory=lambda: DEFAULT_THRESHOLDS)
    blacklist: Collection[str] = ()
    underscores: bool = False
    order: Order = "confidence"

    def of(self, tags: Sequence[Tag], probabilities: Sequence[float]) -> list[str]:
        """Return the tags of one image.

        Args:
            tags: of the tagger.
            probabilities: of each, 0 to 1.
        """
        left_out = {tag_key(tag) for tag in self.blacklist}
        limits = {**DEFAULT_THRESHOLDS, **self.thresholds}
        chosen = [
            (place, tag, probability)
            for place, (tag, probability) in enumerate(zip(tags, probabilities, strict=True))
            if probability >= limits.get(tag.category, limits["general"])
            and tag_key(tag.name) not in left_out
        ]
        if self.order == "name":
            chosen.sort(key=lambda choice: tag_key(choice[1].name))
        elif self.order == "confidence":
            chosen.sort(key=lambda choice: (-choice[2], choice[0]))
        elif self.order == "category":
            chosen.sort(key=lambda choice: (_rank(choice[1].category), -choice[2], choice[0]))
        names = (tag.name if self.underscores else with_spaces(tag.name) for _, tag, _ in chosen)
        # a comma would make two tags of one
        return list(dict.fromkeys(name for text in names if (name := tidy(text.replace(",", " ")))))


def thresholds_of(words: Sequence[str]) -> dict[str, float]:
    """Return thresholds as typed: ``0.4`` is general's, ``character=0.8`` a category's, ``artist=off`` none.

    Raises:
        ConfigError: for anything else.
    """
    thresholds: dict[str, float] = {}
    for word in words:
        category, equals, value = word.rpartition("=")
        name = CATEGORIES.get(category.strip(), category.strip().lower()) if equals else "general"
        try:
            number = _OFF if value.strip().lower() == "off" else float(value)
        except ValueError:
            number = -1.0
        if not name or not (0 <= number <= 1 or number == _OFF):
            raise ConfigError(
                f"threshold `{shown(word, 60)}`: write 0.35, or character=0.8 for a category, or artist=off"
            )
        thresholds[name] = number
    return thresholds


def read_tags(file: Path) -> list[Tag]:
    """Return the tags of a list: a CSV with the column ``name`` (and ``category``), or a text, one a line.

    Raises:
        ModelError: when it is something else, or too large.
    """
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise ModelError(f"{file}: has more than 64 MiB, which no list of tags has")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ModelError(f"{file}: is not UTF-8 text, so it is no list of tags") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from None
    if file.suffix.lower() == ".csv":
        tags = _csv_tags(file, text)
    else:
        tags = [Tag(line.strip(), "general") for line in text.splitlines() if line.strip()]
    if not tags or len(tags) > MAX_TAGS:
        raise ModelError(f"{file}: has {len(tags)} tags; a list has 1 to {MAX_TAGS:,}")
    for number, tag in enumerate(tags, start=1):
        if len(tag.name) > MAX_TAG_LETTERS:
            raise ModelError(f"{file}: tag {number} has {len(tag.name)} letters, so it is no list of tags")
    return tags


def _csv_tags(file: Path, text: str) -> list[Tag]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        titles = [title.strip().lower() for title in next(reader, [])]
        if "name" not in titles:
            has = shown(", ".join(titles[:8])) or "nothing"
            raise ModelError(f"{file}: has no column `name` (it has {has}), so it is no list of tags")
        name, category = titles.index("name"), titles.index("category") if "category" in titles else None
        tags = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(titles):
                raise ModelError(
                    f"{file} line {reader.line_num}: has {len(row)} values, the first line {len(titles)}"
                )
            kind = row[category].strip().lower() if category is not None else "0"
            tags.append(Tag(row[name].strip(), CATEGORIES.get(kind, kind or "general")))
        return tags
    except csv.Error as error:
        raise ModelError(f"{file} line {reader.line_num}: is not valid CSV ({error})") from None


def _rank(category: str) -> int:
    return _FIRST.index(category) if category in _FIRST else len(_FIRST)
