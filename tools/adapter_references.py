"""Files of every kind as their own programs write them, and what each does to a weight, in float64.

The formulae are written out here a second time, from LyCORIS' and the clients' definitions, and share no code
with the program.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int, ...]
Made = tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]
"""(parts behind the module's name, weight -> dW in float64)."""


def _draws(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *sides: (0.3 * torch.randn(*sides, generator=generator)).to(dtype)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.double().flatten(1)


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _with_alpha(parts: dict[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
    return parts if alpha is None else parts | {"alpha": torch.tensor(alpha)}


def lora(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    draw, ones = _draws(seed, dtype), [1] * (len(shape) - 2)
    down, up = draw(rank, *shape[1:]), draw(shape[0], rank, *ones)
    delta = (_flat(up) @ _flat(down) * _scale(alpha, rank)).reshape(shape)
    return _with_alpha({"lora_down.weight": down, "lora_up.weight": up}, alpha), lambda w: delta


def dora(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    parts, of_pair = lora(shape, rank, alpha, seed, dtype)
    size = 1.0 + torch.rand(shape[0], generator=torch.Generator().manual_seed(seed))
    scale = size.reshape(-1, *[1] * (len(shape) - 1))

    def delta(weight: Tensor) -> Tensor:
        total = weight.double() + of_pair(weight)
        norm = total.flatten(1).norm(dim=1).reshape(scale.shape)
        return total * (scale.double() / norm) - weight.double()

    return parts | {"dora_scale": scale}, delta


def loha(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    draw, width = _draws(seed, dtype), int(torch.Size(shape[1:]).numel())
    a1, b1, a2, b2 = draw(shape[0], rank), draw(rank, width), draw(shape[0], rank), draw(rank, width)
    product = (a1.double() @ b1.double()) * (a2.double() @ b2.double()) * _scale(alpha, rank)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return _with_alpha(parts, alpha), lambda w: product.reshape(shape)


def lokr(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    draw = _draws(seed, dtype)
    out, width = shape[0] // 2, shape[1] // 2 * int(torch.Size(shape[2:]).numel())
    w1, a, b = draw(2, 2), draw(out, rank), draw(rank, width)
    second = (a.double() @ b.double()).reshape(out, shape[1] // 2, *shape[2:])
    first = w1.double().reshape(2, 2, *[1] * (len(shape) - 2))
    delta = torch.kron(first, second) * _scale(alpha, rank)
    return _with_alpha({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, alpha), lambda w: delta


def full(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    diff = _draws(seed, dtype)(*shape)
    return {"diff": diff}, lambda w: diff.double()


def glora(
    shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype, old: bool = False
) -> Made:
    draw, ones = _draws(seed, dtype), [1] * (len(shape) - 2)
    right, left = draw(shape[1], rank, *ones), draw(rank, shape[1], *ones)
    up, down = draw(shape[0], rank, *ones), draw(rank, *shape[1:])

    def delta(weight: Tensor) -> Tensor:
        both = _flat(right) @ _flat(left)
        moved = torch.einsum("oi...,ij->oj...", weight.double(), both)
        return (moved + (_flat(up) @ _flat(down)).reshape(shape)) * _scale(alpha, rank)

    order = (left, right, down, up) if old else (right, left, up, down)
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    return _with_alpha(dict(zip(names, order, strict=True)), alpha), delta


def old_glora(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    return glora(shape, rank, alpha, seed, dtype, old=True)


def _ia3(shape: Shape, seed: int, dtype: torch.dtype, on_input: bool) -> Made:
    side = shape[1] if on_input else shape[0]
    w = _draws(seed, dtype)(side) if len(shape) == 2 else _draws(seed, dtype)(1, side, 1, 1)
    axes = [1] * len(shape)
    axes[1 if on_input else 0] = -1
    parts = {"weight": w, "on_input": torch.tensor(int(on_input))}
    return parts, lambda weight: weight.double() * w.double().reshape(axes)


def ia3_out(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    return _ia3(shape, seed, dtype, False)


def ia3_in(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    return _ia3(shape, seed, dtype, True)


def _cayley(blocks: Tensor, bound: float) -> Tensor:
    q = blocks.double() - blocks.double().transpose(-1, -2)
    norm = q.norm() + 1e-8
    if bound > 0 and norm > bound:
        q = q * bound / norm
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (eye + q) @ torch.linalg.inv(eye - q)


def oft(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    """``alpha`` is the bound here: small ones bind."""
    bound = 0.0 if alpha is None else 0.01 * alpha
    draw, size = _draws(seed, dtype), 4
    blocks = draw(shape[0] // size, size, size)
    rescale = (1.0 + draw(shape[0], *[1] * (len(shape) - 1)).float()).to(dtype)

    def delta(weight: Tensor) -> Tensor:
        r = torch.block_diag(*_cayley(blocks, bound * shape[0]))
        turned = (r.T @ weight.double().flatten(1)).reshape(shape)
        return turned * rescale.double() - weight.double()

    return {"oft_blocks": blocks, "rescale": rescale, "alpha": torch.tensor(bound)}, delta


def oft_diag(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    blocks = _draws(seed, dtype)(shape[0] // 4, 4, 4)
    matrix = torch.block_diag(*blocks.double())
    return {"oft_diag": blocks}, lambda w: (matrix.T @ w.double().flatten(1)).reshape(shape) - w.double()


def boft(shape: Shape, rank: int, alpha: float | None, seed: int, dtype: torch.dtype) -> Made:
    """Two steps over blocks of 4; the butterfly is written as a permutation matrix here."""
    size, steps, rows = 4, 2, shape[0]
    blocks = _draws(seed, dtype)(steps, rows // size, size, size)

    def delta(weight: Tensor) -> Tensor:
        current = weight.double().flatten(1)
        for step in range(steps):
            stride = 2**step * (size // 2)
            index = torch.arange(rows).reshape(-1, 2, stride).transpose(1, 2).reshape(-1)
            turned = torch.block_diag(*_cayley(blocks, 0.0)[step]) @ current[index]
            current = torch.empty_like(turned)
            current[index] = turned
        return current.reshape(shape) - weight.double()

    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, delta


KINDS: dict[str, Callable[[Shape, int, float | None, int, torch.dtype], Made]] = {
    "lora": lora,
    "dora": dora,
    "loha": loha,
    "lokr": lokr,
    "full": full,
    "glora": glora,
    "old glora": old_glora,
    "ia3 out": ia3_out,
    "ia3 in": ia3_in,
    "oft": oft,
    "oft_diag": oft_diag,
    "boft": boft,
}
