"""From prompts, and adapters with their strengths, to images in a folder.

The denoising loop is :mod:`sdlora.generation.render`; :class:`ImageGenerator` keeps a base loaded while
adapters and their strengths change; :func:`generate` is the whole of ``sdlora generate``: it names and
writes the files.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.strength import Strength
from ..config.prompt_lines import PromptLine
from ..config.schema import AttentionName, ModelConfig, Precision, SampleConfig
from ..diffusion.samplers import find_sampler
from ..errors import ConfigError
from ..families.base import DiffusionModel
from ..run_folder import checkpoint_of
from .adapter_folders import checkpoint_name, find_adapter
from .axes import Axis, read_axis, swept, varied
from .grids import grid
from .image_folder import drawn_before, make_folder, opened, write_numbered, write_sheet
from .image_generator import ImageGenerator
from .lora_tags import take_tags
from .png_info import parameters_text
from .render import GeneratedImage, GenerateRequest, Progress, check_request, render, usual_guidance

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "GenerateRequest",
    "GenerateResult",
    "GeneratedImage",
    "ImageGenerator",
    "generate",
    "make_folder",
    "render",
    "swept",
    "write_numbered",
]


@dataclass(frozen=True)
class GenerateResult:
    """What :func:`generate` wrote: the images in order, the sweep's grid, and the seconds it took."""

    files: tuple[Path, ...]
    grid: Path | None
    seconds: float


def generate(
    base: str | ModelConfig,
    adapters: Sequence[tuple[str | Path, Strength]],
    prompts: Sequence[str | PromptLine],
    output: str | Path,
    *,
    adapter_folders: Sequence[str | Path] = (),
    negative_prompt: str = "",
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    strengths: Sequence[float] | None = None,
    axes: Sequence[str] = (),
    merge: bool = False,
    count: int = 1,
    device: str | None = None,
    precision: Precision | None = None,
    attention: AttentionName = "auto",
    offload: bool = False,
    progress: Progress | None = None,
) -> GenerateResult:
    """Make images and write them as ``00001-SEED.png``, numbered on from those in the folder.

    Every prompt gets the same ``count`` seeds, from ``seed`` on; what is left open follows the base.

    Args:
        base: ``mini``, a diffusers folder, a ``.safetensors`` file or a hub id, or the settings of one.
        adapters: (file, strength) of each adapter; see :func:`sdlora.adapters.strength.parse_adapter`.
        prompts: what to show; ``<lora:NAME:0.8>`` in one adds an adapter for it alone.
        adapter_folders: where such adapters are looked for (:func:`.adapter_folders.find_adapter`), before
            the folders of ``adapters`` and ``runs``.
        output: folder for the images; created if it is missing, and nothing in it is overwritten.
        strengths: each prompt and seed at each of these, and a grid of all; see :func:`swept`.
        axes: or a grid of one or two others, columns first; see :func:`sdlora.generation.axes.read_axis`.
            Images of it that the folder holds already are not drawn again.
        merge: fold the adapters into the base's weights first.
        count: images a prompt (and strength).
        progress: called after each denoising step.

    Raises:
        ConfigError: for impossible settings.
        ModelError, AdapterFileError, OutputError: for what cannot be loaded, fit or be written.
    """
    started, given = time.perf_counter(), [(Path(file), strength) for file, strength in adapters]
    grid_axes, lines = _axes_of(strengths, axes, given), _lines(prompts)
    asked = Asked(lines, given, grid_axes, sampler or SampleConfig().sampler, count)
    _check_call(asked, strengths)
    files = _files_of(asked, adapter_folders)
    generator = ImageGenerator.load(
        base, device=device, precision=precision, attention=attention, offload=offload
    )
    plain = _plain_request(
        generator.model, negative_prompt, (height, width), steps, guidance, asked.sampler, seed
    )
    rows = _rows(plain, asked, *_loaded(generator, asked, files))
    drawn = _drawn(Path(output), rows, generator, again=not axes, merge=merge, progress=progress)
    sheet = _write_sheet(Path(output), [image for _, image in drawn], rows, asked.axes)
    return GenerateResult(tuple(file for file, _ in drawn), sheet, time.perf_counter() - started)


@dataclass(frozen=True)
class Asked:
    """What is to be drawn, before anything is loaded.

    Attributes:
        lines: the prompts, each with what it wants otherwise than the others.
        adapters: (file, strength) of each.
        axes: of a grid, columns first; none, one or two.
        sampler: for prompts that name none.
        count: seeds a prompt.
    """

    lines: Sequence[PromptLine]
    adapters: Sequence[tuple[Path, Strength]]
    axes: Sequence[Axis]
    sampler: str
    count: int

    @property
    def tags(self) -> dict[str, Strength]:
        """The adapters that prompts name."""
        return {name: value for line in self.lines for name, value in take_tags(line.prompt)[1].items()}


@dataclass(frozen=True)
class _Row:
    """Images that stand beside each other in a grid, or one image; and what stands at their left."""

    label: str
    cells: list[GenerateRequest]


def _lines(prompts: Sequence[str | PromptLine]) -> list[PromptLine]:
    return [PromptLine(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _axes_of(
    strengths: Sequence[float] | None, axes: Sequence[str], adapters: Sequence[tuple[Path, Strength]]
) -> list[Axis]:
    """Return the axes of a grid, or none."""
    if strengths is not None:
        if axes:
            raise ConfigError(
                "`strengths` is a grid of its own; name it as an axis: --grid strength=0,0.5,1 ..."
            )
        return [Axis("strength", tuple(strengths), tuple(f"{value:g}" for value in strengths))]
    grid_axes = [read_axis(text, tuple(file for file, _ in adapters)) for text in axes]
    if len(grid_axes) > 2 or len({axis.name for axis in grid_axes}) < len(grid_axes):
        raise ConfigError("a grid has one or two axes, of different kinds: --grid strength=0,0.5,1 seed=1,2")
    return grid_axes


def _loaded(
    generator: ImageGenerator, asked: Asked, files: Mapping[str, Path]
) -> tuple[dict[str, Strength], dict[Path, str]]:
    """Load all adapters; return the strengths of those given, and the names of a grid's checkpoints."""
    given = {generator.add_adapter(file): strength for file, strength in asked.adapters}
    for name, file in files.items():
        generator.add_adapter(file, name)
    names: dict[Path, str] = {}
    for axis in asked.axes:
        if axis.name == "checkpoint":
            for file in dict.fromkeys(axis.values):
                belongs = checkpoint_of(file)
                names[file] = generator.add_adapter(file, checkpoint_name(*belongs) if belongs else None)
    return given, names


def _rows(
    plain: GenerateRequest, asked: Asked, given: Mapping[str, Strength], names: Mapping[Path, str]
) -> list[_Row]:
    """Return the images in the order they are written: by prompt, seed, second and first axis."""
    across, down = (*asked.axes, None, None)[:2]
    several = len(asked.lines) * asked.count > 1
    rows = []
    for line in asked.lines:
        first = of_line(plain, line, given)
        for i in range(asked.count):
            seeded = dataclasses.replace(first, seed=first.seed + i)
            label = first.prompt + (f" (seed {seeded.seed})" if asked.count > 1 else "")
            for j in range(len(down.values) if down else 1):
                cell, cells = seeded, []
                if down:
                    cell = varied(seeded, down, j, names)
                if across:
                    cells = [varied(cell, across, k, names) for k in range(len(across.values))]
                beside = f": {label}" if several else ""
                rows.append(_Row(f"{down.labels[j]}{beside}" if down else label, cells or [cell]))
    return rows


def of_line(plain: GenerateRequest, line: PromptLine, given: Mapping[str, Strength]) -> GenerateRequest:
    """Return the request for one prompt, with what it wants otherwise than the others."""
    prompt, tags = take_tags(line.prompt)
    names = ("height", "width", "steps", "guidance", "sampler", "seed")
    wanted = {"negative_prompt": line.negative, **{name: getattr(line, name) for name in names}}
    changes = {name: value for name, value in wanted.items() if value is not None}
    strengths = given if line.strength is None else dict.fromkeys(given, line.strength)
    return dataclasses.replace(plain, prompt=prompt, strengths={**strengths, **tags}, **changes)


class _Texts:
    """The settings as they are written into images."""

    def __init__(self, generator: ImageGenerator) -> None:
        self._base = generator.model.base
        self._hashes = {name: generator.hash_of(name) for name in generator.adapters}

    def of(self, request: GenerateRequest) -> str:
        """Return those of one image."""
        return parameters_text(request, self._base, self._hashes)


def _drawn(
    folder: Path,
    rows: Sequence[_Row],
    generator: ImageGenerator,
    *,
    again: bool,
    merge: bool,
    progress: Progress | None,
) -> list[tuple[Path, Image]]:
    """Draw and write all images, or those that the folder does not hold; return each with its file."""
    flat = [request for row in rows for request in row.cells]
    for request in flat:
        check_request(generator.model, request)
    make_folder(folder)  # after all checks, before the long work
    texts = _Texts(generator)
    if not again:
        return _draw_missing(folder, flat, generator, texts, merge=merge, progress=progress)
    images = generator.generate(flat, merge=merge, progress=progress)
    return [(write_numbered(folder, image, texts.of(image.request)), image.image) for image in images]


def _draw_missing(
    folder: Path,
    flat: Sequence[GenerateRequest],
    generator: ImageGenerator,
    texts: _Texts,
    *,
    merge: bool,
    progress: Progress | None,
) -> list[tuple[Path, Image]]:
    """Draw the images of a grid that the folder does not hold, and write each group when it is drawn."""
    wanted = {texts.of(request): request for request in flat}
    files = drawn_before(folder, wanted)
    todo: list[list[GenerateRequest]] = []
    for text, request in wanted.items():
        if text not in files:
            group = next((g for g in todo if g[0].strengths == request.strengths), None)
            if group is None:
                todo.append([request])
            else:
                group.append(request)
    total, before = sum(request.calls for group in todo for request in group), 0
    for group in todo:
        shifted = None if progress is None else partial(_shifted, progress, before, total)
        for image in generator.generate(group, merge=merge, progress=shifted):
            text = texts.of(image.request)
            files[text] = write_numbered(folder, image, text)
        before += sum(request.calls for request in group)
    return [(files[text], opened(files[text])) for text in map(texts.of, flat)]


def _shifted(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _write_sheet(
    folder: Path, images: Sequence[Image], rows: Sequence[_Row], axes: Sequence[Axis]
) -> Path | None:
    if not axes:
        return None
    acting = dict.fromkeys(name for row in rows for name in row.cells[0].strengths)
    prompts = dict.fromkeys(row.cells[0].prompt for row in rows)
    title = f"strength of {' and '.join(acting)}" if len(axes) == 1 and axes[0].name == "strength" else None
    if title is None and len(prompts) == 1:
        title = next(iter(prompts))
    sheet = grid(images, len(axes[0].values), [row.label for row in rows], axes[0].labels, title)
    return write_sheet(folder, sheet)


def _plain_request(
    model: DiffusionModel,
    negative_prompt: str,
    size: tuple[int | None, int | None],
    steps: int | None,
    guidance: float | None,
    sampler: str,
    seed: int | None,
) -> GenerateRequest:
    """Return the request that all images share; ``size`` is (height, width) in px, None for the base's."""
    defaults, (height, width) = SampleConfig(), size
    return GenerateRequest(
        "",
        negative_prompt,
        height=model.facts.native_resolution if height is None else height,
        width=model.facts.native_resolution if width is None else width,
        steps=defaults.steps if steps is None else steps,
        guidance=usual_guidance(model) if guidance is None else guidance,
        sampler=sampler,
        seed=defaults.seed if seed is None else seed,
    )


def _files_of(asked: Asked, folders: Sequence[str | Path]) -> dict[str, Path]:
    """Return the file of each adapter that prompts name and that is not among those given."""
    given = [file for file, _ in asked.adapters]
    known = {name for file in given for name in (file.stem, file.name)}  # folders have no ending
    places = [*(Path(folder).expanduser() for folder in folders), *(file.parent for file in given)]
    usual = Path("runs")  # where `sdlora train` puts them
    places += [usual] if usual.is_dir() or not places else []
    names = sorted(asked.tags.keys() - known)
    return {name: find_adapter(name, list(dict.fromkeys(places))) for name in names}


def _check_call(asked: Asked, strengths: Sequence[float] | None) -> None:
    """Refuse impossible requests before anything is loaded."""
    adapters = [*(strength for _, strength in asked.adapters), *asked.tags.values()]
    problems: list[str] = []
    if not asked.lines:
        problems.append("no prompt given; say what to show with --prompt, or --prompts FILE")
    if asked.count < 1:
        problems.append(f"`count={asked.count}`: make at least 1 image a prompt")
    if strengths is not None and not strengths:
        problems.append("`strengths` is empty; give numbers, e.g. --strengths 0,0.5,1")
    if any(axis.name == "strength" for axis in asked.axes) and not adapters:
        problems.append("`strengths` needs an adapter to act on; give one with --adapter FILE")
    swept_over = [value for axis in asked.axes if axis.name == "strength" for value in axis.values]
    values = [*swept_over, *(value for strength in adapters for value in _values(strength))]
    problems += [f"strength `{value}`: not a finite number" for value in values if not math.isfinite(value)]
    for name in dict.fromkeys([asked.sampler, *(line.sampler for line in asked.lines if line.sampler)]):
        try:
            find_sampler(name)
        except ConfigError as error:
            problems.append(str(error))
    if len(problems) > 1:
        raise ConfigError(
            f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )
    if problems:
        raise ConfigError(problems[0])


def _values(strength: Strength) -> list[float]:
    return [strength] if isinstance(strength, int | float) else list(strength.values())
