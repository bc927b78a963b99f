"""Training over a base in 8 or 4 bits: fast paths, resuming, kinds of adapters, judging, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdlora.adapters.attach import Merged, attach, create_adapter, detach, set_strengths
from sdlora.adapters.canonical import AdapterWeights
from sdlora.adapters.folded import folded
from sdlora.config.adapter import AdapterConfig
from sdlora.config.schema import Config, Quantisation
from sdlora.errors import ConfigError
from sdlora.events import Control, Decided, Emitter, Event, Notice, StepDone
from sdlora.families.base import DiffusionModel, SizeHint
from sdlora.families.loading import load_model
from sdlora.families.quantised import quantisation_of
from sdlora.formats.adapter_files import read_adapter
from sdlora.run_folder import list_checkpoints
from sdlora.training.memory_count import counting_memory
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.step import train_step
from sdlora.training.train import train

Settings = Callable[..., Config]
CPU = torch.device("cpu")
FORMATS = get_args(Quantisation)
USUAL = (
    *("training.batch_size=2", "data.validation=0", "sample.prompts=[]", "training.device=cpu"),
    *("training.precision=fp32", "training.steps=3", "data.resolution=32"),
)


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Callable[..., Path]) -> Settings:
    folder = image_folder(4)

    def make(run: str, *overrides: str) -> Config:
        return run_settings(run, (*USUAL, "adapter.rank=2"), overrides, {"data.folder": folder})

    return make


def prepared(config: Config, *, resume: bool = False, told: list[Event] | None = None) -> Run:
    listeners = () if told is None else (told.append,)
    return prepare_run(config, resume=resume, emit=Emitter(listeners))


@torch.no_grad()
def output(model: DiffusionModel) -> Tensor:
    model.prepare(training=False)
    noisy = torch.randn((2, *model.facts.latents.shape(32, 32)), generator=torch.Generator().manual_seed(3))
    hints = [SizeHint((32, 32), (0, 0), (32, 32))] * 2
    return model.predict(noisy, torch.tensor([20, 700]), model.encode_text(["a cat", "a dog"]), hints)


def stopped_and_resumed(config: Config) -> Path:
    control = Control()

    def stop_at_one(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            control.stop()

    assert train(config, listeners=[stop_at_one], control=control).stopped
    return train(config, resume=True).folder


def last_files(folder: Path) -> dict[str, Tensor]:
    checkpoint = list_checkpoints(folder / "checkpoints")[-1].path
    return {
        f"{file}.{name}": tensor
        for file in ("optimizer.safetensors", "adapter.safetensors")
        for name, tensor in load_file(checkpoint / file).items()
    }


@pytest.fixture(params=[pytest.param("fp8", marks=pytest.mark.long), "nf4"])
def quantisation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.long
def test_a_run_says_its_format_resumes_exactly_in_it_and_in_no_other(
    quantisation: str, settings: Settings
) -> None:
    asked, told = ("adapter.targets=all", f"training.base_format={quantisation}"), list[Event]()
    whole = train(settings("whole", *asked), listeners=[told.append])
    notices = [event.message for event in told if isinstance(event, Notice)]
    assert not [text for text in notices if "agree" in text or "reference" in text], notices
    (paths,) = [e for e in told if isinstance(e, Decided) and e.key == "training.fast"]
    assert "joint" in paths.value and "only what timesteps add" in paths.reason
    assert whole.adapter_file is not None
    with safe_open(whole.adapter_file, "pt") as file:
        header = file.metadata()
    assert header["ss_fp8_base"] == header["ss_fp8_base_unet"] == str(quantisation == "fp8")
    assert json.loads(header["sdlora.config"])["training"]["base_format"] == quantisation

    first, second = (
        last_files(whole.folder),
        last_files(stopped_and_resumed(settings("parts", *asked))),
    )
    assert first.keys() == second.keys() and len(first) > 20
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    other = {"fp8": "nf4", "nf4": "full"}[quantisation]
    with pytest.raises(ConfigError, match=f"training.base_format: was {quantisation}, now {other}"):
        prepared(settings("parts", asked[0], f"training.base_format={other}"), resume=True)


@pytest.mark.parametrize("quantisation", FORMATS)
def test_every_fast_path_is_used_and_the_run_learns_something_else_than_over_the_full_base(
    quantisation: Quantisation, settings: Settings
) -> None:
    losses = {}
    for base_format in (quantisation, "full"):
        run = prepared(settings(base_format, f"training.base_format={base_format}"))
        kept = quantisation_of(run.model.components()["unet"])
        assert kept == (None if base_format == "full" else quantisation)
        run.fast.use(run.fast.possible("auto"))
        assert run.fast.names == ("blocks", "lora", "joint")
        losses[base_format], *_ = train_step(run)
    first, second = losses.values()
    assert first != second and first == pytest.approx(second, rel=0.2)


KINDS = {
    "dora": ("adapter.kind=dora", "adapter.targets=all"),
    "loha": ("adapter.kind=loha", "adapter.targets=all"),
    "lokr": ("adapter.kind=lokr", "adapter.targets=all", "adapter.lokr_factor=4"),
    "pissa": ("adapter.init=pissa", "adapter.targets=linear"),
    "olora": ("adapter.init=olora", "adapter.targets=all"),
    "prior": ("data.prior_preservation=1.0",),
    "checkpointed": ("training.gradient_checkpointing=true", "adapter.targets=linear", "adapter.dropout=0.1"),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in ("dora", "pissa") else [pytest.mark.slow])
        for name in KINDS
    ],
)
def test_every_kind_starts_at_the_quantised_base_and_is_what_it_trained(
    kind: str, settings: Settings
) -> None:
    overrides = ("training.base_format=nf4", *KINDS[kind])
    config = settings("run", *overrides)
    model = load_model(config.model.base, dtype=torch.float32, device=CPU, base_format="nf4")
    base = output(model)
    torch.testing.assert_close(
        output(prepared(settings("fresh", *overrides)).model), base, rtol=1e-4, atol=1e-5
    )
    result = train(config)
    assert result.adapter_file is not None
    trained = output(prepared(config, resume=True).model)
    assert float((trained - base).abs().max()) > 1e-4
    checkpoint = list_checkpoints(result.folder / "checkpoints")[-1].path / "adapter.safetensors"
    attach(model, read_adapter(checkpoint).weights, "trained")
    torch.testing.assert_close(output(model), trained, rtol=1e-3, atol=1e-4)


def test_no_copy_of_a_quantised_weight_lasts_whichever_paths_compute(settings: Settings) -> None:
    added = {}
    for base_format in ("fp8", "full"):
        run = prepared(settings(base_format, f"training.base_format={base_format}", "adapter.rank=8"))
        with counting_memory() as memory:
            run.fast.use(run.fast.possible("auto"))
        added[base_format] = memory.alive
    # what is left are copies of the adapter, and one of the timesteps' projections, which stay whole
    assert 0 < added["fp8"] < 0.5 * added["full"], added


def moved(model: DiffusionModel, kind: str) -> AdapterWeights:
    """Return an adapter that changes something: its factors are random."""
    config = AdapterConfig.model_validate({"kind": kind, "rank": 4, "alpha": 4.0, "targets": "all"})
    generator = torch.Generator().manual_seed(1)
    updates = {}
    for key, update in create_adapter(model, config, 0).updates.items():
        tensors = update.tensors().items()
        moved_tensors = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors
        }
        updates[key] = update.with_tensors(moved_tensors)
    return AdapterWeights(updates)


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_a_judged_strength_acts_beside_the_quantised_weights(kind: str, tiny_base: Path) -> None:
    model = load_model(str(tiny_base), dtype=torch.float32, device=CPU, base_format="fp8")
    base, weights = output(model), moved(model, kind)
    before = {name: value.clone() for name, value in model.components()["unet"].state_dict().items()}
    with folded(model, weights, 0.7):
        drawn = output(model)
    attach(model, weights, "same")
    set_strengths(model, {"same": 0.7})
    torch.testing.assert_close(drawn, output(model), rtol=1e-3, atol=1e-4)
    assert float((drawn - base).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match=r"kept in fp8.*sdlora bake"):
        Merged(model, {"same": 1.0})
    detach(model, "same")
    after = model.components()["unet"].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(output(model), base)
