"""Where the settings of a run become final: open ones are decided by the machine, the base and the images.

:func:`finalise` is called once; after it no setting changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..adapters.canonical import AdapterWeights
from ..config.contradictions import warmup_problem
from ..config.defaults import Default, OpenSettings, check_components, fill_data, fill_training
from ..config.schema import Config
from ..data.batching.prepare import Outline, base_facts, data_facts, outline_data
from ..data.reading.holdout import divide
from ..data.reading.items import Dataset
from ..data.reading.sources import by_role, gather, gather_held_out, joined
from ..data.reading.wording import Wording, reworded
from ..errors import ConfigError
from ..families.base import DiffusionModel
from ..families.compute import Compute
from ..number_formats import dtype_name
from .fast import chosen_paths
from .objective import check_objective
from .optimizers import check_rates, optimizer_kind
from .warm_start import warm_start

_PURE_NOISE = (
    "weighs snr + 1 instead of snr, as the base's schedule ends in pure noise, which would have no weight"
)


@dataclass(frozen=True)
class Images:
    """The images that the settings name, with their captions, not yet divided into training and validation.

    Attributes:
        learned: the images to learn from.
        priors: regularisation images.
        held_out: those of a hold-out folder, if there is one.
    """

    learned: Dataset
    priors: Dataset
    held_out: Dataset | None

    @classmethod
    def of(cls, config: Config) -> Images:
        """Read all folders.

        Raises:
            DatasetError: if one is missing, or holds no images.
        """
        wording = Wording.of(config.data)
        learned, priors = by_role(reworded(gather(config.data), wording))
        held_out = gather_held_out(config.data)
        return cls(learned, priors, None if held_out is None else reworded(held_out, wording))


@dataclass(frozen=True)
class Final:
    """A run's settings, and what was computed in deciding them.

    Attributes:
        config: every setting that training needs is decided.
        defaults: what was decided, with its reason.
        training: the images trained on.
        validation: the images held out.
        outline: which image when.
        start: the adapter to continue from, if there is one.
    """

    config: Config
    defaults: tuple[Default, ...]
    training: Dataset
    validation: Dataset
    outline: Outline
    start: AdapterWeights | None


def finalise(
    config: Config,
    compute: Compute,
    blueprint: DiffusionModel,
    images: Images,
    num_processes: int,
    save_memory: Callable[[OpenSettings], object] = lambda open_settings: None,
) -> Final:
    """Decide every setting that is open, each from what was decided before it.

    Args:
        config: as given.
        compute: what the run computes with.
        blueprint: of the base; no weight is looked at.
        images: all there are.
        num_processes: number of processes that train together.
        save_memory: decides what saves memory, once all else is decided; uses the blueprint up.

    Raises:
        ConfigError: for settings that contradict the base, the images or the file to continue from.
        ModelError: for a base whose recommended settings are invalid.
        DatasetError: if no image is left to train on.
    """
    facts = base_facts(blueprint, compute.device.type, num_processes)
    check_components(config, facts)
    open_settings = OpenSettings(config, facts)
    open_settings.take_recommended()
    _fill_compute(open_settings, compute)
    if blueprint.process.ends_in_noise and config.training.min_snr_gamma > 0:
        open_settings.say("training.loss_weighting", config.training.loss_weighting, _PURE_NOISE)
    fill_data(open_settings, len(images.learned.items))
    training, validation = divide(
        images.learned,
        open_settings.config.data.validation,
        images.held_out,
        config.training.seed,
        images.priors.items,
    )
    training = joined(training, images.priors)
    start = None if config.adapter.from_file is None else warm_start(open_settings, blueprint)
    rule = optimizer_kind(config.optimizer).rate
    check_objective(blueprint.process, config.training)
    fill_training(open_settings, data_facts(config, training, validation), rule)
    check_rates(open_settings.config, facts.parts)
    chosen_paths(config.training.fast)
    outline = outline_data(open_settings, training, blueprint, num_processes)
    _check_warmup(open_settings.config, outline.steps)
    save_memory(open_settings)
    defaults = tuple(open_settings.defaults)
    return Final(open_settings.final(), defaults, training, validation, outline, start)


def _check_warmup(config: Config, steps: int) -> None:
    epochs = config.training.epochs
    length = f"the run's {steps} steps" + ("" if epochs is None else f" (`training.epochs={epochs}`)")
    if problem := warmup_problem(config.optimizer, steps, length):
        raise ConfigError(problem)


def _fill_compute(open_settings: OpenSettings, compute: Compute) -> None:
    kind, attention = compute.device.type, compute.attention.training
    why = "torch cannot use the card that is here" if compute.idle_card else "the fastest one here"
    # says which of several cards is used; with several processes each one uses another card
    device = kind if open_settings.facts.num_processes > 1 else str(compute.device)
    open_settings.fill("training.device", device, why, ask_base=False)
    precision, reason = dtype_name(compute.dtype), f"fastest safe one on {kind}"
    open_settings.fill("training.precision", precision, reason, ask_base=False)
    open_settings.say("training.attention", attention.name, attention.reason)
