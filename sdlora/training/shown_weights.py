"""Which of the adapter's values validation, previews, checkpoints and the exported file use.

The values that a step changes need not be the best ones to show: an average over steps is often better, and
schedule-free optimizers step other values than those that are to be used. Everything that uses the adapter
during a run does so within :meth:`ShownWeights.in_model`; resuming continues from the learned values, which
are put back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..config.schema import TrainingConfig
from .masters import ParameterGroup
from .optimizers import OptimizerKind


class ShownWeights(Protocol):
    """Says which values of an adapter that is being learned are to be shown."""

    def step_done(self) -> None:
        """Note what the masters hold after an optimizer step."""

    def in_model(self) -> AbstractContextManager[None]:
        """Have the masters and the model hold the values to show; afterwards the learned ones again."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold, by name."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` returned."""


class AsLearned:
    """The learned values as they are."""

    def step_done(self) -> None:
        """Nothing: see :class:`ShownWeights`."""

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """See :class:`ShownWeights`."""
        yield

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`ShownWeights`."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: see :class:`ShownWeights`."""


class OfEvalMode(AsLearned):
    """What the optimizer's own ``eval()`` makes of the learned values; all state is the optimizer's."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup]) -> None:
        self._optimizer, self._groups = optimizer, groups

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """See :class:`ShownWeights`."""
        with putting_back(self._groups):
            self._optimizer.eval()  # type: ignore[attr-defined]
            publish(self._groups)
            try:
                yield
            finally:
                self._optimizer.train()  # type: ignore[attr-defined]


class Averaged:
    """A mean of the learned values over steps.

    Args:
        groups: the masters.
        first: the mean is of the values after more than ``first`` steps; before, it is the learned values.
        decay: share of the mean that stays at each step, at most (1 + n) / (10 + n) at the n-th (as in
            TensorFlow's ExponentialMovingAverage, so that the start is soon forgotten); None for a mean in
            which all steps count alike.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], *, first: int = 0, decay: float | None = None
    ) -> None:
        self._groups, self.first, self.decay = groups, first, decay
        self._steps = 0
        self._means = [group.master.flat.data.clone() for group in groups]

    def step_done(self) -> None:
        """See :class:`ShownWeights`."""
        self._steps += 1
        count = self._steps - self.first
        for mean, group in zip(self._means, self._groups, strict=True):
            mean.lerp_(group.master.flat.data, self._weight(count))  # mean + weight * (learned - mean)

    def _weight(self, count: int) -> float:
        """Return the weight of the newest of ``count`` steps in the mean."""
        if count <= 1 and self.decay is None:
            return 1.0
        return 1.0 / count if self.decay is None else 1.0 - min(self.decay, (1 + count) / (10 + count))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """See :class:`ShownWeights`."""
        with putting_back(self._groups):
            for mean, group in zip(self._means, self._groups, strict=True):
                group.master.load(mean)
            yield

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`ShownWeights`."""
        means = {group.name: mean for group, mean in zip(self._groups, self._means, strict=True)}
        return {**means, "steps": torch.tensor(self._steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`ShownWeights`."""
        self._steps = int(tensors["steps"])
        for group, mean in zip(self._groups, self._means, strict=True):
            mean.copy_(tensors[group.name])


@contextmanager
def putting_back(groups: Sequence[ParameterGroup]) -> Iterator[None]:
    """Put the values of masters and model back at the end, bit for bit.

    Computing the learned values back from those shown would round, so a run with previews would differ.
    """
    # in main memory: a card may have just enough for what happens meanwhile
    kept = [group.master.flat.data.to("cpu", copy=True) for group in groups]
    try:
        yield
    finally:
        for group, values in zip(groups, kept, strict=True):
            group.master.load(values)


def publish(groups: Sequence[ParameterGroup]) -> None:
    """Let the model compute with what the masters hold now."""
    for group in groups:
        group.master.publish()


def weights_to_show(
    kind: OptimizerKind, optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup]
) -> ShownWeights:
    """Return the weights that a run with this optimizer shows."""
    return OfEvalMode(optimizer, groups) if kind.has_eval_mode else AsLearned()


def averaged(
    settings: TrainingConfig, shown: ShownWeights, groups: Sequence[ParameterGroup], steps: int
) -> ShownWeights:
    """Return the average that settings ask for, or what would be shown without one.

    Args:
        settings: say which average.
        shown: without an average.
        groups: the masters.
        steps: of the whole run.
    """
    if settings.average == "ema":
        return Averaged(groups, decay=settings.ema_decay)
    if settings.average == "tail":
        return Averaged(groups, first=min(steps - 1, int(steps * (1.0 - settings.average_share))))
    return shown
