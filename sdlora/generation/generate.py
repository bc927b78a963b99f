"""From prompts, and adapters with their strengths, to images in a folder.

The denoising loop is :mod:`sdlora.generation.render`; :class:`ImageGenerator` keeps a base loaded while
adapters and their strengths change; :func:`generate` is the whole of ``sdlora generate``: it names and
writes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.strength import Strength
from ..config.schema import AttentionName, ModelConfig, Precision, SampleConfig
from ..diffusion.samplers import find_sampler
from ..errors import ConfigError, OutputError
from ..families.base import DiffusionModel
from ..files import refuse_bad_names, replacing, write_problem
from .adapter_folders import find_adapter
from .grids import grid
from .image_generator import ImageGenerator
from .lora_tags import refuse_tags, take_tags
from .png_info import parameters_text, save_png
from .render import GeneratedImage, GenerateRequest, Progress, check_request, render, usual_guidance

__all__ = [
    "GenerateRequest",
    "GenerateResult",
    "GeneratedImage",
    "ImageGenerator",
    "generate",
    "render",
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
    prompts: Sequence[str],
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
    merge: bool = False,
    count: int = 1,
    device: str | None = None,
    precision: Precision | None = None,
    attention: AttentionName = "auto",
    offload: bool = False,
    progress: Progress | None = None,
) -> GenerateResult:
    """Make images and write them as ``00001-SEED.png``, numbered on from those in the folder.

    Every prompt gets the same ``count`` seeds, from ``seed`` upwards. What is left open follows the base or
    :class:`.SampleConfig`; how it is computed, see :meth:`ImageGenerator.load`.

    Args:
        base: ``mini``, a diffusers folder, a ``.safetensors`` file or a hub id, or the settings of one.
        adapters: (file, strength) of each adapter; see :func:`sdlora.adapters.strength.parse_adapter`.
        prompts: what to show; ``<lora:NAME:0.8>`` in one adds an adapter for it alone.
        adapter_folders: where these are (:func:`.find_adapter`), before the folders of ``adapters`` and runs.
        output: folder for the images; created if it is missing, and nothing in it is overwritten.
        strengths: each prompt and seed at each of these, and a grid of all; see :func:`swept`.
        merge: fold the adapters into the base's weights first.
        count: images a prompt (and strength).
        progress: called after each denoising step.

    Raises:
        ConfigError: for settings that contradict each other or are impossible.
        ModelError, AdapterFileError, OutputError: for what cannot be loaded, does not fit, cannot be written.
    """
    started, folder, sampler = time.perf_counter(), Path(output), sampler or SampleConfig().sampler
    refuse_tags(negative_prompt)
    asked = [take_tags(prompt) for prompt in prompts]
    _check_call([*adapters, *_tagged(asked)], prompts, sampler, strengths, count)
    named = _files_of({name for name, _ in _tagged(asked)}, adapters, adapter_folders)
    generator = ImageGenerator.load(
        base, device=device, precision=precision, attention=attention, offload=offload
    )
    given = {generator.add_adapter(Path(file)): strength for file, strength in adapters}
    _add_named(generator, named)
    plain = _plain_request(generator.model, negative_prompt, (height, width), steps, guidance, sampler, seed)
    requests = _requests(plain, [(prompt, given | tags) for prompt, tags in asked], count, strengths)
    _check_requests(generator.model, requests)
    make_folder(folder)  # after all checks, before the long work
    images = generator.generate(requests, merge=merge, progress=progress)
    files = _write_images(folder, images, generator)
    sheet = None if strengths is None else _write_sweep(folder, images, strengths)
    return GenerateResult(tuple(files), sheet, time.perf_counter() - started)


def _add_named(generator: ImageGenerator, files: Mapping[str, Path]) -> None:
    for name, file in files.items():
        generator.add_adapter(file, name)


def _check_requests(model: DiffusionModel, requests: Sequence[GenerateRequest]) -> None:
    for request in requests:
        check_request(model, request)


def _tagged(asked: Sequence[tuple[str, Mapping[str, Strength]]]) -> list[tuple[str, Strength]]:
    return [pair for _, tags in asked for pair in tags.items()]


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


def _files_of(
    names: Iterable[str], adapters: Sequence[tuple[str | Path, Strength]], folders: Sequence[str | Path]
) -> dict[str, Path]:
    """Return the file of each adapter that prompts name and that is not among those given."""
    given = [Path(file) for file, _ in adapters]
    known = {file.name if file.is_dir() else file.stem for file in given}
    places = [*(Path(folder).expanduser() for folder in folders), *(file.parent for file in given)]
    usual = Path("runs")  # where `sdlora train` puts them
    places += [usual] if usual.is_dir() or not places else []
    return {
        name: find_adapter(name, list(dict.fromkeys(places))) for name in sorted(names) if name not in known
    }


def _requests(
    plain: GenerateRequest,
    prompts: Sequence[tuple[str, Mapping[str, Strength]]],
    count: int,
    strengths: Sequence[float] | None,
) -> list[GenerateRequest]:
    """Return a request for every prompt with its adapters, seed and strength of the sweep, in this order."""
    return [
        dataclasses.replace(plain, prompt=prompt, seed=plain.seed + i, strengths=column)
        for prompt, given in prompts
        for i in range(count)
        for column in ([given] if strengths is None else [swept(given, value) for value in strengths])
    ]


def _check_call(
    adapters: Sequence[tuple[str | Path, Strength]],
    prompts: Sequence[str],
    sampler: str,
    strengths: Sequence[float] | None,
    count: int,
) -> None:
    """Refuse impossible requests before anything is loaded."""
    problems: list[str] = []
    if not prompts:
        problems.append("no prompt given; say what to show with --prompt")
    if count < 1:
        problems.append(f"`count={count}`: make at least 1 image a prompt")
    if strengths is not None and not strengths:
        problems.append("`strengths` is empty; give numbers, e.g. --strengths 0,0.5,1")
    if strengths is not None and not adapters:
        problems.append("`strengths` needs an adapter to act on; give one with --adapter FILE")
    values = [*(strengths or ()), *(v for _, s in adapters for v in _values(s))]
    problems += [f"strength `{value}`: not a finite number" for value in values if not math.isfinite(value)]
    try:
        find_sampler(sampler)
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


def swept(given: Mapping[str, Strength], value: float) -> dict[str, Strength]:
    """Return the strengths of one column of a sweep.

    A value replaces the strength of a single adapter; the strengths of several adapters, or the separate
    U-Net and text-encoder strengths of one, are multiplied by it.
    """
    if len(given) == 1 and all(isinstance(strength, int | float) for strength in given.values()):
        return dict.fromkeys(given, value)
    return {
        name: value * strength
        if isinstance(strength, int | float)
        else {component: value * share for component, share in strength.items()}
        for name, strength in given.items()
    }


def make_folder(folder: Path) -> None:
    """Create the folder for images if it is missing.

    Raises:
        OutputError: when it is a file, or cannot be created.
    """
    if folder.is_file():
        raise OutputError(f"{folder}: is a file, but images need a folder; choose another --output")
    refuse_bad_names(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {write_problem(error)}") from error


def write_numbered(folder: Path, generated: GeneratedImage, text: str) -> Path:
    """Write an image with its settings as ``00001-SEED.png``, with the next free number; return the file."""
    file = _reserve(folder, r"(\d{5,})-\d+\.png", lambda number: f"{number:05d}-{generated.request.seed}.png")
    with _giving_back(file):
        save_png(generated.image, file, text)
    return file


def _write_images(folder: Path, images: Sequence[GeneratedImage], generator: ImageGenerator) -> list[Path]:
    hashes = {name: generator.hash_of(name) for name in generator.adapters}
    texts = [parameters_text(image.request, generator.model.base, hashes) for image in images]
    return [write_numbered(folder, image, text) for image, text in zip(images, texts, strict=True)]


def _write_sweep(
    folder: Path,
    generated: Sequence[GeneratedImage],
    strengths: Sequence[float],
) -> Path:
    rows = generated[:: len(strengths)]
    several = len({row.request.seed for row in rows}) > 1
    labels = [row.request.prompt + (f" (seed {row.request.seed})" if several else "") for row in rows]
    heads = [f"{value:g}" for value in strengths]
    acting = dict.fromkeys(name for row in rows for name in row.request.strengths)
    sheet = grid(
        [image.image for image in generated], len(heads), labels, heads, f"strength of {' and '.join(acting)}"
    )
    file = _reserve(folder, r"grid-(\d{4,})\.png", lambda number: f"grid-{number:04d}.png")
    with _giving_back(file), replacing(file) as temporary:
        sheet.save(temporary, format="PNG")
    return file


def _reserve(folder: Path, pattern: str, name: Callable[[int], str]) -> Path:
    """Create an empty file with the number after the highest one; no other process can get the same."""
    try:
        numbers = [int(match[1]) for file in folder.iterdir() if (match := re.fullmatch(pattern, file.name))]
        for number in itertools.count(max(numbers, default=0) + 1):
            file = folder / name(number)
            with contextlib.suppress(FileExistsError):
                file.open("xb").close()
                return file
    except OSError as error:
        raise OutputError(f"{folder}: {write_problem(error)}") from error
    raise AssertionError("numbers do not end")


@contextlib.contextmanager
def _giving_back(file: Path) -> Iterator[None]:
    """Remove a reserved file if it could not be filled."""
    try:
        yield
    except BaseException:
        file.unlink(missing_ok=True)
        raise
