"""A cache folder reached through links: what leads away is refused, nothing is written or removed there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.config.toml import load_config
from sdlora.data.batching.entries import read_entry, write_entry
from sdlora.data.reading.cache_folder import index_file, list_entries, refuse_links_away
from sdlora.data.reading.index import ImageIndex, forget_missing
from sdlora.errors import OutputError
from sdlora.training.train import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")

Prepare = Callable[[Path, Path], object]


def nowhere(cache: Path, outside: Path) -> None:
    cache.symlink_to(outside / "missing")


def in_a_circle(cache: Path, outside: Path) -> None:
    cache.symlink_to(cache.name)


def in_a_circle_of_two(cache: Path, outside: Path) -> None:
    cache.symlink_to("other")
    (cache.parent / "other").symlink_to(cache.name)


def kind(name: str, target: str = "") -> Prepare:
    def prepare(cache: Path, outside: Path) -> None:
        cache.mkdir()
        (cache / name).symlink_to(outside / target)

    return prepare


def deeper(cache: Path, outside: Path) -> None:
    (cache / "images").mkdir(parents=True)
    (cache / "images" / "0f").symlink_to(outside)


def kind_in_a_circle(cache: Path, outside: Path) -> None:
    cache.mkdir()
    (cache / "images").symlink_to("captions")
    (cache / "captions").symlink_to("images")


def through_dots(cache: Path, outside: Path) -> None:
    cache.mkdir()
    (cache / "images").symlink_to(Path("..") / outside.name)


def through_a_link_inside(cache: Path, outside: Path) -> None:
    cache.mkdir()
    (cache / "way").symlink_to(outside)
    (cache / "images").symlink_to("way")


REFUSED: dict[str, tuple[Prepare, str]] = {
    "the folder, nowhere": (nowhere, "leads nowhere"),
    "the folder, in a circle": (in_a_circle, "leads nowhere"),
    "the folder, in a circle of two": (in_a_circle_of_two, "leads nowhere"),
    "images, away": (kind("images"), "leads out of the cache folder"),
    "captions, away": (kind("captions"), "leads out of the cache folder"),
    "images, nowhere": (kind("images", "missing"), "leads nowhere"),
    "the index, away": (kind(index_file(Path()).name, "secret"), "leads out of the cache folder"),
    "the index, to a file that is not there yet": (kind(index_file(Path()).name, "new"), "leads nowhere"),
    "images and captions, to each other": (kind_in_a_circle, "leads nowhere"),
    "one folder of images": (deeper, "leads out of the cache folder"),
    "through dots": (through_dots, "leads out of the cache folder"),
    "through another link": (through_a_link_inside, "leads out of the cache folder"),
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "0f").mkdir(parents=True)
    (folder / "secret").write_bytes(b"mine")
    write_entry(folder / "0f" / "entry.safetensors", {"mean": torch.ones(2)})
    return folder


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    files = {file.relative_to(folder).as_posix(): file.stat() for file in folder.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in files.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_whose_links_lead_away_is_refused(case: str, tmp_path: Path, outside: Path) -> None:
    prepare, words = REFUSED[case]
    prepare(tmp_path / "cache", outside)
    with pytest.raises(OutputError, match=words):
        refuse_links_away(tmp_path / "cache")


@pytest.mark.parametrize("case", ["the folder, in a circle", "images, away", "one folder of images"])
def test_a_run_ends_before_it_writes_there(
    case: str, tmp_path: Path, outside: Path, tiny_base: Path, image_folder: Callable[..., Path]
) -> None:
    REFUSED[case][0](tmp_path / "cache", outside)
    before = state_of(outside)
    values = {
        "data.folder": image_folder(),
        "model.base": str(tiny_base),
        "data.cache_folder": tmp_path / "cache",
        "output.folder": tmp_path / "run",
    }
    config = load_config(None, ["training.steps=1", "training.device=cpu", "training.precision=fp32"], values)
    with pytest.raises(OutputError, match=r"data\.cache_folder"):
        train(config)
    assert not (tmp_path / "run").exists() and len(before) == 3
    assert state_of(outside) == before


def test_below_a_link_that_leads_nowhere_there_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "disk").symlink_to(tmp_path / "unplugged")
    with pytest.raises(OutputError, match=r"disk: is a link that leads nowhere"):
        refuse_links_away(tmp_path / "disk" / "cache" / "mine")


def test_the_folder_may_be_a_link_to_another_disk_and_lead_about_inside(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    refuse_links_away(tmp_path / "cache" / "not there yet")
    (tmp_path / "disk" / "elsewhere").mkdir()
    (tmp_path / "disk" / "images").symlink_to("elsewhere")
    refuse_links_away(tmp_path / "cache")


def test_what_is_linked_is_neither_listed_read_nor_touched(tmp_path: Path, outside: Path) -> None:
    """So pruning does not remove it, and a run that misses it encodes it again, over the link."""
    cache, foreign = tmp_path / "cache", outside / "0f" / "entry.safetensors"
    (cache / "captions" / "0f").mkdir(parents=True)
    linked = cache / "captions" / "0f" / "entry.safetensors"
    linked.symlink_to(foreign)
    (cache / "images").symlink_to(outside)
    before = state_of(outside)
    assert list_entries(cache) == []
    assert read_entry(linked) is None and read_entry(foreign) is not None
    os.utime(foreign, ns=(before["0f/entry.safetensors"][1],) * 2)  # reading notes when
    write_entry(linked, {"mean": torch.zeros(3)})
    assert not linked.is_symlink()
    assert len(list_entries(cache)) == 1 and state_of(outside) == before


def test_an_index_that_is_a_link_is_not_used(tmp_path: Path, outside: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    index_file(cache).symlink_to(outside / "new.sqlite")
    before = state_of(outside)
    with pytest.warns(UserWarning, match="is a link"), ImageIndex(index_file(cache), "1") as index:
        assert index.get(outside / "secret", (outside / "secret").stat()) is None
    index_file(cache).unlink()
    index_file(cache).symlink_to(outside / "secret")
    with pytest.warns(UserWarning, match="is a link"):
        assert forget_missing(index_file(cache)) == 0
    assert state_of(outside) == before
