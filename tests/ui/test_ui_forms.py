"""The form is made from the settings' schema, and says exactly what the schema can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from sdlora_ui.forms import SECTION_TITLES, control, from_config, settings, to_values
from sdlora_ui.server.allowed_paths import AllowedPaths, PathRefused
from sdlora_ui.server.png_import import from_parameters
from sdlora_ui.settings import checked_base, checked_config
from sdlora_ui.tabs.shared import told

from sdlora.config.schema import Config, fields, names_files
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError


def test_every_setting_has_a_control_with_label_and_help() -> None:
    all_settings = settings()
    assert [setting.key for setting in all_settings] == [key for key, _ in fields()]
    assert {setting.key.partition(".")[0] for setting in all_settings} == set(SECTION_TITLES)
    with gr.Blocks(analytics_enabled=False):
        for setting in all_settings:
            shown = control(setting)
            assert shown.label and shown.info and shown.elem_id.startswith("set-")


def test_ranges_and_defaults_are_told() -> None:
    known = {setting.key: setting for setting in settings()}
    assert "From 1 to 1024." in known["adapter.rank"].help
    assert "Above 0." in known["optimizer.learning_rate"].help
    assert "Default: 0.05." in known["data.caption_dropout"].help
    assert known["adapter.rank"].optional and not known["training.seed"].optional


def test_an_untouched_form_says_nothing() -> None:
    assert to_values(from_config(Config())) == {}


def test_every_setting_survives_the_form() -> None:
    given: dict[str, Any] = {
        "model.base": "mini",
        "model.clip_skip": 2,
        "data.folder": Path("/tmp/x"),
        "data.flip": True,
        "data.caption_dropout": 0.2,
        "adapter.targets": "all",
        "adapter.rank": 8,
        "optimizer.betas": (0.8, 0.95),
        "optimizer.learning_rate": 2e-5,
        "sample.prompts": ("a cat, sitting", "a dog"),
        "output.name": "x",
    }
    config = load_config(values=given)
    assert load_config(values=to_values(from_config(config))) == config


def test_no_previews_is_an_empty_list() -> None:
    assert to_values({"sample.prompts": "[]"}) == {"sample.prompts": ()}
    assert to_values({"sample.prompts": " "}) == {}


def test_an_empty_number_is_open_and_a_word_is_no_number() -> None:
    assert to_values({"adapter.rank": "", "training.epochs": None}) == {}
    assert to_values({"adapter.rank": "8", "optimizer.learning_rate": "2e-5"}) == {
        "adapter.rank": 8,
        "optimizer.learning_rate": 2e-5,
    }
    with pytest.raises(ConfigError, match=r"adapter.rank=eight.*whole number"):
        to_values({"adapter.rank": "eight"})


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.betas=oops"):
        to_values({"optimizer.betas": "oops"})


@pytest.fixture
def paths(tmp_path: Path) -> AllowedPaths:
    (tmp_path / "images").mkdir()
    return AllowedPaths.of(tmp_path, runs=Path("runs"), images=Path("out"), data=Path("images"))


def test_a_checked_config_has_absolute_places(paths: AllowedPaths) -> None:
    config = checked_config(paths, {"data.folder": "images", "output.name": " my style "})
    assert config.data.folder == paths.data
    assert config.output.folder == paths.runs / "my style"


@pytest.mark.parametrize(
    "raw",
    [
        {"data.folder": "/etc"},
        {"data.folder": "images", "output.folder": "/tmp/elsewhere"},
        {"data.folder": "images", "data.cache_folder": "../cache"},
        {"data.folder": "images", "model.base": "/etc/passwd"},
        {"data.folder": "images", "model.base": "../base.safetensors"},
        {"data.folder": "images", "data.validation": "/etc"},
    ],
)
def test_settings_with_a_path_outside_are_refused(paths: AllowedPaths, raw: dict[str, str]) -> None:
    with pytest.raises(PathRefused):
        checked_config(paths, raw)


def test_links_out_of_a_folder_are_not_followed_for_a_browser(paths: AllowedPaths) -> None:
    with pytest.raises(ConfigError, match="command line only"):
        checked_config(paths, {"data.folder": "images", "data.follow_links": True})


def file_settings() -> list[str]:
    """Return every setting that can name a file, found in the schema."""
    keys = []
    for key, field in fields():
        in_tables = "folder" in str(field.annotation).lower() or "SourceConfig" in str(field.annotation)
        if names_files(field) or "Path" in str(field.annotation) or in_tables:
            keys.append(key)
    return keys


def test_the_schema_knows_which_settings_name_files() -> None:
    assert {"model.base", "model.vae", "data.folder", "adapter.from_file", "output.folder"} <= set(
        file_settings()
    )
    assert len(file_settings()) >= 8
    texts = {key for key, field in fields() if "str" in str(field.annotation)} - set(file_settings())
    assert not [key for key in texts if key.endswith(("file", "folder", "base", "vae", "path", "model"))]


@pytest.mark.parametrize("key", file_settings())
@pytest.mark.parametrize("outside", ["/etc/passwd", "../outside.safetensors", r"\\\\server\\share\\x"])
def test_no_setting_that_names_a_file_gets_past_the_allowed_folders(
    paths: AllowedPaths, key: str, outside: str
) -> None:
    written = f"[{{folder = '{outside}'}}]" if key == "data.sources" else outside
    with pytest.raises(PathRefused, match="outside the folders"):
        checked_config(paths, {"data.folder": "images", "output.name": "a", key: written})


def test_contradictions_are_refused_before_the_start(paths: AllowedPaths) -> None:
    with pytest.raises(ConfigError, match="both fix the length"):
        checked_config(paths, {"data.folder": "images", "training.steps": 5, "training.epochs": 2})


def test_a_hub_id_is_a_base_but_a_folder_of_that_name_must_be_allowed(paths: AllowedPaths) -> None:
    assert checked_base(paths, "someone/a-model") == "someone/a-model"
    (paths.home / "someone" / "a-model").mkdir(parents=True)
    with pytest.raises(PathRefused):
        checked_base(paths, "someone/a-model")


def test_a_base_that_is_not_there_is_refused(paths: AllowedPaths) -> None:
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        checked_base(paths, "images/model.safetensors")
    with pytest.raises(PathRefused):  # a file's name is not a hub id
        checked_base(paths, "someone/model.safetensors")


def test_settings_come_back_from_an_images_text() -> None:
    sent = from_parameters(
        {
            "Prompt": "a cat <lora:style:0.8> <lora:other:0.3:0.7>",
            "Negative prompt": "dog",
            "Steps": "12",
            "Sampler": "DPM++ 2M",
            "Schedule type": "Karras",
            "CFG scale": "4.5",
            "Seed": "7",
            "Size": "64x96",
            "Model": "sd15",
        }
    )
    assert (sent.prompt, sent.negative, sent.seed, sent.steps) == ("a cat", "dog", 7, 12)
    assert (sent.width, sent.height, sent.guidance) == (64, 96, 4.5)
    assert (sent.sampler, sent.model) == ("DPM++ 2M Karras", "sd15")
    assert sent.adapters == (("style", 0.8, 0.8), ("other", 0.7, 0.3))


def test_a_strange_images_text_sets_only_what_it_says() -> None:
    sent = from_parameters({"Prompt": "x <lora:broken:high>", "Sampler": "unheard of", "Size": "big"})
    assert (sent.prompt, sent.sampler, sent.width, sent.adapters) == ("x", None, None, ())


def test_a_table_of_blocks_is_shown_and_read_on_one_line() -> None:
    config = load_config(None, ['adapter.block_ranks={"down_blocks.1" = 4, mid_block = 0}'])
    shown = from_config(config)
    assert shown["adapter.block_ranks"] == '{ "down_blocks.1" = 4, mid_block = 0 }'
    assert shown["optimizer.block_rates"] == ""
    assert to_values(shown)["adapter.block_ranks"] == {"down_blocks.1": 4, "mid_block": 0}
    assert "optimizer.block_rates" not in to_values(shown)


@pytest.mark.parametrize("message", ["", "[" * 5000, "[1]", "{}", "null", '{"id": 1, "id": 2}', "9" * 5000])
def test_a_message_that_the_page_does_not_send_is_refused(message: str) -> None:
    assert told('{"id": "x"}', "id") == "x"
    with pytest.raises(ConfigError, match="reload"):
        told(message, "id")
