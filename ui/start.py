"""What ``sdlora ui`` does: determine the folders, print where the page is, serve it."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import webbrowser
from collections.abc import Iterable
from pathlib import Path

from sdlora.errors import ConfigError

from .app import refuse_open_door, serve
from .server.allowed_paths import AllowedPaths, usual_model_folders
from .server.passwords import new_passphrase

_LOCAL = ("127.0.0.1", "::1", "localhost")


def on_a_desktop(host: str) -> bool:
    """Return whether somebody sits in front of a page that only this machine can reach.

    There must be a display (X11 or Wayland; macOS and Windows have one), and no SSH session.
    """
    if host not in _LOCAL or any(os.environ.get(name) for name in ("SSH_CONNECTION", "SSH_TTY", "CI")):
        return False
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def start(
    *,
    runs: Path,
    images: Path,
    data: Path,
    allowed: Iterable[Path] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
    browser: bool | None = None,
) -> None:
    """Serve the page until interrupted.

    When only this machine can reach the page, the model folders of a WebUI or ComfyUI in the home folder may
    be read without being named; when others can reach it, only named folders. Others need a password; where
    none is given, one is generated and printed.

    Args:
        browser: whether the page is opened in the browser here; if None, :func:`on_a_desktop` decides.

    Raises:
        ConfigError: without Gradio, for a short password, or a port in use.
        PathRefused: when a folder given with ``--allow`` does not exist.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('the web UI needs Gradio; run: pip install "sdlora[ui]"')
    made_up = host not in _LOCAL and not password
    password = new_passphrase() if made_up else password
    refuse_open_door(host, password)
    models = usual_model_folders() if host in _LOCAL else []
    folders = {"runs": runs, "images": images, "data": data}
    paths = AllowedPaths.of(Path.cwd(), **folders, allowed=allowed, models=models, local=host in _LOCAL)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    lines = [f"sdlora is at {url} (Ctrl-C ends the page; running jobs continue)"]
    lines += [f"  may read and write {folder}" for folder in paths.roots]
    lines += [f"  may read {folder}" for folder in paths.models]
    if host not in _LOCAL:
        lines.append("  others can reach it over plain HTTP: the password is not encrypted on the way")
    if made_up:
        lines.append(f"  password of this session: {password}")
    print("\n".join(lines), file=sys.stderr, flush=True)
    if on_a_desktop(host) if browser is None else browser:
        threading.Timer(0.7, webbrowser.open, (url,)).start()
    serve(paths, host=host, port=port, password=password)
