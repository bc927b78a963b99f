"""The table of mutants fits the tree: each fault can be applied, and the tests that must see it exist."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from tools.mutants.mutant import Mutant
from tools.mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_faults_of_all_kinds_and_no_two_are_the_same() -> None:
    assert len(MUTANTS) > 140
    assert [fault for fault, count in Counter(mutant.fault for mutant in MUTANTS).items() if count > 1] == []
    folders = {Path(mutant.file).parent.as_posix() for mutant in MUTANTS}
    assert {"sdlora/training", "sdlora/diffusion", "sdlora/adapters", "sdlora/formats"} <= folders


def problem(mutant: Mutant) -> str | None:
    """Return why a mutant cannot be tried, if so."""
    try:
        ast.parse(mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8")))
        for test in mutant.tests:
            file, _, name = test.partition("::")
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            if name and f"def {name.partition('[')[0]}(" not in text:
                return f"there is no {test}"
    except (OSError, ValueError, SyntaxError) as error:
        return str(error)
    return None if mutant.tests and mutant.old != mutant.new else "it changes or asks nothing"


def test_nearly_every_fault_can_be_applied_and_has_tests() -> None:
    """A few may lag behind the code until they are next tried: the tool names them, too."""
    stale = {mutant.fault: text for mutant in MUTANTS if (text := problem(mutant)) is not None}
    assert len(stale) <= len(MUTANTS) // 20, stale
    assert problem(Mutant("x", "sdlora/errors.py", "not there", "", ("test_files.py",))) is not None
