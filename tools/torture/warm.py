"""Command lines of sdlora, each in a process of its own, begun in milliseconds.

Importing torch takes longer than a tiny run. So one process imports everything and forks for each command;
the child does what ``python -m sdlora`` does. Writes below a folder can be made to fail in it
(``faults.c``), and its clock can be made to jump. POSIX only, as are the signals and faults it is for.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_HERE = Path(__file__).parent
ROOT = _HERE.parent.parent
PATIENCE = 180.0
"""Seconds after which a command that did not end counts as hanging."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with writing: of the calls below ``place`` the first ``after`` work.

    Attributes:
        place: folder.
        after: calls that still work.
        error: number of the error; 0 ends the process with SIGKILL.
        times: calls that fail; negative for all further ones.
    """

    place: Path
    after: int
    error: int
    times: int = -1


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), and what it said."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """The JSON object of its last line; None if there is none."""
        with suppress(ValueError, IndexError):
            return json.loads(self.out.splitlines()[-1])
        return None


class Running:
    """A command that may be under way."""

    def __init__(self, warm: Warm, pid: int, streams: tuple[Path, Path]) -> None:
        self.pid, self._warm, self._streams = pid, warm, streams

    def signal(self, number: int) -> None:
        """Send a signal; one that comes too late does nothing."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def lives(self) -> bool:
        """Tell whether it still runs."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in "ZX"

    def wait(self) -> Ended:
        """Return how it ended; one that hangs is killed, and has code -9 with a word about it."""
        end = time.monotonic() + PATIENCE
        while self.lives() and time.monotonic() < end:
            time.sleep(0.01)
        hangs = self.lives()
        if hangs:
            self.signal(signal.SIGKILL)
        code = self._warm.ask({"wait": self.pid})
        # a command that was killed before it began has none
        out, err = (
            file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            for file in self._streams
        )
        return Ended(code, out, err + (f"\nTraceback: hangs for {PATIENCE:g} s" if hangs else ""))


class Warm:
    """The process that has everything imported, and the commands it begins."""

    def __init__(self, scratch: Path) -> None:
        """Keep what commands say below ``scratch``."""
        self._scratch, self._count = scratch, 0
        scratch.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        library = self._scratch / "faults.so"
        compiler = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(_HERE / "faults.c"), "-ldl"]
        subprocess.run(compiler, check=True)
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self._scratch),
            "HOME": str(self._scratch),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.torture.warm", str(library)],
            cwd=self._scratch,  # where a trained adapter is rescued to when its own folders cannot be written
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._heard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def start(
        self,
        *words: str,
        fault: Fault | None = None,
        clock: int | None = None,
        closed: Sequence[int] = (),
    ) -> Running:
        """Begin ``sdlora WORDS --json``.

        Args:
            words: the command line.
            fault: what goes wrong with writing.
            clock: seed of jumps that the clock makes.
            closed: streams (1, 2) whose other end is closed.
        """
        self._count += 1
        streams = self._scratch / f"{self._count}.out", self._scratch / f"{self._count}.err"
        wanted = {
            "words": [*words, "--json"],
            "streams": [str(file) for file in streams],
            "fault": fault and [str(fault.place), fault.after, fault.error, fault.times],
            "clock": clock,
            "closed": list(closed),
        }
        return Running(self, self.ask(wanted), streams)

    def run(self, *words: str, **more: Any) -> Ended:
        """Run ``sdlora WORDS --json`` to its end; see :meth:`start`."""
        return self.start(*words, **more).wait()

    def seen(self) -> int:
        """Return how many calls of the newest command that was to fail somewhere changed something there."""
        return int((self._scratch / f"{self._count}.seen").read_text(encoding="utf-8"))

    def ask(self, message: dict[str, Any]) -> Any:
        """Send a message to the process and return its answer."""
        assert self._process.stdin is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)
        return self._heard()

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the process that begins the commands ended; see its last words above")
        return json.loads(line)


def _serve(library: str) -> None:
    """Import everything, then begin what is asked for, and tell how it ended."""
    import ctypes

    import matplotlib.pyplot  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import transformers.models.clip.modeling_clip  # noqa: F401
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import sdlora.training.train  # noqa: F401
    from sdlora.commands.cli import main

    torch.set_num_threads(1)
    faults = ctypes.CDLL(library)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            _, status = os.waitpid(message["wait"], 0)
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        child = os.fork()
        if child == 0:
            code = 70
            try:
                _become(message, faults)
                code = main(message["words"])
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                import traceback

                with suppress(OSError):
                    traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with suppress(OSError, ValueError):
                        stream.flush()
                Path(message["streams"][0]).with_suffix(".seen").write_text(str(faults.torture_seen()))
                os._exit(code)
        print(json.dumps(child), flush=True)


def _become(message: dict[str, Any], faults: Any) -> None:
    """Make a forked process what a shell would have started."""
    os.setsid()
    numbers = [os.open(os.devnull, os.O_RDONLY)]
    for number, file in enumerate(message["streams"], 1):
        numbers.append(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
        if number in message["closed"]:
            reading, writing = os.pipe()
            os.close(reading)
            numbers[-1] = writing
    for number, given in enumerate(numbers):
        os.dup2(given, number)
    if message["clock"] is not None:
        _jump(random.Random(message["clock"]))
    if message["fault"]:
        place, after, error, times = message["fault"]
        import ctypes

        faults.torture_arm(place.encode(), ctypes.c_long(after), ctypes.c_long(error), ctypes.c_long(times))


def _jump(rng: random.Random) -> None:
    """Have the wall clock jump now and then, by up to ten years to either side, as it does when it is set."""
    true, offset = time.time, 0.0

    def told() -> float:
        nonlocal offset
        if rng.random() < 0.2:
            offset = rng.choice((-1, 1)) * 10 ** rng.uniform(0, 8.5)
        return true() + offset

    time.time = told


if __name__ == "__main__":
    _serve(sys.argv[1])
