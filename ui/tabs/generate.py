"""Page 3: draw with adapters at any strength; strips, comparisons, grids; the gallery."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from sdlora.config.schema import SampleConfig, SamplerName
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, SdloraError
from sdlora.generation.lora_tags import split_tags
from sdlora.generation.png_info import read_parameters

from ..drafts import DRAW_FORM
from ..gallery import compare_html, grid_html, image_html, strip_html
from ..prompt_tags import adapters_by_name, with_tagged
from ..server.png_import import ImportedSettings, from_parameters
from ..settings import checked_base
from ..site import Site
from ..worker_client import CallCancelled
from . import draw_many, draw_tools, negatives
from .shared import Shell, checked_number, choices, problem, told, working

NUM_SLOTS = 4
_LOW, _HIGH, _STEP = -1.0, 2.0, 0.05
_STRIPS = {
    "0 to 1.5 by 0.25": (0.0, 1.5, 0.25),
    "0 to 1.5 by 0.1": (0.0, 1.5, 0.1),
    "-1 to 2 by 0.25": (-1.0, 2.0, 0.25),
    "-1 to 2 by 0.05": (-1.0, 2.0, 0.05),
}
_EMPTY = '<p class="sd-dim sd-none">Choose an adapter, write a prompt, press Draw.</p>'
_GRID_STRENGTHS = "0.5, 0.75, 1, 1.25"


@dataclass
class _Slot:
    """The controls of one adapter."""

    box: gr.Group
    file: gr.Dropdown
    strength: gr.Slider
    separate: gr.Checkbox
    text: gr.Slider

    @property
    def controls(self) -> list[Any]:
        return [self.file, self.strength, self.separate, self.text]


@dataclass
class _Page:
    """The page's controls whose values are read."""

    base: gr.Dropdown
    prompt: gr.Textbox
    negative: gr.Textbox
    seed: gr.Number
    width: gr.Textbox
    height: gr.Textbox
    steps: gr.Number
    guidance: gr.Textbox
    sampler: gr.Dropdown
    slots: list[_Slot]
    tab_word: gr.Textbox
    status: gr.HTML = field(init=False)
    main: gr.HTML = field(init=False)
    extra: gr.HTML = field(init=False)

    @property
    def plain(self) -> list[Any]:
        return [
            self.base, self.prompt, self.negative, self.seed, self.width, self.height,
            self.steps, self.guidance, self.sampler,
        ]  # fmt: skip

    @property
    def inputs(self) -> list[Any]:
        return [*self.filled, self.tab_word]

    @property
    def filled(self) -> list[Any]:
        """What a draft fills in."""
        return [*self.plain, *(control for slot in self.slots for control in slot.controls)]


_PLAIN = ("base", "prompt", "negative", "seed", "width", "height", "steps", "guidance", "sampler")


def build(site: Site, shell: Shell, tab: gr.Tab) -> None:
    """Put the page into the current tab."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            page, more = _controls(site, shell)
        with gr.Column(scale=6, min_width=320, elem_classes="sd-stage"):
            page.status = gr.HTML("", elem_id="drawing")
            page.main = gr.HTML(_EMPTY, elem_id="drawn")
            page.extra = gr.HTML("", elem_id="extra")
    with gr.Column(elem_classes="sd-box", elem_id="gallery"):
        gr.HTML("<h3 aria-level='2'>Gallery</h3>")
        gr.HTML("<sd-gallery></sd-gallery>")
    _connect_drawing(site, page, more)
    _connect_choosing(site, shell, tab, page, more["run"])
    _connect_sending(site, shell, page, more)
    _connect_keeping(site, page)


def _controls(site: Site, shell: Shell) -> tuple[_Page, dict[str, Any]]:
    with gr.Column(elem_classes="sd-box"):
        prompt = gr.Textbox(
            label="Prompt", lines=2, placeholder="inkicon, an icon of a cat", elem_id="prompt"
        )
        slots = [_slot(site, number) for number in range(NUM_SLOTS)]
        with gr.Row(elem_classes="sd-beside"):
            gr.HTML("<sd-adapters></sd-adapters>", elem_id="adapters")
            another = gr.Button("Add another adapter", size="sm", elem_id="another")
        with gr.Row(elem_classes="sd-beside"):
            seed = gr.Number(1, label="Seed", precision=0, elem_id="seed", min_width=90)
            dice = gr.Button("New seed", elem_id="new-seed", min_width=90)
            count = draw_tools.count_control()
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", elem_id="draw", size="lg")
            compare = gr.Button("Before / after", elem_id="compare", size="lg")
        drop = draw_tools.drop_control(site)
    with gr.Column(elem_classes="sd-box"), gr.Row(elem_classes="sd-beside"):
        strip = gr.Dropdown(
            list(_STRIPS), value=next(iter(_STRIPS)), label="Sweep: strengths of the strip", elem_id="strip"
        )
        sweep = gr.Button("Sweep the strength", elem_id="sweep")
    with gr.Accordion("Compare checkpoints: a grid of steps by strengths", open=False, elem_id="checkpoints"):
        with gr.Row():
            run = gr.Dropdown(
                choices(site.runs()), value=None, label="Run", elem_id="grid-run", elem_classes="sd-names"
            )
            strengths = gr.Textbox(_GRID_STRENGTHS, label="Strengths", elem_id="grid-strengths", max_lines=1)
        grid = gr.Button("Draw checkpoints by strengths", elem_id="grid")
    many = draw_many.build()
    page, imported, usual = _more_controls(site, shell, prompt, slots, seed)
    more = {
        "draw": draw, "compare": compare, "strip": strip, "sweep": sweep, "run": run,
        "strengths": strengths, "grid": grid, "another": another, "imported": imported, "dice": dice,
        "many": many, "count": count, "drop": drop, "usual": usual,
    }  # fmt: skip
    return page, more


def _more_controls(
    site: Site, shell: Shell, prompt: gr.Textbox, slots: list[_Slot], seed: gr.Number
) -> tuple[_Page, gr.File, negatives.Negatives]:
    """Return the page with the folded controls, the drop area for a PNG, and the usual negative prompts."""
    defaults = SampleConfig()
    placeholder = "the base's own"
    title = "More settings: base, negative prompt, steps, size, sampler"
    with gr.Accordion(title, open=False, elem_id="draw-more"):
        base = gr.Dropdown(
            choices(site.bases()),
            value="mini",
            label="Base model",
            info="Built in, a file found here, a path, or a Hugging Face id: owner/name",
            allow_custom_value=True,
            elem_id="draw-base",
            elem_classes="sd-names",
        )
        negative = gr.Textbox(label="Negative prompt", elem_id="negative")
        usual = negatives.build(site)
        with gr.Row(elem_classes="sd-beside"):
            steps = gr.Number(defaults.steps, label="Steps", precision=0, elem_id="steps", min_width=90)
            guidance = gr.Textbox(
                "", label="Guidance", placeholder=placeholder, elem_id="guidance", max_lines=1, min_width=90
            )
        with gr.Row():
            width = gr.Textbox(
                "", label="Width, px", placeholder=placeholder, elem_id="width", max_lines=1, min_width=110
            )
            height = gr.Textbox(
                "", label="Height, px", placeholder=placeholder, elem_id="height", max_lines=1, min_width=110
            )
        sampler = gr.Dropdown(
            list(get_args(SamplerName)), value=defaults.sampler, label="Sampler", elem_id="sampler"
        )
        imported = gr.File(
            label="Drop a PNG to use its settings", file_types=[".png"], elem_id="import-file", height=110
        )
    plain = (base, prompt, negative, seed, width, height, steps, guidance, sampler)
    page = _Page(*plain, slots, shell.tab_word)
    return page, imported, usual


def _slot(site: Site, number: int) -> _Slot:
    with gr.Group(visible=number == 0, elem_id=f"slot-{number}") as box:
        file = gr.Dropdown(
            [("none", ""), *choices(site.adapters())],
            value="",
            label="Adapter" if number == 0 else f"Adapter {number + 1}",
            elem_id=f"adapter-{number}",
            elem_classes="sd-names",
        )
        strength = gr.Slider(_LOW, _HIGH, 1.0, step=_STEP, label="Strength", elem_id=f"strength-{number}")
        title = "Separate strength for the text encoder"
        with gr.Accordion(title, open=False, elem_id=f"apart-{number}"):
            separate = gr.Checkbox(False, label="Separate", elem_id=f"separate-{number}")
            text = gr.Slider(_LOW, _HIGH, 1.0, step=_STEP, label="Text encoder", elem_id=f"text-{number}")
    return _Slot(box, file, strength, separate, text)


def _connect_drawing(site: Site, page: _Page, more: Mapping[str, Any]) -> None:
    def draw_several(request: gr.Request, count: Any, *held: Any) -> Iterator[Any]:
        yield from _several_drawn(site, request, count, held)

    def again(request: gr.Request, *held: Any) -> Iterator[Any]:
        if not str(_said(held)["prompt"] or "").strip():
            yield gr.skip(), gr.skip()
            return
        yield from _several_drawn(site, request, 1, held)

    def sweep(request: gr.Request, strip: str, *held: Any) -> Iterator[Any]:
        strengths = strip_strengths(strip)
        if not _rows(held)[0]:
            yield problem("choose an adapter first: a strip shows its strengths"), gr.skip()
            return
        chosen = _rows(held)[0][0]["denoiser"]

        def shape(parts: Sequence[Mapping[str, Any]], total: int) -> str:
            return strip_html(parts, strengths, total, chosen)

        yield from _drawn(site, request, held, strengths, shape)

    def compare(request: gr.Request, *held: Any) -> Iterator[Any]:
        def shape(parts: Sequence[Mapping[str, Any]], total: int) -> str:
            if len(parts) < 2:
                return image_html(parts[0])
            return compare_html(parts[0]["file"], parts[1]["file"], ("base alone", "with the adapter"))

        if not _rows(held)[0]:
            yield problem("choose an adapter first: before and after would be the same"), gr.skip()
            return
        yield from _drawn(site, request, held, None, shape, [[], _rows(held)[0]])

    def grid(request: gr.Request, run: str, strengths: str, *held: Any) -> Iterator[Any]:
        yield from _grid(site, request, run, strengths, held)

    options: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 8}
    main, extra = [page.status, page.main], [page.status, page.extra]
    counted = [more["count"], *page.inputs]
    gr.on([more["draw"].click, page.prompt.submit], draw_several, counted, main, **options)
    moved = [slider.release for slot in page.slots for slider in (slot.strength, slot.text)]
    gr.on(moved, again, page.inputs, main, trigger_mode="multiple", **options)
    more["dice"].click(lambda: secrets.randbelow(2**32), None, page.seed, show_progress="hidden").then(
        again, page.inputs, main, **options
    )
    more["sweep"].click(sweep, [more["strip"], *page.inputs], extra, **options)
    more["compare"].click(compare, page.inputs, extra, **options)
    more["grid"].click(grid, [more["run"], more["strengths"], *page.inputs], extra, **options)

    def draw_table(
        request: gr.Request, held: Sequence[Any], varied: Mapping[str, Any], shape: draw_many.Shape
    ) -> Iterator[Any]:
        yield from _drawn(site, request, held, None, shape, varied=varied)

    def tagged(prompt: str, negative: str, held: Sequence[Any]) -> tuple[str, list[Any]]:
        plain, rows = with_tagged(site, prompt, negative, _rows(held))
        return plain, [{**cell, "file": str(site.paths.model(cell["file"]))} for cell in rows[0]]

    draw_many.connect(more["many"], page.inputs, extra, draw_table, tagged, **options)


def _connect_keeping(site: Site, page: _Page) -> None:
    """Fill a page that was opened again with the values last drawn with in its tab."""

    def again(tab_word: str) -> list[Any]:
        kept = site.drafts.kept(DRAW_FORM, tab_word or "").get("held")
        if not isinstance(kept, list) or len(kept) != len(page.filled):
            return [gr.skip()] * (len(page.filled) + NUM_SLOTS)
        known, boxes = choices(site.adapters()), []
        for number in range(NUM_SLOTS):
            at = len(_PLAIN) + 4 * number
            file = kept[at] if kept[at] and Path(kept[at]).exists() else ""
            extra = [] if not file or file in dict(known).values() else [(adapter_label(file), file)]
            kept[at] = gr.Dropdown(choices=[("none", ""), *known, *extra], value=file)
            boxes.append(gr.Group(visible=number == 0 or bool(file)))
        return [*kept, *boxes]

    boxes = [slot.box for slot in page.slots]
    page.tab_word.change(again, page.tab_word, [*page.filled, *boxes], show_progress="hidden")


def _connect_choosing(site: Site, shell: Shell, tab: gr.Tab, page: _Page, run: gr.Dropdown) -> None:
    files = [slot.file for slot in page.slots]

    def refresh(prompt: str, of_grid: str | None, *chosen: str) -> list[Any]:
        known = choices(site.adapters())
        shown = [("none", ""), *known]
        paths = {path for _, path in shown}
        extra = [[] if file in paths else [(adapter_label(file), file)] for file in chosen]
        lists = [gr.Dropdown(choices=[*shown, *more]) for more in extra]
        text = gr.skip()
        if not any(chosen) and not (prompt or "").strip() and known:  # the page is opened for the first time
            lists[0] = gr.Dropdown(choices=shown, value=known[0][1])
            text = _first_prompt(site, Path(known[0][1]).parent)
        runs = choices(site.runs())
        newest = of_grid or (runs[0][1] if runs else None)
        return [text, *lists, gr.Dropdown(choices=runs, value=newest)]

    tab.select(refresh, [page.prompt, run, *files], [page.prompt, *files, run], show_progress="hidden")

    def use(message: str) -> list[Any]:
        job = site.queue.get(told(message, "id"))
        return [gr.Tabs(selected="generate"), *_use_run(site, job.run)]

    first = page.slots[0]
    shell.try_run.change(use, shell.try_run, [shell.tabs, page.base, page.prompt, first.file, run])

    def pick(message: str) -> tuple[Any, Any]:
        file, strength = told(message, "file"), told(message, "strength")
        known = [("none", ""), *choices(site.adapters())]
        return gr.Dropdown(choices=[*known, (adapter_label(file), file)], value=file), strength

    shell.chosen_cell.change(pick, shell.chosen_cell, [first.file, first.strength])


def _connect_sending(site: Site, shell: Shell, page: _Page, more: Mapping[str, Any]) -> None:
    boxes = [slot.box for slot in page.slots]
    outputs = [*page.plain, *boxes, *(control for slot in page.slots for control in slot.controls)]

    def from_gallery(message: str) -> list[Any]:
        return _imported(site, site.paths.readable(told(message, "file")), len(outputs))

    def from_file(file: str | None) -> list[Any]:
        return _imported(site, Path(file), len(outputs)) if file else [gr.skip()] * len(outputs)

    shell.import_png.change(from_gallery, shell.import_png, outputs, show_progress="hidden")
    more["imported"].upload(from_file, more["imported"], outputs, show_progress="hidden")

    def add(*files: str) -> list[Any]:
        seen = max([number for number, file in enumerate(files) if file], default=0)
        return [gr.Group(visible=number <= seen + 1) for number in range(NUM_SLOTS)]

    negatives.connect(site, more["usual"], page.negative, shell.tab_word)
    if more["drop"] is not None:
        first = page.slots[0].file

        def take(file: str | None) -> tuple[Any, Any]:
            kept = draw_tools.dropped(site, file)
            listed = [("none", ""), *choices(site.adapters())]
            return (gr.skip() if kept is None else gr.Dropdown(choices=listed, value=str(kept))), None

        more["drop"].upload(take, more["drop"], [first, more["drop"]], show_progress="hidden")
    more["another"].click(add, [slot.file for slot in page.slots], boxes, show_progress="hidden")


def _imported(site: Site, file: Path, count: int) -> list[Any]:
    try:
        return _filled(site, from_parameters(read_parameters(file)))
    except SdloraError as error:
        gr.Warning(str(error))
        return [gr.skip()] * count


def _use_run(site: Site, run: Path) -> list[Any]:
    """Return base, prompt, adapter and run list for trying out a run."""
    adapters = choices(site.adapters())
    file = next((path for _, path in adapters if Path(path).is_relative_to(run)), "")
    return [
        site.base_of(run),
        _first_prompt(site, run),
        gr.Dropdown(choices=[("none", ""), *adapters], value=file),
        gr.Dropdown(choices=choices(site.runs()), value=str(run)),
    ]


def _first_prompt(site: Site, run: Path) -> str:
    """Return the first prompt of a run's previews; an empty text for a folder that is not a run."""
    file = run / "config.toml"
    lines = load_config(file).sample.lines if file.is_file() and site.paths.reaches(file) else []
    return split_tags(lines[0].prompt)[0] if lines else ""


def adapter_label(file: str) -> str:
    """Return the label of an adapter that is in no list: a checkpoint's is its run and step."""
    path = Path(file)
    if path.name == "adapter.safetensors":
        return f"{path.parents[2].name} ({path.parent.name.replace('-', ' ')})"
    return path.stem


def _filled(site: Site, imported: ImportedSettings) -> list[Any]:
    """Return the value of every control according to an image's settings."""
    by_label = adapters_by_name(site)
    missing = [name for name, _, _ in imported.adapters if name not in by_label]
    if missing:
        gr.Warning(f"not found here: {', '.join(missing)}; all other settings were set")
    given = [
        (by_label[name], denoiser, text) for name, denoiser, text in imported.adapters if name in by_label
    ][:NUM_SLOTS]
    slots: list[Any] = []
    for number in range(NUM_SLOTS):
        file, denoiser, text = given[number] if number < len(given) else ("", 1.0, 1.0)
        slots += [file, denoiser, denoiser != text, text]
    boxes = [gr.Group(visible=number < max(1, len(given))) for number in range(NUM_SLOTS)]
    bases = {Path(base.path).stem: base.path for base in site.bases()}
    if imported.model and imported.model not in bases:
        gr.Warning(f"the base `{imported.model}` was not found here; the chosen one stays")
    plain = [
        bases.get(imported.model or ""),
        imported.prompt,
        imported.negative,
        imported.seed,
        f"{imported.width or ''}",
        f"{imported.height or ''}",
        imported.steps,
        "" if imported.guidance is None else f"{imported.guidance:g}",
        imported.sampler,
    ]
    return [gr.skip() if value is None else value for value in plain] + boxes + slots


def strip_strengths(name: str) -> list[float]:
    """Return the strengths of a strip by its name."""
    low, high, step = _STRIPS[name]
    return [round(low + i * step, 4) for i in range(round((high - low) / step) + 1)]


def _said(held: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(_PLAIN, held, strict=False))


def _rows(held: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """Return the chosen adapters with their strengths, as one row."""
    rest, row = held[len(_PLAIN) :], []
    for number in range(NUM_SLOTS):
        file, strength, separate, text = rest[4 * number : 4 * number + 4]
        if file:
            row.append({"file": file, "denoiser": strength, "text": text if separate else None})
    return [row]


def _arguments(
    site: Site, held: Sequence[Any], rows: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    values = _said(held)
    if not str(values["prompt"] or "").strip():
        raise ConfigError("prompt: say what to draw")
    for name in ("seed", "steps"):
        if values[name] is None:
            raise ConfigError(f"{name}: give a number")
    for name in ("width", "height", "guidance"):
        values[name] = checked_number(name, str(values[name] or ""), whole=name != "guidance")
    values["prompt"], rows = with_tagged(site, str(values["prompt"]), str(values["negative"] or ""), rows)
    checked = [[{**cell, "file": str(site.paths.model(cell["file"]))} for cell in row] for row in rows]
    base = checked_base(site.paths, str(values["base"] or ""))
    return values | {"base": base, "rows": checked, "folder": str(site.paths.images)}


def _drawn(
    site: Site,
    request: gr.Request,
    held: Sequence[Any],
    strengths: Sequence[float] | None,
    shape: Callable[[Sequence[Mapping[str, Any]], int], str],
    rows: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    varied: Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    """Draw, and yield (status, content): progress, parts that are ready, the whole.

    An earlier request of the same browser tab is cancelled: sliders may move faster than images are drawn.
    """
    parts: list[Mapping[str, Any]] = []
    try:
        rows = rows if rows is not None else _rows(held)
        arguments = _arguments(site, held, rows) | {"strengths": strengths}
        arguments |= varied or {}
        site.drafts.keep(DRAW_FORM, {"held": list(held[:-1])}, held[-1] or "")
        total = len(rows) * len(strengths or [None])
        for answer in site.draw.call("draw", arguments, replace=f"draw {request.session_hash}"):
            if answer.progress is not None:
                yield working(*answer.progress), gr.skip()
            elif answer.part is not None:
                parts.append(answer.part)
                if total > 1 or varied:
                    yield gr.skip(), shape(parts, total)
            elif answer.result is not None:
                whole = shape(parts, total)
                if total == 1 and not varied:
                    whole = image_html(parts[0], answer.result["seconds"])
                yield "", whole
    except CallCancelled:
        yield gr.skip(), gr.skip()
    except SdloraError as error:
        yield problem(str(error)), gr.skip()


def _several_drawn(site: Site, request: gr.Request, count: Any, held: Sequence[Any]) -> Iterator[Any]:
    """Draw one image, or several with the seeds that follow."""
    if count == 1:
        yield from _drawn(site, request, held, None, lambda parts, _: image_html(parts[0]))
        return
    try:
        varied, shape = draw_tools.several(count, _said(held)["seed"])
    except SdloraError as error:
        yield problem(str(error)), gr.skip()
        return
    yield from _drawn(site, request, held, None, shape, varied=varied)


def _grid(site: Site, request: gr.Request, run: str, text: str, held: Sequence[Any]) -> Iterator[Any]:
    """Draw every checkpoint of a run at every strength."""
    try:
        if not run:
            raise ConfigError("run: choose one")
        try:
            strengths = [float(part) for part in text.split(",")]
        except ValueError:
            raise ConfigError(
                f"strengths `{text}`: give numbers with commas between them, e.g. 0.5, 1"
            ) from None
        checkpoints = site.checkpoints(site.paths.readable(run))
        rows = [[{"file": checkpoint.path, "denoiser": 1.0, "text": None}] for checkpoint in checkpoints]
        labels = [{"label": checkpoint.label, "file": checkpoint.path} for checkpoint in checkpoints]
    except SdloraError as error:
        yield problem(str(error)), gr.skip()
        return

    def shape(parts: Sequence[Mapping[str, Any]], total: int) -> str:
        return grid_html(labels, strengths, {(part["row"], part["column"]): part["file"] for part in parts})

    yield from _drawn(site, request, held, strengths, shape, rows)
