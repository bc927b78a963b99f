"""`sdlora presets` and `sdlora train --preset NAME`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sdlora.commands.cli import main
from sdlora.config.toml import load_config


@pytest.fixture(autouse=True)
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDLORA_CONFIG_FOLDER", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config" / "presets"


def test_the_list_is_the_same_from_both_commands(
    capsys: pytest.CaptureFixture[str], users_folder: Path
) -> None:
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert main(["train", "--preset", "list"]) == 0
    assert capsys.readouterr().out == listed
    assert "detailed-subject" in listed and str(users_folder) in listed


def test_a_preset_is_shown_and_kept(capsys: pytest.CaptureFixture[str], users_folder: Path) -> None:
    Path("mine.toml").write_text("# For maps\n[adapter]\nrank = 5\n", encoding="utf-8")
    assert main(["presets", "maps", "--save", "mine.toml"]) == 0
    assert main(["presets", "maps", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["values"] == {"adapter.rank": 5} and answer["file"] == str(users_folder / "maps.toml")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["presets", "stile"], "there is no preset `stile` (did you mean style?)"),
        (["presets", "--save", "x.toml"], "give the preset a name"),
        (["presets", "mine", "--save", "x.toml"], "x.toml: no such settings file"),
        (["train", "images", "--preset", "stile"], "there is no preset `stile` (did you mean style?)"),
        (["train", "--resume", "--output", "runs/x", "--preset", "style"], "leave --preset out"),
    ],
)
def test_mistakes_are_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    told = capsys.readouterr()
    assert complaint in told.err and told.err.count("\n") == 1


@pytest.mark.long
def test_a_run_takes_and_notes_its_presets(tiny_base: Path, image_folder: Callable[..., Path]) -> None:
    line = f"train {image_folder(3)} --preset style --preset small-file --base {tiny_base} --name x"
    settings = ["training.steps=1", "adapter.targets=attention", "judge.every=0", "sample.prompts=[]"]
    assert main([*line.split(), *settings]) == 0
    config = load_config(Path("runs/x/config.toml"))
    assert config.output.presets == ("style", "small-file")
    assert (config.data.caption_dropout, config.adapter.rank, config.adapter.targets) == (0.1, 4, "attention")
    assert main(["train", "--resume", "--output", "runs/x"]) == 0  # the noted presets are not read again
    assert load_config(Path("runs/x/config.toml")) == config
