"""A folder captioned: what is kept, where it is written, and that it can be continued and undone."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_captioners import write_blip, write_tagger

from sdlora.data.captioning.caption import Captioning, CaptionReport, CaptionSettings
from sdlora.data.captioning.restore import FOLDER, undo
from sdlora.data.captioning.tag_lists import TagChoice
from sdlora.data.captioning.wording import Wording
from sdlora.data.reading.folder import survey
from sdlora.data.reading.tokens import count_tokens
from sdlora.errors import DatasetError, OutputError

ANY = TagChoice({"general": 0.0, "character": 0.0}, order="list")
ALL = "cat ears, o_o, red sky, alice (wonderland), tree, bob"


@pytest.fixture
def tagger(tmp_path: Path) -> str:
    return str(write_tagger(tmp_path / "wd"))


def settings(tagger: str, **more: object) -> CaptionSettings:
    return CaptionSettings(tagger, device="cpu", **{"tags": ANY, **more})  # type: ignore[arg-type]


def caption(folder: Path, wanted: CaptionSettings) -> CaptionReport:
    with Captioning(folder, wanted) as work:
        return work.run()


def state(folder: Path) -> dict[str, bytes]:
    """Return every file of a data set with its bytes."""
    files = (file for file in folder.rglob("*") if file.is_file() and FOLDER not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def trained_on(folder: Path) -> dict[str, str]:
    """Return the captions that training would read."""
    surveyed = survey(folder)
    assert surveyed.problems == ()
    return {item.name: "\n".join(item.lines) for item in surveyed.dataset.items}


@pytest.fixture
def mixed(image_folder: Callable[..., Path]) -> Path:
    """Every place that a caption may be in: none, a file of each kind, either metadata file."""
    folder = image_folder(7, caption=False)
    (folder / "thing01.txt").write_bytes("\ufeffby hand\r\n".encode())
    (folder / "thing02.caption").write_text("also by hand")
    (folder / "thing03.png.txt").write_text("long name")
    lines = [{"file_name": "thing04.png", "text": "in a table", "other": 1}, {"file_name": "thing05.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*lines[:1], {**lines[1], "text": ""}])))
    (folder / "sub").mkdir()
    (folder / "thing06.png").rename(folder / "sub" / "thing06.png")
    (folder / "sub" / "metadata.csv").write_bytes(b"file_name,text\r\nthing06.png,in a csv\r\n")
    return folder


def test_captions_that_are_there_are_kept(mixed: Path, tagger: str) -> None:
    before = state(mixed)
    report = caption(mixed, settings(tagger))
    assert (report.written, report.kept, report.failed) == (2, 5, {})
    after = state(mixed)
    assert after == {**before, "thing00.txt": f"{ALL}\n".encode(), "thing05.txt": f"{ALL}\n".encode()}


def test_asked_to_each_caption_is_replaced_where_the_trainer_reads_it_and_undone(
    mixed: Path, tagger: str
) -> None:
    before = state(mixed)
    report = caption(mixed, settings(tagger, overwrite=True))
    assert (report.written, report.kept, report.failed) == (7, 0, {})
    assert set(trained_on(mixed).values()) == {ALL} and len(trained_on(mixed)) == 7
    new = state(mixed).keys() - before.keys()
    assert new == {"thing00.txt", "thing05.txt"}
    table = (mixed / "metadata.jsonl").read_text().split("\n")
    assert json.loads(table[0]) == {"file_name": "thing04.png", "text": ALL, "other": 1}
    assert table[1] == before["metadata.jsonl"].decode().split("\n")[1]
    undone = undo(mixed)
    assert state(mixed) == before and undone.kept == ()
    with pytest.raises(DatasetError, match="nothing to undo"):
        undo(mixed)


def test_undoing_keeps_what_someone_changed_since(mixed: Path, tagger: str) -> None:
    caption(mixed, settings(tagger, overwrite=True))
    (mixed / "thing01.txt").write_text("mine, later")
    (mixed / "thing02.caption").unlink()
    undone = undo(mixed)
    assert undone.kept == ("thing01.txt", "thing02.caption")
    assert (mixed / "thing01.txt").read_text() == "mine, later"
    assert not (mixed / "thing00.txt").exists()


class Stop(BaseException):
    """What ends the work from outside."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_work_goes_on_and_is_undone_as_one(mixed: Path, tagger: str, overwrite: bool) -> None:
    before = state(mixed)
    wanted = settings(tagger, overwrite=overwrite, batch_size=1)
    total = 7 if overwrite else 2

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise Stop

    with pytest.raises(Stop), Captioning(mixed, wanted) as work:
        work.run(stop)
    with Captioning(mixed, wanted) as work:
        assert len(work.todo) == 1 and work.continued == total - 1
        report = work.run()
    assert report.written == 1
    assert len(list((mixed / FOLDER).glob("*.jsonl"))) == 1
    undo(mixed)
    assert state(mixed) == before


def test_other_settings_start_anew(mixed: Path, tagger: str) -> None:
    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop), Captioning(mixed, settings(tagger, overwrite=True, batch_size=1)) as work:
        work.run(stop)
    with Captioning(mixed, settings(tagger, overwrite=True, wording=Wording(prefix="x"))) as work:
        assert len(work.todo) == 7 and work.continued == 0


def test_a_line_cut_short_by_a_crash_is_passed_over(mixed: Path, tagger: str) -> None:
    before = state(mixed)

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop), Captioning(mixed, settings(tagger, batch_size=1)) as work:
        work.run(stop)
    (point,) = (mixed / FOLDER).glob("*.jsonl")
    with point.open("ab") as stream:
        stream.write(b'{"file": "thing05.txt", "bef')
    assert caption(mixed, settings(tagger, batch_size=1)).written == 1
    undo(mixed)
    assert state(mixed) == before


def test_an_image_that_fails_is_named_and_the_work_goes_on(
    image_folder: Callable[..., Path], tagger: str
) -> None:
    folder = image_folder(5, caption=False)
    whole = (folder / "thing02.png").read_bytes()
    (folder / "thing02.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (9, 9)).save(folder / "thing01.jpg")
    report = caption(folder, settings(tagger))
    assert report.failed.keys() == {"thing01.png", "thing01.jpg", "thing02.png"}
    assert "thing02.png" in report.failed["thing02.png"] and "one stem" in report.failed["thing01.png"]
    written = sorted(file.name for file in folder.glob("*.txt"))
    assert written == ["thing00.txt", "thing03.txt", "thing04.txt"]


def test_a_model_that_fails_on_one_image_of_a_batch_fails_on_that_only(
    image_folder: Callable[..., Path], tagger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(6, caption=False)
    from sdlora.data.captioning.onnx_tagger import OnnxTagger

    asked: list[int] = []
    describe = OnnxTagger.describe

    def failing(self: OnnxTagger, images: list[Image.Image]) -> list[list[str]]:
        asked.append(len(images))
        if any(image.getpixel((0, 0)) == (90, 90, 140) for image in images):  # thing03's corner
            raise RuntimeError("CUDA out of memory" if len(images) > 1 else "kernel failed")
        return describe(self, images)

    monkeypatch.setattr(OnnxTagger, "describe", failing)
    report = caption(folder, settings(tagger, batch_size=4))
    assert report.failed == {"thing03.png": "thing03.png: the model failed (kernel failed)"}
    assert report.written == 5 and asked == [4, 2, 2, 1, 1, 1, 1]  # the batch stays as small as it had to be


def test_the_preview_is_spread_over_the_folder_and_writes_nothing(
    image_folder: Callable[..., Path], tagger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlora.data.captioning.onnx_tagger import OnnxTagger

    folder = image_folder(12, caption=False)
    before = state(folder)
    asked: list[int] = []
    describe = OnnxTagger.describe
    monkeypatch.setattr(
        OnnxTagger, "describe", lambda self, images: asked.append(len(images)) or describe(self, images)
    )
    with Captioning(folder, settings(tagger)) as work:
        shown = work.preview()
        assert [captioned.image for captioned in shown] == [
            f"thing{n:02d}.png" for n in (0, 1, 3, 4, 6, 7, 9, 10)
        ]
        assert {captioned.caption for captioned in shown} == {ALL} and state(folder) == before
        assert work.run().written == 12
    assert sum(asked) == 12  # each image was looked at once


def test_the_model_is_freed_at_the_end(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration

    def models() -> int:
        return sum(type(thing) is BlipForConditionalGeneration for thing in gc.get_objects())

    model = str(write_blip(tmp_path / "blip"))
    gc.collect()
    assert models() == 0
    with Captioning(
        image_folder(1, caption=False), CaptionSettings(model, device="cpu", new_tokens=2)
    ) as work:
        work.preview(1)
        assert models() == 1
    assert models() == 0


def test_a_folder_that_may_not_be_written_is_refused_at_once(
    mixed: Path, tagger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match="may not be written"):
        Captioning(mixed, settings(tagger))


def test_a_restore_point_of_someone_else_touches_nothing_outside(tmp_path: Path, mixed: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (mixed / "link.txt").symlink_to(outside)
    (mixed / FOLDER).mkdir()
    names = ["../outside.txt", str(outside), "link.txt", "thing00.png"]
    from sdlora.data.captioning.restore import sha256

    lines = [{"what": "x"}, *({"file": n, "before": "theirs", "after": sha256("mine")} for n in names)]
    (mixed / FOLDER / "20260101-000000-abcdef.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = state(mixed)
    assert undo(mixed).kept == tuple(names)
    assert outside.read_text() == "mine" and state(mixed) == before


def test_a_link_in_a_captions_place_is_not_replaced(tmp_path: Path, mixed: Path, tagger: str) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (mixed / "thing00.txt").symlink_to(outside)
    report = caption(mixed, settings(tagger))
    assert report.failed.keys() == {"thing00.png"}
    assert outside.read_text() == "mine" and (mixed / "thing00.txt").is_symlink()


LONG = ["red sky", "tree", "cat ears", "a very long tag of many words indeed", "bob"]


@pytest.mark.parametrize(
    ("wording", "parts", "old", "expected"),
    [
        (Wording(), ["a cat on a mat"], "", "a cat on a mat"),
        (Wording(prefix="a photo of"), ["a cat"], "", "a photo of a cat"),
        (Wording(prefix="anime,", trigger="sks"), ["cat", "dog"], "", "sks, anime, cat, dog"),
        (Wording(trigger="cat"), ["a cat"], "", "a cat"),
        (Wording(keep_first=2), ["Old_Tag", "new"], "mia, old tag, gone", "mia, old tag, new"),
        (Wording(max_tokens=6), LONG, "", "red sky, tree"),
        (Wording(max_tokens=5), ["a cat, on a mat"], "", "a cat, on a"),
        (Wording(max_tokens=3), ["a cat, on a mat"], "", "a cat"),
        (Wording(max_tokens=1, trigger="sks style"), ["a cat"], "", "sks style"),
        (Wording(max_tokens=4, keep_first=1), LONG, "mia, x", "mia, red sky"),
    ],
)
def test_a_caption_is_put_together(wording: Wording, parts: list[str], old: str, expected: str) -> None:
    assert wording.compose(parts, old) == expected


@pytest.mark.parametrize("limit", range(1, 30))
def test_a_caption_is_as_long_as_the_limit_allows(limit: int) -> None:
    text = Wording(max_tokens=limit).compose(LONG)
    used = text.split(", ") if text else []
    assert used == LONG[: len(used)] and count_tokens([text])[0] <= limit
    longer = ", ".join(LONG[: len(used) + 1])
    assert len(used) == len(LONG) or count_tokens([longer])[0] > limit
