"""A large data set stays fluid: what was looked at is not looked at again, thumbnails are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sdlora_ui import versions as module
from sdlora_ui.dataset_view import DataSets, for_folder
from sdlora_ui.thumbs import Thumbs
from sdlora_ui.versions import Versions, version_of


def plain_images(folder: Path, count: int) -> Path:
    """Make images of one colour each, with captions."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (20, 20), (3 * number, 200 - number, 90)).save(folder / f"thing{number:02}.png")
        (folder / f"thing{number:02}.txt").write_text(f"a thing {number}")
    return folder


def test_versions_are_kept_for_a_while_in_proportion_to_their_cost(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, now, asked = image_folder(1), [100.0], []

    def slow(config: object) -> str:
        asked.append(config)
        now[0] += 0.5
        return f"version {len(asked)}"

    monkeypatch.setattr(module, "version_of_settings", slow)
    kept, config = Versions(lambda: now[0]), for_folder(folder, None, None)
    assert kept.of(config) == kept.of(config) == "version 1"
    now[0] += 9.9
    assert kept.of(config) == "version 1"
    now[0] += 0.2
    assert kept.of(config) == "version 2"
    kept.forget()
    assert kept.of(config) == "version 3"


def test_a_version_follows_every_file_but_sdloras_own_records(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(1)
    first = version_of(folder)
    (folder / ".sdlora-bin").mkdir()
    (folder / ".sdlora-bin" / "x.png").write_bytes(b"x")
    assert version_of(folder) == first
    (folder / ".masks").mkdir()
    (folder / ".masks" / "x.png").write_bytes(b"x")
    second = version_of(folder)
    (folder / "thing00.txt").write_text("longer than before, so that its size tells")
    assert len({first, second, version_of(folder)}) == 3


def test_a_page_of_what_is_shown_looks_at_its_own_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sets = plain_images(tmp_path / "many", 70), DataSets()
    seen = sets.look(folder, trigger=None, resolution=64)
    monkeypatch.setattr(module, "version_of", lambda folder: pytest.fail("looked at all files"))
    monkeypatch.setattr("sdlora_ui.dataset_view.version_of_settings", lambda config: pytest.fail("looked"))
    (folder / "thing65.txt").write_text("just now")
    (folder / "thing66.png").unlink()
    page = sets.look(folder, trigger=None, resolution=64, page=1, known=seen["version"])
    named = {card["name"]: card["caption"] for card in page["cards"]}
    assert named["thing65.png"] == "just now" and "thing66.png" not in named and len(named) == 9
    assert page["matching"] == 70
    there = sets.look(folder, trigger=None, resolution=64, known=seen["version"], at="thing68.png")
    assert there["page"] == 1 and "thing68.png" in [card["name"] for card in there["cards"]]


def test_findings_are_counted_and_not_all_sent(tmp_path: Path) -> None:
    seen = DataSets().look(plain_images(tmp_path / "many", 30), trigger=None, resolution=1024)
    small = next(group for group in seen["findings"] if group["count"] == 30)
    assert len(small["first"]) == 3 and small["severity"] == "warning"
    assert sum(group["count"] for group in seen["findings"]) == sum(seen["counts"].values())


def test_images_of_a_tag_are_found_however_it_is_written(image_folder: Callable[..., Path]) -> None:
    folder, sets = image_folder(3), DataSets()
    (folder / "thing01.txt").write_text("smile, Long_Hair")
    seen = sets.look(folder, trigger=None, resolution=64, only="tag:long hair")
    assert [card["name"] for card in seen["cards"]] == ["thing01.png"] and seen["matching"] == 1
    names = sets.names(folder, trigger=None, resolution=64, only="", settings=None, known=seen["version"])
    assert names == ["thing00.png", "thing01.png", "thing02.png"]


def test_duplicates_come_in_groups_with_the_largest_first(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(2)
    with Image.open(folder / "thing00.png") as image:
        image.resize((120, 120)).save(folder / "large.png")
    (folder / "large.txt").write_text("a cat")
    seen = DataSets().duplicates(folder, trigger=None, resolution=64, settings=None)
    (group,) = seen["groups"]
    assert [image["name"] for image in group["images"]] == ["large.png", "thing00.png"]
    assert group["same"] is False and group["images"][0]["bytes"] == (folder / "large.png").stat().st_size


def test_a_thumbnail_is_made_once_and_again_for_a_changed_file(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = image_folder(1) / "thing00.png"
    first = Thumbs(tmp_path / "thumbs").of(file, 250)
    real = Thumbs.of.__globals__["load_small"]
    monkeypatch.setitem(Thumbs.of.__globals__, "load_small", lambda *_: pytest.fail("made again"))
    assert Thumbs(tmp_path / "thumbs").of(file, 256) == first  # by another server, too
    monkeypatch.setitem(Thumbs.of.__globals__, "load_small", real)
    Image.new("RGB", (300, 100), "green").save(file)
    assert Thumbs(tmp_path / "thumbs").of(file, 256) != first


def test_thumbnails_on_disk_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora_ui.thumbs.TIDY_EVERY", 2)
    thumbs = Thumbs(tmp_path / "thumbs", most_bytes=40_000)
    for number in range(11):
        file = tmp_path / f"{number}.png"
        Image.effect_noise((200, 200), 80).save(file)
        thumbs.of(file, 192)
    sizes = [kept.stat().st_size for kept in (tmp_path / "thumbs").rglob("*.webp")]
    assert sizes and sum(sizes) < 40_000 + 2 * max(sizes)
