"""Run diffusers' script as it is, on a machine that may lack torchvision: run_peer.py SCRIPT ARGUMENTS.

Where torchvision is missing, the script alone gets our stand-in: its libraries are loaded first and have
then settled that there is none, as on any such machine. The script loads the same libraries in its first
lines, so the order costs it nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from pathlib import Path

_LIBRARIES = ("transformers", "accelerate", "datasets", "peft", "diffusers")


def main(arguments: list[str]) -> None:
    """Run the script in this process, under its own name and arguments."""
    if importlib.util.find_spec("torchvision") is None:
        for name in _LIBRARIES:
            importlib.import_module(name)
        importlib.import_module("transformers.utils").is_torchvision_available()  # keeps its answer
        sys.path.append(str(Path(__file__).parent / "stand_ins"))
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
