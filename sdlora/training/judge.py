"""A run that judges itself: a panel of prompts drawn at several strengths, at checkpoints spread over it.

Judging reads the adapter's values and draws with the base's weights changed for a while and put back bit
for bit; all noise comes from generators of its own. So the training's numbers are the same with and without
it. What it costs is measured: as many strengths are drawn as ``judge.share`` of the training's time pays for.
All images are kept beside the run, so a run that goes on judges with what was drawn before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from ..adapters.canonical import AdapterWeights
from ..adapters.folded import folded
from ..data.reading.decoding import opened_image
from ..data.reading.image_files import load_pixels
from ..errors import SdloraError, TrainingError
from ..events import Judged
from ..families.base import Conditioning
from ..families.emphasis import escape
from ..files import parse_json, replacing, write_json
from ..generation.grids import side_by_side
from ..generation.render import GenerateRequest, encode_prompts, render, usual_guidance
from ..judging.panel import Panel, Subject, make_panel
from ..judging.score import MIN_IMAGES, through_autoencoder
from ..judging.verdict import Cell, PanelJudge, Verdict, choose, copy_note, without_gain
from .extras import reason
from .previews import shared_image

if TYPE_CHECKING:
    from ..data.reading.items import ImageItem
    from .state import Run

Result = TypeVar("Result")

_MOST_STEPS = 8  # denoising steps of an image: enough to compare drawings of one sampler
_MOST_TRAINING = 32  # training images that the style is measured on
_AT_THE_END = 3  # strengths that the last checkpoint should have
_LEAST_CELLS = 4  # checkpoints x strengths, besides the base, that a panel must leave time for
_PASSES = 2.3  # forward passes that training on an image takes as long as
_SEED = 1


class RunJudge:
    """Judges a run while it trains.

    Args:
        run: to be judged.
        seconds_per_step: that training is expected to take.

    Attributes:
        cells: what was judged so far, in the main process.
    """

    def __init__(self, run: Run, seconds_per_step: float) -> None:
        self._run = run
        self._settings = run.config.judge
        self._seconds_per_step = seconds_per_step
        self.cells: list[Cell] = []
        self._judge: PanelJudge | None = None
        self._panel: Panel | None = None
        self._spent = 0.0
        self._per_image = 0.0
        self._text: dict[str, Conditioning] = {}
        self._off = self._begun = False
        # (step, score) of each cell, as told by the run's earlier parts: what pruning looks at
        self._scores: dict[tuple[int, float], float] = {}
        if run.processes.is_main:
            for entry in self._record():
                self._scores[entry["step"], entry["strength"]] = entry["score"]

    def due(self, step: int) -> bool:
        """Return whether this step's checkpoint is to be judged, the same in all processes."""
        if self._off or not self._settings.every:
            return False
        if step != self._run.steps and step % self._settings.every:
            return False
        return bool(self._agreed(lambda: not self._begun or bool(self._affordable(step))))

    def missing(self, step: int) -> bool:
        """Return whether the step that a resumed run begins at was to be judged, but was not."""
        judged = self._agreed(lambda: any(at == step for at, _ in self._scores))
        return not judged and self.due(step)

    def look(self) -> None:
        """Draw and judge the run as it is now.

        Raises:
            SdloraError: in all processes, for what makes judging impossible; it is not tried again.
            torch.OutOfMemoryError: in all processes, if one of them lacks memory.
        """
        run = self._run
        self._off = True  # until it went well
        run.loader.settle()
        with run.to_export():
            weights = run.masters()
        with self._timed():
            self._begin(weights)
        strengths: list[float] = self._agreed(lambda: self._affordable(run.step))
        with self._timed():
            for strength in strengths:
                if self._agreed(run.stopping):
                    break
                self._on_main(partial(self._take, strength, self._drawn(weights, strength)))
        self._off = False
        self._on_main(lambda: self._tell(strengths))

    def conclude(self) -> Verdict | None:
        """Return what all cells say, in the main process; None if nothing was judged. All call it."""
        if not self._agreed(lambda: bool(self._scores)):
            return None
        with self._run.to_export():
            self._begin(self._run.masters())
        verdict = self._on_main(self._verdict)
        strength = self._agreed(lambda: self._strength_to_compare(verdict))
        if strength is None:
            return verdict
        with self._timed():
            images = self._drawn(self._run.masters(), strength)
        return self._on_main(lambda: verdict and self._with_learned(verdict, images))

    def kept_steps(self) -> frozenset[int]:
        """Return the steps whose checkpoints stay: the best, the runner-up, and some spread over the run."""
        tops: dict[int, float] = {}
        for (step, _), score in self._scores.items():
            tops[step] = max(score, tops.get(step, score))
        ranked = sorted(tops, key=lambda step: (-tops[step], step))
        more = max(0, self._run.config.training.keep_checkpoints - 2)
        ordered = sorted(tops)
        spread = {ordered[number * len(ordered) // more] for number in range(more)} if ordered else set()
        return frozenset({*ranked[:2], *spread})

    @property
    def enough(self) -> bool:
        """Whether the run has gone on for as long without getting better as the settings allow."""
        patience = self._settings.patience
        return bool(patience and self._agreed(lambda: without_gain(self.cells) >= patience))

    @property
    def share(self) -> float:
        """What judging took so far, as a share of the training's time."""
        return self._spent / max(self._seconds() * max(1, self._run.step), 1e-9)

    @property
    def panel(self) -> Panel:
        """The prompts."""
        assert self._panel is not None, "nothing was judged yet"
        return self._panel

    def images(self) -> dict[tuple[str, float], Sequence[Image.Image]]:
        """Return the panel's images of all cells that are there; the base's under ``("base", 0)``."""
        drawn: dict[tuple[str, float], Sequence[Image.Image]] = {}
        files = {("base", 0.0): self._run.folder.judged_images(None, 0.0)}
        for cell in self.cells:
            files[cell.source, cell.strength] = self._run.folder.judged_images(cell.step, cell.strength)
        for key, file in files.items():
            with suppress(SdloraError, OSError):
                if (images := self._parted(file)) is not None:
                    drawn[key] = images
        return drawn

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - begun

    # --- what it may cost ---------------------------------------------------------------------------

    def _affordable(self, step: int) -> list[float]:
        """Return the strengths that there is time for at a step, in the main process."""
        run, strengths = self._run, self._settings.strengths
        ranked = sorted(strengths, key=lambda s: (abs(s - 1.0), s))
        cell = max(1e-9, self._per_image * len(self.panel.all_prompts))
        left = self._settings.share * self._seconds() * run.steps - self._spent
        left -= cell if run.asks_which_is_better else 0.0
        count = max(int(left / cell + 0.5), 0 if self._scores else 1)
        if step < run.steps:
            every = self._settings.every or run.steps
            coming = (run.steps - 1) // every - (step - 1) // every  # without the last step's
            count = int((left / cell - min(_AT_THE_END, len(ranked))) / max(1, coming))
        return sorted(ranked[: max(0, count)])

    def _panel_size(self) -> int:
        """Return how many images with the trigger word are drawn at each strength.

        Raises:
            SdloraError: if the run is too short for the fewest that say something.
        """
        stored = self._stored().get("panel")
        if isinstance(stored, dict) and isinstance(stored.get("prompts"), list):
            return len(stored["prompts"])  # a run that goes on keeps its panel
        run, share = self._run, self._settings.share
        request = self._request("", 0)
        passes = request.steps * (2 if request.guidance > 1 else 1)
        images = share * run.steps * run.images_per_step * _PASSES / passes
        most = int(images / (1 + _LEAST_CELLS))
        count = next((n for n in range(self._settings.images, 0, -1) if n + _plain(n) <= most), 0)
        if count < MIN_IMAGES:
            raise SdloraError(
                f"{share:.0%} of this training's time pays for some {int(images)} images, too few for "
                f"{_LEAST_CELLS + 1} rows of {MIN_IMAGES + 1}; a larger judge.share or a longer run helps"
            )
        return count

    def _seconds(self) -> float:
        """Return seconds of a training step: measured, once there are some."""
        run = self._run
        measured = run.step_seconds / run.steps_here if run.steps_here >= 5 else self._seconds_per_step
        return measured

    # --- drawing --------------------------------------------------------------------------------------

    def _begin(self, weights: AdapterWeights) -> None:
        """Make the panel and the base's images of it, and take up what was judged before."""
        if self._begun:
            return
        run = self._run
        held, learned = run.validation.items, run.dataset.learned
        if len(learned) < MIN_IMAGES:
            raise SdloraError(
                f"{len(learned)} images are too few to tell their style; {MIN_IMAGES} or more can be judged"
            )
        try:
            count = self._on_all(self._panel_size)
            self._panel = make_panel(
                [self._subject(item) for item in held],
                [self._subject(item) for item in learned],
                count,
                plain=_plain(count),
            )
        except ValueError as error:
            raise SdloraError(str(error)) from None
        known = self._on_main(self._kept_base)
        if self._agreed(lambda: known is None):
            begun = time.monotonic()
            known = self._drawn(weights, 0.0)
            self._per_image = (time.monotonic() - begun) / len(self.panel.all_prompts)
            self._on_main(lambda: self._save(None, 0.0, known or []))
        self._on_main(lambda: self._measure_base(known or []))
        self._begun = True

    def _subject(self, item: ImageItem) -> Subject:
        config = self._run.config.data
        word = item.trigger_word or config.trigger_word
        if config.emphasis:
            return Subject(item.caption, word)
        return Subject(escape(item.caption), escape(word) if word else None)

    def _measure_base(self, images: Sequence[Image.Image]) -> None:
        """Set up the judge, and judge the images that were drawn before this process began."""
        run, count = self._run, len(self.panel.prompts)
        side = images[0].width
        learned = run.dataset.learned
        most = min(len(learned), _MOST_TRAINING, 3 * count)
        spread = [learned[n * len(learned) // most] for n in range(most)]
        background = run.config.data.background
        self._ready_to_draw()
        try:
            trained, held = (
                through_autoencoder(run.model, [load_pixels(item, background) for item in items], side)
                for items in (spread, run.validation.items[:_MOST_TRAINING])
            )
        finally:
            run.ready_to_train()
        self._judge = PanelJudge(
            images[:count], trained, held, images[count:], judges_subject=self.panel.judges_subject
        )
        for entry in self._record():
            step, strength = entry["step"], entry["strength"]
            file = run.folder.judged_images(step, strength)
            with suppress(SdloraError, OSError, ValueError):
                if step <= run.step and (drawn := self._parted(file)) is not None:
                    self._add(step, strength, drawn)

    def _requests(self) -> list[GenerateRequest]:
        return [self._request(text, number) for number, text in enumerate(self.panel.all_prompts)]

    def _request(self, prompt: str, number: int) -> GenerateRequest:
        run, settings = self._run, self._run.config.sample
        multiple = run.model.facts.size_multiple
        side = max(multiple, (run.config.data.resolution or 0) // multiple * multiple)
        return GenerateRequest(
            prompt=prompt,
            negative_prompt=settings.negative_prompt,
            height=side,
            width=side,
            steps=min(_MOST_STEPS, settings.steps),
            guidance=usual_guidance(run.model) if settings.guidance is None else settings.guidance,
            sampler=settings.sampler,
            seed=_SEED + number,
        )

    def _drawn(self, weights: AdapterWeights, strength: float) -> list[Image.Image]:
        """Return the panel's images at a strength, each process drawing a share; none but in the main one."""
        run, requests = self._run, self._requests()
        share = requests[run.processes.rank :: run.processes.count]
        parts = run.processes.together(lambda: self._pixels(share, weights, strength))
        if not run.processes.is_main:
            return []
        return [shared_image(parts, requests, number) for number in range(len(requests))]

    def _pixels(self, requests: Sequence[GenerateRequest], weights: AdapterWeights, strength: float) -> bytes:
        if not requests:
            return b""
        run = self._run
        with run.fast.out():
            self._ready_to_draw()
            try:
                with folded(run.model, weights, strength):
                    encoded = self._encoded()
                    # as many at once as previews, whose memory was planned
                    alone = run.config.training.autoencoder == "banded"
                    most = 1 if alone else max(1, len(run.config.sample.prompts or ()))
                    chunks = [requests[start : start + most] for start in range(0, len(requests), most)]
                    images = [image for part in chunks for image in render(run.model, part, encoded=encoded)]
            finally:
                run.ready_to_train()
        return b"".join(image.convert("RGB").tobytes() for image in images)

    def _ready_to_draw(self) -> None:
        run = self._run
        in_loop = run.training.views.in_loop
        run.model.prepare(training=False, keep_text=run.keep_text, keep_images=in_loop, lean=True)

    def _encoded(self) -> Mapping[str, Conditioning]:
        """Return the prompts' conditioning, encoded once; none if the text encoders change."""
        if not self._text and not self._run.config.adapter.adapts_text:
            prompts = [self._run.config.sample.negative_prompt, *self.panel.all_prompts]
            self._text = encode_prompts(self._run.model, prompts)
        return self._text

    # --- measuring, in the main process ---------------------------------------------------------------

    def _take(self, strength: float, images: Sequence[Image.Image]) -> None:
        self._save(self._run.step, strength, images)
        self._add(self._run.step, strength, images)

    def _add(self, step: int, strength: float, images: Sequence[Image.Image]) -> None:
        assert self._judge is not None
        count = len(self.panel.prompts)
        cell = self._judge.cell(f"step {step}", step, strength, images[:count], images[count:])
        self.cells = [other for other in self.cells if (other.step, other.strength) != (step, strength)] + [
            cell
        ]
        self._scores[step, strength] = cell.score.mean

    def _tell(self, strengths: Sequence[float]) -> None:
        """Write down what is known now, and say which cell is best."""
        run = self._run
        self._write_record()
        here = sorted((cell for cell in self.cells if cell.step == run.step), key=lambda cell: cell.strength)
        if here:
            verdict = choose(self.cells, self.panel.notes)
            assert verdict.best.step is not None
            run.emit(
                Judged(
                    step=run.step,
                    strengths=tuple(cell.strength for cell in here),
                    scores=tuple(cell.score for cell in here),
                    best_step=verdict.best.step,
                    best_strength=verdict.strength,
                    reason=verdict.reason,
                    notes=verdict.notes,
                )
            )

    def _verdict(self) -> Verdict | None:
        if not self.cells or self._judge is None:
            return None
        notes = list(self.panel.notes)
        verdict = choose(self.cells, notes)
        file = self._run.folder.judged_images(verdict.best.step, verdict.best.strength)
        images = self._parted(file)
        if images is not None and (note := copy_note(self._judge.copies(images[: len(self.panel.prompts)]))):
            notes.append(note)
        return choose(self.cells, notes)

    def _strength_to_compare(self, verdict: Verdict | None) -> float | None:
        """Return the strength at which the learned values are drawn, too; None if the file is decided."""
        run = self._run
        undecided = verdict is not None and run.asks_which_is_better and verdict.best.step == run.step
        return verdict.best.strength if verdict is not None and undecided else None

    def _with_learned(self, verdict: Verdict, images: Sequence[Image.Image]) -> Verdict:
        assert self._judge is not None
        run, count = self._run, len(self.panel.prompts)
        strength = verdict.best.strength
        self._save(run.step, strength, images, learned=True)
        name = f"step {run.step} as learned"
        return verdict.beside(self._judge.cell(name, run.step, strength, images[:count], images[count:]))

    # --- what is kept beside the run ------------------------------------------------------------------

    def _save(
        self, step: int | None, strength: float, images: Sequence[Image.Image], *, learned: bool = False
    ) -> None:
        file = self._run.folder.judged_images(step, strength, learned=learned)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            side_by_side(images).save(temporary, format="PNG")

    def _parted(self, file: Path) -> list[Image.Image] | None:
        """Return the images of one file; None if they are not this panel's."""
        count = len(self.panel.all_prompts)
        with opened_image(file) as loaded:
            strip = loaded.image.convert("RGB")
        side = strip.height
        if strip.width != side * count:
            return None
        return [strip.crop((number * side, 0, (number + 1) * side, side)) for number in range(count)]

    def _kept_base(self) -> list[Image.Image] | None:
        """Return the base's images from an earlier part of the run, if they are of this panel."""
        record = self._stored()
        file = self._run.folder.judged_images(None, 0.0)
        if record.get("panel") != self._identity() or not file.is_file():
            self._scores = {}
            return None
        self._spent = _number(record.get("seconds"))
        self._per_image = _number(record.get("seconds_per_image"))
        with suppress(SdloraError):
            return self._parted(file)
        return None

    def _identity(self) -> dict[str, Any]:
        """Return what the images of the panel depend on besides the adapter."""
        return {
            "prompts": list(self.panel.prompts),
            "plain": list(self.panel.plain),
            "drawn": [repr(replace(request, prompt="")) for request in self._requests()[:1]],
        }

    def _write_record(self) -> None:
        cells = [
            {"step": step, "strength": strength, "score": score}
            for (step, strength), score in sorted(self._scores.items())
        ]
        record = {"seconds": self._spent, "seconds_per_image": self._per_image, "panel": self._identity()}
        write_json(self._run.folder.judging_file, {**record, "cells": cells})

    def _stored(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            stored = parse_json(self._run.folder.judging_file.read_text(encoding="utf-8"))
            if isinstance(stored, dict):
                return stored
        return {}

    def _record(self) -> list[dict[str, Any]]:
        """Return the cells of earlier parts of the run up to now, as far as they can be read."""
        cells = self._stored().get("cells")
        kinds: dict[str, tuple[type, ...]]
        kinds = {"step": (int,), "strength": (int, float), "score": (int, float)}
        return [
            cell
            for cell in (cells if isinstance(cells, list) else [])
            if isinstance(cell, dict)
            and all(isinstance(cell.get(name), kind) for name, kind in kinds.items())
            and cell["step"] <= self._run.step
        ]

    # --- several processes ----------------------------------------------------------------------------

    def _agreed(self, answer: Callable[[], Any]) -> Any:
        """Return the main process' answer in all of them."""
        processes = self._run.processes
        return processes.exchange(answer() if processes.is_main else None)[0]

    def _on_all(self, answer: Callable[[], Result]) -> Result:
        """Return in all processes what the main one answers.

        Raises:
            SdloraError: in all of them, what went wrong there.
        """
        got = self._on_main(answer)
        answered: Result = self._agreed(lambda: got)
        return answered

    def _on_main(self, work: Callable[[], Result]) -> Result | None:
        """Do something in the main process alone; if it fails there, all processes raise.

        Raises:
            SdloraError: what went wrong.
        """
        result, problem, error = None, None, None
        if self._run.processes.is_main:
            try:
                result = work()
            except Exception as caught:
                problem, error = reason(caught), caught
        told = self._run.processes.exchange(problem)[0]
        if told is not None:
            raise error or TrainingError(told)
        return result


def _plain(count: int) -> int:
    """Return how many prompts without the trigger word are drawn beside ``count`` with it."""
    return 2 if count >= 8 else 1


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def make_judge(run: Run, seconds_per_step: float) -> RunJudge | None:
    """Return the judge of a run; None if the settings ask for none."""
    return RunJudge(run, seconds_per_step) if run.config.judge.every else None
