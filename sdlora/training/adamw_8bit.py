"""AdamW with both moments in 8 bits, in plain torch: where bitsandbytes has no kernels, or is not installed.

As Dettmers et al. (2022): a moment is kept as one code of 8 bits a value, relative to the largest of a block
of 256 values. The codes are dynamic: their steps are fine where values are small, as they are spread over
seven decades. States have the names and the meaning that bitsandbytes gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a scale."""
_LEAST = 4096  # smaller parameters keep their moments in fp32, as with bitsandbytes
_PIECE = 2**20  # values stepped at once, which bounds the fp32 copies


def dynamic_codes(*, signed: bool) -> Tensor:
    """Return the 256 values of 8-bit codes, ascending, from -1 or 0 to 1.

    The decade from 0.1 to 1 has 64 values of each sign (128 if there is none), the one below it half as many,
    and so on; they lie in the middle of equal steps. 0 and 1 are added.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1.0, count + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles.tolist(), *(-middles if signed else middles[:0]).tolist()]
    return torch.tensor(sorted(values))


def quantise(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (N,) uint8 of fp32 values (N,), and the scale of each block of 256.

    Of codes without signs, which are for what is divided by, no value but 0 becomes 0: that would make steps
    without bound.
    """
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(relative, (codes[:-1] + codes[1:]) / 2)
    if codes[0] == 0:
        nearest = torch.where((nearest == 0) & (blocks > 0), 1, nearest)
    return nearest.to(torch.uint8).flatten()[:count], scales


def dequantise(numbers: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """Return the fp32 values (N,) that 8-bit codes stand for."""
    values = codes[numbers.int()]
    return values * scales.repeat_interleave(BLOCK)[: values.numel()]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose moments take one byte a value each, and a scale for 256."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_fresh(parameter))
        state["step"] += 1
        values, gradients = parameter.view(-1), gradient.reshape(-1)
        for start in range(0, values.numel(), _PIECE):
            piece = slice(start, start + _PIECE)
            first, second = _taken(state, 1, piece), _taken(state, 2, piece)
            _adamw(values[piece], gradients[piece].float(), first, second, state["step"], group)
            _put(state, 1, piece, first)
            _put(state, 2, piece, second)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; torch would make all of it the parameters' format."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            device = parameters[index].device
            for key, value in state.items():
                kept = value.to(device, copy=True) if isinstance(value, Tensor) else value
                self.state[parameters[index]][key] = kept


def _fresh(parameter: Tensor) -> dict[str, Any]:
    count, device = parameter.numel(), parameter.device
    if count < _LEAST:
        return {"step": 0} | {f"state{n}": torch.zeros(count, device=device) for n in (1, 2)}
    state: dict[str, Any] = {"step": 0}
    for number in (1, 2):
        codes = dynamic_codes(signed=number == 1)
        zero = int(codes.abs().argmin())
        state[f"state{number}"] = torch.full((count,), zero, dtype=torch.uint8, device=device)
        state[f"qmap{number}"] = codes.to(device)
        state[f"absmax{number}"] = torch.zeros(math.ceil(count / BLOCK), device=device)
    return state


def _taken(state: dict[str, Any], number: int, piece: slice) -> Tensor:
    """Return a piece of a moment in fp32."""
    kept: Tensor = state[f"state{number}"].view(-1)[piece]
    if kept.dtype != torch.uint8:
        return kept
    scales = state[f"absmax{number}"][piece.start // BLOCK : math.ceil(piece.stop / BLOCK)]
    return dequantise(kept, scales, state[f"qmap{number}"])


def _put(state: dict[str, Any], number: int, piece: slice, moment: Tensor) -> None:
    kept: Tensor = state[f"state{number}"].view(-1)[piece]
    if kept.dtype != torch.uint8:
        return  # it was stepped in place
    codes, scales = quantise(moment, state[f"qmap{number}"])
    kept.copy_(codes)
    state[f"absmax{number}"][piece.start // BLOCK :][: scales.numel()].copy_(scales)


def _adamw(
    values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any]
) -> None:
    """Step some values and their two moments in place, all fp32."""
    beta1, beta2 = group["betas"]
    first.mul_(beta1).add_(gradient, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    # p <- p (1 - lr wd) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    size = second.div(1 - beta2**step).sqrt_().add_(group["eps"])
    values.addcdiv_(first, size, value=-group["lr"] / (1 - beta1**step))
