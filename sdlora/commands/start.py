"""What ``start.sh`` and ``start.bat`` do once there is a Python: install, update, open the page.

Runs in the checkout's own environment before anything is installed there, so with the standard library alone.
Which torch is installed follows the rule of ``sdlora doctor`` (:func:`sdlora.machine.torch_words`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..machine import MachineFacts, look_without_torch, torch_words

ROOT = Path(__file__).resolve().parents[2]
MARKER = "sdlora-installed.txt"
"""File in the environment: what it was installed from; where that differs, it is installed again."""
INDEX_VARIABLE = "SDLORA_TORCH_INDEX"
"""Environment variable: the package index that torch comes from; empty for pip's usual one."""
_USAGE = """usage: start [--update] [--setup] [options of `sdlora ui`]

  --update  get the newest version first (git pull)
  --setup   make the environment, and stop
"""

Run = Callable[[Sequence[str]], int]


def main(words: Sequence[str], *, root: Path = ROOT, run: Run | None = None) -> int:
    """Install what is missing, then serve the page; return the exit code.

    Args:
        words: of the command line; those that are not for this program go to ``sdlora ui``.
        root: folder of the checkout.
        run: runs a command and returns its exit code.
    """
    run = run or _run_in(root)
    rest = [word for word in words if word not in ("--update", "--setup")]
    if any(word in ("-h", "--help") for word in rest):
        print(_USAGE)
    if "--update" in words:
        if not (root / ".git").exists():
            print("this is no git checkout: download the newest version, and start it", file=sys.stderr)
            return 2
        if run(["git", "pull", "--ff-only"]) != 0:
            print("there is no newer version that fits what was changed here, or no network", file=sys.stderr)
            return 2
        # what was just fetched goes on, not this module as it was before
        again = [word for word in words if word != "--update"]
        return run([sys.executable, "-m", "sdlora.commands.start", *again])
    if problem := install(root, look_without_torch(), run):
        print(f"sdlora: {problem}", file=sys.stderr)
        return 2
    if "--setup" in words:
        print(f"the environment is ready: {Path(sys.prefix)}")
        return 0
    return run([sys.executable, "-m", "sdlora", "ui", *rest])


def install(root: Path, facts: MachineFacts, run: Run) -> str | None:
    """Install sdlora, the page and the torch for this machine, unless that was done; return a problem."""
    chosen = os.environ.get(INDEX_VARIABLE)
    words = torch_words(facts)
    if chosen is not None:
        words = [words[0], *(["--index-url", chosen] if chosen.strip() else [])]
    marker = Path(sys.prefix) / MARKER
    state = "\n".join([str(root), " ".join(words), *_texts(root)])
    before = marker.read_text(encoding="utf-8") if marker.is_file() else ""
    if before == state:
        return None
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    bounds = ["-c", str(root / "constraints.txt")]
    if before and before.splitlines()[1:2] != [" ".join(words)]:
        # pip keeps a torch of the same version, even one built for other devices
        run([*pip, "uninstall", "-y", "torch"])
    print(f"installing torch ({' '.join(words)}) ...", flush=True)
    if run([*pip, "install", *bounds, *words]) != 0:
        return (
            "torch could not be installed, see above; check the network and start again. Another package "
            f"index can be named in the environment variable {INDEX_VARIABLE}"
        )
    print("installing sdlora ...", flush=True)
    if run([*pip, "install", *bounds, "-e", f"{root}[ui]"]) != 0:
        return "sdlora could not be installed, see above; check the network and start again"
    temporary = marker.with_suffix(".new")
    temporary.write_text(state, encoding="utf-8")
    temporary.replace(marker)
    return None


def _texts(root: Path) -> list[str]:
    return [(root / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]


def _run_in(root: Path) -> Run:
    def run(words: Sequence[str]) -> int:
        try:
            return subprocess.run(list(words), cwd=root, check=False).returncode
        except FileNotFoundError:
            print(f"sdlora: {words[0]} is not installed", file=sys.stderr)
            return 127
        except KeyboardInterrupt:
            return 130

    return run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
