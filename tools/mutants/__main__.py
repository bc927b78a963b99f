"""Apply each mutant to a copy of the tree and run its tests; print which were killed and which survived."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .mutant import Mutant
from .table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
_COPIED = ("sdlora", "ui", "tests", "tools", "benchmarks", "configs", "docs", "README.md", "pyproject.toml")
_PASSED, _FAILED = 0, 1  # pytest's exit codes; all others mean that no test has judged


def copied_tree(target: Path) -> None:
    """Copy what the tests need; nothing is ever changed in the tree itself."""
    skipped = shutil.ignore_patterns("__pycache__", ".*", "runs", "cache")
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=skipped)
        elif source.is_file():
            shutil.copy2(source, target / name)


def run_tests(tree: Path, tests: Sequence[str], through: Sequence[str], *, stop: bool) -> tuple[int, str]:
    """Run tests of a copied tree; return pytest's exit code and what it printed."""
    command = [*through, sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "", "--tb=line", *(["-x"] if stop else []), *(f"tests/{test}" for test in tests)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}  # before the package that is installed
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def verdict(tree: Path, mutant: Mutant, through: Sequence[str]) -> str:
    """Return ``killed``, ``SURVIVED`` or what hindered the tests, with the mutant in the tree meanwhile."""
    file = tree / mutant.file
    source = file.read_text(encoding="utf-8")
    try:
        write(file, mutant.applied(source))
        code, output = run_tests(tree, mutant.tests, through, stop=True)
    except ValueError as error:
        return f"NOT APPLIED: {error}"
    finally:
        write(file, source)
    if code == _PASSED:
        return "SURVIVED"
    return "killed" if code == _FAILED else f"NO VERDICT (pytest ended with {code}): {output[-600:]}"


def write(file: Path, source: str) -> None:
    """Write a module's source and drop its compiled form, whose age tells seconds only."""
    file.write_text(source, encoding="utf-8")
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants; return 0 if all were killed."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose fault or file holds this")
    parser.add_argument(
        "--through", default="", metavar="COMMAND", help="what to run pytest with, e.g. `nice`"
    )
    parser.add_argument(
        "--unchanged", action="store_true", help="first see that the tests pass without faults"
    )
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if options.only in m.fault or options.only in m.file]
    if not chosen:
        parser.error(f"no mutant holds `{options.only}`")
    through = shlex.split(options.through)
    survivors = []
    with tempfile.TemporaryDirectory(prefix="sdlora-mutants-") as folder:
        tree = Path(folder)
        copied_tree(tree)
        if options.unchanged:
            tests = sorted({test for mutant in chosen for test in mutant.tests})
            code, output = run_tests(tree, tests, through, stop=False)
            if code != _PASSED:
                print(
                    output[-3000:], f"the tests fail without any fault (pytest ended with {code})", sep="\n"
                )
                return 1
        for number, mutant in enumerate(chosen, start=1):
            began = time.monotonic()
            result = verdict(tree, mutant, through)
            print(
                f"{number}/{len(chosen)} {result} ({time.monotonic() - began:.0f} s): {mutant.fault}",
                flush=True,
            )
            if result != "killed":
                survivors.append(mutant.fault)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
