"""How a step is computed: fast paths, when each can be used, putting them in place; and measured choices.

A path computes what the reference (diffusers' blocks, PEFT's layers) computes, in fewer or cheaper kernels.
It is used only after it has proven itself in this run, see :mod:`.proof`. ``training.fast`` chooses: ``auto``
all that are possible, ``off`` none, or names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from torch import nn

from ..adapters.direct import can_be_direct
from ..adapters.direct_adapter import DirectAdapter
from ..config.schema import Config
from ..errors import ConfigError
from ..families.base import DiffusionModel
from ..families.kernels import can_launch, can_multiply
from ..families.layout import Layout
from ..families.lean import LeanAttention, join_times, make_lean, undo_lean, use_kernels
from ..families.offload import is_offloaded
from ..families.parallel import SplitPredictor
from ..families.recompute import Rungs
from ..families.rungs import Recompute, can_recompute
from .trainable import TrainableAdapter


@dataclass(frozen=True)
class Choice:
    """A way to compute.

    Attributes:
        layout: of the denoiser's convolutions.
        split: whether a batch goes through it in parts of one core each.
        attention: name of the way that attention is computed.
        kernels: whether the fast path of that name is used where it has proven itself.
    """

    layout: Layout
    split: bool
    attention: Literal["sdpa", "xformers", "classic"]
    kernels: bool = True

    def render(self) -> str:
        """Return it for people."""
        split = "batch in parts" if self.split else "batch whole"
        plain = "" if self.kernels else ", torch's norms and gates"
        return f"{self.layout}, {split}, {self.attention} attention{plain}"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Take back what :func:`dataclasses.asdict` gave."""
        known = values["layout"], bool(values["split"]), values["attention"]
        return cls(*known, bool(values.get("kernels", True)))  # there were none in earlier versions


@dataclass(frozen=True)
class FastPath:
    """One way to compute a step faster.

    Attributes:
        what: it does, for people.
        possible: whether it can be used in a run.
        needs: paths that it builds upon.
        follows: whether it comes with those by itself where it is possible, and is not named by settings.
    """

    what: str
    possible: Callable[[FastStep], bool] = lambda step: True
    needs: tuple[str, ...] = ()
    follows: bool = False


@dataclass
class FastStep:
    """The fast paths of a run.

    Attributes:
        recompute: what is made again in the backward pass; without the path of that name, whole blocks are,
            as diffusers does that.
        kernels: whether the path of that name is used, or waits because a measured choice is against it.
        names: those in use, in the order of :data:`FAST_PATHS`; set by :meth:`use`.
    """

    model: DiffusionModel
    trainable: TrainableAdapter
    splitter: SplitPredictor | None
    recompute: Recompute = field(default_factory=Recompute)
    kernels: bool = True
    names: tuple[str, ...] = ()
    _attentions: Sequence[LeanAttention] = ()
    _direct: DirectAdapter | None = None
    _in_place: bool = field(default=False)

    def possible(self, setting: str) -> tuple[str, ...]:
        """Return the paths that a setting allows and this run can use.

        Raises:
            ConfigError: for a path that is not there.
        """
        wanted = chosen_paths(setting)
        names: list[str] = []
        for name, path in FAST_PATHS.items():
            if name in wanted and set(path.needs) <= set(names) and path.possible(self):
                names.append(name)
        return tuple(names)

    @property
    def recomputes(self) -> bool:
        """Whether blocks make again what the rung says, so that diffusers' own way of it must be off."""
        return self._in_place and "recompute" in self.names

    def use(self, names: Sequence[str]) -> None:
        """Compute with exactly these paths from now on."""
        self.take_out()
        self.names = tuple(names)
        self.put_in_place()

    def put_in_place(self) -> None:
        """Take over the forward passes, the model being ready to train."""
        if self._in_place or not self.names:
            return
        denoiser = self.model.components()[self.model.info.denoiser.component]
        self._attentions = make_lean(denoiser) if "blocks" in self.names else ()
        kernels = "kernels" in self.names and self.kernels
        if kernels:
            use_kernels(denoiser)
        if "recompute" in self.names:
            self.recompute.put_in_place(denoiser)
            self._checkpointing(False)
        if "lora" in self.names:
            if self._direct is None:
                self._direct = DirectAdapter(self.model, self.trainable.layers)
                for group in self.trainable.groups:
                    group.master.followers.append(self.renew)
            parts = self.splitter.most_parts if self.splitter else 1
            if "joint" in self.names:
                join_times(denoiser)
            attentions = self._attentions if "joint" in self.names else ()
            multiply = kernels and can_multiply(self.model.facts.device)
            self._direct.put_in_place(attentions, parts=parts, kernels=multiply)
            if self.splitter:
                self.splitter.computing = self._direct.anchors.computing
        self._in_place = True

    def take_out(self) -> None:
        """Give the forward passes back: the model computes as the reference does."""
        if not self._in_place:
            return
        if self._direct is not None:
            self._direct.take_out()
        if self.splitter:
            self.splitter.computing = None
        if "recompute" in self.names:
            self._checkpointing(True)
        undo_lean(self.model.components()[self.model.info.denoiser.component])
        self._attentions, self._in_place = (), False

    def _checkpointing(self, on: bool) -> None:
        denoiser: Any = self.model.components()[self.model.info.denoiser.component]
        if on:
            denoiser.enable_gradient_checkpointing()
        else:
            denoiser.disable_gradient_checkpointing()

    @contextmanager
    def out(self) -> Iterator[None]:
        """Have the model compute as the reference does for a while."""
        was = self._in_place
        self.take_out()
        try:
            yield
        finally:
            if was:
                self.put_in_place()

    def gather(self) -> None:
        """Bring the gradients of a backward pass to the parameters; to be called after each."""
        if self._in_place and self._direct is not None:
            self._direct.gather()

    def forget(self) -> None:
        """Drop gradients of a pass that broke off."""
        self.gather()
        for group in self.trainable.groups:
            group.master.collect()
            group.master.publish()

    def renew(self) -> None:
        """Take note that the parameters have changed."""
        if self._in_place and self._direct is not None:
            self._direct.renew()


def _is_plain_lora(step: FastStep) -> bool:
    plain = step.trainable.start is None and step.trainable.random_parts is None
    return plain and can_be_direct(step.model, step.trainable.layers)


def _can_recompute(step: FastStep) -> bool:
    return can_take(step.model, step.recompute.rung, draws=step.trainable.random_parts is not None)


def can_take(model: DiffusionModel, rung: Rungs, *, draws: bool) -> bool:
    """Tell whether a rung can be taken block by block.

    Args:
        model: with the adapter in it.
        rung: that is asked for.
        draws: whether parts of the adapter are left out by chance.
    """
    denoiser = model.components()[model.info.denoiser.component]
    # what draws random numbers would draw others the second time
    draws = draws or any(isinstance(module, nn.Dropout) and module.p > 0 for module in denoiser.modules())
    if rung == Rungs.nothing or (draws and rung >= Rungs.projections):
        return False
    return can_recompute(denoiser, rung)


FAST_PATHS: Mapping[str, FastPath] = {
    "blocks": FastPath("attention and residual blocks without what changes nothing"),
    "lora": FastPath("plain LoRA layers by functions of our own", _is_plain_lora),
    "joint": FastPath(
        "q, k and v of an attention as one product, and all keys and values of the text (of whole weights)",
        # it lays weights of several blocks in one piece
        lambda step: not is_offloaded(step.model.components()[step.model.info.denoiser.component]),
        needs=("blocks", "lora"),
    ),
    "recompute": FastPath(
        "what training.recompute names made again, not whole blocks",
        _can_recompute,
        ("blocks",),
        follows=True,
    ),
    "kernels": FastPath(
        "norms, sums, gates and the gradients of LoRA by kernels in Triton (a card, and Triton installed)",
        lambda step: can_launch(step.model.facts.device, step.model.facts.dtype),
        ("blocks",),
    ),
}
"""By name, in the order in which they build upon each other. A new one is an entry here and its part in
:meth:`FastStep.put_in_place` and :meth:`FastStep.take_out`."""


def recompute_of(config: Config, model: DiffusionModel) -> Recompute:
    """Return what settings have made again in the backward pass."""
    sides = (config.data.resolution or 0, *config.data.more_resolutions)
    height, width = model.facts.latents.shape(max(sides), max(sides))[-2:]
    return Recompute(Rungs[config.training.rung], config.training.recompute_blocks, height * width)


def chosen_paths(setting: str) -> tuple[str, ...]:
    """Return the names of the paths that ``training.fast`` means.

    Raises:
        ConfigError: for a name that is none of them.
    """
    if setting in ("auto", "off"):
        return tuple(FAST_PATHS) if setting == "auto" else ()
    names = tuple(name.strip() for name in setting.split(","))
    known = [name for name, path in FAST_PATHS.items() if not path.follows]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"`training.fast={setting}`: there is no fast path `{name}`; use auto, off, or some of "
                f"{', '.join(known)}, separated by commas"
            )
        if missing := [other for other in FAST_PATHS[name].needs if other not in names]:
            raise ConfigError(
                f"`training.fast={setting}`: `{name}` builds upon {' and '.join(missing)}; name them, too"
            )
    return (*names, *(n for n, path in FAST_PATHS.items() if path.follows and set(path.needs) <= set(names)))
