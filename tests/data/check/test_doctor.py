"""What the doctor finds in a folder, how bad it is, and how it says it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from drawings import animation, drawing, encoded, folder_of, put
from PIL import Image, ImageFilter

from sdlora.data.batching.buckets import BucketCount
from sdlora.data.check.doctor import CaptionStats, Report, examine, report_to_dict
from sdlora.data.check.findings import Finding
from sdlora.data.check.report_text import print_report
from sdlora.errors import ConfigError, DatasetError


def printed(capsys: pytest.CaptureFixture[str], report: Report) -> str:
    """Return what `sdlora check` prints of a report."""
    capsys.readouterr()
    print_report(report)
    return capsys.readouterr().out.rstrip("\n")


def findings_of(report: Report, severity: str | None = None) -> list[tuple[str, str]]:
    return [(f.kind, f.where) for f in report.findings if severity in (None, f.severity)]


def test_a_good_folder_gets_counts_and_no_findings(tmp_path: Path) -> None:
    folder_of(tmp_path, 10)
    put(tmp_path / "tall.png", drawing(50, 40, 80))
    put(tmp_path / "tall.txt", "something tall")
    report = examine(tmp_path, resolution=48, multiple=8, batch_size=4)
    assert [(image.item.name, image.tokens) for image in report.images][-2:] == [
        ("p09.png", 2),
        ("tall.png", 2),
    ]
    assert replace(report, images=(), tags=()) == Report(
        folder=tmp_path,
        recursive=True,
        trigger_word=None,
        resolution=48,
        num_images=11,
        num_unusable=0,
        buckets=(BucketCount((72, 32), 1, 1), BucketCount((40, 56), 10, 10)),
        num_batches=4,
        num_short_batches=2,
        captions=CaptionStats(from_files=11, from_names=0, trigger_added=0, mean_tokens=2.0, max_tokens=2),
        findings=(),
    )


def test_every_kind_of_trouble_is_found_with_its_severity(tmp_path: Path) -> None:
    folder_of(tmp_path, 8)
    put(tmp_path / "bad.png", encoded(drawing(1, 200, 200))[:500])
    put(tmp_path / "latin.png", drawing(20))
    put(tmp_path / "latin.txt", b"caf\xe9")
    put(tmp_path / "twin.png", drawing(21))
    put(tmp_path / "twin.jpg", encoded(drawing(22), "JPEG"))
    put(tmp_path / "copy.png", drawing(3))
    put(tmp_path / "copy.txt", "a copy")
    put(tmp_path / "near.jpg", encoded(drawing(4), "JPEG", quality=90))
    put(tmp_path / "near.txt", "nearly a copy")
    put(tmp_path / "tiny.png", drawing(23, 12, 12))
    put(tmp_path / "tiny.txt", "tiny thing")
    put(tmp_path / "little.png", drawing(24, 26, 26))
    put(tmp_path / "little.txt", "little thing")
    put(tmp_path / "strip.png", drawing(25, 480, 60))
    put(tmp_path / "strip.txt", "a strip")
    put(tmp_path / "wide.png", drawing(26, 360, 100))
    put(tmp_path / "wide.txt", "a wide thing")
    put(tmp_path / "long.png", drawing(27))
    put(tmp_path / "long.txt", "one two three " * 30)
    put(tmp_path / "hollow.png", drawing(28))
    put(tmp_path / "hollow.txt", "")
    put(tmp_path / "red cup.png", drawing(29))
    put(tmp_path / "moving.gif", animation())
    put(tmp_path / "moving.txt", "a moving thing")
    put(tmp_path / "glass.png", Image.new("RGBA", (40, 40), (9, 9, 200, 99)))
    put(tmp_path / "glass.txt", "a glass")
    put(tmp_path / "lost.txt", "nobody's")
    put(tmp_path / "phone.psd", "x")

    report = examine(tmp_path, resolution=48, multiple=16)

    assert findings_of(report, "error") == [
        ("truncated", "bad.png"),
        ("bad caption", "latin.txt"),
        ("name clash", "twin.jpg and twin.png"),
    ]
    assert findings_of(report, "warning") == [
        ("upscaled", "little.png"),
        ("aspect", "strip.png"),
        ("tiny", "tiny.png"),
        ("cropped", "wide.png"),
        ("duplicate", "p03.png"),
        ("near duplicate", "near.jpg"),
        ("empty caption", "hollow.png"),
        ("long caption", "long.png"),
        ("orphan caption", "lost.txt"),
    ]
    assert findings_of(report, "note") == [
        ("no caption file", "red cup.png"),
        ("no caption file", "twin.jpg"),
        ("no caption file", "twin.png"),
        ("transparent", "glass.png"),
        ("animated", "moving.gif"),
        ("remark", str(tmp_path)),
    ]
    assert report.harmful
    assert (report.num_images, report.num_unusable) == (21, 2)
    assert all(finding.what and finding.where and finding.fix for finding in report.findings)


def test_a_caption_without_the_trigger_word_is_noted_and_an_empty_one_warned_about(tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    put(tmp_path / "p00.txt", "ink drawing")
    put(tmp_path / "x.png", drawing(9))
    put(tmp_path / "x.txt", "")
    report = examine(tmp_path, trigger_word="ink", resolution=32, multiple=8)
    assert report.findings == (
        Finding(
            "warning",
            "empty caption",
            "has an empty caption file: its caption is only the trigger word `ink`",
            "x.png",
            "write what it shows, or leave it empty on purpose",
        ),
        Finding(
            "note",
            "no trigger word",
            "has a caption without `ink`; it is put in front",
            "p01.png",
            "write it where it reads best",
        ),
    )
    assert report.captions == CaptionStats(3, 0, 2, 2.3, 4)


def test_one_caption_for_all_and_a_stuck_tag_are_found(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"{number}.png", drawing(number))
        put(tmp_path / f"{number}.txt", "a cat")
    assert findings_of(examine(tmp_path, resolution=32, multiple=8)) == [("one caption", "all 3 images")]
    for number in range(3):
        put(tmp_path / f"{number}.txt", f"ink, thing {number}, White Ground")
    report = examine(tmp_path, resolution=32, multiple=8, trigger_word="ink")
    assert [(f.kind, f.what) for f in report.findings] == [
        ("stuck tag", "have the tag `white ground` in the caption, so it acts as a trigger word")
    ]


def test_a_folder_of_broken_images_only_is_a_report_not_a_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a.png", b"")
    put(tmp_path / "b.png", b"x")
    report = examine(tmp_path, resolution=64, batch_size=2)
    assert (report.num_images, report.num_unusable, report.harmful) == (0, 2, True)
    assert (report.num_batches, report.num_short_batches, report.buckets) == (0, 0, ())
    assert "Not ready: correct the errors first." in printed(capsys, report)


def test_extremely_long_and_single_pixel_images_are_placed_and_reported(tmp_path: Path) -> None:
    put(tmp_path / "line.png", Image.new("RGB", (20_000, 1), (9, 9, 9)))
    put(tmp_path / "dot.png", Image.new("RGB", (1, 1), (200, 9, 9)))
    report = examine(tmp_path, resolution=64, multiple=32)
    assert [
        (f.severity, f.kind, f.where, f.what) for f in report.findings if f.kind != "no caption file"
    ] == [
        ("warning", "tiny", "dot.png", "1x1 px is tiny: enlarged 64.0 times for 64 px, which trains blur"),
        (
            "warning",
            "tiny",
            "line.png",
            "20000x1 px is tiny: enlarged 32.0 times for 64 px, which trains blur",
        ),
        (
            "warning",
            "aspect",
            "line.png",
            "20000x1 px has an extreme aspect ratio of 20000.0:1: 100% of it is cropped away",
        ),
    ]
    assert [bucket.bucket for bucket in report.buckets] == [(64, 64), (32, 128)]


def test_missing_empty_and_too_small_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        examine(tmp_path / "no", resolution=64)
    with pytest.raises(DatasetError, match="is empty"):
        examine(tmp_path, resolution=64)
    with pytest.raises(ConfigError, match="below 64 px"):
        examine(tmp_path, resolution=32)


def test_the_report_is_plain_json_with_its_verdict(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    put(tmp_path / "wide.png", drawing(9, 100, 40))
    put(tmp_path / "wide.txt", "picture 0, wide")
    put(tmp_path / "lost.txt", "x")
    values = json.loads(json.dumps(report_to_dict(examine(tmp_path, resolution=48, multiple=8))))
    assert values == {
        "folder": str(tmp_path),
        "recursive": True,
        "trigger_word": None,
        "resolution": 48,
        "num_images": 2,
        "num_visits": 2,
        "num_unusable": 0,
        "num_held_out": 0,
        "base": None,
        "more_resolutions": [],
        "crops_move": False,
        "buckets": [
            {"bucket": [40, 56], "num_images": 1, "num_visits": 1},
            {"bucket": [32, 72], "num_images": 1, "num_visits": 1},
        ],
        "num_batches": None,
        "num_short_batches": None,
        "captions": {
            "from_files": 2,
            "from_names": 0,
            "trigger_added": 0,
            "mean_tokens": 3.0,
            "max_tokens": 4,
            "from_folders": 0,
        },
        "findings": [
            {
                "severity": "warning",
                "kind": "orphan caption",
                "what": "belongs to no image and is not used",
                "where": "lost.txt",
                "fix": "name it after its image (cup.txt for cup.png), or delete it",
            },
            {
                "severity": "note",
                "kind": "stuck tag",
                "what": "have the tag `picture 0` in the caption, so it acts as a trigger word",
                "where": "all 2 images",
                "fix": "delete it, or make it data.trigger_word",
            },
        ],
        "tags": [["picture 0", 2], ["wide", 1]],
        "images": [
            {
                "name": "p00.png",
                "width": 48,
                "height": 40,
                "bucket": [40, 56],
                "resized": [47, 56],
                "crop": [3, 0],
                "box": [0.0, 2.55, 48.0, 36.6],
                "cropped_share": 0.1489,
                "upscale": 1.175,
                "repeats": 1,
                "caption": "picture 0",
                "tokens": 2,
                "role": "trained",
                "further_buckets": [],
                "focus": None,
                "mask": None,
            },
            {
                "name": "wide.png",
                "width": 100,
                "height": 40,
                "bucket": [32, 72],
                "resized": [32, 80],
                "crop": [0, 4],
                "box": [5.0, 0.0, 95.0, 40.0],
                "cropped_share": 0.1,
                "upscale": 0.8,
                "repeats": 1,
                "caption": "picture 0, wide",
                "tokens": 4,
                "role": "trained",
                "further_buckets": [],
                "focus": None,
                "mask": None,
            },
        ],
        "harmful": False,
        "verdict": "Ready to train, but what the warnings name makes the result worse.",
        "counts": {"error": 0, "warning": 1, "note": 1},
    }


def test_a_tag_in_nearly_all_of_many_captions_is_stuck(tmp_path: Path) -> None:
    for number in range(20):
        put(tmp_path / f"{number:02}.png", drawing(number))
        put(
            tmp_path / f"{number:02}.txt",
            f"thing {number}" + ", dark" * (number > 0) + ", big" * (number > 2),
        )
    report = examine(tmp_path, resolution=48, multiple=8)
    assert [(f.kind, f.where) for f in report.findings] == [("stuck tag", "19 of 20 images")]
    assert report.tags[:3] == (("dark", 19), ("big", 17), ("thing 0", 1))


def test_a_blurred_image_is_found_at_the_size_it_is_trained_at(tmp_path: Path) -> None:
    folder_of(tmp_path, 3)
    soft = drawing(30, 800, 600).filter(ImageFilter.GaussianBlur(2))
    put(tmp_path / "soft.png", soft)
    put(tmp_path / "soft.txt", "soft")
    blurred = [f for f in examine(tmp_path, resolution=640, multiple=64).findings if f.kind == "blurred"]
    assert [(f.severity, f.where) for f in blurred] == [("warning", "soft.png")]
    small = examine(tmp_path, resolution=64, multiple=32)
    assert not [f for f in small.findings if f.kind == "blurred"]


def test_copies_whose_captions_differ_are_said_to(tmp_path: Path) -> None:
    for name, caption in (("a", "a cup"), ("b", "a cup"), ("c", "a mug")):
        put(tmp_path / f"{name}.png", drawing(1))
        put(tmp_path / f"{name}.txt", caption)
    report = examine(tmp_path, resolution=48, multiple=8)
    assert [(f.where, f.what) for f in report.findings if f.kind == "duplicate"] == [
        ("b.png", "is the same file as a.png, so it counts twice"),
        ("c.png", "is the same file as a.png, so it counts twice; and their captions differ"),
    ]


def test_the_text_shows_counts_buckets_and_findings_by_severity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path, 4)
    put(tmp_path / "tall.png", drawing(50, 40, 80))
    put(tmp_path / "tall.txt", "something tall")
    put(tmp_path / "bad.png", b"")
    for number in range(10):
        put(tmp_path / f"lost{number}.txt", "x")
    text = printed(capsys, examine(tmp_path, resolution=48, multiple=8, batch_size=4, trigger_word="ink"))
    assert text.splitlines() == TEXT.format(folder=tmp_path).splitlines()


def test_what_kohya_folders_say_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        put(tmp_path / "10_red cup" / f"{number}.png", drawing(number))
    put(tmp_path / "2_plate" / "a.png", drawing(9))
    put(tmp_path / "2_plate" / "a.caption", "a plate")
    report = examine(tmp_path, resolution=48, multiple=8)
    text = printed(capsys, report)
    assert "images    4, 32 visits per epoch" in text
    assert "captions  1 from files, 3 from folders, 0 from file names" in text
    assert [(f.kind, f.where) for f in report.findings] == [("remark", "10_red cup/"), ("remark", "2_plate/")]


def test_a_folder_without_troubles_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path, 3)
    assert printed(capsys, examine(tmp_path, resolution=48, multiple=8)).endswith("Ready to train.")


TEXT = """\
{folder}
  images    5, 1 unusable
  captions  5 from files, 0 from file names
  trigger   ink (put in front of 5)
  tokens    4.0 on average, 4 at most
  batches   2 per epoch, 1 of them short

buckets at 48 px (width x height; --base shows those of your base)
       32x72 ████████                       1
       56x40 ██████████████████████████████ 4

ERRORS (1)

  what          where     details
 ────────────────────────────────────────────────
  undecodable   bad.png   is empty (0 bytes)
                          → replace or delete it


WARNINGS (10)

  what                  where       details
 ─────────────────────────────────────────────────────────────────────────────────────────────────
  orphan caption (10)   lost0.txt   belongs to no image and is not used
                        lost1.txt   belongs to no image and is not used
                        lost2.txt   belongs to no image and is not used
                        lost3.txt   belongs to no image and is not used
                        lost4.txt   belongs to no image and is not used
                        lost5.txt   belongs to no image and is not used
                        lost6.txt   belongs to no image and is not used
                        lost7.txt   belongs to no image and is not used
                                    and 2 more (all with --json or --html FILE)
                                    → name it after its image (cup.txt for cup.png), or delete it


NOTES (5)

  what                  where      details
 ──────────────────────────────────────────────────────────────────────────────────
  no trigger word (5)   p00.png    has a caption without `ink`; it is put in front
                        p01.png    has a caption without `ink`; it is put in front
                        p02.png    has a caption without `ink`; it is put in front
                        p03.png    has a caption without `ink`; it is put in front
                        tall.png   has a caption without `ink`; it is put in front
                                   → write it where it reads best

Not ready: correct the errors first."""
