"""Drawing with a base that stays loaded: one image, a strip of strengths, or a grid of checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sdlora.adapters.strength import Strength, by_role
from sdlora.config.prompt_lines import PromptLine
from sdlora.generation.axes import read_axis, varied
from sdlora.generation.generate import (
    GeneratedImage,
    GenerateRequest,
    ImageGenerator,
    make_folder,
    of_line,
    swept,
    write_numbered,
)
from sdlora.generation.merging import drawn_in_turn
from sdlora.generation.png_info import parameters_text
from sdlora.generation.render import usual_guidance
from sdlora.run_folder import checkpoint_of

from ..worker import Emit


@dataclass
class _Studio:
    """The loaded base and the adapters in it, by file and time of its last change."""

    base: str
    generator: ImageGenerator
    adapters: dict[tuple[Path, int], str]
    hashes: dict[str, str]

    def adapter(self, file: Path) -> str:
        """Return the name of an adapter, which is loaded if it is not yet."""
        key = file, file.stat().st_mtime_ns if file.exists() else 0
        if key not in self.adapters:
            for old in [loaded for loaded in self.adapters if loaded[0] == file]:  # changed since
                self.generator.remove_adapter(self.adapters.pop(old))
            name = self.generator.add_adapter(file, self._free(adapter_name(file)))
            self.adapters[key] = name
            self.hashes[name] = self.generator.hash_of(name)
        return self.adapters[key]

    def keep_only(self, names: Sequence[str]) -> None:
        """Unload unused adapters when there are many, because they take memory, too."""
        if len(self.adapters) > 12:
            for key, name in list(self.adapters.items()):
                if name not in names:
                    self.generator.remove_adapter(self.adapters.pop(key))

    def _free(self, wanted: str) -> str:
        taken, name, number = set(self.adapters.values()), wanted, 1
        while name in taken:
            number += 1
            name = f"{wanted}-{number}"
        return name


_studio: list[_Studio] = []


def adapter_name(file: Path) -> str:
    """Return an adapter's name; a checkpoint's is its run and step."""
    belongs = checkpoint_of(file)
    if belongs is not None:
        run, checkpoint = belongs
        return f"{run.path.name}-{checkpoint.path.name}"
    return file.name if file.is_dir() else file.stem


def draw(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Draw ``rows`` x ``strengths`` images and write each one with its settings.

    Instead of strengths, ``axes`` are one or two texts as :func:`sdlora.generation.axes.read_axis` takes them
    (the first goes across), and ``lines`` prompts with their own settings and adapters, a row each.

    Args:
        arguments: ``base``, ``prompt``, ``negative``, ``seed``, ``width``, ``height``, ``steps``,
            ``guidance``, ``sampler``, ``folder``; ``rows``: lists of adapters ``{file, denoiser, text}``;
            ``strengths``: of the columns, see :func:`sdlora.generation.generate.swept`, or None for the
            adapters' own.
        emit: takes the progress, and each image as a part.
    """
    begun = time.perf_counter()
    studio = _loaded(str(arguments["base"]), emit)
    make_folder(Path(arguments["folder"]))
    cells = list(_cells(studio, arguments))
    files, used = [], set()
    requests = [request for _, _, request in cells]

    def progress(done: int, total: int) -> None:
        emit.progress(done, total, "drawing")

    # closed at once when the drawing is cancelled: adapters may be merged meanwhile
    with closing(drawn_in_turn(studio.generator, requests, progress)) as drawn:
        for (row, column, request), generated in zip(cells, drawn, strict=True):
            used |= set(request.strengths)
            files.append(_write(studio, generated, Path(arguments["folder"])))
            emit.part({"row": row, "column": column, **files[-1]})
    studio.keep_only(tuple(used))
    return {"images": files, "seconds": time.perf_counter() - begun}


def _loaded(base: str, emit: Emit) -> _Studio:
    if not _studio or _studio[0].base != base:
        emit.progress(0, 1, f"loading {Path(base).name}")
        _studio.clear()  # before loading, so that two bases are never in memory together
        _studio.append(_Studio(base, ImageGenerator.load(base), {}, {}))
    return _studio[0]


def _cells(studio: _Studio, arguments: Mapping[str, Any]) -> Iterator[tuple[int, int, GenerateRequest]]:
    plain = _plain(studio.generator, arguments)
    if arguments.get("lines"):
        for row, line in enumerate(arguments["lines"]):
            wanted = PromptLine(**{field.name: line.get(field.name) for field in fields(PromptLine)})
            yield row, 0, of_line(plain, wanted, _given(studio, line["adapters"]))
        return
    if arguments.get("axes"):
        across, *more = (read_axis(str(text)) for text in arguments["axes"])
        first = replace(plain, strengths=_given(studio, (arguments.get("rows") or [[]])[0]))
        for row in range(len(more[0].values) if more else 1):
            lower = varied(first, more[0], row, {}) if more else first
            for column in range(len(across.values)):
                yield row, column, varied(lower, across, column, {})
        return
    columns = arguments.get("strengths") or [None]
    for row, adapters in enumerate(arguments.get("rows") or [[]]):
        given = _given(studio, adapters)
        for column, factor in enumerate(columns):
            strengths = given if factor is None else swept(given, float(factor))
            yield row, column, replace(plain, strengths=strengths)


def _given(studio: _Studio, adapters: Sequence[Mapping[str, Any]]) -> dict[str, Strength]:
    return {studio.adapter(Path(cell["file"])): _strength(cell) for cell in adapters}


def _plain(generator: ImageGenerator, arguments: Mapping[str, Any]) -> GenerateRequest:
    model = generator.model
    guidance = arguments.get("guidance")
    if guidance is None:
        guidance = usual_guidance(model)
    return GenerateRequest(
        str(arguments["prompt"]),
        str(arguments.get("negative") or ""),
        height=int(arguments.get("height") or model.facts.native_resolution),
        width=int(arguments.get("width") or model.facts.native_resolution),
        steps=int(arguments["steps"]),
        guidance=float(guidance),
        sampler=str(arguments["sampler"]),
        seed=int(arguments["seed"]),
    )


def _strength(adapter: Mapping[str, Any]) -> Strength:
    denoiser, text = float(adapter["denoiser"]), adapter.get("text")
    if text is None or float(text) == denoiser:
        return denoiser
    return by_role(denoiser, float(text))


def _write(studio: _Studio, generated: GeneratedImage, folder: Path) -> dict[str, Any]:
    text = parameters_text(generated.request, base=studio.generator.model.base, hashes=studio.hashes)
    file = write_numbered(folder, generated, text)
    return {"file": str(file), "text": text}
