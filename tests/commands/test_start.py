"""start.sh and start.bat: an environment with the right torch is made once, then the page is served."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from patience import wait_for
from processes import end_marked, new_mark, with_mark

from sdlora.commands import start
from sdlora.machine import Card, MachineFacts, remedies, torch_words

ROOT = Path(__file__).resolve().parents[2]
LINUX = MachineFacts("Linux", "/env/bin/python", "none")
RTX_5090 = Card("NVIDIA GeForce RTX 5090", (12, 0), 32 * 2**30)
GTX_1060 = Card("NVIDIA GeForce GTX 1060", (6, 1), 6 * 2**30)


@pytest.mark.parametrize("driver", ["525.60", "560.35", "572.16", "580.95"])
@pytest.mark.parametrize("card", [RTX_5090, GTX_1060, Card("NVIDIA A100", (8, 0))])
@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_the_same_torch_as_the_doctor_recommends(driver: str, card: Card, system: str) -> None:
    facts = dataclasses.replace(LINUX, system=system, driver=driver, present=(card,))
    advised = [line for line in remedies(facts) if " -m pip install " in line]
    words = torch_words(facts)
    if advised:  # the doctor asks for a newer driver where there is none for the old one
        assert advised[0].replace('"', "").endswith(f"-m pip install {' '.join(words)}")
    else:
        assert words[2].endswith("/whl/cpu")


def test_without_a_card_it_is_the_small_torch_and_macs_have_one_only() -> None:
    assert torch_words(LINUX)[2] == "https://download.pytorch.org/whl/cpu"
    assert torch_words(dataclasses.replace(LINUX, system="Darwin")) == ["torch"]


class Recorder:
    """Runs nothing; remembers what it was to run."""

    def __init__(self, fails: str = "") -> None:
        self.lines: list[str] = []
        self.fails = fails

    def __call__(self, words: Sequence[str]) -> int:
        self.lines.append(" ".join(words).replace(sys.executable, "python"))
        return int(bool(self.fails) and self.fails in self.lines[-1])


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(start, "look_without_torch", lambda: LINUX)
    monkeypatch.delenv(start.INDEX_VARIABLE, raising=False)
    return tmp_path


def test_it_installs_once_and_again_after_an_update(checkout: Path) -> None:
    first, second, third = Recorder(), Recorder(), Recorder()
    assert start.main(["--port", "1"], root=checkout, run=first) == 0
    assert [line.split(" -c ")[0].rpartition(" ")[2] for line in first.lines[:2]] == ["install", "install"]
    assert first.lines[0].endswith("/whl/cpu --extra-index-url https://pypi.org/simple")
    assert first.lines[1].endswith(f"-e {checkout}[ui]")
    assert first.lines[2:] == ["python -m sdlora ui --port 1"]
    assert start.main([], root=checkout, run=second) == 0
    assert second.lines == ["python -m sdlora ui"]
    with (checkout / "constraints.txt").open("a", encoding="utf-8") as text:
        text.write("\n# newer\n")
    assert start.main(["--setup"], root=checkout, run=third) == 0
    assert len(third.lines) == 2 and not any("uninstall" in line for line in third.lines)


def test_another_card_gets_another_torch(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start.main(["--setup"], root=checkout, run=Recorder()) == 0
    monkeypatch.setattr(
        start, "look_without_torch", lambda: dataclasses.replace(LINUX, driver="580.1", present=(RTX_5090,))
    )
    later = Recorder()
    assert start.main(["--setup"], root=checkout, run=later) == 0
    assert later.lines[0].endswith("uninstall -y torch") and "/whl/cu130" in later.lines[1]


def test_a_failed_installation_is_tried_again(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start.main([], root=checkout, run=Recorder(fails="[ui]")) == 2
    assert "sdlora could not be installed" in capsys.readouterr().err
    again = Recorder()
    assert start.main([], root=checkout, run=again) == 0 and len(again.lines) == 3


def test_an_index_of_ones_own(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(start.INDEX_VARIABLE, "https://mirror.example/whl")
    mirror, usual = Recorder(), Recorder()
    start.main(["--setup"], root=checkout, run=mirror)
    assert mirror.lines[0].endswith("torch --index-url https://mirror.example/whl")
    monkeypatch.setenv(start.INDEX_VARIABLE, "")
    start.main(["--setup"], root=checkout, run=usual)
    assert usual.lines[1].endswith("constraints.txt torch")


def test_an_update_fetches_first_and_then_runs_what_was_fetched(checkout: Path) -> None:
    assert start.main(["--update"], root=checkout, run=Recorder()) == 2  # no checkout
    (checkout / ".git").mkdir()
    updating = Recorder()
    assert start.main(["--update", "--listen"], root=checkout, run=updating) == 0
    assert updating.lines == ["git pull --ff-only", "python -m sdlora.commands.start --listen"]
    assert start.main(["--update"], root=checkout, run=Recorder(fails="git")) == 2


def test_the_batch_file_is_one_that_windows_reads() -> None:
    """There is no Windows here: what usually goes wrong in a batch file is looked for."""
    raw = (ROOT / "start.bat").read_bytes()
    assert raw.count(b"\n") == raw.count(b"\r\n") > 10  # `goto` misses labels otherwise
    text = raw.decode("ascii").replace("\r", "")
    lines = text.splitlines()
    labels = [line[1:] for line in lines if line.startswith(":")]
    assert len(labels) == len(set(labels))
    assert set(re.findall(r"goto (\w+)", text)) <= set(labels)
    depth = 0
    for line in lines:
        assert line.count('"') % 2 == 0, line
        bare = re.sub(r'"[^"]*"', "", line)
        if depth:  # %NAME% in a block has the value from before the block
            assert not re.search(r"(?<!%)%\w+%", line), line
        depth += 0 if bare.startswith("rem") else bare.count("(") - bare.count(")")
        assert depth >= 0, line
    assert depth == 0
    before_first_label = text.partition("\n:")[0]
    assert "-m venv .venv" in before_first_label
    assert lines[lines.index(":none") - 1].startswith("exit /b")  # nothing runs into the error's text


def test_both_start_files_do_the_same() -> None:
    shell, batch = ((ROOT / name).read_text(encoding="ascii") for name in ("start.sh", "start.bat"))
    for common in ("-m sdlora.commands.start", "-m venv .venv", "(3, 11) <= sys.version_info[:2] <= (3, 13)"):
        assert common in shell and common in batch
    assert os.name == "nt" or os.access(ROOT / "start.sh", os.X_OK)


def write_stub(folder: Path, requirement: str, version: str) -> None:
    """Write an empty package into a package index that is a folder."""
    name = re.split(r"[\[<>=!~; ]", requirement)[0].replace("-", "_")
    inside = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{inside}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{inside}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{inside}/RECORD", "")


def write_installed(folder: Path, name: str) -> None:
    """Write a package that is installed here into the index, as it is."""
    package = importlib.metadata.distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{package.version}-py3-none-any.whl", "w") as wheel:
        for file in package.files or ():
            if (
                ".." not in file.parts
                and file.suffix != ".pyc"
                and file.name not in ("INSTALLER", "REQUESTED")
            ):
                wheel.write(str(file.locate()), str(file))


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix" or not (ROOT / ".git").exists(), reason="start.sh, in a checkout")
def test_start_sh_makes_an_environment_from_a_local_index_and_serves_the_page(tmp_path: Path) -> None:
    index, home = tmp_path / "index", tmp_path / "a folder"
    index.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    )
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["ui"]):
        name = re.split(r"[\[<>=!~; ]", requirement)[0]
        write_stub(index, requirement, pinned[name])
    write_installed(index, "setuptools")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and not name.startswith(("tests/", "docs/", "benchmarks/", "tools/")):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, home / name)
    mark = new_mark()
    environment = with_mark(mark) | {
        "PYTHON": sys.executable,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        start.INDEX_VARIABLE: "",
    }
    try:
        setup = subprocess.run(
            ["sh", str(home / "start.sh"), "--setup"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert setup.returncode == 0, setup.stdout + setup.stderr
        assert (home / ".venv" / start.MARKER).is_file() and "installing sdlora" in setup.stdout
        assert list((home / ".venv").glob("lib/python3*/site-packages/torch-*.dist-info"))
        # the packages themselves are those that run this test: the index holds empty ones
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        line = ["sh", str(home / "start.sh"), "--no-browser", "--port", str(port)]
        served = environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(line, env=served, stdout=log, stderr=log)

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                    return b"sdlora" in page.read()
            except OSError:
                return False

        wait_for(answers, "the page")
        assert "installing" not in (tmp_path / "log").read_text(encoding="utf-8")
    finally:
        end_marked(mark)
