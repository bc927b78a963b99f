"""Adapters named in the page's prompt are found among those it lists, or that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from sdlora_ui.prompt_tags import with_tagged
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site

from sdlora.errors import ConfigError


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A page with the finished run `first` of the adapter `ink`, and an adapter in a WebUI's folder."""
    for parts in (
        ("runs", "first", "config.toml"),
        ("runs", "first", "ink.safetensors"),
        ("Lora", "oil.safetensors"),
    ):
        file = tmp_path.joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    folders = {name: Path(name) for name in ("runs", "images", "data")}
    return Site.open(AllowedPaths.of(tmp_path, **folders, allowed=[tmp_path / "Lora"]))


def test_an_adapter_in_the_prompt_joins_the_chosen_ones(site: Site, tmp_path: Path) -> None:
    chosen = {"file": "x", "denoiser": 1.0, "text": None}
    oil = {"file": str(tmp_path / "Lora" / "oil.safetensors"), "denoiser": 0.8, "text": 0.6}
    ink = {"file": str(tmp_path / "runs" / "first" / "ink.safetensors"), "denoiser": 1.0, "text": 1.0}
    assert with_tagged(site, "a cat <lora:oil:0.6:0.8>", "", [[chosen]]) == ("a cat", [[chosen, oil]])
    assert with_tagged(site, "<lora:ink> a cat", "", [[]]) == ("a cat", [[ink]])
    assert with_tagged(site, "<lora:first:1> a cat", "", [[], [chosen]]) == ("a cat", [[], [chosen, ink]])
    assert with_tagged(site, "a cat", "", [[], [chosen]]) == ("a cat", [[], [chosen]])


def test_one_that_the_page_does_not_list_is_an_error(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"<lora:clay>: there is no such adapter; looked in .*runs"):
        with_tagged(site, "a cat <lora:clay:1>", "", [[]])
    with pytest.raises(ConfigError, match="negative"):
        with_tagged(site, "a cat", "<lora:oil:1>", [[]])
