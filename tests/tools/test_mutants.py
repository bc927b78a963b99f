"""The table of mutants keeps up with the code: each can be put in, and the tests it names exist."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

from tools.mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_mutant_can_be_put_in() -> None:
    assert len(MUTANTS) > 140
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert mutant.applied(source) != source, mutant.fault
        compile(mutant.applied(source), mutant.file, "exec")


def test_the_tests_that_must_see_a_mutant_exist() -> None:
    assert max(Counter(mutant.fault for mutant in MUTANTS).values()) == 1
    for mutant in MUTANTS:
        assert mutant.tests, mutant.fault
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert not name or name.partition("[")[0] in functions(file), f"{mutant.fault}: {test}"
