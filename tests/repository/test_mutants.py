"""The table of mutants fits the tree: each fault can be applied, and the tests that must see it exist."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tools.mutants.mutant import Mutant
from tools.mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_faults_of_all_kinds_and_no_two_are_the_same() -> None:
    assert len(MUTANTS) > 140
    assert [fault for fault, count in Counter(mutant.fault for mutant in MUTANTS).items() if count > 1] == []
    folders = {Path(mutant.file).parent.as_posix() for mutant in MUTANTS}
    assert {"sdlora/training", "sdlora/diffusion", "sdlora/adapters", "sdlora/formats"} <= folders


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_each_fault_can_be_applied_and_has_tests(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert mutant.old != mutant.new
    ast.parse(mutant.applied(source))
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text, test
