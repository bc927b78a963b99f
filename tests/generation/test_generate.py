"""Generation on real small models: repeatable, at any strength, merged or not, and written without loss."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adapters.kinds import dora, loha
from PIL import Image
from torch import Tensor

from sdlora.adapters.attach import create_adapter, target_modules
from sdlora.adapters.canonical import (
    AdapterFile,
    AdapterInfo,
    AdapterWeights,
    LowRankPair,
    ModuleKey,
    Update,
)
from sdlora.adapters.module_paths import base_weight, module_at
from sdlora.adapters.strength import Strength
from sdlora.config.schema import AdapterConfig, SampleConfig
from sdlora.diffusion.samplers import SAMPLERS
from sdlora.errors import AdapterFileError, ConfigError, ModelError, OutputError, SdloraError
from sdlora.families.base import DiffusionModel
from sdlora.families.loading import load_model
from sdlora.formats.adapter_files import write_adapter
from sdlora.generation.generate import GenerateRequest, ImageGenerator, generate, render
from sdlora.generation.png_info import read_parameters
from sdlora.generation.render import denoise

LONG = "an icon of a cat and a dog and a bird " * 12  # three chunks of 75 tokens


def request(prompt: str = "an icon of a cat", seed: int = 1, **changes: Any) -> GenerateRequest:
    plain = GenerateRequest(prompt, height=32, width=32, steps=3, guidance=4.0, sampler="DDIM", seed=seed)
    return dataclasses.replace(plain, **changes)


def trained(model: DiffusionModel, seed: int, text_encoder: bool = True, size: float = 0.3) -> AdapterWeights:
    config = AdapterConfig(targets="all", rank=4, alpha=4.0, text_encoder=text_encoder)
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            key: LowRankPair(pair.down, size * torch.randn(pair.up.shape, generator=generator), pair.alpha)
            for key, pair in create_adapter(model, config, seed).items()
        }
    )


def acting(model: DiffusionModel, seed: int, kind: str) -> AdapterWeights:
    """Return an adapter of a kind that changes the image."""
    updates: dict[ModuleKey, Update] = {}
    for key, pair in trained(model, seed).items():
        weight = base_weight(module_at(model, key))
        updates[key] = pair if kind == "lora" else dora(pair, weight)
        if kind == "loha":
            updates[key] = loha(tuple(weight.shape), alpha=6.0, seed=seed)
    return AdapterWeights(updates)


def state(model: DiffusionModel) -> dict[str, Tensor]:
    return {
        f"{component}.{name}": tensor.clone()
        for component, module in model.components().items()
        for name, tensor in module.state_dict().items()
    }


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.asarray(image).astype(numpy.int16))


def same(first: Image.Image, second: Image.Image, within: int = 0) -> bool:
    return first.size == second.size and int((pixels(first) - pixels(second)).abs().max()) <= within


@pytest.fixture(scope="module")
def shared(tiny_base: Path) -> ImageGenerator:
    return ImageGenerator.load(str(tiny_base), device="cpu", precision="fp32")


@pytest.fixture
def generator(shared: ImageGenerator) -> Iterator[ImageGenerator]:
    """The tiny base; every test must be able to put it back exactly."""
    before = state(shared.model)
    yield shared
    shared.unmerge()
    for name in shared.adapters:
        shared.remove_adapter(name)
    after = state(shared.model)
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def adapter_file(shared: ImageGenerator, tmp_path: Path) -> Path:
    file = tmp_path / "my.style-v1.safetensors"
    adapter = AdapterFile(trained(shared.model, seed=1), AdapterInfo(family="sd1", name="other name"))
    write_adapter(adapter, "webui", file, torch.float32, shared.model.info)
    return file


# --- the loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_fixes_the_image(generator: ImageGenerator, sampler: str) -> None:
    first, again, other = (
        render(generator.model, [request(sampler=sampler, seed=seed)])[0] for seed in (1, 1, 2)
    )
    assert first.size == (32, 32) and first.mode == "RGB"
    assert same(first, again)
    assert not same(first, other, within=3)


@pytest.mark.long
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(generator: ImageGenerator, sampler: str) -> None:
    """Prompts of one and of three chunks, in any company; only rounding may differ."""
    requests = [
        request("an icon of a cat", 1, sampler=sampler),
        request(LONG, 2, sampler=sampler),
        request("doughnut", 3, sampler=sampler, negative_prompt=LONG),
    ]
    together = denoise(generator.model, requests)
    alone = torch.cat([denoise(generator.model, [single]) for single in requests])
    assert together.shape == (3, 4, 8, 8)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_mixed_requests_come_back_in_order(generator: ImageGenerator) -> None:
    requests = [
        request(seed=1),
        request(seed=2, steps=2),
        request(seed=3, height=64),
        request(seed=4, sampler="Euler a"),
        request(seed=5, guidance=1.0),
        *(request(seed=seed) for seed in range(6, 24)),  # more than one batch
    ]
    progress: list[tuple[int, int]] = []
    images = render(generator.model, requests, progress=lambda done, total: progress.append((done, total)))
    assert len(images) == len(requests) == 23
    assert images[2].size == (32, 64)
    for index in (1, 2, 3, 4, 22):
        assert same(images[index], render(generator.model, [requests[index]])[0], within=1)
    total = sum(asked.steps for asked in requests)
    assert progress[-1] == (total, total) and {total_told for _, total_told in progress} == {total}
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})


def test_without_guidance_the_negative_prompt_has_no_effect(generator: ImageGenerator) -> None:
    plain = denoise(generator.model, [request(guidance=1.0)])
    assert torch.equal(plain, denoise(generator.model, [request(guidance=1.0, negative_prompt="dog")]))
    assert torch.equal(plain, denoise(generator.model, [request(guidance=0.0, negative_prompt="dog")]))
    guided = denoise(generator.model, [request(guidance=4.0)])
    assert not torch.equal(guided, denoise(generator.model, [request(guidance=4.0, negative_prompt="dog")]))
    nearly = denoise(generator.model, [request(guidance=1.0 + 1e-6)])
    torch.testing.assert_close(plain, nearly, rtol=1e-4, atol=1e-4)


def test_rendering_leaves_modes_and_gradients_to_the_caller(generator: ImageGenerator) -> None:
    model = generator.model
    model.prepare(training=True)
    modes = {name: module.training for name, module in model.components().items()}
    assert modes["unet"] and not modes["vae"] and len(modes) == 3
    try:
        image = render(model, [request()])[0]
        assert {name: module.training for name, module in model.components().items()} == modes
        text = model.encode_text(["a"])["states"]
        assert not any(tensor.is_inference() for tensor in [text, *state(model).values()])
    finally:
        model.prepare(training=False)
    assert same(image, render(model, [request()])[0])


def test_the_mini_base_draws_at_its_own_size() -> None:
    model = load_model("mini", dtype=torch.float32, device=torch.device("cpu"))
    model.prepare(training=False)
    side = model.facts.native_resolution
    (image,) = render(model, [request(height=side, width=side, steps=4, sampler="DPM++ 2M Karras")])
    assert image.size == (side, side)
    assert float(pixels(image).float().std()) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 33}, r"`height=33`: .*multiples of 8 px; use 32"),
        ({"width": 100_000}, r"`width=100000`: more than 8192 px"),
        ({"width": 31}, r"`width=31`: .*use 32"),
        ({"width": 0}, r"`width=0`: .*use 8"),
        ({"steps": 0}, r"`steps=0`"),
        ({"guidance": -1.0}, r"`guidance=-1.0`"),
        ({"guidance": float("nan")}, r"`guidance=nan`"),
        ({"seed": -1}, r"`seed=-1`"),
        ({"sampler": "Eulr"}, r"`Eulr`.*did you mean `Euler`"),
    ],
)
def test_impossible_requests_say_what_is_possible(
    generator: ImageGenerator, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        render(generator.model, [request(), request(**changes)])


def test_an_overflow_names_prompt_and_precision(generator: ImageGenerator) -> None:
    huge = trained(generator.model, 1, size=1e30)
    generator.add_adapter(AdapterFile(huge, AdapterInfo(name="huge")))
    with pytest.raises(ModelError, match=r"`doughnut`.*overflowed in float32"):
        generator.generate([request("doughnut", strengths={"huge": 1e9})])
    assert generator.generate([request()])[0].image.size == (32, 32)


# --- adapters at strengths -----------------------------------------------------------------------------


def test_strength_zero_equals_the_base_bit_for_bit(generator: ImageGenerator) -> None:
    base = denoise(generator.model, [request()])
    generator.add_adapter(AdapterFile(trained(generator.model, 1), AdapterInfo(name="a")))
    assert torch.equal(denoise(generator.model, [request()]), base)
    images = generator.generate([request(strengths={"a": s}) for s in (1.0, 0.0, 0.5)] + [request()])
    expected = render(generator.model, [request()])[0]
    assert same(images[1].image, expected) and same(images[3].image, expected)
    assert not same(images[0].image, expected, within=3)
    assert not same(images[0].image, images[2].image, within=3)
    assert images[2].request.strengths == {"a": 0.5}


@pytest.mark.long
@pytest.mark.parametrize(("kinds", "guidance"), [(("loha",), 4.0), (("lora", "dora"), 1.0)])
@pytest.mark.usefixtures("two_threads")
def test_strengths_of_a_sweep_share_a_batch_and_each_image_is_the_one_drawn_alone(
    generator: ImageGenerator, kinds: tuple[str, ...], guidance: float
) -> None:
    base = render(generator.model, [request()])[0]
    for seed, kind in enumerate(kinds, start=1):
        weights = acting(generator.model, seed, kind)
        generator.add_adapter(AdapterFile(weights, AdapterInfo(name=kind)))
    shares: list[Strength] = [0.5, 1.5, {"unet": 1.0, "text_encoder": 0.3}, {"unet": -0.7}]
    requests = [request(strengths=dict.fromkeys(kinds, share), guidance=guidance) for share in shares]
    if len(kinds) > 1:  # not only by a common factor
        requests.append(request(strengths={kinds[0]: 0.4, kinds[1]: 1.2}, guidance=guidance))
    rows: list[int] = []
    unet = generator.model.components()["unet"]
    hook = unet.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    alone = generator.generate(requests, strengths_together=False)
    calls, total = len(rows), sum(rows)
    together = generator.generate(requests)
    hook.remove()
    assert len(rows) - calls < calls and sum(rows) - total == total == (1 + (guidance > 1)) * 3 * len(
        requests
    )
    assert all(same(first.image, second.image, 1) for first, second in zip(alone, together, strict=True))
    assert not any(
        same(first.image, second.image, 3) for i, first in enumerate(alone) for second in together[:i]
    )
    generator.generate(requests[::-1])
    assert same(render(generator.model, [request()])[0], base)


def test_strengths_change_between_calls_without_reloading(generator: ImageGenerator) -> None:
    name = generator.add_adapter(AdapterFile(trained(generator.model, 1), AdapterInfo(name="a.b")))
    assert name == "a.b" and generator.adapters == ("a.b",)
    weights = [module for module in generator.model.components().values()]
    first, second, again = (
        generator.generate([request(strengths={name: s})])[0].image for s in (0.8, 0.3, 0.8)
    )
    assert same(first, again) and not same(first, second, within=1)
    assert weights == list(generator.model.components().values())


def test_two_adapters_act_together_and_by_component(generator: ImageGenerator) -> None:
    generator.add_adapter(AdapterFile(trained(generator.model, 1), AdapterInfo(name="a")))
    generator.add_adapter(AdapterFile(trained(generator.model, 2, text_encoder=False), AdapterInfo(name="b")))
    cases: list[dict[str, Strength]] = [
        {"a": 0.7},
        {"b": 0.7},
        {"a": 0.7, "b": 0.7},
        {"a": {"unet": 0.7}},
        {"a": {"unet": 0.7, "text_encoder": 0.7}},
        {"b": {"unet": 0.7}},
    ]
    images = [
        generated.image for generated in generator.generate([request(strengths=case) for case in cases])
    ]
    # rows of one batch: their place in it may round differently
    assert same(images[0], images[4], 1) and same(images[1], images[5], 1)
    different = [images[0], images[1], images[2], images[3]]
    assert not any(same(x, y, 1) for i, x in enumerate(different) for y in different[:i])


def test_merged_equals_unmerged_and_undoing_restores_every_weight(generator: ImageGenerator) -> None:
    base, before = render(generator.model, [request()])[0], state(generator.model)
    generator.add_adapter(AdapterFile(trained(generator.model, 1), AdapterInfo(name="a")))
    generator.add_adapter(AdapterFile(trained(generator.model, 2), AdapterInfo(name="b")))
    strengths: dict[str, Strength] = {"a": 0.8, "b": {"unet": -0.3, "text_encoder": 0.5}}
    unmerged = generator.generate([request(strengths=strengths)])[0]
    generator.merge(strengths)
    merged, explicit = generator.generate([request(), request(strengths=strengths)])
    assert merged.request == explicit.request and merged.request.strengths == strengths
    assert same(merged.image, unmerged.image, within=1) and same(explicit.image, merged.image, within=1)
    assert not same(merged.image, base, within=3)
    for refused in (
        lambda: generator.generate([request(strengths={"a": 0.1})]),
        lambda: generator.merge({"a": 1.0}),
        lambda: generator.remove_adapter("a"),
        lambda: generator.add_adapter(AdapterFile(trained(generator.model, 3))),
    ):
        with pytest.raises(ConfigError, match="merged; call unmerge first"):
            refused()
    generator.unmerge()
    assert same(generator.generate([request()])[0].image, base)
    assert same(generator.generate([request(strengths=strengths)])[0].image, unmerged.image)
    for_the_call = generator.generate([request(strengths=strengths)], merge=True)[0]
    assert same(for_the_call.image, merged.image, within=1)
    generator.remove_adapter("a")
    generator.remove_adapter("b")
    after = state(generator.model)
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_fresh_adapter_changes_no_image(generator: ImageGenerator) -> None:
    base = render(generator.model, [request()])[0]
    config = AdapterConfig(targets="all", rank=4, alpha=4.0, text_encoder=True)
    generator.add_adapter(AdapterFile(create_adapter(generator.model, config, 0), AdapterInfo(name="a")))
    assert same(generator.generate([request(strengths={"a": 1.0})])[0].image, base)


def test_adapters_are_known_by_name(generator: ImageGenerator, adapter_file: Path) -> None:
    assert generator.add_adapter(adapter_file) == "my.style-v1"
    assert generator.add_adapter(str(adapter_file)) == "my.style-v1-2"
    assert generator.add_adapter(adapter_file, name="third") == "third"
    with pytest.raises(AdapterFileError, match=r"my\.style-v1\.safetensors: an adapter named `third`"):
        generator.add_adapter(adapter_file, name="third")
    for call in (
        lambda: generator.generate([request(strengths={"style": 1.0})]),
        lambda: generator.merge({"style": 1.0}),
        lambda: generator.remove_adapter("style"),
    ):
        with pytest.raises(ConfigError, match=r"`style`: not loaded \(loaded: `my\.style-v1`, `my"):
            call()
    assert len(generator.adapters) == 3


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    generator: ImageGenerator, adapter_file: Path
) -> None:
    base = render(generator.model, [request()])[0]
    weights = trained(generator.model, 1)
    with pytest.raises(AdapterFileError, match=r"x: an adapter for sdxl bases, but tiny is sd1"):
        generator.add_adapter(AdapterFile(weights, AdapterInfo(family="sdxl", name="x")))
    key = target_modules(generator.model, AdapterConfig(rank=1))[0]
    wide = AdapterWeights({**weights.pairs, key: LowRankPair(torch.zeros(1, 77), torch.zeros(88, 1), 1.0)})
    with pytest.raises(AdapterFileError, match=rf"^x: {key.path} is \(88, 77\) in the adapter but"):
        generator.add_adapter(AdapterFile(wide, AdapterInfo(name="x")))
    alien = AdapterWeights({ModuleKey("unet", "mid_block.nothing"): weights.pairs[key]})
    with pytest.raises(AdapterFileError, match=r"^x: its module mid_block\.nothing"):
        generator.add_adapter(AdapterFile(alien, AdapterInfo(name="x")))
    with pytest.raises(AdapterFileError, match="nowhere"):
        generator.add_adapter(adapter_file.parent / "nowhere.safetensors")
    assert generator.adapters == ()
    assert same(generator.generate([request()])[0].image, base)


# --- the command ---------------------------------------------------------------------------------------


def test_images_are_numbered_on_and_carry_their_settings(
    tiny_base: Path, adapter_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    adapters: list[tuple[Path, Strength]] = [(adapter_file, 0.8)]
    prompts = ["an icon of a cat", "doughnut"]

    def run() -> list[Path]:
        result = generate(
            str(tiny_base), adapters, prompts, folder, seed=7, steps=2, count=2, height=32, width=40,
            negative_prompt="dog", guidance=3.0, device="cpu", precision="fp32",
        )  # fmt: skip
        assert result.grid is None and result.seconds > 0
        return list(result.files)

    files = run()
    assert [file.name for file in files] == ["00001-7.png", "00002-8.png", "00003-7.png", "00004-8.png"]
    with adapter_file.open("rb") as stream:
        stream.seek(int.from_bytes(stream.read(8), "little") + 8)
        digest = hashlib.sha256(stream.read()).hexdigest()
    parameters = read_parameters(files[3])
    assert (
        parameters["Prompt"] == "doughnut <lora:my.style-v1:0.8>" and parameters["Negative prompt"] == "dog"
    )
    assert parameters["Lora hashes"] == f"my.style-v1: {digest[:12]}"
    assert (parameters["Seed"], parameters["Size"], parameters["CFG scale"], parameters["Steps"]) == (
        "8",
        "40x32",
        "3",
        "2",
    )
    assert (parameters["Sampler"], parameters["Schedule type"]) == ("DPM++ 2M", "Karras")
    before = {file: file.read_bytes() for file in files}
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    more = run()
    assert [file.name for file in more] == ["00005-7.png", "00006-8.png", "00007-7.png", "00008-8.png"]
    assert len(before) == 4 and all(file.read_bytes() == data for file, data in before.items())
    assert [same(Image.open(a), Image.open(b)) for a, b in zip(files, more, strict=True)] == [True] * 4
    assert len(list(folder.iterdir())) == 9


@pytest.mark.parametrize("merge", [False, True])
def test_a_sweep_renders_each_strength_from_one_seed(
    tiny_base: Path, adapter_file: Path, tmp_path: Path, merge: bool
) -> None:
    calls: list[tuple[int, int]] = []
    options: dict[str, Any] = {"steps": 2, "device": "cpu", "precision": "fp32", "seed": 3}
    result = generate(
        str(tiny_base), [(adapter_file, 0.8)], ["cat", "dog"], tmp_path / "sweep", strengths=[0, 0.5, 1.25],
        merge=merge, progress=lambda done, total: calls.append((done, total)), **options,
    )  # fmt: skip
    assert calls[-1] == (12, 12) and len(calls) == len(set(calls))
    assert [file.name for file in result.files] == [f"{i:05d}-3.png" for i in range(1, 7)]
    assert result.grid is not None and result.grid.name == "grid-0001.png"
    tags = [read_parameters(file)["Prompt"] for file in result.files]
    assert tags == [f"{p} <lora:my.style-v1:{s}>" for p in ("cat", "dog") for s in ("0", "0.5", "1.25")]
    with Image.open(result.grid) as sheet:
        assert sheet.width > 3 * 96 and sheet.height > 2 * 96
    plain = generate(str(tiny_base), [], ["cat", "dog"], tmp_path / "plain", **options)
    for base, zero, full in zip(plain.files, result.files[0::3], result.files[2::3], strict=True):
        assert same(Image.open(base), Image.open(zero))
        assert not same(Image.open(base), Image.open(full), within=3)


def test_several_adapters_and_separate_strengths_are_swept_by_a_factor(
    tiny_base: Path, adapter_file: Path, tmp_path: Path
) -> None:
    both: Strength = {"unet": 0.8, "text_encoder": 0.4}
    result = generate(
        str(tiny_base), [(adapter_file, 0.6), (adapter_file, both)], ["cat"], tmp_path / "out",
        strengths=[0.5, 1.0], steps=1, device="cpu", precision="fp32",
    )  # fmt: skip
    assert [read_parameters(file)["Prompt"] for file in result.files] == [
        "cat <lora:my.style-v1:0.3> <lora:my.style-v1-2:0.2:0.4>",
        "cat <lora:my.style-v1:0.6> <lora:my.style-v1-2:0.4:0.8>",
    ]


def test_what_is_left_open_follows_the_base(tiny_base: Path, tmp_path: Path) -> None:
    result = generate(str(tiny_base), [], ["cat"], tmp_path / "out", device="cpu")
    parameters, defaults = read_parameters(result.files[0]), SampleConfig()
    assert (parameters["Size"], parameters["CFG scale"]) == ("32x32", "7")
    assert (parameters["Steps"], parameters["Seed"]) == (str(defaults.steps), str(defaults.seed))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"prompts": []}, ConfigError, "no prompt given"),
        ({"count": 0}, ConfigError, "`count=0`"),
        ({"strengths": [1.0]}, ConfigError, "needs an adapter"),
        ({"sampler": "Zebra", "count": 0}, ConfigError, "2 problems:\n.*count=0.*\n.*`Zebra`"),
        ({"height": 30}, ConfigError, "`height=30`: .*use 32"),
        ({"steps": 0}, ConfigError, "`steps=0`"),
        ({"base": "nowhere"}, ModelError, "nowhere"),
        ({"adapters": [("nowhere.safetensors", 1.0)]}, AdapterFileError, "nowhere.safetensors"),
        ({"adapters": [("x.safetensors", float("inf"))]}, ConfigError, "strength `inf`"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any], kind: type[SdloraError], message: str
) -> None:
    call: dict[str, Any] = {
        "base": str(tiny_base),
        "adapters": [],
        "prompts": ["cat"],
        "device": "cpu",
        **options,
    }
    with pytest.raises(kind, match=message):
        generate(output=tmp_path / "out", **call)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_named(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"out: is a file, but images need a folder"):
        generate(str(tiny_base), [], ["cat"], tmp_path / "out", steps=1, device="cpu")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"
