"""What documents and docstrings refer to exists: links, paths, modules, names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sdlora", "ui", "tests", "tools", "benchmarks", "docs", "configs", "datasets")
DOCUMENTS = sorted(
    file
    for folder in FOLDERS
    for file in (ROOT / folder).rglob("*.md")
    if file.name != "card.md"  # a text that the build of the mini base writes into another folder
) + sorted(ROOT.glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`")
MODULE = re.compile(r"python -m ((?:tools|benchmarks)(?:\.\w+)+)")
REFERENCE = re.compile(r":(?:mod|func|class|data|meth|attr):`~?([\w.]+)`")
PACKAGES = {"sdlora": "sdlora", "sdlora_ui": "ui"}


def name_of(document: Path) -> str:
    """Return a document's path as a test's name."""
    return document.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_relative_link_of_a_document_leads_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_path_and_command_in_a_document_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert [path for path in PATH.findall(text) if not (ROOT / path).exists()] == []
    modules = {module.replace(".", "/") for module in MODULE.findall(text)}
    assert {m for m in modules if not (ROOT / f"{m}.py").exists() and not (ROOT / m).is_dir()} == set()


def names_in(file: Path) -> set[str]:
    """Return what a module defines: its names, and those of its classes as ``Class.name``."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(f"{prefix}{node.name}")
                if isinstance(node, ast.ClassDef):
                    collect(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign):
                parts = [part for target in node.targets for part in ast.walk(target)]
                names.update(f"{prefix}{part.id}" for part in parts if isinstance(part, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(f"{prefix}{node.target.id}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names.update(alias.asname or alias.name for alias in node.names)
            elif isinstance(node, ast.If | ast.Try):
                collect(node.body, prefix)

    collect(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return names


def is_there(reference: str) -> bool:
    """Tell whether a dotted name of this project is a module, or is defined in one."""
    package, *rest = reference.split(".")
    folder = ROOT / PACKAGES[package]
    for length in range(len(rest), -1, -1):
        place = folder.joinpath(*rest[:length])
        file = (
            place.with_suffix(".py")
            if length and place.with_suffix(".py").is_file()
            else place / "__init__.py"
        )
        if file.is_file():
            return length == len(rest) or ".".join(rest[length:]) in names_in(file)
    return False


def references() -> Iterator[tuple[str, str]]:
    for folder in ("sdlora", "ui", "tools", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            defined = {name.rpartition(".")[2] for name in names_in(file)}
            for reference in REFERENCE.findall(text):
                if reference.partition(".")[0] in PACKAGES:
                    if not is_there(reference):
                        yield name_of(file), reference
                elif "." not in reference and reference not in defined:
                    yield name_of(file), reference


def test_every_cross_reference_in_a_docstring_names_something() -> None:
    assert list(references()) == []


def test_the_table_of_packages_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w/]+)/` \|.*\|(.*)\|$", text, re.MULTILINE))
    assert len(rows) > 12
    for package, cell in rows.items():
        folder = ROOT / "sdlora" / package
        modules = {file.stem for file in folder.glob("*.py")} - {"__init__"}
        inner = {file.parent for file in folder.glob("*/__init__.py")}
        below = {
            name for path in inner for name in (path.name, f"{path.name}/", *(m.stem for m in path.iterdir()))
        }
        named = set(re.findall(r"`([a-z_0-9/]+)`", cell))
        assert (package, modules - named, named - modules - below) == (package, set(), set())
