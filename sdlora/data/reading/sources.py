"""Several folders -> one :class:`Dataset`: each with its own repeats, captions, weight and role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...config.data import DataConfig, SourceConfig
from ...errors import DatasetError
from .folder import Progress, Reading, survey
from .items import Dataset, ImageItem, Survey
from .problems import listed


def gather(data: DataConfig, progress: Progress | None = None) -> Dataset:
    """Return the images of ``data.folder`` and ``data.sources``, in this order.

    With several folders, an image's name begins with that of its folder. Regularisation images without
    repeats of their own are repeated until they are about as many as the images to be learned.

    Raises:
        DatasetError: when no folder is given, one is missing or empty, or any image or caption cannot
            be used.
    """
    read = _read_all(data, progress)
    complaints = [
        listed(survey_result.problems, source.folder)
        for source, survey_result in read
        if survey_result.problems
    ]
    if complaints:
        raise DatasetError("\n".join(complaints))
    dataset = _together(data, read)
    return replace(dataset, notes=(*dataset.notes, *_unused(dataset.orphans)))


def _unused(orphans: Sequence[str]) -> list[str]:
    if not orphans:
        return []
    return [f"{len(orphans)} caption file(s) belong to no image and are not used (first: {orphans[0]})"]


def survey_all(data: DataConfig, progress: Progress | None = None) -> Survey:
    """Return the usable images of all folders and the problems of the rest, as :func:`gather` reads them.

    Raises:
        DatasetError: when no folder is given, or one is missing or empty.
    """
    read = _read_all(data, progress)
    problems = [
        replace(problem, where=f"{source.folder}/{problem.where}") if len(read) > 1 else problem
        for source, survey_result in read
        for problem in survey_result.problems
    ]
    return Survey(
        _together(data, read), tuple(problems), sum(survey_result.num_images for _, survey_result in read)
    )


def _read_all(data: DataConfig, progress: Progress | None) -> list[tuple[SourceConfig, Survey]]:
    sources = _all_sources(data)
    if not sources:
        raise DatasetError("no folder of images given: sdlora train FOLDER, or data.folder in the settings")
    return [
        (
            source,
            survey(
                source.folder,
                recursive=data.recursive if source.recursive is None else source.recursive,
                trigger_word=_trigger(source, data),
                repeats=source.repeats or (1 if source.regularisation else data.repeats),
                reading=_reading(source, data),
                progress=progress,
            ),
        )
        for source in sources
    ]


def _together(data: DataConfig, read: Sequence[tuple[SourceConfig, Survey]]) -> Dataset:
    sources, datasets = [source for source, _ in read], [survey.dataset for _, survey in read]
    parts = _named(datasets) if len(datasets) > 1 else datasets
    parts, notes = _balanced(sources, parts)
    items = tuple(item for part in parts for item in part.items)
    if all(source.regularisation for source in sources):
        raise DatasetError("data.sources: there are only regularisation images; add images to be learned")
    notes += _shared(items) if len(parts) > 1 else []  # resolving 5,000 paths takes a tenth of the reading
    return Dataset(
        Path(datasets[0].folder),
        items,
        (data.trigger_word or "").strip() or None,
        (*(note for part in parts for note in part.notes), *notes),
        tuple(orphan for part in parts for orphan in part.orphans),
    )


def gather_held_out(data: DataConfig) -> Dataset | None:
    """Return the images of ``data.validation`` where it is a folder, read as ``data.folder`` is.

    Raises:
        DatasetError: when the folder is missing or empty, or any image or caption cannot be used.
    """
    survey_result = survey_held_out(data)
    if survey_result is None:
        return None
    if survey_result.problems:
        raise DatasetError(listed(survey_result.problems, survey_result.dataset.folder))
    return survey_result.dataset


def survey_held_out(data: DataConfig, progress: Progress | None = None) -> Survey | None:
    """Return the usable images of ``data.validation`` and the problems of the rest, where it is a folder.

    Raises:
        DatasetError: when the folder is missing or empty.
    """
    if not isinstance(data.validation, Path):
        return None
    return survey(
        data.validation,
        recursive=data.recursive,
        trigger_word=data.trigger_word,
        reading=_reading(SourceConfig(folder=data.validation), data),
        progress=progress,
    )


def by_role(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Return (images to be learned, regularisation images); remarks stay with the first."""
    priors = tuple(item for item in dataset.items if item.regularisation)
    return replace(dataset, items=dataset.learned), replace(dataset, items=priors, notes=(), orphans=())


def joined(learned: Dataset, priors: Dataset) -> Dataset:
    """Return both again, regularisation images last."""
    return replace(learned, items=learned.items + priors.items)


def _all_sources(data: DataConfig) -> list[SourceConfig]:
    main = [SourceConfig(folder=data.folder, mask_folder=data.mask_folder)] if data.folder else []
    return [*main, *data.sources]


def _trigger(source: SourceConfig, data: DataConfig) -> str | None:
    if source.regularisation:
        return None
    return data.trigger_word if source.trigger_word is None else source.trigger_word


def _reading(source: SourceConfig, data: DataConfig) -> Reading:
    return Reading(
        kohya_folders=data.kohya_folders if source.kohya_folders is None else source.kohya_folders,
        metadata_caption=data.metadata_caption,
        captions_from_files=data.caption_from == "files",
        fallback_caption=source.caption,
        follow_links=data.follow_links,
        weight=source.weight,
        regularisation=source.regularisation,
        mask_folder=source.mask_folder,
    )


def _named(parts: Sequence[Dataset]) -> list[Dataset]:
    """Return the parts with the folder's name before every name, numbered if two folders have one name."""
    bases = [part.folder.resolve().name or "folder" for part in parts]
    alike = Counter(bases)
    names = [f"{base}#{n}" if alike[base] > 1 else base for n, base in enumerate(bases, start=1)]
    return [
        replace(
            part,
            items=tuple(replace(item, name=f"{name}/{item.name}") for item in part.items),
            notes=tuple(f"{name}/{note}" for note in part.notes),
            orphans=tuple(f"{name}/{orphan}" for orphan in part.orphans),
        )
        for name, part in zip(names, parts, strict=True)
    ]


def _balanced(sources: Sequence[SourceConfig], parts: Sequence[Dataset]) -> tuple[list[Dataset], list[str]]:
    """Return the parts with repeats for those regularisation images whose repeats were left open."""
    wanted = sum(
        part.num_visits for source, part in zip(sources, parts, strict=True) if not source.regularisation
    )
    balanced: list[Dataset] = []
    notes: list[str] = []
    for source, part in zip(sources, parts, strict=True):
        if source.regularisation and source.repeats is None and part.num_visits:
            times = max(1, round(wanted / part.num_visits))
            items = tuple(replace(item, repeats=item.repeats * times) for item in part.items)
            balanced.append(replace(part, items=items))
            notes.append(
                f"{source.folder}: each regularisation image counts {times} times, to be about as many as "
                f"the {wanted} looks at images to be learned"
            )
        else:
            balanced.append(part)
    return balanced, notes


def _shared(items: Sequence[ImageItem]) -> list[str]:
    times = Counter(item.path.resolve() for item in items)
    return [f"{path}: is in {count} sources and counts in each" for path, count in times.items() if count > 1]
