"""Images of the trained adapter against images of the written file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair
from sdlora.commands.cli import main
from sdlora.errors import ConfigError
from sdlora.exporting.export import export_adapter
from sdlora.exporting.image_proof import compare_images
from sdlora.families.loading import load_model
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.formats.table import written_formats


@pytest.fixture(scope="module")
def source(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for path, layer in model.components()["unet"].named_modules():
        if path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) and isinstance(layer, torch.nn.Linear):
            pairs[path] = LowRankPair(
                torch.randn(2, layer.in_features, generator=generator) * 0.3,
                torch.randn(layer.out_features, 2, generator=generator),
                3.0,
            )
    from sdlora.adapters.canonical import ModuleKey

    weights = AdapterWeights({ModuleKey("unet", path): pair for path, pair in pairs.items()})
    path = tmp_path_factory.mktemp("source") / "ink.safetensors"
    adapter = AdapterFile(weights, AdapterInfo("sd1", "ink", ("inkstyle",)))
    write_adapter(adapter, "webui", path, torch.float32, model.info)
    return path


@pytest.mark.parametrize("format", written_formats())
def test_an_exact_file_draws_the_very_same_images(
    format: str, source: Path, tiny_base: Path, tmp_path: Path
) -> None:
    report = export_adapter(source, format, tmp_path)
    proof = compare_images(source, report.adapter, base=str(tiny_base), steps=3)
    assert (proof.largest, proof.mean, proof.num_pairs) == (0, 0.0, 4)
    assert proof.by_strength == {"0": 0, "0.5": 0, "1": 0, "1.5": 0}
    assert proof.effect > 10, "the adapter must change the image, or the comparison shows nothing"


def test_another_adapter_is_seen(source: Path, tiny_base: Path, tmp_path: Path) -> None:
    adapter = read_adapter(source)
    stronger = {key: LowRankPair(p.down, p.up, p.alpha * 1.5) for key, p in adapter.weights.items()}
    other = tmp_path / "other.safetensors"
    from sdlora.families.table import family_info

    write_adapter(
        AdapterFile(AdapterWeights(stronger), adapter.info), "webui", other, torch.float32, family_info("sd1")
    )
    proof = compare_images(source, other, base=str(tiny_base), steps=3, prompts=("a", "b"))
    assert proof.num_pairs == 8 and proof.by_strength["0"] == 0
    assert proof.by_strength["1"] > 0 and proof.largest == max(proof.by_strength.values())
    assert str(proof.largest) in proof.line()


def test_a_file_alone_does_not_tell_its_base(source: Path) -> None:
    with pytest.raises(ConfigError, match="does not say which base"):
        compare_images(source, source)


def test_the_command_compares_on_request(
    source: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(source), "--output", str(tmp_path), "--json"]
    assert main([*words, "--base", str(tiny_base)]) == 2
    assert "no effect without --verify-images" in capsys.readouterr().err
    assert main([*words, "--verify-images", "--base", str(tiny_base), "--prompt", "a cat"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["images"]["num_pairs"] == 4 and answer["read_by"] == ["sdlora", "diffusers"]
    assert answer["images"]["largest"] == 0 and answer["images"]["effect"] > 10
