"""Which settings teach a style best at equal processor time: the evidence behind the defaults.

    python -m benchmarks.recipes --output build/recipes --part 1/2 &
    python -m benchmarks.recipes --output build/recipes --part 2/2
    python -m benchmarks.recipes --output build/recipes
    python -m benchmarks.recipes --output build/recipes --recipe "tail=training.average=tail"

A fraction of a factorial design: 16 recipes in which eight settings have two values each (resolution IV: no
effect is mixed up with another one, nor with that of a pair), each on every style, and the default before.
``--recipe`` tries others. Every run gets the processor time of 150 steps with attention's layers alone, the
default before: its steps follow from what a step of its recipe costs, measured by two short runs (on an
idle machine only: on a busy one these figures err by half).

A run is drawn at several strengths on subjects it never saw. Style is the score of ``benchmarks.style``
against the true images, subjects are named by its judge; the figure of merit is the highest style times share
of subjects named over the strengths, the latter as a share of what is named of the true images. Finished
runs are kept, so a second call adds what is missing; several parts can work at once, one core each.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdlora.files import write_json
from sdlora.judging.intervals import student_quantile

from .style.gallery import Drawing, Say, Studio
from .style.icon_sets import subject_of
from .style.judge import SubjectJudge
from .style.measure import Yardstick
from .style.styles import Style, find_style
from .trainers import measured

Array = npt.NDArray[np.float64]
STRENGTHS = (0.5, 0.75, 1.0)
USUAL_STEPS = 150
_SHORT, _LONG = 4, 24


@dataclass(frozen=True)
class Factor:
    """A setting with two values: what is given for the low one, and for the high one."""

    name: str
    low: tuple[str, ...]
    high: tuple[str, ...]


BEFORE = ("adapter.targets=attention",)
"""The default that is to be replaced."""

FACTORS = (
    Factor("all layers, not linear", ("adapter.targets=linear",), ("adapter.targets=all",)),
    Factor("twice the rate", (), ("optimizer.learning_rate=0.004",)),
    Factor("LoRA+ 4", (), ("optimizer.lora_plus_ratio=4",)),
    Factor("noise offset 0.05", (), ("training.noise_offset=0.05",)),
    Factor("batch 4, not 8", (), ("training.batch_size=4",)),
    Factor("rank 32, not 16", (), ("adapter.rank=32", "adapter.alpha=32")),
    Factor("no min-SNR", (), ("training.min_snr_gamma=0",)),
    Factor("caption dropout 0.2, not 0.05", (), ("data.caption_dropout=0.2",)),
)
_GENERATORS = ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3))
"""The last four of eight factors follow from the first four: 2^(8-4), resolution IV."""


def design() -> dict[str, tuple[str, ...]]:
    """Return the 16 recipes by name; a name is a letter a factor, ``+`` high and ``-`` low."""
    recipes = {}
    for base in itertools.product((-1, 1), repeat=4):
        levels = [*base, *(int(np.prod([base[n] for n in which])) for which in _GENERATORS)]
        name = "".join("+" if level > 0 else "-" for level in levels)
        parts = [f.high if level > 0 else f.low for f, level in zip(FACTORS, levels, strict=True)]
        recipes[name] = tuple(itertools.chain.from_iterable(parts))
    return recipes


@dataclass(frozen=True)
class Job:
    """One training: a recipe on a style with a seed."""

    recipe: str
    settings: tuple[str, ...]
    style: str
    seed: int


class Bench:
    """Trains, draws and measures on the mini base, one core each.

    Args:
        work: everything is kept below it.
        subjects: held-out subjects that are drawn.
        say: called with the progress.
    """

    def __init__(self, work: Path, subjects: int, say: Say) -> None:
        self.work, self._count, self._say = work, subjects, say
        self._judge = SubjectJudge(work / "judge", work / "icons")
        self._studio = Studio("mini", Drawing(), work / "images", lambda text: None)
        self._yardsticks: dict[str, tuple[Yardstick, Style, Any]] = {}

    def result(self, job: Job) -> dict[str, Any]:
        """Return what a job gives, from its file if there is one."""
        place = self.work / "runs" / job.style / f"{_slug(job.recipe)}-{_digest(job)}"
        if (place / "result.json").is_file():
            known: dict[str, Any] = json.loads((place / "result.json").read_text(encoding="utf-8"))
            return known
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        steps = self.steps(job.settings)
        style = find_style(job.style, None, self.work, self.work / "icons")
        _, cpu, _ = self._trained(job, style, steps, place)
        known = {"steps": steps, "cpu_s": cpu, **self.figures(job.style, place / "run" / "style.safetensors")}
        write_json(place / "result.json", known)
        return known

    def figures(self, style_name: str, adapter: Path) -> dict[str, Any]:
        """Return style, share of subjects named and draws of the merit, by strength, of an adapter file."""
        yardstick, _, items = self._yardstick(style_name)
        drawn = self._studio.draw(style_name, adapter, STRENGTHS, items)
        true = self._named_true[style_name]
        rows = {}
        for strength, images in drawn.items():
            measures = yardstick.measure(images)
            rows[f"{strength:g}"] = {
                "style": measures.style.value,
                "named": float(np.nanmean(measures.per_subject["named"])),
                "closer": float(np.nanmean(measures.per_subject["closer"])),
                "copied": float(np.nanmean(measures.per_subject["copied"])),
                "style_draws": np.round(measures.draws["style"], 4).tolist(),
                "named_draws": np.round(measures.draws["named"], 4).tolist(),
            }
        return {"named_true": true, "strengths": rows}

    def steps(self, settings: Sequence[str]) -> int:
        """Return how many steps fill the processor time of :data:`USUAL_STEPS` steps of the old default."""
        usual, this = self._step_seconds(BEFORE), self._step_seconds(settings)
        return max(20, round(USUAL_STEPS * usual / this))

    @property
    def _named_true(self) -> Mapping[str, float]:
        return {
            name: float(np.nanmean(yardstick.measure(yardstick.true).per_subject["named"]))
            for name, (yardstick, _, _) in self._yardsticks.items()
        }

    def _yardstick(self, name: str) -> tuple[Yardstick, Style, Any]:
        from sdlora.data.reading.folder import load_pixels
        from sdlora.judging.score import through_autoencoder

        if name not in self._yardsticks:
            style = find_style(name, None, self.work, self.work / "icons")
            items = style.subjects(self._count)
            base = self._studio.draw(f"{name} base", None, [0.0], items)[0.0]
            true = through_autoencoder(self._studio.model, [load_pixels(item) for item in items])
            training = [load_pixels(item) for item in style.training_items()]
            subjects = [subject_of(item.path.stem) for item in items]
            yardstick = Yardstick(
                subjects,
                base,
                true,
                through_autoencoder(self._studio.model, training),
                ranks=self._judge.ranks,
            )
            self._yardsticks[name] = yardstick, style, items
        return self._yardsticks[name]

    def _step_seconds(self, settings: Sequence[str]) -> float:
        """Return the processor seconds of a step, from two short runs; the smaller of two measurements."""
        costly = sorted(text for text in settings if text.split("=")[0] in _COSTLY)
        file = self.work / "costs" / f"{hashlib.sha256(json.dumps(costly).encode()).hexdigest()[:10]}.json"
        if file.is_file():
            return float(json.loads(file.read_text(encoding="utf-8"))["step_s"])
        style = find_style("ink", None, self.work, self.work / "icons")
        times = []
        for _ in range(2):
            seconds = {}
            for steps in (_SHORT, _LONG):
                place = self.work / "costs" / f"{file.stem}-{steps}-{os.getpid()}"
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                seconds[steps] = self._trained(Job("cost", tuple(costly), "ink", 0), style, steps, place)[1]
                shutil.rmtree(place, ignore_errors=True)
            times.append((seconds[_LONG] - seconds[_SHORT]) / (_LONG - _SHORT))
        self._say(f"a step of {' '.join(costly) or 'the usual'}: {min(times):.3f} s ({max(times):.3f})")
        write_json(file, {"settings": costly, "step_s": min(times), "other": max(times)})
        return min(times)

    def _trained(self, job: Job, style: Style, steps: int, place: Path) -> tuple[float, float, int]:
        command = [sys.executable, "-m", "sdlora", "train", str(style.training.resolve())]
        command += ["--base", "mini", "--name", "style", "--output", str(place / "run")]
        given = [f"training.seed={job.seed}", "sample.prompts=[]", "judge.every=0", f"training.steps={steps}"]
        given += [f"training.validate_every={steps}", f"training.checkpoint_every={steps}", *job.settings]
        given.append(f"data.cache_folder={json.dumps(str(self.work / 'cache' / style.name))}")
        if style.trigger_word is not None:
            given.append(f"data.trigger_word={json.dumps(style.trigger_word)}")
        return measured(job.recipe, [*command, *given], place, place / "run" / "style.safetensors", 1)


_COSTLY = {
    *("adapter.targets", "adapter.kind", "adapter.rank", "adapter.alpha", "adapter.text_encoder"),
    *("training.batch_size", "data.prior_preservation", "training.average", "adapter.init", "optimizer.name"),
}
"""Settings that change what a step costs."""


def merit(result: Mapping[str, Any]) -> tuple[float, Array, float]:
    """Return the highest style times share of subjects named, its draws, and the strength it is at."""
    best: tuple[float, Array, float] = (-1.0, np.zeros(0), 0.0)
    for strength, row in result["strengths"].items():
        value = _product(np.array(row["style"]), np.array(row["named"]), result["named_true"])
        draws = _product(np.array(row["style_draws"]), np.array(row["named_draws"]), result["named_true"])
        if float(value) > best[0]:
            best = float(value), draws, float(strength)
    return best


def _product(style: Array, named: Array, true: float) -> Array:
    product: Array = np.clip(style, 0, 1) * np.clip(named / max(true, 0.05), 0, 1)
    return product


def effects(results: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Return factor -> (what its high value adds to the merit, half the width of the 90 % interval).

    By least squares over all runs of the design, with a mean of its own for each style; the interval is from
    what is left over, so it covers seeds, subjects and interactions.
    """
    keys = [key for key in results if set(key[0]) <= {"+", "-"}]
    groups = sorted({(style, seed) for _, style, seed in keys})
    levels = np.array([[1.0 if letter == "+" else -1.0 for letter in key[0]] for key in keys])
    means = np.array([[float((key[1], key[2]) == group) for group in groups] for key in keys])
    table = np.hstack([levels / 2, means])
    values = np.array([merit(results[key])[0] for key in keys])
    fitted, *_ = np.linalg.lstsq(table, values, rcond=None)
    left = values - table @ fitted
    freedom = len(keys) - table.shape[1]
    spread = np.sqrt(left @ left / freedom * np.linalg.inv(table.T @ table).diagonal())
    factor = student_quantile(freedom)
    return [(f.name, float(fitted[n]), float(factor * spread[n])) for n, f in enumerate(FACTORS)]


def _slug(name: str) -> str:
    return "".join({"+": "p", "-": "m"}.get(c, c if c.isalnum() else "-") for c in name.lower())


def _digest(job: Job) -> str:
    return hashlib.sha256(json.dumps([job.settings, job.style, job.seed]).encode()).hexdigest()[:10]


def jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs of a plan, those of one style together."""
    recipes: Mapping[str, tuple[str, ...]] = {"before": BEFORE, **design()}
    if options.recipe:
        recipes = {}
        for text in options.recipe:
            name, _, settings = text.partition("=")
            recipes[name] = tuple(settings.split())
    return [
        Job(recipe, settings, style, seed)
        for seed in options.seeds
        for style in options.styles
        for recipe, settings in recipes.items()
    ]


def main() -> None:
    """Run a part of the plan, or print the table of all that is there."""
    options = _parser().parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    bench = Bench(options.output.resolve(), options.subjects, say)
    part, parts = (int(text) for text in options.part.split("/"))
    results = {}
    for number, job in enumerate(jobs(options)):
        if number % parts != part - 1:
            continue
        results[job.recipe, job.style, job.seed] = result = bench.result(job)
        value, _, strength = merit(result)
        at = result["strengths"][f"{strength:g}"]
        named = f"named {at['named']:.0%} of {result['named_true']:.0%}"
        cost = f"{result['steps']} steps, {result['cpu_s']:.0f} s"
        say(
            f"{job.style:9} {job.recipe:24} seed {job.seed}: {value:.3f} at {strength:g} "
            f"(style {at['style']:.2f}, {named}; {cost})"
        )
    if parts == 1 and not options.recipe:
        for name, value, half in effects(results):
            print(f"| {name} | {value:+.3f} ({value - half:+.3f} to {value + half:+.3f}) |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="everything is kept in it")
    parser.add_argument("--styles", nargs="+", default=["openmoji", "rose", "hatching"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--subjects", type=int, default=30)
    parser.add_argument("--part", default="1/1", help="e.g. 2/3: the second of three parts that run at once")
    parser.add_argument(
        "--recipe", action="append", help='other recipes than the design: NAME="key=value key=value"'
    )
    return parser


if __name__ == "__main__":
    main()
