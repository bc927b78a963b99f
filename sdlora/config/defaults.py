"""Settings that the user left open follow the data and the base, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, ModelError
from .adapter import PART_KEYS, AdaptedPart
from .kinds import KIND_RULES
from .prompt_lines import TAG, read_prompt_file
from .schema import USUAL_SCHEDULE, Config, OptimizerConfig, Schedule

USUAL_GUIDANCE = 7.0
"""Guidance scale for a base that recommends none."""
LEAST_STEPS_TO_JUDGE = 100
"""Shorter runs are not judged unless asked for."""

RECOMMENDABLE = frozenset(
    {
        *("adapter.targets", "optimizer.lora_plus_ratio", "training.noise_offset", "training.min_snr_gamma"),
        *("training.timestep_distribution", "data.caption_dropout"),
    }
)
"""Settings with a default of their own that a base's recommendation may replace: how it learns, no more."""

VALIDATION_SHARE = 0.1
"""Of the time of training, how much the measurements on held-out images may cost."""


@dataclass(frozen=True)
class Default:
    """A value chosen for the user: dotted key, value, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class BaseFacts:
    """What the rules need to know about the base and the machine.

    Attributes:
        title: of the base.
        recommended: settings the base's author suggests, by dotted key.
        native_resolution: px.
        device: type of the device, e.g. ``cuda``.
        parts: the parts of it that can be adapted.
        num_processes: processes that train together, each on its own micro-batches.
    """

    title: str
    recommended: Mapping[str, Any]
    native_resolution: int
    device: str
    parts: tuple[AdaptedPart, ...] = ("denoiser", "text_encoder")
    num_processes: int = 1

    @property
    def text_encoders(self) -> tuple[AdaptedPart, ...]:
        """The parts that are text encoders."""
        return tuple(part for part in self.parts if part != "denoiser")


@dataclass(frozen=True)
class DataFacts:
    """What the rules need to know about the images.

    Attributes:
        num_images: images that are learned from, without regularisation images and held-out ones.
        num_visits: visits of an epoch: the sum of the repeats, regularisation images included.
        num_held_out: images held out.
        prompts: captions written as prompts, those of held-out images first.
    """

    num_images: int
    num_visits: int
    num_held_out: int = 0
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class RateRule:
    """The learning rate of an optimizer if the user gives none.

    Attributes:
        rate: the rate at which an adapter of scale 1 learns well.
        reason: why, for people.
        follows_scale: whether it is divided by the adapter's scale, since the size of dW is scale * rate.
        one_rate: whether everything that is trained must have the same rate.
        schedule: the learning rate's schedule if the user gives none.
        share: of the rate that a base recommends, found with AdamW, where it recommends one; 0 for an
            optimizer whose rates have nothing to do with AdamW's.
        first_guess: the setting with the rate from which it looks for its own, if it does.
    """

    rate: float = 1e-4
    reason: str = "the usual rate"
    follows_scale: bool = True
    one_rate: bool = False
    schedule: Schedule = USUAL_SCHEDULE
    share: float = 1.0
    first_guess: str | None = None


USUAL_RATE = RateRule()


class OpenSettings:
    """Settings of which some are left open; they are filled one by one, and later rules see earlier results.

    Attributes:
        config: the settings, as far as they are decided.
        facts: about the base.
        defaults: what was decided, in the order of decision.
    """

    def __init__(self, config: Config, facts: BaseFacts) -> None:
        self.config, self.facts = config, facts
        self.defaults: list[Default] = []
        self._given = config
        self._put: set[str] = set()

    def fill(self, key: str, value: Any, reason: str, *, ask_base: bool = True) -> None:
        """Set an open setting; a value that the base's author recommends wins over the general rule.

        Raises:
            ModelError: if the base recommends an impossible value.
        """
        if self.config.get(key) is not None:
            return
        if ask_base and key in self.facts.recommended:
            value, reason = self._recommended(key), f"recommended by the base {self.facts.title}"
        self.defaults.append(Default(key, value, reason))
        section, name = key.split(".")
        # not validated here, as each rule's value has the right type; all are validated once, in final()
        changed = getattr(self.config, section).model_copy(update={name: value})
        self.config = self.config.model_copy(update={section: changed})

    def take_recommended(self) -> None:
        """Put what the base's author recommends in the place of defaults that the user left as they are.

        Raises:
            ModelError: if the base recommends an impossible value.
        """
        for key in sorted(RECOMMENDABLE & self.facts.recommended.keys()):
            section, name = key.split(".")
            # a file to continue from has layers of its own
            settled = key == "adapter.targets" and self._given.adapter.from_file is not None
            if settled or name in getattr(self._given, section).model_fields_set:
                continue
            if (value := self._recommended(key)) != self.config.get(key):
                self.put(key, value, f"recommended by the base {self.facts.title}")

    def put(self, key: str, value: Any, reason: str) -> None:
        """Decide a setting whose default the user left as it was, which need not be None."""
        self._put.add(key)
        self.defaults.append(Default(key, value, reason))
        section, name = key.split(".")
        changed = getattr(self.config, section).model_copy(update={name: value})
        self.config = self.config.model_copy(update={section: changed})

    def say(self, key: str, value: Any, reason: str) -> None:
        """Record a choice that is not a setting."""
        self.defaults.append(Default(key, value, reason))

    def final(self) -> Config:
        """Return the settings, validated as a whole."""
        filled = {
            default.key for default in self.defaults if self._given.get(default.key) is None
        } | self._put
        return self._given.with_values({key: self.config.get(key) for key in filled})

    def _recommended(self, key: str) -> Any:
        section, name = key.split(".")
        value = self.facts.recommended[key]
        try:
            return getattr(type(getattr(self.config, section)).model_validate({name: value}), name)
        except ValidationError as error:
            raise ModelError(
                f"{self.facts.title}: its sdlora.json recommends `{key}={value}`, which is impossible "
                f"({error.errors()[0]['msg']}); set {key} yourself, or correct that file"
            ) from None


def check_components(config: Config, facts: BaseFacts) -> None:
    """Refuse settings for a text encoder that the base does not have.

    Raises:
        ConfigError: naming all such settings.
    """
    useless = []
    for part in PART_KEYS.keys() - set(facts.parts):
        switch, *others = PART_KEYS[part]
        useless += [key for key in others if config.get(key) is not None]
        useless += [switch] if switch and config.get(switch) else []
    if useless:
        raise ConfigError(
            f"`{'`, `'.join(sorted(useless))}`: {facts.title} has no such text encoder; leave it out"
        )


def fill_data(open_settings: OpenSettings, num_images: int) -> None:
    """Fill the settings needed to prepare the data: resolution and hold-out."""
    open_settings.fill("data.resolution", open_settings.facts.native_resolution, "the base's own resolution")
    open_settings.fill("data.validation", *hold_out(num_images))


def hold_out(num_images: int) -> tuple[int, str]:
    """Return how many images are held out to measure progress, and why."""
    if num_images >= 20:
        return min(8, max(2, round(num_images * 0.1))), f"a tenth of {num_images} images, at most 8"
    return 0, (
        f"{num_images} images are too few to hold some out, so whether more is learned than these by heart "
        "cannot be known"
    )


def validation_draws(
    steps: int, images_per_step: int, every: int, num_held_out: int, most: int = 16
) -> float:
    """Return how many noised versions of each held-out image :data:`VALIDATION_SHARE` of the run pays for.

    An image costs a forward pass there and about two in training. Measured are the start, each interval, the
    end, and the base alone.

    Args:
        steps: of the run.
        images_per_step: images of a full step.
        every: steps between measurements.
        num_held_out: images held out.
        most: the largest answer; more would hardly make the figures surer.
    """
    measurements = steps // every + (steps % every > 0) + 2
    paid = VALIDATION_SHARE * steps * images_per_step * 2
    return min(float(most), paid / (measurements * max(1, num_held_out)))


def fill_training(open_settings: OpenSettings, data: DataFacts, rule: RateRule = USUAL_RATE) -> None:
    """Fill what follows from the images trained on: the adapter's size, the length, rates and intervals.

    Args:
        open_settings: with those of the data filled in.
        data: about the images.
        rule: about the optimizer's learning rate.
    """
    _fill_adapter(open_settings, data.num_images)
    _fill_length(open_settings, data)
    _fill_rates(open_settings, rule)
    _fill_intervals(open_settings, data)


def _fill_adapter(open_settings: OpenSettings, num_images: int) -> None:
    rank = 8 if num_images < 10 else 16 if num_images < 200 else 32
    rules = KIND_RULES[open_settings.config.adapter.kind]
    reason = f"enough for {num_images} images without learning them by heart"
    if rules.lora_ranks != 1:
        rank, reason = rank // rules.lora_ranks, f"as large a file as a LoRA of rank {rank}"
    open_settings.fill("adapter.rank", rank, reason, ask_base=rules.follows_base)
    open_settings.fill(
        "adapter.alpha", *_usual_alpha(open_settings, "adapter.rank"), ask_base=rules.follows_base
    )
    for part in _adapted_text(open_settings):
        keys = PART_KEYS[part]
        open_settings.fill(keys.rank, open_settings.config.adapter.rank, "as in the U-Net")
        open_settings.fill(keys.alpha, *_usual_alpha(open_settings, keys.rank))


def _usual_alpha(open_settings: OpenSettings, rank_key: str) -> tuple[float, str]:
    """Return the alpha that fits the usual learning rate, and why."""
    rules = KIND_RULES[open_settings.config.adapter.kind]
    alpha = float(open_settings.config.get(rank_key)) if rules.alpha is None else rules.alpha
    return alpha, rules.alpha_reason


def _adapted_text(open_settings: OpenSettings) -> list[AdaptedPart]:
    return [part for part in open_settings.facts.text_encoders if open_settings.config.adapter.adapts(part)]


def _fill_length(open_settings: OpenSettings, data: DataFacts) -> None:
    num_images = data.num_images
    wanted = 4 if open_settings.facts.device == "cuda" else 2
    processes = open_settings.facts.num_processes
    if data.num_visits < open_settings.facts.recommended.get("training.batch_size", wanted) * processes:
        reason = f"there are only {num_images} images" + _for_processes(processes)
        open_settings.fill(
            "training.batch_size", math.ceil(data.num_visits / processes), reason, ask_base=False
        )
    open_settings.fill("training.batch_size", wanted, f"fits a small {open_settings.facts.device} device")
    settings = open_settings.config.training
    assert settings.batch_size is not None
    effective = settings.batch_size * settings.gradient_accumulation * processes
    if settings.epochs is None:
        if (usual := open_settings.facts.recommended.get("training.steps")) and processes > 1:
            reason = f"recommended by the base {open_settings.facts.title}, divided by {processes} processes"
            open_settings.fill("training.steps", max(1, math.ceil(usual / processes)), reason, ask_base=False)
        visits = min(12_000, max(1_600, 80 * num_images))
        steps = max(1, math.ceil(visits / effective))
        reason = (
            f"about {visits // num_images} looks at each of {num_images} images{_for_processes(processes)}"
        )
        open_settings.fill("training.steps", steps, reason)


def _for_processes(count: int) -> str:
    return f", by {count} processes" if count > 1 else ""


def _fill_rates(open_settings: OpenSettings, rule: RateRule) -> None:
    # the rates that a base recommends were found with the usual optimizer
    usual = open_settings.config.optimizer.name == OptimizerConfig.model_fields["name"].default
    why = "a quiet end" if rule.schedule == USUAL_SCHEDULE else "what this optimizer needs"
    open_settings.fill("optimizer.schedule", rule.schedule, why, ask_base=usual)
    rate, reason = _rate(open_settings, rule)
    recommended = open_settings.facts.recommended.get("optimizer.learning_rate")
    if not usual and recommended is not None and rule.share:
        rate = float(f"{rule.share * recommended:.2e}")
        reason = f"the base {open_settings.facts.title} recommends {recommended:g} for AdamW"
        if rule.share != 1:
            reason = f"{reason}, of which this optimizer takes {rule.share:g}"
    open_settings.fill("optimizer.learning_rate", rate, reason, ask_base=usual)
    if rule.first_guess is not None:
        guess = (_rate(open_settings, USUAL_RATE)[0] if recommended is None else recommended) / 10
        open_settings.fill(
            rule.first_guess, float(f"{guess:.2e}"), "a tenth of AdamW's rate, so that it is soon found"
        )
    chosen = open_settings.config.optimizer.learning_rate
    assert chosen is not None
    for part in _adapted_text(open_settings):
        first = open_settings.config.optimizer.text_encoder_learning_rate
        value, reason = chosen / 5, "a fifth of the U-Net's: text encoders forget quickly"
        if rule.one_rate:
            value, reason = (
                chosen,
                f"as the U-Net's: {open_settings.config.optimizer.name} has one rate for all",
            )
        elif part != "text_encoder" and first is not None:
            value, reason = first, "as the first text encoder's"
        open_settings.fill(PART_KEYS[part].learning_rate, value, reason, ask_base=usual)


def _rate(open_settings: OpenSettings, rule: RateRule) -> tuple[float, str]:
    """Return the U-Net's rate, and why."""
    adapter = open_settings.config.adapter
    assert adapter.rank is not None and adapter.alpha is not None
    divisor = math.sqrt(adapter.rank) if adapter.scaling == "rslora" else adapter.rank
    scale = adapter.alpha / divisor if KIND_RULES[adapter.kind].rate_by_rank else adapter.alpha
    if scale == 1 or not rule.follows_scale:
        return rule.rate, rule.reason
    # the size of dW is scale * rate: keep it when the user picks another alpha
    return float(f"{rule.rate / scale:.2e}"), f"{rule.rate:g} divided by the scale {scale:g}"


def _fill_intervals(open_settings: OpenSettings, data: DataFacts) -> None:
    settings = open_settings.config.training
    assert settings.batch_size is not None
    images_per_step = settings.batch_size * settings.gradient_accumulation * open_settings.facts.num_processes
    per_epoch = math.ceil(data.num_visits / images_per_step)
    steps = open_settings.config.total_steps(per_epoch)
    if open_settings.config.optimizer.warmup_share is None:
        least = 1 if open_settings.config.optimizer.schedule == "inverse_sqrt" else 0
        open_settings.fill(
            *("optimizer.warmup_steps", max(least, min(100, steps // 20))),
            "a twentieth of the steps, at most 100",
        )
    every = max(10, min(250, steps // 5))
    open_settings.fill("training.checkpoint_every", every, "the most steps that a crash may cost")
    if data.num_held_out:
        every, reason = max(5, steps // 10), "about ten points on the curve"
        # in runs that are short for so many images: rarer, so that each measurement is worth something
        while every < steps and validation_draws(steps, images_per_step, every, data.num_held_out) < 2:
            every, reason = min(steps, every + max(1, every // 4)), "as often as a tenth of the time pays for"
        open_settings.fill("training.validate_every", every, reason)
    reason = "up to eight checkpoints are tried for the best step and strength"
    if steps < LEAST_STEPS_TO_JUDGE:
        reason = f"in fewer than {LEAST_STEPS_TO_JUDGE} steps the last one is the best"
    judge_every = max(10, math.ceil(steps / 8)) if steps >= LEAST_STEPS_TO_JUDGE else 0
    open_settings.fill("judge.every", judge_every, reason)
    # up to four; those of held-out images come first, as they show what was learned and not just remembered
    plain = (TAG.sub("", prompt).strip() for prompt in data.prompts)  # captions of WebUI's images have tags
    prompts = tuple(dict.fromkeys(prompt for prompt in plain if prompt))[:4]
    file = open_settings.config.sample.prompt_file
    if (
        file is not None and open_settings.config.sample.prompts is None
    ):  # a run that goes on has them already
        open_settings.fill("sample.prompts", tuple(read_prompt_file(file)), f"the lines of {file.name}")
        open_settings.fill("sample.prompt_options", True, f"as in {file.name}")
    open_settings.fill("sample.prompts", prompts, "captions of the images")
    if open_settings.config.sample.prompts:
        open_settings.fill("sample.every", max(10, steps // 4), "four rows of previews")
        open_settings.fill("sample.guidance", USUAL_GUIDANCE, "the usual guidance scale")
