"""The cache of encodings: what is stored, when it is used again, and when it must not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from sdlora.config.schema import ModelConfig
from sdlora.data.batching.buckets import Placement, make_buckets, place
from sdlora.data.batching.cache import EncodedDataset, to_pixels
from sdlora.data.batching.views import AugmentationViews
from sdlora.data.reading.folder import Dataset, scan
from sdlora.errors import DatasetError
from sdlora.families.loading import load_model
from sdlora.families.sd1 import StableDiffusion1

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> StableDiffusion1:
    return load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))


def encoded(dataset: Dataset, model: StableDiffusion1, folder: Path, **options: object) -> EncodedDataset:
    buckets = make_buckets(32, model.facts.size_multiple)
    placements = [place(item.height, item.width, buckets) for item in dataset.items]
    views = AugmentationViews(tuple(placements), dataset.items, flip=bool(options.pop("flip", False)))
    return EncodedDataset(dataset.items, views, model, folder, **options)  # type: ignore[arg-type]


def replaced(data: EncodedDataset, *placements: Placement) -> None:
    data.views = replace(data.views, placements=placements)


def entries(folder: Path, kind: str) -> dict[Path, int]:
    """Return the entries with their inodes, which change when one is written again."""
    return {path: path.stat().st_ino for path in (folder / kind).rglob("*.safetensors")}


def test_everything_is_encoded_once_and_found_again(
    model: StableDiffusion1, image_folder: Make, tmp_path: Path
) -> None:
    dataset, cache, emitted = scan(image_folder()), tmp_path / "cache", []
    data = encoded(dataset, model, cache)
    data.encode_all(lambda done, total: emitted.append((done, total)))
    assert emitted == [(n, 13) for n in range(1, 14)]  # six images, six captions, the empty caption
    first = entries(cache, "images") | entries(cache, "captions")
    assert len(first) == 13
    again = encoded(dataset, model, cache)
    again.encode_all()
    assert entries(cache, "images") | entries(cache, "captions") == first
    for index in range(6):
        assert torch.equal(again.image(index).posterior.mean, data.image(index).posterior.mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captions_are_kept_in_the_denoisers_number_format(
    dtype: torch.dtype, image_folder: Make, tiny_base: Path, tmp_path: Path
) -> None:
    used = load_model(str(tiny_base), dtype=dtype, device=torch.device("cpu"))
    data = encoded(scan(image_folder(1)), used, tmp_path)
    data.encode_all()
    files = sorted(entries(tmp_path, "captions"))
    assert len(files) == 2
    assert all(tensor.dtype == dtype for file in files for tensor in load_file(file).values())
    with torch.no_grad():
        (direct,) = used.encode_text([data.items[0].caption])["states"]
    assert torch.equal(data.caption(data.items[0].caption)["states"], direct.to(dtype))


def test_what_is_kept_is_the_posterior_and_each_draw_is_fresh(
    model: StableDiffusion1, image_folder: Make, tmp_path: Path
) -> None:
    dataset = scan(image_folder(1))
    data = encoded(dataset, model, tmp_path)
    posterior = data.image(0).posterior
    pixels = to_pixels(Image.open(dataset.items[0].path).convert("RGB"), data.placements[0], mirror=False)
    direct = model.vae.encode(pixels).latent_dist
    assert torch.equal(posterior.mean, direct.mean)
    assert torch.equal(posterior.logvar, direct.logvar)
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("change", ["image", "caption", "geometry", "background", "encoder", "quantisation"])
def test_any_change_is_noticed(
    model: StableDiffusion1, tiny_base: Path, image_folder: Make, tmp_path: Path, change: str
) -> None:
    folder, cache = image_folder(1), tmp_path / "cache"
    dataset = scan(folder)
    encoded(dataset, model, cache).encode_all()
    before = entries(cache, "images") | entries(cache, "captions")
    options: dict[str, object] = {}
    used = model
    if change == "image":
        image = Image.open(folder / "thing00.png")
        ImageOps.invert(image).save(folder / "thing00.png")
        dataset = scan(folder)
    elif change == "caption":
        (folder / "thing00.txt").write_text("something else", encoding="utf-8")
        dataset = scan(folder)
    elif change == "background":
        options["background"] = "#000000"
    elif change == "quantisation":
        used = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
        with torch.no_grad():
            used.vae.quant_conv.bias.add_(0.1)
    elif change == "encoder":
        used = load_model(
            ModelConfig(base=str(tiny_base), clip_skip=2), dtype=torch.float32, device=torch.device("cpu")
        )
    data = encoded(dataset, used, cache, **options)
    if change == "geometry":
        placement = data.placements[0]
        replaced(data, Placement((24, 24), (24, 24), (0, 0)))
        assert placement != data.placements[0]
    data.encode_all()
    after = entries(cache, "images") | entries(cache, "captions")
    assert set(before) < set(after)


def test_mirrored_images_are_encoded_as_mirrored(
    model: StableDiffusion1, image_folder: Make, tmp_path: Path
) -> None:
    dataset = scan(image_folder(2))
    data = encoded(dataset, model, tmp_path, flip=True)
    image = Image.open(dataset.items[1].path).convert("RGB")
    mirrored = data.image(1, data.views.plain(1, mirror=True))
    pixels = to_pixels(ImageOps.mirror(image), data.placements[1], mirror=False)
    assert torch.equal(mirrored.posterior.mean, model.vae.encode(pixels).latent_dist.mean)
    assert not torch.equal(mirrored.posterior.mean, data.image(1).posterior.mean)


def test_a_damaged_entry_is_encoded_again(
    model: StableDiffusion1, image_folder: Make, tmp_path: Path
) -> None:
    dataset = scan(image_folder(1))
    wanted = encoded(dataset, model, tmp_path).image(0).posterior.mean
    entry = next(iter(entries(tmp_path, "images")))
    entry.write_bytes(entry.read_bytes()[:50])
    assert torch.equal(encoded(dataset, model, tmp_path).image(0).posterior.mean, wanted)


def test_an_entry_full_of_zeros_is_encoded_again(
    model: StableDiffusion1, image_folder: Make, tmp_path: Path
) -> None:
    """What a lost power supply can leave: the right length, the right header, no data."""
    dataset = scan(image_folder(1))
    wanted = encoded(dataset, model, tmp_path).image(0).posterior.mean
    entry = next(iter(entries(tmp_path, "images")))
    data = entry.read_bytes()
    entry.write_bytes(data[:-64] + bytes(64))
    assert torch.equal(encoded(dataset, model, tmp_path).image(0).posterior.mean, wanted)
    assert entry.read_bytes() == data


@pytest.mark.parametrize("part", ["vae.quant_conv", "text_encoder"])
def test_encodings_that_are_not_finite_are_named_and_not_kept(
    tiny_base: Path, image_folder: Make, tmp_path: Path, part: str
) -> None:
    broken = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        module = broken.vae.quant_conv if part == "vae.quant_conv" else broken.components()["text_encoder"]
        for values in module.parameters():
            values.fill_(float("nan"))
    dataset = scan(image_folder(1))
    data = encoded(dataset, broken, tmp_path / "cache")
    words = {"vae.quant_conv": r"thing00\.png: its latents", "text_encoder": "caption `.*`: its encoding"}
    with pytest.raises(DatasetError, match=rf"{words[part]} (is|are) not finite"):
        data.encode_all()
    kept = entries(tmp_path / "cache", "images") | entries(tmp_path / "cache", "captions")
    assert len(kept) == (2 if part == "vae.quant_conv" else 0)  # captions come first: this one, and the empty


def test_crop_and_resize_are_cut_where_the_placement_says() -> None:
    ramp = np.zeros((40, 100, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(100, dtype=np.uint8)
    pixels = to_pixels(Image.fromarray(ramp), Placement((40, 40), (40, 100), (0, 30)), mirror=False)
    assert pixels.shape == (1, 3, 40, 40)
    values = ((pixels[0, 0, 0] + 1) * 127.5).round()
    assert values.tolist() == list(range(30, 70))


def test_an_extremely_long_image_needs_little_memory() -> None:
    long = Image.new("RGB", (30000, 2), (200, 10, 10))
    placement = place(2, 30000, [(64, 64)])
    assert placement.resized[1] > 500_000
    pixels = to_pixels(long, placement, mirror=False)
    torch.testing.assert_close(pixels[0, 0], torch.full((64, 64), 200 / 127.5 - 1))


def test_size_hints_hold_the_original_size_and_the_true_crop(
    model: StableDiffusion1, image_folder: Make, tmp_path: Path
) -> None:
    dataset = scan(image_folder(2))
    data = encoded(dataset, model, tmp_path, flip=True)
    item, placement = dataset.items[1], data.placements[1]
    size = data.image(1).size
    assert (size.original, size.crop, size.target) == (
        (item.height, item.width),
        placement.crop,
        placement.bucket,
    )
    wider = placement.bucket[1] + 6
    moved = replace(placement, resized=(placement.resized[0], wider), crop=(0, 2))
    replaced(data, data.placements[0], moved)
    assert data.image(1, data.views.plain(1, mirror=True)).size.crop == (0, 4)
