"""What is said of a setting that cannot be: the next try succeeds."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from sdlora.config.advice import as_setting, nearest_settings
from sdlora.config.schema import Config, fields
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError


def refused(*overrides: str, text: str | None = None, tmp_path: Path | None = None) -> str:
    file = None
    if text is not None and tmp_path is not None:
        file = tmp_path / "run.toml"
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.steps", ["training.steps"]),
        ("optimizer.lr", ["optimizer.learning_rate"]),
        ("training.learning_rate", ["optimizer.learning_rate"]),
        ("lr", ["optimizer.learning_rate"]),
        ("rank", ["adapter.rank"]),
        ("lora.rank", ["adapter.rank"]),
        ("network_dim", ["adapter.rank"]),
        ("network.dim", ["adapter.rank"]),
        ("network_alpha", ["adapter.alpha"]),
        ("max_train_steps", ["training.steps"]),
        ("training.train_batch_size", ["training.batch_size"]),
        ("model.resolution", ["data.resolution"]),
        ("data.trigger", ["data.trigger_word"]),
        ("samples.prompts", ["sample.prompts"]),
        ("steps", ["training.steps", "sample.steps"]),
        ("seed", ["training.seed", "sample.seed"]),
        ("sampling.seed", ["sample.seed"]),
        ("output.dir", ["output.folder"]),
        ("training.stepz", ["training.steps"]),
        ("zzzzzz.qqqqqq", []),
    ],
)
def test_the_nearest_setting_is_found_across_sections(wrong: str, meant: list[str]) -> None:
    assert nearest_settings(wrong) == meant
    if "." in wrong:
        text = refused(f"{wrong}=3")
        assert [key for key in meant if f"`{key}`" not in text] == []


def test_an_option_that_is_a_setting_is_told_as_one() -> None:
    assert "optimizer.learning_rate=1e-4" in as_setting("--lr", "1e-4")
    assert "training.batch_size=2" in as_setting("--train-batch-size", "2")
    assert as_setting("--qqqqqq", "2") == ""


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output.name=2024", "2024"),
        ("output.name=2024-05-01", "2024-05-01"),
        ("output.name=true", "true"),
        ("output.name=1e3", "1e3"),
        ("output.description=12:30:00", "12:30:00"),
        ("data.trigger_word=007", "007"),
        ("data.folder=2024", Path("2024")),
        ("data.cache_folder=1979-05-27", Path("1979-05-27")),
        ("model.base=1.5", "1.5"),
        (r'data.folder="C:\Users\me"', Path(r"C:\Users\me")),
        (r"data.folder=C:\Users\new", Path(r"C:\Users\new")),
    ],
)
def test_on_a_command_line_a_text_needs_no_quotes(override: str, value: object) -> None:
    assert load_config(None, [override]).get(override.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[output]\nname = 2024", 'a number where a text is meant; put it in quotes: name = "2024"'),
        (
            "[output]\nname = 2024-05-01",
            'a date or time where a text is meant; put it in quotes: name = "2024-05-01"',
        ),
        ("[output]\nname = true", 'put it in quotes: name = "true"'),
        ("[data]\nfolder = 5", 'put it in quotes: folder = "5"'),
        ('[training]\nsteps = "many"', "whole number"),
        ("[training]\nsteps = true", "a number is meant"),
        ("[training]\nsteps = 2024-05-01", "whole number"),
        ("[optimizer]\nbetas = [true, 0.9]", "a number is meant"),
        ("[adapter]\nblock_ranks = { mid_block = true }", "a number is meant"),
        ("[data]\nvalidation = true", "a number is meant"),
        ('[sample]\nprompts = "a cat"', 'write prompts = ["a cat"]'),
        ("[data]\nmore_resolutions = 512", "write more_resolutions = [512]"),
        ("[data]\nflip = True", "small letters: flip = true"),
        ('[data]\nfolder = "C:\\Users\\me"', "single quotes: folder = 'C:\\Users\\me'"),
        ('[data]\nfolder = "D:\\data\\x1"', "single quotes: folder = 'D:\\data\\x1'"),
        ('[data]\nfolder = "C:\\new\\table"', "between single quotes"),
        ("[data]\nfolder = C:\\data", "texts stand in quotes: folder = 'C:\\data'"),
        ("[data]\nfolder = /home/me", "texts stand in quotes: folder = '/home/me'"),
        ("training = 5", "write [training]"),
        ('[data]\nflip = "maybe"', "must be true or false"),
        ("network_dim = 8\nnetwork_alpha = 4", "sdlora import"),
        ('{"training": {"steps": 3}}', "is JSON, and settings are TOML"),
        ('[[data.sources]]\nfolder = ""', "is empty"),
        ("[[data.sources]]\nfolder = 'x'\nwieght = 1", "did you mean `weight`?"),
        ("lr = 1e-4", "did you mean `optimizer.learning_rate`?"),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_file_is_shown_as_it_should_be(
    line: str, words: str, tmp_path: Path
) -> None:
    assert words in refused(text=line, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sample.prompts=a cat", """sample.prompts='["a cat"]'"""),
        ("sample.prompts=[a cat, a dog]", """sample.prompts='["a cat", "a dog"]'"""),
        ("sample.prompts=a cat,a dog", """sample.prompts='["a cat", "a dog"]'"""),
        ("optimizer.betas=0.9,0.99", "optimizer.betas='[0.9,0.99]'"),
        ("data.more_resolutions=512", "data.more_resolutions='[512]'"),
        ("adapter.block_ranks=mid_block=4", "is a table"),
        ("data.sources=x", "[[data.sources]]"),
        ("optimizer.learning_rate=1,5e-4", "write 1.5e-4, with a point"),
        ("training.steps=10,000", "write 10000"),
        ("training.steps=10,5", "whole number (integer)"),
        ("training.steps=", "is empty; give a value"),
        ("training.steps=true", "a number is meant"),
        ("training.steps=ten", "integer"),
        ("data.validation=-1", "0 or more, or a folder"),
        ("data.validation=", "is empty"),
    ],
)
def test_on_a_command_line_it_is_shown_how_to_write_it(override: str, words: str) -> None:
    assert words in refused(override)


PATHS = [key for key, field in fields() if "Path" in str(field.annotation) and key != "data.sources"]


def test_every_path_is_expanded_and_none_may_be_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert len(PATHS) >= 5
    for key in (*PATHS, "model.base", "model.vae"):
        config = load_config(None, (), {"data.folder": tmp_path, key: "~/x"})
        assert Path(config.get(key)) == tmp_path / "x", key
        assert (
            Path(Config().with_values({key: Path("~/x") if key in PATHS else "~/x"}).get(key))
            == tmp_path / "x"
        )
        assert "is empty" in refused(f"{key}="), key
    file = tmp_path / "run.toml"
    file.write_text("[[data.sources]]\nfolder = '~/a'\nmask_folder = '~/b'\n", encoding="utf-8")
    (source,) = load_config(file).data.sources
    assert (source.folder, source.mask_folder) == (tmp_path / "a", tmp_path / "b")


def test_a_name_that_is_no_file_name_is_refused() -> None:
    for name in ("..", "CON", "a:b", "a.", "\U0001f600" * 70):
        assert "output.name" in refused(f"output.name={name}")


def test_dates_are_texts_where_a_text_is_meant() -> None:
    assert load_config(None, [f"output.license={date(2024, 5, 1)}"]).output.license == "2024-05-01"
