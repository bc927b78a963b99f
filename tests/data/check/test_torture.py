"""A folder of more than 40 bad files: what is found, what training says, what a repaired copy holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torture import CASES, Bad, make_torture_folder

from sdlora.commands.cli import main
from sdlora.data.check.doctor import Report, examine
from sdlora.data.check.repair import Change, repair
from sdlora.data.reading.folder import scan
from sdlora.errors import DatasetError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_torture_folder(tmp_path_factory.mktemp("torture") / "images")


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return examine(folder, resolution=48, multiple=16)


@pytest.fixture(scope="module")
def mended(folder: Path) -> Iterator[tuple[Path, list[Change]]]:
    before = contents(folder)
    output = folder.parent / "mended"
    changes = repair(folder, output)
    assert contents(folder) == before  # a copy is all that is ever written
    yield output, changes


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_there_are_at_least_forty_bad_files() -> None:
    assert len({case.name for case in CASES if case.expected}) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_bad_file_is_found_for_what_it_is(case: Bad, report: Report) -> None:
    findings = [finding for finding in report.findings if finding.where == case.name]
    assert tuple((finding.severity, finding.kind) for finding in findings) == case.expected
    assert all(finding.what and finding.fix for finding in findings)


def test_nothing_else_is_found_but_the_pair_of_one_name(report: Report) -> None:
    known = {case.name for case in CASES}
    assert [(f.kind, f.where) for f in report.findings if f.where not in known] == [
        ("name clash", "twin.jpg and twin.png"),
        ("orphan caption", "gone.txt"),
    ]


def test_training_refuses_the_folder_and_names_the_files(folder: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        scan(folder)
    assert "`sdlora check` lists all" in str(caught.value)
    assert "bomb.png" in str(caught.value)


def test_the_command_says_so_without_a_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder.parent / "page.html"
    code = main(["check", str(folder), "--resolution", "48", "--multiple", "16", "--html", str(page)])
    output = capsys.readouterr()
    assert code == 1
    assert "Traceback" not in output.out + output.err
    assert output.out.count("Not ready: correct the errors first.") == 1
    assert "lost-tail.jpg" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mended_copy_holds_what_can_be_saved(case: Bad, mended: tuple[Path, list[Change]]) -> None:
    output, changes = mended
    for name in case.mended:
        assert (output / name).is_file()
    if case.name not in case.mended:
        assert not (output / case.name).exists()
        assert [change.name for change in changes].count(case.name) == 1  # and it is told


def test_a_mended_copy_can_be_trained_on(mended: tuple[Path, list[Change]]) -> None:
    output, _ = mended
    report = examine(output, resolution=48, multiple=16, trigger_word="thing")
    assert [(f.kind, f.where) for f in report.findings if f.severity == "error"] == []
    assert len(scan(output, trigger_word="thing").items) == report.num_images >= 20
