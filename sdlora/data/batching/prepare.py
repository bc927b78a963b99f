"""Prepares data: images are placed, ordered and encoded for the loop, with notices of what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...config.defaults import BaseFacts, DataFacts, OpenSettings
from ...config.schema import Config
from ...errors import ConfigError
from ...events import Caching, Emitter, Notice
from ...families.base import DiffusionModel
from ...families.emphasis import escape
from ..reading.cache_folder import default_cache_folder
from ..reading.items import Dataset, ImageItem
from ..reading.wording import Wording
from .buckets import MAX_UPSCALE, Placement, Placer, further, placer, upscale
from .cache import EncodedDataset, EncoderPrints
from .caption_plan import CaptionRun, plan_captions
from .order import Order
from .views import AugmentationViews


@dataclass(frozen=True)
class Outline:
    """Which image is seen when, how it is cropped, and with which caption.

    Attributes:
        items: the images trained on, once for each resolution.
        placements: of each of them.
        order: which image when.
        steps: optimizer steps of the run.
        captions: how captions reach the denoiser.
    """

    items: tuple[ImageItem, ...]
    placements: tuple[Placement, ...]
    order: Order
    steps: int
    captions: CaptionRun


@dataclass(frozen=True)
class PreparedData:
    """Everything the loop reads from, encoded as far as possible.

    Attributes:
        training: the images trained on, once for each resolution.
        validation: the images held out.
        order: which image when.
        steps: optimizer steps of the run.
        prints: what encoded them.
    """

    training: EncodedDataset
    validation: EncodedDataset
    order: Order
    steps: int
    prints: EncoderPrints


def base_facts(model: DiffusionModel, device: str, num_processes: int = 1) -> BaseFacts:
    """Return the facts that defaults follow, of a base (loaded or a blueprint) and of a type of device."""
    base = model.base
    parts = tuple(dict.fromkeys(component.part for component in model.info.components.values()))
    return BaseFacts(
        base.title, base.recommended, model.facts.native_resolution, device, parts, num_processes
    )


def data_facts(config: Config, training: Dataset, validation: Dataset) -> DataFacts:
    """Return the facts about the images that defaults follow.

    Captions become prompts for previews, held-out ones first: brackets that are ordinary characters in
    captions are escaped.
    """
    captions = [item.caption for item in (*validation.items, *training.learned)]
    prompts = captions if config.data.emphasis else [escape(caption) for caption in captions]
    return DataFacts(len(training.learned), training.num_visits, len(validation.items), tuple(prompts))


def outline_data(
    open_settings: OpenSettings, training: Dataset, model: DiffusionModel, num_processes: int
) -> Outline:
    """Place and order the images of a run, and decide when captions that vary are encoded.

    Args:
        open_settings: all others are decided.
        training: the images trained on.
        model: the base, or a blueprint of it.
        num_processes: number of processes that train together.

    Raises:
        ConfigError: for a resolution the base cannot work at.
    """
    config = open_settings.config
    placements, items = _placed(config, training.items, model)
    settings = config.training
    assert settings.batch_size is not None
    order = Order(
        [placement.bucket for placement in placements],
        [item.repeats for item in items],
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation,
        world_size=num_processes,
        seed=settings.seed,
        top_up=config.data.top_up,
    )
    steps = config.total_steps(order.steps_per_epoch)
    captions = _captions(open_settings, items, model, order, steps)
    return Outline(items, placements, order, steps, captions)


def prepare_data(
    config: Config,
    outline: Outline,
    validation: Dataset,
    model: DiffusionModel,
    emit: Emitter,
    *,
    share: tuple[int, int] = (0, 1),
    meet: Callable[[], object] = lambda: None,
) -> PreparedData:
    """Encode the images of a run.

    Args:
        config: final settings.
        outline: which images, how they are cropped, with which captions.
        validation: the images held out.
        model: the base.
        emit: gets notices and progress.
        share: (number of this process from 0, number of processes): each encodes a part.
        meet: waits for the other processes.

    Raises:
        DatasetError: for an image that cannot be encoded.
    """
    _notice_enlarged(outline.items, outline.placements, emit)
    views = _views(config, outline.items, outline.placements)
    _notice_views(views, model, emit)
    if config.data.prior_preservation > 0 and not config.data.has_regularisation:
        text = "data.prior_preservation: each step also predicts for the empty caption, once with the adapter"
        emit(Notice(f"{text} and once without; batches take twice the memory"))
    prints = EncoderPrints.of(model, captions=not config.adapter.adapts_text)
    encoded = _encoded(config, views, model, outline.captions, prints)
    plain = AugmentationViews(*_of_main_resolution(config, validation.items, model))
    held_out = _encoded(config, plain, model, CaptionRun(emphasis=config.data.emphasis), prints)
    for part in (encoded, held_out):
        if part.items:
            part.encode_all(lambda done, total: emit(Caching(done, total)), share)
    if share[1] > 1:
        meet()
        for part in (encoded, held_out):
            if part.items:
                part.encode_all()  # what processes on other machines encoded into their own caches
    return PreparedData(encoded, held_out, outline.order, outline.steps, prints)


def _placed(
    config: Config, items: Sequence[ImageItem], model: DiffusionModel
) -> tuple[tuple[Placement, ...], tuple[ImageItem, ...]]:
    """Return each image with its placement, once for each resolution it is large enough for."""
    pairs = list(zip(*_of_main_resolution(config, items, model), strict=True))
    main = [placement for placement, _ in pairs]
    for resolution in config.data.more_resolutions:
        others = [_placer(config, resolution, model)]
        for usual, item in zip(main, items, strict=True):
            pairs += [(other, item) for other in further(item, usual, others)]
    return tuple(placement for placement, _ in pairs), tuple(item for _, item in pairs)


def _of_main_resolution(
    config: Config, items: Sequence[ImageItem], model: DiffusionModel
) -> tuple[tuple[Placement, ...], tuple[ImageItem, ...]]:
    assert config.data.resolution is not None
    return tuple(map(_placer(config, config.data.resolution, model), items)), tuple(items)


def _placer(config: Config, resolution: int, model: DiffusionModel) -> Placer:
    """Return the function that places images at one resolution.

    Raises:
        ConfigError: for a resolution the base cannot work at.
    """
    if resolution < model.facts.size_multiple:
        raise ConfigError(
            f"`data.resolution={resolution}`: the base needs at least {model.facts.size_multiple} px"
        )
    return placer(
        resolution, model.facts.size_multiple, grouped=config.data.buckets, enlarge=config.data.upscale
    )


def _views(
    config: Config, items: tuple[ImageItem, ...], placements: tuple[Placement, ...]
) -> AugmentationViews:
    data = config.data
    return AugmentationViews(
        placements,
        items,
        random_crop=data.crop == "random",
        colour_jitter=data.colour_jitter,
        variants=data.variants,
        flip=data.flip,
        seed=config.training.seed,
    )


def _encoded(
    config: Config,
    views: AugmentationViews,
    model: DiffusionModel,
    captions: CaptionRun,
    prints: EncoderPrints,
) -> EncodedDataset:
    return EncodedDataset(
        views.items,
        views,
        model,
        config.data.cache_folder or default_cache_folder(),
        background=config.data.background,
        encode_captions=not config.adapter.adapts_text,
        captions=captions,
        alpha_mask=config.data.alpha_mask,
        prints=prints,
    )


def _captions(
    open_settings: OpenSettings,
    items: Sequence[ImageItem],
    model: DiffusionModel,
    order: Order,
    steps: int,
) -> CaptionRun:
    config = open_settings.config
    data = config.data
    wording = Wording.of(data)
    if not data.varies_captions:
        return CaptionRun(emphasis=data.emphasis)
    if config.adapter.adapts_text:  # runs in the loop anyway
        return CaptionRun(wording, data.emphasis)
    with torch.no_grad():
        empty = model.encode_text([""])
    room = sum(tensor[0].numel() * torch.float32.itemsize for tensor in empty.values())
    plan = plan_captions(items, wording, order, steps, config.training.seed, room, data.encode_captions)
    open_settings.fill("data.encode_captions", plan.when, plan.reason, ask_base=False)
    return CaptionRun(wording, data.emphasis, plan.when == "in loop", plan.texts)


def _notice_enlarged(items: Sequence[ImageItem], placements: Sequence[Placement], emit: Emitter) -> None:
    factors = [upscale(i.height, i.width, p) for i, p in zip(items, placements, strict=True)]
    count = sum(factor > MAX_UPSCALE for factor in factors)
    if count:
        worst = max(range(len(factors)), key=lambda index: factors[index])
        emit(
            Notice(
                f"{count} of {len(items)} images are enlarged more than {MAX_UPSCALE:g} times, which "
                f"trains blur (most: {items[worst].name}, {factors[worst]:.1f} times); use larger originals, "
                "a lower data.resolution, or data.upscale=false"
            )
        )


def _notice_views(views: AugmentationViews, model: DiffusionModel, emit: Emitter) -> None:
    """Say what random crops and colours cost."""
    if not views.varies or not views.items:
        return
    if views.in_loop:
        emit(Notice("data.variants=0: each image is encoded again at each visit; nothing is kept"))
        return
    counts = [len(views.to_encode(index)) for index in range(len(views.items))]
    latent = [model.facts.latents.shape(*placement.bucket) for placement in views.placements]
    room = sum(n * 2 * 4 * c * h * w for n, (c, h, w) in zip(counts, latent, strict=True))
    emit(
        Notice(
            f"crops and colours: {sum(counts)} views of {len(views.items)} images are encoded and kept, "
            f"{room / 2**20:.1f} MiB; data.variants says how many an image gets"
        )
    )
