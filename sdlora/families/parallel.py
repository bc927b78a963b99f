"""On a CPU, a batch can be denoised in parts, one for each core and each on a single thread.

The layers of a small U-Net are small to be split over cores, so on idle cores parts can be sooner ready. They
ask twice for every operation: measured on 2 cores, 8 to 35 % more processor time for a step of 8 images, and
on cores that others use as well, several times the whole batch's time. So it is done where a trial finds it
faster (:mod:`sdlora.training.choices`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from .base import Conditioning, DiffusionModel, SizeHint

Job = TypeVar("Job")
Result = TypeVar("Result")


class SplitPredictor:
    """Calls :meth:`DiffusionModel.predict` on parts of a batch at the same time; results keep their order.

    The parts' gradients are added in the order of the parts, so a step repeats bit for bit.
    """

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        # set by who has the gradients of each part added where they belong, instead of returned by torch
        self.computing: Callable[[int], AbstractContextManager[None]] | None = None
        self.most_parts = torch.get_num_threads() if model.facts.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self.most_parts, initializer=torch.set_num_threads, initargs=(1,))
        self._outputs: list[Tensor] = []
        self._leaf: Tensor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def predict_with_gradients(
        self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Sequence[SizeHint]
    ) -> Tensor:
        """Return the prediction as a leaf; after backward through the loss, :meth:`backward` continues."""
        self._outputs = self._run(noisy, timesteps, text, sizes)
        self._leaf = torch.cat([output.detach() for output in self._outputs]).requires_grad_()
        return self._leaf

    def backward(self, parameters: Sequence[Tensor]) -> None:
        """Add the gradients of the last prediction to the ``grad`` of ``parameters``."""
        assert self._leaf is not None and self._leaf.grad is not None
        gradients = self._leaf.grad.split([output.shape[0] for output in self._outputs])
        jobs = zip(self._outputs, gradients, strict=True)
        if self.computing is not None:
            self._map(lambda job: torch.autograd.backward(*job), jobs)
            self._outputs, self._leaf = [], None
            return
        parts = self._map(lambda job: torch.autograd.grad(job[0], parameters, job[1]), jobs)
        self._outputs, self._leaf = [], None
        for part in parts:
            for parameter, gradient in zip(parameters, part, strict=True):
                assert parameter.grad is not None
                parameter.grad.add_(gradient)

    def _run(
        self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Sequence[SizeHint]
    ) -> list[Tensor]:
        count = noisy.shape[0]
        parts = min(self.most_parts, count)
        edges = [count * part // parts for part in range(parts + 1)]

        def part(index: int) -> Tensor:
            rows = slice(edges[index], edges[index + 1])
            part_text = {name: tensor[rows] for name, tensor in text.items()}
            computing = self.computing(index) if self.computing else nullcontext()
            # a thread does not inherit the caller's mode
            with computing, torch.enable_grad():
                return self._model.predict(noisy[rows], timesteps[rows], part_text, list(sizes)[rows])

        return self._map(part, range(parts))

    def _map(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
        todo = list(jobs)
        return [work(todo[0])] if len(todo) == 1 else list(self._pool.map(work, todo))
