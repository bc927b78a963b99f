"""A folder captioned by a model: which images lack a caption, a preview of some, then all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from ...errors import ConfigError, DatasetError, ModelError, OutputError
from ..reading.captions import Caption
from ..reading.image_files import load_small
from ..reading.listing import FoundFile
from ..reading.problems import Problem
from .caption_files import CaptionFolder
from .models import Captioner, ImageTextFiles, TaggerFiles, locate_captioner
from .restore import Recorder, RestorePoint, newest, recording
from .tag_lists import TagChoice
from .wording import Wording

PREVIEWED = 8
MAX_SIDE = 1536
"""Longer side in px of what models are shown: more than any of them resizes to, and bounded memory."""
METADATA_EVERY = 64
"""Images between two writings of a metadata file, which is written whole."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CaptionSettings:
    """What captions a folder, and how.

    Attributes:
        model: a folder, a tagger's ``.onnx`` file, or a hub id.
        prompt: what a model that writes texts is asked; the usual question of its kind when None.
        new_tokens: most tokens that it writes.
        beams: of its search.
        batch_size: images at a time.
        device: ``cpu``, ``cuda``, ``mps``; the fastest when None.
        precision: ``fp32``, ``bf16``, ``fp16``; half on cards when None.
        wording: prefix, trigger word, length, kept tags.
        tags: which of a tagger's tags count.
        tag_list: list of a tagger's tags, if it is not found beside it.
        pixels: what a tagger's input holds, if its files do not say.
        overwrite: also replace captions that someone wrote.
        recursive: also look into folders inside.
        follow_links: also take what links lead to outside the folder.
        column: of a metadata file with the caption.
    """

    model: str
    prompt: str | None = None
    new_tokens: int = 128
    beams: int = 1
    batch_size: int = 4
    device: str | None = None
    precision: str | None = None
    wording: Wording = field(default_factory=Wording)
    tags: TagChoice = field(default_factory=TagChoice)
    tag_list: Path | None = None
    pixels: str | None = None
    overwrite: bool = False
    recursive: bool = True
    follow_links: bool = False
    column: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: for one that is out of range.
        """
        least = (
            ("batch size", self.batch_size),
            ("new tokens", self.new_tokens),
            ("beams", self.beams),
            ("longest caption", 1 if self.wording.max_tokens is None else self.wording.max_tokens),
        )
        for what, number in least:
            if number < 1:
                raise ConfigError(f"{what} {number}: give 1 or more")
        if self.wording.keep_first < 0:
            raise ConfigError(f"keep first {self.wording.keep_first}: give 0 or more")

    def identity(self) -> dict[str, Any]:
        """Return what two pieces of work have in common when one continues the other, as JSON values."""
        values = asdict(self)
        for name in ("batch_size", "device"):
            del values[name]
        values["tags"]["blacklist"] = sorted(self.tags.blacklist)
        values["tags"]["thresholds"] = {name: str(value) for name, value in self.tags.thresholds.items()}
        return values | {"tag_list": str(self.tag_list) if self.tag_list else None}


@dataclass(frozen=True)
class Captioned:
    """One image and its new caption, or why it has none.

    Attributes:
        image: its path below the folder, with forward slashes.
        before: the caption that someone wrote; None where nobody did.
        caption: the new one; None if it failed.
        problem: why.
    """

    image: str
    before: str | None
    caption: str | None
    problem: str = ""


@dataclass(frozen=True)
class CaptionReport:
    """What became of a folder.

    Attributes:
        folder: the data set.
        model: that captioned it.
        written: how many captions were written.
        kept: images with a caption that was kept.
        continued: images that an interrupted run of the same settings had done.
        failed: image -> why it has no new caption.
    """

    folder: Path
    model: str
    written: int
    kept: int
    continued: int
    failed: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self) | {"folder": str(self.folder), "failed": dict(self.failed)}


class Captioning:
    """The work on one folder; the model is loaded with the first image and freed at the end of the block.

    Attributes:
        todo: the images to be captioned.
        kept: how many keep the caption they have.
        empty: how many of these have an empty one.
        continued: how many an interrupted run of the same settings has done.
        notes: what was passed over.
    """

    def __init__(self, folder: Path, settings: CaptionSettings) -> None:
        """List the folder and find the model; no weight is read.

        Raises:
            DatasetError: when the folder cannot be read or holds no images.
            OutputError: when it may not be written.
            ModelError: when there is no such model.
        """
        self.folder, self.settings = Path(folder), settings
        self._captions = CaptionFolder(
            self.folder,
            recursive=settings.recursive,
            follow_links=settings.follow_links,
            column=settings.column,
        )
        if not os.access(self.folder, os.W_OK):
            raise OutputError(f"{self.folder}: may not be written; change its permissions, or copy it first")
        self._files = locate_captioner(settings.model, settings.tag_list)
        self.notes = self._captions.notes
        self._model: Captioner | None = None
        self._ready: dict[str, Captioned] = {}
        self._old: dict[str, Caption | None] = {}
        self._point = self._interrupted()
        self._failed: dict[str, str] = {}
        self.kept = self.empty = self.continued = 0
        self.todo = [image for image in self._captions.images if self._wants(image)]

    def __enter__(self) -> Captioning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None

    def preview(self, count: int = PREVIEWED, progress: Progress | None = None) -> list[Captioned]:
        """Return captions of some images, evenly spread over the folder; none is written yet.

        :meth:`run` writes these without asking the model again.

        Raises:
            ModelError: when the model cannot be loaded.
        """
        count = min(count, len(self.todo))
        chosen = [self.todo[number * len(self.todo) // count] for number in range(count)]
        shown = []
        for done, captioned in enumerate(self._captioned(chosen), start=1):
            self._ready[captioned.image] = captioned
            shown.append(captioned)
            if progress is not None:
                progress(done, count)
        return shown

    def run(self, progress: Progress | None = None) -> CaptionReport:
        """Caption all images and write it; one that fails is named in the report, and the work goes on.

        Whenever it ends, what was written stays and can be undone; the same call continues.

        Raises:
            ModelError: when the model cannot be loaded.
            OutputError: when the disk is full or the folder may not be written.
        """
        written = 0
        settings, what = self.settings.identity(), f"captioned with {self.settings.model}"
        if self.todo:
            with recording(self.folder, what, settings, self._point) as recorder:
                for done, captioned in enumerate(self._written(recorder), start=1):
                    if captioned.problem:
                        self._failed[captioned.image] = captioned.problem
                    else:
                        written += 1
                    if progress is not None:
                        progress(done, len(self.todo))
                recorder.finish()
        return CaptionReport(
            self.folder, self.settings.model, written, self.kept, self.continued, dict(self._failed)
        )

    def _written(self, recorder: Recorder) -> Iterator[Captioned]:
        """Yield each image after its caption was written, or waits for its metadata file's next writing."""
        by_name = {image.name: image for image in self.todo}
        waiting: list[str] = []

        def flush() -> None:
            self._captions.flush(recorder)
            recorder.done(waiting)
            waiting.clear()

        try:
            for number, captioned in enumerate(self._captioned(self.todo), start=1):
                image = by_name[captioned.image]
                if captioned.caption is not None:
                    problems = self._captions.write({image: [captioned.caption]}, recorder)
                    if problems:
                        captioned = Captioned(captioned.image, captioned.before, None, str(problems[0]))
                    elif self._captions.in_metadata(image):
                        waiting.append(image.name)
                    else:
                        recorder.done([image.name])
                if number % METADATA_EVERY == 0:
                    flush()
                yield captioned
        finally:
            flush()

    def _captioned(self, images: Sequence[FoundFile]) -> Iterator[Captioned]:
        """Yield the new caption of each image, in their order."""
        waiting: list[FoundFile] = []
        for image in images:
            if image.name in self._ready:
                yield from self._batch(waiting)
                waiting = []
                yield self._ready.pop(image.name)
                continue
            waiting.append(image)
            if len(waiting) >= self._loaded().batch_size:
                yield from self._batch(waiting)
                waiting = []
        yield from self._batch(waiting)

    def _batch(self, images: Sequence[FoundFile]) -> Iterator[Captioned]:
        shown: list[tuple[FoundFile, Image.Image]] = []
        failed: dict[str, str] = {}
        for image in images:
            place = self._captions.place(image)
            if isinstance(place, Problem):
                failed[image.name] = str(place)
                continue
            try:
                shown.append((image, load_small(image.path, MAX_SIDE)))
            except DatasetError as error:
                failed[image.name] = str(error)
        described = dict(zip((image.name for image, _ in shown), self._described(shown), strict=True))
        for image in images:
            yield self._answer(image, failed.get(image.name) or described[image.name])

    def _described(self, shown: Sequence[tuple[FoundFile, Image.Image]]) -> list[list[str] | str]:
        """Return what the model says of each image, or why it failed: after an error, each is tried alone."""
        from ...devices import is_out_of_memory

        if not shown:
            return []
        model = self._loaded()
        try:
            return [*model.describe([image for _, image in shown])]
        except Exception as error:
            lacked = is_out_of_memory(error)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        # not inside the handler: the error's frames hold the batch in the device's memory
        if len(shown) > 1:
            half = len(shown) // 2
            if lacked:
                model.batch_size = max(1, half)
            return [*self._described(shown[:half]), *self._described(shown[half:])]
        why = "too little memory for the model and this image" if lacked else reason
        return [f"{shown[0][0].name}: the model failed ({why})"]

    def _answer(self, image: FoundFile, words: list[str] | str) -> Captioned:
        old = self._old[image.name]
        before = None if old is None else "\n".join(old.lines)
        if isinstance(words, str):
            return Captioned(image.name, before, None, words)
        if not words:
            return Captioned(image.name, before, None, f"{image.name}: the model said nothing")
        first = old.lines[0] if old is not None and old.lines else ""
        return Captioned(image.name, before, self.settings.wording.compose(words, first))

    def _loaded(self) -> Captioner:
        from ...devices import is_out_of_memory

        if self._model is None:
            try:
                self._model = load_captioner(self._files, self.settings)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise ModelError(
                    f"{self.settings.model}: does not fit into the memory; use cpu or a smaller model"
                ) from None
        return self._model

    def _wants(self, image: FoundFile) -> bool:
        """Count an image among those to keep or to continue with; return whether it is to be captioned."""
        written = self._captions.written(image)
        if isinstance(written, Problem):
            self._failed[image.name] = str(written)
            return False
        self._old[image.name] = written
        if self._point is not None and image.name in self._point.done:
            self.continued += 1
            return False
        if written is not None and not self.settings.overwrite:
            self.kept += 1
            self.empty += not written.lines
            return False
        return True

    def _interrupted(self) -> RestorePoint | None:
        """Return the newest restore point if this work was interrupted when it was made."""
        point = newest(self.folder)
        if point is None or point.finished or dict(point.settings) != self.settings.identity():
            return None
        return point


def load_captioner(files: TaggerFiles | ImageTextFiles, settings: CaptionSettings) -> Captioner:
    """Return a model, ready to work.

    Raises:
        ModelError: when it cannot be loaded, or needs a package that is not installed.
        ConfigError: when there is no such device.
    """
    if isinstance(files, TaggerFiles):
        from .onnx_tagger import OnnxTagger

        return OnnxTagger(
            files,
            settings.tags,
            device=settings.device,
            batch_size=settings.batch_size,
            pixels=settings.pixels,
        )
    from .image_text import ImageTextModel

    return ImageTextModel(
        files,
        prompt=settings.prompt,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        new_tokens=settings.new_tokens,
        beams=settings.beams,
    )
