"""What forms hold outlives the browser; a damaged file is not an obstacle."""

from __future__ import annotations

import os
from pathlib import Path

from sdlora_ui.drafts import MOST_TABS, Drafts


def test_what_was_kept_comes_back_to_a_later_server(tmp_path: Path) -> None:
    held = {"output.name": "mein Stil", "training.steps": "77", "adapter.rank": None}
    Drafts(tmp_path / "forms").keep("train", held)
    assert Drafts(tmp_path / "forms").kept("train") == held
    assert Drafts(tmp_path / "forms").kept("generate") == {}


def test_a_damaged_file_is_an_empty_form(tmp_path: Path) -> None:
    for text in ("{", "[1]", ""):
        (tmp_path / "train.json").write_text(text)
        assert Drafts(tmp_path).kept("train") == {}


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "forms").write_text("a file where the folder should be")
    Drafts(tmp_path / "forms").keep("train", {"a": 1})
    assert Drafts(tmp_path / "forms").kept("train") == {}


def test_each_tab_has_its_own_and_a_new_one_begins_with_the_newest(tmp_path: Path) -> None:
    drafts, first, second = Drafts(tmp_path), "a" * 16, "b" * 16
    drafts.keep("train", {"output.name": "first"}, first)
    drafts.keep("train", {"output.name": "second"}, second)
    assert drafts.kept("train", first) == {"output.name": "first"}
    assert drafts.kept("train", second) == drafts.kept("train", "c" * 16) == {"output.name": "second"}


def test_a_tabs_word_names_no_file_elsewhere(tmp_path: Path) -> None:
    drafts = Drafts(tmp_path / "forms")
    drafts.keep("train", {"a": 1}, "../../outside")
    assert [file.name for file in (tmp_path / "forms").iterdir()] == ["train.json"]
    (tmp_path / "secret.json").write_text('{"b": 2}')
    assert drafts.kept("train", "x/../../secret") == {"a": 1}


def test_old_tabs_are_forgotten(tmp_path: Path) -> None:
    drafts = Drafts(tmp_path)
    for number in range(MOST_TABS + 5):
        drafts.keep("train", {"n": number}, f"{number:016x}")
        os.utime(tmp_path / f"train-{number:016x}.json", (number, number))
    drafts.keep("train", {"n": 0}, "f" * 16)
    assert len(list(tmp_path.glob("train-*.json"))) == MOST_TABS
    assert (tmp_path / f"train-{MOST_TABS + 4:016x}.json").exists()
