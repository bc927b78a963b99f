"""The day with a card, rehearsed: jobs in processes of their own, bounds, failures, and going on."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import wait_for

from tools.gpu_day.command import main
from tools.gpu_day.jobs import ROOT, Job, Setting, all_jobs
from tools.gpu_day.paths import KINDS, TRAINING
from tools.gpu_day.report import as_markdown
from tools.gpu_day.runner import Day


@pytest.fixture
def day(tmp_path: Path) -> Callable[..., Day]:
    def make(seconds: float = 600.0) -> Day:
        (tmp_path / "report").mkdir(exist_ok=True)
        fresh = Day(tmp_path / "report", tmp_path / "work", time.monotonic() + seconds, least=1.0)
        fresh.resume()
        return fresh

    return make


def job(name: str, code: str, **more: Any) -> Job:
    return Job(name, ("-c", code, "{answer}"), **{"seconds": 0.0, "limit": 60.0, **more})


def gone(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def report_of(tmp_path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    return report


def test_a_failure_a_job_that_hangs_and_one_that_is_skipped_stop_nothing(
    day: Callable[..., Day], tmp_path: Path
) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
    child += "'import time; time.sleep(600)']);"
    hangs = f"{child} print('CHILD', p.pid, flush=True); time.sleep(600)"
    jobs = [
        job("bad", "print('first'); raise SystemExit('it broke')"),
        job("faulty", "import sys; open(sys.argv[1], 'w').write('{\"faults\": [\"a, b\"]}'); sys.exit(1)"),
        job("hangs", hangs, limit=3.0),
        job("lacks", "raise SystemExit('sdlora: no such package: run pip install that')"),
        Job("not here", (), 0, 0, skip="one card"),
        job("good", "import sys; open(sys.argv[1], 'w').write('{\"figure\": 7}')"),
    ]
    assert day().run(jobs) == []
    states = {name: result["state"] for name, result in report_of(tmp_path)["jobs"].items()}
    wanted = ("failed", "failed", "too long", "skipped", "skipped", "ok")
    assert states == dict(zip((each.name for each in jobs), wanted, strict=True))
    kept = report_of(tmp_path)["jobs"]
    assert kept["bad"]["why"] == "it broke" and kept["bad"]["tail"] == ["first", "it broke"]
    assert kept["faulty"]["why"] == "a, b"
    assert kept["good"]["answer"] == {"figure": 7}
    with zipfile.ZipFile(tmp_path / "report" / "logs.zip") as logs:
        assert sorted(logs.namelist()) == sorted(f"{each.name}.log" for each in jobs if not each.skip)
        orphan = int(logs.read("hangs.log").split()[1])
    wait_for(lambda: gone(orphan))
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "3 failed" not in text and "2 failed" in text and "### bad: it broke" in text
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "logs.zip"}


@pytest.mark.slow  # ``.ci/run`` runs it
def test_a_second_call_goes_on_with_what_did_not_fit(day: Callable[..., Day], tmp_path: Path) -> None:
    mark = "open('{}', 'a').write('x')"
    first, second = tmp_path / "first", tmp_path / "second"
    product = tmp_path / "work" / "base"
    jobs = [
        job("base", f"import pathlib; pathlib.Path({str(product)!r}).touch()", product=product),
        job("one", mark.format(first), needs=("base",)),
        job("cut", "import time; time.sleep(600)"),
        job("long", mark.format(second), seconds=1000.0),
    ]
    assert day(6.0).run(jobs) == ["cut", "long"]
    assert list(report_of(tmp_path)["jobs"]) == ["base", "one"]
    product.unlink()  # another machine
    jobs[2] = job("cut", "pass", needs=("base",))
    assert day(3000.0).run(jobs) == []
    assert product.exists()
    assert [place.read_text() for place in (first, second)] == ["x", "x"]
    assert list(report_of(tmp_path)["jobs"]) == ["base", "one", "cut", "long"]


def test_a_rehearsals_report_is_not_gone_on_with_on_a_card(day: Callable[..., Day], tmp_path: Path) -> None:
    first = day()
    first.facts["on"] = "a rehearsal on cpu"
    first.run([job("one", "pass")])
    again = Day(tmp_path / "report", tmp_path / "work", time.monotonic() + 60, facts={"on": "a card"})
    with pytest.raises(ValueError, match="is of a rehearsal on cpu; choose another --output"):
        again.resume()


def test_the_jobs_of_the_day_take_every_path_in_the_order_of_their_value(tmp_path: Path) -> None:
    jobs = all_jobs(Setting(tmp_path))
    names = [each.name for each in jobs if each.product is None]
    assert names[:3] == ["doctor", "gpu-tests", "exact-fp32"]
    assert len(names) == len(set(names)) > 60
    assert {f"train-{family}-{path}" for family in ("sd1", "sdxl") for path in TRAINING} <= set(names)
    assert names.index("train-sdxl-bf16") < names.index("benchmark-sd1") < names.index("train-sdxl-dora")
    known = {each.name for each in jobs}
    assert all(set(each.needs) <= known for each in jobs)
    assert all(each.seconds < each.limit <= 580 for each in jobs if not each.skip)
    assert len(KINDS) > 12
    rehearsed = {each.name: each.limit for each in all_jobs(Setting(tmp_path, "cpu"))}
    assert rehearsed["exact-fp32"] == 4 * next(each.limit for each in jobs if each.name == "exact-fp32")


@pytest.mark.parametrize("module", ["bases", "draw", "measure", "train", "watch"])
def test_what_a_job_imports_when_it_begins_is_there(module: str) -> None:
    importlib.import_module(f"tools.gpu_day.{module}")


def test_the_functions_whose_memory_is_watched_are_there() -> None:
    from tools.gpu_day.watch import PHASES, function_at

    assert len(PHASES) == 7 and all(callable(function_at(place)) for place in PHASES)


def test_without_a_card_the_day_says_so_and_names_the_rehearsal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    assert main(["--output", str(tmp_path / "report"), "--work", str(tmp_path / "work")]) == 2
    assert "--rehearse cpu" in capsys.readouterr().err
    assert main(["--only", "nothing", "--rehearse", "cpu"]) == 2


def rehearse(kind: str, tmp_path: Path, *words: str, minutes: float = 20.0) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.gpu_day", "--rehearse", kind, "--minutes", str(minutes)]
    place = ["--output", str(tmp_path / "report"), "--work", str(tmp_path / "work")]
    done = subprocess.run([*command, *place, *words], cwd=ROOT, capture_output=True, text=True)
    report = report_of(tmp_path)
    bad = {
        name: (result["why"], result["tail"]) for name, result in report["jobs"].items() if "tail" in result
    }
    assert done.returncode == 0, (bad, done.stdout, done.stderr)
    assert as_markdown(report) == (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    return report


@pytest.mark.slow  # ``.ci/run`` runs it
def test_one_job_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    """Through all of it: the job's process, its answer, the report."""
    report = rehearse("cpu", tmp_path, "--only", "draw-sd1-plain")
    answer = report["jobs"]["draw-sd1-plain"]["answer"]
    assert answer["seconds_per_image"] > 0 and answer["contrast"][0] > 1 and answer["faults"] == []
    assert "| sd1-plain | bf16 | 64 |" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["cpu", "pretend"])
def test_the_whole_day_is_rehearsed(kind: str, tmp_path: Path) -> None:
    if kind == "pretend":
        from tools.pretend_cuda.build import Unavailable, built

        try:
            built()
        except Unavailable as error:
            pytest.skip(str(error))
    report = rehearse(kind, tmp_path, minutes=55.0)
    states = {name: result["state"] for name, result in report["jobs"].items()}
    assert len(states) > 40 and set(states.values()) <= {"ok", "skipped"}
    assert sum(state == "ok" for state in states.values()) > 35
    if kind == "pretend":
        shares = report["jobs"]["train-sd1-bf16"]["answer"]["plan_by_allocated"]
        assert set(shares) == {"encoding", "placing", "step", "validation", "previews"}
