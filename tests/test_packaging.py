"""What a wheel and a source archive hold, and that nothing installed speaks of files it does not have."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdlora.commands.cli import COMMANDS
from sdlora.commands.completion import SHELLS
from sdlora.config.presets import presets
from sdlora.config.schema import fields
from sdlora.demonstration.data import find_data
from sdlora.files import ASSETS, shipped_folder

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_IN_A_WHEEL = re.compile(
    r"\b(?:docs|tests|tools|benchmarks|configs|datasets)/|constraints\.txt|README|-e '?\.|\b[\w-]+\.md\b"
)
THEIR_OWN = {
    "sdlora/demonstration/data.py",  # the README of the sample images, which is in the wheel
    "sdlora/commands/start.py",  # works in a checkout only
    "sdlora/exporting/publish.py",  # the model card's name on the hub
}


def folder_of(package: str) -> Path:
    first, *rest = package.split(".")
    return ROOT.joinpath(SETUPTOOLS["package-dir"].get(first, first), *rest)


def wheel_files() -> set[str]:
    """Return what the tables of pyproject.toml put into a wheel, by its path there."""
    named: set[str] = set()
    for package in SETUPTOOLS["packages"]:
        folder, place = folder_of(package), package.replace(".", "/")
        patterns = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
        named |= {f"{place}/{file.relative_to(folder).as_posix()}" for file in files}
    return {name for name in named if "__pycache__" not in name}


def tracked(*folders: str) -> set[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, check=True)
    return {ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()}


def in_wheel(file: Path) -> str:
    first, *rest = file.relative_to(ROOT).parts
    names = {place: package for package, place in SETUPTOOLS["package-dir"].items()}
    return "/".join([names[first], *rest])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_everything_below_the_packages_is_in_the_wheel() -> None:
    files = {in_wheel(file) for file in tracked("sdlora", "ui", "datasets", "configs")} - {
        "sdlora_ui/README.md"
    }
    assert len(files) > 300
    assert files - wheel_files() == set()


def test_what_the_program_opens_by_its_own_place_is_in_the_wheel() -> None:
    folders = [ASSETS, find_data(), ROOT / "ui" / "web", *[shipped_folder("configs")]]
    opened = {file for folder in folders if folder for file in folder.resolve().rglob("*") if file.is_file()}
    opened |= {preset.file.resolve() for preset in presets() if not preset.users}
    assert len(opened) > 100
    assert {in_wheel(file) for file in opened if "__pycache__" not in file.parts} - wheel_files() == set()


@pytest.mark.long
def test_a_built_wheel_and_source_archive_are_whole(tmp_path: Path) -> None:
    code = (
        "from setuptools import build_meta; import sys; "
        "print(getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2]))"
    )

    def built(what: str, where: Path) -> Path:
        line = [sys.executable, "-c", code, what, str(tmp_path)]
        answer = subprocess.run(line, cwd=where, capture_output=True, text=True, timeout=300)
        assert answer.returncode == 0, answer.stderr[-2000:]
        return tmp_path / answer.stdout.splitlines()[-1]

    copy = tmp_path / "copy"
    subprocess.run(["git", "worktree", "list"], cwd=ROOT, check=True, capture_output=True)
    for file in tracked("."):
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    with zipfile.ZipFile(built("wheel", copy)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    assert names == wheel_files() and {"LICENSE", "NOTICE"} <= licences
    source = built("sdist", copy)
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (top,) = (tmp_path / "source").iterdir()
    kept = {str(file.relative_to(ROOT)) for file in tracked(".")}
    missing = {name for name in kept if not (top / name).exists()}
    assert {name for name in missing if not name.startswith(".")} == set()
    with zipfile.ZipFile(built("wheel", top)) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == names


def texts_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every text constant of a module that is no docstring."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    remarks = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in remarks:
            yield node.lineno, node.value


def test_no_text_names_what_an_installed_program_lacks() -> None:
    named = [
        (file.relative_to(ROOT).as_posix(), line, text)
        for folder in (ROOT / "sdlora", ROOT / "ui")
        for file in sorted(folder.rglob("*.py"))
        if file.relative_to(ROOT).as_posix() not in THEIR_OWN
        for line, text in texts_of(file)
        if NOT_IN_A_WHEEL.search(text)
    ]
    assert named == []


def test_no_help_names_what_an_installed_program_lacks() -> None:
    helps = {key: field.description or "" for key, field in fields()}
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser()
        command.declare(parser)
        helps[name] = parser.format_help()
    assert {key: text for key, text in helps.items() if NOT_IN_A_WHEEL.search(text)} == {}


def test_the_page_names_nothing_that_an_installed_program_lacks() -> None:
    files = [*(ROOT / "ui" / "web").glob("*.js"), *(ASSETS / "report").iterdir()]
    assert len(files) > 5
    named = {file.name for file in files if NOT_IN_A_WHEEL.search(file.read_text(encoding="utf-8"))}
    assert named == set()


def test_the_container_is_made_of_files_that_are_there_and_let_in() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    copied = {name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]}
    assert copied == set(allowed) and all((ROOT / name).exists() for name in copied)
    needed = {folder_of(package).relative_to(ROOT).parts[0] for package in SETUPTOOLS["packages"]}
    assert needed <= copied
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    assert re.search(r"^FROM python:3\.1[123]-slim$", text, re.MULTILINE)


def test_every_extra_stands_in_the_guide_with_its_packages() -> None:
    guide = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w[\w-]*)` \| ([^|]+) \|", guide, re.MULTILINE)
    told = {extra: set(re.findall(r"`([\w-]+)`", packages)) for extra, packages in rows}
    extras = PROJECT["project"]["optional-dependencies"]
    for name in ("test", "build-base", "benchmark"):  # for those who work on sdlora itself
        assert told.pop(name) <= {re.split(r"[<>=]", package)[0] for package in extras[name]}
    for_users = {
        name: wanted for name, wanted in extras.items() if name not in ("test", "build-base", "benchmark")
    }
    assert told == {
        name: {re.split(r"[<>=]", package)[0] for package in wanted} for name, wanted in for_users.items()
    }


def test_the_guide_names_the_completion_of_every_shell() -> None:
    guide = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    assert [line for line in SHELLS.values() if line not in guide] == []
