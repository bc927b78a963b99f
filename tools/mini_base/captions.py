"""The nouns the base knows and the captions it learns them by."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from functools import cache

from .config import BASE_SETS, NOUNS_FILE, IconSet

PLAIN_SHARES = {"noto": 0.15, "noto-v1": 0.1, "fluent": 0.5, "fluent-flat": 0.5}
"""Share of captions without a style word, by set, so that plain prompts work.

Low where a set is drawn less often: its style word is then what it is mostly
seen with, and plain prompts keep the look of the two Fluent sets.
"""

EMPTY_SHARE = 0.1
"""Share of empty captions, which classifier-free guidance needs."""

PREFIX_SHARE = 0.15
"""Share of captions that start with a made-up word.

It teaches the base that an unknown word in front changes nothing, so the
trigger word of a later LoRA starts neutral instead of disturbing the subject.
"""


@dataclass(frozen=True)
class Nouns:
    """The noun lists of ``nouns.json``; names are those of the icon sets.

    Attributes:
        phrases: Icon name to the phrase with its article ("an owl", "grapes").
        ink_training: Names drawn in the sample data set.
        ink_holdout: Names of the same style kept apart.
        showcase: Names that make good first prompts.
        sheet: Names of the contact sheet's plain prompts.
        vae_unseen: Names the VAE is judged on and never trained on.
    """

    phrases: dict[str, str]
    ink_training: tuple[str, ...]
    ink_holdout: tuple[str, ...]
    showcase: tuple[str, ...]
    sheet: tuple[str, ...]
    vae_unseen: tuple[str, ...]


@cache
def load_nouns() -> Nouns:
    """Reads ``nouns.json`` and checks that its lists agree."""
    data = json.loads(NOUNS_FILE.read_text(encoding="utf-8"))
    nouns = Nouns(
        data["nouns"],
        tuple(data["ink_training"]),
        tuple(data["ink_holdout"]),
        tuple(data["showcase"]),
        tuple(data["sheet"]),
        tuple(data["vae_unseen"]),
    )
    unknown = {*nouns.ink_training, *nouns.ink_holdout, *nouns.showcase, *nouns.sheet} - set(nouns.phrases)
    if unknown:
        raise ValueError(f"nouns.json names icons without a phrase: {sorted(unknown)}")
    shared = set(nouns.ink_training) & set(nouns.ink_holdout)
    if shared:
        raise ValueError(f"nouns.json holds out icons it also trains on: {sorted(shared)}")
    return nouns


def bare(phrase: str) -> str:
    """Returns ``phrase`` without its article."""
    first, _, rest = phrase.partition(" ")
    return rest if first in {"a", "an"} else phrase


def made_up_word(rng: random.Random) -> str:
    """Returns a random lower-case word of three to eight letters."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))


def caption(phrase: str, icon_set: IconSet, rng: random.Random) -> str:
    """Draws one training caption for an icon.

    Args:
        phrase: The subject with its article.
        icon_set: The set whose drawing the caption is for.
        rng: Source of randomness.

    Returns:
        A caption, empty with probability ``EMPTY_SHARE``.
    """
    if rng.random() < EMPTY_SHARE:
        return ""
    if rng.random() < PLAIN_SHARES[icon_set.key]:
        forms = (f"an icon of {phrase}", f"an icon of {phrase}", phrase, bare(phrase))
        text = rng.choice(forms)
    else:
        style = rng.choice(icon_set.styles)
        text = rng.choice((f"a {style} icon of {phrase}", f"{phrase}, {style} style"))
    if rng.random() < PREFIX_SHARE:
        text = f"{made_up_word(rng)}, {text}"
    return text


def styled(phrase: str, icon_set: IconSet) -> str:
    """Returns the prompt for a subject in the look of one set."""
    return f"a {icon_set.styles[0]} icon of {phrase}"


def sheet_prompts() -> list[str]:
    """Returns the contact sheet's hundred prompts: plain ones, then four subjects in each of four looks."""
    nouns = load_nouns()
    plain = [f"an icon of {nouns.phrases[name]}" for name in nouns.sheet]
    looks = [styled(nouns.phrases[name], icon_set) for name in nouns.showcase[:4] for icon_set in BASE_SETS]
    return plain + looks


def tokenizer_corpus() -> list[str]:
    """Returns every caption form of every noun, for training the tokenizer."""
    styles = [style for icon_set in BASE_SETS for style in icon_set.styles]
    corpus = []
    for phrase in load_nouns().phrases.values():
        corpus += [f"an icon of {phrase}", phrase, bare(phrase)]
        corpus += [f"a {style} icon of {phrase}" for style in styles]
        corpus += [f"{phrase}, {style} style" for style in styles]
    return corpus
