"""The page: everything about the folder is on it, nothing from elsewhere, and crops are drawn exactly."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from drawings import drawing, encoded, folder_of, put
from PIL import Image

from sdlora.data.batching.buckets import BucketCount, placer
from sdlora.data.check.doctor import Treatment, diagnose, examine
from sdlora.data.check.report_charts import bucket_chart, length_chart, tag_chart
from sdlora.data.check.report_page import write_report_page
from sdlora.data.reading.folder import Reading, survey

VOID = {"meta", "input", "img", "br", "line"}


class Balanced(HTMLParser):
    """Checks that every element is closed, and gathers what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def page_of(folder: Path, file: Path, **options: int) -> tuple[str, Balanced]:
    write_report_page(examine(folder, resolution=48, multiple=8, **options), file)
    text = file.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return text, parser


def test_the_page_needs_nothing_from_elsewhere_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", 4)
    put(folder / "tiny.png", drawing(9, 12, 12))
    put(folder / "broken.png", b"x")
    text, parser = page_of(folder, tmp_path / "page.html", batch_size=4)
    assert len(parser.links) >= 6
    for link in parser.links:
        assert link.startswith("data:image/jpeg;base64,") or link[1:] in parser.ids
    assert not re.search(r"https?://|url\(|@import", text)
    for name in ("p00.png", "tiny.png", "broken.png", "Not ready: correct the errors first."):
        assert name in text


@pytest.mark.parametrize(("width", "height"), [(100, 40), (40, 100), (48, 48), (300, 20)])
def test_the_part_that_is_kept_is_drawn_where_training_cuts(tmp_path: Path, width: int, height: int) -> None:
    folder = tmp_path / "images"
    put(folder / "a cup.png", drawing(1, width, height))
    report = examine(folder, resolution=48, multiple=8)
    text, _ = page_of(folder, tmp_path / "page.html")
    left, top, right, bottom = report.images[0].box
    assert f'viewBox="0 0 {width} {height}"' in text
    assert f"M{left:.2f} {top:.2f}H{right:.2f}V{bottom:.2f}H{left:.2f}Z" in text


def test_what_each_image_is_for_its_point_of_interest_and_its_mask_are_shown(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", 2)
    put(folder / "white.png", Image.new("RGB", (200, 100), "white"))
    put(folder / "white.txt", "a wall")
    put(folder / "white.json", '{"focus": [0.25, 0.5]}')
    mask = Image.new("L", (200, 100))
    mask.paste(255, (0, 0, 100, 100))
    put(tmp_path / "masks" / "white.png", mask)
    survey_result = survey(folder, repeats=3, reading=Reading(mask_folder=tmp_path / "masks"))
    treatment = Treatment(
        placer(48, 8),
        48,
        ((96, placer(96, 8)),),
        roles={"p00.png": "held out"},
        base="A base",
        crops_move=True,
    )
    write_report_page(diagnose(survey_result, treatment), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    card, _, _ = text.partition("</figure>")
    assert '<span class="pill">held out</span>' in card
    assert 'data-kinds="held out"' in card
    assert "<div><b>1</b><span>held out</span></div>" in text
    assert "<div><b>2</b><span>images to train on</span></div>" in text
    assert '<p class="about">A base, 48 px</p>' in text
    sizes = "200 &times; 100 &rarr; 72 &times; 32 and 128 &times; 72, 11% cut away, 3 visits per epoch"
    assert sizes in text
    assert text.count('class="dot"') == 1
    assert 'class="dot" d="M50.00 50.00h0"' in text
    for words in ("data.crop=random moves it", "Tinted parts are masked out.", "the crop keeps"):
        assert words in text
    (data,) = re.findall(r'base64,([^"]+)"', text.partition('aria-label="white.png"')[2])[:1]
    seen = Image.open(io.BytesIO(base64.b64decode(data)))
    trained, blocked = seen.getpixel((50, 50)), seen.getpixel((150, 50))
    assert min(trained) > 250
    assert (blocked[0] > 200, blocked[1] < 140) == (True, True)


def test_names_and_captions_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    put(folder / "a&'b.png", drawing(1))
    put(folder / "a&'b.txt", '</p><script>alert("x")</script> $title ${shown}')
    text, _ = page_of(folder, tmp_path / "page.html")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "$title ${shown}" in text
    assert "a&amp;&#x27;b.png" in text


def test_of_too_many_images_those_with_findings_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlora.data.check.report_page.MOST_IMAGES", 2)
    folder = folder_of(tmp_path / "images", 5)
    put(folder / "p03.png", drawing(9, 12, 12))
    text, parser = page_of(folder, tmp_path / "page.html")
    assert parser.ids == ["p0", "p1"]
    assert "2 of 5; those with findings first." in text
    assert text.index(">p00.png<") < text.rindex(">p03.png<")


def test_a_folder_without_usable_images_and_vanished_images_get_a_page(tmp_path: Path) -> None:
    put(tmp_path / "bad" / "a.png", b"")
    assert "Nothing" not in page_of(tmp_path / "bad", tmp_path / "page.html")[0]
    folder = folder_of(tmp_path / "images", 2)
    report = examine(folder, resolution=48, multiple=8)
    (folder / "p01.png").write_bytes(encoded(drawing(1))[:80])
    write_report_page(report, tmp_path / "page.html")
    assert "changed since the check" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_charts_hold_every_bucket_tag_and_caption() -> None:
    buckets = [BucketCount((64, 32), 3, 6), BucketCount((32, 64), 1, 1)]
    chart = bucket_chart(buckets)
    assert chart.count('class="bar"') == 2
    assert "64 x 32" not in chart.split("<title>")[1]
    assert "32 x 64 px: 3 images, 6 visits per epoch" in chart
    tags = tag_chart([(f"tag {n}", 30 - n) for n in range(30)], 30)
    assert (tags.count('class="bar"'), tags.count("<svg")) == (20, 2)
    lengths = length_chart([3, 4, 80, 200])
    counted = [int(count) for count in re.findall(r"tokens: (\d+) captions", lengths)]
    assert sum(counted) == 4
    assert lengths.count('class="bar over"') > 0
    assert "<rect" in length_chart([])
