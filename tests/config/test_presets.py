"""Presets: the program's and the user's, where they stand among other settings, and what they change."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from sdlora.config.presets import (
    differences,
    find_preset,
    keep_preset,
    own_folder,
    preset_values,
    presets,
    save_preset,
)
from sdlora.config.schema import Config
from sdlora.config.toml import load_config, save_config
from sdlora.errors import ConfigError, OutputError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDLORA_CONFIG_FOLDER", str(tmp_path / "config"))
    return tmp_path / "config"


def write_preset(name: str, text: str) -> Path:
    own_folder().mkdir(parents=True, exist_ok=True)
    file = own_folder() / f"{name}.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_every_file_of_configs_is_a_preset_that_says_what_it_is_for() -> None:
    listed = presets()
    assert {preset.name for preset in listed} == {file.stem for file in CONFIGS.glob("*.toml")}
    assert [preset.name for preset in listed[:3]] == ["style", "subject", "detailed-subject"]
    assert all(20 < len(preset.about) < 110 and not preset.users for preset in listed)


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.toml")))
def test_a_preset_holds_what_its_file_says(name: str) -> None:
    tree = tomllib.loads((CONFIGS / f"{name}.toml").read_text(encoding="utf-8"))
    expected = {
        f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()
    }
    assert find_preset(name).values() == expected


def test_the_users_file_of_a_name_takes_the_place_of_the_programs() -> None:
    write_preset("style", "# Mine\n[adapter]\nrank = 7\n")
    assert find_preset("style").values() == {"adapter.rank": 7}
    assert [(p.name, p.users) for p in presets()].count(("style", True)) == 1
    assert ("style", False) not in [(p.name, p.users) for p in presets()]


def test_a_preset_stands_over_the_file_and_under_the_command_line(tmp_path: Path) -> None:
    write_preset("mine", "[adapter]\nrank = 7\nalpha = 3\n[training]\nsteps = 9\n")
    file = tmp_path / "run.toml"
    file.write_text("[adapter]\nrank = 1\ndropout = 0.5\n", encoding="utf-8")
    config = load_config(file, ["adapter.alpha=5"], {"training.steps": 11}, presets=preset_values(["mine"]))
    assert (config.adapter.rank, config.adapter.alpha, config.training.steps) == (7, 5.0, 11)
    assert config.adapter.dropout == 0.5 and config.output.presets == ("mine",)


def test_of_several_presets_the_last_one_wins() -> None:
    write_preset("first", "[adapter]\nrank = 7\nalpha = 3\n")
    write_preset("second", "[adapter]\nrank = 8\n")
    values = preset_values(["first", "second"])
    assert (values["adapter.rank"], values["adapter.alpha"]) == (8, 3.0)
    assert values["output.presets"] == ("first", "second")


def test_an_unknown_name_is_one_line_with_the_list() -> None:
    with pytest.raises(ConfigError) as error:
        preset_values(["stile"])
    assert str(error.value).startswith("there is no preset `stile` (did you mean style?); there are style, ")
    assert "\n" not in str(error.value) and "low-memory" in str(error.value)


@pytest.mark.parametrize("name", ["../style", "/etc/passwd", "", "style.toml"])
def test_a_name_is_never_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no preset"):
        find_preset(name)


def test_a_users_file_that_is_no_preset_is_named() -> None:
    file = write_preset("broken", "[adapter]\nrnak = 7\n")
    with pytest.raises(ConfigError, match="rnak") as error:
        preset_values(["broken"])
    assert str(file) in str(error.value)


def test_a_preset_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        preset_values(["style", "style"])


def test_what_is_saved_is_a_preset_with_the_same_values_and_never_replaces_one() -> None:
    values = {
        "adapter.rank": 6,
        "sample.prompts": ("a cat", "a\ndog"),
        "adapter.block_ranks": {"mid_block": 2},
    }
    file = save_preset("mine", values, "For cats\nand dogs")
    assert find_preset("mine").values() == values and find_preset("mine").about == "For cats and dogs"
    before = file.read_bytes()
    with pytest.raises(OutputError, match="a preset of that name"):
        save_preset("mine", {"adapter.rank": 1}, "")
    assert file.read_bytes() == before


def test_a_bad_name_or_bad_settings_write_nothing(config_folder: Path) -> None:
    for name, values in (("a/b", {"adapter.rank": 6}), (" ", {}), ("x", {"adapter.rank": 0})):
        with pytest.raises(ConfigError):
            save_preset(name, values, "")
    assert not config_folder.exists()


def test_a_runs_settings_become_a_preset_without_what_is_of_that_run(tmp_path: Path) -> None:
    config = load_config(
        values={
            "data.folder": tmp_path,
            "data.trigger_word": "cat",
            "output.name": "cat",
            "model.base": str(tmp_path / "base.safetensors"),
            "adapter.rank": 6,
            "training.noise_offset": 0.1,
        }
    )
    save_config(config, tmp_path / "config.toml")
    keep_preset("like-cat", tmp_path / "config.toml")
    assert find_preset("like-cat").values() == {"adapter.rank": 6, "training.noise_offset": 0.1}


def test_differences_are_what_a_preset_changes() -> None:
    config = load_config(values={"adapter.rank": 32, "adapter.alpha": 1.0})
    changes = differences(config, find_preset("detailed-subject"))
    assert changes == {
        "adapter.targets": ("attention", "all"),
        "adapter.alpha": (1.0, 64),
        "training.gradient_accumulation": (1, 2),
        "sample.steps": (20, 25),
    }
    assert differences(Config(), find_preset("small-file")) == {"adapter.rank": (None, 4)}


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_folder_that_is_not_there_or_not_readable_has_no_presets(config_folder: Path) -> None:
    names = {preset.name for preset in presets()}
    config_folder.write_text("a file", encoding="utf-8")
    assert {preset.name for preset in presets()} == names
    with pytest.raises(OutputError, match="cannot be made"):
        save_preset("mine", {"adapter.rank": 6}, "")
