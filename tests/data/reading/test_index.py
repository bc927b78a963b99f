"""A second run starts from the index, and never trusts a file that changed."""

from __future__ import annotations

import math
import os
import sqlite3
import sys
import warnings
from pathlib import Path

import pytest
from drawings import drawing, folder_of, put

from sdlora.data.reading import measure
from sdlora.data.reading.index import REST_SECONDS, ImageIndex, forget_missing
from sdlora.data.reading.listing import FoundFile
from sdlora.data.reading.measure import Measured, measure_all
from sdlora.data.reading.problems import Problem


def files_in(folder: Path) -> list[FoundFile]:
    return [FoundFile(path, path.name) for path in sorted(folder.glob("*.*"))]


def let_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take files written just now for files that have been lying there."""
    monkeypatch.setattr("sdlora.data.reading.index.REST_SECONDS", -math.inf)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read in full, as they are read."""
    names: list[str] = []
    original = measure.read_file

    def noting(path: Path, name: str, limit: int | None = None) -> bytes:
        names.append(name)
        return original(path, name, limit)

    monkeypatch.setattr(measure, "read_file", noting)
    return names


def test_a_second_run_reads_nothing_and_finds_the_same(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_rest(monkeypatch)
    files = files_in(folder_of(tmp_path / "images", 5, captions=False))
    first = measure_all(files, index_file=tmp_path / "index")
    assert len(read) == 5
    again = measure_all(files, index_file=tmp_path / "index")
    assert len(read) == 5
    assert again == first
    assert all(isinstance(measured, Measured) for measured in again)


def test_files_written_a_moment_ago_are_not_remembered(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sdlora.data.reading.index.REST_SECONDS", 86_400.0
    )  # a moment, however slow this test is
    files = files_in(folder_of(tmp_path / "images", 2, captions=False))
    for _ in range(2):
        measure_all(files, index_file=tmp_path / "index")
    assert len(read) == 4


@pytest.mark.parametrize("last_touch", ["modified", "changed"])
@pytest.mark.parametrize(("rested", "remembered"), [(REST_SECONDS - 0.01, None), (REST_SECONDS, "facts")])
def test_a_file_must_have_rested_as_long_as_file_systems_may_be_imprecise(
    tmp_path: Path, last_touch: str, rested: float, remembered: str | None
) -> None:
    file = put(tmp_path / "p.png", drawing(1))
    status = _touched(file.stat(), **{"modified": 1000, "changed": 1000, last_touch: 2000})
    with ImageIndex(tmp_path / "index", "1", clock=lambda: 2000 + rested) as index:
        index.put(file, status, "facts")
    with ImageIndex(tmp_path / "index", "1") as index:
        assert index.get(file, status) == remembered


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no time of change")
def test_another_content_of_the_same_size_and_time_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_rest(monkeypatch)
    file = put(tmp_path / "p.bmp", _bmp(1))
    status = file.stat()
    before = measure_all(files_in(tmp_path), index_file=tmp_path / "i" / "index")
    while file.stat().st_ctime_ns == status.st_ctime_ns:  # until the file system's clock has ticked
        file.write_bytes(_bmp(2))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = measure_all(files_in(tmp_path), index_file=tmp_path / "i" / "index")
    assert before != after
    assert after == measure_all(files_in(tmp_path))


def test_an_image_that_breaks_is_noticed_and_what_is_broken_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_rest(monkeypatch)
    file = put(tmp_path / "p.png", drawing(1))
    whole, index = file.read_bytes(), tmp_path / "i" / "index"
    (good,) = measure_all(files_in(tmp_path), index_file=index)
    file.write_bytes(whole[:-60])
    for _ in range(2):
        (broken,) = measure_all(files_in(tmp_path), index_file=index)
        assert isinstance(broken, Problem)
    file.write_bytes(whole)
    assert measure_all(files_in(tmp_path), index_file=index) == [good]


def test_facts_of_another_version_are_not_used(tmp_path: Path) -> None:
    file = put(tmp_path / "p.png", drawing(1))
    os.utime(file, (1, 1))
    status = file.stat()
    with ImageIndex(tmp_path / "index", "1") as index:
        index.put(file, _touched(status, 1000, 1000), "facts")
    for version, facts in (("1", "facts"), ("2", None)):
        with ImageIndex(tmp_path / "index", version) as index:
            assert index.get(file, _touched(status, 1000, 1000)) == facts


def test_a_damaged_index_is_made_anew(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_rest(monkeypatch)
    files = files_in(folder_of(tmp_path / "images", 2, captions=False))
    index = put(tmp_path / "index", b"this is not a database, whatever it was before" * 40)
    wanted = measure_all(files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure_all(files, index_file=index) == wanted
        del read[:]
        assert measure_all(files, index_file=index) == wanted
    assert read == []


def test_an_index_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    files = files_in(folder_of(tmp_path / "images", 2, captions=False))
    blocked = put(tmp_path / "file", b"") / "index"
    with pytest.warns(UserWarning, match="index of images is not used"):
        assert measure_all(files, index_file=blocked) == measure_all(files)


def test_an_index_that_another_process_holds_is_waited_for_or_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_rest(monkeypatch)
    monkeypatch.setattr("sdlora.data.reading.index.WAIT_SECONDS", 0.05)
    files = files_in(folder_of(tmp_path / "images", 2, captions=False))
    index = tmp_path / "index"
    measure_all(files[:1], index_file=index)
    holder = sqlite3.connect(index, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.warns(UserWarning, match="index of images is not used"):
        assert measure_all(files, index_file=index) == measure_all(files)
    holder.execute("ROLLBACK")
    holder.close()
    assert index.is_file()


def test_entries_of_missing_files_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_rest(monkeypatch)
    folder, index = folder_of(tmp_path / "images", 3, captions=False), tmp_path / "index"
    measure_all(files_in(folder), index_file=index)
    (folder / "p01.png").unlink()
    assert forget_missing(index) == 1
    assert forget_missing(index) == 0
    assert forget_missing(tmp_path / "nowhere") == 0


def _bmp(seed: int) -> bytes:
    from drawings import encoded

    return encoded(drawing(seed), "BMP")


def _touched(status: os.stat_result, modified: int, changed: int) -> os.stat_result:
    """Return the status with other times of modification and change, in seconds since 1970."""
    fields = {"st_mtime": float(modified), "st_ctime": float(changed)}
    values = (*status[:8], modified, changed)
    return os.stat_result(values, fields | {f"{k}_ns": int(v) * 10**9 for k, v in fields.items()})
