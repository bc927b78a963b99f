"""The settings files we ship: they load, stay small, and say nothing that is the default anyway."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.families.table import FAMILIES

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))


ANY_BASE = {"style", "subject", "detailed-subject", "small-file", "low-memory"}


def test_every_family_has_settings_for_a_style_and_a_subject_and_the_mini_base_its_own() -> None:
    wanted = {f"{family}-{goal}" for family in FAMILIES for goal in ("style", "subject")}
    assert {file.stem for file in CONFIGS} == {"mini-style", *wanted, *ANY_BASE}


def test_a_detailed_subject_has_alpha_at_twice_the_rank_on_all_layers() -> None:
    adapter = load_config(FOLDER / "detailed-subject.toml").adapter
    assert adapter.rank is not None and adapter.alpha == 2 * adapter.rank and adapter.targets == "all"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_settings_file_is_valid_short_and_holds_only_what_differs(file: Path) -> None:
    config = load_config(file)
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 25
    default = Config()
    keys = [f"{s}.{k}" for s, values in tomllib.loads(file.read_text("utf-8")).items() for k in values]
    assert keys
    same = [key for key in keys if config.get(key) == default.get(key) and key != "model.base"]
    assert same == []
