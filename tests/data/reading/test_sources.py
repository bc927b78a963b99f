"""Several folders, kohya's folder names, Hugging Face metadata files and sidecars: what they yield."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from drawings import drawing, folder_of, put

from sdlora.config.schema import Config
from sdlora.config.toml import load_config, save_config
from sdlora.data.reading.folder import Reading, scan, survey
from sdlora.data.reading.items import Dataset
from sdlora.data.reading.kohya import KohyaFolder, parse_name
from sdlora.data.reading.metadata_files import read_metadata
from sdlora.data.reading.sources import by_role, gather, joined
from sdlora.errors import ConfigError, DatasetError


def gathered(**data: Any) -> Dataset:
    return gather(Config.model_validate({"data": data}).data)


def facts(dataset: Dataset) -> list[tuple[str, str, int]]:
    return [(item.name, item.caption, item.repeats) for item in dataset.items]


def problems_of(folder: Path, **reading: Any) -> list[str]:
    return [str(problem) for problem in survey(folder, reading=Reading(**reading)).problems]


# --- kohya's folder names


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("10_sks cat", KohyaFolder(10, "sks cat")),
        ("1_my_style", KohyaFolder(1, "my style")),
        ("007_x", KohyaFolder(7, "x")),
        ("cats", None),
        ("10cats", None),
        ("0_cats", None),
        ("2024_holiday", None),
        ("10_", None),
    ],
)
def test_what_a_folder_name_says(name: str, meaning: KohyaFolder | None) -> None:
    assert parse_name(name) == meaning


def test_kohya_folders_give_repeats_and_class_words(tmp_path: Path) -> None:
    put(tmp_path / "10_sks cat" / "a.png", drawing(1))
    put(tmp_path / "10_sks cat" / "b.png", drawing(2))
    put(tmp_path / "10_sks cat" / "b.txt", "a cat on a mat")
    put(tmp_path / "3_dog" / "deep" / "0001.png", drawing(3))
    dataset = scan(tmp_path, repeats=2)
    assert facts(dataset) == [
        ("10_sks cat/a.png", "sks cat", 20),
        ("10_sks cat/b.png", "a cat on a mat", 20),
        ("3_dog/deep/0001.png", "dog", 6),
    ]
    assert dataset.num_visits == 46
    assert dataset.notes == (
        "10_sks cat/: its images count 10 times, `sks cat` is their caption where they have none",
        "3_dog/: its images count 3 times, `dog` is their caption where they have none",
    )


@pytest.mark.parametrize("stray", ["more/c d.png", "c d.png", "2026_01_holiday/c d.png", "0_x/c d.png"])
def test_a_stray_image_beside_kohya_folders_leaves_them_their_repeats(tmp_path: Path, stray: str) -> None:
    put(tmp_path / "10_cat" / "a b.png", drawing(1))
    put(tmp_path / stray, drawing(2))
    dataset = scan(tmp_path)
    assert sorted(facts(dataset)) == sorted([("10_cat/a b.png", "cat", 10), (stray, "c d", 1)])
    assert dataset.notes == (
        "10_cat/: its images count 10 times, `cat` is their caption where they have none",
        f"{stray}: is the first of 1 image(s) in no folder named `N_words`, which count once; "
        "set data.kohya_folders=false if the numbers in the names mean nothing",
    )


def test_folders_of_other_names_among_them_are_refused_where_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "10_cat" / "a b.png", drawing(1))
    put(tmp_path / "more" / "c d.png", drawing(2))
    assert problems_of(tmp_path, kohya_folders=True) == [
        "more/c d.png: lies in no folder named `N_words`; "
        "move it into one (`10_words`), or leave out data.kohya_folders"
    ]


def test_kohya_names_can_be_switched_off(tmp_path: Path) -> None:
    put(tmp_path / "10_cat" / "a b.png", drawing(1))
    dataset_read = scan(tmp_path, reading=Reading(kohya_folders=False))
    assert facts(dataset_read) == [("10_cat/a b.png", "a b", 1)]
    assert dataset_read.notes == ()


def test_a_folder_that_is_itself_named_so_is_pointed_out(tmp_path: Path) -> None:
    folder_of(tmp_path / "10_cat", 1)
    assert scan(tmp_path / "10_cat").notes == (
        "10_cat: is named as kohya's folders are, but given itself it counts once; "
        "give the folder above it, or set data.repeats=10",
    )


# --- metadata files


def hugging_face(root: Path) -> Path:
    for number, name in enumerate(("one.png", "two.png", "train/three.png", "four.png")):
        put(root / name, drawing(number))
    return root


def test_metadata_jsonl_gives_captions_as_hugging_face_has_them(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    lines = [
        {"file_name": "one.png", "text": "a first", "label": 3},
        {"file_name": "./two.png", "text": "a second\nline two"},
        {"file_name": "train\\three.png", "text": ["a third", "another"]},
        {"file_name": "four.png", "text": None},
    ]
    put(tmp_path / "metadata.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    items = scan(tmp_path).items
    assert [(item.name, item.lines, item.caption_source) for item in items] == [
        ("four.png", ("four",), "file name"),
        ("one.png", ("a first",), "metadata"),
        ("train/three.png", ("a third", "another"), "metadata"),
        ("two.png", ("a second", "line two"), "metadata"),
    ]
    assert items[2].caption == "a third another"


def test_metadata_csv_in_a_folder_inside_names_images_from_there(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    put(tmp_path / "train" / "metadata.csv", 'caption,file_name\n"said ""so"", twice","three.png"\n')
    by_name = {item.name: item.caption for item in scan(tmp_path).items}
    assert by_name["train/three.png"] == 'said "so", twice'
    assert by_name["one.png"] == "one"


def test_the_caption_column_can_be_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png", drawing(1))
    put(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "no", "tags": "yes"}')
    assert scan(tmp_path, reading=Reading(metadata_caption="tags")).items[0].caption == "yes"


def test_lines_about_images_that_are_gone_are_noted(tmp_path: Path) -> None:
    put(tmp_path / "a.png", drawing(1))
    put(
        tmp_path / "metadata.jsonl",
        '{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": "y"}',
    )
    assert scan(tmp_path).notes == ("metadata.jsonl: names 1 images that are not there (first: b.png)",)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("metadata.jsonl", "{oops}", "metadata.jsonl line 1: is not valid JSON ("),
        ("metadata.jsonl", "[1]", "metadata.jsonl line 1: is not a JSON object; correct that line"),
        ("metadata.jsonl", '\n{"text": "x"}', "metadata.jsonl line 2: has no `file_name`; add the column"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "label": 1}',
            "metadata.jsonl line 1: has no column `text` (it has label); "
            "name its caption column in data.metadata_caption",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": 3}',
            "metadata.jsonl line 1: has no text in `text`",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}',
            "metadata.jsonl line 2: names a.png again, after metadata.jsonl line 1; delete one of the lines",
        ),
        (
            "metadata.csv",
            "file_name,text\nb.png,x\n",
            "metadata.csv: names no image of this folder (first: b.png); put it beside its images",
        ),
        ("metadata.csv", "file_name,text\na.png,x,y\n", "metadata.csv line 2: has more or fewer values"),
        ("metadata.csv", 'file_name,text\na.png,"x', "metadata.csv line 2: is not valid CSV ("),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", "metadata.csv: is not UTF-8 text (byte 24"),
    ],
)
def test_what_is_wrong_with_a_metadata_file_names_the_line(
    tmp_path: Path, name: str, content: str | bytes, complaint: str
) -> None:
    put(tmp_path / "a.png", drawing(1))
    put(tmp_path / name, content)
    complaints = problems_of(tmp_path)
    assert len(complaints) == 1
    assert complaints[0].startswith(complaint)


def test_a_caption_file_and_a_metadata_line_contradict_each_other(tmp_path: Path) -> None:
    put(tmp_path / "a.png", drawing(1))
    put(tmp_path / "a.txt", "one")
    put(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "two"}')
    assert problems_of(tmp_path) == [
        "a.png: has a caption in a.txt and in metadata.jsonl line 1; delete one of them"
    ]
    by_name = scan(tmp_path, reading=Reading(captions_from_files=False)).items[0]
    assert (by_name.caption, by_name.caption_source) == ("a", "file name")


# --- sidecars


def test_a_sidecar_says_what_a_crop_should_keep_and_other_json_is_left_alone(tmp_path: Path) -> None:
    folder_of(tmp_path, 3)
    put(tmp_path / "p00.json", '{"focus": [0.25, 1], "by": "me"}')
    put(tmp_path / "p01.json", '{"id": 7')
    assert [item.focus for item in scan(tmp_path).items] == [(0.25, 1.0), None, None]


@pytest.mark.parametrize("focus", ["[0.5]", "[0.5, 1.1]", "[-0.1, 0]", '"face"', "[true, 0]"])
def test_a_focus_that_is_no_point_is_refused(tmp_path: Path, focus: str) -> None:
    folder_of(tmp_path, 1)
    put(tmp_path / "p00.json", f'{{"focus": {focus}}}')
    problems = problems_of(tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith("p00.json: has `focus` ")
    assert problems[0].endswith("give [x, y], each from 0 (left, top) to 1 (right, bottom)")


# --- several folders


def test_one_folder_alone_keeps_its_names(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 2)
    assert facts(gathered(folder=tmp_path / "a", repeats=3)) == [
        ("p00.png", "picture 0", 3),
        ("p01.png", "picture 1", 3),
    ]


def test_sources_have_their_own_repeats_captions_triggers_and_weights(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 1)
    folder_of(tmp_path / "b", 1)
    put(tmp_path / "c" / "0001.png", drawing(9))
    put(tmp_path / "c" / "below" / "0002.png", drawing(10))
    dataset = gathered(
        folder=tmp_path / "a",
        trigger_word="ink",
        repeats=2,
        sources=[
            {"folder": tmp_path / "b", "repeats": 5, "trigger_word": "", "weight": 0.5},
            {"folder": tmp_path / "c", "caption": "a cup", "recursive": False},
        ],
    )
    assert facts(dataset) == [
        ("a/p00.png", "ink, picture 0", 2),
        ("b/p00.png", "picture 0", 5),
        ("c/0001.png", "ink, a cup", 2),
    ]
    assert [item.weight for item in dataset.items] == [1.0, 0.5, 1.0]
    assert [item.caption_source for item in dataset.items] == ["txt", "txt", "setting"]


def test_regularisation_images_get_no_trigger_and_are_as_many_as_the_others(tmp_path: Path) -> None:
    folder_of(tmp_path / "me", 6)
    folder_of(tmp_path / "class", 2)
    source = {"folder": tmp_path / "class", "regularisation": True, "weight": 0.25}
    dataset = gathered(folder=tmp_path / "me", trigger_word="sks", sources=[source])
    learned, priors = by_role(dataset)
    assert (len(learned.items), learned.num_visits, len(priors.items), priors.num_visits) == (6, 6, 2, 6)
    assert facts(priors) == [("class/p00.png", "picture 0", 3), ("class/p01.png", "picture 1", 3)]
    assert {item.weight for item in priors.items} == {0.25}
    assert dataset.notes == (
        f"{tmp_path / 'class'}: each regularisation image counts 3 times, to be about as many as "
        "the 6 looks at images to be learned",
    )
    assert joined(learned, priors) == dataset
    assert dataset.learned == learned.items
    given = gathered(folder=tmp_path / "me", sources=[{**source, "repeats": 1}])
    assert by_role(given)[1].num_visits == 2


def test_folders_of_one_name_are_numbered_and_shared_images_are_noted(tmp_path: Path) -> None:
    folder_of(tmp_path / "x" / "data", 1)
    folder_of(tmp_path / "y" / "data", 1)
    both = [{"folder": tmp_path / "x" / "data"}, {"folder": tmp_path / "y" / "data"}]
    assert [item.name for item in gathered(sources=both).items] == ["data#1/p00.png", "data#2/p00.png"]
    twice = gathered(folder=tmp_path / "x" / "data", sources=[both[0]])
    image = (tmp_path / "x" / "data" / "p00.png").resolve()
    assert twice.notes == (f"{image}: is in 2 sources and counts in each",)


def test_the_problems_of_all_folders_are_told_at_once(tmp_path: Path) -> None:
    put(tmp_path / "a" / "a.png", b"")
    put(tmp_path / "b" / "b.png", b"")
    with pytest.raises(DatasetError) as caught:
        gathered(sources=[{"folder": tmp_path / "a"}, {"folder": tmp_path / "b"}])
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_sources_are_written_to_toml_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        '[data]\nfolder = "main"\n[[data.sources]]\nfolder = "b"\nweight = 0.5\n'
        '[[data.sources]]\nfolder = "c"\nregularisation = true\n[training]\nsteps = 3\n',
        encoding="utf-8",
    )
    config = load_config(tmp_path / "run.toml")
    assert [source.weight for source in config.data.sources] == [0.5, 1.0]
    save_config(config, tmp_path / "again.toml")
    assert load_config(tmp_path / "again.toml") == config
    assert load_config(None, ['data.sources=[{folder = "z"}]']).data.sources[0].folder == Path("z")


def test_settings_of_sources_that_cannot_be_are_all_told(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        '[[data.sources]]\nfolder = "b"\nwieght = 0.5\n[[data.sources]]\nfolder = "c"\nrepeats = 0\n',
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.toml")
    message = str(caught.value)
    assert "`data.sources[0].wieght` is not a setting; did you mean `weight`?" in message
    assert "`data.sources[1].repeats=0`" in message
    with pytest.raises(ConfigError, match="only regularisation images"):
        load_config(None, ['data.sources=[{folder = "z", regularisation = true}]'])
    with pytest.raises(ConfigError, match=r"sources\[0\] \(z\)\.trigger_word. has no effect"):
        load_config(
            None,
            ["data.folder=x", 'data.sources=[{folder = "z", regularisation = true, trigger_word = "y"}]'],
        )


def test_a_table_of_something_else_is_named_in_a_bounded_way(tmp_path: Path) -> None:
    put(tmp_path / "metadata.csv", "file_name,text\n" + "a.png\n" * 5000)
    read = read_metadata([(tmp_path / "metadata.csv", "metadata.csv")], ["a.png"], None)
    assert len(read.problems) == 1001
    assert str(read.problems[0]).startswith("metadata.csv line 2: has more or fewer values")
    assert str(read.problems[-1]).startswith("metadata.csv: has 4000 more lines that cannot be used")
