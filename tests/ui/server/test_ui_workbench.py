"""The workbench's routes: tags of chosen images, restore points, repaired copies; nothing for visitors."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from patience import wait_for
from PIL import Image
from sdlora_ui.captions import CaptionBook
from sdlora_ui.dataset_view import DataSets
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.server.workbench import Workbench
from starlette.applications import Starlette
from starlette.testclient import TestClient

OURS = {"x-sdlora": "1"}


class Asker:
    """A page's requests."""

    def __init__(self, paths: AllowedPaths, folder: Path) -> None:
        bench = Workbench(paths, DataSets(), CaptionBook(paths), lambda request, folder: None)
        self.client = TestClient(Starlette(routes=bench.routes()))
        self.folder = folder

    def get(self, what: str, **asked: Any) -> Any:
        return self.client.get(
            f"/sdlora/workbench/{what}", params={"folder": str(self.folder), **asked}
        ).json()

    def post(self, what: str, status: int = 200, **body: Any) -> Any:
        sent = {"folder": str(self.folder), **body}
        answer = self.client.post(f"/sdlora/workbench/{what}", json=sent, headers=OURS)
        assert answer.status_code == status, answer.text
        return answer.json()


@pytest.fixture
def paths(tmp_path: Path) -> AllowedPaths:
    folders = {"runs": Path("runs"), "images": Path("out"), "data": Path("data")}
    (tmp_path / "home").mkdir()
    return AllowedPaths.of(tmp_path / "home", **folders, allowed=[tmp_path], local=True)


@pytest.fixture
def page(paths: AllowedPaths, image_folder: Callable[..., Path]) -> Asker:
    folder = image_folder(3)
    for number, text in enumerate(("cat, hat", "dog, Red_Hair, dog", "cat, red hair, sky")):
        (folder / f"thing0{number}.txt").write_text(text)
    return Asker(paths, folder)


def captions(page: Asker) -> list[str]:
    return [file.read_text().strip() for file in sorted(page.folder.glob("*.txt"))]


def test_tags_are_counted_shown_before_they_change_and_put_back(page: Asker) -> None:
    first = captions(page)
    assert page.get("tags")["tags"][:2] == [["cat", 2], ["Red_Hair", 2]]
    seen = page.post("tags", do="replace", tags="red hair", put="ginger hair", preview=True)
    assert seen["count"] == 2 and captions(page) == first
    assert seen["shown"][0] == {
        "image": "thing01.png",
        "before": "dog, Red_Hair, dog",
        "after": "dog, ginger hair, dog",
    }
    assert page.post("tags", do="replace", tags="red hair", put="ginger hair")["changed"] == 2
    assert captions(page) == ["cat, hat", "dog, ginger hair, dog", "cat, ginger hair, sky"]
    assert page.post("undo")["changed"] == 2 and captions(page) == first


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {"do": "add", "tags": "sky, new"},
            ["cat, hat, sky, new", "dog, Red_Hair, dog", "cat, red hair, sky, new"],
        ),
        ({"do": "add first", "tags": "zz"}, ["zz, cat, hat", "dog, Red_Hair, dog", "zz, cat, red hair, sky"]),
        ({"do": "remove", "tags": "cat"}, ["hat", "dog, Red_Hair, dog", "red hair, sky"]),
        (
            {"do": "sort by frequency", "keep_first": 1},
            ["cat, hat", "dog, Red_Hair, dog", "cat, red hair, sky"],
        ),
        ({"do": "sort by name"}, ["cat, hat", "dog, Red_Hair, dog", "cat, red hair, sky"]),
    ],
)
def test_only_the_chosen_images_change(page: Asker, asked: dict[str, Any], expected: list[str]) -> None:
    page.post("tags", names=["thing00.png", "thing02.png"], **asked)
    assert captions(page) == expected


def test_a_tag_is_added_to_images_without_a_caption_as_well(page: Asker) -> None:
    Image.new("RGB", (40, 40)).save(page.folder / "DSC01.png")
    Image.new("RGB", (40, 40)).save(page.folder / "red_cup.png")
    assert page.post("tags", do="add", tags="new", names=["DSC01.png", "red_cup.png"])["changed"] == 2
    assert (page.folder / "DSC01.txt").read_text() == "new\n"
    assert (page.folder / "red_cup.txt").read_text() == "red cup, new\n"


def test_several_changes_are_taken_back_to_a_restore_point(page: Asker) -> None:
    first, images = captions(page), sorted(file.name for file in page.folder.glob("*.png"))
    page.post("tags", do="remove", tags="cat")
    page.post("images/turn", names=["thing01.png"])
    page.post("images/delete", names=["thing00.png"])
    whats = [change["what"] for change in page.get("history")["changes"]]
    assert whats == ["thing00.png deleted", "thing01.png turned", "tags: remove cat"]
    assert page.post("undo", times=3)["undo"] == 0
    assert captions(page) == first and sorted(file.name for file in page.folder.glob("*.png")) == images


def test_a_mask_and_a_focus_come_from_the_page(page: Asker) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 40), "white").save(buffer, "PNG")
    text = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert page.get("mask", name="thing00.png")["path"] is None
    page.post("images/mask", names=["thing00.png"], png=text)
    page.post("images/focus", names=["thing00.png"], point=[0.25, 0.5])
    assert page.get("mask", name="thing00.png")["path"] == str(page.folder / ".masks" / "thing00.png")
    assert "not an image" in page.post("images/mask", 422, names=["thing00.png"], png="data:x,***")["error"]
    page.post("images/focus", 422, names=["thing00.png"], point=[2, 0])
    page.post("images/mask", names=["thing00.png"], png=None)
    assert page.get("mask", name="thing00.png")["path"] is None


def test_a_repair_is_shown_before_its_copy_is_written(page: Asker) -> None:
    def ended() -> Any:
        state = page.get("repair")
        return state if state["status"] != "running" else None

    (page.folder / "torn.png").write_bytes(b"\x89PNG and no more")
    before = sorted(page.folder.rglob("*"))
    page.post("repair")
    seen = wait_for(ended)
    assert [change["name"] for change in seen["changes"]] == ["torn.png"] and sorted(
        page.folder.rglob("*")
    ) == before
    page.post("repair", write=True)
    copy = Path(wait_for(lambda: (state := ended()) and state.get("folder")))
    assert copy.name == "images-repaired" and not (copy / "torn.png").exists()
    assert (copy / "thing00.png").read_bytes() == (page.folder / "thing00.png").read_bytes()


@pytest.mark.parametrize("what", ["delete", "exclude", "include", "turn", "focus", "mask", "masks"])
def test_a_visitor_changes_no_image(paths: AllowedPaths, page: Asker, what: str) -> None:
    visitor = Asker(replace(paths, local=False), page.folder)
    before = {file: file.read_bytes() for file in page.folder.rglob("*") if file.is_file()}
    assert "--listen" in visitor.post(f"images/{what}", 403, names=["thing00.png"], point=[0.5, 0.5])["error"]
    visitor.post("repair", 403, write=True)
    assert {file: file.read_bytes() for file in page.folder.rglob("*") if file.is_file()} == before


def test_another_folder_and_another_sites_form_are_refused(page: Asker, tmp_path: Path) -> None:
    body = {"folder": "/etc", "names": ["x.png"]}
    for what in ("images/delete", "tags", "undo"):
        address = f"/sdlora/workbench/{what}"
        assert page.client.post(address, json=body, headers=OURS).status_code == 403
        assert page.client.post(address, json={"folder": str(page.folder)}).status_code == 403
    for what in ("history", "tags", "duplicates", "excluded", "mask", "repair", "names"):
        assert page.client.get(f"/sdlora/workbench/{what}", params={"folder": "/etc"}).status_code == 403
