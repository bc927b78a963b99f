"""The style benchmark measures what it says, alike for every trainer, and does no work twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from benchmarks.style.__main__ import main
from benchmarks.style.entries import equal_time_steps, named, peer_settings
from benchmarks.style.gallery import Drawing, Studio, read_folder
from benchmarks.style.measure import MEASURES, Measured, Yardstick
from benchmarks.style.styles import LINES, PAPER, Style, blueprint, find_style
from benchmarks.trainers import BenchmarkError
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, SdloraError
from sdlora.judging.copying import likeness

DATASETS = Path(__file__).parents[2] / "datasets"
Images = list[Image.Image]


def icons(name: str) -> dict[str, Image.Image]:
    files = sorted((DATASETS / name).glob("*.png"))
    assert len(files) >= 40
    return {f.stem: Image.open(f).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for f in files}


HOLDOUT = icons("ink-icons-holdout")
SUBJECTS, TRUE = list(HOLDOUT)[::2], list(HOLDOUT.values())[::2]
TRAINING = list(icons("ink-icons").values())[::2]
HUES = ("#c02020", "#208040", "#3050c0", "#b08020", "#803090")
BASE = [
    ImageOps.colorize(icon.filter(ImageFilter.GaussianBlur(3)).convert("L"), HUES[i % 5], "white")
    for i, icon in enumerate(TRUE)
]


def judge(images: Sequence[Image.Image], subjects: Sequence[str]) -> np.ndarray:
    """Rank subjects by likeness to their ink icons; it has never heard of one of them."""
    table = likeness(images, TRUE)
    known = [SUBJECTS.index(subject) for subject in subjects]
    scores = table[np.arange(len(images)), known]
    ranks = 1 + (table > scores[:, None] + 1e-9).sum(1).astype(float)
    return np.where(np.array(subjects) == "castle", np.nan, ranks)


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    return Yardstick(SUBJECTS, BASE, TRUE, TRAINING, ranks=judge)


def value(measured: Measured, name: str) -> float:
    figure = measured.figure(name)
    assert figure is not None
    return figure.value


def mixed(share: float) -> Images:
    chosen = set(np.random.default_rng(1).permutation(len(TRUE))[: round(share * len(TRUE))].tolist())
    return [TRUE[i] if i in chosen else BASE[i] for i in range(len(TRUE))]


def test_sets_whose_order_is_known_come_out_in_it(yardstick: Yardstick) -> None:
    measures = [yardstick.measure(mixed(share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    for name in ("style", "likeness"):
        values = [value(measured, name) for measured in measures]
        assert values == sorted(values), name
        assert values[-1] > values[0] + 0.1, name
    assert value(measures[0], "style") == 0
    assert value(measures[-1], "style") == pytest.approx(1, abs=0.05)
    assert value(measures[-1], "named") == value(measures[-1], "closer") == 1
    assert not any(measured.flagged for measured in measures)


def test_learning_by_heart_gives_the_style_and_nothing_else(yardstick: Yardstick) -> None:
    copies = yardstick.measure([TRAINING[i % len(TRAINING)] for i in range(len(TRUE))])
    assert value(copies, "style") > 0.85
    assert value(copies, "copied") == 1
    assert copies.flagged
    assert value(copies, "named") < 0.1
    assert 0.3 < value(copies, "closer") < 0.7


def test_images_under_each_others_names_keep_the_style_only(yardstick: Yardstick) -> None:
    swapped = yardstick.measure([*TRUE[1:], TRUE[0]])
    assert value(swapped, "style") == value(yardstick.measure(TRUE), "style")
    assert value(swapped, "closer") == pytest.approx(0.5, abs=0.1)
    assert value(swapped, "named") < 0.1


def test_intervals_hold_their_figure_and_are_not_shifted(yardstick: Yardstick) -> None:
    for images in (mixed(0.5), TRAINING + TRAINING[:6], TRUE):
        measured = yardstick.measure(images)
        for name in MEASURES:
            figure = measured.figure(name)
            assert figure is not None
            assert figure.low <= figure.value <= figure.high, name
            # pairing a subject with itself too often would show here
            spread = max(measured.draws[name].std(), 0.01)
            assert abs(measured.draws[name].mean() - figure.value) < 0.5 * spread, name


def test_what_two_entries_share_cancels_out_of_their_difference(yardstick: Yardstick) -> None:
    some = yardstick.measure(mixed(0.5))
    paler = yardstick.measure([image.point(lambda level: 10 + level * 245 // 255) for image in mixed(0.5)])
    for name in ("style", "likeness"):
        difference, alone = some.difference(paler, name), some.figure(name)
        assert difference is not None and alone is not None
        assert difference.high - difference.low < 0.5 * (alone.high - alone.low), name
        assert difference.value == pytest.approx(value(some, name) - value(paler, name))
    same = some.difference(some, "style")
    assert same is not None and (same.value, same.low, same.high) == (0, 0, 0)


def test_subjects_that_the_judge_does_not_know_are_left_out(yardstick: Yardstick) -> None:
    named_by_subject = yardstick.measure(TRUE).per_subject["named"]
    assert np.isnan(named_by_subject[SUBJECTS.index("castle")])
    assert np.isnan(named_by_subject).sum() == 1


def test_without_a_judge_the_subject_is_not_measured() -> None:
    plain = Yardstick(SUBJECTS[:8], BASE[:8], TRUE[:8], TRAINING[:8]).measure(TRUE[:8])
    assert plain.figure("named") is None
    assert plain.difference(plain, "named") is None
    assert plain.figure("style") is not None


def test_a_style_that_the_base_draws_already_is_said_to_be_not_measurable(yardstick: Yardstick) -> None:
    assert yardstick.measurable
    nearly = [*TRAINING, *TRAINING[:2], *BASE[:4]]  # ink icons, but for four
    assert not Yardstick(SUBJECTS, nearly, TRUE, TRAINING).measurable


# --- images by subject -----------------------------------------------------------------------------------


def test_other_peoples_images_are_found_by_subject(tmp_path: Path) -> None:
    for name in ("Ice cream_cone.jpg", "CAT.png", "unasked.png", "notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image", encoding="utf-8")
        else:
            Image.new("RGB", (20, 20), "red" if name.startswith("CAT") else "blue").save(tmp_path / name)
    cone, cat = read_folder(tmp_path, ["ice-cream-cone", "cat"])
    assert cat.getpixel((5, 5)) == (255, 0, 0)
    assert cone.size == (20, 20)
    with pytest.raises(ConfigError, match=r"no image of dog \(1 of 2 subjects\).*dog\.png"):
        read_folder(tmp_path, ["cat", "dog"])
    Image.new("RGB", (20, 20)).save(tmp_path / "cat.webp")
    with pytest.raises(ConfigError, match=r"CAT\.png and cat\.webp"):
        read_folder(tmp_path, ["cat"])
    (tmp_path / "dog.png").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"dog\.png: is not an image"):
        read_folder(tmp_path, ["dog"])


@pytest.fixture
def style(tmp_path: Path, image_folder: Callable[..., Path]) -> Style:
    """Six images to train on, and six others held out."""
    folder = image_folder(count=12)
    holdout = folder.with_name("held")
    holdout.mkdir()
    for file in sorted(folder.glob("*.png"))[6:]:
        for part in (file, file.with_suffix(".txt")):
            part.rename(holdout / part.name)
    return Style("things", folder, holdout)


def test_no_image_is_drawn_twice_and_a_subject_alone_is_drawn_alike(
    tmp_path: Path, tiny_base: Path, style: Style
) -> None:
    items = style.subjects()
    lines: list[str] = []
    studio = Studio(str(tiny_base), Drawing(steps=2), tmp_path / "drawn", lines.append)
    first = studio.draw("base", None, [0.0], items)[0.0]
    files = sorted((tmp_path / "drawn").rglob("*.png"))
    assert len(files) == 6 and lines == ["base: drew 6 of 6 images"]
    before = {file: file.stat().st_mtime_ns for file in files}
    files[3].unlink()
    again = studio.draw("base", None, [0.0], items[2:5])[0.0]
    assert [image.tobytes() for image in again] == [image.tobytes() for image in first[2:5]]
    assert lines[1:] == ["base: drew 1 of 1 images"]
    changed = [file for file in files if file.stat().st_mtime_ns != before[file]]
    assert changed == [files[3]]
    other = Studio(str(tiny_base), Drawing(steps=2, seed=1), tmp_path / "drawn", lines.append)
    assert other.draw("base", None, [0.0], items)[0.0][0].tobytes() != first[0].tobytes()


# --- styles ------------------------------------------------------------------------------------------------


def test_a_folder_of_ones_own_is_a_style(tmp_path: Path, style: Style) -> None:
    style_read = find_style(str(style.training), style.holdout, tmp_path, tmp_path)
    assert (style_read.training, style_read.holdout) == (style.training, style.holdout)
    assert len(style_read.subjects()) == 6
    assert [image_item.path.name for image_item in style_read.subjects(3)] == [
        image_item.path.name for image_item in style_read.subjects()[::2]
    ]
    with pytest.raises(ConfigError, match="subjects of the hold-out must not be in the training folder"):
        Style("same", style.training, style.training).subjects()
    with pytest.raises(ConfigError, match="neither a folder nor one of ink, blueprint"):
        find_style("inc", None, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"its hold-out .* is not a folder"):
        find_style(str(style.holdout), None, tmp_path, tmp_path)


def test_the_blueprint_turns_ink_to_pale_lines_on_blue_and_is_made_once(tmp_path: Path) -> None:
    ramp = Image.new("RGB", (2, 1), "white")
    ramp.putpixel((0, 0), (0, 0, 0))
    assert [blueprint(ramp).getpixel((x, 0)) for x in (0, 1)] == [LINES, PAPER]
    pale_style = find_style("blueprint", None, tmp_path, tmp_path)
    assert pale_style.trigger_word == "blueprintstyle"
    assert [image_item.path.stem for image_item in pale_style.subjects()] == list(HOLDOUT)
    times = {file: file.stat().st_mtime_ns for file in pale_style.training.iterdir()}
    assert len(times) == 2 * 48
    assert find_style("blueprint", None, tmp_path, tmp_path) == pale_style
    assert {file: file.stat().st_mtime_ns for file in pale_style.training.iterdir()} == times


def test_the_trigger_word_is_what_all_captions_begin_with(style: Style) -> None:
    assert find_style("ink", None, Path(), Path()).trigger_word == "inkicon"
    assert style.trigger_word is None


# --- entries -----------------------------------------------------------------------------------------------


def test_steps_at_equal_time_leave_the_start_out() -> None:
    # 10 s to start, 2 s a step: 50 s are 20 steps
    assert equal_time_steps(50, one_step=12, all_steps=210, steps=100) == 20
    assert equal_time_steps(5, one_step=12, all_steps=210, steps=100) == 1
    with pytest.raises(BenchmarkError, match="too busy"):
        equal_time_steps(50, one_step=12, all_steps=11, steps=100)


def test_the_peer_gets_what_our_run_ended_up_with(tiny_base: Path, tmp_path: Path) -> None:
    texts = ["optimizer.learning_rate=0.002", "optimizer.warmup_steps=7", "adapter.rank=12"]
    texts += ["training.batch_size=3", "data.resolution=32", "training.precision=bf16"]
    given = peer_settings(str(tiny_base), tmp_path / "script.py", load_config(None, texts, {}))
    assert (given.learning_rate, given.schedule, given.warmup_steps) == (0.002, "cosine", 7)
    assert (given.rank, given.batch_size, given.resolution, given.precision) == (12, 3, 32, "bf16")
    with pytest.raises(ConfigError, match="needs a diffusers folder"):
        peer_settings(str(tmp_path), tmp_path / "script.py", load_config(None, texts, {}))


def test_entries_need_names_of_their_own() -> None:
    assert named(["a=x", "b = y=z"], "--adapter") == {"a": "x", "b": "y=z"}
    for texts, message in ((["x"], "give NAME=VALUE"), (["a=1", "a=2"], "given twice")):
        with pytest.raises(ConfigError, match=message):
            named(texts, "--adapter")


# --- the whole ---------------------------------------------------------------------------------------------


def adapters(folder: Path, base: Path) -> list[str]:
    """Write one random adapter in three formats; return them as command-line entries."""
    import torch

    from sdlora.adapters.attach import create_adapter
    from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair
    from sdlora.config.schema import AdapterConfig
    from sdlora.families.loading import load_model
    from sdlora.formats.adapter_files import write_adapter

    model = load_model(str(base), dtype=torch.float32, device=torch.device("cpu"))
    torch.manual_seed(3)
    empty = create_adapter(model, AdapterConfig(rank=2, alpha=2.0), seed=0)
    pairs = {
        place: LowRankPair(pair.down, 0.3 * torch.randn_like(pair.up), pair.alpha)
        for place, pair in empty.pairs.items()
    }
    weights = AdapterWeights(pairs)
    assert len(weights) == len(empty) > 4
    arguments = []
    for name, file in (("webui", "kohya.safetensors"), ("diffusers", "lora.safetensors"), ("peft", "peft")):
        write_adapter(
            AdapterFile(weights, AdapterInfo("sd1")), name, folder / file, torch.float32, model.info
        )
        arguments += ["--adapter", f"{name}={folder / file}"]
    return arguments


@pytest.mark.long
def test_files_of_all_formats_and_folders_of_images_are_measured_alike(
    tmp_path: Path, tiny_base: Path, style: Style, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path / "out"), "--base", str(tiny_base), "--no-icons"]
    arguments += ["--style", str(style.training), "--holdout", str(style.holdout)]
    arguments += ["--draw-steps", "2", "--strengths", "0.5,1", *adapters(tmp_path, tiny_base)]
    assert main(arguments) == 0
    drawn = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "_work" / "images").rglob("*.png")}
    assert len(drawn) == 6 + 3 * 2 * 6
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in drawn:
        if "webui" in file.parts[-3] and file.parts[-2] == "1":
            (elsewhere / f"{file.stem[:7]}.png").write_bytes(file.read_bytes())
    capsys.readouterr()
    assert main([*arguments, "--images", f"elsewhere={elsewhere}"]) == 0

    assert {file: file.stat().st_mtime_ns for file in drawn} == drawn
    folder = tmp_path / "out" / style.training.name
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in report["entries"]] == ["webui", "diffusers", "peft", "elsewhere"]
    rows = [entry["strengths"]["1"] for entry in report["entries"]]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert rows[0] != report["entries"][0]["strengths"]["0.5"]
    assert "named" not in rows[0] and report["entries"][3]["recommended_strength"] is None
    for name in ("chart.png", "images.png", "sweep.png", "nearest.png"):
        assert Image.open(folder / name).size[0] > 300, name
    text = capsys.readouterr().out
    assert "| **peft** |" in text and "not measured" in text and "recommended" in text


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--adapter", "a=nowhere.safetensors"], "no such file or folder"),
        (["--style", "ink", "--style", "blueprint", "--images", "a=b"], "belong to one style"),
        (["--train", "=x"], "a name of its own"),
    ):
        assert main(["--output", str(tmp_path), "--no-icons", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


@pytest.mark.slow
def test_a_run_of_ours_is_trained_once_and_measured(
    tmp_path: Path, tiny_base: Path, style: Style, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path / "out"), "--base", str(tiny_base), "--no-icons"]
    arguments += ["--style", str(style.training), "--holdout", str(style.holdout), "--strengths", "1"]
    arguments += ["--draw-steps", "2", "--train", "small=adapter.rank=2"]
    arguments += ["--set", "training.steps=3", "training.batch_size=2", "optimizer.learning_rate=0.001"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / style.training.name / "report.json").read_text(encoding="utf-8"))
    (entry,) = report["entries"]
    assert (entry["steps"], entry["seconds"] > 0) == (3, True)
    assert entry["settings"] == "attention, rank 2, rate 0.001, batch 2, cosine"
    capsys.readouterr()
    assert main(arguments) == 0
    assert "training with sdlora" not in capsys.readouterr().err
    again = json.loads((tmp_path / "out" / style.training.name / "report.json").read_text(encoding="utf-8"))
    assert again == report


def test_errors_are_of_our_own_kind() -> None:
    with pytest.raises(SdloraError, match="5 images for 30 subjects"):
        Yardstick(SUBJECTS, BASE, TRUE, TRAINING).measure(TRUE[:5])
