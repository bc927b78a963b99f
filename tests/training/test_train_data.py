"""What goes into training, seen through the training itself on a tiny real base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.adapters.attach import adapters_disabled
from sdlora.config.schema import Config
from sdlora.data.batching.batches import generator_for, make_batch
from sdlora.data.batching.cache import to_pixels
from sdlora.data.reading.image_files import load_pixels
from sdlora.data.reading.items import Visit
from sdlora.diffusion.process import per_image_loss
from sdlora.errors import ConfigError, DatasetError
from sdlora.events import Control, Decided, Emitter, Event, Notice, StepDone
from sdlora.families.base import SizeHint
from sdlora.families.loading import load_model
from sdlora.run_folder import list_checkpoints
from sdlora.training.objective import loss_of
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.step import train_step
from sdlora.training.train import train

Make = Callable[..., Path]
FAST = (
    "adapter.rank=2",
    "training.batch_size=2",
    "training.steps=4",
    "data.validation=0",
    "sample.prompts=[]",
    "training.device=cpu",
    "training.precision=fp32",
)


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Make) -> Callable[..., Config]:
    folder = image_folder()

    def make(run: str, *overrides: str, **values: Any) -> Config:
        return run_settings(run, FAST, overrides, {"data.folder": folder, **values})

    return make


def prepared(config: Config, events: list[Event] | None = None) -> Run:
    return prepare_run(config, resume=False, emit=Emitter(() if events is None else (events.append,)))


def visits_of(run: Run, epoch: int = 0) -> list[int]:
    steps = range(epoch * run.order.steps_per_epoch, (epoch + 1) * run.order.steps_per_epoch)
    return [v.index for step in steps for rank in run.order.step(step) for micro in rank for v in micro]


# --- sources


def test_the_weight_of_a_source_is_the_weight_of_its_gradient(
    settings: Callable[..., Config], image_folder: Make
) -> None:
    folder = image_folder(count=1, name="one")
    norms = []
    for weight in (1.0, 0.25):
        config = settings(
            f"weight{weight}",
            "optimizer.max_grad_norm=0",
            "data.caption_dropout=0",
            **{"data.folder": None, "data.sources": [{"folder": folder, "weight": weight}]},
        )
        norms.append(train_step(prepared(config))[1])
    assert norms[1] == pytest.approx(0.25 * norms[0], rel=1e-5)


def test_regularisation_images_are_trained_on_but_never_held_out_or_previewed(
    settings: Callable[..., Config], image_folder: Make
) -> None:
    events: list[Event] = []
    config = settings(
        "run",
        "data.validation=2",
        "sample.prompts=['a']",
        "data.trigger_word=zork",
        **{"data.sources": [{"folder": image_folder(4, "class"), "regularisation": True, "repeats": 2}]},
    )
    run = prepared(config, events)
    assert [item.regularisation for item in run.validation.items] == [False, False]
    roles = Counter(item.regularisation for item in run.training.items)
    assert roles == {False: 4, True: 4}
    assert Counter(visits_of(run)) == {**dict.fromkeys(range(4), 1), **dict.fromkeys(range(4, 8), 2)}
    captions = [item.caption for item in run.training.items]
    assert all(caption.startswith("zork, ") for caption in captions[:4])
    assert not any("zork" in caption for caption in captions[4:])


def test_what_is_odd_about_the_folders_is_told(settings: Callable[..., Config], image_folder: Make) -> None:
    folder = image_folder(2, "7_cat")
    events: list[Event] = []
    prepared(settings("run", **{"data.folder": folder}), events)
    notes = [event.message for event in events if isinstance(event, Notice)]
    assert any(note.startswith("7_cat: is named as kohya's folders are") for note in notes)


def test_without_any_folder_nothing_starts(settings: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="no folder of images given"):
        prepared(settings("run", **{"data.folder": None}))


# --- captions


def test_varying_captions_are_told_encoded_and_trained_on(
    settings: Callable[..., Config], image_folder: Make
) -> None:
    events: list[Event] = []
    config = settings("run", "data.shuffle_tags=true", "data.caption_suffix='ink, drawn, {x|y}'")
    run = prepared(config, events)
    assert run.config.data.encode_captions == "before"
    decided = [
        event for event in events if isinstance(event, Decided) and event.key == "data.encode_captions"
    ]
    assert len(decided) == 1 and "different captions in" in decided[0].reason
    assert not run.keep_text


@pytest.mark.parametrize("mode", ["before", "in loop"])
def test_text_is_that_of_the_captions_whenever_it_is_encoded(
    settings: Callable[..., Config], image_folder: Make, mode: str
) -> None:
    folder = image_folder(3, "tags")
    for number in range(3):
        (folder / f"thing{number:02d}.txt").write_text(f"n{number}, (a:2), b, c, d", encoding="utf-8")
    run = prepared(
        settings(
            mode.replace(" ", "-"),
            "data.shuffle_tags=true",
            f"data.encode_captions='{mode}'",
            **{"data.folder": folder},
        )
    )
    assert run.keep_text == (mode == "in loop")
    texts = set()
    for step in range(9):
        visits = run.order.step(step)[0][0]
        batch = make_batch(run.training, run.model, visits, seed=0)
        assert batch.text is not None
        for place, caption in enumerate(batch.captions):
            expected = run.model.encode_text([caption])["states"][0]
            torch.testing.assert_close(batch.text["states"][place], expected)
            texts.add(caption)
    assert len(texts) > 4
    assert all(r"\(a:2\)" in text for text in texts)


def test_in_the_loop_nothing_but_plain_captions_is_kept(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    run = prepared(settings("run", "data.tag_dropout=0.5", "data.encode_captions='in loop'"))
    kept = set((tmp_path / "cache" / "captions").rglob("*.safetensors"))
    for step in range(3):
        visits = run.order.step(step)[0][0]
        make_batch(run.training, run.model, visits, seed=0)
    assert set((tmp_path / "cache" / "captions").rglob("*.safetensors")) == kept
    assert len(kept) == 7


# --- crops, masks, resolutions


def test_random_looks_give_the_sizes_and_crops_that_were_cut(settings: Callable[..., Config]) -> None:
    for variants in (0, 3):
        run = prepared(
            settings(
                f"run{variants}",
                "data.buckets=false",
                "data.crop=random",
                f"data.variants={variants}",
                "data.flip=true",
            )
        )
        crops = set()
        for step in range(6):
            visits = run.order.step(step)[0][0]
            batch = make_batch(run.training, run.model, visits, seed=0)
            for visit, size in zip(visits, batch.sizes, strict=True):
                view, item = run.training.views.at(visit, 0), run.training.items[visit.index]
                assert (size.crop, size.target) == (view.placement.crop, view.placement.bucket)
                assert size.original == (item.height, item.width)
                pixels = to_pixels(load_pixels(item), view.placement, mirror=view.mirror)
                direct = run.model.encode_images(pixels)
                stored = run.training.image(visit.index, view).posterior
                torch.testing.assert_close(stored.mean, direct.mean)
                crops.add(size.crop)
        assert len(crops) > 4


def test_only_what_the_mask_shows_is_trained(settings: Callable[..., Config], image_folder: Make) -> None:
    """Outside of the mask the image may be anything: with equal latents inside, the loss is the same."""
    prediction, target = torch.randn((2, 2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros((2, 1, 8, 8))
    mask[0, :, :4], mask[1, :, 0, 0] = 1.0, 0.5
    loss = per_image_loss(prediction, target, mask)
    first = (prediction[0, :, :4] - target[0, :, :4]).square().mean()
    second = (prediction[1, :, 0, 0] - target[1, :, 0, 0]).square().mean()
    torch.testing.assert_close(loss, torch.stack([first, second]))
    torch.testing.assert_close(
        per_image_loss(prediction, target, torch.ones_like(mask)), per_image_loss(prediction, target)
    )
    assert per_image_loss(prediction, target, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_masks_reach_the_loss_at_the_size_of_the_latents(
    settings: Callable[..., Config], image_folder: Make, tmp_path: Path
) -> None:
    folder = image_folder(2, "square")
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (0, 0, 20, 40))
    mask.save(masks / "thing00.png")
    values = {"data.folder": folder, "data.mask_folder": masks}
    run = prepared(settings("run", "data.buckets=false", "data.unmasked_weight=0.25", **values))
    batch = make_batch(
        run.training,
        run.model,
        (Visit(0, 0, 0), Visit(1, 0, 0)),
        seed=0,
        unmasked_weight=0.25,
    )
    assert batch.mask is not None
    assert batch.mask[0, 0].tolist() == [[1.0] * 4 + [0.25] * 4] * 8
    assert torch.equal(batch.mask[1], torch.ones((1, 8, 8)))
    train_step(run)


def test_a_mask_outside_of_the_crop_is_refused_by_name(
    settings: Callable[..., Config], image_folder: Make, tmp_path: Path
) -> None:
    folder, masks = image_folder(2, "wide"), tmp_path / "masks"
    masks.mkdir()
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 4, 32))
    mask.save(masks / "thing01.png")
    values = {"data.folder": folder, "data.mask_folder": masks}
    with pytest.raises(DatasetError, match=r"thing01\.png: its mask lets nothing through"):
        prepared(settings("run", "data.buckets=false", **values))
    (folder / "thing01.json").write_text('{"focus": [0, 0.5]}', encoding="utf-8")
    run = prepared(settings("run2", "data.buckets=false", **values))
    assert run.training.image(1).size.crop == (0, 0)


def test_each_image_is_trained_at_each_resolution_it_is_large_enough_for(
    settings: Callable[..., Config],
) -> None:
    values = ("data.buckets=false", "data.resolution=40", "data.more_resolutions=[32, 64]")
    run = prepared(settings("run", *values))
    buckets = Counter(placement.bucket for placement in run.training.placements)
    assert buckets == {(40, 40): 6, (32, 32): 6}  # 64 px would enlarge them more than 1.5 times
    assert len(run.dataset.items) == 6
    assert Counter(visits_of(run)) == dict.fromkeys(range(12), 1)
    train_step(run)


def test_small_images_keep_their_size_if_enlarging_is_off_and_are_warned_of_if_not(
    settings: Callable[..., Config],
) -> None:
    events: list[Event] = []
    prepared(settings("up", "data.resolution=128"), events)
    notes = [event.message for event in events if isinstance(event, Notice)]
    assert any(note.startswith("6 of 6 images are enlarged more than 1.5 times") for note in notes)
    run = prepared(settings("own", "data.resolution=128", "data.upscale=false"))
    sizes = {
        (item.height, item.width): p.bucket
        for item, p in zip(run.training.items, run.training.placements, strict=True)
    }
    assert sizes == {(40, 40): (40, 40), (32, 64): (32, 64), (64, 32): (64, 32)}


def test_topped_up_batches_are_full(settings: Callable[..., Config]) -> None:
    run = prepared(settings("run", "data.top_up=true", "training.batch_size=4"))
    sizes = {len(micro) for step in range(6) for rank in run.order.step(step) for micro in rank if micro}
    assert sizes == {4}
    train_step(run)


# --- prior preservation


def drift_on_blank(run: Run) -> float:
    """Return how far the adapter has moved what the base predicts for the empty caption."""
    generator = generator_for("drift")
    noisy = torch.randn((4, 4, 8, 8), generator=generator)
    timesteps = torch.tensor([100, 300, 500, 800])
    sizes = [SizeHint((32, 32), (0, 0), (32, 32))] * 4
    with torch.no_grad():
        text = run.model.encode_text([""] * 4)
        ours = run.model.predict(noisy, timesteps, text, sizes)
        with adapters_disabled(run.model):
            theirs = run.model.predict(noisy, timesteps, text, sizes)
    return float((ours - theirs).square().mean())


def test_disabled_adapters_leave_the_base_bit_for_bit_and_go_on_learning(
    settings: Callable[..., Config], tiny_base: Path
) -> None:
    run = prepared(
        settings("run", "optimizer.learning_rate=0.01", "training.steps=3", "optimizer.warmup_steps=0")
    )
    for _ in range(2):
        train_step(run)
    base = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    base.prepare(training=True)
    noisy = torch.randn((1, 4, 8, 8), generator=generator_for(1))
    inputs = (noisy, torch.tensor([500]), base.encode_text(["a cat"]), [SizeHint((32, 32), (0, 0), (32, 32))])
    with torch.no_grad():
        changed = run.model.predict(*inputs)
        with adapters_disabled(run.model):
            assert torch.equal(run.model.predict(*inputs), base.predict(*inputs))
        assert torch.equal(run.model.predict(*inputs), changed)
    assert not torch.allclose(changed, base.predict(*inputs))
    assert all(parameter.requires_grad for parameter in run.parameters())
    train_step(run)


def test_regularisation_images_hold_the_adapter_to_the_base_where_asked_for(
    settings: Callable[..., Config], image_folder: Make
) -> None:
    """At first the adapter is the base, so these images have no error; without it they have one."""
    source = {"folder": image_folder(1, "class"), "regularisation": True}
    learned = image_folder(1, "me")
    losses = {}
    for prior in (0.0, 0.5):
        config = settings(
            f"prior{prior}",
            f"data.prior_preservation={prior}",
            "data.caption_dropout=0",
            **{"data.sources": [source], "data.folder": learned},
        )
        run = prepared(config)
        visits = (Visit(0, 0, 0), Visit(1, 0, 0))
        batch = make_batch(run.training, run.model, visits, seed=0)
        assert batch.regularisation == (False, True)
        losses[prior] = loss_of(run.model, batch, config)[0].tolist()
    assert losses[0.5][0] == losses[0.0][0] > 0
    assert losses[0.5][1] < 1e-10 < 1e-3 < losses[0.0][1]  # rounding: the base sees that image alone


@pytest.mark.long
def test_without_such_images_the_empty_caption_holds_it(settings: Callable[..., Config]) -> None:
    drifts, first = {}, {}
    for prior in (0.0, 30.0):
        config = settings(
            f"prior{prior}",
            f"data.prior_preservation={prior}",
            "data.caption_dropout=0",
            "optimizer.learning_rate=0.01",
            "training.steps=14",
            "optimizer.max_grad_norm=0",
        )
        run = prepared(config)
        first[prior] = train_step(run)[:2]
        for _ in range(13):
            train_step(run)
        drifts[prior] = drift_on_blank(run)
    assert first[0.0] == pytest.approx(first[30.0], rel=1e-5)  # nothing has moved yet
    assert 0 < drifts[30.0] < 0.5 * drifts[0.0]


# --- resuming


@pytest.mark.parametrize(
    "overrides",
    [
        (
            *(
                "data.shuffle_tags=true",
                "data.tag_dropout=0.3",
                "data.wildcards=true",
                "data.caption_lines=one",
            ),
            *("data.crop=random", "data.colour_jitter=0.1", "data.flip=true", "data.buckets=false"),
        ),
        (
            *("data.shuffle_tags=true", "data.encode_captions='in loop'", "data.emphasis=true"),
            *("data.crop=random", "data.variants=0", "data.alpha_mask=true", "data.top_up=true"),
        ),
        pytest.param(
            (
                *("data.shuffle_tags=true", "adapter.text_encoder=true", "data.more_resolutions=[40]"),
                "data.prior_preservation=0.5",
            ),
            marks=pytest.mark.long,
        ),
    ],
    ids=["kept", "in-loop", "text-encoder"],
)
def test_a_run_stopped_and_resumed_ends_bit_identical_with_everything_that_varies(
    settings: Callable[..., Config], image_folder: Make, overrides: tuple[str, ...]
) -> None:
    folder = image_folder(4, "varied")
    for number in range(4):
        text = f"a {{b|c|d}}, e{number}, (f:1.3), g\nsecond, line {number}, of, tags"
        (folder / f"thing{number:02d}.txt").write_text(text, encoding="utf-8")
    Image.new("RGBA", (40, 40), (9, 9, 200, 90)).save(folder / "thing00.png")
    values = {"data.folder": folder}
    whole = train(settings("whole", *overrides, **values))
    control = Control()
    config = settings("parts", *overrides, **values)

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            control.stop()

    first = train(config, listeners=[stop], control=control)
    assert (first.stopped, first.step) == (True, 2)
    second = train(config, resume=True)
    assert whole.adapter_file is not None and second.adapter_file is not None
    uninterrupted, other = load_file(whole.adapter_file), load_file(second.adapter_file)
    assert uninterrupted.keys() == other.keys() and len(uninterrupted) > 10
    assert [name for name in uninterrupted if not torch.equal(uninterrupted[name], other[name])] == []
    states = [
        load_file(list_checkpoints(result.folder / "checkpoints")[-1].optimizer_file)
        for result in (whole, second)
    ]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
