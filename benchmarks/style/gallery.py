"""Images by subject on disk: those a base draws, resumed image by image, and other people's folders."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.config.defaults import USUAL_GUIDANCE
from sdlora.config.schema import SampleConfig
from sdlora.data.batching.buckets import place, source_box, square_bucket
from sdlora.data.reading.folder import ImageItem
from sdlora.errors import ConfigError
from sdlora.families.fingerprint import file_digest, module_fingerprint
from sdlora.files import replacing
from sdlora.generation.image_generator import ImageGenerator
from sdlora.generation.render import GenerateRequest

from .icon_sets import subject_of

if TYPE_CHECKING:
    from PIL.Image import Image

Say = Callable[[str], None]
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
_CHUNK = 8


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: the same for the base and every adapter.

    Attributes:
        steps: denoising steps.
        guidance: the base's recommended one when None.
        seed: shifts the seeds, which follow from the subjects' names.
    """

    steps: int = 10
    guidance: float | None = None
    seed: int = 0


class Studio:
    """A loaded base that draws subjects into folders and never draws an image twice."""

    def __init__(self, base: str, drawing: Drawing, folder: Path, say: Say) -> None:
        self.generator = ImageGenerator.load(base)
        self.model = self.generator.model
        self._folder, self._say = folder, say
        recommended = float(self.model.base.recommended.get("sample.guidance", USUAL_GUIDANCE))
        self.guidance = recommended if drawing.guidance is None else drawing.guidance
        self.drawing = drawing
        parts = [self.model.encoder_fingerprint("images"), self.model.encoder_fingerprint("captions")]
        self.digest = _short([module_fingerprint(self.model.components()["unet"]), *parts])
        self._side = self.model.facts.native_resolution

    def draw(
        self, name: str, adapter: Path | None, strengths: Sequence[float], items: Sequence[ImageItem]
    ) -> Mapping[float, list[Image]]:
        """Return images of the subjects at each strength; what is on disk is read, not drawn again."""
        made_of = [self.digest, "" if adapter is None else adapter_digest(adapter)]
        how = [self.drawing.steps, self.guidance, self.drawing.seed]
        folder = self._folder / f"{slug(name)}-{_short([*made_of, *map(str, how)])}"
        files = {s: [folder / f"{s:g}" / self._file(item) for item in items] for s in strengths}
        wanted = [
            (strength, item, file)
            for strength in strengths
            for item, file in zip(items, files[strength], strict=True)
            if not file.is_file()
        ]
        if wanted:
            self._make(name, adapter, wanted)
        return {strength: [_opened(file) for file in files[strength]] for strength in strengths}

    def fitted(self, image: Image) -> Image:
        """Return an image at the base's own size, cut as training would cut it."""
        from PIL import Image as Pil

        where = place(image.height, image.width, square_bucket(self._side, self.model.facts.size_multiple))
        height, width = where.bucket
        box = source_box(image.height, image.width, where)
        return image.convert("RGB").resize((width, height), Pil.Resampling.LANCZOS, box=box)

    def _make(self, name: str, adapter: Path | None, wanted: list[tuple[float, ImageItem, Path]]) -> None:
        loaded = None if adapter is None else self.generator.add_adapter(adapter)
        try:
            for start in range(0, len(wanted), _CHUNK):
                chunk = wanted[start : start + _CHUNK]
                requests = [self._request(item, loaded, strength) for strength, item, _ in chunk]
                for (_, _, file), generated in zip(
                    chunk, self.generator.generate(requests, merge=True), strict=True
                ):
                    with replacing(file) as temporary:
                        generated.image.save(temporary, format="PNG")
                self._say(f"{name}: drew {min(start + _CHUNK, len(wanted))} of {len(wanted)} images")
        finally:
            if loaded is not None:
                self.generator.remove_adapter(loaded)

    def _request(self, item: ImageItem, loaded: str | None, strength: float) -> GenerateRequest:
        return GenerateRequest(
            item.caption,
            height=self._side,
            width=self._side,
            steps=self.drawing.steps,
            guidance=self.guidance,
            sampler=SampleConfig().sampler,
            # by name, so that a subject is drawn alike whichever others are
            seed=self.drawing.seed + zlib.crc32(item.path.stem.encode()) % 2**31,
            strengths={} if loaded is None else {loaded: strength},
        )

    def _file(self, item: ImageItem) -> str:
        return f"{item.path.stem}-{_short([item.caption])[:6]}.png"


def read_folder(folder: Path, subjects: Sequence[str]) -> list[Image]:
    """Return already made images by subject: ``ice-cream-cone.png``, ``Ice cream cone.jpg``.

    Raises:
        ConfigError: when the folder or images of some subjects are missing, or one subject has two.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of images; check the path")
    by_subject: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES:
            by_subject.setdefault(subject_of(file.stem), []).append(file)
    missing = [subject for subject in subjects if subject not in by_subject]
    double = [subject for subject in subjects if len(by_subject.get(subject, [])) > 1]
    if missing:
        raise ConfigError(
            f"{folder}: no image of {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''} "
            f"({len(missing)} of {len(subjects)} subjects); name files after the subjects, e.g. "
            f"{missing[0]}.png, or measure fewer with --subjects"
        )
    if double:
        names = " and ".join(file.name for file in by_subject[double[0]])
        raise ConfigError(f"{folder}: {names} show one subject; keep one")
    return [_opened(by_subject[subject][0]) for subject in subjects]


def adapter_digest(adapter: Path) -> str:
    """Return a digest of an adapter file, or of the files of a PEFT folder."""
    files = sorted(file for file in adapter.iterdir() if file.is_file()) if adapter.is_dir() else [adapter]
    return _short([file_digest(file) for file in files])


def slug(name: str) -> str:
    """Return a name as it can be part of a file's name."""
    return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in name.lower()).split()) or "entry"


def _short(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:10]


def _opened(file: Path) -> Image:
    from PIL import Image as Pil

    try:
        with Pil.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ConfigError(f"{file}: is not an image that can be read ({error}); remove it") from error
