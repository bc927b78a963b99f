"""Settings: what is read, what is refused, and that everything wrong is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.config.schema import Config, fields
from sdlora.config.toml import load_config, save_config
from sdlora.errors import ConfigError


def problems_of(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def test_overrides_are_typed_values_or_plain_words() -> None:
    config = load_config(None, ["training.steps=40", "output.name=my-style", "sample.prompts=['a','b']"])
    assert (config.training.steps, config.output.name, config.sample.prompts) == (40, "my-style", ("a", "b"))


def test_command_line_wins_over_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[training]\nsteps = 10\nseed = 3\n", encoding="utf-8")
    config = load_config(file, ["training.steps=20"])
    assert (config.training.steps, config.training.seed) == (20, 3)


def test_every_problem_is_reported_at_once_with_the_nearest_name() -> None:
    text = problems_of(
        "training.stepz=3",
        "adapter.rank=0",
        "optimizer.schedule=cosin",
        "adapter.text_encoder_rank=4",
        "rank=4",
    )
    expected = [
        "did you mean `training.steps`",
        "adapter.rank=0",
        "did you mean cosine",
        "no effect without `adapter.text_encoder=true`",
        "did you mean `adapter.rank`",
    ]
    assert [part for part in expected if part not in text] == []
    assert text.startswith("5 problems")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("adapter.rank=0", "greater than or equal to 1"),
        ("adapter.alpha=0", "greater than 0"),
        ("optimizer.learning_rate=nan", "finite"),
        ("adapter.dropout=1", "less than 1"),
        ("data.caption_dropout=2", "less than or equal to 1"),
        ("training.device=gpu", "must be cpu, cuda, cuda:1 or mps"),
        ("output.name=a/b", "must not hold any of"),
        ("training.steps=many", "integer"),
        ("data.validation=2.5", "must be whole"),
    ],
)
def test_values_out_of_range_are_refused(override: str, reason: str) -> None:
    text = problems_of(override)
    assert reason in text
    assert override.partition("=")[0] in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.steps=10", "training.epochs=2"],
        ["optimizer.text_encoder_learning_rate=1e-5"],
        ["sample.prompts=[]", "sample.every=10"],
        ["data.validation=0", "training.validate_every=10"],
        ["training.steps=10", "optimizer.warmup_steps=10"],
    ],
)
def test_contradictions_and_settings_without_effect_are_refused(overrides: list[str]) -> None:
    key = overrides[-1].partition("=")[0]
    assert key in problems_of(*overrides)


def test_broken_or_missing_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    assert "no such settings file" in problems_of(file=file)
    file.write_text("[training\n", encoding="utf-8")
    assert "not valid TOML" in problems_of(file=file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in problems_of(file=file)


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    config = load_config(
        None,
        ["training.steps=7", "sample.prompts=['a \"quoted\" word']", "optimizer.betas=[0.8,0.9]"],
        {"data.folder": Path("some") / "where"},
    )
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


def test_every_setting_has_a_help_text() -> None:
    settings = dict(fields())
    assert len(settings) > 40
    assert [key for key, field in settings.items() if not field.description] == []


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "rung"),
    [
        (["training.gradient_checkpointing=true"], "blocks"),
        (["training.gradient_checkpointing=false"], "nothing"),
        (["training.gradient_checkpointing=true", "training.recompute=blocks"], "blocks"),
        (["training.recompute=gates"], "gates"),
        ([], None),
    ],
)
def test_the_old_switch_for_recomputed_blocks_is_a_rung(given: list[str], rung: str | None) -> None:
    config = load_config(None, given)
    assert config.training.recompute == rung and config.training.rung == (rung or "nothing")
    assert load_config(None, (), {"training.recompute": "norms"}).training.recompute == "norms"


def test_what_contradicts_a_rung_is_refused(tmp_path: Path) -> None:
    old = "training.gradient_checkpointing"
    with pytest.raises(ConfigError, match=r"old name of `recompute=blocks`, but `recompute` is norms"):
        load_config(None, [f"{old}=true", "training.recompute=norms"])
    with pytest.raises(ConfigError, match="old name of `recompute`, and true or false"):
        load_config(None, [f"{old}=sometimes"])
    with pytest.raises(ConfigError, match=r"`training.recompute_blocks` has no effect"):
        load_config(None, ["training.recompute_blocks=4"])
    file = tmp_path / "old.toml"
    file.write_text("[training]\ngradient_checkpointing = true\nsteps = 3\n", encoding="utf-8")
    assert load_config(file).training.recompute == "blocks"
