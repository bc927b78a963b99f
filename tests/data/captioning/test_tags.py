"""Tags of a whole folder: counted, changed, and put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdlora.data.captioning.restore import undo
from sdlora.data.captioning.tag_lists import Tag, TagChoice, read_tags, thresholds_of
from sdlora.data.captioning.tags import TagEdit, TagFolder, read_implications
from sdlora.data.captioning.wording import with_spaces
from sdlora.errors import ConfigError, DatasetError, SdloraError


@pytest.fixture
def tagged(image_folder: Callable[..., Path]) -> Path:
    folder = image_folder(4, caption=False)
    (folder / "thing00.txt").write_text("sks, white shirt, shirt, Red_Sky\n")
    (folder / "thing01.txt").write_text("sks, red sky, tree , cat\nsks, second line")
    (folder / "thing02.txt").write_text("tree,red sky,tree")
    return folder


def test_tags_are_counted_by_captions(tagged: Path) -> None:
    tags = TagFolder(tagged)
    assert tags.num_captions == 3
    assert list(tags.counts.items())[:3] == [("Red_Sky", 3), ("sks", 2), ("tree", 2)]
    assert tags.counts["shirt"] == 1 and len(tags.counts) == 7


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (TagEdit(replace={"RED SKY": "blue sky, cloud"}), "sks, white shirt, shirt, blue sky, cloud"),
        (TagEdit(replace={"shirt": ""}), "sks, white shirt, Red_Sky"),
        (TagEdit(remove=["red_sky"]), "sks, white shirt, shirt"),
        (TagEdit(add=["SKS", "end"], add_first=["start"]), "start, sks, white shirt, shirt, Red_Sky, end"),
        (TagEdit(prune=True), "sks, white shirt, Red_Sky"),
        (TagEdit(prune=True, implications={"sks": ["x"], "x": ["red sky"]}), "sks, white shirt"),
        (TagEdit(prune=True, keep_first=3), "sks, white shirt, shirt, Red_Sky"),
        (TagEdit(sort="name"), "Red_Sky, shirt, sks, white shirt"),
        (TagEdit(sort="frequency", keep_first=2), "sks, white shirt, Red_Sky, shirt"),
        (TagEdit(replace={"shirt": "sks"}, once=True), "sks, white shirt, Red_Sky"),
    ],
)
def test_an_edit_changes_the_tags(tagged: Path, edit: TagEdit, expected: str) -> None:
    changed = {change.image: change.after for change in TagFolder(tagged).changes(edit)}
    assert changed.get("thing00.png", ("sks, white shirt, shirt, Red_Sky",)) == (expected,)


def test_a_change_is_shown_first_and_undone(tagged: Path) -> None:
    before = {file.name: file.read_bytes() for file in tagged.glob("*.txt")}
    tags = TagFolder(tagged)
    changes = tags.changes(TagEdit(once=True, sort="name"))
    assert [change.image for change in changes] == ["thing00.png", "thing01.png", "thing02.png"]
    assert {file.name: file.read_bytes() for file in tagged.glob("*.txt")} == before
    assert tags.apply(changes, "sorted") == []
    assert (tagged / "thing01.txt").read_text() == "cat, red sky, sks, tree\nsecond line, sks\n"
    assert (tagged / "thing02.txt").read_text() == "red sky, tree\n"
    assert undo(tagged).what == "sorted"
    assert {file.name: file.read_bytes() for file in tagged.glob("*.txt")} == before


def test_what_needs_no_change_stays_as_it_is_written(tagged: Path) -> None:
    (tagged / "thing00.txt").write_text("b ,a")
    assert [change.image for change in TagFolder(tagged).changes(TagEdit(once=True))] == ["thing02.png"]


def test_a_negated_tag_implies_nothing() -> None:
    assert TagEdit(prune=True).of(["no hat", "hat"], {}) == ["no hat", "hat"]


def test_implications_are_read_from_danboorus_table(tmp_path: Path) -> None:
    file = tmp_path / "implications.csv"
    file.write_text("id,antecedent_name,consequent_name\n1,cat_ears,animal_ears\n2,cat_ears,Cat\n")
    assert read_implications(file) == {"cat ears": {"animal ears", "cat"}}
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="needs the columns"):
        read_implications(file)


def test_a_folder_without_captions_is_said(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(DatasetError, match="no image has a caption yet"):
        TagFolder(image_folder(1, caption=False))


@pytest.mark.parametrize("face", ["o_o", ">_<", "(o)_(o)", "||_||", "0_0", "=_="])
def test_faces_keep_their_underscore(face: str) -> None:
    assert with_spaces(face) == face


def test_other_tags_get_spaces() -> None:
    assert with_spaces("long_hair") == "long hair" and with_spaces("k-on!_(series)") == "k-on! (series)"


def test_thresholds_are_read_by_category() -> None:
    assert thresholds_of(["0.4", "4=0.9", "artist=off"]) == {
        "general": 0.4,
        "character": 0.9,
        "artist": float("inf"),
    }
    for wrong in ("x", "general=2", "=0.5", "nan"):
        with pytest.raises(ConfigError, match="threshold"):
            thresholds_of([wrong])


def test_what_a_list_of_tags_holds_cannot_command_the_terminal_or_fill_it(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text("\x1b[2J" + "[" * 10_000 + ",x\n", encoding="utf-8")
    for refused in (lambda: thresholds_of(["\x1b[2J" + "x" * 999]), lambda: read_tags(tmp_path / "tags.csv")):
        with pytest.raises(SdloraError) as caught:
            refused()
        assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


OUTPUTS = [
    (Tag("safe", "rating"), 0.9),
    (Tag("long_hair", "general"), 0.5),
    (Tag("a,b", "meta"), 0.8),
    (Tag("mia_(x)", "character"), 0.86),
    (Tag("o_o", "general"), 0.7),
    (Tag("Cat", "general"), 0.34),
]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (TagChoice(), ["mia (x)", "a b", "o_o", "long hair"]),
        (TagChoice({"general": 0.3}), ["mia (x)", "a b", "o_o", "long hair", "Cat"]),
        (TagChoice({"character": 0.9, "meta": 0.9}), ["o_o", "long hair"]),
        (TagChoice(blacklist=["Long Hair", "O_O"]), ["mia (x)", "a b"]),
        (TagChoice(underscores=True, order="list"), ["long_hair", "a b", "mia_(x)", "o_o"]),
        (TagChoice({"rating": 0.5}, order="category"), ["safe", "mia (x)", "o_o", "long hair", "a b"]),
        (TagChoice({"general": 0.3}, order="name"), ["a b", "Cat", "long hair", "mia (x)", "o_o"]),
    ],
)
def test_a_taggers_tags_are_chosen_and_ordered(choice: TagChoice, expected: list[str]) -> None:
    tags, probabilities = zip(*OUTPUTS, strict=True)
    assert choice.of(tags, probabilities) == expected
