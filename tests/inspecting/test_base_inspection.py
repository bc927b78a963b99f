"""`sdlora inspect` on base models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.commands.cli import main
from sdlora.inspecting.base_inspection import inspect_base, is_base


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
    answer = json.loads(lines[-1])
    assert (answer["family"], answer["title"], answer["missing"]) == ("sd1", "T", ["vae"])
    assert answer["prediction_types"] == {"the marker key `v_pred`": "v_prediction"}
    assert answer["formats"] == {"float16": 1.0}
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
        assert (summary.recognised.family, summary.recognised.layout) == ("sd1", "folder")
        assert "Stable Diffusion 1.x" in summary.render()


def test_a_hub_id_is_looked_up_in_the_cache_and_nowhere_else(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"asked the network for {arguments}")

    model, commit = tmp_path / "models--somebody--tiny", "0" * 40
    shutil.copytree(tiny_base, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert main(["inspect", "somebody/tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["family"] == "sd1"
    assert main(["inspect", "somebody/other"]) == 2
    assert "not in the cache of the hub" in capsys.readouterr().err


def test_a_contradicting_header_is_shown(tmp_path: Path) -> None:
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,),
    }
    file = tmp_path / "model.safetensors"
    save_file(
        {n: torch.zeros(s) for n, s in shapes.items()},
        file,
        {"modelspec.architecture": "stable-diffusion-v2-512"},
    )
    text = inspect_base(str(file)).render()
    assert "Stable Diffusion 1.x (sd1), by its text encoders' keys" in text
    assert "the header's modelspec.architecture says sd2" in text


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
