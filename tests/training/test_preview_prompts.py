"""Previews from a prompt file: its options, other adapters, and no trace in what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.generation.image_generator import ImageGenerator
from sdlora.generation.png_info import read_parameters
from sdlora.generation.render import GenerateRequest
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training.train import train

Settings = Callable[..., Config]


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    folder = image_folder(3)

    def make(run: str, *overrides: str, **values: Any) -> Config:
        fixed = ("adapter.rank=2", "training.device=cpu", "training.precision=fp32", "training.steps=2")
        fixed += (
            "training.fast=off",
            "optimizer.learning_rate=0.05",
            "data.validation=0",
            "optimizer.warmup_steps=0",
        )
        places = {
            "data.folder": folder,
            "data.cache_folder": tmp_path / "cache",
            "output.folder": tmp_path / "runs" / run,
            "output.name": run,
            "model.base": str(tiny_base),
        }
        return load_config(None, [*fixed, *overrides], {**places, **values})

    return make


def learned(config: Config) -> dict[str, torch.Tensor]:
    assert config.output.folder is not None
    return load_file(list_checkpoints(RunFolder(config.output.folder).checkpoints)[-1].optimizer_file)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_previews_with_other_adapters_are_drawn_as_asked_and_change_no_bit(
    settings: Settings, tiny_base: Path, tmp_path: Path, init: str
) -> None:
    other = settings("other", f"adapter.init={init}", "adapter.targets=all", "sample.prompts=[]")
    train(other)
    file = tmp_path / "prompts.txt"
    file.write_text(
        "# what previews show\n"
        "a [cat:dog:1] <lora:other:0.3:-0.7>\n"
        "a cat <lora:mine:0.5> --w 48 --s 3 --l 3 --d 7 --n blurry --ss euler_a\n"
        "a cat --am 0.5 --w 48 --s 3 --l 3 --d 7 --n blurry --ss euler_a\n",
        encoding="utf-8",
    )
    mine = settings(
        *("mine", f"adapter.init={init}", "sample.steps=2", "sample.guidance=2"),
        *("adapter.targets=all",),
        **{"sample.prompt_file": file},
    )
    train(mine)
    left, right = learned(other), learned(mine)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    generator = ImageGenerator.load(str(tiny_base), device="cpu", precision="fp32")
    checkpoints = list_checkpoints(tmp_path / "runs" / "mine" / "checkpoints")
    trained = generator.add_adapter(checkpoints[-1].adapter_file, "trained")
    beside = generator.add_adapter(tmp_path / "runs" / "other" / "other.safetensors", "beside")
    requests = [
        GenerateRequest(
            *("a [cat:dog:1]", ""),
            **{
                "height": 32,
                "width": 32,
                "steps": 2,
                "guidance": 2.0,
                "sampler": "DPM++ 2M Karras",
                "seed": 1,
            },
            strengths={trained: 1.0, beside: {"unet": -0.7, "text_encoder": 0.3}},
        ),
        GenerateRequest(
            *("a cat", "blurry"),
            **{"height": 32, "width": 48, "steps": 3, "guidance": 3.0, "sampler": "Euler a", "seed": 7},
            strengths={trained: 0.5},
        ),
    ]
    previews = [
        preview for preview in RunFolder(tmp_path / "runs" / "mine").list_previews() if preview.step == 2
    ]
    assert len(previews) == 3
    with Image.open(previews[1].file) as by_tag, Image.open(previews[2].file) as by_option:
        assert by_tag.tobytes() == by_option.tobytes()
    for preview, expected in zip(previews[:2], generator.generate(requests), strict=True):
        with Image.open(preview.file) as image:
            difference = np.asarray(image).astype(int) - np.asarray(expected.image).astype(int)
        assert np.abs(difference).max() <= 3, preview.file  # the other's file is in fp16
    assert read_parameters(previews[0].file)["Prompt"] == "a [cat:dog:1] <lora:other:0.3:-0.7>"
    file.unlink()  # the run has its prompts
    assert train(load_config(tmp_path / "runs" / "mine" / "config.toml"), resume=True).step == 2


def test_what_previews_cannot_draw_is_said_before_the_first_step(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"<lora:none>: there is no such adapter; looked in .*runs"):
        train(settings("a", 'sample.prompts=["a cat <lora:none:1>"]'))
    file = tmp_path / "prompts.txt"
    for text, problem in {
        "a cat\n\na dog --w wide": r"prompts.txt, line 3: `--w wide`: must be a whole number",
        "a cat --cn x.png": r"line 1: `--cn`: no option of a prompt; there are --n, --w",
        "# nothing": r"holds 0 prompts",
        "a cat --w 33": r"`width=33`.*multiples of",
        "a cat --ss Eulr": "sampler `Eulr`: unknown; did you mean `Euler`",
    }.items():
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=problem):
            train(settings("b", **{"sample.prompt_file": file}))
    with pytest.raises(ConfigError, match="give one of them"):
        settings("c", 'sample.prompts=["a"]', **{"sample.prompt_file": file})
    assert not (tmp_path / "runs").exists()
