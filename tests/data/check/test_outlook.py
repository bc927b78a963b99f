"""What the check shows of a run's images is what the run is then fed with."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from drawings import drawing, put

from sdlora.commands.cli import main
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.data.batching.buckets import Placement
from sdlora.data.check.doctor import Report
from sdlora.data.check.outlook import examine_settings
from sdlora.data.check.report_text import print_report
from sdlora.errors import DatasetError
from sdlora.events import Emitter
from sdlora.training.run import prepare_run
from sdlora.training.state import Run

Settings = Callable[..., Config]


def images(folder: Path, count: int, first: int = 0) -> Path:
    """Make images of several shapes and sizes that all look different."""
    sizes = [(96, 72), (72, 96), (64, 64), (200, 60), (30, 33)]
    for number in range(first, first + count):
        put(folder / f"p{number:02}.png", drawing(number, *sizes[number % len(sizes)]))
        put(folder / f"p{number:02}.txt", f"{{red|blue}} thing {number}, on paper")
    return folder


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path) -> Settings:
    main_folder = images(tmp_path / "images", 10)

    def make(*overrides: str, **values: object) -> Config:
        fast = ["adapter.rank=2", "training.steps=2", "sample.prompts=[]", "training.batch_size=2"]
        fixed = {"model.base": str(tiny_base), "output.folder": tmp_path / "run", "data.folder": main_folder}
        return load_config(None, [*fast, *overrides], {**fixed, **values})

    return make


def trained_on(report: Report) -> Counter[tuple[Path, Placement, str, int]]:
    return Counter(
        (examined.item.path, placement, examined.caption, examined.item.repeats)
        for examined in report.images
        if examined.role in ("trained", "regularisation")
        for placement in (examined.placement, *examined.further)
    )


def fed_with(run: Run) -> Counter[tuple[Path, Placement, str, int]]:
    pairs = zip(run.training.items, run.training.views.placements, strict=True)
    return Counter((item.path, placement, item.caption, item.repeats) for item, placement in pairs)


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.validation=0.3", "data.upscale=false", "data.trigger_word='zork'"),
        ("data.validation=3", "data.more_resolutions=[48, 64]", "data.repeats=2"),
        ("data.buckets=false", "data.resolution=48", "data.wildcards=true", "data.caption_suffix=', fine'"),
        ("data.caption_from='file name'", "data.crop='random'", "training.seed=5", "data.validation=2"),
    ],
)
def test_the_check_shows_every_image_as_training_takes_it(
    settings: Settings, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    priors = images(tmp_path / "class", 3, first=40)
    config = settings(*overrides, **{"data.sources": [{"folder": priors, "regularisation": True}]})
    report = examine_settings(config)
    run = prepare_run(config, resume=False, emit=Emitter(()))
    assert trained_on(report) == fed_with(run)
    held = {examined.item.path for examined in report.images if examined.role == "held out"}
    assert held == {item.path for item in run.validation.items}
    assert report.num_held_out == len(held)
    assert report.num_batches == run.order.batches_per_epoch
    assert (report.resolution, report.more_resolutions) == (
        run.config.data.resolution,
        config.data.more_resolutions,
    )
    assert len(report.images) == 13


def test_a_validation_folder_is_examined_too_and_its_images_are_not_trained_on(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation_folder = images(tmp_path / "images" / "own", 2, first=60)
    put(validation_folder / "leak.png", (tmp_path / "images" / "p00.png").read_bytes())
    config = settings(**{"data.validation": validation_folder})
    report = examine_settings(config)
    run = prepare_run(config, resume=False, emit=Emitter(()))
    assert trained_on(report) == fed_with(run)
    assert Counter(examined.role for examined in report.images) == {
        "trained": 10,
        "held out": 2,
        "not used": 1,
    }
    assert [examined.item.name for examined in report.images if examined.role == "not used"] == [
        "own/leak.png"
    ]
    print_report(report)
    assert re.search(r"held out +2: own/p60\.png, own/p61\.png", capsys.readouterr().out)
    put(validation_folder / "broken.png", b"x")
    broken = examine_settings(config)
    assert [finding.where for finding in broken.findings if finding.severity == "error"] == ["own/broken.png"]
    assert broken.num_unusable == 1
    elsewhere = settings(**{"data.validation": validation_folder, "output.folder": tmp_path / "other run"})
    with pytest.raises(DatasetError, match=r"broken\.png"):
        prepare_run(elsewhere, resume=False, emit=Emitter(()))


def test_the_command_takes_the_sizes_of_the_base(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path / "images", 12)
    buckets = []
    for arguments in ([], ["--base", str(tiny_base)], ["--base", str(tiny_base), "--resolution", "64"]):
        assert main(["check", str(folder), *arguments, "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        buckets.append((result["resolution"], result["buckets"][0]["bucket"], result["base"] is not None))
    assert buckets == [(512, [576, 448], False), (32, [40, 24], True), (64, [72, 56], True)]


def test_a_mended_copy_is_judged_by_the_base_too(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path / "images", 3)
    put(folder / "broken.png", b"x")
    arguments = ["--base", str(tiny_base), "--fix", "--output", str(tmp_path / "mended"), "--json"]
    assert main(["check", str(folder), *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["harmful"], result["fix"]["harmful"], result["fix"]["num_images"]) == (True, False, 3)
    assert not (tmp_path / "mended" / "broken.png").exists()
