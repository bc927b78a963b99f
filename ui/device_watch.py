"""How busy, full and hot this machine and its cards are: load, memory, temperature, room on the disk."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from .in_background import Latest

_EVERY = 2.0  # seconds between two looks; asking the driver takes a tenth of one
_SECONDS = 5.0  # that NVIDIA's program may take
MOST_CARDS = 16
_QUERY = "--query-gpu=name,utilization.gpu,memory.used,memory.total,temperature.gpu"
_DRM = Path("/sys/class/drm")
_OF_PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "acpitz")
"""Sensors of the processor by Linux' names, the best first; other systems do not tell."""


class DeviceWatch:
    """Looks only while somebody asks, and beside whoever asks."""

    def __init__(self, folder: Path) -> None:
        """Watch the machine, and the disk that a folder lies on."""
        self._folder, self._times = folder, psutil.cpu_times()
        self._machine: Latest[dict[str, Any]] = Latest(self._look, {}, every=_EVERY)
        self._cards: Latest[list[dict[str, Any]]] = Latest(cards, [], every=_EVERY)

    def state(self) -> dict[str, Any]:
        """Return what is known; what the system does not tell is missing or None.

        ``load`` (percent), ``memory`` and ``disk`` (``used`` and ``total`` bytes), ``temperature`` (degrees
        Celsius), ``shared`` (whether a GPU computes in that memory, as Apple's do, whose load macOS tells to
        nobody but root), and ``cards``, each with ``name``, ``load``, ``used``, ``total``, ``temperature``.
        """
        return self._machine.now() | {"cards": self._cards.now()}

    def _look(self) -> dict[str, Any]:
        # psutil's own percentage is the one since the same thread asked before; here each asks but once
        before, self._times = self._times, psutil.cpu_times()
        memory = psutil.virtual_memory()
        state: dict[str, Any] = {
            "load": busy(before, self._times),
            "memory": {"used": memory.total - memory.available, "total": memory.total},
            "shared": sys.platform == "darwin" and platform.machine() == "arm64",
        }
        with suppress(OSError):
            disk = shutil.disk_usage(self._folder)
            state["disk"] = {"used": disk.total - disk.free, "total": disk.total}
        with suppress(OSError, AttributeError, psutil.Error):  # there are no sensors, or no function for them
            state["temperature"] = hottest(psutil.sensors_temperatures())
        return state


def busy(before: Any, after: Any) -> float:
    """Return the percentage of the time between two :func:`psutil.cpu_times` that the processor worked."""
    spent = {name: getattr(after, name) - getattr(before, name) for name in after._fields}
    # a guest's time is in the user's, too
    whole = sum(seconds for name, seconds in spent.items() if not name.startswith("guest"))
    idle = spent["idle"] + spent.get("iowait", 0.0)
    return min(100.0, max(0.0, 100 * (whole - idle) / whole)) if whole > 0 else 0.0


def hottest(sensors: Mapping[str, Sequence[Any]]) -> float | None:
    """Return the highest temperature of the processor's sensors; None where they are not known."""
    for name in _OF_PROCESSORS:
        told = [float(sensor.current) for sensor in sensors.get(name, ()) if 0 < sensor.current < 150]
        if told:
            return max(told)
    return None


def cards() -> list[dict[str, Any]]:
    """Return what is told of each card: NVIDIA's by their program, AMD's by Linux' driver."""
    return [*nvidia_cards(), *amd_cards(_DRM)][:MOST_CARDS]


def amd_cards(folder: Path) -> list[dict[str, Any]]:
    """Return what the driver ``amdgpu`` says of each card that computes; nothing where it is not there.

    Args:
        folder: ``/sys/class/drm`` (its files: kernel.org, gpu/amdgpu/thermal.html).
    """
    told = []
    for device in sorted(folder.glob("card*/device"))[:MOST_CARDS]:
        total = _number(_read(device / "mem_info_vram_total"))
        if total is None:
            continue
        heat = [_number(_read(file)) for file in sorted(device.glob("hwmon/hwmon*/temp1_input"))]
        told.append(
            {
                "name": _read(device / "product_name")[:100] or "AMD GPU",
                "load": _number(_read(device / "gpu_busy_percent")),
                "used": _number(_read(device / "mem_info_vram_used")),
                "total": total,
                "temperature": next((value / 1000 for value in heat if value is not None), None),
            }
        )
    return told


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def nvidia_cards() -> list[dict[str, Any]]:
    """Return what NVIDIA's own program says of each card; nothing without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, _QUERY, "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    return [card for line in output.splitlines()[:MOST_CARDS] if (card := read_card(line)) is not None]


def read_card(line: str) -> dict[str, Any] | None:
    """Return one card's line as values; ``[N/A]`` is None. A line that says something else is passed over."""
    name, *numbers = (part.strip() for part in line.rsplit(",", 4))
    if len(numbers) != 4:
        return None
    load, used, total, temperature = (_number(text) for text in numbers)
    held = {"used": None if used is None else used * 2**20, "total": None if total is None else total * 2**20}
    return {"name": name[:100], "load": load, **held, "temperature": temperature}


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None
