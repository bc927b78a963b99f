"""``sdlora caption`` and ``sdlora tags``: shown first, written when agreed, one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sdlora.commands.cli import main


@pytest.fixture
def tagger(tmp_path: Path) -> Path:
    from data.captioning.tiny_captioners import write_tagger

    return write_tagger(tmp_path / "wd")


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, object], str]:
    """Return the exit code, the JSON and what was output of one command."""
    code = main([*map(str, words), "--json"])
    output = capsys.readouterr()
    return code, json.loads(output.out.splitlines()[-1]), output.out + output.err


def test_a_folder_is_shown_then_captioned_then_put_back(
    image_folder: Callable[..., Path], tagger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(10, caption=False)
    (folder / "thing00.txt").write_text("mine")
    asked = ["caption", folder, "--model", tagger, "--device", "cpu", "--threshold", "0", "--trigger", "sks"]
    code, shown, output = answer(capsys, *asked)
    assert code == 0 and len(shown["preview"]) == 8 and shown["written"] == 0  # type: ignore[arg-type]
    assert "nothing was written; --yes" in output and len(list(folder.glob("*.txt"))) == 1
    code, done, output = answer(capsys, *asked, "--yes")
    assert code == 0 and (done["written"], done["kept"], done["failed"]) == (9, 1, {})
    assert "9/9" in output and "left" in output
    texts = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert texts.pop("thing00.txt") == "mine"
    assert len(texts) == 9 and all(text.startswith("sks, ") for text in texts.values())
    code, back, _ = answer(capsys, "caption", folder, "--undo")
    assert code == 0 and len(back["restored"]) == 9  # type: ignore[arg-type]
    assert [file.name for file in folder.glob("*.txt")] == ["thing00.txt"]


def test_tags_are_listed_and_changed_after_they_were_shown(
    image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(3)
    code, listed, _ = answer(capsys, "tags", folder)
    assert code == 0 and listed["tags"] == {f"an icon of a cat {number}": 1 for number in range(3)}
    edit = ["tags", folder, "--replace", "an icon of a cat 1", "a cat, a dog", "--add-first", "x, y"]
    code, shown, output = answer(capsys, *edit)
    assert code == 0 and shown["written"] == 0 and "+ x, y, a cat, a dog" in output
    assert (folder / "thing01.txt").read_text() == "an icon of a cat 1"
    code, done, _ = answer(capsys, *edit, "--yes")
    assert code == 0 and done["written"] == 3
    assert (folder / "thing01.txt").read_text() == "x, y, a cat, a dog\n"
    assert answer(capsys, "tags", folder, "--undo")[0] == 0
    assert (folder / "thing01.txt").read_text() == "an icon of a cat 1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption", "FOLDER"], "--model"),
        (["caption", "FOLDER", "--model", "nothing-here"], "no such captioner"),
        (["caption", "FOLDER", "--model", "TAGGER", "--threshold", "much"], "threshold `much`"),
        (["caption", "FOLDER", "--model", "TAGGER", "--order", "mood"], "--order mood: choose one of"),
        (["caption", "FOLDER", "--model", "TAGGER", "--keep-first", "1"], "belongs to --overwrite"),
        (["caption", "FOLDER", "--model", "TAGGER", "--batch-size", "0"], "batch size 0"),
        (["caption", "MISSING", "--model", "TAGGER"], "no such folder"),
        (["caption", "FOLDER", "--undo"], "nothing to undo"),
        (["tags", "FOLDER", "--implications", "x.csv"], "belongs to --prune"),
        (["tags", "FOLDER", "--prune", "--implications", "x.csv"], "cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(
    image_folder: Callable[..., Path],
    tagger: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    places = {"FOLDER": str(image_folder(1)), "TAGGER": str(tagger), "MISSING": str(tagger / "missing")}
    assert main([places.get(word, word) for word in words]) == 2
    output = capsys.readouterr().err.strip()
    assert message in output and "\n" not in output
