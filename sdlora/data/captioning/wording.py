"""From what a model says of an image to its caption: prefix, trigger word, kept tags, length in tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..reading.captions import with_trigger
from ..reading.tokens import count_tokens

MAX_LETTERS = 16_000
"""Of a caption; a caption file may have 64 KiB."""


@dataclass(frozen=True)
class Wording:
    """How captions are put together.

    Attributes:
        prefix: text in front of each, as typed, a space behind it.
        trigger: word that each caption begins with, unless it holds it anyway.
        max_tokens: longest caption in CLIP's tokens; None for no limit. Tags are dropped whole from the end,
            sentences are cut between words. What stands in front (kept tags, prefix, trigger) is never cut.
        keep_first: how many of the first comma-separated parts of the old caption stay in front of the new.
    """

    prefix: str = ""
    trigger: str | None = None
    max_tokens: int | None = None
    keep_first: int = 0

    def compose(self, parts: Sequence[str], old: str = "") -> str:
        """Return the caption of one image.

        Args:
            parts: the tags, or one text of a model that writes sentences.
            old: the caption that it replaces.
        """
        kept = tags_of(old)[: self.keep_first]
        known = {tag_key(tag) for tag in kept}
        new = [part for part in parts if tag_key(part) not in known]
        if len(new) != 1:
            most = self._longest(new, lambda some: self._whole(kept, ", ".join(some)))
            return self._whole(kept, ", ".join(new[:most]))
        words = new[0].split()
        most = self._longest(words, lambda some: self._whole(kept, _sentence(some, words)))
        return self._whole(kept, _sentence(words[:most], words))

    def _whole(self, kept: Sequence[str], text: str) -> str:
        text = " ".join(part for part in (self.prefix.strip(), text) if part)
        return with_trigger(", ".join(part for part in (*kept, text) if part), self.trigger)

    def _longest(self, parts: Sequence[str], whole: Callable[[Sequence[str]], str]) -> int:
        """Return how many of the first parts fit; halving, as more parts never have fewer tokens."""

        def fits(count: int) -> bool:
            text = whole(parts[:count])
            limit = self.max_tokens
            return len(text) <= MAX_LETTERS and (limit is None or count_tokens([text])[0] <= limit)

        low, high = 0, len(parts)
        if fits(high):
            return high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low


def tags_of(caption: str) -> list[str]:
    """Return the comma-separated parts of a caption, spaces around them removed, empty ones left out."""
    return [tag for part in caption.split(",") if (tag := " ".join(part.split()))]


def tag_key(tag: str) -> str:
    """Return what equal tags share: ``Long_Hair`` and ``long hair`` are one."""
    return " ".join(tag.replace("_", " ").split()).casefold()


def with_spaces(tag: str) -> str:
    """Return a tag with spaces for its underscores, unless it is a face such as ``o_o`` or ``>_<``.

    Faces are told by their halves: at most three signs, of which at most one is a letter or digit.
    """
    halves = tag.split("_")
    is_face = len(halves) == 2 and all(
        0 < len(half) <= 3 and len(re.findall(r"\w", half)) <= 1 for half in halves
    )
    return tag if is_face else " ".join(tag.replace("_", " ").split())


def tidy(text: str) -> str:
    """Return what a model wrote as one line: without control characters, spaces folded."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _sentence(some: Sequence[str], words: Sequence[str]) -> str:
    text = " ".join(some)
    return text if len(some) == len(words) else text.rstrip(" ,;:-")
