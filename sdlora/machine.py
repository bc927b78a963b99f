"""What this machine has for computing and what of it torch can use: facts, and conclusions from them.

:func:`examine` collects the facts; everything else is a function of :class:`MachineFacts`, so that it can be
tried for machines one does not have. Which torch serves which card: PyTorch's support matrix
(pytorch/pytorch#172352, #190385).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

Capability = tuple[int, int]
"""Compute capability of an NVIDIA card, (8, 9) for sm_89."""

_INDEX = "https://download.pytorch.org/whl/"
_TURING, _BLACKWELL = (7, 5), (10, 0)
_OLDEST_DRIVER = 525  # the first that runs CUDA 12
_PACKAGES = ("xformers", "triton", "triton-windows", "bitsandbytes")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI vendor; class of graphics cards


def version() -> str:
    """Return the installed version of sdlora; ``0+unknown`` in a checkout that was not installed."""
    try:
        return importlib.metadata.version("sdlora")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


@dataclass(frozen=True)
class Card:
    """An NVIDIA card as the driver or torch sees it.

    Attributes:
        name: as its maker calls it.
        capability: what it can compute, if that is known.
        memory: bytes, 0 where it is not known.
    """

    name: str
    capability: Capability | None = None
    memory: int = 0

    def __str__(self) -> str:
        parts = [f"sm_{self.capability[0]}{self.capability[1]}"] if self.capability else []
        from .files import (
            size_text,
        )  # not at the top: before anything is installed, this module is used alone

        parts += [size_text(self.memory)] if self.memory else []
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


@dataclass(frozen=True)
class MachineFacts:
    """A machine and the torch on it.

    Attributes:
        system: ``Linux``, ``Windows`` or ``Darwin``.
        python: path of the running interpreter, for commands.
        torch: its version.
        cuda_build: CUDA version that torch is built with; None for a torch without CUDA.
        architectures: what torch has kernels for, e.g. ``sm_90``, ``compute_120``.
        usable: torch can compute on the cards.
        cards: those that torch sees.
        driver: version of NVIDIA's driver, if one runs.
        present: cards that the driver or the bus shows, whatever torch says.
        hidden: value of CUDA_VISIBLE_DEVICES, if it is set.
        mps: torch can use an Apple GPU.
        cores: of the CPU.
        memory: bytes in all.
        free: bytes free now.
        packages: version of each helpful package, None if it is not installed.
    """

    system: str
    python: str
    torch: str
    cuda_build: str | None = None
    architectures: tuple[str, ...] = ()
    usable: bool = False
    cards: tuple[Card, ...] = ()
    driver: str | None = None
    present: tuple[Card, ...] = ()
    hidden: str | None = None
    mps: bool = False
    cores: int = 1
    memory: int = 0
    free: int = 0
    packages: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def unsupported(self) -> tuple[Card, ...]:
        """The cards that torch sees but has no kernels for."""
        return tuple(card for card in self.cards if not serves(self.architectures, card.capability))

    @property
    def card_lies_idle(self) -> bool:
        """Whether there is a card that torch cannot compute on."""
        if self.usable:
            return bool(self.cards) and len(self.unsupported) == len(self.cards)
        return bool(self.present or self.driver)


def examine() -> MachineFacts:
    """Look at this machine; takes a second or two, and a little memory of the cards."""
    import psutil
    import torch

    driver, present = _ask_driver()
    usable = torch.cuda.is_available()
    memory = psutil.virtual_memory()
    return MachineFacts(
        system=platform.system(),
        python=sys.executable,
        torch=torch.__version__,
        cuda_build=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if usable else (),
        usable=usable,
        cards=tuple(_card_of_torch(index) for index in range(torch.cuda.device_count())) if usable else (),
        driver=driver,
        present=present,
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES"),
        mps=torch.backends.mps.is_available(),
        cores=os.cpu_count() or 1,
        memory=memory.total,
        free=memory.available,
        packages={name: _version(name) for name in _PACKAGES},
    )


def serves(architectures: tuple[str, ...], capability: Capability | None) -> bool:
    """Tell whether a torch with these architectures has kernels for a card; True where either is unknown.

    Kernels of sm_86 run on 8.6 and 8.9, not on 8.0 or 9.0; compute_90 is compiled for any later card.
    """
    if capability is None or not architectures:
        return True
    for name in architectures:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name):
            major, minor = int(match[2]), int(match[3])
            same = major == capability[0] and minor <= capability[1]
            if same or (match[1] == "compute" and (major, minor) <= capability):
                return True
    return False


def unserved(architectures: tuple[str, ...], card: Card) -> str | None:
    """Return in one line that torch has no kernels for a card, or None if it has."""
    if serves(architectures, card.capability):
        return None
    return f"{card}: this torch only has kernels for {', '.join(architectures)}"


def lack_of_kernels(index: int) -> str | None:
    """Return in one line that torch has no kernels for one of the cards it sees, or None if it has."""
    import torch

    architectures = tuple(torch.cuda.get_arch_list())
    return unserved(architectures, _card_of_torch(index)) if architectures else None


def why_idle(facts: MachineFacts) -> str | None:
    """Return what keeps torch from using this machine's card, in one line; None if nothing does."""
    if not facts.card_lies_idle:
        return None
    card = str((facts.present or facts.cards or (Card("an NVIDIA card"),))[0])
    if facts.usable:
        return "; ".join(unserved(facts.architectures, other) or "" for other in facts.unsupported)
    if facts.hidden is not None and facts.hidden.strip() in ("", "-1", "none", "NoDevFiles"):
        return f"{card} is hidden by the environment variable CUDA_VISIBLE_DEVICES={facts.hidden}"
    if facts.driver is None:
        return f"{card} is here, but NVIDIA's driver is not running"
    if facts.cuda_build is None:
        return f"{card} is here, but this torch ({facts.torch}) is built without CUDA"
    major = _major(facts.driver)
    if major is not None and major < _driver_for(facts.cuda_build):
        return (
            f"{card} is here, but its driver {facts.driver} is too old for CUDA {facts.cuda_build} in torch"
        )
    return f"{card} is here, but torch {facts.torch} (CUDA {facts.cuda_build}) cannot reach it"


def remedies(facts: MachineFacts) -> list[str]:
    """Return the shell commands that let torch compute on this machine's card, one per line."""
    if not facts.card_lies_idle:
        return []
    if facts.hidden is not None and facts.hidden.strip() in ("", "-1", "none", "NoDevFiles"):
        return ["set CUDA_VISIBLE_DEVICES=" if facts.system == "Windows" else "unset CUDA_VISIBLE_DEVICES"]
    if facts.driver is None:
        return _install_driver(facts.system)
    index = wheel_index(facts)
    if index is None:
        return _install_driver(facts.system)
    if facts.cuda_build is not None and not facts.unsupported and _suits(facts):
        return ["nvidia-smi", *_restart(facts.system)]
    python = f'"{facts.python}"' if " " in facts.python else facts.python
    # pip keeps a torch of the same version, even one built for other devices: so it must be removed first
    wanted = " ".join(f'"{word}"' if "<" in word else word for word in _wheel_words(index))
    return [f"{python} -m pip uninstall -y torch", f"{python} -m pip install {wanted}"]


def torch_words(facts: MachineFacts) -> list[str]:
    """Return the words after ``pip install`` that bring the torch for a machine on which there is none yet.

    Without a card that torch can use it is the one for the CPU, which is a tenth of the size on Linux.
    """
    if facts.system == "Darwin":
        return ["torch"]
    index = wheel_index(facts) if facts.driver is not None else None
    return _wheel_words(index or "cpu")


def _wheel_words(index: str) -> list[str]:
    wanted = "torch<2.15" if index == "cu126" else "torch"  # the last torch for CUDA 12.6 is 2.14
    return [wanted, "--index-url", f"{_INDEX}{index}", "--extra-index-url", "https://pypi.org/simple"]


def look_without_torch() -> MachineFacts:
    """Return what driver and bus say of this machine, with the standard library alone."""
    driver, present = _ask_driver()
    return MachineFacts(platform.system(), sys.executable, "none", driver=driver, present=present)


def wheel_index(facts: MachineFacts) -> str | None:
    """Return which package index of PyTorch serves card and driver; None if the driver is too old."""
    driver = _major(facts.driver)
    if driver is None:
        driver = _OLDEST_DRIVER
    known = [card.capability for card in (*facts.present, *facts.cards) if card.capability is not None]
    oldest = min(known, default=_TURING)
    newest = max(known, default=_TURING)
    if driver < _OLDEST_DRIVER or (newest >= _BLACKWELL and driver < 570):
        return None
    if oldest < _TURING:
        return "cu126"
    if driver >= 580:
        return "cu130"
    return "cu128" if driver >= 570 else "cu126"


@functools.cache
def idle_card_notice() -> str | None:
    """Return the notice for users before the CPU computes on a machine that has a card; else None."""
    return notice_of(examine())


def notice_of(facts: MachineFacts) -> str | None:
    """Return why the card lies idle and the commands that correct it, in one line; None if no card does."""
    reason = why_idle(facts)
    if reason is None:
        return None
    steps = ", then ".join(f"`{command}`" for command in remedies(facts))
    return f"THE CARD LIES IDLE, and a CPU is many times slower: {reason}; to use it run {steps}"


def _suits(facts: MachineFacts) -> bool:
    """Tell whether the driver is new enough for the CUDA of torch."""
    driver = _major(facts.driver)
    return facts.cuda_build is None or driver is None or driver >= _driver_for(facts.cuda_build)


def _driver_for(cuda: str) -> int:
    """Return the oldest driver, by its first number, that runs a CUDA version."""
    major = _major(cuda) or 12
    return 580 if major >= 13 else _OLDEST_DRIVER if major == 12 else 450


def _major(version: str | None) -> int | None:
    match = re.match(r"\d+", version or "")
    return int(match[0]) if match else None


def _install_driver(system: str) -> list[str]:
    if system == "Linux":
        words = _distribution()
        if "ubuntu" in words:
            return ["sudo ubuntu-drivers install", *_restart(system)]
        if "debian" in words:
            return ["sudo apt install nvidia-driver", *_restart(system)]
        if "fedora" in words:
            return ["sudo dnf install akmod-nvidia", *_restart(system)]
        if "arch" in words:
            return ["sudo pacman -S nvidia-open", *_restart(system)]
    start = "start " if system == "Windows" else ""
    return [f"{start}https://www.nvidia.com/drivers", *_restart(system)]


def _distribution() -> str:
    """Return this Linux distribution's name and those of its relatives, e.g. ``linuxmint ubuntu debian``."""
    with suppress(OSError):
        known = platform.freedesktop_os_release()
        return f"{known.get('ID', '')} {known.get('ID_LIKE', '')}"
    return ""


def _restart(system: str) -> list[str]:
    return ["shutdown /r /t 0" if system == "Windows" else "sudo reboot"]


def _card_of_torch(index: int) -> Card:
    import torch

    seen = torch.cuda.get_device_properties(index)
    return Card(seen.name, (seen.major, seen.minor), int(seen.total_memory))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_driver() -> tuple[str | None, tuple[Card, ...]]:
    """Return the driver's version and the cards of this machine, without torch."""
    listing = _nvidia_smi("name,compute_cap,memory.total,driver_version") or _nvidia_smi(
        "name,memory.total,driver_version"
    )
    if listing:
        return parse_listing(listing)
    if platform.system() == "Windows":
        library = Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll"
        return ("unknown" if library.is_file() else None), ()
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        match = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", text)
        return (match[1] if match else "unknown"), ()
    return None, cards_on_the_bus(Path("/sys/bus/pci/devices"))


def _nvidia_smi(query: str) -> str:
    program = shutil.which("nvidia-smi")
    places = ("/usr/lib/wsl/lib/nvidia-smi", r"C:\Windows\System32\nvidia-smi.exe")
    program = program or next((place for place in places if Path(place).is_file()), None)
    if program is None:
        return ""
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return answer.stdout if answer.returncode == 0 else ""
    return ""


def parse_listing(text: str) -> tuple[str | None, tuple[Card, ...]]:
    """Return driver and cards from nvidia-smi's lines ``name[, capability], MiB, driver``."""
    driver: str | None = None
    cards = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) < 3:
            continue
        match = re.fullmatch(r"(\d+)\.(\d+)", parts[1]) if len(parts) > 3 else None
        capability = (int(match[1]), int(match[2])) if match else None
        memory = int(parts[-2]) * 2**20 if parts[-2].isdigit() else 0
        cards.append(Card(parts[0], capability, memory))
        driver = parts[-1]
    return driver, tuple(cards)


def cards_on_the_bus(devices: Path) -> tuple[Card, ...]:
    """Return the NVIDIA cards that Linux lists, driver or not."""
    cards = []
    if not devices.is_dir():
        return ()
    for device in sorted(devices.iterdir()):
        with suppress(OSError):
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
            kind = (device / "class").read_text(encoding="ascii").strip()
            if vendor == _NVIDIA and kind.startswith(_DISPLAY):
                cards.append(Card(f"an NVIDIA card (PCI {device.name})"))
    return tuple(cards)
