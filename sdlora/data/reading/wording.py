"""What a caption says at one visit: lines, wildcards, shuffled and dropped tags, prefix, trigger word.

Everything is a function of (seed, epoch, image, repeat); only ``Random.random`` is used, whose numbers
are the same in every Python version. The order of the rules: one line of several; wildcards; the head
and tail marked by ``|||``; shuffling and leaving out of the tags between; ``;;;`` becomes a separator;
prefix and suffix; the trigger word, in front wherever it is missing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...config.data import DataConfig
from .captions import with_trigger
from .items import Dataset, ImageItem, Visit

KEEP_MARK = "|||"
"""What is before the first mark and after the second one stays in its place."""
GROUP_MARK = ";;;"
"""Joins tags that stay together."""

_MAX_NESTED = 20
_ESCAPED = re.compile(r"\\([()\[\]])")
_OPEN, _CLOSE = "\ue000", "\ue001"  # stand for doubled braces while wildcards are chosen


@dataclass(frozen=True)
class Wording:
    """How captions are worded; see the settings of the same names.

    ``plain_brackets``: brackets weigh nothing, so the backslash that taggers put before them means nothing.
    """

    prefix: str = ""
    suffix: str = ""
    one_line: bool = False
    shuffle: bool = False
    keep: int = 0
    separator: str = ","
    tag_dropout: float = 0.0
    wildcards: bool = False
    plain_brackets: bool = True

    @classmethod
    def of(cls, data: DataConfig) -> Wording:
        """Return the wording that the settings describe."""
        return cls(
            prefix=data.caption_prefix,
            suffix=data.caption_suffix,
            one_line=data.caption_lines == "one",
            shuffle=data.shuffle_tags,
            keep=data.keep_tags,
            separator=data.tag_separator,
            tag_dropout=data.tag_dropout,
            wildcards=data.wildcards,
            plain_brackets=not data.emphasis,
        )

    def plain(self, item: ImageItem) -> str:
        """Return the caption without random parts: first line and alternatives, all tags in their order."""
        text = (item.lines[0] if item.lines else "") if self.one_line else " ".join(item.lines)
        text = _choose(text, lambda: 0.0) if self.wildcards else text
        return self._finished(self._joined(*self._parts(text)), item)

    def at(self, item: ImageItem, visit: Visit, seed: int) -> str:
        """Return the caption of one visit."""
        draw = random.Random(f"{seed}/words/{visit.epoch}/{visit.index}/{visit.repeat}").random
        if self.one_line and item.lines:
            # in turn, so that each line is seen as often as the others
            start = int(random.Random(f"{seed}/line/{visit.index}").random() * len(item.lines))
            visits = visit.epoch * item.repeats + visit.repeat
            text = item.lines[(start + visits) % len(item.lines)]
        else:
            text = " ".join(item.lines)
        text = _choose(text, draw) if self.wildcards else text
        head, tags, tail = self._parts(text)
        if self.shuffle:
            tags = _shuffled(tags, draw)
        if self.tag_dropout > 0:
            tags = Tags(tuple(tag for tag in tags.words if draw() >= self.tag_dropout), tags.between)
        return self._finished(self._joined(head, tags, tail), item)

    def _parts(self, text: str) -> tuple[str, Tags, str]:
        """Return what stays in front, the tags that may move, and what stays behind."""
        head, mark, rest = text.partition(KEEP_MARK)
        if mark:
            middle, _, tail = rest.partition(KEEP_MARK)
            return self._trimmed(head), self._tags(middle), self._trimmed(tail)
        if not self.shuffle and self.tag_dropout == 0:
            return "", Tags((text,), ()), ""
        tags = self._tags(text)
        kept = Tags(tags.words[: self.keep], tags.between)
        return self._trimmed(str(kept)), Tags(tags.words[self.keep :], tags.between[self.keep :]), ""

    def _tags(self, text: str) -> Tags:
        pieces = split_words(text.strip(), self.separator)
        words = [(word, pieces[at + 1 : at + 2]) for at, word in enumerate(pieces) if at % 2 == 0 and word]
        return Tags(tuple(word for word, _ in words), tuple(gap[0] for _, gap in words if gap))

    def _trimmed(self, text: str) -> str:
        return text.strip().removesuffix(self.separator.strip()).removeprefix(self.separator.strip()).strip()

    def _joined(self, head: str, tags: Tags, tail: str) -> str:
        between = tags.between[0] if tags.between else f"{self.separator} "
        text = between.join(part for part in (head, str(tags), tail) if part)
        return text.replace(GROUP_MARK, between) if GROUP_MARK in text else text

    def _finished(self, text: str, item: ImageItem) -> str:
        words = self._joint(self.prefix.strip(), text)
        tail = self.suffix.strip()
        words = self._joint(words, tail) if words else tail.removeprefix(self.separator.strip()).strip()
        trigger_word = item.trigger_word
        if self.plain_brackets:
            words, trigger_word = without_escapes(words), trigger_word and without_escapes(trigger_word)
        return with_trigger(words, trigger_word)

    def _joint(self, words: str, part: str) -> str:
        """Join two parts; if the second begins with a separator, it follows the first without a space."""
        mark = self.separator.strip()
        if words and mark and part.startswith(mark):
            return words.removesuffix(mark).rstrip() + part
        return f"{words} {part}" if words and part else words or part


def reworded(dataset: Dataset, wording: Wording) -> Dataset:
    """Return the dataset with the captions that the settings give without random parts."""
    items = tuple(replace(item, caption=wording.plain(item)) for item in dataset.items)
    escaped = sum(any(_ESCAPED.search(line) for line in item.lines) for item in items)
    note = (
        f"{escaped} caption(s) write brackets as `\\(`; they are trained as plain brackets, which is what "
        "prompts in WebUI mean by it"
    )
    notes = (*dataset.notes, note) if escaped and wording.plain_brackets else dataset.notes
    return replace(dataset, items=items, notes=notes)


def without_escapes(text: str) -> str:
    """Return a caption without the backslashes that taggers put before brackets for WebUI's prompts.

    WebUI takes ``miku \\(vocaloid\\)`` for the words ``miku (vocaloid)``, so these have to be trained.
    """
    return _ESCAPED.sub(r"\1", text)


@dataclass(frozen=True)
class Tags:
    """Tags, and the separators between them as they were written."""

    words: tuple[str, ...]
    between: tuple[str, ...]

    def __str__(self) -> str:
        gaps = (*self.between[: len(self.words) - 1], "")
        return "".join(word + gap for word, gap in zip(self.words, gaps, strict=False))


def split_words(text: str, separator: str) -> list[str]:
    """Return words and, between them, the separators with the spaces around them, unchanged.

    Like ``re.split(rf"(\\s*{separator}\\s*)", text)``, which takes quadratic time for a long run of spaces.
    """
    if not separator.strip():
        return re.split(rf"(\s*{re.escape(separator)}\s*)", text)
    first, *rest = text.split(separator)
    pieces = [first]
    for part in rest:
        word = pieces[-1].rstrip()
        before, pieces[-1] = pieces[-1][len(word) :], word
        after = part[: len(part) - len(part.lstrip())]
        pieces += [before + separator + after, part[len(after) :]]
    return pieces


def _shuffled(tags: Tags, draw: Callable[[], float]) -> Tags:
    keyed: Sequence[tuple[float, str]] = sorted(
        ((draw(), word) for word in tags.words), key=lambda pair: pair[0]
    )
    return Tags(tuple(word for _, word in keyed), tags.between)


def _choose(text: str, draw: Callable[[], float]) -> str:
    """Return the text with one alternative for each ``{a|b}``, inner ones first."""
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)

    def one_of(match: re.Match[str]) -> str:
        alternatives = match[1].split("|")
        return alternatives[int(draw() * len(alternatives))]

    for _ in range(_MAX_NESTED):
        chosen = re.sub(r"\{([^{}]*)\}", one_of, text)
        if chosen == text:
            break
        text = chosen
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")
