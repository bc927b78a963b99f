"""Standard output closed, full or cut off, locales without letters: the work is done, nothing is silent."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdlora.commands.streams import tolerant_streams

pytestmark = pytest.mark.usefixtures("processes_end")
Make = Callable[..., Path]
posix_only = pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


def shell(line: str, folder: Path, **more: str) -> tuple[int, str]:
    """Run a line in which ``sdlora`` is this project; return the exit code and standard error."""
    sdlora = f"{sys.executable} -m sdlora"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("sdlora", sdlora)],
        cwd=folder,
        env={**os.environ, **more},
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stderr.decode("utf-8", "replace")


@pytest.mark.long
@posix_only
def test_a_command_ends_its_work_whoever_reads_its_answer(image_folder: Make, tmp_path: Path) -> None:
    folder = image_folder(count=2)
    ways = {"| head -c 0": "", ">&-": "", ">/dev/full": "the disk is full", "2>&-": "", ">&- 2>&-": ""}
    if not Path("/dev/full").exists():
        del ways[">/dev/full"]
    for number, (way, words) in enumerate(ways.items()):
        page = tmp_path / f"{number}.html"
        code, errors = shell(f"sdlora check {folder} --html {page} {way}", tmp_path)
        assert (way, code) == (way, 2 if words else 0), errors
        assert "Traceback" not in errors
        assert (way, words in errors, len(errors.splitlines())) == (way, True, 1 if words else 0)
        assert page.read_text(encoding="utf-8").rstrip().endswith("</html>"), way


@posix_only
def test_an_ascii_locale_can_name_and_show_everything(image_folder: Make, tmp_path: Path) -> None:
    folder = image_folder(count=2).rename(tmp_path / "bl\u00fcten \U0001f33c")
    (folder / "na\u00efve rose.png").write_bytes(next(folder.glob("*.png")).read_bytes())
    (folder / "na\u00efve rose.txt").write_text("r\u00f6slein \u6f22\u5b57", encoding="utf-8")
    report = tmp_path / "answer.json"
    code, errors = shell(f"sdlora check 'bl\u00fcten \U0001f33c' --json >{report}", tmp_path, **ASCII)
    assert "Traceback" not in errors
    *lines, last = report.read_bytes().decode("ascii").splitlines()
    assert code in (0, 1), errors
    assert "na\u00efve rose.png" in json.dumps(json.loads(last), ensure_ascii=False)
    assert any("na\\xefve" in line for line in lines)  # escapes, not question marks
    if Path("/dev/full").exists():
        assert shell("sdlora --help >/dev/full", tmp_path)[0] == 2
    code, errors = shell("sdlora check 'gr\u00fcn'", tmp_path, **ASCII)
    assert (code, "gr\\xfcn: no such folder" in errors, len(errors.splitlines())) == (2, True, 1)


@posix_only
def test_a_word_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    code, errors = shell("sdlora check $'caf\\xe9'", tmp_path)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "word 2 of the command line" in errors


def test_streams_are_given_back_and_letters_become_escapes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = (tmp_path / "out").open("w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", file)
    with tolerant_streams() as lost:
        print("gr\u00fcn")
        assert sys.stdout is not file
    assert (sys.stdout, lost.failure) == (file, None)
    file.close()
    assert (tmp_path / "out").read_bytes().strip() == b"gr\\xfcn"


def test_an_output_that_fails_is_told_once_and_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Full(io.RawIOBase):
        calls = 0

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.calls += 1
            raise OSError(28, "No space left on device")

    raw = Full()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    with tolerant_streams() as lost:
        for _ in range(3):
            print("x" * 100_000, flush=True)
    assert (raw.calls, lost.failure is not None and lost.failure.errno) == (1, 28)
