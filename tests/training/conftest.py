"""Settings of short runs on the tiny base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdlora.config.schema import Config
from sdlora.config.toml import load_config

RunSettings = Callable[[str, Sequence[str], Sequence[str], Mapping[str, Any]], Config]


@pytest.fixture
def run_settings(tiny_base: Path, tmp_path: Path) -> RunSettings:
    """Make the settings of a run: what is usual, but for what is given, and all folders of the test's own.

    The function takes the run's name, the usual ``key=value`` texts, those given, and ready values.
    """

    def make(run: str, usual: Sequence[str], given: Sequence[str], values: Mapping[str, Any]) -> Config:
        chosen = {text.partition("=")[0] for text in given}
        left = [text for text in usual if text.partition("=")[0] not in chosen]
        places = {
            "model.base": str(tiny_base),
            "output.folder": tmp_path / run,
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, [*left, *given], {**places, **values})

    return make
