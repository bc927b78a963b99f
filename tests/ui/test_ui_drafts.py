"""What forms hold outlives the browser; a damaged file is not an obstacle."""

from __future__ import annotations

from pathlib import Path

from sdlora_ui.drafts import Drafts


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
