"""`sdlora import`: settings of other trainers, written as ours and told one by one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from sdlora.commands.cli import main
from sdlora.config.toml import load_config

COMMAND = (
    "accelerate launch train_network.py --pretrained_model_name_or_path=mini --train_data_dir=images "
    "--network_dim=8 --network_alpha=4 --learning_rate=1e-4 --max_train_steps=30 --mystery=1"
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_is_written_is_read_by_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", COMMAND, "--output", "run.toml"]) == 0
    config = load_config(Path("run.toml"))
    assert (config.adapter.rank, config.adapter.alpha, config.training.steps) == (8, 4.0, 30)
    assert config.data.folder == Path("images") and config.data.kohya_folders is True
    told = capsys.readouterr().out
    assert "mystery" in told and "sdlora knows no setting like it" in told
    assert "train with `sdlora train --config run.toml`" in told


def test_a_file_or_standard_input_does_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.bat").write_text(COMMAND, encoding="utf-8")
    assert main(["import", "train.bat"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(COMMAND))
    assert main(["import", "-", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path("train.sdlora.toml").read_text(encoding="utf-8") == Path("imported.sdlora.toml").read_text(
        encoding="utf-8"
    )
    assert answer["settings"]["adapter.rank"] == 8
    rows = {row["setting"]: row for row in answer["rows"]}
    assert rows["network_dim"] == {
        "setting": "network_dim",
        "value": "8",
        "outcome": "taken",
        "ours": "adapter.rank = 8",
        "reason": "",
    }


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([""], "the source is empty"),
        (["nothing.toml"], "nothing.toml: no such file"),
        (["."], "is a folder"),
        ([COMMAND, "--from", "nai"], "--from nai: sdlora reads kohya"),
        ([COMMAND, "--output", "here.toml"], "here.toml: exists already"),
        (["x " * 3000], "is of no trainer that sdlora reads"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("here.toml").write_text("mine", encoding="utf-8")
    assert main(["import", *words]) == 2
    told = capsys.readouterr()
    assert complaint in told.err and told.out == "" and told.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["here.toml"]
    assert Path("here.toml").read_text(encoding="utf-8") == "mine"
