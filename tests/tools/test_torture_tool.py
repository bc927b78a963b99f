"""A small part of ``python -m tools.torture``: whole runs and the queue, disturbed; all of it if slow."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("gradio", reason="the web UI is not installed: pip install -e '.[ui]'")
if not sys.platform.startswith("linux") or shutil.which("cc") is None:
    pytest.skip(
        "writes are made to fail with a preloaded library: Linux and a C compiler", allow_module_level=True
    )

from sdlora.run_folder import RunFolder
from tools.torture.__main__ import SCENES
from tools.torture.changes import DISTURBANCES, disturbed
from tools.torture.play import Play
from tools.torture.warm import Warm

pytestmark = pytest.mark.slow  # ``.ci/run`` runs a part of them

FEW = {"a": 1}


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    folder = tmp_path_factory.mktemp("torture")
    with Warm(folder / "streams") as warm:
        yield Play(folder, warm)


@pytest.mark.parametrize("letter", FEW)
def test_what_is_disturbed_holds(play: Play, letter: str) -> None:
    _, _, scene = SCENES[letter]
    tally = scene(play, FEW[letter], 1, print)
    assert (tally.failures, tally.tried) == ([], FEW[letter])


def test_a_run_goes_on_though_strange_files_lie_in_it(play: Play) -> None:
    assert disturbed(play, "strange files lie in the run", seed=1) == []


@pytest.mark.parametrize("letter", SCENES)
def test_what_is_disturbed_holds_many_times(play: Play, letter: str) -> None:
    _, _, scene = SCENES[letter]
    trials = len(DISTURBANCES) if letter == "c" else 20
    tally = scene(play, trials, 100, print)
    assert (tally.failures, tally.tried) == ([], trials)


def test_a_run_that_ends_otherwise_is_told(play: Play) -> None:
    run = play.place("other").run
    shutil.copytree(play.folder / "undisturbed" / "run", run)
    assert play.differing(run) == []
    (adapter,) = run.glob("*.safetensors")
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x7f")
    file = RunFolder(run).events_file
    file.write_text(file.read_text(encoding="utf-8").replace('"loss": 0.', '"loss": 1.'), encoding="utf-8")
    RunFolder(run).list_previews()[0].file.unlink()
    assert play.differing(run) == [f"{what} differ" for what in play.reference]
