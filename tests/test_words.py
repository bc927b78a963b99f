"""One word for each thing, in plain English: empty names, second words and odd phrases do not come back."""

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
ODD_PHRASES = re.compile(
    "|".join(
        (
            r"how-manieth|in whose midst|of the same making|of wh(?:ich|om) (?:it|one|he) is",
            r"\b(?:has|have|had) not (?:enough|got|an?|any|one|the)\b|\bbe had\b|\bis not had\b",
            r"\b(?:go|goes|going|gone|went) on (?:from|with)\b|\bbegins? anew\b|\b(?:as|how) it stands\b",
            r"\bmeans no (?:layer|module|adapted)|\b(?:said|told|says) of (?:it|them|one)\b",
            r"\bone (?:JSON object|file|folder|group|image|line|part|row|column|step) an? [a-z]+\b",
            r"\bthan one might\b|\bhand(?:ed|s)? in\b|\btells so\b|\bout of nothing\b|\bknows? of\b",
        )
    ),
    re.IGNORECASE,
)
"""Phrases that a reader stumbles over; say what happens in the usual words."""
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


def private_names() -> set[str]:
    """Return the names that begin with one underscore and that the program itself defines."""
    names: set[str] = set()
    for path in files(".py"):
        if path.relative_to(ROOT).parts[0] in ("sdlora", "ui", "tools", "benchmarks"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in names if re.match("_[^_]", name)}


def uses_of_private_names(tree: ast.Module, private: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every private name of the program that a test asks for, in a text, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in private)
        elif isinstance(node, ast.Attribute) and node.attr in private:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "delattr"):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    last = argument.value.rpartition(".")[2]
                    if last in private:
                        yield node.lineno, last


def test_no_test_is_over_a_private_name() -> None:
    private = private_names()
    assert len(private) > 500
    asked = ast.parse("from sdlora.a import _fill\nb._fill()\nself._fill\npatch.setattr('sdlora.a._fill', 1)")
    assert [line for line, _ in uses_of_private_names(asked, {"_fill"})] == [1, 4, 2]
    over = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, name in uses_of_private_names(ast.parse(path.read_text(encoding="utf-8")), private)
    ]
    assert over == [], "test what a module promises, or make the name public"


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


def test_texts_are_in_usual_words() -> None:
    assert ODD_PHRASES.search("it is gone on with") and ODD_PHRASES.search("one line a file")
    assert not ODD_PHRASES.search("one image at a time goes on its way")
    read = [
        path for path in files(".py", ".js", ".html") if path.relative_to(ROOT).parts[0] in ("sdlora", "ui")
    ]
    read += [*files(".md"), *sorted((ROOT / "sdlora" / "assets" / "report").iterdir()), ROOT / "README.md"]
    assert len(read) > 250
    odd = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in read
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in ODD_PHRASES.finditer(line)
    ]
    assert odd == [], "use plain words"
