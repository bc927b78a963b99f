"""The demo, made small: a random base, two steps, a few subjects; and the page it leaves behind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.demonstration.data import find_data
from sdlora.demonstration.demo import MEASURED, SHOWN, STRENGTHS, demo
from sdlora.demonstration.report import DemoResult
from sdlora.errors import OutputError, TrainingError
from sdlora.events import Event, Listener, Notice, RunFinished, StepDone, read_events
from sdlora.exporting.export import open_source
from sdlora.generation.png_info import read_parameters
from sdlora.judging.style_features import FEATURES

NUM_SUBJECTS = 5


def small_demo(folder: Path, base: Path, listener: Listener, *, resume: bool = False) -> DemoResult:
    return demo(
        folder,
        base=str(base),
        steps=2,
        num_subjects=NUM_SUBJECTS,
        draw_steps=2,
        settings=["training.batch_size=2", "sample.steps=2"],
        listeners=[listener],
        resume=resume,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[DemoResult, list[Event]]:
    events: list[Event] = []
    return small_demo(tmp_path_factory.mktemp("demo") / "run", tiny_base, events.append), events


@pytest.mark.long
def test_it_leaves_a_whole_run_behind(small: tuple[DemoResult, list[Event]]) -> None:
    result, _ = small
    files = [path for path in result.folder.rglob("*") if path.is_file()]
    names = {path.relative_to(result.folder).as_posix() for path in files}
    assert {
        "config.toml",
        "events.jsonl",
        "loss.png",
        "samples/grid.png",
        "sweep.png",
        "before-after.html",
        "score.json",
        "ink-icons.safetensors",
        "webui/ink-icons.safetensors",
        "webui/ink-icons.png",
        "webui/ink-icons.json",
    } <= names
    assert [name for name in names if Path(name).name.startswith(".")] == [".lock"]  # no temporary file


def test_its_result_holds_what_scripts_rely_on(small: tuple[DemoResult, list[Event]]) -> None:
    result, _ = small
    stored = json.loads((result.folder / "score.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(result.to_dict())) == stored
    assert stored["score"] == stored["scores"][f"{stored['recommended_strength']:g}"]["value"]
    assert Path(stored["adapter_file"]).is_file() and Path(stored["grid"]).is_file()
    assert stored["seconds"] > stored["training_seconds"] > 0
    assert list(result.scores) == [0.0, *MEASURED] and result.scores[0.0].value == 0
    assert (stored["num_subjects"], stored["steps"]) == (NUM_SUBJECTS, 2)
    assert stored["num_images"] == 43  # of 48; five measured the loss
    assert all(text in result.render() for text in ("score", "page:", "sweep:", "adapter:", "proof:"))


def test_the_exported_card_carries_trigger_word_and_measured_strength(
    small: tuple[DemoResult, list[Event]],
) -> None:
    result, _ = small
    card = json.loads(result.adapter_file.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["activation text"] == "inkicon"
    assert card["preferred weight"] == result.recommended
    assert open_source(result.adapter_file).adapter.info.metadata["sdlora.preferred_strength"]
    assert "rounding allows" in result.proof


def test_every_image_is_drawn_once_and_the_sweep_is_labelled(
    small: tuple[DemoResult, list[Event]],
) -> None:
    result, events = small
    notes = [event.message for event in events if isinstance(event, Notice)]
    shown = min(NUM_SUBJECTS, len(SHOWN))
    total = NUM_SUBJECTS * (1 + len(MEASURED)) + shown * (len(STRENGTHS) - 1 - len(MEASURED))
    assert any(f"drew {total} of {total} images" in note for note in notes)
    assert [note[:6] for note in notes if re.match(r"\d of 3", note)] == ["1 of 3", "2 of 3", "3 of 3"]
    assert any(isinstance(event, StepDone) for event in events)
    assert any(isinstance(event, RunFinished) for event in events)
    with Image.open(result.grid) as sheet:
        assert sheet.width > shown * 90 and sheet.height > (len(STRENGTHS) + 1) * 90


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        if tag in ("a", "link", "script", "iframe"):
            self.links += [value for key in ("href", "src") if (value := values.get(key))]
        if tag not in ("img", "meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_self_contained_file(small: tuple[DemoResult, list[Event]]) -> None:
    result, _ = small
    text = result.page.read_text(encoding="utf-8")
    page = _Reader()
    page.feed(text)
    assert page.open == [] and page.links == []
    assert "http:" not in text and "https:" not in text and "$" not in re.sub(r"\$\{|`[^`]*`", "", text)
    shown = min(NUM_SUBJECTS, len(SHOWN))
    live = [image for image in page.images if image.get("class") == "live"]
    swept = {image["data-s"] for image in page.images if image.get("data-s")}
    assert len(live) == shown and len(swept) == shown * len(STRENGTHS)
    # slider and sweep with the true icons, all subjects three times, loss curve
    assert len(page.images) == shown * (2 + len(STRENGTHS) + 1) + 3 * NUM_SUBJECTS + 1
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.images)
    assert all(image.get("alt") for image in page.images)
    assert all(group in text for group in FEATURES)


def test_a_used_folder_is_refused_before_anything_happens(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        demo(tmp_path, base="no such base")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.long
def test_stopped_anywhere_it_says_how_to_go_on_and_ends_the_same(
    small: tuple[DemoResult, list[Event]], tiny_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def stop_training(event: Event) -> None:
        if isinstance(event, StepDone):
            (folder / "STOP").touch()

    def interrupt_drawing(event: Event) -> None:
        if isinstance(event, Notice) and event.message.startswith("2 of 3"):
            raise KeyboardInterrupt

    go_on = re.escape(f"sdlora demo --resume --output {folder}")
    with pytest.raises(TrainingError, match=f"stopped after step 1 and saved.*{go_on}"):
        small_demo(folder, tiny_base, stop_training)
    with pytest.raises(TrainingError, match=f"training, which is saved.*{go_on}"):
        small_demo(folder, tiny_base, interrupt_drawing, resume=True)
    result = small_demo(folder, tiny_base, lambda event: None, resume=True)
    whole = small[0]
    first, other = (load_file(each.adapter_file) for each in (result, whole))
    assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    assert (result.score, result.steps, result.num_images) == (whole.score, 2, 43)
    finished = [event["seconds"] for event in read_events(folder) if event["event"] == "RunFinished"]
    assert len(finished) == 3
    assert result.training_seconds == pytest.approx(sum(finished), abs=1)
    assert result.seconds > result.training_seconds


def test_a_stop_in_the_last_step_ends_the_demo_before_it_draws(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    notices: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == event.steps:
            (folder / "STOP").touch()
        if isinstance(event, Notice):
            notices.append(event.message)

    with pytest.raises(TrainingError, match="training, which is saved"):
        small_demo(folder, tiny_base, hear)
    assert (folder / "ink-icons.safetensors").is_file()
    assert not any(message.startswith("2 of 3") for message in notices)


def test_going_on_where_nothing_was_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no run to continue"):
        demo(tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_the_sample_images_are_found_and_the_shown_subjects_are_held_out() -> None:
    data = find_data()
    trained = {path.stem for path in (data / "ink-icons").glob("*.png")}
    held_out = {path.stem for path in (data / "ink-icons-holdout").glob("*.png")}
    assert len(trained) >= 32 and len(held_out) >= 48
    assert not trained & held_out
    assert set(SHOWN) <= held_out and len(SHOWN) == 8


def test_previews_carry_the_settings_that_made_them(small: tuple[DemoResult, list[Event]]) -> None:
    result, _ = small
    first = sorted((result.folder / "samples").glob("step-*.png"))[0]
    assert read_parameters(first)["Prompt"].startswith("inkicon")
