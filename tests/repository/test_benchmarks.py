"""The speed comparison gives both trainers the same, and does not praise one that learns nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "stand_ins"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # other libraries must not find the stand-in


def test_both_trainers_get_the_same_images_and_captions(
    tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    from trainers import TRAINERS, prepare_images

    images = prepare_images(image_folder(count=7), tmp_path / "out", batch_size=3)

    assert len(images.captions) == 6
    ours, peers = (images.folders[name] for name in TRAINERS)
    lines = (peers / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert {row["file_name"]: row["text"] for row in map(json.loads, lines)} == images.captions
    for name, caption in images.captions.items():
        assert (ours / name).read_bytes() == (peers / name).read_bytes()
        assert (ours / name).with_suffix(".txt").read_text(encoding="utf-8") == caption


def test_stand_in_transforms_give_the_pixels_that_we_train_on(image_folder: Callable[..., Path]) -> None:
    from torchvision import transforms

    from sdlora.data.batching.buckets import place, square_bucket
    from sdlora.data.batching.cache import to_pixels
    from sdlora.data.reading.folder import load_pixels

    mode = transforms.InterpolationMode.LANCZOS
    steps = [
        transforms.Resize(32, interpolation=mode),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    image = load_pixels(image_folder(count=1) / "thing00.png")

    expected = to_pixels(image, place(40, 40, square_bucket(32, 8)), mirror=False)[0]
    torch.testing.assert_close(transforms.Compose(steps)(image), expected)


def test_a_fast_trainer_that_learns_nothing_fails() -> None:
    from train_speed import Side, problems, table

    def side(loss: float, rate: float) -> Side:
        return Side(rate, 0.1, 20.0, 5.0, 2**30, loss)

    layouts = {"sdlora": {"unet.a": (4, 1.0)}, "diffusers": {"unet.a": (4, 1.0)}}
    good = [{"sdlora": side(0.50, 20.0), "diffusers": side(0.49, 10.0)}] * 2
    idle = [{"sdlora": side(0.60, 99.0), "diffusers": side(0.49, 10.0)}] * 2
    weak = [{"sdlora": side(0.58, 99.0), "diffusers": side(0.49, 10.0)}] * 2

    assert problems(good, 0.6, layouts) == []
    assert "2.00 (2.00..2.00)" in table(good, 0.6)
    assert "sdlora did not learn" in problems(idle, 0.6, layouts)[0]
    assert "18% of what diffusers did" in problems(weak, 0.6, layouts)[0]
    assert "differ in layers" in problems(good, 0.6, {**layouts, "sdlora": {}})[0]


def test_loss_of_an_adapter_that_does_nothing_is_the_bases(
    tmp_path: Path, tiny_base: Path, image_folder: Callable[..., Path]
) -> None:
    from adapter_loss import LossMeter, layout

    from sdlora.adapters.attach import create_adapter
    from sdlora.adapters.canonical import AdapterFile, AdapterInfo
    from sdlora.config.schema import AdapterConfig
    from sdlora.families.loading import load_model
    from sdlora.formats.adapter_files import write_adapter

    folder = image_folder(count=2)
    captions = {"thing00.png": "an icon of a cat 0", "thing01.png": "an icon of a cat 1"}
    meter = LossMeter(tiny_base, folder, captions, resolution=32, min_snr_gamma=5.0)
    model = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    weights = create_adapter(model, AdapterConfig(rank=4, alpha=2.0), seed=0)
    file = tmp_path / "idle.safetensors"
    write_adapter(AdapterFile(weights, AdapterInfo("sd1")), "webui", file, torch.float32, model.info)

    base = meter.measure(None)
    assert meter.measure(file) == pytest.approx(base, rel=1e-6)
    assert meter.measure(None) == base
    assert len(layout(file)) == len(weights) > 0
    assert set(layout(file).values()) == {(4, 0.5)}
