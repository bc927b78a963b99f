"""What must be corrected in a folder before training, and how it is reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ProblemKind = Literal[
    "unreadable", "undecodable", "bad caption", "no caption", "name clash", "bad sidecar", "bad mask"
]
_MAX_LISTED = 20
_CUT_SHORT = re.compile(r"truncat|unexpected end|end of (file|data|image)|premature|incomplete", re.I)


@dataclass(frozen=True)
class Problem:
    """Something that must be corrected before training: what, where and how."""

    kind: ProblemKind
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


def is_cut_short(problem: Problem) -> bool:
    """Return whether an image could be decoded until its file ended too early."""
    return problem.kind == "undecodable" and _CUT_SHORT.search(problem.what) is not None


class Unusable(Exception):
    """Raised for a file that cannot be used, and caught where problems are collected."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def listed(problems: Sequence[Problem], folder: Path) -> str:
    """Return all problems of a folder as one message, up to 20 lines."""
    if len(problems) == 1:
        return f"{folder}: {problems[0]}"
    lines = [f"  - {problem}" for problem in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        lines.append(f"  and {len(problems) - _MAX_LISTED} more; `sdlora check` lists all")
    return "\n".join([f"{folder}: {len(problems)} problems", *lines])
