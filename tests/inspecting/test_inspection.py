"""Inspecting: every figure against one computed another way."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from formats.adapters import EVERYTHING, SD1, file_of, random_adapter, tiny_text_encoder, tiny_unet
from safetensors.torch import load_file, save_file

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.commands.cli import main
from sdlora.errors import AdapterFileError, OutputError
from sdlora.formats.adapter_files import OpenAdapter, write_adapter
from sdlora.formats.metadata import TrainingFacts, build_header
from sdlora.formats.table import FORMATS, written_formats
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.inspecting.norms import block_norms
from sdlora.inspecting.view import draw_norms, render
from sdlora.tensor_file import read_header


@pytest.fixture(scope="module")
def weights() -> AdapterWeights:
    models = {"unet": tiny_unet(layers_per_block=1), "text_encoder": tiny_text_encoder()}
    return random_adapter(models, EVERYTHING, ranks=(4, 2), scales=(0.5,))


def test_norms_by_factors_equal_norms_of_the_whole_update(weights: AdapterWeights) -> None:
    for _, pair in weights.items():
        assert pair.norm() == pytest.approx(float(pair.delta().double().norm()), rel=1e-5)
    blocks = block_norms(weights.all_items())
    total = sum(block.norm**2 for block in blocks) ** 0.5
    wanted = sum(float(pair.delta().double().norm()) ** 2 for _, pair in weights.items()) ** 0.5
    assert total == pytest.approx(wanted, rel=1e-5)
    assert sum(block.num_modules for block in blocks) == len(weights)
    names = [block.block for block in blocks if block.component == "unet"]
    assert names[0] == "down_blocks.0.attentions" and names.index("mid_block") > names.index(
        "down_blocks.3.resnets"
    )
    assert [b.block for b in blocks if b.component == "text_encoder"] == [
        "encoder.layers.0",
        "encoder.layers.1",
    ]


@pytest.mark.parametrize("format", written_formats())
def test_a_summary_tells_what_is_in_the_file(format: str, weights: AdapterWeights, tmp_path: Path) -> None:
    facts = TrainingFacts(
        family=SD1,
        name="ink",
        base_title="mini base",
        base_digest="ab" * 32,
        prediction_type="v_prediction",
        steps=300,
        num_images=40,
        tag_frequency={"set": {"inkstyle": 40, "cat": 2}},
        trigger_words=("inkstyle",),
        started_at=1764000000.0,
    )
    adapter = AdapterFile(weights, AdapterInfo("sd1", "ink", ("inkstyle",), build_header(facts)))
    target = tmp_path / ("ink" if FORMATS[format].is_folder else "ink.safetensors")
    files = write_adapter(adapter, format, target, torch.float16, SD1)
    summary = inspect_adapter(target)
    assert (summary.format, summary.family, summary.name, summary.base) == (format, "sd1", "ink", "mini base")
    assert summary.modules == {c: len(weights.component(c)) for c in ("unet", "text_encoder")}
    assert set(summary.ranks) == {2, 4} and sum(summary.ranks.values()) == len(weights)
    assert set(summary.alphas) == {1.0, 2.0} and sum(summary.alphas.values()) == len(weights)
    assert summary.dtypes == {"fp16": 2 * len(weights)}
    assert summary.num_bytes == sum(f.stat().st_size for f in files if f.suffix == ".safetensors")
    assert summary.trigger_words == ("inkstyle",)
    assert summary.tags == (("inkstyle", 40), ("cat", 2))
    assert summary.settings["steps"] == "300"
    assert (summary.settings["base predicts"], summary.settings["base SHA-256"]) == ("v", "ab" * 32)
    assert summary.hash_matches is (True if format == "webui" else None)
    full = [support.client for support in summary.clients if support.full]
    assert len(full) == {"webui": 6, "diffusers": 1, "peft": 0}[format]
    answer = json.loads(json.dumps(summary.to_dict()))
    assert answer["num_modules"] == len(weights) and len(answer["blocks"]) == len(summary.blocks)
    text = render(summary)
    for word in ("inkstyle (40)", "2 (", "steps", "loads fully in", "mid_block", "ComfyUI"):
        assert word in text
    assert max(map(len, text.splitlines())) < 260


@pytest.mark.parametrize("format", written_formats())
def test_the_header_alone_tells_the_same_without_reading_a_tensor(
    format: str, weights: AdapterWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = TrainingFacts(family=SD1, name="ink", steps=300, trigger_words=("inkstyle",))
    adapter = AdapterFile(weights, AdapterInfo("sd1", "ink", ("inkstyle",), build_header(facts)))
    target = tmp_path / ("ink" if FORMATS[format].is_folder else "ink.safetensors")
    files = write_adapter(adapter, format, target, torch.float16, SD1)
    whole = inspect_adapter(target).to_dict()
    for file in files:  # values that no reader would take
        if file.suffix == ".safetensors":
            header, data = read_header(file), bytearray(file.read_bytes())
            for key, spec in header.tensors.items():
                if not key.endswith(".alpha"):
                    size = spec.end - spec.start
                    data[header.data_offset + spec.start : header.data_offset + spec.end] = b"\xff" * size
            file.write_bytes(data)
    with pytest.raises(AdapterFileError, match="NaN"):
        inspect_adapter(target)
    from_header = inspect_adapter(target, values=False).to_dict()
    entries = from_header.pop("header")
    assert isinstance(entries, dict) and entries["ss_steps"] == "300"
    read_from_data = {"blocks", "model_hash", "short_hash", "hash_matches"}
    assert {k: v for k, v in from_header.items() if k not in read_from_data} == {
        k: v for k, v in whole.items() if k not in read_from_data
    }
    assert from_header["model_hash"] == (whole["model_hash"] if format == "webui" else "")
    assert main(["inspect", str(target), "--header"]) == 0
    printed = capsys.readouterr().out
    assert "ss_steps" in printed and "modelspec.architecture" in printed and "Frobenius" not in printed
    assert main(["inspect", str(target), "--header", "--chart", str(tmp_path / "x.png")]) == 2
    assert "--chart draws the norms" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["IsADirectory", "NOFILE", "FileNotFound", "PermissionError"])
def test_a_word_in_the_place_of_a_hash_is_none(word: str, weights: AdapterWeights, tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    for value, shown in ((word, None), (digest, digest)):
        header = {**build_header(TrainingFacts(family=SD1, name="ink")), "ss_new_sd_model_hash": value}
        target = tmp_path / f"{value[:6]}.safetensors"
        write_adapter(
            AdapterFile(weights, AdapterInfo("sd1", "ink", (), header)), "webui", target, torch.float16, SD1
        )
        assert inspect_adapter(target).settings.get("base SHA-256") == shown


def test_a_hash_that_lies_is_told(weights: AdapterWeights, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(file_of(weights), "webui", path, torch.float16, SD1)
    save_file(load_file(path), path, {"sshs_model_hash": "0" * 64})
    summary = inspect_adapter(path)
    assert summary.hash_matches is False and "the header says another" in render(summary)
    assert summary.family is None and summary.base is None and summary.tags == ()


def test_a_hostile_header_cannot_paint_the_terminal(weights: AdapterWeights, tmp_path: Path) -> None:
    nasty = {
        "ss_sd_model_name": "\x1b[31mred\nline" + "x" * 10_000,
        "ss_tag_frequency": json.dumps({"a": {"\x1b[2J": 5, "b": "x"}, "c": 3}),
        "ss_optimizer": "\r\n" * 100,
    }
    path = tmp_path / "a.safetensors"
    write_adapter(AdapterFile(weights, AdapterInfo(metadata=nasty)), "webui", path, torch.float16, SD1)
    text = render(inspect_adapter(path))
    assert "\x1b" not in text and "\r" not in text and max(map(len, text.splitlines())) < 300


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="full model"):
        inspect_adapter(tmp_path / "a.safetensors")


def test_bars_are_as_long_as_the_norms(weights: AdapterWeights, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(file_of(weights), "webui", path, torch.float16, SD1)
    summary = inspect_adapter(path)
    largest = max(block.norm for block in summary.blocks)
    rows = [line for line in render(summary, plain=True).splitlines() if line.endswith(("layer", "layers"))]
    assert len(rows) == len(summary.blocks) > 5
    for row, block in zip(rows, summary.blocks, strict=True):
        assert row.split()[:2] == [block.component, block.block]
        assert row.count("#") == max(1, round(32 * block.norm / largest))
    for row, block in zip(
        (line for line in render(summary).splitlines() if line.endswith(("layer", "layers"))),
        summary.blocks,
        strict=True,
    ):
        assert abs(row.count("\u2588") - 32 * block.norm / largest) <= 1
    assert "\x1b[36" in render(summary, colour=True) and "\x1b" not in render(summary)
    assert max(map(len, render(summary, width=70).splitlines())) <= 70


def test_the_norms_are_drawn_into_a_new_image(weights: AdapterWeights, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "a.safetensors"
    name = "$\\frac{" + "x" * 300  # neither mathematics nor longer than the image
    write_adapter(AdapterFile(weights, AdapterInfo("sd1", name)), "webui", path, torch.float16, SD1)
    summary = inspect_adapter(path)
    draw_norms(summary, tmp_path / "norms.png")
    with Image.open(tmp_path / "norms.png") as image:
        assert image.format == "PNG" and image.width > 400 and image.height > 200
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20) or []}
    assert {(0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28)} <= colours, "a bar of each component"
    with pytest.raises(OutputError, match="exists; nothing was overwritten"):
        draw_norms(summary, tmp_path / "norms.png")


def test_one_module_is_in_memory_at_a_time(tmp_path: Path) -> None:
    pairs = {
        ModuleKey(
            "unet", f"down_blocks.{i % 3}.attentions.0.transformer_blocks.{i // 3}.attn1.to_q"
        ): LowRankPair(torch.ones(4, 3_000), torch.ones(3_000, 4), 4.0)
        for i in range(60)
    }
    path = tmp_path / "a.safetensors"
    write_adapter(AdapterFile(AdapterWeights(pairs)), "webui", path, torch.float32, SD1)
    del pairs
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for _, update in OpenAdapter(path).modules():
        seen.append(weakref.ref(update.tensors()["lora_down.weight"]))
        most = max(most, sum(reference() is not None for reference in seen))
    assert len(seen) == 60 and most <= 2
    assert sum(block.num_modules for block in inspect_adapter(path).blocks) == 60


def test_the_command_shows_and_draws(
    weights: AdapterWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(file_of(weights), "webui", path, torch.float16, SD1)
    assert main(["inspect", str(path), "--chart", str(tmp_path / "n.png"), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["num_modules"] == len(weights) and (tmp_path / "n.png").is_file()
    assert any("loads fully in" in line for line in lines)
