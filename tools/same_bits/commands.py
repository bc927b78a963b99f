"""Runs command lines of a checkout, one child process each.

The libraries (torch, diffusers, ...) take 8 s to import and a tiny command 2 s, so that one server process
imports the libraries once and forks for each command; the child then does what ``python -m sdlora`` does.
Where processes cannot fork, and for a number of threads of its own, a command gets a fresh interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

_SERVER = """
import importlib, importlib.util, json, os, runpy, sys
print(json.dumps(importlib.util.find_spec("sdlora").origin), flush=True)
for name in ("torch", "accelerate", "peft", "safetensors.torch", "matplotlib.pyplot", "PIL.Image",
             "diffusers.loaders", "diffusers.models.unets.unet_2d_condition",
             "diffusers.models.autoencoders.autoencoder_kl", "diffusers.schedulers", "pydantic",
             "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
             "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip"):
    try:
        importlib.import_module(name)
    except ImportError:  # only time is lost
        print(f"not imported beforehand: {name}", file=sys.stderr)
for line in sys.stdin:
    arguments, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number, file in ((0, os.devnull), (1, out), (2, err)):
                flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(file, flags, 0o644), number)
            sys.argv = ["sdlora", *arguments]
            runpy.run_module("sdlora", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""
_VERSIONS = """
import importlib.metadata as m, json, platform
names = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow", "safetensors")
print(json.dumps({"python": platform.python_version(), **{name: m.version(name) for name in names}}))
"""


class Outcome(NamedTuple):
    """How a command ended: exit code, the JSON object of its last line, and what it said on stderr."""

    code: int
    answer: Any
    stderr: str


class Commands:
    """Commands of one checkout, on ``threads`` threads of the CPU.

    Args:
        checkout: its root folder, where ``python -m sdlora`` is run.
        python: interpreter with the dependencies; the checkout's own ``.venv`` when left out, else this one.
        scratch: folder for what commands print.
    """

    def __init__(self, checkout: Path, scratch: Path, python: Path | None = None, threads: int = 1) -> None:
        self.checkout = checkout
        self.python = python or _interpreter(checkout)
        self._out, self._err = scratch / "stdout.txt", scratch / "stderr.txt"
        self._threads = threads
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if hasattr(os, "fork"):
            self._server = subprocess.Popen(
                [str(self.python), "-c", _SERVER],
                cwd=self.checkout,
                env=self._environment(self._threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            origin = Path(self._told())
            if self.checkout.resolve() not in origin.resolve().parents:
                raise SystemExit(
                    f"{self.checkout}: python -m sdlora runs {origin}, which is another checkout"
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()

    def versions(self) -> dict[str, str]:
        """Return the versions of what computes."""
        done = subprocess.run([str(self.python), "-c", _VERSIONS], capture_output=True, text=True, check=True)
        versions: dict[str, str] = json.loads(done.stdout)
        return versions

    def run(
        self, arguments: Sequence[str], threads: int | None = None, stop: tuple[Path, Path] | None = None
    ) -> Outcome:
        """Run ``sdlora ARGUMENTS --json`` to its end.

        Args:
            arguments: the command line.
            threads: for this command only.
            stop: (file of events, run folder): a file named STOP is put into the folder as soon as the
                command tells its first event, so that it ends after its first step.
        """
        words = [*arguments, "--json"]
        if self._server is None or threads is not None or stop is not None:
            code = self._fresh(words, threads or self._threads, stop)
        else:
            assert self._server.stdin is not None
            print(json.dumps([words, str(self._out), str(self._err)]), file=self._server.stdin, flush=True)
            code = self._told()
        lines = self._out.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = self._err.read_text(encoding="utf-8", errors="replace")
        try:
            return Outcome(code, json.loads(lines[-1]) if lines else None, errors)
        except json.JSONDecodeError:
            return Outcome(code, None, errors)

    def _fresh(self, words: Sequence[str], threads: int, stop: tuple[Path, Path] | None) -> int:
        with self._out.open("wb") as out, self._err.open("wb") as err:
            child = subprocess.Popen(
                [str(self.python), "-m", "sdlora", *words],
                cwd=self.checkout,
                env=self._environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            while stop is not None and child.poll() is None:
                events, folder = stop
                if events.is_file() and events.stat().st_size:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "STOP").touch()
                    break
                time.sleep(0.005)
            return child.wait()

    def _told(self) -> Any:
        assert self._server is not None and self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise SystemExit(f"{self.python}: ended by itself; see its last words above")
        return json.loads(line)

    def _environment(self, threads: int) -> dict[str, str]:
        fixed = {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "140",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        return os.environ | fixed


def _interpreter(checkout: Path) -> Path:
    places = (checkout / ".venv" / "bin" / "python", checkout / ".venv" / "Scripts" / "python.exe")
    return next((place for place in places if place.exists()), Path(sys.executable))
