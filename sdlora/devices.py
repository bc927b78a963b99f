"""Which device and number format a model gets if the user leaves them open, and how devices are set up."""

from __future__ import annotations

import gc
import re

import torch
from torch import Tensor

from .errors import ConfigError
from .machine import idle_card_notice, lack_of_kernels
from .number_formats import dtype_of


def choose_device(setting: str | None) -> torch.device:
    """Return the device asked for, or else the fastest one torch can use: CUDA, then MPS, then the CPU.

    Of several cards it is the first that torch has kernels for. Where a card is present that torch cannot
    use, :func:`sdlora.machine.idle_card_notice` says so.

    Raises:
        ConfigError: if the device asked for is not a device, or is not there.
    """
    if setting is None:
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                if lack_of_kernels(index) is None:
                    return torch.device(f"cuda:{index}" if index else "cuda")
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

    CUDA: bf16 where the card computes in it, else fp16, but fp32 on a GTX 16xx and its like, which get NaN
    in fp16.
    MPS: fp32. CPU: bf16 only with AMX tiles; without them it is emulated and the mini base's denoiser takes
    1.4 to 1.6 times as long as in fp32 (measured on 2 cores with AVX-512 but no AMX: 204 against 136 ms at
    batch 2, 571 against 349 ms at batch 16).
    """
    if setting is not None:
        return dtype_of(setting)
    if device.type == "cuda":
        # asked of this card: torch's own function asks the current one
        if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16
        return half_of_card(torch.cuda.get_device_name(device))
    return torch.bfloat16 if device.type == "cpu" and has_amx() else torch.float32


# all cards with the chips TU116 and TU117: GTX, workstation, notebook and mining cards
_NAN_IN_FP16 = re.compile(r"\b(GTX 16\d\d|T(400|500|550|600|1000|1200|2000)|MX[45]50|CMP 30HX)\b")


def half_of_card(name: str) -> torch.dtype:
    """Return the format for a card without bf16: fp16, but fp32 for those known to give NaN (GTX 16xx)."""
    return torch.float32 if _NAN_IN_FP16.search(name) else torch.float16


def has_amx() -> bool:
    """Tell whether this CPU multiplies bf16 matrices in hardware (AMX); False if torch cannot tell."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported()) if supported is not None else False


def _check_cuda(setting: str, device: torch.device) -> None:
    if not torch.cuda.is_available():
        if notice := idle_card_notice():
            raise ConfigError(f"device `{setting}`: {notice}")
        built = "no CUDA GPU was found" if torch.version.cuda else "this torch is built without CUDA"
        raise ConfigError(
            f"device `{setting}`: {built}; use cpu, or a torch with CUDA support (sdlora doctor tells more)"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device `{setting}`: this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0"
        )
    if lack := lack_of_kernels(device.index or 0):
        raise ConfigError(f"device `{setting}`: {lack}; `sdlora doctor` says which torch to install")


def onto(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device, in a number format, without waiting for the device.

    To a card it goes from page-locked memory and in its final format: the copy is queued behind the card's
    work, and the memory is kept until it is done.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.to(dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


_LACK_OF_MEMORY = (
    *("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
    *("not enough memory", "can't allocate memory", "cannot allocate memory"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device lacked memory; only CUDA's allocator has an error class for that.

    cuBLAS and cuDNN, which allocate memory without it, MPS and the CPU say so only in the error's text.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _LACK_OF_MEMORY)


def release_unused() -> None:
    """Free what nothing uses any more, at once: main memory, and what torch keeps of a card for later.

    A model holds itself in circles (forward passes that are set on its modules), which Python frees some time
    later only: the next run of the process would not find the memory that its plan counts on.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def make_current(device: torch.device) -> None:
    """Let torch's calls that name no card use this one, instead of opening a context on the first card."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def set_exactness(device: torch.device, dtype: torch.dtype) -> None:
    """Set how exactly a card computes, for the whole process.

    If float32 is the base's format, everything is computed in float32. With bf16 and fp16, what stays float32
    (the autoencoder) may use TF32: its error (2^-11) is below bf16's own, and on tensor cores it is several
    times as fast. cuDNN may use only algorithms that give the same bits each time, and does not try out which
    is fastest: with buckets it would try again for every shape, and its choice would differ from run to run.
    """
    if device.type != "cuda":
        return
    half = dtype != torch.float32
    torch.backends.cuda.matmul.allow_tf32 = half
    torch.backends.cudnn.allow_tf32 = half
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
