"""A server on folders of its own, as a process or in this one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE, wait_for
from processes import end_marked, new_mark, with_mark

pytest.importorskip("gradio", reason="the web UI is not installed: pip install -e '.[ui]'")

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Server:
    """``sdlora ui`` as a process."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]
    mark: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: object = None, headers: dict[str, str] | None = None, raw: bool = False
    ) -> Any:
        """Return the JSON (or the bytes) of an answer; raises HTTPError on a refusal."""
        given = {"Content-Type": "application/json", "X-Sdlora": "1"} if body is not None else {}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, given | (headers or {}))
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            text = answer.read()
        return text if raw else json.loads(text)

    def status(self, path: str, body: object = None, headers: dict[str, str] | None = None) -> int:
        """Return only the status of an answer."""
        try:
            self.ask(path, body, headers, raw=True)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def kill(self) -> None:
        """End the server's process at once, as a crash would."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """End the server and all that it started: its worker, and the jobs that outlive it."""
        end_marked(self.mark)
        self.process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(home: Path, *arguments: str, port: int | None = None) -> Server:
    """Start ``sdlora ui`` in ``home`` and wait for its page."""
    port = port or free_port()
    mark = new_mark()
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdlora", "ui", "--no-browser", "--port", str(port), *arguments],
            cwd=home,
            env={
                **with_mark(mark),
                "XDG_CONFIG_HOME": str(home / "settings"),
                "HF_HUB_CACHE": str(home / "hub"),
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            },
            stdout=log,
            stderr=log,
        )
    server = Server(home, port, process, mark)
    try:
        wait_for(lambda: process.poll() is not None or serves(server), "the server's page")
        assert process.returncode is None, f"it did not start: {(home / 'server.log').read_text()}"
    except BaseException:
        server.end()
        raise
    return server


def serves(server: Server) -> bool:
    """Tell whether a server answers."""
    try:
        urllib.request.urlopen(f"{server.url}/sdlora/jobs", timeout=PATIENCE).close()
    except urllib.error.HTTPError as error:
        problem = error.read().decode("utf-8", "replace")
        assert "Traceback" not in problem, problem
        return error.code == 401  # it wants its password
    except OSError:
        return False
    return True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A running server on a new home."""
    home = tmp_path / "home"
    home.mkdir()
    running = start_server(home)
    yield running
    running.end()


@pytest.fixture
def wait() -> Callable[[Callable[[], Any]], Any]:
    """A function that waits for something to become true and returns it."""

    def until(ready: Callable[[], Any]) -> Any:
        def value() -> Any:
            try:
                return ready()
            except Exception as error:
                # the page replaced it between finding and reading (selenium may not be installed here)
                if type(error).__name__ != "StaleElementReferenceException":
                    raise
                return None

        return wait_for(value)

    return until
