"""fp32 master weights over a model in any number format.

All adapter parameters with the same learning rate lie in one flat buffer: clipping, stepping, zeroing and
publishing to the model are then a few kernels, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.canonical import ModuleKey


class MasterWeights:
    """Parameters in fp32 whose rounded copies the model computes with.

    The model's parameters become views into one flat buffer of their own format, and so do their
    gradients; for an fp32 model that buffer *is* the master. Gradients of several micro-batches are
    summed in fp32, in a buffer that is there from the end of the first backward pass to the step: while a
    backward pass holds the activations of a step of one micro-batch, there is none.

    Args:
        parameters: the model's parameters, one device and one dtype.
        values: their fp32 starting values, same shapes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        assert parameters and len(parameters) == len(values)
        self._parameters = list(parameters)
        device, self._dtype = parameters[0].device, parameters[0].dtype
        flat = torch.cat([value.detach().to(device, torch.float32).flatten() for value in values])
        self.flat = nn.Parameter(flat)
        self._learns = True
        self._compute = self.flat.data if self._dtype == torch.float32 else flat.to(self._dtype)
        self._compute_grad = torch.zeros_like(self._compute)
        self.followers: list[Callable[[], None]] = []  # called whenever the model's values have changed
        self._stepped: list[nn.Parameter] = []  # views into the buffer, if an optimizer looks at shapes
        start = 0
        for parameter in self._parameters:
            end = start + parameter.numel()
            parameter.data = self._compute[start:end].view(parameter.shape)
            parameter.requires_grad_(True)
            parameter.grad = self._compute_grad[start:end].view(parameter.shape)
            start = end

    def collect(self, add: Callable[[Tensor, Tensor], object] = Tensor.add_) -> None:
        """Add the model's gradients to the master's and clear them; call after each backward.

        ``add(sum, gradient)`` adds in place; with several processes it adds the gradients of the others, too.
        """
        if not self._learns:
            return
        if self.flat.grad is None:
            self._set_gradient(torch.zeros_like(self.flat.data))
        assert self.flat.grad is not None
        add(self.flat.grad, self._compute_grad)
        self._compute_grad.zero_()

    def _set_gradient(self, gradient: Tensor | None) -> None:
        """Have what an optimizer steps see a gradient, or none."""
        self.flat.grad = gradient
        parts = [None] * len(self._stepped) if gradient is None else self.shaped(gradient)
        for view, part in zip(self._stepped, parts, strict=False):
            view.grad = part

    def freeze(self) -> None:
        """Learn no more: gradients are not made any longer, and optimizers pass over what has none."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        self._learns = False
        self._set_gradient(None)

    def publish(self) -> None:
        """Round the master's values into the model and let go of its gradient; call after each step."""
        if self._dtype != torch.float32:
            self._compute.copy_(self.flat.data)
        for renew in self.followers:
            renew()
        self._set_gradient(None)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The model's parameters, in the order of the flat buffer."""
        return self._parameters

    def optimized(self, *, shaped: bool) -> list[nn.Parameter]:
        """Return what an optimizer steps: the flat buffer, or views into it of the parameters' shapes.

        The views share the buffer's values and gradients, so the rest of the program sees no difference. The
        gradients come with :meth:`collect`.
        """
        if not shaped:
            return [self.flat]
        self._stepped = [nn.Parameter(part) for part in self.shaped(self.flat.data)]
        return self._stepped

    def tensors(self) -> list[Tensor]:
        """Return the fp32 values as views, in the parameters' order and shapes."""
        return self.shaped(self.flat.data)

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """Return a flat tensor of this layout as views, in the parameters' order and shapes."""
        parts = flat.split([parameter.numel() for parameter in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def load(self, values: Tensor) -> None:
        """Replace all values by a flat fp32 tensor and publish them."""
        self.flat.data.copy_(values)
        self.publish()


@dataclass(frozen=True)
class ParameterGroup:
    """Master weights with their own peak learning rate.

    Attributes:
        name: part of the names in a checkpoint.
        master: the values.
        learning_rate: at its peak.
        slots: module and factor of each parameter, in the master's order.
        decays: whether weight decay pulls them to zero (DoRA's magnitudes must not be).
    """

    name: str
    master: MasterWeights
    learning_rate: float
    slots: tuple[tuple[ModuleKey, str], ...] = ()
    decays: bool = True


def clip_(groups: Sequence[ParameterGroup], max_norm: float) -> float:
    """Shorten the joint gradient to at most ``max_norm`` (0: leave it as it is); return its norm before."""
    return float(shorten_(groups, max_norm))


def shorten_(groups: Sequence[ParameterGroup], max_norm: float) -> Tensor:
    """Do what :func:`clip_` does without waiting for the device; the norm is a number there."""
    gradients = [group.master.flat.grad for group in groups if group.master.flat.grad is not None]
    # the norm over all groups together: the root of the sum of the groups' squared norms
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if max_norm > 0:
        # g <- g * min(1, max_norm / norm); the small number keeps a norm of 0 from dividing by 0
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
    return norm
