"""Many images at once on the page: grids over two settings and lists of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sdlora_ui.gallery import table_html
from sdlora_ui.tabs.draw_many import MOST_IMAGES, grid_of, lines_of

from sdlora.errors import ConfigError
from sdlora.generation.png_info import read_parameters


def no_tags(prompt: str, negative: str) -> tuple[str, list[Any]]:
    return prompt, []


def test_two_axes_are_the_sides_of_a_table() -> None:
    table = grid_of(" Strength = 0, 0.5 ,1", "seed=1,2")
    assert table.arguments == {"axes": ["strength=0,0.5,1", "seed=1,2"]}
    assert table.columns == ("strength 0", "strength 0.5", "strength 1") and table.rows == (
        "seed 1",
        "seed 2",
    )
    assert grid_of("steps=5,10", "").rows == ("",)


@pytest.mark.parametrize(
    ("across", "down", "complaint"),
    [
        ("", "", "across ``: give one of strength, seed"),
        ("strength=", "", "give one of"),
        ("checkpoint=/etc/passwd", "", "give one of strength"),
        ("seed=1", "seed=2", "on both sides"),
        ("seed=" + ",".join(["1"] * 21), "steps=" + ",".join(["1"] * 10), f"at most {MOST_IMAGES}"),
    ],
)
def test_what_is_no_grid_is_said(across: str, down: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        grid_of(across, down)


def test_each_line_has_its_own_settings() -> None:
    table = lines_of("# cats\na cat --n blurry --s 7\n\na dog\n", no_tags)
    assert table.rows == ("a cat", "a dog")
    cat, dog = table.arguments["lines"]
    assert (cat["negative"], cat["steps"], dog["steps"], dog["adapters"]) == ("blurry", 7, None, [])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "0 lines"), ("a cat\na dog --s x\n", "line 2: .*whole number"), ("x\n" * 201, "201 lines")],
)
def test_what_is_no_list_of_prompts_is_said(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        lines_of(text, no_tags)


def test_a_table_shows_what_is_drawn_so_far_and_escapes_what_was_typed() -> None:
    html = table_html(["<b>", "x"], ["1"], {(0, 0): "/runs/a b.png"})
    assert html.count("<img") == 1 and html.count("sd-empty") == 1
    assert "<b>" not in html and "path=/runs/a%20b.png" in html


class Emit:
    """Keeps what the worker tells."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []

    def progress(self, done: int, total: int, note: str = "") -> None:
        pass

    def part(self, value: dict[str, Any]) -> None:
        self.parts.append(value)


def test_the_worker_draws_every_cell_with_its_settings(tmp_path: Path) -> None:
    from sdlora_ui.tasks.draw import draw

    arguments = {
        "base": "mini", "prompt": "an icon of a cat", "negative": "", "seed": 5, "width": None,
        "height": None, "steps": 1, "guidance": 3.0, "sampler": "DDIM", "folder": str(tmp_path),
        "rows": [[]],
    }  # fmt: skip
    emit = Emit()
    draw(arguments | grid_of("seed=1,2", "guidance=1,4").arguments, emit)
    drawn = {(p["row"], p["column"]): read_parameters(Path(p["file"])) for p in emit.parts}
    assert drawn.keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}
    numbers = {cell: (told["Seed"], float(told["CFG scale"])) for cell, told in drawn.items()}
    assert numbers == {(0, 0): ("1", 1.0), (0, 1): ("2", 1.0), (1, 0): ("1", 4.0), (1, 1): ("2", 4.0)}
    emit = Emit()
    draw(arguments | lines_of("a dog --d 9 --s 2\na bird --n red\n", no_tags).arguments, emit)
    dog, bird = (read_parameters(Path(part["file"])) for part in emit.parts)
    assert (dog["Prompt"], dog["Seed"], dog["Steps"]) == ("a dog", "9", "2")
    assert (bird["Prompt"], bird["Negative prompt"], bird["Seed"]) == ("a bird", "red", "5")
