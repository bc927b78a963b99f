"""The form's settings as a whole: presets, TOML and other trainers' settings put into it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from sdlora_ui.forms import from_config, settings, to_values
from sdlora_ui.setting_files import MOST_CHARS, as_toml, from_text, keep_form, with_preset
from sdlora_ui.tabs import fill_form

from sdlora.config.presets import find_preset, presets
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, OutputError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDLORA_CONFIG_FOLDER", str(tmp_path / "config"))


def form(**values: Any) -> dict[str, Any]:
    given = {key.replace("__", "."): value for key, value in values.items()}
    return from_config(Config().with_values(given))


def test_a_preset_fills_the_form_and_says_what_it_changed() -> None:
    raw = form(data__folder=Path("images"), adapter__rank=8, training__steps=70)
    filled = with_preset(raw, "detailed-subject")
    values = to_values(filled.raw)
    assert values["adapter.rank"] == 32 and float(values["adapter.alpha"]) == 64
    assert values["adapter.targets"] == "all" and values["training.steps"] == 70
    assert values["output.presets"] == ("detailed-subject",) and values["data.folder"] == "images"
    cells = re.sub("<span translate='no'>|</span>", "", filled.html)
    assert "<td>8</td><td>32</td>" in cells and "<td>automatic</td><td>64.0</td>" in cells
    assert "Nothing had to change" in with_preset(filled.raw, "detailed-subject").html


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.toml")))
def test_the_form_gives_what_the_command_line_takes_from_a_preset(name: str) -> None:
    config = load_config(values=to_values(with_preset(form(), name).raw))
    for key, value in find_preset(name).values().items():
        if key != "model.base":  # chosen on its own control
            assert config.get(key) == value


def test_the_form_as_toml_and_back_is_the_same_form() -> None:
    raw = form(
        data__folder=Path("my images"),
        data__trigger_word="zky",
        adapter__rank=8,
        adapter__block_ranks={"mid_block": 2},
        sample__prompts=("a cat", 'a "dog"'),
        optimizer__betas=(0.9, 0.95),
        training__gradient_checkpointing=True,
    )
    text = as_toml(raw)
    assert tomllib.loads(text)["adapter"] == {"rank": 8, "block_ranks": {"mid_block": 2}}
    again = from_text(form(), text)
    assert again.raw == raw
    assert from_text(raw, text).html.count("<tr>") == 0


def test_a_text_makes_the_rest_automatic_but_keeps_what_is_trained() -> None:
    raw = form(data__folder=Path("images"), output__name="mine", adapter__rank=8)
    filled = from_text(raw, "[training]\nsteps = 5\n").raw
    assert to_values(filled) == {"data.folder": "images", "output.name": "mine", "training.steps": 5}


def test_a_command_line_of_another_trainer_is_taken_with_its_account() -> None:
    command = "accelerate launch train_network.py --network_dim=8 --network_alpha=4 --max_train_steps=30"
    command += " --mystery=1"
    filled = from_text(form(data__folder=Path("images")), command)
    values = to_values(filled.raw)
    assert (values["adapter.rank"], float(values["adapter.alpha"]), values["training.steps"]) == (8, 4.0, 30)
    assert "mystery" in filled.html and "sdlora knows no setting like it" in filled.html


def test_other_trainers_files_are_recognised_by_their_text() -> None:
    kohya = 'network_module = "networks.lora"\nnetwork_dim = 12\nnetwork_alpha = 12\n'
    assert to_values(from_text(form(), kohya).raw)["adapter.rank"] == 12
    peft = '{"peft_type": "LORA", "r": 6, "lora_alpha": 6, "target_modules": ["to_q"]}'
    assert to_values(from_text(form(), peft).raw)["adapter.rank"] == 6


def test_no_file_that_a_text_names_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("what nobody may see\n", encoding="utf-8")
    command = f"train_network.py --network_module=networks.lora --sample_prompts={secret}"
    filled = from_text(form(), command)
    assert "nobody" not in filled.html and "nobody" not in str(filled.raw)
    data = tmp_path / "data.toml"
    data.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "nobody"\n', encoding="utf-8")
    filled = from_text(form(), f"train_network.py --network_module=networks.lora --dataset_config={data}")
    assert "nobody" not in filled.html and "nobody" not in str(filled.raw)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "paste a TOML file"),
        ("[adapter]\nrnak = 3\n", "rnak"),
        ("[adapter]\nrank = 0\n", "rank"),
        ("[adapter\nrank = 3\n", "line 1"),
        ("hello there", "neither sdlora's nor of a trainer"),
        ("[data]\nfollow_links = true\n", "command line only"),
        ("x" * (MOST_CHARS + 1), "longer than"),
    ],
)
def test_a_bad_text_is_one_clear_error(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_text(form(), text)


def test_the_form_is_kept_as_a_preset_without_what_is_trained() -> None:
    raw = form(data__folder=Path("images"), output__name="mine", adapter__rank=8)
    keep_form(raw, "wide")
    assert find_preset("wide").values() == {"adapter.rank": 8}
    assert [preset.name for preset in presets() if preset.users] == ["wide"]
    with pytest.raises(OutputError, match="of that name"):
        keep_form(raw, "wide")
    with pytest.raises(ConfigError, match="nothing to keep"):
        keep_form(form(data__folder=Path("images")), "none")


def test_a_visitor_neither_sees_nor_uses_nor_keeps_the_users_presets(tmp_path: Path) -> None:
    keep_form(form(adapter__rank=8), "private")
    with pytest.raises(ConfigError, match="there is no preset `private`"):
        with_preset(form(), "private", users=False)
    assert to_values(with_preset(form(), "style", users=False).raw)["adapter.targets"] == "linear"
    for local in (True, False):
        with gr.Blocks():
            filling = fill_form.build(local=local)
        names = {value for _, value in filling.preset.choices}
        assert ("private" in names, filling.keep is not None, "style" in names) == (local, local, True)


def test_every_setting_of_the_form_survives_the_text() -> None:
    assert {setting.key for setting in settings()} == from_text(form(), "[training]\nsteps = 5\n").raw.keys()
