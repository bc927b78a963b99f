"""A folder captioned through the server: shown, written where it may be, undone by the page's Undo."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("onnxruntime")


@pytest.fixture
def folder(server: Any) -> Path:
    """Ten images in the server's data folder, one of which has a caption."""
    place: Path = server.home / "images" / "cats"
    place.mkdir(parents=True)
    for number in range(10):
        Image.new("RGB", (40, 30), (25 * number, 90, 10)).save(place / f"cat{number}.png")
    (place / "cat0.txt").write_text("mine")
    return place


def test_a_folder_is_captioned_and_put_back(
    server: Any, folder: Path, tmp_path: Path, wait: Callable[[Callable[[], Any]], Any]
) -> None:
    from data.captioning.tiny_captioners import write_tagger

    tagger = write_tagger(server.home / "images" / "wd")
    query = "/sdlora/captioning?" + urllib.parse.urlencode({"folder": folder})

    def ended() -> dict[str, Any] | None:
        state: dict[str, Any] = server.ask(query)
        return None if state["status"] in ("running", "stopping") else state

    assert server.ask(query) == {"status": "none"}
    body = {"folder": str(folder), "model": str(tagger), "threshold": "0", "trigger": "sks", "device": "cpu"}
    assert server.ask("/sdlora/captioning/preview", body)["status"] == "running"
    shown = wait(ended)
    assert shown["status"] == "finished" and len(shown["preview"]) == 8, shown
    assert [file.name for file in folder.glob("*.txt")] == ["cat0.txt"]
    server.ask("/sdlora/captioning/start", body)
    done = wait(ended)
    assert (done["written"], done["kept"], done["failed"]) == (9, 1, {}), done
    captions = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert len(captions) == 10 and captions.pop("cat0.txt") == "mine"
    assert {f"{row['image'][:-4]}.txt": f"{row['caption']}\n" for row in shown["preview"]}.items() <= (
        captions.items()
    )
    edited = {"folder": str(folder), "texts": {"cat1.png": "by hand"}}
    assert server.ask("/sdlora/captions/set", edited)["undo"] == 2
    assert server.ask("/sdlora/captions/undo", {"folder": str(folder)}) == {"changed": 1, "undo": 1}
    assert (folder / "cat1.txt").read_text() == captions["cat1.txt"]
    assert server.ask("/sdlora/captions/undo", {"folder": str(folder)}) == {"changed": 9, "undo": 0}
    assert [file.name for file in folder.glob("*.txt")] == ["cat0.txt"]

    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (20, 20)).save(outside / "a.png")
    assert server.status("/sdlora/captioning/start", body | {"folder": str(outside)}) == 403
    assert server.status("/sdlora/captioning/start", body | {"model": str(outside)}) == 403
    assert server.status("/sdlora/captioning/start", body | {"model": ""}) == 422
    assert server.status("/sdlora/captioning/nothing", body) == 422
    assert server.status("/sdlora/captioning/start", body, {"Content-Type": "text/plain"}) == 403
    server.ask("/sdlora/captioning/start", body | {"threshold": "much"})
    assert "threshold `much`" in wait(ended)["error"]
    assert [file.name for file in outside.iterdir()] == ["a.png"]
