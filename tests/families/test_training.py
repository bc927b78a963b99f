"""Every family, in every form users own it, through the whole path: train, resume, export, load again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora.adapters.attach import attached_layers, create_adapter
from sdlora.adapters.canonical import AdapterFile, AdapterInfo
from sdlora.config.schema import AdapterConfig, Config
from sdlora.config.toml import load_config
from sdlora.errors import AdapterFileError, ConfigError
from sdlora.events import Control, Event, StepDone
from sdlora.exporting.export import export_adapter
from sdlora.families.loading import load_model
from sdlora.families.table import family_info
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.generation.image_generator import ImageGenerator
from sdlora.generation.render import GenerateRequest
from sdlora.inspecting.base_inspection import inspect_base
from sdlora.run_folder import list_checkpoints
from sdlora.training.train import train

from .narrow import FAMILY_NAMES, FORMS, States, in_form

Bases = Mapping[str, tuple[Path, States]]
SETTINGS = (
    "adapter.rank=2",
    "adapter.text_encoder=true",
    "adapter.alpha=3",
    "data.validation=0",
    "data.resolution=64",
    "data.flip=true",
    "sample.prompts=[]",
    "training.batch_size=2",
    "training.device=cpu",
    "training.precision=fp32",
    "training.steps=2",
)


# tests/training/test_train.py does all this with SD1 in a folder, and more
OFTEN = (("sd2", "hub cache"), ("sdxl", "file"))
ALL = [
    pytest.param(
        (family, form),
        id=f"{family}-{form}",
        marks=pytest.mark.long if (family, form) in OFTEN else pytest.mark.slow,
    )
    for family in FAMILY_NAMES
    for form in FORMS
]


@pytest.fixture(params=ALL)
def form(request: pytest.FixtureRequest) -> tuple[str, str]:
    family, form = request.param
    return family, form


@pytest.fixture
def family(form: tuple[str, str]) -> str:
    return form[0]


@pytest.fixture
def base(form: tuple[str, str], bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return in_form(form[1], form[0], bases[form[0]], tmp_path, monkeypatch)


@pytest.fixture
def make(base: str, image_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    folder = image_folder(count=4)

    def config(run: str, *overrides: str) -> Config:
        values = {
            "data.folder": folder,
            "data.cache_folder": tmp_path / "cache",
            "model.base": base,
            "output.folder": tmp_path / run,
        }
        return load_config(None, [*SETTINGS, *overrides], values)

    return config


def test_recognise_train_resume_export_and_draw(
    family: str, make: Callable[..., Config], base: str, tmp_path: Path
) -> None:
    assert inspect_base(base).recognised.family == family
    whole = train(make("whole"))
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            control.stop()

    assert train(make("parts"), listeners=[stop], control=control).stopped
    resumed = train(make("parts"), resume=True)
    first, other = (
        load_file(list_checkpoints(result.folder / "checkpoints")[-1].optimizer_file)
        for result in (whole, resumed)
    )
    components = [name for name in ("unet", "text_encoder", "text_encoder_2") if f"{name}.master" in first]
    assert components == list(family_info(family).file_prefixes)
    assert first.keys() == other.keys()
    assert [name for name in first if not torch.equal(first[name], other[name])] == []

    assert whole.adapter_file is not None
    trained = read_adapter(whole.adapter_file)
    assert trained.info.family == family
    keys = set(load_file(whole.adapter_file))
    for component, prefix in family_info(family).file_prefixes.items():
        assert trained.weights.component(component)
        assert any(key.startswith(f"{prefix}_") for key in keys)
    if family == "sdxl":
        assert any(key.startswith("lora_unet_input_blocks_") for key in keys)

    for format in ("diffusers", "peft"):
        report = export_adapter(whole.folder, format, tmp_path / format)
        place = report.files[0] if format == "diffusers" else report.files[0].parents[1]
        again = read_adapter(place)
        assert len(again.weights.pairs) == len(trained.weights.pairs)

    generator = ImageGenerator.load(base, device="cpu", precision="fp32")
    name = generator.add_adapter(whole.adapter_file)
    assert len(list(attached_layers(generator.model, name))) == len(trained.weights.pairs)
    images = generator.generate(
        GenerateRequest(
            "a cat",
            height=64,
            width=64,
            steps=2,
            guidance=4.0,
            sampler="Euler",
            seed=1,
            strengths={name: strength},
        )
        for strength in (0.0, 400.0)
    )
    assert images[0].image.tobytes() != images[1].image.tobytes()


def test_each_text_encoder_has_its_own_rank_alpha_and_rate(
    family: str, make: Callable[..., Config], tmp_path: Path
) -> None:
    second = ("adapter.text_encoder_2_rank=1", "adapter.text_encoder_2_alpha=2")
    rate = "optimizer.text_encoder_2_learning_rate=0.003"
    first = ("adapter.text_encoder_rank=3", "adapter.text_encoder_alpha=1.5")
    if family != "sdxl":
        with pytest.raises(ConfigError, match="has no such text encoder"):
            train(make("refused", *first, *second, rate))
        return
    seen: list[Event] = []
    result = train(make("run", "training.steps=1", *first, *second, rate), listeners=[seen.append])
    assert result.adapter_file is not None
    weights = read_adapter(result.adapter_file).weights
    for component, expected in {
        "unet": (2, 3.0),
        "text_encoder": (3, 1.5),
        "text_encoder_2": (1, 2.0),
    }.items():
        assert {(p.rank, p.alpha) for p in weights.component(component).values()} == {expected}
    only_second = train(
        make("second", "training.steps=1", "adapter.text_encoder=false", "adapter.text_encoder_2=true")
    )
    assert only_second.adapter_file is not None
    assert read_adapter(only_second.adapter_file).weights.components() == ["unet", "text_encoder_2"]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_adapter_of_another_family_is_refused(family: str, bases: Bases, tmp_path: Path) -> None:
    model = load_model(str(bases[family][0]), dtype=torch.float32, device=torch.device("cpu"))
    weights = create_adapter(model, AdapterConfig(rank=1, alpha=1.0), 0)
    file = tmp_path / "other.safetensors"
    write_adapter(AdapterFile(weights, AdapterInfo(family)), "webui", file, torch.float32, model.info)
    other = FAMILY_NAMES[(FAMILY_NAMES.index(family) + 1) % len(FAMILY_NAMES)]
    generator = ImageGenerator.load(str(bases[other][0]), device="cpu", precision="fp32")
    with pytest.raises(AdapterFileError, match=f"an adapter for {family} bases"):
        generator.add_adapter(file)
