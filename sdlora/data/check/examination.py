"""What the data settings of a run make of its images: which are trained on, held out, or cannot be used.

The one answer to that, for the command line, the page and the check before a run; no torch, so that a page
can ask at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ...config.defaults import hold_out
from ...config.schema import Config
from ...errors import DatasetError
from ..batching.buckets import placer
from ..reading.holdout import divide
from ..reading.items import Dataset, Survey
from ..reading.measure import Progress
from ..reading.sources import by_role, survey_all, survey_held_out
from ..reading.wording import Wording
from .doctor import Report, Role, Treatment, diagnose


def examine_data(
    config: Config,
    *,
    resolution: int,
    multiple: int,
    base: str = "",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Return the findings in the folders that settings train on, and what each image is used for.

    Args:
        config: the settings; an open hold-out is decided as for training.
        resolution: that is trained at, in px.
        multiple: image sides are multiples of this many px.
        base: title of the base that is trained; empty where none is known.
        batch_size: also count the batches of an epoch; that of the settings when None.
        progress: called after each file.

    Raises:
        DatasetError: when a folder is missing, is a file, or holds no images.
        ConfigError: when the resolution is smaller than the size multiple.
    """
    data = config.data
    placed = partial(placer, multiple=multiple, grouped=data.buckets, enlarge=data.upscale)
    treatment = Treatment(
        placed(resolution),  # refuses before anything is read
        resolution,
        tuple((more, placed(more)) for more in data.more_resolutions),
        words=Wording.of(data).plain,
        base=base,
        alpha_mask=data.alpha_mask,
        crops_move=data.crop == "random",
    )
    training_survey = survey_all(data, progress)
    validation_survey = survey_held_out(data, progress)
    if data.validation is None:
        count = hold_out(len(training_survey.dataset.learned))[0]
        config = config.with_values({"data.validation": count})
    survey, roles = _with_roles(config, training_survey, validation_survey)
    return diagnose(
        survey,
        replace(treatment, roles=roles),
        recursive=data.recursive,
        batch_size=batch_size or config.training.batch_size,
    )


def _with_roles(
    config: Config, training_survey: Survey, validation_survey: Survey | None
) -> tuple[Survey, Mapping[str, Role]]:
    """Return the images of all folders, and name -> role of those not trained on."""
    learned, priors = by_role(training_survey.dataset)
    if not learned.items:  # all are broken, which the problems say
        return training_survey, {}
    apart = validation_survey.dataset if validation_survey and validation_survey.dataset.items else None
    validation = config.data.validation if validation_survey is None else 0.0
    try:
        training, held = divide(learned, validation, apart, config.training.seed, priors.items)
    except DatasetError:
        if not training_survey.problems:
            raise
        # too few images are left to hold any out; the problems of the others are reported first
        return training_survey, {}
    if validation_survey is None:
        dataset = replace(training_survey.dataset, notes=training.notes)
        return replace(training_survey, dataset=dataset), {item.name: "held out" for item in held.items}
    prefix = f"{validation_survey.dataset.folder.resolve().name}/"
    kept = {item.path for item in held.items}
    others = _renamed(validation_survey.dataset, prefix)
    roles: dict[str, Role] = {
        item.name: "held out" if item.path in kept else "not used" for item in others.items
    }
    trained = {item.path for item in (*training.items, *priors.items)}
    items = tuple(item for item in training_survey.dataset.items if item.path in trained) + others.items
    dataset = replace(
        training_survey.dataset,
        items=items,
        notes=training.notes + others.notes,
        orphans=training_survey.dataset.orphans + others.orphans,
    )
    problems = tuple(replace(problem, where=prefix + problem.where) for problem in validation_survey.problems)
    # the one folder may lie in the other
    distinct = tuple(dict.fromkeys(training_survey.problems + problems))
    broken = (
        training_survey.num_images
        - len(training_survey.dataset.items)
        + validation_survey.num_images
        - len(validation_survey.dataset.items)
    )
    broken -= len(training_survey.problems) + len(problems) - len(distinct)
    return Survey(dataset, distinct, len(items) + broken), roles


def _renamed(dataset: Dataset, prefix: str) -> Dataset:
    return replace(
        dataset,
        items=tuple(replace(item, name=prefix + item.name) for item in dataset.items),
        notes=tuple(prefix + note for note in dataset.notes),
        orphans=tuple(prefix + orphan for orphan in dataset.orphans),
    )
