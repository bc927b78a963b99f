"""The commands of surgery: what they print, their JSON, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sdlora
from sdlora.commands.cli import main
from sdlora.formats.adapter_files import OpenAdapter, read_adapter
from surgery.adapters import exact, mixed_adapter, relative_errors, saved
from surgery.checkpoints import adapter_for, ldm_file, saved_for
from surgery.conftest import Bases


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def test_merge_takes_signed_weights_blocks_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [saved(tmp_path, name, mixed_adapter(seed)) for seed, name in enumerate(("a", "b"))]
    target = tmp_path / "out.safetensors"
    words = ["merge", f"{files[0]}:0.8", f"{files[1]}:-0.5:0.25", "--block", "2:up_blocks=0.5"]
    assert main([*words, "--output", str(target), "--report", "--json"]) == 0
    result = last_json(capsys)
    assert result["files"] == [str(target)]
    assert isinstance(result["modules"], list) and len(result["modules"]) == result["num_modules"]
    wanted = {}
    for module, pair in mixed_adapter(0).items():
        factor = 0.25 if module.component == "text_encoder" else -0.5
        factor *= 0.5 if module.path.startswith("up_blocks.") else 1.0
        wanted[module] = 0.8 * exact(pair) + factor * exact(mixed_adapter(1).pairs[module])
    assert max(relative_errors(read_adapter(target).weights, wanted).values()) < 2e-7


def test_resize_prints_a_table_of_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path, "big", mixed_adapter())
    target = tmp_path / "small.safetensors"
    assert main(["resize", str(source), "--rank", "2", "--output", str(target), "--report"]) == 0
    printed = capsys.readouterr().out
    assert "relative error" in printed and "6 -> 2" in printed
    assert all(module.path in printed for module in mixed_adapter().pairs)


def test_nothing_but_our_own_words_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path, "big", mixed_adapter())
    target = tmp_path / "small.safetensors"
    assert main(["resize", str(source), "--rank", "2", "--output", str(target)]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert [line.split(":")[0] for line in captured.out.splitlines()] == [str(target), "resize", "proof"]


def test_diff_prints_blocks_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(saved(tmp_path, name, mixed_adapter(seed))) for seed, name in enumerate(("a", "b"))]
    image = tmp_path / "heat.png"
    assert main(["diff", *files, "--image", str(image), "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert image.is_file() and result["image"] == str(image)
    assert {block["component"] for block in result["blocks"]} == {"unet", "text_encoder"}
    assert "modules" not in result and "cosine" in printed


def test_convert_writes_another_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = saved(tmp_path, "a", mixed_adapter()), tmp_path / "b.safetensors"
    words = ["convert", str(source), "--format", "diffusers", "--dtype", "fp16", "--output", str(target)]
    assert main([*words, "--report", "--json"]) == 0
    result = last_json(capsys)
    assert OpenAdapter(target).format == "diffusers"
    assert isinstance(result["largest_relative_error"], float)
    assert 0 < result["largest_relative_error"] < 1e-3


def test_bake_and_extract_undo_each_other(
    tmp_path: Path, bases: Bases, capsys: pytest.CaptureFixture[str]
) -> None:
    _, states = bases["sd1"]
    weights = adapter_for("sd1", states)
    source, adapter = (
        ldm_file(tmp_path, "sd1", states, torch.float32),
        saved_for(tmp_path, "sd1", "a", weights),
    )
    baked, extracted = tmp_path / "baked.safetensors", tmp_path / "found.safetensors"
    words = ["bake", str(source), "--adapter", f"{adapter}:0.5:-1", "--block", "BASE=2,mid_block=0"]
    assert main([*words, "--output", str(baked), "--report", "--json"]) == 0
    result = last_json(capsys)
    assert result["layout"] == "file" and isinstance(result["relative_error"], float)
    words = ["extract", str(source), str(baked), "--rank", "4", "--targets", "all"]
    assert main([*words, "--output", str(extracted), "--json"]) == 0
    assert last_json(capsys)["dtype"] == "fp32"
    wanted = {
        module: (-2.0 if module.component == "text_encoder" else 0.5) * exact(pair)
        for module, pair in weights.items()
        if not module.path.startswith("mid_block")
    }
    assert max(relative_errors(read_adapter(extracted).weights, wanted).values()) < 1e-4


def test_mistakes_give_one_line_and_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path, "big", mixed_adapter())
    for words in (
        ["merge", f"{source}:1", "--method", "ties", "--output", str(tmp_path / "x.safetensors")],
        ["merge", str(tmp_path / "none.safetensors"), "--output", str(tmp_path / "x.safetensors")],
        ["resize", str(source), "--output", str(tmp_path / "x.safetensors")],
    ):
        assert main([*words, "--json"]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("sdlora: ") and captured.err.count("\n") == 1
        assert "error" in json.loads(captured.out.splitlines()[-1])
    assert not (tmp_path / "x.safetensors").exists()


def test_the_functions_are_public() -> None:
    for name in ("merge_adapters", "resize_adapter", "bake_checkpoint", "extract_adapter"):
        assert name in sdlora.__all__ and callable(getattr(sdlora, name))


def test_a_family_that_a_file_does_not_tell_is_asked_for_and_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": torch.randn(4, 3), f"{name}.lora_up.weight": torch.randn(3, 4)}
    source, known = tmp_path / "te.safetensors", saved(tmp_path, "known", mixed_adapter())
    save_file(tensors, source)
    commands = {
        "merge": [str(source), str(source)],
        "resize": [str(source), "--rank", "1"],
        "convert": [str(source), "--dtype", "fp16"],
        "export": [str(source)],
    }
    for command, words in commands.items():
        target = tmp_path / (command if command == "export" else f"{command}.safetensors")
        words = [command, *words, "--output", str(target)]
        assert main(words) == 2
        assert "say it with --family, one of sd1" in capsys.readouterr().err
        assert main([*words, "--family", "sd9"]) == 2
        assert "--family sd9: no such family" in capsys.readouterr().err
        assert not target.exists()
        assert main([*words, "--family", "sd1"]) == 0, capsys.readouterr().err
        written = target / "te.safetensors" if command == "export" else target
        assert read_adapter(written).info.family == "sd1"
    words = ["resize", str(known), "--rank", "1", "--output", str(tmp_path / "x.safetensors")]
    assert main([*words, "--family", "sdxl"]) == 2
    assert "are those of sd1, not of sdxl" in capsys.readouterr().err
