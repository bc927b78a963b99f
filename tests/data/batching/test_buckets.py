"""Bucket geometry: areas, symmetry, cover resize and centred crops, in (height, width) order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdlora.data.batching.buckets import (
    NEGLIGIBLE_UPSCALE,
    BucketCount,
    Placement,
    count_buckets,
    flipped,
    make_buckets,
    place,
    place_without_upscaling,
    source_box,
    square_bucket,
    upscale,
)
from sdlora.errors import ConfigError

sides = st.integers(1, 6000)
layouts = st.tuples(st.integers(32, 1536), st.sampled_from([8, 16, 32, 64])).filter(lambda rm: rm[0] >= rm[1])


def test_1024_and_64_give_sizes_sdxl_was_trained_on() -> None:
    landscape = [(960, 1088), (896, 1152), (832, 1216), (768, 1344), (704, 1472), (640, 1600), (576, 1792)]
    landscape.append((512, 2048))
    portrait = [(width, height) for height, width in reversed(landscape)]
    assert make_buckets(1024, 64) == [*portrait, (1024, 1024), *landscape]


def test_small_and_odd_resolutions() -> None:
    assert make_buckets(64, 64) == [(64, 64)]
    assert make_buckets(64, 32) == [(128, 32), (64, 64), (32, 128)]
    assert make_buckets(64, 16) == [(128, 32), (80, 48), (64, 64), (48, 80), (32, 128)]
    assert make_buckets(100, 64) == [(128, 64), (64, 64), (64, 128)]
    assert make_buckets(512, 64, max_aspect=1) == [(512, 512)]
    assert square_bucket(100, 64) == [(64, 64)]


@pytest.mark.parametrize("make", [make_buckets, square_bucket])
def test_a_resolution_below_the_size_multiple_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ConfigError) as caught:
        make(32, 64)
    assert str(caught.value) == (
        "`data.resolution=32` is below 64 px, the smallest size this base works at; "
        "set data.resolution=64 or more"
    )


@given(layouts)
@settings(max_examples=80, deadline=None)
def test_buckets_keep_area_multiple_aspect_and_symmetry(layout: tuple[int, int]) -> None:
    resolution, multiple = layout
    buckets = make_buckets(resolution, multiple)
    side = resolution // multiple * multiple
    assert len(set(buckets)) == len(buckets) >= 1
    assert (side, side) in buckets
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2
        assert max(height, width) <= 4 * min(height, width)
    assert [(width, height) for height, width in reversed(buckets)] == buckets


@given(layouts, sides, sides)
@settings(max_examples=200, deadline=None)
def test_a_placement_covers_its_bucket_tightly_and_is_centred(
    layout: tuple[int, int], height: int, width: int
) -> None:
    buckets = make_buckets(*layout)
    placement = place(height, width, buckets)
    (bucket_h, bucket_w), (resized_h, resized_w), (top, left) = (
        placement.bucket,
        placement.resized,
        placement.crop,
    )
    assert placement.bucket in buckets
    assert resized_h >= bucket_h and resized_w >= bucket_w
    assert resized_h == bucket_h or resized_w == bucket_w
    scale = max(bucket_h / height, bucket_w / width)
    assert abs(resized_h - height * scale) <= 0.5 + 1e-6 and abs(resized_w - width * scale) <= 0.5 + 1e-6
    assert (top, left) == ((resized_h - bucket_h) // 2, (resized_w - bucket_w) // 2)
    assert 0 <= placement.cropped_share < 1
    distance = min(abs(math.log(w / h) - math.log(width / height)) for h, w in buckets)
    assert abs(math.log(bucket_w / bucket_h) - math.log(width / height)) <= distance + 1e-9


@given(layouts, sides, sides)
@settings(max_examples=200, deadline=None)
def test_portrait_and_landscape_are_transposes_of_each_other(
    layout: tuple[int, int], height: int, width: int
) -> None:
    buckets = make_buckets(*layout)
    first, other = place(height, width, buckets), place(width, height, buckets)
    assert (other.bucket[::-1], other.resized[::-1], other.crop[::-1]) == (
        first.bucket,
        first.resized,
        first.crop,
    )


def test_the_order_of_the_buckets_does_not_matter() -> None:
    buckets = make_buckets(512, 64)
    assert len(buckets) > 5
    for height in range(100, 1000, 37):
        assert place(height, 700, buckets) == place(height, 700, buckets[::-1])


def test_of_two_buckets_equally_near_the_larger_one_is_taken() -> None:
    for buckets in ([(64, 64), (128, 128)], [(128, 128), (64, 64)]):
        assert place(100, 100, buckets).bucket == (128, 128)
    for buckets in ([(64, 128), (128, 256)], [(128, 256), (64, 128)]):
        assert place(100, 300, buckets).bucket == (128, 256)


def test_crop_offsets_are_in_resized_pixels_and_mirrored_by_a_flip() -> None:
    placement = place(1000, 1501, [(512, 512)])
    assert placement == Placement((512, 512), (512, 769), (0, 128))
    assert flipped(placement) == Placement((512, 512), (512, 769), (0, 129))
    assert flipped(flipped(placement)) == placement
    assert placement.cropped_share == pytest.approx(1 - 512 / 769)
    assert upscale(1000, 1501, placement) == pytest.approx(769 / 1501)
    assert upscale(256, 256, place(256, 256, [(512, 512)])) == 2


def test_resizing_the_source_box_gives_what_resizing_and_cropping_gives() -> None:
    image = Image.linear_gradient("L").resize((300, 200)).transpose(Image.Transpose.ROTATE_90)
    height, width = image.height, image.width
    placement = place(height, width, [(64, 64)])
    assert placement == Placement((64, 64), (96, 64), (16, 0))
    box = source_box(height, width, placement)
    assert box == (0.0, 50.0, 200.0, 250.0)
    at_once = image.resize((64, 64), Image.Resampling.BOX, box=box)
    apart = image.resize((64, 96), Image.Resampling.BOX).crop((0, 16, 64, 80))
    worst = max(abs(a - b) for a, b in zip(at_once.tobytes(), apart.tobytes(), strict=True))
    assert worst <= 1


@given(layouts, sides, sides)
@settings(max_examples=100, deadline=None)
def test_the_source_box_lies_inside_the_image(layout: tuple[int, int], height: int, width: int) -> None:
    left, top, right, bottom = source_box(height, width, place(height, width, make_buckets(*layout)))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_buckets_are_counted_from_portrait_to_landscape() -> None:
    sizes = [(64, 128), (128, 64), (128, 64), (64, 64)]
    placements = [Placement(size, size, (0, 0)) for size in sizes]
    assert count_buckets(placements, [1, 2, 3, 1]) == [
        BucketCount((128, 64), 2, 5),
        BucketCount((64, 64), 1, 1),
        BucketCount((64, 128), 1, 1),
    ]


# --- not enlarging


def alone(height: int, width: int, resolution: int = 1024, multiple: int = 64) -> Placement:
    buckets = make_buckets(resolution, multiple)
    return place_without_upscaling(height, width, resolution, multiple, buckets)


@pytest.mark.parametrize(
    ("image", "bucket"),
    [
        ((1023, 1023), (1024, 1024)),
        ((980, 980), (1024, 1024)),
        ((970, 970), (960, 960)),
        ((500, 700), (512, 704)),
        ((700, 500), (704, 512)),
        ((640, 640), (640, 640)),
        ((300, 4000), (256, 1024)),
        ((3000, 2000), (1216, 832)),
        ((100, 100), (64, 64)),
        ((70, 200), (64, 192)),
        ((20, 30), (64, 64)),
    ],
)
def test_small_images_keep_their_own_size_to_the_nearest_multiple(
    image: tuple[int, int], bucket: tuple[int, int]
) -> None:
    assert alone(*image).bucket == bucket


@given(layouts, sides, sides)
@settings(max_examples=150, deadline=None)
def test_nothing_is_enlarged_noticeably_and_large_images_go_where_they_would(
    layout: tuple[int, int], height: int, width: int
) -> None:
    resolution, multiple = layout
    buckets = make_buckets(resolution, multiple)
    placement = place_without_upscaling(height, width, resolution, multiple, buckets)
    (tall, wide), factor = placement.bucket, upscale(height, width, placement)
    assert tall % multiple == wide % multiple == 0
    assert tall * wide <= resolution**2
    if min(height, width) * NEGLIGIBLE_UPSCALE >= multiple:
        # by rounding to whole pixels, a side may get half a pixel more
        assert factor <= NEGLIGIBLE_UPSCALE + 1 / min(height, width)
    usual = place(height, width, buckets)
    if upscale(height, width, usual) <= NEGLIGIBLE_UPSCALE:
        assert placement == usual
    other = place_without_upscaling(width, height, resolution, multiple, buckets)
    assert (other.bucket[::-1], other.resized[::-1], other.crop[::-1]) == (
        placement.bucket,
        placement.resized,
        placement.crop,
    )


# --- the point of interest


def test_a_crop_is_centred_on_the_focus_as_far_as_the_image_reaches() -> None:
    square = [(512, 512)]
    assert place(1000, 2000, square).crop == (0, 256)
    assert place(1000, 2000, square, (0.5, 0.5)).crop == (0, 256)
    assert place(1000, 2000, square, (0.3, 0.9)).crop == (0, 51)
    assert place(1000, 2000, square, (0.0, 0.0)).crop == (0, 0)
    assert place(1000, 2000, square, (1.0, 0.0)).crop == (0, 512)
    assert place(2000, 1000, square, (0.0, 1.0)).crop == (512, 0)


@given(layouts, sides, sides, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_focus_is_inside_the_crop(
    layout: tuple[int, int], height: int, width: int, x: float, y: float
) -> None:
    placement = place(height, width, make_buckets(*layout), (x, y))
    for share, whole, kept, start in zip(
        (y, x), placement.resized, placement.bucket, placement.crop, strict=True
    ):
        assert 0 <= start <= whole - kept
        assert start - 1 <= share * whole <= start + kept + 1
