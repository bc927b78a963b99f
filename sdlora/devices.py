"""Where a model runs and in which number format, when the user leaves it open."""

from __future__ import annotations

import torch

from .errors import ConfigError

_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def choose_device(setting: str | None) -> torch.device:
    """Return the device asked for, or else the fastest one present: CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: if the device asked for is not a device, or is not there.
    """
    if setting is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise ConfigError(
            f"device `{setting}`: no such kind of device; use cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda":
        _check_cuda(setting, device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device `{setting}`: this machine has no Apple GPU that torch can use; use cpu")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"device `{setting}`: not supported; use cpu, cuda, cuda:1 or mps")
    return device


def choose_dtype(setting: str | None, device: torch.device) -> torch.dtype:
    """Return the number format asked for, or else the fastest one that is safe on ``device``.

    CUDA: bf16 where the card computes in it, else fp16. MPS: fp32. CPU: bf16 only with AMX tiles; without
    them it is emulated and the mini base's denoiser takes 1.4 to 1.6 times as long as in fp32 (measured on
    2 cores with AVX-512 but no AMX: 204 against 136 ms at batch 2, 571 against 349 ms at batch 16).
    """
    if setting is not None:
        return _DTYPES[setting]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and has_amx() else torch.float32


def has_amx() -> bool:
    """Tell whether this CPU multiplies bf16 matrices in hardware (AMX); False if torch cannot tell."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported()) if supported is not None else False


def _check_cuda(setting: str, device: torch.device) -> None:
    if not torch.cuda.is_available():
        built = "no CUDA GPU was found" if torch.version.cuda else "this torch is built without CUDA"
        raise ConfigError(f"device `{setting}`: {built}; use cpu, or install torch with CUDA support")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device `{setting}`: this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0"
        )
