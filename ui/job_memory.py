"""How much memory a running job holds, on the machine and on its GPUs."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress

import psutil

from .in_background import Latest

_GPU_EVERY = 3.0  # seconds; asking the driver takes a tenth of one


class MemoryWatch:
    """Asks the operating system, and NVIDIA's own program where there is one, which nobody waits for."""

    def __init__(self) -> None:
        """Ask nothing yet."""
        self._on_gpus: Latest[dict[int, int]] = Latest(on_gpus, {}, every=_GPU_EVERY)

    def of(self, process: psutil.Process | None) -> dict[str, int] | None:
        """Return the bytes that a process and its children hold, as ``process`` and on GPUs ``gpu``."""
        if process is None:
            return None
        held, ids = 0, set()
        with suppress(psutil.Error):
            for member in (process, *process.children(recursive=True)):
                held += member.memory_info().rss
                ids.add(member.pid)
        if not held:
            return None
        on_gpu = sum(count for pid, count in self._on_gpus.now().items() if pid in ids)
        return {"process": held} | ({"gpu": on_gpu} if on_gpu else {})


def on_gpus() -> dict[int, int]:
    """Return process id -> bytes on GPUs; empty without NVIDIA's program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    held: dict[int, int] = {}
    with suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
        for line in output.splitlines():
            pid, _, mebibytes = line.partition(",")
            with suppress(ValueError):  # "[N/A]" where the driver does not say
                held[int(pid)] = held.get(int(pid), 0) + int(mebibytes) * 2**20
    return held
