"""From a run's weights to adapter files, with everything known about their training in the header."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters.canonical import AdapterFile, AdapterInfo
from ..config.schema import Config, ExportedWeights
from ..data.captioning.wording import tags_of
from ..events import Notice
from ..exporting.export import write_finished
from ..exporting.webui_card import card_image
from ..formats.adapter_files import read_adapter, write_adapter
from ..formats.metadata import TrainingFacts, build_header, thumbnail
from ..judging.verdict import Verdict, choose
from ..machine import version
from ..run_folder import CheckpointFolder, list_checkpoints
from .checkpoint import is_whole
from .extras import attempt
from .optimizers import header_of

if TYPE_CHECKING:
    from ..data.reading.items import ImageItem
    from .state import Run


def finish_run(run: Run, losses: Sequence[float], verdict: Verdict | None = None) -> Path:
    """Write ``NAME.safetensors`` in the family's format into the run folder, proven by reading it back.

    Args:
        run: at its end.
        losses: of the last steps.
        verdict: what judging says: its best step is written, at its recommended strength, and the last one
            beside it as ``NAME-last.safetensors``; without one, the last step is.
    """
    name, best = run.config.output.name, _best_checkpoint(run, verdict)
    preview = attempt(
        run, "the adapter's preview", partial(_usable_preview, step=best.step if best else None)
    )
    strength = None if verdict is None else verdict.strength
    if best is not None:
        strength = None if verdict is None else _strength_of_last(run, verdict)
    last = adapter_file(
        run,
        final_loss=sum(losses) / len(losses) if losses else None,
        preview=preview,
        preferred_strength=strength,
        as_learned=best is None and verdict is not None and verdict.takes_learned,
    )
    target = run.folder.adapter_file(name)
    if best is None:
        _write(run, last, target, preview)
        return target
    assert verdict is not None
    _write(run, last, run.folder.adapter_file(f"{name}-last"), None)
    chosen = read_adapter(best.adapter_file)
    entries = {**chosen.info.metadata, "sdlora.preferred_strength": repr(verdict.strength)}
    if preview is not None:
        entries["modelspec.thumbnail"] = thumbnail(preview)
    _write(run, replace(chosen, info=replace(chosen.info, metadata=entries)), target, preview)
    return target


def _write(run: Run, adapter: AdapterFile, target: Path, preview: Path | None) -> None:
    output = run.config.output
    report = write_finished(adapter, target, output.dtype, run.model.info, preview, private=output.private)
    for problem in report.problems:
        run.emit(Notice(problem))


def _best_checkpoint(run: Run, verdict: Verdict | None) -> CheckpointFolder | None:
    """Return the checkpoint to export instead of the last step; None for that step itself."""
    if verdict is None or verdict.best.step == run.step:
        return None
    saved = [
        folder for folder in list_checkpoints(run.folder.checkpoints) if folder.step == verdict.best.step
    ]
    if saved and is_whole(saved[0]):
        return saved[0]
    text = f"step {verdict.best.step} is the best, but its checkpoint is not there (any more)"
    run.emit(Notice(f"{text}, so the last step is the adapter"))
    return None


def _strength_of_last(run: Run, verdict: Verdict) -> float | None:
    """Return the strength at which the last step is best, if it was judged."""
    cells = [cell for cell in verdict.cells if cell.step == run.step]
    return choose(cells).strength if cells else None


def _usable_preview(run: Run, step: int | None = None) -> Path | None:
    """Return the newest preview, or the newest one up to a step.

    Raises:
        OutputError: if it is no image (any more).
    """
    preview = run.folder.newest_preview()
    if step is not None:
        earlier = [
            shown.file for shown in run.folder.list_previews() if shown.number == 1 and shown.step <= step
        ]
        preview = earlier[-1] if earlier else preview
    card_image(preview)
    return preview


def write_checkpoint_adapter(run: Run, target: Path) -> None:
    """Write the fp32 masters as an adapter file for a checkpoint."""
    info = run.model.info
    write_adapter(adapter_file(run), info.adapter_format, target, torch.float32, info)


def adapter_file(
    run: Run,
    *,
    final_loss: float | None = None,
    preview: Path | None = None,
    preferred_strength: float | None = None,
    as_learned: bool = False,
) -> AdapterFile:
    """Return the adapter as it now stands, with its header.

    Args:
        run: at the step whose adapter this is.
        final_loss: mean of the last steps.
        preview: image for the header.
        preferred_strength: that judging recommends.
        as_learned: take the weights as learned although the run averages.
    """
    as_learned = as_learned or run.exports_learned
    config, items = _with_exported(run.config, as_learned), run.dataset.items
    triggers = (config.data.trigger_word,) if config.data.trigger_word else ()
    learned = _by_folder(item for item in items if not item.regularisation)
    regularisation = _by_folder(item for item in items if item.regularisation)
    facts = TrainingFacts(
        family=run.model.info,
        name=config.output.name,
        base_title=run.model.base.title,
        base_digest=run.model.base.digest,
        config=config,
        optimizer=header_of(run.optimizer, config.optimizer),
        warmup_steps=config.optimizer.warmup(run.steps),
        prediction_type=run.model.process.prediction.name,
        zero_terminal_snr=run.model.process.ends_in_noise,
        native_resolution=run.model.facts.native_resolution,
        steps=run.step,
        epochs=run.step / run.order.steps_per_epoch,
        num_images=sum(map(len, learned.values())),
        num_batches_per_epoch=run.order.steps_per_epoch * config.training.gradient_accumulation,
        buckets=Counter(placement.bucket for placement in run.training.placements),
        folder_images={folder: len(items_there) for folder, items_there in learned.items()},
        reg_folder_images={folder: len(items_there) for folder, items_there in regularisation.items()},
        folder_repeats={
            folder: items_there[0].repeats
            for folder, items_there in (*learned.items(), *regularisation.items())
        },
        tag_frequency={
            folder: _tags([item.caption for item in items_there]) for folder, items_there in learned.items()
        },
        started_at=run.started_at,
        finished_at=time.time(),
        final_loss=final_loss,
        trigger_words=triggers,
        preferred_strength=preferred_strength,
        preview=preview,
        sdlora_version=version(),
    )
    info = AdapterInfo(run.model.info.name, config.output.name, triggers, build_header(facts))
    with nullcontext() if as_learned else run.shown.in_model():
        return AdapterFile(run.masters(), info)


def _with_exported(config: Config, as_learned: bool) -> Config:
    """Return the settings for a header, which says which weights the file holds."""
    if config.training.average == "none":
        return config
    which: ExportedWeights = "learned" if as_learned else "average"
    training = config.training.model_copy(update={"export_weights": which})
    return config.model_copy(update={"training": training})


def _by_folder(items: Iterable[ImageItem]) -> dict[str, list[ImageItem]]:
    folders: dict[str, list[ImageItem]] = {}
    for item in items:
        folders.setdefault(str(item.path.absolute().parent), []).append(item)
    return folders


def _tags(captions: Sequence[str]) -> dict[str, int]:
    """Count the comma-separated parts of the captions, as WebUI shows them and `sdlora tags` counts them."""
    return dict(Counter(tag for caption in captions for tag in tags_of(caption)))
