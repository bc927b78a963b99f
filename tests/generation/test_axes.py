"""Grids over two axes and files of prompts: every image is the one drawn alone, and none is drawn twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from sdlora.config.prompt_lines import PromptLine, read_line, read_prompt_file
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.generation.axes import read_axis
from sdlora.generation.generate import GenerateResult, generate
from sdlora.generation.png_info import read_parameters
from sdlora.run_folder import RunFolder, list_checkpoints
from sdlora.training.train import train


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of two steps, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("grids")
    (folder / "images").mkdir()
    for number in range(2):
        Image.effect_noise((32, 32), 60.0).convert("RGB").save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("a cup", encoding="utf-8")
    texts = ("adapter.rank=2", "training.device=cpu", "training.precision=fp32", "training.steps=2")
    texts += ("optimizer.learning_rate=0.05", "training.checkpoint_every=1", "sample.prompts=[]")
    places = {"data.folder": folder / "images", "model.base": str(tiny_base), "output.name": "ink"}
    places |= {"output.folder": folder / "run", "data.cache_folder": folder / "cache"}
    train(load_config(None, texts, places))
    return RunFolder(folder / "run")


def drawn(tiny_base: Path, output: Path, **more: Any) -> GenerateResult:
    options: dict[str, Any] = {"adapters": [], "prompts": ["a cat"], "seed": 1, "steps": 2, **more}
    return generate(
        str(tiny_base), output=output, height=32, width=32, device="cpu", precision="fp32", **options
    )


def pixels(file: Path) -> Any:
    return numpy.asarray(Image.open(file)).astype(int)


@pytest.mark.long
def test_a_grid_holds_the_images_that_are_drawn_alone(
    tiny_base: Path, run: RunFolder, tmp_path: Path
) -> None:
    adapter = run.adapter_file("ink")
    grid = drawn(
        *(tiny_base, tmp_path / "grid"),
        adapters=[(adapter, 0.7)],
        axes=["checkpoint=1,2", "sampler=Euler, DDIM"],
    )
    first = list_checkpoints(run.checkpoints)[0].adapter_file
    last = list_checkpoints(run.checkpoints)[1].adapter_file
    alone = [
        drawn(tiny_base, tmp_path / f"{i}", adapters=[(file, 0.7)], sampler=sampler).files[0]
        for i, (sampler, file) in enumerate(
            [("Euler", first), ("Euler", last), ("DDIM", first), ("DDIM", last)]
        )
    ]
    assert len(grid.files) == 4 and grid.grid is not None
    for mine, other in zip(grid.files, alone, strict=True):
        assert numpy.abs(pixels(mine) - pixels(other)).max() <= 1
        assert read_parameters(mine)["Sampler"] == read_parameters(other)["Sampler"]
    assert numpy.abs(pixels(alone[0]) - pixels(alone[1])).max() > 2
    with Image.open(
        grid.grid
    ) as sheet:  # two columns and two rows of 32 px, three times enlarged, and labels
        assert sheet.width > 2 * 96 and sheet.height > 2 * 96


def test_a_grid_goes_on_where_it_stopped_and_overwrites_nothing(tiny_base: Path, tmp_path: Path) -> None:
    axes = ["seed=1,2", "guidance=2,5"]
    whole = drawn(tiny_base, tmp_path, axes=axes)
    kept = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    whole.files[2].unlink()
    calls: list[tuple[int, int]] = []
    again = drawn(tiny_base, tmp_path, axes=axes, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]  # one image of two steps
    assert [file for file in again.files if file not in kept] == [again.files[2]]
    assert again.grid is not None and again.grid.name == "grid-0002.png" and whole.grid is not None
    assert again.grid.read_bytes() == whole.grid.read_bytes()
    for file, state in kept.items():
        assert not file.exists() or (file.stat().st_mtime_ns, file.read_bytes()) == state
    more = drawn(tiny_base, tmp_path, axes=axes, prompts=["a dog"])
    assert not {*more.files} & {*again.files}


def test_prompts_of_a_file_want_what_they_say(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(
        "\ufeff# two\r\n\r\na cat --n ugly --w 48 --h 32 --d 9 --l 3 --s 3 --ss euler_a\r\n"
        "a dog -- asleep\r\n",
        encoding="utf-8",
    )
    lines = [read_line(line) for line in read_prompt_file(file)]
    assert lines == [PromptLine("a cat", "ugly", 48, 32, 9, 3.0, 3, "Euler a"), PromptLine("a dog -- asleep")]
    result = drawn(tiny_base, tmp_path / "out", prompts=lines, negative_prompt="bad")
    first, second = (read_parameters(file) for file in result.files)
    wanted = {"Prompt": "a cat", "Negative prompt": "ugly", "Size": "48x32", "Seed": "9", "CFG scale": "3"}
    assert wanted.items() <= first.items() and first["Sampler"] == "Euler a" and first["Steps"] == "3"
    assert (
        second["Prompt"] == "a dog -- asleep" and second["Negative prompt"] == "bad" and second["Seed"] == "1"
    )


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        (["colour=red"], "one or two of strength, seed, checkpoint"),
        (["steps"], "one or two of strength"),
        (["steps=1,x"], "steps takes numbers"),
        (["seed="], "has 0 values"),
        (["sampler=Eulr"], "did you mean `Euler`"),
        (["seed=1", "seed=2"], "of different kinds"),
        (["seed=1", "steps=1", "guidance=2"], "one or two axes"),
        (["strength=0,1"], "needs an adapter"),
        (["checkpoint=7"], "neither a file nor a checkpoint"),
        (["checkpoint=all"], "has no checkpoints"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_is_loaded(
    tmp_path: Path, axes: list[str], problem: str
) -> None:
    loads: Callable[..., Any] = generate
    with pytest.raises(ConfigError, match=problem):
        loads("no such base", [], ["a cat"], tmp_path / "out", axes=axes)
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_named_by_step_or_all_of_them(run: RunFolder) -> None:
    adapter = run.adapter_file("ink")
    saved = [checkpoint.adapter_file for checkpoint in list_checkpoints(run.checkpoints)]
    assert read_axis("checkpoint=all", (adapter,)).values == tuple(saved)
    assert read_axis("checkpoint=2", (saved[0],)).values == (saved[1],)
    assert read_axis(f"checkpoint={adapter},{saved[0]}", ()).labels == ("ink", "run-step-000001")
