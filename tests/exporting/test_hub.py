"""Adapters to and from a hub: a stand-in that speaks its protocol, on this machine alone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.config.toml import load_config, save_config
from sdlora.errors import AdapterFileError, ModelError, OutputError
from sdlora.exporting.publish import publish
from sdlora.families.locating import locate
from sdlora.families.sd1 import StableDiffusion1
from sdlora.formats.adapter_files import OpenAdapter, write_adapter
from sdlora.formats.hub_adapters import locate_adapter
from sdlora.run_folder import RunFolder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name -> file -> bytes; what was asked for, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in self.server.repos:
                self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                return
            files = self.server.repos[repo]
            siblings = [{"rfilename": name} for name in sorted(files)]
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
            self._json(tree if "tree" in parts else {"id": repo, "sha": COMMIT, "siblings": siblings})
            return
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        data = self.server.repos.get(repo, {}).get(name)
        if data is None:
            self._send(404, b"", X_Error_Code="EntryNotFound")
            return
        self._send(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"POST {self.path.partition('?')[0]}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Unauthorized"}, 401)
        elif self.path.startswith("/api/validate-yaml"):
            self._json({"errors": [], "warnings": []})
        elif self.path.startswith("/api/repos/create"):
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            self.server.repos.setdefault(repo, {})
            self._json({"url": f"{self.server.address}/{repo}", "name": repo})
        elif "/preupload/" in self.path:
            files = [
                {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        else:
            repo = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repos[repo][line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            url = f"{self.server.address}/{repo}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the only one, with an empty cache."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small adapter file with a trigger word and a licence."""
    key = ModuleKey("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    generator = torch.Generator().manual_seed(0)
    pair = LowRankPair(
        torch.randn((2, 320), generator=generator), torch.randn((320, 2), generator=generator), 2.0
    )
    entries = {
        "modelspec.license": "MIT",
        "ss_steps": "150",
        "ss_network_dim": "2",
        "ss_sd_model_name": "mini",
    }
    info = AdapterInfo(family="sd1", name="ink", metadata=entries)
    file = tmp_path_factory.mktemp("adapter") / "ink.safetensors"
    write_adapter(
        AdapterFile(AdapterWeights({key: pair}), info), "webui", file, torch.float32, StableDiffusion1.info
    )
    return file


def test_an_adapter_comes_from_the_hub_once_and_then_from_the_cache(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["ann/ink"] = {"ink.safetensors": adapter.read_bytes(), "ink.ckpt": b"code", "README.md": b"x"}
    file, name = locate_adapter(Path("ann/ink"))
    assert name == "ink" and file.read_bytes() == adapter.read_bytes()
    assert not [line for line in hub.asked if "ckpt" in line or "README" in line]
    assert OpenAdapter(file).read().weights.pairs.keys() == OpenAdapter(adapter).read().weights.pairs.keys()
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate_adapter(Path("ann/ink")) == (file, "ink") and len(hub.asked) == asked


def test_a_base_comes_from_the_hub_without_what_is_not_read_and_then_from_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    hub.repos["ann/base"] = {name: name.encode() for name in [*wanted, "unet/model.bin", "base.ckpt"]}
    folder = locate("ann/base")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == wanted
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.repos.clear()
    assert locate("ann/base") == folder
    with pytest.raises(ModelError, match="ann/none"):
        locate("ann/none")


def test_of_several_files_one_must_be_named(hub: Hub, adapter: Path) -> None:
    data = adapter.read_bytes()
    hub.repos["ann/two"] = {"a.safetensors": data, "b.safetensors": data}
    with pytest.raises(AdapterFileError, match=r"holds 2 .safetensors files; name one: ann/two/FILE \(a.saf"):
        locate_adapter(Path("ann/two"))
    file, name = locate_adapter(Path("ann/two/b.safetensors"))
    assert name == "b" and file.name == "b.safetensors"
    hub.repos["ann/peft"] = {"adapter_model.safetensors": data, "adapter_config.json": b"{}", "x.bin": b""}
    folder, _ = locate_adapter(Path("ann/peft"))
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    hub.repos["ann/base"] = {"model_index.json": b"{}", "unet/x.safetensors": data}
    with pytest.raises(AdapterFileError, match=r"holds a base model.*--base"):
        locate_adapter(Path("ann/base"))


def test_what_the_hub_does_not_give_is_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AdapterFileError, match=r"ann/none: neither a path here.*no such repository") as error:
        locate_adapter(Path("ann/none"))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterFileError, match="HF_HUB_OFFLINE is set"):
        locate_adapter(Path("ann/none"))
    missing = tmp_path / "a" / "ink"
    assert locate_adapter(missing) == (missing, None)


def test_an_adapter_is_published_with_its_card_and_comes_back(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = publish(adapter, "ann/ink", dry_run=True, strength=0.8)
    assert hub.asked == [] and shown.address is None and shown.files == ("README.md", "ink.safetensors")
    for line in ("license: mit", "# ink", "| steps | 150 |", "| rank | 2 |", "<lora:ink:0.8>", "ann/ink:0.8"):
        assert line in shown.card, line
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sent = publish(adapter, "ann/ink", strength=0.8)
    assert sent.address == f"{hub.address}/ann/ink" and sent.card == shown.card
    assert hub.repos["ann/ink"]["README.md"].decode() == shown.card
    file, _ = locate_adapter(Path("ann/ink"))
    mine, back = (OpenAdapter(path).read() for path in (adapter, file))
    for key, pair in mine.weights.pairs.items():
        torch.testing.assert_close(back.weights.pairs[key].delta(), pair.delta(), rtol=1e-3, atol=1e-3)
    assert back.info.metadata["sdlora.preferred_strength"] == "0.8"


def test_the_card_of_a_run_shows_its_last_previews_and_links_its_base(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    values = {
        "model.base": "ann/base",
        "output.name": "ink",
        "output.folder": run.path,
        "output.license": "MIT",
    }
    prompts = ["sample.prompts=['a cat | on *paper*', 'a dog --s 3']", "sample.prompt_options=true"]
    run.samples.mkdir(parents=True)
    save_config(load_config(None, prompts, values), run.config_file)
    shutil.copyfile(adapter, run.adapter_file("ink"))
    for step, number, colour in ((1, 1, "red"), (2, 1, "green"), (2, 2, "blue")):
        Image.new("RGB", (8, 8), colour).save(run.preview(step, number))
    shown = publish(run.path, "ann/ink", dry_run=True)
    assert shown.files == ("README.md", "images/1.png", "images/2.png", "ink.safetensors") and hub.asked == []
    head = shown.card.split("---")[1]
    assert "base_model: ann/base" in head and "- text: a dog" in head and "--s 3" not in shown.card
    assert "![a cat \\| on \\*paper\\*](images/1.png)" in shown.card
    hidden = publish(run.path, "ann/ink", dry_run=True, private=True)
    assert "a cat" not in hidden.card and "images/1.png" in hidden.card


@pytest.mark.slow
def test_nothing_is_published_without_a_token_or_over_what_is_there(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match=r"nothing was published.*hf auth login"):
        publish(adapter, "ann/ink", strength=0.8)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert publish(adapter, "ann/ink").address
    with pytest.raises(OutputError, match=r"holds README.md, ink.safetensors already; --overwrite"):
        publish(adapter, "ann/ink")
    assert publish(adapter, "ann/ink", overwrite=True).address


def test_without_a_network_that_is_said(adapter: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OutputError, match=r"http://127.0.0.1:9 cannot be reached: check the network"):
        publish(adapter, "ann/ink")
    assert huggingface_hub.constants.ENDPOINT.endswith(":9")


@pytest.mark.long
def test_a_mirror_named_in_the_environment_is_the_hub(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT is read when a process starts, so these are processes of their own, nothing set inside."""
    hub.repos["ann/ink"] = {"ink.safetensors": adapter.read_bytes()}
    hub.repos["ann/base"] = {"model_index.json": b"{}", "unet/config.json": b"{}"}
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    environment.pop("HF_HUB_CACHE", None)
    code = (
        "from pathlib import Path; from sdlora.formats.hub_adapters import locate_adapter; "
        "from sdlora.families.locating import locate; "
        "print(locate_adapter(Path('ann/ink'))[0]); print(locate('ann/base'))"
    )

    def answer(*words: str) -> str:
        ended = subprocess.run(
            [sys.executable, *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        return ended.stdout

    file, base = map(Path, answer("-c", code).splitlines())
    assert file.read_bytes() == adapter.read_bytes() and file.is_relative_to(tmp_path / "home")
    assert (base / "unet" / "config.json").is_file()
    shown = answer("-m", "sdlora", "publish", str(adapter), "--to", "ann/new")
    assert f"{hub.address}/ann/new" in shown
    assert {"ink.safetensors", "README.md"} <= hub.repos["ann/new"].keys()
