"""Settings the user left open follow the data; each one comes with its reason.

Also what a run will cost, measured by one real trial step rather than guessed from a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import Config, component_keys
from .data.folder import Dataset
from .errors import ConfigError

if TYPE_CHECKING:
    from .families.base import BaseModelInfo


@dataclass(frozen=True)
class Decision:
    """A value chosen for the user: dotted key, value, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class BaseFacts:
    """What the rules look at besides the pictures.

    Attributes:
        info: the loaded base.
        native_resolution: px.
        device: type of the device, e.g. ``cuda``.
        components: what can be adapted, e.g. ``unet``, ``text_encoder``.
    """

    info: BaseModelInfo
    native_resolution: int
    device: str
    components: tuple[str, ...] = ("unet", "text_encoder")

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that are text encoders."""
        return tuple(name for name in self.components if name != "unet")


class _Resolver:
    """Fills open settings one by one, later rules seeing earlier results."""

    def __init__(self, config: Config, facts: BaseFacts) -> None:
        self.config, self.facts = config, facts
        self.decisions: list[Decision] = []

    def fill(self, key: str, value: Any, reason: str, *, ask_base: bool = True) -> None:
        """Set an open setting; one the base's author recommends wins over the general rule."""
        if self.config.get(key) is not None:
            return
        if ask_base and key in self.facts.info.recommended:
            value, reason = (
                self.facts.info.recommended[key],
                f"recommended by the base {self.facts.info.title}",
            )
        self.decisions.append(Decision(key, value, reason))
        self.config = self.config.with_values({key: value})


def check_components(config: Config, facts: BaseFacts) -> None:
    """Refuse settings for a text encoder that the base has not.

    Raises:
        ConfigError: naming all such settings.
    """
    useless = []
    for component in {"text_encoder", "text_encoder_2"} - set(facts.components):
        useless += [key for key in component_keys(component) if config.get(key) is not None]
        useless += [key for key in (f"adapter.{component}",) if config.get(key)]
    if useless:
        raise ConfigError(
            f"`{'`, `'.join(sorted(useless))}`: {facts.info.title} has no such text encoder; leave it out"
        )


def resolve_data(config: Config, facts: BaseFacts, num_images: int) -> tuple[Config, list[Decision]]:
    """Fill the settings that preparing the pictures needs: resolution and hold-out."""
    resolver = _Resolver(config, facts)
    resolver.fill("data.resolution", facts.native_resolution, "the base's own resolution")
    resolver.fill("data.validation", *hold_out(num_images))
    return resolver.config, resolver.decisions


def hold_out(num_images: int) -> tuple[int, str]:
    """Return how many pictures are held out to measure progress, and why."""
    if num_images >= 20:
        return min(8, max(2, round(num_images * 0.1))), f"a tenth of {num_images} pictures, at most 8"
    return 0, f"{num_images} pictures are too few to hold some out"


def resolve_training(
    config: Config, facts: BaseFacts, training: Dataset, validation: Dataset
) -> tuple[Config, list[Decision]]:
    """Fill every setting that is still open, from the pictures that are trained on."""
    resolver = _Resolver(config, facts)
    _fill_adapter(resolver, len(training.learned))
    _fill_length(resolver, training)
    _fill_optimizer(resolver)
    _fill_intervals(resolver, training, validation)
    return resolver.config, resolver.decisions


def _fill_adapter(resolver: _Resolver, num_images: int) -> None:
    rank = 8 if num_images < 10 else 16 if num_images < 200 else 32
    loha = resolver.config.adapter.kind == "loha"
    reason = f"enough for {num_images} pictures without learning them by heart"
    if loha:
        rank, reason = rank // 2, f"as large a file as a LoRA of rank {rank}"
    resolver.fill("adapter.rank", rank, reason, ask_base=not loha)
    resolver.fill("adapter.alpha", *_usual_alpha(resolver, "adapter.rank"), ask_base=not loha)
    for component in _adapted_text(resolver):
        rank_key, alpha_key, _ = component_keys(component)
        resolver.fill(rank_key, resolver.config.adapter.rank, "as in the U-Net")
        resolver.fill(alpha_key, *_usual_alpha(resolver, rank_key))


def _usual_alpha(resolver: _Resolver, rank_key: str) -> tuple[float, str]:
    """Return the alpha with which the usual learning rate fits, and why."""
    if resolver.config.adapter.kind == "loha":
        return 1.0, "usual for LoHa, whose factors start large"
    return float(resolver.config.get(rank_key)), "equal to the rank: scale 1"


def _adapted_text(resolver: _Resolver) -> list[str]:
    return [name for name in resolver.facts.text_encoders if resolver.config.adapter.adapts(name)]


def _fill_length(resolver: _Resolver, training: Dataset) -> None:
    num_images = len(training.learned)
    wanted = 4 if resolver.facts.device == "cuda" else 2
    if training.num_visits < resolver.facts.info.recommended.get("training.batch_size", wanted):
        reason = f"there are only {num_images} pictures"
        resolver.fill("training.batch_size", training.num_visits, reason, ask_base=False)
    resolver.fill("training.batch_size", wanted, f"fits a small {resolver.facts.device} device")
    settings = resolver.config.training
    assert settings.batch_size is not None
    effective = settings.batch_size * settings.gradient_accumulation
    if settings.epochs is None:
        visits = min(12_000, max(1_600, 80 * num_images))
        steps = max(1, math.ceil(visits / effective))
        resolver.fill(
            "training.steps", steps, f"about {visits // num_images} looks at each of {num_images} pictures"
        )


def _fill_optimizer(resolver: _Resolver) -> None:
    adapter = resolver.config.adapter
    assert adapter.rank is not None and adapter.alpha is not None
    divisor = math.sqrt(adapter.rank) if adapter.scaling == "rslora" else adapter.rank
    # a LoHa of alpha 1 changes about as much a step as a LoRA of scale 1
    scale = adapter.alpha if adapter.kind == "loha" else adapter.alpha / divisor
    # the size of dW is scale * rate: keep it when the user picks another alpha
    rate = float(f"{1e-4 / scale:.2e}")
    reason = "the usual rate" if scale == 1 else f"1e-4 divided by the scale {scale:g}"
    resolver.fill("optimizer.learning_rate", rate, reason)
    assert resolver.config.optimizer.learning_rate is not None
    fifth = resolver.config.optimizer.learning_rate / 5
    for component in _adapted_text(resolver):
        first = resolver.config.optimizer.text_encoder_learning_rate
        value, reason = fifth, "a fifth of the U-Net's: text encoders forget quickly"
        if component != "text_encoder" and first is not None:
            value, reason = first, "as the first text encoder's"
        resolver.fill(component_keys(component)[2], value, reason)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the length of the run in optimizer steps, from steps or epochs."""
    if config.training.epochs is not None:
        return config.training.epochs * steps_per_epoch
    assert config.training.steps is not None
    return config.training.steps


def _fill_intervals(resolver: _Resolver, training: Dataset, validation: Dataset) -> None:
    settings = resolver.config.training
    assert settings.batch_size is not None
    per_epoch = math.ceil(training.num_visits / (settings.batch_size * settings.gradient_accumulation))
    steps = total_steps(resolver.config, per_epoch)
    resolver.fill("optimizer.warmup_steps", min(100, steps // 20), "a twentieth of the steps, at most 100")
    every = max(10, min(250, steps // 5))
    resolver.fill("training.checkpoint_every", every, "what a crash may cost at most")
    if validation.items:
        resolver.fill("training.validate_every", max(5, steps // 10), "about ten points on the curve")
    resolver.fill(
        "sample.prompts", _preview_prompts(resolver.config, training, validation), "captions of the pictures"
    )
    if resolver.config.sample.prompts:
        resolver.fill("sample.every", max(10, steps // 4), "four rows of previews")
        resolver.fill("sample.guidance", 7.0, "the usual guidance scale")


def _preview_prompts(config: Config, training: Dataset, validation: Dataset) -> tuple[str, ...]:
    """Return up to four captions, held-out ones first: they show what was learned, not remembered.

    They are written as prompts: brackets that are ordinary characters in captions are escaped.
    """
    from .families.emphasis import escape  # here, because it brings torch along: the web UI plans without it

    captions: Sequence[str] = [item.caption for item in (*validation.items, *training.learned)]
    prompts = captions if config.data.emphasis else [escape(caption) for caption in captions]
    return tuple(dict.fromkeys(prompt for prompt in prompts if prompt))[:4]
