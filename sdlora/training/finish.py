"""From a run's weights to adapter files, with everything known about their training in the header."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters.canonical import AdapterFile, AdapterInfo
from ..events import Notice
from ..exporting.export import write_finished
from ..exporting.webui_card import card_image
from ..formats.adapter_files import write_adapter
from ..formats.metadata import TrainingFacts, build_header
from ..machine import version
from .extras import attempt
from .optimizers import optimizer_kind

if TYPE_CHECKING:
    from ..data.reading.items import ImageItem
    from .state import Run


def finish_run(run: Run, losses: Sequence[float]) -> Path:
    """Write ``NAME.safetensors`` in the family's format into the run folder, proven by reading it back."""
    target = run.folder.adapter_file(run.config.output.name)
    output, preview = run.config.output, attempt(run, "the adapter's preview", _usable_preview)
    adapter = adapter_file(run, final_loss=sum(losses) / len(losses) if losses else None, preview=preview)
    report = write_finished(adapter, target, output.dtype, run.model.info, preview, private=output.private)
    for problem in report.problems:
        run.emit(Notice(problem))
    return target


def _usable_preview(run: Run) -> Path | None:
    """Return the newest preview.

    Raises:
        OutputError: if it is no image (any more).
    """
    preview = run.folder.newest_preview()
    card_image(preview)
    return preview


def write_checkpoint_adapter(run: Run, target: Path) -> None:
    """Write the fp32 masters as an adapter file for a checkpoint."""
    info = run.model.info
    write_adapter(adapter_file(run), info.adapter_format, target, torch.float32, info)


def adapter_file(run: Run, *, final_loss: float | None = None, preview: Path | None = None) -> AdapterFile:
    """Return the adapter as it now stands (averaged, if the run averages), with its header."""
    config, items = run.config, run.dataset.items
    triggers = (config.data.trigger_word,) if config.data.trigger_word else ()
    learned = _by_folder(item for item in items if not item.regularisation)
    regularisation = _by_folder(item for item in items if item.regularisation)
    facts = TrainingFacts(
        family=run.model.info,
        name=config.output.name,
        base_title=run.model.base.title,
        base_digest=run.model.base.digest,
        config=config,
        optimizer=optimizer_kind(config.optimizer).header(config.optimizer),
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
        preview=preview,
        sdlora_version=version(),
    )
    info = AdapterInfo(run.model.info.name, config.output.name, triggers, build_header(facts))
    as_learned = config.training.average != "none" and config.training.export_weights == "learned"
    with nullcontext() if as_learned else run.shown.in_model():
        return AdapterFile(run.masters(), info)


def _by_folder(items: Iterable[ImageItem]) -> dict[str, list[ImageItem]]:
    folders: dict[str, list[ImageItem]] = {}
    for item in items:
        folders.setdefault(str(item.path.absolute().parent), []).append(item)
    return folders


def _tags(captions: Sequence[str]) -> dict[str, int]:
    """Count the comma-separated parts of the captions, as WebUI shows them."""
    return dict(Counter(tag for caption in captions for part in caption.split(",") if (tag := part.strip())))
