"""The settings of a base are declared once: what the schema says reaches every flag, loader and check."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from sdlora.commands.cli import main
from sdlora.commands.flags import base_of, declare_base, declare_setting, settings_of
from sdlora.config import schema, toml
from sdlora.config.schema import Config, ModelConfig, fields
from sdlora.config.toml import load_config
from sdlora.data.check.outlook import examine_settings
from sdlora.errors import ConfigError
from sdlora.families.table import FAMILIES
from sdlora.generation.image_generator import ImageGenerator
from sdlora.training.train import train

Make = Callable[..., Path]


class TintedModel(ModelConfig):
    """A base of which one thing more can be said."""

    tint: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How much the base is tinted, 0 to 100 %."""


class TintedConfig(Config):
    """The program's settings with that base."""

    model: TintedModel = TintedModel()


@pytest.fixture
def tints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Add the setting; what each base is told of it from here on, with the device it was loaded for."""
    told: list[tuple[str, Any]] = []
    family: Any = FAMILIES["sd1"]

    class Tinted(family):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            told.append((self.facts.device.type, self.settings.tint))

    monkeypatch.setitem(FAMILIES, "sd1", Tinted)
    for module in (schema, toml):
        monkeypatch.setattr(module, "Config", TintedConfig)
    return told


def test_a_new_setting_of_a_base_reaches_training_drawing_the_check_and_the_loader(
    tints: list[tuple[str, Any]], tiny_base: Path, image_folder: Make, tmp_path: Path
) -> None:
    settings = (
        *(f"model.base={tiny_base}", "model.tint=0.25", f"data.cache_folder={tmp_path / 'cache'}"),
        *("training.device=cpu", "training.precision=fp32", "training.steps=1", "training.batch_size=2"),
        *("adapter.rank=1", "data.validation=0", "sample.prompts=[]", f"output.folder={tmp_path / 'run'}"),
    )
    config = load_config(None, settings, {"data.folder": image_folder(count=2)})
    examine_settings(config)
    assert tints == [("meta", 0.25)]
    tints.clear()
    train(config)
    assert tints == [("meta", 0.25), ("cpu", 0.25)]  # as a blueprint, and with weights
    assert load_config(tmp_path / "run" / "config.toml").model == config.model
    tints.clear()

    words = ("--prompt", "a cat", "--size", "32x32", "--steps", "1", "--device", "cpu", "--precision", "fp32")
    output = tmp_path / "drawn"
    line = ["generate", "--base", str(tiny_base), "--tint", "0.5", *words, "--output", str(output)]
    assert main(line) == 0 and len(list(output.glob("*.png"))) == 1
    ImageGenerator.load(TintedModel(base=str(tiny_base), tint=0.75), device="cpu", precision="fp32")
    assert tints == [("cpu", 0.5), ("cpu", 0.75)]


def test_its_flag_has_the_help_and_the_limits_of_the_schema(
    tints: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["generate", "--help"]) == 0
    assert "How much the base is tinted, 0 to 100 %." in " ".join(capsys.readouterr().out.split())
    words = ["generate", "--prompt", "a cat", "--output", str(tmp_path / "images")]
    assert main([*words, "--tint", "1.5"]) == 2
    error = capsys.readouterr().err
    assert "--tint: `model.tint=1.5`: should be less than or equal to 1" in error and not tints


def test_every_setting_of_a_base_has_a_flag_and_is_read_as_settings_are() -> None:
    parser = ArgumentParser()
    declare_base(parser)
    keys = [key for key, _ in fields() if key.startswith("model.")]
    assert len(keys) >= 6
    untouched = parser.parse_args([])
    assert settings_of(untouched) == dict.fromkeys(keys) and base_of(untouched) == ModelConfig()
    line = (
        "--base a.safetensors --family sd1 --prediction-type v_prediction --zero-terminal-snr "
        "--vae b.safetensors --clip-skip 2"
    )
    whole = ModelConfig(
        base="a.safetensors",
        family="sd1",
        prediction_type="v_prediction",
        zero_terminal_snr=True,
        vae="b.safetensors",
        clip_skip=2,
    )
    assert base_of(parser.parse_args(line.split())) == whole
    assert base_of(parser.parse_args(line.replace("-type", "").split())) == whole  # the flag's earlier name
    assert base_of(parser.parse_args(["--no-zero-terminal-snr"])).zero_terminal_snr is False
    with pytest.raises(ConfigError, match=r"needs `model\.prediction_type=v_prediction`"):
        base_of(parser.parse_args(["--zero-terminal-snr", "--prediction", "epsilon"]))


@pytest.mark.parametrize(
    ("key", "given", "complaint"),
    [
        ("training.attention", "sdp", r"must be one of auto, sdpa, xformers \(did you mean sdpa\?\)"),
        ("training.device", "tpu", "must be cpu, cuda, cuda:1 or mps"),
        ("model.clip_skip", "two", "must be a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_the_words_of_the_settings(
    key: str, given: str, complaint: str
) -> None:
    parser = ArgumentParser(exit_on_error=False)
    declare_setting(parser, key, "--flag")
    with pytest.raises(Exception, match=f"--flag: `{key}={given}`: {complaint}"):
        parser.parse_args(["--flag", given])
