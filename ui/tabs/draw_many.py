"""The part of the drawing page for many images at once: grids over two settings, and lists of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from sdlora.config.prompt_lines import MOST_LINES, PromptLine, read_line
from sdlora.errors import ConfigError, SdloraError, shown

from ..gallery import table_html
from .shared import problem

AXES = ("strength", "seed", "steps", "guidance", "sampler")
"""What a grid of the page may vary; checkpoints have a grid of their own."""
MOST_IMAGES = 200

Shape = Callable[[Sequence[Mapping[str, Any]], int], str]
Draw = Callable[[gr.Request, Sequence[Any], Mapping[str, Any], Shape], Iterator[Any]]


@dataclass(frozen=True)
class Many:
    """The controls."""

    across: gr.Textbox
    down: gr.Textbox
    grid: gr.Button
    lines: gr.Textbox
    draw: gr.Button


@dataclass(frozen=True)
class Table:
    """What is to be drawn: arguments of the drawing worker, and what stands beside rows and columns."""

    arguments: dict[str, Any]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def build() -> Many:
    """Put the controls into the current block."""
    with gr.Accordion("Grid over two settings", open=False, elem_id="axes"):
        with gr.Row():
            across = gr.Textbox(
                "strength=0, 0.5, 1", label="Across", info=", ".join(AXES), elem_id="axis-across", max_lines=1
            )
            down = gr.Textbox(
                "seed=1, 2", label="Down", info="may be empty", elem_id="axis-down", max_lines=1
            )
        grid = gr.Button("Draw the grid", elem_id="draw-axes")
    with gr.Accordion("Several prompts", open=False, elem_id="prompt-lines"):
        lines = gr.Textbox(
            label="Prompts, one a line",
            info="kohya's options behind a prompt: --n negative, --w and --h size, --d seed, --l guidance, "
            "--s steps, --ss sampler, --am strength; what a line leaves out is as set above and below",
            lines=5,
            max_lines=20,
            elem_id="lines-text",
        )
        draw = gr.Button("Draw all prompts", elem_id="draw-lines")
    return Many(across, down, grid, lines, draw)


def connect(
    many: Many, inputs: list[Any], outputs: list[Any], draw: Draw, tagged: Any, **options: Any
) -> None:
    """Let the buttons draw.

    Args:
        many: what :func:`build` made.
        inputs: the page's controls, the base first and the prompt second.
        outputs: status and images.
        draw: draws with further arguments of the worker.
        tagged: (prompt, negative prompt, held) -> prompt without tags, and the adapters to draw it with.
        options: of the events.
    """

    def drawn(request: gr.Request, table: Callable[[], Table], held: Sequence[Any]) -> Iterator[Any]:
        try:
            wanted = table()
        except SdloraError as error:
            yield problem(str(error)), gr.skip()
            return

        def shape(parts: Sequence[Mapping[str, Any]], _: int) -> str:
            cells = {(part["row"], part["column"]): part["file"] for part in parts}
            return table_html(wanted.rows, wanted.columns, cells)

        yield from draw(request, held, wanted.arguments, shape)

    def grid(request: gr.Request, across: str, down: str, *held: Any) -> Iterator[Any]:
        yield from drawn(request, lambda: grid_of(across, down), held)

    def lines(request: gr.Request, text: str, *held: Any) -> Iterator[Any]:
        base, prompt, *rest = held
        first = next((line.strip() for line in (text or "").splitlines() if line.strip()), "")
        with_prompt = (base, prompt if str(prompt or "").strip() else first, *rest)
        yield from drawn(
            request, lambda: lines_of(text or "", lambda *given: tagged(*given, with_prompt)), with_prompt
        )

    many.grid.click(grid, [many.across, many.down, *inputs], outputs, **options)
    many.draw.click(lines, [many.lines, *inputs], outputs, **options)


def grid_of(across: str, down: str) -> Table:
    """Return the grid that two texts such as ``strength=0, 0.5, 1`` describe; the second may be empty.

    Raises:
        ConfigError: for an axis that does not exist or is there twice, or too many images.
    """
    axes = [_axis("across", across), *([_axis("down", down)] if (down or "").strip() else [])]
    if len({name for name, _ in axes}) < len(axes):
        raise ConfigError(f"grid: {axes[0][0]} is on both sides; vary something else down")
    labels = [tuple(f"{name} {value}" for value in values) for name, values in axes]
    rows = labels[1] if len(labels) > 1 else ("",)
    if len(rows) * len(labels[0]) > MOST_IMAGES:
        raise ConfigError(f"grid: {len(rows) * len(labels[0])} images; at most {MOST_IMAGES}")
    texts = [f"{name}={','.join(values)}" for name, values in axes]
    return Table({"axes": texts}, rows, labels[0])


def _axis(side: str, text: str) -> tuple[str, list[str]]:
    name, _, rest = (text or "").partition("=")
    name, values = name.strip().lower(), [part.strip() for part in rest.split(",") if part.strip()]
    if name not in AXES or not values:
        raise ConfigError(
            f"{side} `{shown(text, 60)}`: give one of {', '.join(AXES)} with values, e.g. strength=0, 0.5, 1"
        )
    return name, values


def lines_of(text: str, tagged: Callable[[str, str], tuple[str, list[Any]]]) -> Table:
    """Return what a list of prompts asks for, a row each.

    Args:
        text: one prompt a line; empty lines and those that begin with ``#`` are passed over.
        tagged: (prompt, negative prompt) -> prompt without tags, and the adapters to draw it with.

    Raises:
        ConfigError: naming the line that says nothing clear; without prompts; with too many.
    """
    wanted: list[dict[str, Any]] = []
    labels: list[str] = []
    for number, line in enumerate(text.splitlines()[: MOST_LINES + 1], 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        try:
            read: PromptLine = read_line(line.strip())
            prompt, adapters = tagged(read.prompt, read.negative or "")
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error}") from None
        wanted.append(asdict(read) | {"prompt": prompt, "adapters": adapters})
        labels.append(read.prompt)
    if not 0 < len(wanted) <= MOST_IMAGES:
        raise ConfigError(f"prompts: {len(wanted)} lines; write 1 to {MOST_IMAGES}, one prompt a line")
    return Table({"lines": wanted}, tuple(labels), ("",))
