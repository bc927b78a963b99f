"""One word a thing: names that say nothing, and a second word for an image, do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sdlora", "ui", "tests", "tools", "benchmarks", "docs", "configs")
EMPTY_NAMES = {"own", "one", "found", "made", "said"}
"""Names that a noun for the value's type or role does better than."""
OTHER_WORD = re.compile("pict" + "ure", re.IGNORECASE)
KEPT = {
    "sdlora/commands/models.py",  # the option and the folders of earlier versions
    "sdlora/commands/surgery.py",  # the option of earlier versions
    "sdlora/data/reading/cache_folder.py",  # a file in users' cache folders
    "sdlora/data/reading/captions.py",  # names that cameras give
    "sdlora/exporting/image_proof.py",  # a prompt: another one draws another image
    "tests/config/test_defaults.py",  # captions of the tests' images, here and in the next three
    "tests/data/check/test_doctor.py",
    "tests/data/reading/test_sources.py",
    "tests/drawings.py",
    "tests/test_same_bits.py",  # compares with commits that said so, as does the tool
    "tools/same_bits/__main__.py",
    "tools/same_bits/cases.py",
}


def files(*endings: str) -> list[Path]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in endings]
    return sorted(path for path in paths if "assets" not in path.parts)


def bound(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every variable and parameter that is given a value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def test_no_variable_has_a_name_that_says_nothing() -> None:
    sources = files(".py")
    assert len(sources) > 250
    empty = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources
        for line, name in bound(ast.parse(path.read_text(encoding="utf-8")))
        if name in EMPTY_NAMES
    ]
    assert empty == [], "call these by what they are"


def test_an_image_has_no_second_word() -> None:
    texts = files(".py", ".md", ".js", ".css", ".html", ".toml")
    assert len(texts) > 280
    with_it = {
        path.relative_to(ROOT).as_posix()
        for path in (*texts, ROOT / "README.md")
        if OTHER_WORD.search(path.read_text(encoding="utf-8")) or OTHER_WORD.search(path.name)
    }
    assert "sdlora/commands/models.py" in with_it, "nothing was searched"
    assert with_it <= KEPT, "say image"
