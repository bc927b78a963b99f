"""From pictures to what the loop is fed: placed, ordered, encoded; what it costs is told beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...config.defaults import BaseFacts, DataFacts
from ...config.schema import Config
from ...errors import ConfigError
from ...events import Announcer, Caching, Decided, Noticed
from ...families.base import DiffusionModel
from ...families.emphasis import escape
from ..reading.cache_folder import default_cache_folder
from ..reading.items import Dataset, ImageItem
from ..reading.wording import Wording
from .buckets import MAX_UPSCALE, Placement, upscale
from .cache import EncodedDataset
from .caption_plan import CaptionRun, plan_captions
from .order import Order
from .placing import Placer, further, placer
from .views import Looks


@dataclass(frozen=True)
class Feed:
    """Everything the loop is fed from, encoded as far as it can be beforehand.

    Attributes:
        config: with what was decided here.
        training: the pictures trained on, once for each resolution.
        validation: the pictures held out.
        order: which picture when.
        steps: optimizer steps of the run.
    """

    config: Config
    training: EncodedDataset
    validation: EncodedDataset
    order: Order
    steps: int


def base_facts(model: DiffusionModel, device: str) -> BaseFacts:
    """Return what the defaults look at of a base, loaded or a blueprint, and of a type of device."""
    base = model.base
    return BaseFacts(base.title, base.recommended, model.native_resolution, device, tuple(model.components()))


def data_facts(config: Config, training: Dataset, validation: Dataset) -> DataFacts:
    """Return what the defaults look at of the pictures.

    Captions become prompts for previews, held-out ones first: brackets that are ordinary characters in
    captions are escaped.
    """
    captions = [item.caption for item in (*validation.items, *training.learned)]
    prompts = captions if config.data.emphasis else [escape(caption) for caption in captions]
    return DataFacts(len(training.learned), training.num_visits, len(validation.items), tuple(prompts))


def make_feed(
    config: Config,
    training: Dataset,
    validation: Dataset,
    model: DiffusionModel,
    num_processes: int,
    tell: Announcer,
) -> Feed:
    """Place, order and encode the pictures of a run.

    Raises:
        ConfigError: for a resolution the base cannot work at.
        DatasetError: for a picture that cannot be encoded.
    """
    placements, items = _placed(config, training.items, model)
    _tell_upscaled(items, placements, tell)
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
    config, captions = _captions(config, items, model, order, steps, tell)
    looks = _looks(config, items, placements)
    _tell_looks(looks, model, tell)
    if config.data.prior_preservation > 0 and not config.data.has_regularisation:
        text = "data.prior_preservation: each step also predicts for the empty caption, once with the adapter"
        tell(Noticed(f"{text} and once without; batches take twice the memory"))
    encoded = _encoded(config, looks, model, captions)
    plain = Looks(*_of_main_resolution(config, validation.items, model))
    held_out = _encoded(config, plain, model, CaptionRun(emphasis=config.data.emphasis))
    for part in (encoded, held_out):
        if part.items:
            part.encode_all(lambda done, total: tell(Caching(done, total)))
    return Feed(config, encoded, held_out, order, steps)


def _placed(
    config: Config, items: Sequence[ImageItem], model: DiffusionModel
) -> tuple[tuple[Placement, ...], tuple[ImageItem, ...]]:
    """Return each picture with its placement, once for each resolution it is large enough for."""
    found = list(zip(*_of_main_resolution(config, items, model), strict=True))
    main = [placement for placement, _ in found]
    for resolution in config.data.more_resolutions:
        others = [_placer(config, resolution, model)]
        for usual, item in zip(main, items, strict=True):
            found += [(other, item) for other in further(item, usual, others)]
    return tuple(placement for placement, _ in found), tuple(item for _, item in found)


def _of_main_resolution(
    config: Config, items: Sequence[ImageItem], model: DiffusionModel
) -> tuple[tuple[Placement, ...], tuple[ImageItem, ...]]:
    assert config.data.resolution is not None
    return tuple(map(_placer(config, config.data.resolution, model), items)), tuple(items)


def _placer(config: Config, resolution: int, model: DiffusionModel) -> Placer:
    """Return what places pictures at one resolution.

    Raises:
        ConfigError: for a resolution the base cannot work at.
    """
    if resolution < model.size_multiple:
        raise ConfigError(f"`data.resolution={resolution}`: the base needs at least {model.size_multiple} px")
    return placer(resolution, model.size_multiple, grouped=config.data.buckets, enlarge=config.data.upscale)


def _looks(config: Config, items: tuple[ImageItem, ...], placements: tuple[Placement, ...]) -> Looks:
    data = config.data
    return Looks(
        placements,
        items,
        random_crop=data.crop == "random",
        colour_jitter=data.colour_jitter,
        variants=data.variants,
        flip=data.flip,
        seed=config.training.seed,
    )


def _encoded(config: Config, looks: Looks, model: DiffusionModel, captions: CaptionRun) -> EncodedDataset:
    return EncodedDataset(
        looks.items,
        looks,
        model,
        config.data.cache_folder or default_cache_folder(),
        background=config.data.background,
        encode_captions=not config.adapter.adapts_text,
        captions=captions,
        alpha_mask=config.data.alpha_mask,
    )


def _captions(
    config: Config,
    items: Sequence[ImageItem],
    model: DiffusionModel,
    order: Order,
    steps: int,
    tell: Announcer,
) -> tuple[Config, CaptionRun]:
    data = config.data
    wording = Wording.of(data)
    if not data.varies_captions:
        return config, CaptionRun(emphasis=data.emphasis)
    if config.adapter.adapts_text:  # runs in the loop anyway
        return config, CaptionRun(wording, data.emphasis)
    with torch.no_grad():
        one = model.encode_text([""])
    room = sum(tensor[0].numel() * torch.float32.itemsize for tensor in one.values())
    plan = plan_captions(items, wording, order, steps, config.training.seed, room, data.encode_captions)
    if data.encode_captions is None:
        tell(Decided("data.encode_captions", plan.when, plan.reason))
        config = config.with_values({"data.encode_captions": plan.when})
    return config, CaptionRun(wording, data.emphasis, plan.when == "in loop", plan.texts)


def _tell_upscaled(items: Sequence[ImageItem], placements: Sequence[Placement], tell: Announcer) -> None:
    factors = [upscale(i.height, i.width, p) for i, p in zip(items, placements, strict=True)]
    count = sum(factor > MAX_UPSCALE for factor in factors)
    if count:
        worst = max(range(len(factors)), key=lambda index: factors[index])
        tell(
            Noticed(
                f"{count} of {len(items)} pictures are enlarged more than {MAX_UPSCALE:g} times, which "
                f"trains blur (most: {items[worst].name}, {factors[worst]:.1f} times); use larger originals, "
                "a lower data.resolution, or data.upscale=false"
            )
        )


def _tell_looks(looks: Looks, model: DiffusionModel, tell: Announcer) -> None:
    """Say what random crops and colours cost."""
    if not looks.varies or not looks.items:
        return
    if looks.in_loop:
        tell(Noticed("data.variants=0: each picture is encoded anew at each visit; nothing is kept"))
        return
    counts = [len(looks.to_encode(index)) for index in range(len(looks.items))]
    latent = [model.latent_shape(*placement.bucket) for placement in looks.placements]
    room = sum(n * 2 * 4 * c * h * w for n, (c, h, w) in zip(counts, latent, strict=True))
    tell(
        Noticed(
            f"crops and colours: {sum(counts)} looks at {len(looks.items)} pictures are encoded and kept, "
            f"{room / 2**20:.1f} MiB; data.variants says how many a picture gets"
        )
    )
