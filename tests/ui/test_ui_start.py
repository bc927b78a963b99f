"""Whether `sdlora ui` opens the browser by itself."""

from __future__ import annotations

import sys

import pytest
from sdlora_ui.start import on_a_desktop


@pytest.mark.parametrize(
    ("system", "host", "environment", "wanted"),
    [
        ("linux", "127.0.0.1", {"DISPLAY": ":0"}, True),
        ("linux", "localhost", {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("linux", "127.0.0.1", {}, False),
        ("linux", "0.0.0.0", {"DISPLAY": ":0"}, False),
        ("linux", "127.0.0.1", {"DISPLAY": ":10.0", "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"}, False),
        ("linux", "127.0.0.1", {"DISPLAY": ":99", "CI": "true"}, False),
        ("win32", "127.0.0.1", {}, True),
        ("win32", "0.0.0.0", {}, False),
        ("darwin", "::1", {}, True),
        ("darwin", "127.0.0.1", {"SSH_TTY": "/dev/ttys001"}, False),
    ],
)
def test_the_browser_opens_where_somebody_sits_before_it(
    system: str, host: str, environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_TTY", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert on_a_desktop(host) is wanted
