"""The choice of device and number format."""

from __future__ import annotations

import pytest
import torch

from sdlora.config.schema import Precision
from sdlora.devices import choose_device, choose_dtype, has_amx, is_out_of_memory
from sdlora.errors import ConfigError


def test_an_open_device_is_one_that_works() -> None:
    device = choose_device(None)
    assert torch.ones(2, device=device).sum().item() == 2
    assert (device.type == "cuda") == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("lacking", "device"), [([], "cuda"), ([0], "cuda:1"), ([0, 1], "cuda:2"), ([0, 1, 2], "cpu")]
)
def test_of_several_cards_the_first_that_torch_has_kernels_for_is_taken(
    lacking: list[int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(
        "sdlora.devices.lack_of_kernels", lambda index: "no kernels" if index in lacking else None
    )
    assert choose_device(None) == torch.device(device)


def test_a_named_device_is_taken() -> None:
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("setting", ["gpu", "cuda:99", "meta", "cpu!"])
def test_a_device_that_is_not_there_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"device `{setting}`: .*use|device `{setting}`: .*from cuda:0"):
        choose_device(setting)


@pytest.mark.parametrize(
    ("setting", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_named_precision_is_taken(setting: Precision, dtype: torch.dtype) -> None:
    assert choose_dtype(setting, torch.device("cpu")) == dtype


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.87 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error: Exception, lacking: bool) -> None:
    assert is_out_of_memory(error) == lacking


def test_a_cpu_gets_bf16_only_with_amx() -> None:
    expected = torch.bfloat16 if has_amx() else torch.float32
    assert choose_dtype(None, torch.device("cpu")) == expected
    assert choose_dtype(None, torch.device("mps")) == torch.float32
