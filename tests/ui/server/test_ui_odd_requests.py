"""Whatever is asked of the page's own routes, the answer is one line, and nothing else is read or changed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.server.routes import routes
from sdlora_ui.site import Site
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route
from starlette.testclient import TestClient

SECRET = "nobody asked for this line"
FIELDS = (
    *("folder", "path", "names", "what", "times", "do", "tags", "put", "keep_first", "preview", "quarters"),
    *(
        "point",
        "png",
        "write",
        "texts",
        "typing",
        "find",
        "word",
        "confirmed",
        "model",
        "prefix",
        "batch_size",
    ),
    *("trigger", "resolution", "page", "only", "known", "at", "tab", "side", "limit", "name", "threshold"),
)
PATH_WORDS = (
    *("set", "replace", "trigger", "undo", "preview", "start", "stop", "delete", "exclude", "include"),
    *("turn", "focus", "mask", "masks", "kill", "resume", "save", "%00", "job", "\N{PILE OF POO}" * 70),
)


def odd_values(folder: Path, outside: Path) -> list[Any]:
    """Return values of every JSON type, names that lead elsewhere, numbers that are none."""
    png, secret = "data:image/png;base64,", str(outside / "secret.txt")
    return [
        *(None, True, False, 0, -1, 1, 7, 10**30, -(10**30), 0.5, 1e400, -1e400, float("nan")),
        *("", " ", "0", "-1", "nan", "1e9", "9" * 5000, "\0", "a\0b", "\ud800", "../", "..", ".", "~", "CON"),
        *(str(folder), str(outside), secret, f"{folder}/../outside", f"{folder}/link", "x" * 300),
        *("thing00.png", "../outside/secret.txt", f"{outside}/secret.png", "link/secret.png", "thing00.txt"),
        *("tag:", "tag:cat", "add", "remove", "replace", "prune", "cat, dog", "(" * 500),
        *(png, png + "AAAA", png + "é", [], {}, [[]], [{}], [None], ["thing00.png"], [secret], [[[[[[]]]]]]),
        *(["thing00.png", "thing01.png"], [0.5, 0.5], [float("nan"), 0], [1e400, 2], ["a", "b"], [0.5]),
        *({"thing00.png": "new"}, {"thing00.png": None}, {"../outside/secret.txt": "new"}, {secret: "new"}),
    ]  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, image_folder: Callable[..., Path]) -> Iterator[tuple[Site, Path, Path]]:
    folder, outside, home = image_folder(3), tmp_path / "outside", tmp_path / "home"
    outside.mkdir()
    home.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (outside / "secret.png").write_bytes((folder / "thing00.png").read_bytes())
    (folder / "link").symlink_to(outside, target_is_directory=True)
    inside = {"runs": Path("runs"), "images": Path("out"), "data": Path("data")}
    opened = Site.open(AllowedPaths.of(home, **inside, allowed=[folder], local=True))
    # what would begin long work is another test's
    opened.captioning.start = lambda *given, **named: None  # type: ignore[method-assign]
    yield opened, folder, outside
    opened.end()


def ours(site: Site) -> Iterator[tuple[str, str]]:
    """Yield method and path of every route that answers in JSON."""
    listed: list[BaseRoute] = routes(
        site.paths, site.queue, site.captioning, site.drafts, site.owner, site.adapters
    )
    for route in listed:
        if isinstance(route, Route):
            yield "POST" if "POST" in (route.methods or ()) else "GET", route.path


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))])
def test_odd_requests_are_one_line_and_change_nothing_elsewhere(
    site: tuple[Site, Path, Path], seed: int
) -> None:
    opened, folder, outside = site
    draw, values = random.Random(seed), odd_values(folder, outside)
    app = Starlette(
        routes=routes(
            opened.paths, opened.queue, opened.captioning, opened.drafts, opened.owner, opened.adapters
        )
    )
    client = TestClient(app, raise_server_exceptions=False)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    # adding a folder is the owner's own decision
    asked = [(method, path) for method, path in ours(opened) if path != "/sdlora/allow"]
    assert len(asked) > 25
    wrong, statuses = [], set()
    for method, path in asked:
        for _ in range(15):
            path_now = path
            for name in ("{what}", "{action}", "{id}"):
                path_now = path_now.replace(name, draw.choice(PATH_WORDS))
            given = {
                field: draw.choice(values) for field in draw.sample(FIELDS, draw.randrange(1, len(FIELDS)))
            }
            if draw.random() < 0.8:
                given["folder"] = str(folder)
            if method == "POST":
                body = json.dumps(given)  # NaN, too: other programs write it
                ours_headers = {"content-type": "application/json", "x-sdlora": "1"}
                answer = client.post(path_now, content=body, headers=ours_headers)
            else:
                texts = {key: str(value).encode("utf-8", "replace").decode() for key, value in given.items()}
                answer = client.get(path_now, params=texts)
            statuses.add(answer.status_code)
            if answer.status_code not in (200, 400, 403, 404, 422) or SECRET in answer.text:
                wrong.append((method, path_now, answer.status_code, given))
            elif (
                answer.status_code != 200
                and "error" in answer.text
                and "\n" in answer.json()["error"].strip()
            ):
                wrong.append((method, path_now, answer.json(), given))
    assert not wrong, wrong[:3]
    assert {200, 422} <= statuses
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_a_name_that_is_not_utf_8_keeps_nothing_else_from_being_listed(
    site: tuple[Site, Path, Path],
) -> None:
    opened, folder, _ = site
    paths = opened.paths
    image, config = (folder / "thing00.png").read_bytes(), b"[output]\nname = 'x'\n"
    for place, file, data in (
        (folder, "a.png", image),
        (paths.data, "a.png", image),
        (paths.images, "00000-1.png", image),
        (paths.runs, "config.toml", config),
        (paths.runs / "exported", "x.safetensors", b""),
    ):
        for name in (b"sound", b"\xff\xfe"):
            inside = Path(os.fsdecode(os.fsencode(place) + b"/" + name))
            try:
                inside.mkdir(parents=True)
            except OSError:
                pytest.skip("this file system takes only names of UTF-8")
            (inside / file).write_bytes(data)
    app = Starlette(
        routes=routes(paths, opened.queue, opened.captioning, opened.drafts, opened.owner, opened.adapters)
    )
    client = TestClient(app, raise_server_exceptions=False)
    for place in (folder, paths.data, paths.images, paths.runs):
        seen = client.get("/sdlora/folders", params={"path": str(place)}).json()
        assert "sound" in [entry["name"] for entry in seen["folders"]] and seen["unnamed"] == 1
    drawn = client.get("/sdlora/images").json()
    assert [image["name"] for image in drawn["images"]] == [f"sound{os.sep}00000-1.png"]
    read = client.get("/sdlora/dataset", params={"folder": str(folder)}).json()
    assert read["num_images"] == 4 and "\\udcff\\udcfe" in json.dumps(read["findings"]).replace("\\\\", "\\")
    assert [choice.label for choice in opened.data_sets()] == ["sound"]
    listed = [*opened.data_sets(), *opened.runs(), *opened.adapters(), *opened.bases()]
    assert len(listed) >= 2
    for choice in listed:
        assert choice.path.encode("utf-8") and choice.label.encode("utf-8")
