"""What is done on that day, in the order of its value: a table of commands, each for a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from . import paths

ROOT = Path(__file__).parents[2]
Rehearsal = Literal["cpu", "pretend"]
# limits are those of a large card; a rehearsal says nothing of time, least of all on a busy machine
_REHEARSED_PATIENCE = 4


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: in the report; it may be asked for by name.
        command: words after the interpreter; ``{answer}`` is the JSON file it may write.
        seconds: that it may take on a large card, so that it is not begun when less time is left.
        limit: seconds after which it is ended.
        needs: jobs that make what it reads, done before it, and again where their product is not there.
        product: what it makes for others.
        skip: why it is not done here.
        environment: variables of its own.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    limit: float
    needs: tuple[str, ...] = ()
    product: Path | None = None
    skip: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where the jobs run, and how large.

    Attributes:
        work: folder for bases, runs and logs.
        rehearsal: what stands in for the card; None on the day itself.
        libraries: of the pretended card.
        peer: diffusers' training script; None: the stand-in.
        kohya: checkout of sd-scripts.
    """

    work: Path
    rehearsal: Rehearsal | None = None
    libraries: Path | None = None
    peer: Path | None = None
    kohya: Path | None = None

    @property
    def device(self) -> str:
        """What jobs compute on."""
        return "cpu" if self.rehearsal == "cpu" else "cuda"

    @property
    def steps(self) -> int:
        """Optimizer steps of a measured run."""
        return 3 if self.rehearsal else 50

    def base(self, family: str) -> str:
        """Return what is loaded for a family: the true size, or a narrow one."""
        if self.rehearsal is None:
            return str(self.work / f"{family}.safetensors")
        return "mini" if family == "sd1" else str(self.work / f"narrow-{family}")

    def side(self, family: str) -> int:
        """Return the resolution of a family's runs, px."""
        if self.rehearsal:
            return 64
        return {"sd1": 512, "sdxl": 1024}[family]


def all_jobs(setting: Setting) -> list[Job]:
    """Return all jobs, the most valuable ones first."""
    make = _Maker(setting)
    first = [
        make.measure("doctor", "doctor", seconds=20, limit=120),
        make.tests("gpu-tests", "tests/gpu/test_cuda.py", seconds=60, limit=400),
        *(make.measure(f"exact-{p}", "exact", p, seconds=45, limit=400) for p in ("fp32", "bf16", "fp16")),
        *(make.train(family, "bf16") for family in ("sd1", "sdxl")),
        *(make.profile(family) for family in ("sdxl", "sd1")),
        make.measure("images", "images", seconds=40, limit=300, steps=8),
        *(make.draw(family, path) for path in ("plain", "offload", "merged") for family in ("sdxl", "sd1")),
        make.of("resume", "sd1", "bf16", seconds=60),
        make.of("processes", "sd1", "bf16", seconds=60),
        *make.benchmarks(),
    ]
    ways = [path for path in paths.TRAINING if path != "bf16"]
    rest = [
        *(make.train("sdxl", path) for path in ways),
        *(make.train("sd1", path) for path in ways if not setting.rehearsal),  # narrow bases are alike
        *(make.draw(f, path) for path in paths.DRAWING for f in ("sdxl", "sd1")),
        make.growing_segments("sdxl"),
        make.tests("gpu-tests-true", "tests/gpu/test_true_sizes.py", seconds=180, limit=580),
    ]
    jobs = {job.name: job for job in (*make.bases(), *first, *rest)}
    patience = _REHEARSED_PATIENCE if setting.rehearsal else 1
    return [replace(job, limit=patience * job.limit) for job in jobs.values()]


@dataclass(frozen=True)
class _Maker:
    setting: Setting

    def measure(self, name: str, job: str, *words: str, seconds: float, limit: float, steps: int = 0) -> Job:
        """Return a job of :mod:`.measure` on the built-in base."""
        return Job(
            name, self._words(job, *words, *(["--steps", str(steps)] if steps else [])), seconds, limit
        )

    def of(self, job: str, family: str, path: str, *, seconds: float, limit: float = 300) -> Job:
        """Return a job of :mod:`.measure` on a family's base."""
        setting = self.setting
        place = ("--base", setting.base(family), "--side", str(setting.side(family)))
        words = self._words(job, path, *place, "--steps", str(setting.steps), of=family)
        needs = () if setting.base(family) == "mini" else (f"base-{family}",)
        slower = 1.6 if family == "sdxl" else 1.0
        return Job(f"{job}-{family}-{path}", words, seconds * slower, limit, needs)

    def train(self, family: str, path: str) -> Job:
        """Return fifty steps on a path."""
        if path == "xformers" and (self.setting.rehearsal or importlib.util.find_spec("xformers") is None):
            why = "it computes on cards only" if self.setting.rehearsal else "xformers is not installed"
            return Job(f"train-{family}-{path}", (), 0, 0, skip=why)
        return self.of("train", family, path, seconds=40)

    def profile(self, family: str) -> Job:
        """Return what a step launches, by torch's profiler."""
        if self.setting.rehearsal == "pretend":
            why = "a profiler sees nothing of the pretended card, whose launches tools.pretend_cuda counts"
            return Job(f"profile-{family}-bf16", (), 0, 0, skip=why)
        return self.of("profile", family, "bf16", seconds=45)

    def growing_segments(self, family: str) -> Job:
        """Return fifty steps with an allocator that grows its segments, to see what that spares."""
        job = self.of("train", family, "buckets", seconds=40)
        variable = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        return replace(job, name=f"{job.name}-growing", environment=variable)

    def draw(self, family: str, path: str) -> Job:
        """Return images drawn in one way."""
        return self.of("draw", family, path, seconds=30)

    def tests(self, name: str, file: str, *, seconds: float, limit: float) -> Job:
        """Return a file of tests; they skip where there is no card."""
        words = ("-m", "pytest", "-n", "0", "-s", "-rs", "-p", "no:cacheprovider", file)
        needs = () if self.setting.rehearsal or "true" not in file else ("base-sd1", "base-sdxl")
        return Job(name, words, seconds, limit, needs)

    def bases(self) -> list[Job]:
        """Return what makes the bases; they are made when something needs them."""
        jobs = []
        for family in ("sd1", "sdxl"):
            product = Path(self.setting.base(family))
            if str(product) != "mini":
                narrow = ["--narrow"] if self.setting.rehearsal else []
                words = self._words("base", family, "--base", str(product), *narrow)
                jobs.append(Job(f"base-{family}", words, 30, 300, product=product))
        if self.setting.rehearsal is None:
            folder = self.setting.work / "sd1"
            words = self._words("base", "sd1", "--base", str(folder), "--folder")
            jobs.append(Job("base-sd1-folder", words, 20, 300, ("base-sd1",), folder))
        return jobs

    def benchmarks(self) -> list[Job]:
        """Return the comparisons with other trainers: on the built-in base whole, on SD1.5 the speed."""
        setting = self.setting
        if setting.rehearsal == "pretend":
            skip = "the pretended card does not see other programs' processes"
            return [Job(f"benchmark-{name}", (), 0, 0, skip=skip) for name in ("mini", "sd1", "kohya-sd1")]
        peer = setting.peer or ROOT / "benchmarks" / "stand_ins" / "plain_trainer.py"
        common = ("benchmarks/train_speed.py", "--peer-script", str(peer), "--device", setting.device)
        common += ("--json", "{answer}", "--precision", "bf16")
        few = ("--rounds", "1", "--steps", "4", "--warm-up", "2", "--batch", "2", "--speed-only")
        mini = few if setting.rehearsal else ("--rounds", "1", "--steps", "60", "--batch", "8")
        jobs = [Job("benchmark-mini", (*common, *mini), 120, 500)]
        if setting.rehearsal is None:
            true = (
                "--base",
                str(setting.work / "sd1"),
                "--resolution",
                "512",
                "--batch",
                "4",
                "--speed-only",
            )
            true += ("--rounds", "1", "--steps", "60")
            jobs.append(Job("benchmark-sd1", (*common, *true), 200, 580, ("base-sd1-folder",)))
        jobs.append(self._kohya())
        return jobs

    def _kohya(self) -> Job:
        setting = self.setting
        if setting.kohya is None:
            return Job(
                "benchmark-kohya-sd1", (), 0, 0, skip="no checkout of kohya's sd-scripts: --kohya FOLDER"
            )
        words = ("benchmarks/kohya_speed.py", "--kohya", str(setting.kohya), "--base", setting.base("sd1"))
        words += ("--resolution", str(setting.side("sd1")), "--batch", "4", "--json", "{answer}")
        words += ("--device", setting.device, "--steps", "4" if setting.rehearsal else "60")
        needs = () if setting.base("sd1") == "mini" else ("base-sd1",)
        return Job("benchmark-kohya-sd1", words, 120, 400, needs)

    def _words(self, job: str, *words: str, of: str = "mini") -> tuple[str, ...]:
        setting = self.setting
        pretend = () if setting.libraries is None or job == "base" else ("--pretend", str(setting.libraries))
        where = ("--device", setting.device, "--work", str(setting.work / "runs" / of))
        return ("-m", "tools.gpu_day.measure", job, *words, *where, "--answer", "{answer}", *pretend)


def interpreter() -> str:
    """Return the Python that jobs run with: this one."""
    return sys.executable
