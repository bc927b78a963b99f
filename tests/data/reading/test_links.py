"""Links in an image folder: inside it they are followed, out of it only if that is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sdlora.commands.cli import main
from sdlora.config.data import DataConfig
from sdlora.data.check.repair import repair
from sdlora.data.reading.cache_folder import list_entries
from sdlora.data.reading.folder import Reading, scan, survey
from sdlora.data.reading.listing import list_files
from sdlora.data.reading.sources import gather
from sdlora.errors import DatasetError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
SECRET = "the secret of the house"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.png"):
        Image.effect_noise((64, 64), 80).save(folder / name)
    for name in ("a.txt", "more/b.txt", "secret"):
        (folder / name).write_text(SECRET, encoding="utf-8")
    (folder / "metadata.jsonl").write_text(
        f'{{"file_name": "x.png", "text": "{SECRET}"}}\n', encoding="utf-8"
    )
    (folder / "focus.json").write_text('{"focus": [0.1, 0.1]}', encoding="utf-8")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    Image.effect_noise((64, 64), 80).save(folder / "x.png")
    (folder / "x.txt").write_text("a drawing", encoding="utf-8")
    return folder


def image(root: Path, outside: Path) -> str:
    (root / "y.png").symlink_to(outside / "a.png")
    return "y.png"


def relative(root: Path, outside: Path) -> str:
    (root / "y.png").symlink_to(Path("..") / "outside" / "a.png")
    return "y.png"


def caption(root: Path, outside: Path) -> str:
    (root / "x.txt").unlink()
    (root / "x.txt").symlink_to(outside / "secret")
    return "x.txt"


def other_caption(root: Path, outside: Path) -> str:
    (root / "x.txt").unlink()
    (root / "x.caption").symlink_to(outside / "secret")
    return "x.caption"


def metadata(root: Path, outside: Path) -> str:
    (root / "x.txt").unlink()
    (root / "metadata.jsonl").symlink_to(outside / "metadata.jsonl")
    return "metadata.jsonl"


def sidecar(root: Path, outside: Path) -> str:
    (root / "x.json").symlink_to(outside / "focus.json")
    return "x.json"


def folder(root: Path, outside: Path) -> str:
    (root / "more").symlink_to(outside / "more")
    return "more"


def chain(root: Path, outside: Path) -> str:
    (root / "second").symlink_to(outside / "a.png")
    (root / "y.png").symlink_to(root / "second")
    return "y.png"


def deep(root: Path, outside: Path) -> str:
    (root / "in").mkdir()
    (root / "in" / "y.png").symlink_to(outside / "a.png")
    return "in/y.png"


def neighbour(root: Path, outside: Path) -> str:
    """A folder whose name begins like the data set's is not inside it."""
    other = root.with_name("set-2")
    outside.rename(other)
    (root / "y.png").symlink_to(other / "a.png")
    return "y.png"


LEADING_OUT = [image, relative, caption, other_caption, metadata, sidecar, folder, chain, deep, neighbour]


@pytest.mark.parametrize("make", LEADING_OUT)
def test_a_link_that_leads_out_is_refused_by_name_and_followed_if_asked(
    make: Callable[[Path, Path], str], root: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make(root, outside)
    with pytest.raises(DatasetError, match="leads out of the folder") as caught:
        scan(root)
    assert f"{name}: is a link that leads out" in str(caught.value)
    assert "data.follow_links=true" in str(caught.value)
    with pytest.raises(DatasetError, match="leads out"):
        gather(DataConfig(folder=root))
    assert SECRET not in str(survey(root))
    assert main(["check", str(root)]) == 1
    assert "leads out" in capsys.readouterr().out
    changes = repair(root, root.with_name("copy"))
    assert [change.name for change in changes if "leads out" in change.what] == [name]
    assert not any(
        SECRET in file.read_text("utf-8", "replace") for file in root.with_name("copy").rglob("*.*")
    )
    followed = scan(root, reading=Reading(follow_links=True))
    assert len(followed.items) >= 1
    assert gather(DataConfig(folder=root, follow_links=True)).items == followed.items
    assert main(["check", str(root), "--follow-links"]) == 0


def test_masks_that_lead_out_are_refused(root: Path, outside: Path) -> None:
    masks = root.with_name("masks")
    masks.mkdir()
    (masks / "x.png").symlink_to(outside / "a.png")
    with pytest.raises(DatasetError, match=r"x\.png: is a link that leads out"):
        gather(DataConfig(folder=root, mask_folder=masks))
    (item,) = gather(DataConfig(folder=root, mask_folder=masks, follow_links=True)).items
    assert item.mask is not None


def test_links_inside_the_folder_and_to_it_are_followed(root: Path) -> None:
    (root / "y.png").symlink_to("x.png")
    (root / "y.txt").symlink_to(root / "x.txt")
    link = root.with_name("link")
    link.symlink_to(root)
    for place in (root, link):
        items = scan(place).items
        assert [(item.name, item.caption) for item in items] == [
            ("x.png", "a drawing"),
            ("y.png", "a drawing"),
        ]


def test_links_that_are_of_no_use_are_left_alone(root: Path, outside: Path) -> None:
    (root / "notes").symlink_to(outside / "secret")
    (root / "notes.md").symlink_to(outside / "secret")
    (root / ".hidden.png").symlink_to(outside / "a.png")
    assert list_files(root, recursive=True).problems == []


@pytest.mark.parametrize("target", ["nothing.png", "y.png", "/proc/self/nothing"])
def test_a_link_to_nothing_is_named_and_passed_over(root: Path, target: str) -> None:
    (root / "y.png").symlink_to(target)
    dataset = scan(root)
    assert [item.name for item in dataset.items] == ["x.png"]
    assert dataset.notes == ("y.png: is a link to nothing, and passed over",)
    changes = repair(root, root.with_name("copy"))
    assert [(change.name, change.written) for change in changes] == [("y.png", None)]


def test_a_caption_that_is_a_link_to_nothing_is_an_error(root: Path) -> None:
    (root / "x.txt").unlink()
    (root / "x.txt").symlink_to("nothing.txt")
    with pytest.raises(DatasetError, match=r"x\.txt: is a link|x\.txt: cannot be read"):
        scan(root)


def test_thinning_out_a_cache_removes_nothing_that_a_link_leads_to(tmp_path: Path) -> None:
    models, cache = tmp_path / "models", tmp_path / "cache"
    models.mkdir()
    (models / "mine.safetensors").write_bytes(b"x")
    (cache / "images" / "ab").mkdir(parents=True)
    (cache / "images" / "cd").symlink_to(models)
    (cache / "images" / "ab" / "link.safetensors").symlink_to(models / "mine.safetensors")
    (cache / "images" / "ab" / "own.safetensors").write_bytes(b"x")
    assert [entry.path.name for entry in list_entries(cache)] == ["own.safetensors"]
    assert main(["cache", "--folder", str(cache), "--prune", "--yes"]) == 0
    assert os.listdir(models) == ["mine.safetensors"]


def test_a_name_cannot_command_the_terminal_that_shows_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "a\x1b[31m\x07\u202e.png").write_bytes(b"no image")
    (root / "b\x1b]0;title\x07.png").symlink_to("nothing.png")
    assert main(["check", str(root), "--json"]) == 1
    with pytest.raises(DatasetError) as caught:
        scan(root)
    report = capsys.readouterr()
    for text in (report.out, report.err, str(caught.value)):
        assert not set(text) & set("\x1b\x07\u202e")
    assert "a\\x1b[31m\\x07" in str(caught.value)
    (root / "na\u00efve\u3000rose \U0001f468\u200d\U0001f469.png").symlink_to(root / "x.png")
    (item,) = (item for item in survey(root).dataset.items if item.name.startswith("na"))
    assert item.name == "na\u00efve\u3000rose \U0001f468\u200d\U0001f469.png"
