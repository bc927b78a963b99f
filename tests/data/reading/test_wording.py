"""What captions say at each visit: the rules, and that all of it follows from seed, epoch and image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.config.data import DataConfig
from sdlora.config.toml import load_config
from sdlora.data.batching.caption_plan import plan_captions
from sdlora.data.batching.order import Order
from sdlora.data.reading.items import Dataset, ImageItem, Visit
from sdlora.data.reading.wording import Wording, reworded
from sdlora.errors import ConfigError


def item(*lines: str, trigger: str | None = None, repeats: int = 1) -> ImageItem:
    return ImageItem(Path("x.png"), "", 8, 8, repeats, "d", "x.png", lines=lines, trigger_word=trigger)


def captions_of(wording: Wording, image_item: ImageItem, count: int = 60, seed: int = 0) -> list[str]:
    return [wording.at(image_item, Visit(0, epoch, 0), seed) for epoch in range(count)]


# --- what stays as it is


@pytest.mark.parametrize(
    "text", ["a cat, on a mat", "a,b ,c", "no tags at all", "", "a {b|c} (d)", ", odd,,"]
)
def test_without_rules_a_caption_is_as_it_was_written(text: str) -> None:
    lines = (text,) if text else ()
    assert Wording().plain(item(*lines)) == text
    assert set(captions_of(Wording(), item(*lines), 5)) == {text}


@pytest.mark.parametrize(
    ("prefix", "text", "suffix", "expected"),
    [
        ("", "a cup", ", on canvas", "a cup, on canvas"),
        ("", "", ", on canvas", "on canvas"),
        ("best,", "a cup", "fine", "best, a cup fine"),
        ("best,", "", ", fine", "best, fine"),
        ("best,", "a cup,", ",fine", "best, a cup,fine"),
    ],
)
def test_separators_at_a_prefix_or_suffix_stand_as_one_writes_them(
    prefix: str, text: str, suffix: str, expected: str
) -> None:
    image_item = item(text)
    assert Wording(prefix=prefix, suffix=suffix).plain(image_item) == expected


def test_prefix_and_suffix_stand_around_and_the_trigger_word_before_all() -> None:
    wording = Wording(prefix="photo of", suffix="in spring ")
    assert wording.plain(item("a cat", trigger="zork")) == "zork, photo of a cat in spring"
    assert wording.plain(item("a zork", trigger="zork")) == "photo of a zork in spring"
    assert wording.plain(item()) == "photo of in spring"


def test_several_lines_are_joined_or_taken_in_turn_each_as_often() -> None:
    image_item = item("first", "second", "third", repeats=2)
    assert Wording().plain(image_item) == "first second third"
    turn = Wording(one_line=True)
    assert turn.plain(image_item) == "first"
    visits = [Visit(4, epoch, repeat) for epoch in range(6) for repeat in range(2)]
    lines = [turn.at(image_item, visit, seed=3) for visit in visits]
    assert Counter(lines) == {"first": 4, "second": 4, "third": 4}
    assert len(set(lines[:3])) == 3


# --- shuffling


def test_shuffling_moves_whole_tags_and_keeps_the_separators_as_written() -> None:
    texts = captions_of(Wording(shuffle=True), item("a b,c , d,  e"), 400)
    assert len(set(texts)) == 24
    for text in texts:
        assert sorted(part.strip() for part in text.split(",")) == ["a b", "c", "d", "e"]
        assert [text.count(gap) for gap in (",", " , ", ",  ")] == [3, 1, 1]


def test_kept_tags_stay_in_front() -> None:
    texts = captions_of(Wording(shuffle=True, keep=2), item("1girl, solo, a, b, c"))
    assert len(set(texts)) == 6
    assert all(text.startswith("1girl, solo, ") for text in texts)


def test_marks_in_the_caption_keep_head_and_tail_whatever_keep_says() -> None:
    image_item = item("1girl, solo ||| a, b, c ||| best quality, 4k")
    wording = Wording(shuffle=True, keep=1)
    texts = captions_of(wording, image_item)
    assert len(set(texts)) == 6
    assert all(text.startswith("1girl, solo, ") and text.endswith(", best quality, 4k") for text in texts)
    assert (
        wording.plain(image_item) == Wording().plain(image_item) == "1girl, solo, a, b, c, best quality, 4k"
    )
    assert Wording().plain(item("head, ||| a, b")) == "head, a, b"
    assert Wording().plain(item("||| a, b |||")) == "a, b"


def test_grouped_tags_stay_together() -> None:
    image_item = item("a;;;b, c, d")
    texts = captions_of(Wording(shuffle=True), image_item)
    assert len(set(texts)) == 6
    assert all("a, b" in text for text in texts)
    assert Wording().plain(image_item) == "a, b, c, d"


def test_another_separator_can_be_set() -> None:
    texts = captions_of(Wording(shuffle=True, separator=";"), item("a, b; c; d"))
    assert len(set(texts)) == 6
    assert all("a, b" in text for text in texts)


def test_the_trigger_word_stays_in_front_of_shuffled_tags_and_is_never_left_out() -> None:
    assert all(
        text.startswith("zork, ")
        for text in captions_of(Wording(shuffle=True), item("a, b, c", trigger="zork"))
    )
    texts = captions_of(Wording(tag_dropout=0.9), item("zork, a", trigger="zork"), 200)
    assert set(texts) == {"zork", "zork, a"}


# --- leaving out


def test_tags_are_left_out_as_often_as_asked_for_and_kept_ones_never() -> None:
    image_item = item("keep ||| " + ", ".join(f"t{n}" for n in range(10)))
    texts = captions_of(Wording(tag_dropout=0.3), image_item, 400)
    counts = [len(text.split(", ")) - 1 for text in texts]
    assert all(text.startswith("keep") for text in texts)
    assert 6.7 < sum(counts) / len(counts) < 7.3
    assert min(counts) < 5 and max(counts) == 10
    order = [int(tag[1:]) for tag in texts[0].split(", ")[1:]]
    assert order == sorted(order)


# --- wildcards


def test_wildcards_choose_one_alternative_a_visit_also_inside_each_other() -> None:
    image_item = item("a {red|green|blue} {cat|{big|small} dog}")
    texts = captions_of(Wording(wildcards=True), image_item, 300)
    assert len(set(texts)) == 9
    assert set(Counter(text.split()[1] for text in texts)) == {"red", "green", "blue"}
    assert Wording(wildcards=True).plain(image_item) == "a red cat"
    assert Wording().plain(image_item) == "a {red|green|blue} {cat|{big|small} dog}"


@pytest.mark.parametrize(
    ("text", "result"),
    [("{{a}}", "{a}"), ("{a}", "a"), ("{|a}", ""), ("{open", "{open"), ("close}", "close}"), ("{}", "")],
)
def test_braces_that_are_no_choice(text: str, result: str) -> None:
    assert Wording(wildcards=True).plain(item(text)) == result


# --- all of it


wordings = st.builds(
    Wording,
    prefix=st.sampled_from(["", "p"]),
    suffix=st.sampled_from(["", "s"]),
    one_line=st.booleans(),
    shuffle=st.booleans(),
    keep=st.integers(0, 3),
    tag_dropout=st.sampled_from([0.0, 0.4]),
    wildcards=st.booleans(),
)
captions = st.lists(st.text(alphabet="ab, |{};", min_size=1, max_size=25), max_size=3)


@given(wordings, captions, st.integers(0, 5), st.integers(0, 5), st.sampled_from([None, "zork"]))
@settings(max_examples=200, deadline=None)
def test_a_caption_follows_from_seed_epoch_and_image_and_makes_no_words_up(
    wording: Wording, lines: list[str], seed: int, epoch: int, trigger: str | None
) -> None:
    image_item = item(*lines, trigger=trigger)
    visit = Visit(2, epoch, 0)
    text = wording.at(image_item, visit, seed)
    assert text == wording.at(image_item, visit, seed)
    if trigger:
        assert "zork" in text
    letters = Counter(c for c in " ".join(lines) if c in "ab")
    actual = Counter(c for c in text if c in "ab")
    assert not actual - letters
    if not (wording.one_line or wording.wildcards or wording.tag_dropout):
        assert actual == letters


def test_seeds_epochs_images_and_repeats_give_different_captions() -> None:
    image_item, wording = item("a, b, c, d, e, f, g"), Wording(shuffle=True)
    visits = [Visit(index, epoch, repeat) for index in range(2) for epoch in range(2) for repeat in range(2)]
    assert len({wording.at(image_item, visit, seed) for visit in visits for seed in range(2)}) > 14


# --- when they are encoded


def order_of(items: list[ImageItem]) -> Order:
    return Order([0] * len(items), [image_item.repeats for image_item in items], batch_size=2)


def test_few_variants_are_encoded_before_and_all_of_the_run_are_among_them() -> None:
    items = [item("a {b|c}", "d", repeats=2), item("e, {f|g}")]
    wording, order = Wording(wildcards=True), order_of([*items])
    plan = plan_captions(items, wording, order, 30, 0, bytes_each=1000, asked=None)
    assert (plan.when, set(plan.texts)) == ("before", {"a b d", "a c d", "e, f", "e, g"})
    assert plan.reason.startswith("4 different captions in ")


def test_too_many_variants_are_encoded_in_the_loop_unless_asked_otherwise() -> None:
    items = [item(", ".join("abcdefghij"))]
    wording, order = Wording(shuffle=True), order_of(items)
    large = 1 << 26  # 16 of these fit
    plan = plan_captions(items, wording, order, 50, 0, bytes_each=large, asked=None)
    assert (plan.when, plan.texts) == ("in loop", ("a, b, c, d, e, f, g, h, i, j",))
    assert plan.reason.startswith("more than 16 different captions (1.0 GiB encoded)")
    asked = plan_captions(items, wording, order, 50, 0, bytes_each=large, asked="before")
    assert asked.when == "before" and len(asked.texts) > 45
    few = plan_captions(items, wording, order, 10, 0, bytes_each=large, asked=None)
    assert few.when == "before"
    assert plan_captions(items, wording, order, 10, 0, bytes_each=1, asked="in loop").when == "in loop"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.keep_tags=2"], "`data.keep_tags` has no effect"),
        (["data.tag_separator=;"], "`data.tag_separator` has no effect"),
        (["data.encode_captions=before"], "`data.encode_captions` has no effect: the captions do not vary"),
        (["data.caption_from='file name'", "data.caption_lines=one"], "`data.caption_lines` has no effect"),
        (
            ["data.wildcards=true", "data.encode_captions=before", "adapter.text_encoder=true"],
            "`data.encode_captions` has no effect with `adapter.text_encoder=true`",
        ),
    ],
)
def test_settings_of_captions_without_effect_are_refused(overrides: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("caption", "plain"),
    [
        (r"miku \(vocaloid\), solo", "miku (vocaloid), solo"),
        (r"\[a\], \\(b", r"[a], \(b"),
        (r"a\b, \o/, C:\new", r"a\b, \o/, C:\new"),
    ],
)
def test_brackets_that_taggers_escaped_are_plain_unless_brackets_weigh(caption: str, plain: str) -> None:
    image_item = item(caption, trigger=r"x \(y\)")
    assert Wording().plain(image_item) == f"x (y), {plain}"
    shuffled = captions_of(Wording(shuffle=True), image_item, 3)
    assert all(set(text) == set(f"x (y), {plain}") for text in shuffled)
    assert Wording.of(DataConfig(emphasis=True)).plain(image_item) == rf"x \(y\), {caption}"
    dataset = Dataset(Path("x"), (image_item,))
    noted = reworded(dataset, Wording())
    assert (noted.items[0].caption, len(noted.notes)) == (f"x (y), {plain}", int(plain != caption))
    assert reworded(dataset, Wording(plain_brackets=False)).notes == ()
