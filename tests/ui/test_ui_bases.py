"""Bases are found, recognised by their headers, and listed newest first; one is fetched with progress."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from sdlora_ui.bases import Bases, drives_of
from sdlora_ui.owner import Owner
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.tasks.bases import recognise_bases
from sdlora_ui.tasks.fetch import fetch
from sdlora_ui.worker import Cancelled
from sdlora_ui.worker_client import Answer

from sdlora.errors import ModelError
from sdlora.files import ASSETS


class Heard:
    """Takes what a task says, and cancels it after a number of messages."""

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.told, self.parts = most, list[tuple[int, int, str]](), list[Any]()

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.told.append((done, total, note))
        if len(self.told) > self.most:
            raise Cancelled

    def part(self, value: Any) -> None:
        self.parts.append(value)


class Here:
    """A worker in this process."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def call(self, task: str, arguments: Any, **_: Any) -> Iterator[Answer]:
        heard = Heard()
        self.asked += arguments["paths"]
        recognise_bases(arguments, heard)
        yield from (Answer(part=part) for part in heard.parts)


def test_a_found_base_shows_family_size_and_date_and_the_newest_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "me"
    models = home / "AI" / "some ui" / "models" / "Stable-diffusion"
    models.mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("sdlora_ui.bases.local_drives", lambda: [])
    cached = tmp_path / "hub/models--ann--small/snapshots/abc"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(ASSETS / "mini")
    (models / "broken.safetensors").write_bytes(b"not a checkpoint")
    folders = {name: Path(name) for name in ("runs", "images", "data")}
    paths = AllowedPaths.of(tmp_path, **folders, local=True)
    worker = Here()
    bases = Bases(paths, Owner(paths, tmp_path / "page.json"), worker)  # type: ignore[arg-type]
    assert (bases.listed(), bases.newest()) == ([], "")
    bases.search()
    assert [(base.source, base.family) for base in bases.listed()] == [("ann/small", "Stable Diffusion 1.x")]
    assert bases.newest() == "ann/small" and "Stable Diffusion 1.x" in bases.listed()[0].label
    assert paths.readable(models / "broken.safetensors")  # its folder was found, and may be read
    asked = len(worker.asked)
    later = Bases(paths, Owner(paths, tmp_path / "page.json"), worker)  # type: ignore[arg-type]
    later.search()
    assert len(worker.asked) == asked and later.newest() == "ann/small"  # known by size and date
    (models / "new.safetensors").write_bytes(b"x" * 2**21)
    os.utime(models / "new.safetensors", (2e9, 2e9))
    newest = later.listed()[0]
    assert (newest.family, newest.label) == ("", "new (not looked at yet, 2 MiB, 18 May 2033)")
    assert later.newest() == "ann/small"


def test_an_open_server_searches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("searched")

    monkeypatch.setattr("sdlora_ui.bases.find_places", fail)
    paths = AllowedPaths.of(tmp_path, runs=Path("runs"), images=Path("out"), data=Path("data"))
    bases = Bases(paths, Owner(paths, tmp_path / "page.json"), Here())  # type: ignore[arg-type]
    bases.search()
    assert bases.listed() == [] and bases.searched.is_set()


def test_all_local_drives_are_searched() -> None:
    def disk(mount: str, kind: str = "NTFS", opts: str = "rw,fixed") -> SimpleNamespace:
        return SimpleNamespace(mountpoint=mount, fstype=kind, opts=opts)

    mounted = [disk("C:\\"), disk("D:\\"), disk("Z:\\", opts="rw,remote"), disk("E:\\", "", "cdrom")]
    mounted += [
        disk("/", "ext4"),
        disk("/mnt/models", "ext4"),
        disk("/mnt/nas", "nfs4"),
        disk("/snap/x", "squashfs"),
    ]
    assert drives_of(mounted) == [Path("C:\\"), Path("D:\\"), Path("/mnt/models")]


class _Answers(BaseHTTPRequestHandler):
    """A hub with one base, which gives the rest of a file to whom asks for it."""

    files: ClassVar[dict[str, bytes]] = {}
    ranges: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            known = "/".join(parts[2:4]) == "ann/base"
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            body = json.dumps(
                {"id": "ann/base", "sha": "0" * 40, "siblings": siblings} if known else {}
            ).encode()
            self._send(200 if known else 404, body, {"Content-Type": "application/json"})
            return
        data = self.files["/".join(parts[4:])]
        facts = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": "0" * 40,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if self.command == "GET" and len(data) > 1000:
            self.ranges.append(asked)
        if start:
            facts["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], facts)

    def _send(self, status: int, body: bytes, facts: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **facts}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # who asked was stopped
                self.wfile.write(body)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    weights = os.urandom(25 * 2**20)
    _Answers.files = {
        "model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": weights, "unet/evil.bin": b"x",
    }  # fmt: skip
    _Answers.ranges = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_base_is_fetched_from_a_mirror_with_progress_and_goes_on_where_it_was_stopped(
    mirror: str, tmp_path: Path
) -> None:
    wanted = {"base": "ann/base", "endpoint": mirror}
    with pytest.raises(Cancelled):
        fetch(wanted, Heard(most=8))
    (half,) = (tmp_path / "cache").rglob("*.incomplete")
    assert 0 < (there := half.stat().st_size) < 25 * 2**20
    heard = Heard()
    result = fetch(wanted, heard)
    assert result == {"base": "ann/base", "bytes": 25 * 2**20 + 2}
    assert _Answers.ranges == ["", f"bytes={there}-"]
    done = [each for each, _, _ in heard.told]
    assert done == sorted(done) and done[-1] == result["bytes"]
    (file,) = (tmp_path / "cache").rglob("diffusion_pytorch_model.safetensors")
    assert file.read_bytes() == _Answers.files["unet/diffusion_pytorch_model.safetensors"]
    assert not list((tmp_path / "cache").rglob("evil.bin"))


def test_a_damaged_part_is_not_taken_and_the_next_try_begins_anew(mirror: str, tmp_path: Path) -> None:
    wanted = {"base": "ann/base", "endpoint": mirror}
    with pytest.raises(Cancelled):
        fetch(wanted, Heard(most=8))
    (half,) = (tmp_path / "cache").rglob("*.incomplete")
    half.write_bytes(b"x" * half.stat().st_size)
    with pytest.raises(ModelError, match="arrived damaged"):
        fetch(wanted, Heard())
    assert fetch(wanted, Heard())["bytes"] == 25 * 2**20 + 2


def test_what_a_hub_does_not_give_is_one_line(mirror: str) -> None:
    with pytest.raises(ModelError, match="ann/none: the hub did not give it") as caught:
        fetch({"base": "ann/none", "endpoint": mirror}, Heard())
    assert "\n" not in str(caught.value)
    del _Answers.files["model_index.json"]
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        fetch({"base": "ann/base", "endpoint": mirror}, Heard())
