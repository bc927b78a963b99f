"""Adapters of any trainer are judged against a folder, with a page that says which is best."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.adapters.attach import create_adapter
from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights
from sdlora.commands.cli import main
from sdlora.config.adapter import AdapterConfig
from sdlora.families.loading import load_model
from sdlora.formats.adapter_files import write_adapter


@pytest.fixture
def adapters(tiny_base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """One adapter that changes nothing, in WebUI's format, and one that changes much, in diffusers'."""
    model = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    start = create_adapter(model, AdapterConfig(rank=2, alpha=2.0), 0)
    generator = torch.Generator().manual_seed(1)
    moved = {
        key: update.with_tensors(
            {
                name: t + 0.5 * torch.randn(t.shape, generator=generator)
                for name, t in update.tensors().items()
            }
        )
        for key, update in start.updates.items()
    }
    files = tmp_path / "still.safetensors", tmp_path / "moved.safetensors"
    for weights, file, form in ((start, files[0], "webui"), (AdapterWeights(moved), files[1], "diffusers")):
        write_adapter(
            AdapterFile(weights, AdapterInfo("sd1", file.stem)), form, file, torch.float32, model.info
        )
    return files


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code = main(["judge", *words, "--json"])
    output, errors = capsys.readouterr()
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return code, result, errors


def test_adapters_of_any_format_are_judged_and_one_is_named(
    adapters: tuple[Path, Path],
    tiny_base: Path,
    image_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "page.html"
    given = ["--against", str(image_folder()), "--base", str(tiny_base), "--output", str(page)]
    quick = ["--count", "4", "--steps", "1", "--strengths", "0.5,1", "--trigger", "icon", "--device", "cpu"]
    code, result, _ = answer(capsys, *map(str, adapters), *given, *quick)
    assert code == 0 and len(result["cells"]) == 4
    cells = {(cell["source"], cell["strength"]): cell for cell in result["cells"]}
    still = cells["still", 1.0]
    assert still["style"]["mean"] == pytest.approx(0, abs=1e-3)
    assert still["subject_kept"]["mean"] == pytest.approx(1, abs=1e-3)
    assert still["drift_without_trigger"] == pytest.approx(0, abs=1e-3)
    assert cells["moved", 1.0]["subject_kept"]["mean"] < 0.9
    assert result["best_file"] in map(str, adapters)
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/webp") == 4 + 2 and "http" not in text.replace("http-equiv", "")
    code, result, errors = answer(capsys, str(adapters[0]), *given, *quick)
    assert code == 2 and "exists; choose another --output, or add --overwrite" in errors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--strengths", "0,1"], "give numbers above 0"),
        (["--strengths", "1,1"], "names one of them twice"),
        (["--count", "3"], "judge by 4 to 64 prompts"),
        (["--steps", "0"], "must be 1 or more"),
        (["--against", "few"], "3 images are too few"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    words: list[str],
    told: str,
    adapters: tuple[Path, Path],
    tiny_base: Path,
    image_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = image_folder(count=3, name="few")
    words = [str(few) if word == "few" else word for word in words]
    against = [] if "--against" in words else ["--against", str(few)]
    output = tmp_path / "page.html"
    code, _, errors = answer(
        capsys, str(adapters[0]), *words, *against, "--base", str(tiny_base), "--output", str(output)
    )
    assert code == 2 and told in errors and len(errors.strip().splitlines()) == 1
    assert not output.exists()
