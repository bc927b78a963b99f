"""`sdlora runs`: what runs did and differ in, read from their folders, and their curves in one PNG."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdlora.commands.cli import main
from sdlora.config.toml import load_config, save_config
from sdlora.errors import ConfigError, OutputError
from sdlora.events import Estimate, Judged, RunFinished, RunStarted, StepDone, Validated, to_json
from sdlora.inspecting.runs import compare_runs, list_runs, read_run
from sdlora.run_folder import RunFolder


def write_run(
    folder: Path, *overrides: str, steps: int = 30, first: int = 0, until: int = 30, finished: bool = True
) -> None:
    """Write a run's settings and events; its loss is 1 / step."""
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(load_config(None, [f"output.name={folder.name}", *overrides]), run.config_file)
    events = [to_json(RunStarted("x", steps, first, 4, 10, None, 0))]
    for step in range(first + 1, until + 1):
        events.append(to_json(StepDone(step, steps, 0, 1 / step, 1e-4, 0.1, 2, 1.0, 0.0, 0.0)))
        if step % 10 == 0:
            events.append(to_json(Validated(step, 2 + abs(step - 20) / 10, 2)))
    if finished:
        events.append(to_json(RunFinished(until, until < steps, 12.5, None, 0.0)))
    with run.events_file.open("a", encoding="utf-8") as stream:
        stream.write("\n".join(events) + "\n")


def test_runs_are_listed_with_best_validation_and_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "optimizer.name=lion", "adapter.rank=4")
    write_run(tmp_path / "b", "adapter.rank=4", "training.loss=huber", until=12, finished=False)
    (tmp_path / "not-a-run").mkdir()
    table = list_runs(tmp_path)
    first, other = table.runs
    assert (first.name, first.state, first.step, first.steps) == ("a", "finished", 30, 30)
    assert first.best == (20, 2.0) and first.loss == pytest.approx(sum(1 / n for n in range(11, 31)) / 20)
    assert (other.state, other.step, other.best) == ("unfinished", 12, (10, 3.0))
    assert table.differences == {"optimizer.name": ["lion", "adamw"], "training.loss": ["l2", "huber"]}
    lines = table.render().splitlines()
    assert "finished" in lines[1] and "30/30" in lines[1] and "2.00000" in lines[1]
    assert any(line.startswith("optimizer.name") and "lion" in line and "adamw" in line for line in lines)
    assert [run.name for run in list_runs(tmp_path / "a").runs] == ["a"]


def test_the_score_that_judging_gave_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "adapter.rank=4")
    write_run(tmp_path / "b", "adapter.rank=4")
    cells = tuple(Estimate(value, value - 0.1, value + 0.1) for value in (0.4, 0.6))
    low = tuple(Estimate(value, 0.0, 0.5) for value in (0.2, 0.3))
    with RunFolder(tmp_path / "a").events_file.open("a", encoding="utf-8") as stream:
        stream.write(to_json(Judged(10, (0.5, 1.0), cells, 10, 1.0, "")) + "\n")
        stream.write(to_json(Judged(20, (0.5, 1.0), low, 10, 1.0, "")) + "\n")
    first, other = list_runs(tmp_path).runs
    assert (first.judged, other.judged) == ((10, 0.6), None)
    assert first.to_dict()["judged"] == {"step": 10, "score": 0.6}
    assert "0.60 (step 10)" in list_runs(tmp_path).render().splitlines()[1]


def test_steps_that_a_stopped_run_repeats_count_once_and_a_cut_line_is_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path / "a", until=25, finished=False)
    write_run(tmp_path / "a", first=10, until=15)
    with RunFolder(tmp_path / "a").events_file.open("a", encoding="utf-8") as stream:
        stream.write('{"event": "StepDone", "step": "many"}\n{"event": "Validated"}\n{"event": "StepDo')
    run = read_run(tmp_path / "a")
    assert [step for step, _ in run.losses] == list(range(1, 16))
    assert [step for step, _ in run.validation] == [10] and run.state == "stopped"


def test_curves_are_drawn_over_each_other_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", "adapter.rank=4")
    write_run(tmp_path / "b", "adapter.rank=8", until=20)
    write_run(tmp_path / "c", "adapter.rank=8", until=0, finished=False)
    image = tmp_path / "curves.png"
    words = ["runs", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--image", str(image), "--json"]
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["differences"] == {"adapter.rank": [4, 8]} and answer["image"] == str(image)
    assert [len(run["losses"]) for run in answer["runs"]] == [30, 20]
    assert answer["runs"][1]["best_validation"] == {"step": 20, "loss": 2.0}
    with Image.open(image) as drawn:
        assert drawn.format == "PNG" and drawn.width > 800
        colours = {pixel for _, pixel in drawn.convert("RGB").getcolors(1 << 20) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line of each run
    before = image.read_bytes()
    with pytest.raises(OutputError, match=r"curves\.png: exists; choose another --image, or add --overwrite"):
        compare_runs([tmp_path / "a", tmp_path / "b"], image)
    assert image.read_bytes() == before
    compare_runs([tmp_path / "a", tmp_path / "c"], image, overwrite=True)
    assert image.read_bytes() != before


def test_what_cannot_be_listed_or_compared_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", until=0, finished=False)
    image = tmp_path / "x.png"
    with pytest.raises(ConfigError, match=r"nothing-here: holds no training run; give the folder"):
        list_runs(tmp_path / "nothing-here")
    with pytest.raises(ConfigError, match="give two or more run folders"):
        compare_runs([tmp_path / "a"], image)
    with pytest.raises(ConfigError, match=r"b: holds no training run; `sdlora runs FOLDER` lists"):
        compare_runs([tmp_path / "a", tmp_path / "b"], image)
    with pytest.raises(ConfigError, match="none of these runs has made a step"):
        compare_runs([tmp_path / "a", tmp_path / "a"], image)
    RunFolder(tmp_path / "a").config_file.write_text("[output\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.toml: cannot be read .*mend it, or leave that run out"):
        list_runs(tmp_path)
    assert not image.exists()
    assert main(["runs", str(tmp_path), str(tmp_path)]) == 2
    assert main(["runs", str(tmp_path), "--image", str(image)]) == 2
    assert "one folder of runs, not 2" in capsys.readouterr().err
