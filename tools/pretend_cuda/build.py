"""Compiles the two C++ shims for the torch that is installed, once a torch and a version of the sources.

g++ and the headers in the torch wheel are all it takes; where one of them is missing, :class:`Unavailable`
says which.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
PRELOAD, GUARD = "libpreload.so", "libguard.so"


class Unavailable(Exception):
    """The pretended device cannot be had here; the message says why."""


def built() -> Path:
    """Return the folder with both libraries, compiled now if they are not there (6 s).

    Raises:
        Unavailable: on another system than Linux, without g++, or with a torch that has no headers.
    """
    torch_folder = _torch_folder()
    folder = _folder()
    if not (folder / GUARD).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            _compile(torch_folder, Path(place) / "build")
            try:
                (Path(place) / "build").rename(folder)
            except OSError:  # another process was faster
                if not (folder / GUARD).is_file():
                    raise
    return folder


def _torch_folder() -> Path:
    if sys.platform != "linux":
        raise Unavailable(f"the pretended CUDA device needs Linux; this is {sys.platform}")
    if shutil.which("g++") is None:
        raise Unavailable("the pretended CUDA device is built with g++, which is not installed here")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed")
    folder = Path(spec.origin).parent
    if not (folder / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").is_file():
        raise Unavailable(f"{folder} holds no C++ headers; use a torch wheel from PyPI or pytorch.org")
    if (folder / "lib" / "libtorch_cuda.so").is_file():
        raise Unavailable("this torch is built with CUDA; the pretence needs the CPU build")
    return folder


def _folder() -> Path:
    """Return where the libraries for this torch and these sources are kept."""
    from platformdirs import user_cache_path

    digest = hashlib.sha256(importlib.metadata.version("torch").encode() + sys.version.encode())
    for name in ("guard.cpp", "preload.cpp", "build.py"):
        digest.update((SOURCES / name).read_bytes())
    given = os.environ.get("PRETEND_CUDA_CACHE")
    return (Path(given) if given else user_cache_path("pretend-cuda")) / digest.hexdigest()[:16]


def _compile(torch_folder: Path, target: Path) -> None:
    include, libraries = torch_folder / "include", torch_folder / "lib"
    target.mkdir()
    common = ["g++", "-shared", "-fPIC", "-O1"]
    guard = [
        *(*common, "-std=c++20", f"-I{include}", f"-I{include}/torch/csrc/api/include"),
        *(str(SOURCES / "guard.cpp"), "-o", str(target / GUARD), f"-L{libraries}", "-ltorch_cpu", "-lc10"),
    ]
    preload = [*common, "-std=c++17", str(SOURCES / "preload.cpp"), "-o", str(target / PRELOAD), "-ldl"]
    for command in (preload, guard):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise Unavailable(f"g++ cannot build the shims for this torch: {first}")
