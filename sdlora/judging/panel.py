"""The prompts that an adapter is judged by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """What a panel is made from: a caption written as a prompt, and its trigger word, if it has one."""

    prompt: str
    trigger_word: str | None = None


@dataclass(frozen=True)
class Panel:
    """Prompts with what they cannot tell.

    Attributes:
        prompts: that the adapter should draw in its style.
        plain: some of them without the trigger word, which should look as the base draws them.
        judges_subject: whether the prompts differ, so that one can tell whether the subject was kept.
        notes: for people: what cannot be judged, and why.
    """

    prompts: tuple[str, ...]
    plain: tuple[str, ...]
    judges_subject: bool
    notes: tuple[str, ...]

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """The prompts and then the plain ones; each has the seed of its place."""
        return (*self.prompts, *self.plain)


def make_panel(
    held_out: Sequence[Subject], trained: Sequence[Subject], count: int, *, plain: int = 2
) -> Panel:
    """Return a panel of ``count`` prompts: different ones first, held-out ones before those trained on.

    Args:
        held_out: subjects that are not trained on.
        trained: subjects that are.
        count: prompts wanted; where there are fewer captions, some come again (with other seeds).
        plain: of how many the base's look is checked without the trigger word.

    Raises:
        ValueError: without any caption.
    """
    ranked = [*_spread(held_out, count), *_spread(trained, count)]
    unique = list({subject.prompt: subject for subject in ranked if subject.prompt}.values())[:count]
    if not unique:
        raise ValueError("no image has a caption, so there is nothing to draw")
    chosen = [unique[number % len(unique)] for number in range(count)]
    without = dict.fromkeys(text for subject in unique if (text := without_trigger(subject)) is not None)
    notes = []
    if not held_out:
        notes.append(
            "no images are held out, so the panel shows captions that were trained on: whether subjects that "
            "were not seen are kept cannot be judged"
        )
    if len(unique) == 1:
        notes.append("all captions are alike, so whether the subject is kept cannot be judged")
    if not without:
        notes.append(
            "the captions hold no trigger word, so whether the base's own look is kept without it cannot be "
            "judged"
        )
    return Panel(
        tuple(subject.prompt for subject in chosen), tuple(without)[:plain], len(unique) > 1, tuple(notes)
    )


def without_trigger(subject: Subject) -> str | None:
    """Return a prompt without its trigger word; None if it has none, or holds nothing else."""
    word = subject.trigger_word
    if not word or word not in subject.prompt:
        return None
    rest = subject.prompt.replace(word, " ")
    rest = re.sub(r"\s+", " ", rest).strip()
    rest = re.sub(r"(?: ?, ?)+", ", ", rest).strip(" ,")
    return rest or None


def _spread(subjects: Sequence[Subject], count: int) -> list[Subject]:
    """Return ``count`` of them, evenly spaced, or all."""
    if len(subjects) <= count:
        return list(subjects)
    return [subjects[number * len(subjects) // count] for number in range(count)]
