"""What a run spares its device, and that it goes on where memory suffices for the steps alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.events import Emitter, Event, Notice, Sampled, Validated
from sdlora.families import latent_model
from sdlora.families.fingerprint import module_fingerprint
from sdlora.generation.render import render
from sdlora.run_folder import list_checkpoints
from sdlora.training import previews
from sdlora.training.checkpoint import load_checkpoint
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.train import train
from sdlora.training.validation import validate

Settings = Callable[..., Config]
PREVIEWS = ('sample.prompts=["a (red:1.2) cat", "a dog"]', "sample.steps=2", "sample.guidance=4")


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    folder = image_folder()

    def make(run: str, *overrides: str) -> Config:
        fixed = ("adapter.rank=2", "training.device=cpu", "training.precision=fp32", "training.steps=2")
        values = {
            "data.folder": folder,
            "data.cache_folder": tmp_path / "cache",
            "output.folder": tmp_path / run,
            "model.base": str(tiny_base),
        }
        return load_config(None, [*fixed, *overrides], values)

    return make


def prepared(config: Config, heard: list[Event] | None = None) -> Run:
    events: list[Event] = [] if heard is None else heard
    return prepare_run(config, resume=False, emit=Emitter((events.append,)))


def test_prompts_of_previews_are_encoded_once_before_the_first_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no text encoder comes back to the device for a preview; and the images are the same."""
    config = settings("run", "data.validation=0", *PREVIEWS)
    events: list[Event] = []
    run = prepared(config, events)
    with run.loader:
        run.model.prepare(training=False, lean=True)
        requests = previews.preview_requests(run.config, run.model)
        expected = render(run.model, requests)

        def refuse(captions: Sequence[str]) -> Any:
            raise AssertionError(f"encoded {captions}")

        monkeypatch.setattr(run.model, "encode_text", refuse)
        previews.preview(run)
    (sampled,) = [event for event in events if isinstance(event, Sampled)]
    assert len(sampled.files) == len(expected) == 2
    for file, image in zip(sampled.files, expected, strict=True):
        with Image.open(file) as written:
            assert np.array_equal(np.asarray(written), np.asarray(image))


def test_captions_are_encoded_before_images(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """So text encoders have left a card when the image encoder comes."""
    called: list[str] = []
    for name in ("encode_text", "encode_images"):
        original = getattr(latent_model.LatentModel, name)

        def noted(model: Any, given: Any, name: str = name, original: Any = original) -> Any:
            called.append(name)
            return original(model, given)

        monkeypatch.setattr(latent_model.LatentModel, name, noted)
    with prepared(settings("run", "data.validation=0", *PREVIEWS)).loader:
        assert called.count("encode_images") > 1 and called.count("encode_text") > 1
        first = called.index("encode_images")
        assert "encode_text" not in called[first:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("fast", "base_format"), [("off", "full"), ("blocks, lora", "full"), ("blocks, lora", "nf4")]
)
def test_a_run_with_offloaded_blocks_has_the_same_bits(
    fast: str, base_format: str, settings: Settings
) -> None:
    """With what validation, previews and judging do to the weights, too."""
    states = []
    for count in (0, 3):
        fixed = (f'training.fast="{fast}"', "data.validation=1", "judge.every=1", *PREVIEWS)
        fixed = (*fixed, f"training.base_format={base_format}")
        heard: list[Event] = []
        config = settings(f"run{count}", f"training.offload_blocks={count}", *fixed)
        result = train(config, listeners=[heard.append])
        folder = list_checkpoints(result.folder / "checkpoints")[-1]
        states.append(load_checkpoint(folder).tensors)
        losses = [event.losses for event in heard if isinstance(event, Validated)]
        states[-1] |= {"held out": torch.tensor(losses)}
        # what judging folds into the base for a while does not stay there, nor get lost
        judged = sorted((result.folder / "judging").glob("*.png"))
        for image in judged:
            with Image.open(image) as opened:
                states[-1][image.name] = torch.from_numpy(np.asarray(opened).copy())
    assert states[0].keys() == states[1].keys() and len(states[0]) >= 5
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.long
@pytest.mark.parametrize("way", ["whole", "banded"])
def test_a_run_works_in_bands_if_it_is_to(
    way: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlora.training.planning.WHOLE_SIDE", 8)
    used: list[str] = []
    for name in ("encode", "decode"):
        original = getattr(latent_model.BandedAutoencoder, name)

        def noted(bands: Any, given: Any, name: str = name, original: Any = original) -> Any:
            used.append(name)
            return original(bands, given)

        monkeypatch.setattr(latent_model.BandedAutoencoder, name, noted)
    result = train(settings("run", "data.validation=0", f"training.autoencoder={way}", *PREVIEWS))
    assert result.step == 2
    assert set(used) == ({"encode", "decode"} if way == "banded" else set())


@pytest.mark.long
def test_out_of_memory_in_previews_and_validation_is_a_notice(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is the same as without them, bit for bit."""
    states = []
    for name in ("with", "without"):
        heard: list[Event] = []
        config = settings(name, "data.validation=1", *PREVIEWS)
        result = train(config, listeners=[heard.append])
        folder = list_checkpoints(result.folder / "checkpoints")[-1]
        states.append(load_checkpoint(folder).tensors)
        skipped = [e.message for e in heard if isinstance(e, Notice) and "skipped" in e.message]
        assert result.step == 2 and result.adapter_file is not None
        assert len(skipped) == (0 if name == "with" else 2), skipped
        if name == "with":

            def lacking(*_: Any, **__: Any) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory")

            def lacking_elsewhere(*_: Any, **__: Any) -> None:
                raise RuntimeError(
                    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
                )

            monkeypatch.setattr("sdlora.training.previews.render", lacking)
            monkeypatch.setattr("sdlora.training.validation.per_image_loss", lacking_elsewhere)
        else:
            assert [text.partition(" does not have enough memory for ")[2][:12] for text in skipped] == [
                "validation; ",
                "the previews",
            ]  # each is told once
            assert not any(isinstance(event, Validated | Sampled) for event in heard)
    assert states[0].keys() == states[1].keys() and len(states[0]) >= 4
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_validation_predicts_no_more_at_once_than_a_step(
    batch_size: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(
        settings(
            *("run", "data.validation=1", "sample.prompts=[]", f"training.batch_size={batch_size}"),
            *("training.steps=200", "training.validate_every=100"),
        )
    )
    rows: list[int] = []
    predict = run.model.predict

    def seen(noisy: Tensor, *rest: Any) -> Tensor:
        rows.append(noisy.shape[0])
        return predict(noisy, *rest)

    monkeypatch.setattr(run.model, "predict", seen)
    with run.loader:
        loss = validate(run)
    assert loss is not None and loss > 0
    assert sum(rows) > 8  # of the base alone, and with the adapter
    assert max(rows) == min(4, batch_size)


def test_the_encoders_are_read_once_for_training_and_held_out_images(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[int] = Counter()

    def fingerprint(module: nn.Module, *, extra: str = "") -> str:
        read[id(module)] += 1
        return module_fingerprint(module, extra=extra)

    monkeypatch.setattr(latent_model, "module_fingerprint", fingerprint)
    run = prepared(settings("run", "data.validation=1", "sample.prompts=[]"))
    with run.loader:
        assert len(run.validation.items) == 1
    assert len(read) == 3, "the image encoder, its last layer, the text encoder"
    assert set(read.values()) == {1}
