"""The Triton kernels give torch's results and gradients, interpreted on a CPU, and go into lean blocks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sdlora.families.kernel_operations as kernel_operations
import sdlora.families.kernels as kernels
from sdlora.adapters.direct import DirectLinear, Factors, Gradients
from sdlora.families.lean import LeanResidual, make_lean, undo_lean, use_kernels
from sdlora.families.lean_blocks import LeanBlock, lean_blocks
from sdlora.families.lean_tokens import LeanTokens
from sdlora.families.recompute import Rungs
from tests.adapters.test_direct import Learning, farthest

ROOT = Path(__file__).parents[2]
triton_only = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
ROUNDING = {"float32": 5e-6, "bfloat16": 2**-7, "float16": 2**-9}
"""Format -> how far a result may be from float64's, as a share of the largest number: the format's own
rounding, and in float32 that of a few thousand additions."""
CASES = {
    **{
        f"image {last} {silu} {shift} {size} {groups} {dtype}": (
            "image",
            dtype,
            size,
            last,
            silu,
            shift,
            groups,
        )
        for dtype, size, last, silu, shift, groups in (
            ("float32", (1, 96, 5, 7), False, True, True, 32),
            ("float32", (1, 96, 5, 7), True, True, False, 32),
            ("float32", (2, 30, 19, 23), False, True, True, 2),  # two blocks; a group is not a power of two
            ("float32", (2, 30, 19, 23), True, False, True, 2),
            ("float32", (1, 40, 1, 1), False, False, True, 2),
            ("bfloat16", (1, 20, 9, 16), True, True, True, 4),
            ("bfloat16", (1, 20, 8, 16), False, True, False, 4),
            ("float16", (2, 12, 7, 3), True, False, False, 2),
        )
    },
    **{
        f"chunks {last} {size} {dtype}": ("chunks", dtype, size, last, chunk)
        for dtype, size, last, chunk in (
            ("float32", (1, 4, 7, 9), False, 16),  # more chunks than are put together at once
            ("float32", (2, 20, 13, 15), True, 256),
            ("bfloat16", (1, 20, 13, 15), True, 512),
            ("float16", (2, 20, 7, 16), False, 512),
        )
    },
    **{
        f"rows {more} {room} {beside} {size} {dtype}": ("rows", dtype, size, more, room, beside)
        for dtype, size, more, room, beside in (
            ("float32", (2, 5, 320), True, 0, 0),
            ("float32", (1, 7, 77), True, 48, 5),
            ("float32", (3, 2, 640), False, 16, 8),
            ("bfloat16", (2, 3, 1280), True, 16, 0),
            ("float16", (1, 3, 96), False, 0, 0),
        )
    },
    **{
        f"gradients {size} {rank} {layers} {dtype}": ("gradients", dtype, size, rank, layers)
        for dtype, size, rank, layers in (
            ("float32", (70, 96, 72), 4, 1),  # rows, outputs, inputs
            ("float32", (65, 40, 130), 16, 3),
            ("float16", (64, 64, 64), 20, 1),  # the interpreter multiplies bfloat16's bits as whole numbers
            ("float16", (9, 48, 40), 8, 3),
        )
    },
    **{
        f"gate {size} {dtype}": ("gate", dtype, size)
        for dtype, size in (
            ("float32", (2, 3, 2560)),
            ("float32", (1, 5, 2 * 1037)),
            ("bfloat16", (1, 4, 640)),
            ("float16", (2, 2, 2100)),
        )
    },
}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down which of our own operations are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sdlora":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def computed(case: tuple[Any, ...], precise: bool) -> dict[str, Tensor]:
    """Return results and gradients of a case: by the kernels in its format, or by torch in float64."""
    kind, dtype_name, size, *options = case
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int, mean: float = 0.0) -> Tensor:
        values = (torch.randn(shape, generator=generator) + mean).to(dtype)
        return values.double() if precise else values

    makers = {"image": _image, "chunks": _chunks, "rows": _rows, "gate": _gate, "gradients": _gradients}
    return makers[kind](drawn, precise, size, *options)


def _chunks(drawn: Any, precise: bool, size: Any, last: bool, chunk: int) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_operations, "MOST_BY_ONE", 64)
        patch.setattr(kernel_operations, "CHUNK", chunk)
        patch.setattr(kernel_operations, "TOGETHER", 4)
        return _image(drawn, precise, size, last, silu=True, with_shift=True, groups=2)


def _image(
    drawn: Any, precise: bool, size: Any, last: bool, silu: bool, with_shift: bool, groups: int
) -> dict[str, Tensor]:
    # far from zero: squares of the values would cancel
    x, gradient = drawn(*size, mean=4.0), drawn(*size)
    if last:
        x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    x.requires_grad_()
    norm = nn.GroupNorm(groups, size[1], eps=1e-5)
    norm.weight, norm.bias = (nn.Parameter(drawn(size[1]), requires_grad=False) for _ in range(2))
    shift = drawn(*size[:2]) if with_shift else None
    if precise:
        normed = norm(x if shift is None else x + shift[:, :, None, None])
        output = functional.silu(normed) if silu else normed
    else:
        output = kernels.image_norm(x, norm, shift=shift, silu=silu)
        assert output.stride() == x.stride() and output.dtype == x.dtype
    output.backward(gradient)
    assert x.grad is not None
    return {"output": output.detach(), "of x": x.grad}


def _rows(drawn: Any, precise: bool, size: Any, with_more: bool, room: int, beside: int) -> dict[str, Tensor]:
    x, more, of_normed, past = (drawn(*size[:-1], size[-1] + beside)[..., : size[-1]] for _ in range(4))
    x.requires_grad_()
    more.requires_grad_()
    norm = nn.LayerNorm(size[-1])
    norm.weight, norm.bias = (nn.Parameter(drawn(size[-1]), requires_grad=False) for _ in range(2))
    if precise:
        total = x + more if with_more else x * 1.0
        normed = norm(total)
    else:
        total, normed = kernels.added_norm(x, more if with_more else None, norm, room)
    seen: list[Tensor] = []
    x.register_hook(seen.append)
    torch.autograd.backward([total, normed], [past, of_normed])
    assert x.grad is not None and (more.grad is not None) == with_more
    if not precise:
        width = size[-1] + room
        assert seen[0].stride()[-2:] == (width, 1)
    shares = {"total": total.detach(), "normed": normed.detach(), "of x": x.grad}
    return shares | ({"of more": more.grad} if more.grad is not None else {})


def _gradients(drawn: Any, precise: bool, size: Any, rank: int, layers: int) -> dict[str, Tensor]:
    rows, out, inputs = size
    g = drawn(rows, layers * out + 8)[:, : layers * out]  # with room beside each row
    inner, of_inner = (drawn(rows, layers * rank + 8)[:, : layers * rank] for _ in range(2))
    x, of_up, of_down = drawn(rows, inputs), drawn(layers, out, rank), drawn(layers, rank, inputs)
    if precise:
        apart, narrow = g.unflatten(1, (layers, out)), inner.unflatten(1, (layers, rank))
        of_up = of_up + 0.5 * torch.einsum("nlo,nlr->lor", apart, narrow)
        of_down = of_down + torch.einsum("nlr,ni->lri", of_inner.unflatten(1, (layers, rank)), x)
    else:
        kernels.add_lora_gradients(g, inner, of_inner, x, of_up, of_down, 0.5)
    return {"of up": of_up, "of down": of_down}


def _gate(drawn: Any, precise: bool, size: Any) -> dict[str, Tensor]:
    both, gradient = drawn(*size), drawn(*size[:-1], size[-1] // 2)
    both.requires_grad_()
    plain, gate = both.chunk(2, -1)
    output = plain * functional.gelu(gate) if precise else kernels.geglu(both)
    output.backward(gradient)
    assert both.grad is not None
    return {"output": output.detach(), "of both": both.grad}


def _share(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).abs().max() / wanted.abs().max())


def _in_blocks() -> dict[str, dict[str, float]]:
    """Return how far blocks with kernels are from diffusers', and from those that make nothing again."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    torch.manual_seed(3)
    residual = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=16, groups=2)
    sizes = {"in_channels": 16, "norm_num_groups": 2, "cross_attention_dim": 24, "num_layers": 2}
    transformers = [
        Transformer2DModel(2, 8, use_linear_projection=linear, **sizes) for linear in (True, False)
    ]
    model = nn.ModuleList([residual, *transformers]).requires_grad_(False)
    times, text = torch.randn(1, 16), torch.randn(1, 3, 24)
    images = [torch.randn(1, channels, 2, 3) for channels in (8, 16, 16)]

    def gradients() -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in images]
        outputs = [residual(inputs[0] * 1.0, times)]
        for module, x in zip(transformers, inputs[1:], strict=True):
            outputs.append(module(x * 1.0, encoder_hidden_states=text).sample)
        torch.autograd.backward([output.square().sum() for output in outputs])
        assert all(x.grad is not None for x in inputs)
        return [*(output.detach() for output in outputs), *(x.grad for x in inputs if x.grad is not None)]

    wanted = gradients()
    shares: dict[str, dict[str, float]] = {}
    known: list[Tensor] = []
    for rung in Rungs:
        make_lean(model)
        use_kernels(model)
        assert all(LeanTokens.enters in module.__dict__ for module in transformers)
        for module in model.modules():
            if isinstance(forward := module.__dict__.get("forward"), LeanBlock | LeanResidual):
                forward.rung = rung
        given = gradients()
        undo_lean(model)
        assert not any(LeanTokens.enters in module.__dict__ for module in transformers)
        known = known or given
        shares[rung.name] = {
            "diffusers": max(_share(a, b) for a, b in zip(given, wanted, strict=True)),
            "nothing again": max(_share(a, b) for a, b in zip(given, known, strict=True)),
        }
    return shares


def _in_layers() -> dict[str, float]:
    """Return how far the gradients of a LoRA layer's factors are from those by torch's products."""
    torch.manual_seed(4)
    base, leaf = nn.Linear(24, 40).requires_grad_(False), torch.zeros((), requires_grad=True)
    x, down, up, gradient = (torch.randn(size) for size in ((2, 7, 24), (4, 24), (40, 4), (2, 7, 40)))
    shares = []
    for ours in (False, True):
        sink = Gradients(torch.ones_like(down), torch.ones_like(up))
        DirectLinear.apply(x, leaf, base, Factors(down, up, 2.0, None, ours), sink).backward(gradient)
        shares.append(sink)
    plain, given = shares
    return {"down": _share(given.down, plain.down), "up": _share(given.up, plain.up)}


def _in_a_model(base: Path) -> dict[str, dict[str, float]]:
    """Return by rung how far a model with LoRA and kernels is from PEFT's layers in diffusers' blocks.

    In float32; of the prediction, and of the farthest gradient of a factor; and how many sums were added in
    place, as a share of all attentions.
    """
    learning = Learning(base, torch.float32, rank=8)
    learning.count = 1
    wanted, gradients = learning.backward()
    shares: dict[str, dict[str, float]] = {}
    for rung in Rungs:
        with learning.directly(joint=True, kernels=True) as adapter:
            blocks = [lean for row in lean_blocks(learning.model.components()["unet"]) for _, lean in row]
            for lean in blocks:
                lean.rung = rung
            with Operations() as seen:
                given, directs = learning.backward(adapter.gather)
        shares[f"model {rung.name}"] = {
            "prediction": _share(given, wanted),
            "gradients": farthest(gradients, directs),
            "in place": seen.names.count("add_layer_norm_") / (2 * len(blocks)),
        }
    return shares


def distances(base: Path) -> dict[str, dict[str, float]]:
    """Return how far each result of each case is from float64's, as a share of the largest number."""
    shares: dict[str, dict[str, float]] = {}
    shares |= _in_blocks() | {"layers": _in_layers()} | _in_a_model(base)
    for name, case in CASES.items():
        wanted, given = computed(case, True), computed(case, False)
        assert wanted.keys() == given.keys()
        shares[name] = {part: _share(given[part].double(), wanted[part]) for part in wanted}
    return shares


@pytest.fixture(scope="module")
def interpreted(tiny_base: Path) -> dict[str, dict[str, float]]:
    """What a process of its own finds: Triton interprets, or compiles, from its import on."""
    done = subprocess.run(
        [sys.executable, __file__, str(tiny_base)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares: dict[str, dict[str, float]] = json.loads(done.stdout)
    return shares


@triton_only
@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_torchs_numbers(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    bound = ROUNDING[CASES[name][1]]
    assert interpreted[name] and all(share <= bound for share in interpreted[name].values()), interpreted[
        name
    ]


@triton_only
@pytest.mark.long
@pytest.mark.parametrize("rung", [rung.name for rung in Rungs])
def test_blocks_with_kernels_agree_and_what_they_make_again_has_the_same_bits(
    rung: str, interpreted: dict[str, dict[str, float]]
) -> None:
    assert interpreted[rung]["diffusers"] <= 1e-5 and interpreted[rung]["nothing again"] == 0.0


@triton_only
@pytest.mark.long
def test_lora_layers_have_the_same_gradients(interpreted: dict[str, dict[str, float]]) -> None:
    assert max(interpreted["layers"].values()) <= 1e-6


@triton_only
@pytest.mark.long
@pytest.mark.parametrize("rung", Rungs)
def test_a_model_with_kernels_learns_what_pefts_layers_do(
    rung: Rungs, interpreted: dict[str, dict[str, float]]
) -> None:
    shares = interpreted[f"model {rung.name}"]
    assert shares["prediction"] <= 1e-5 and shares["gradients"] <= 1e-4
    # where whole blocks are computed again, so are the sums; where parts are, the sums are made by themselves
    assert shares["in place"] == {Rungs.projections: 0.0, Rungs.blocks: 2.0}.get(rung, 1.0)


def test_without_a_card_and_without_triton_no_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels.can_launch(torch.device("cpu"), torch.float32)
    card = torch.device("cuda")
    monkeypatch.delenv("CC", raising=False)
    compilers = ["gcc"]
    monkeypatch.setattr(kernels, "which", lambda name: name if name in compilers else None)
    for capability, dtype, fine in (
        ((7, 5), torch.float16, True),
        ((7, 5), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, True),
        ((6, 1), torch.float32, False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, fixed=capability: fixed)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        assert kernels.can_launch(card, dtype) == fine
        assert kernels.can_multiply(card) == (capability >= (8, 0))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert not kernels.can_launch(card, dtype)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.can_launch(card, torch.float16) and kernels.can_multiply(card)
    compilers.clear()
    monkeypatch.setattr(sys, "platform", "linux")
    assert not kernels.can_launch(card, torch.float16), "Triton needs a C compiler"


def test_each_kernel_is_one_operation_that_the_meta_device_knows() -> None:
    with torch.device("meta"), Operations() as seen:
        small, large = (torch.empty(1, 64, side, side, requires_grad=True) for side in (8, 512))
        for image in (small, large):
            output = kernels.image_norm(image, nn.GroupNorm(32, 64).requires_grad_(False), silu=True)
            output.sum().backward()
            assert image.grad is not None and image.grad.shape == output.shape == image.shape
        states = torch.empty(1, 4, 64, requires_grad=True)
        sums = kernels.added_norm(states, states * 2, nn.LayerNorm(64).requires_grad_(False), room=16)
        gate = kernels.geglu(sums[1])
        (gate.sum() + sums[0].sum()).backward()
        assert gate.shape == (1, 4, 32) and states.grad is not None and states.grad.shape == states.shape
    assert seen.names == [
        *("group_norm", "group_norm_backward"),
        *("group_chunks", "group_norm", "group_chunks_backward", "group_norm_backward"),
        *("add_layer_norm", "geglu", "geglu_backward", "layer_norm_backward"),
    ]


if __name__ == "__main__":
    print(json.dumps(distances(Path(sys.argv[1]))))
