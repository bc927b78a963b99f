"""Nerogar/OneTrainer: its concepts, which become sources (see :mod:`.onetrainer`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .ledger import Ledger, as_number

_COLOURS = ("brightness", "contrast", "saturation")


_ONLY_WITH_OTHERS = ("_mode", "_max_angle", "resolution_override", "special_tags_regex")


def translate_concepts(ledger: Ledger, concepts: Sequence[Mapping[str, Any]]) -> None:
    sources: list[dict[str, Any]] = []
    for number, concept in enumerate(concepts, 1):
        if not concept.get("enabled", True):
            for name in ledger.names():
                if name.startswith(f"concept {number}: "):
                    ledger.default(name, "a concept that is switched off")
            continue
        sources.append(_source(ledger, number, concept))
    ledger.put_sources(sources, ", or import the concepts, too")
    active = [(number, concept) for number, concept in enumerate(concepts, 1) if concept.get("enabled", True)]
    for number, concept in active:
        _Alike(ledger, number, concept, first=number == active[0][0]).tell()


def _source(ledger: Ledger, number: int, concept: Mapping[str, Any]) -> dict[str, Any]:
    def named(name: str) -> str:
        return f"concept {number}: {name}"

    source: dict[str, Any] = {"folder": str(concept.get("path", "")), "kohya_folders": False}
    ledger.tell_source(named("path"), "folder", source["folder"])
    source["recursive"] = bool(concept.get("include_subdirectories", False))
    ledger.tell_source(named("include_subdirectories"), "recursive", source["recursive"])
    repeats = as_number(concept.get("balancing", 1.0)) or 1.0
    if str(concept.get("balancing_strategy", "REPEATS")) == "REPEATS":
        source["repeats"] = max(1, round(repeats))
        ledger.tell_source(named("balancing"), "repeats", source["repeats"])
        ledger.default(named("balancing_strategy"), "images are repeated")
    else:
        ledger.none(
            (named("balancing"), named("balancing_strategy")),
            "a number of images drawn from the folder; it is taken whole",
        )
    weight = as_number(concept.get("loss_weight", 1.0))
    if weight and weight != 1.0:
        source["weight"] = weight
    ledger.tell_source(named("loss_weight"), "weight", weight or 1.0)
    kind = str(concept.get("type", "STANDARD"))
    if kind == "PRIOR_PREDICTION":
        source["regularisation"] = True
        ledger.tell_source(named("type"), "regularisation", True)
        ledger.values["data.prior_preservation"] = 1.0
    elif kind == "VALIDATION":
        ledger.none(named("type"), "data.validation holds images out, or names one folder")
    else:
        ledger.default(named("type"), "images to be learned")
    ledger.default(
        (named("name"), named("seed"), named("enabled"), named("concept_stats")), "a label, or no effect here"
    )
    ledger.default(
        (named("image_variations"), named("text_variations")),
        "each visit is drawn again, or data.variants counts",
    )
    return source


class _Alike:
    """One concept's ways with images and captions, which all folders share here: those of the first
    concept are used."""

    def __init__(self, ledger: Ledger, number: int, concept: Mapping[str, Any], first: bool) -> None:
        self._ledger, self._label, self._first = ledger, f"concept {number}: ", first
        parts = (concept.get("image"), concept.get("text"))
        self._image, self._text = (part if isinstance(part, dict) else {} for part in parts)

    def tell(self) -> None:
        """Translate them."""
        self._images()
        self._captions()
        for name in self._ledger.names():
            if name.startswith(self._label) and not self._ledger.is_told(name):
                if self._ledger.raw(name) is None or name.endswith(_ONLY_WITH_OTHERS):
                    self._ledger.default(name, "switched off, as here")
                self._ledger.none(name, "sdlora has no such change of images or captions")

    def _images(self) -> None:
        image = self._image
        self._say("image.enable_random_flip", bool(image.get("enable_random_flip")), "data.flip", True)
        reason = "crops move by what the bucket leaves over: data.crop=random"
        self._ledger.default(f"{self._label}image.enable_crop_jitter", reason)
        changes = [what for what in _COLOURS if image.get(f"enable_random_{what}")]
        strengths = [as_number(image.get(f"random_{what}_max_strength")) or 0.0 for what in changes]
        for what in _COLOURS:
            strength, reason = min(max(strengths, default=0.0), 0.5), "one strength for all three"
            self._say(f"image.enable_random_{what}", what in changes, "data.colour_jitter", strength, reason)
            reason = "set by data.colour_jitter, or off"
            self._ledger.default(f"{self._label}image.random_{what}_max_strength", reason)

    def _captions(self) -> None:
        text = self._text
        shuffles, separator = bool(text.get("enable_tag_shuffling")), str(text.get("tag_delimiter", ","))
        kept = round(as_number(text.get("keep_tags_count", 1)) or 0)
        self._say("text.enable_tag_shuffling", shuffles, "data.shuffle_tags", True)
        self._say("text.keep_tags_count", shuffles, "data.keep_tags", kept)
        self._say(
            "text.tag_delimiter", shuffles and separator not in ("", ","), "data.tag_separator", separator
        )
        dropout = as_number(text.get("tag_dropout_probability")) or 0.0
        drops = bool(text.get("tag_dropout_enable")) and dropout > 0
        self._say("text.tag_dropout_enable", drops, "data.tag_dropout", dropout)
        self._ledger.default(f"{self._label}text.tag_dropout_probability", "set by data.tag_dropout, or off")
        source = str(text.get("prompt_source", "sample"))
        self._say("text.prompt_source", source == "filename", "data.caption_from", "file name")
        if source == "concept":
            reason = "one text file of prompts for all images; put captions beside them"
            self._ledger.none(f"{self._label}text.prompt_path", reason)

    def _say(self, name: str, wanted: bool, key: str, value: Any, reason: str = "") -> None:
        full = f"{self._label}{name}"
        if not wanted:
            self._ledger.default(full, "switched off, as here")
        elif self._first or self._ledger.values.get(key) == value:
            self._ledger.put(full, key, value, reason)
        else:
            self._ledger.none(full, "all folders share it here; the first concept's counts")
