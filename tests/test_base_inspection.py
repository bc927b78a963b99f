"""`sdlora inspect` on base models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.base_inspection import inspect_base, is_base
from sdlora.cli import main


def checkpoint(file: Path) -> Path:
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,),
        "v_pred": (1,),
        "ztsnr": (1,),
    }
    save_file(
        {n: torch.zeros(s, dtype=torch.float16) for n, s in shapes.items()}, file, {"modelspec.title": "T"}
    )
    return file


def test_a_checkpoint_is_described_without_loading_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(tmp_path / "model.safetensors")
    assert main(["inspect", str(file), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert (found["family"], found["title"], found["missing"]) == ("sd1", "T", ["vae"])
    assert found["prediction_types"] == {"the marker key `v_pred`": "v_prediction"}
    assert found["formats"] == {"float16": 1.0}
    text = "\n".join(lines[:-1])
    for part in (
        "Stable Diffusion 1.x (sd1)",
        "v_prediction",
        "zero terminal SNR",
        "lacks",
        "vae",
        "short hash",
    ):
        assert part in text


def test_folders_and_the_mini_base_are_described(tiny_base: Path) -> None:
    for source in ("mini", str(tiny_base)):
        summary = inspect_base(source)
        assert (summary.found.family, summary.found.layout) == ("sd1", "folder")
        assert "Stable Diffusion 1.x" in summary.render()


def test_adapters_are_not_taken_for_bases(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, file)
    assert not is_base(str(file))
    assert not is_base(str(tmp_path / "missing.safetensors"))
    assert is_base(str(checkpoint(tmp_path / "model.safetensors")))


def test_another_kind_of_checkpoint_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "inpainting.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}, file)
    assert main(["inspect", str(file)]) == 2
    assert "an inpainting checkpoint" in capsys.readouterr().err
