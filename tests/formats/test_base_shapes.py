"""Factors in the base's own dimensions: what is written loads into the real models, whatever was read."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlora.adapters.canonical import AdapterWeights
from sdlora.errors import AdapterFileError
from sdlora.families.facts import FamilyInfo
from sdlora.formats.adapter_files import OpenAdapter, write_adapter
from sdlora.formats.base_shapes import BaseShapes
from sdlora.formats.proof import prove
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.surgery.convert import convert_adapter

from .adapters import EVERYTHING, SD1, SD2, SDXL, file_of, random_adapter
from .test_clients import assert_deltas, deltas_in, make_pipeline, models_in

FORMATS_AND_FAMILIES = [
    ("webui", SD1),
    ("peft", SD1),
    pytest.param("webui", SD2, marks=pytest.mark.slow),
    pytest.param("webui", SDXL, marks=pytest.mark.slow),
    ("diffusers", SDXL),
]


def other_dimensions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store linear factors as those of a 1x1 convolution, and those of 1x1 convolutions as linear ones."""

    def turned(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor[:, :, None, None].contiguous()
        flat = tensor.ndim == 4 and tuple(tensor.shape[2:]) == (1, 1)
        return tensor[:, :, 0, 0].contiguous() if flat else tensor

    kernels = {key.split(".")[0] for key, tensor in tensors.items() if tensor.shape[2:] == (3, 3)}
    return {k: t if k.split(".")[0] in kernels else turned(t) for k, t in tensors.items()}


def source_of(family: FamilyInfo, models: dict[str, nn.Module], folder: Path) -> tuple[Path, AdapterWeights]:
    weights = random_adapter(models, EVERYTHING, ranks=(4, 2), scales=(0.5, 1.0))
    straight, odd = folder / "straight.safetensors", folder / "odd.safetensors"
    write_adapter(file_of(weights), "webui", straight, torch.float32, family)
    save_file(other_dimensions(load_file(straight)), odd, {"ss_base_model_version": family.header.version})
    assert sum(t.ndim == 4 for t in load_file(odd).values()) > sum(
        t.ndim == 4 for t in load_file(straight).values()
    )
    return odd, weights


@pytest.mark.long
@pytest.mark.parametrize(
    ("format", "family"), FORMATS_AND_FAMILIES, ids=lambda value: getattr(value, "name", value)
)
def test_factors_in_the_wrong_dimensions_are_written_in_the_layers_own(
    format: str, family: FamilyInfo, tmp_path: Path
) -> None:
    pipeline = make_pipeline(family)
    odd, weights = source_of(family, models_in(pipeline), tmp_path)
    claims = {support.client: support for support in inspect_adapter(odd).clients}
    for client in ("diffusers", "kohya sd-scripts"):
        assert not claims[client].full and "dimensions" in claims[client].reasons[0]
    assert claims["ComfyUI"].full and claims["WebUI"].full

    target = tmp_path / ("new" if format == "peft" else "new.safetensors")
    report = convert_adapter(odd, target, format=format)
    assert report.proof is not None and "largest delta difference 0.0" in report.proof
    if format == "peft":
        written = OpenAdapter(target).outline.weights
        assert {k: u.shape for k, u in written.all_items()} == {k: u.shape for k, u in weights.all_items()}
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pipeline.load_lora_weights(str(target))
    loaded = {}
    for component, model in models_in(pipeline).items():
        loaded |= deltas_in(model, component)
    assert_deltas(loaded, weights)
    after = {support.client: support.full for support in inspect_adapter(target).clients}
    assert after["diffusers"] and (format == "diffusers" or after["kohya sd-scripts"])


def test_a_file_in_the_wrong_dimensions_is_no_proof(tmp_path: Path) -> None:
    odd, weights = source_of(SDXL, models_in(make_pipeline(SDXL)), tmp_path)
    with pytest.raises(AdapterFileError, match="has factors in"):
        prove(weights, OpenAdapter(odd), torch.float32, SDXL)


def test_the_shapes_are_those_of_the_true_model_where_the_file_is_for_it_and_else_of_its_own_width() -> None:
    module = next(iter(random_adapter(models_in(make_pipeline(SD1)), (".proj_in",)).updates))
    narrow = random_adapter(models_in(make_pipeline(SD1)), EVERYTHING)
    shapes = BaseShapes.of_adapter(narrow, "sd1")
    assert not shapes.is_true and shapes.wanted(module, (8, 8)) == (8, 8, 1, 1)
    assert BaseShapes("sdxl", True).wanted(module, (8, 8)) is None  # SDXL has no attention there
