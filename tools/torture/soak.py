"""(g) A soak of the page: three tabs draw, watch a training and walk through a data set; is memory flat?

Needs chromium and chromedriver on the path and the ``test`` extra, as ``tools.ui_images`` does. Measured are
the resident memory of server and workers, and what the scripts of each tab hold after a collection.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from sdlora_ui.jobs import ENDED, JobQueue

from sdlora.config.toml import load_config
from tools.ui_images import Browser, serve

from .play import Tally
from .warm import ROOT

_WARM_UP = 0.25  # of the time: caches fill, the first image of each kind is drawn
_GROWTH = 1.10
_EVERY = 10.0  # seconds between two looks at the memory


@dataclass
class Memory:
    """What was measured: name -> (seconds, bytes)."""

    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def note(self, seconds: float, values: Mapping[str, float]) -> None:
        """Add one look."""
        for name, value in values.items():
            self.points.setdefault(name, []).append((seconds, value))

    def growth(self, name: str) -> tuple[float, float, float]:
        """Return the median of the first and the last quarter after the warm-up, and their ratio."""
        points = self.points[name]
        end = points[-1][0]
        settled = [value for seconds, value in points if seconds >= _WARM_UP * end]
        quarter = max(1, len(settled) // 4)
        first, last = statistics.median(settled[:quarter]), statistics.median(settled[-quarter:])
        return first, last, last / first


def soak(folder: Path, minutes: float, say: Callable[[str], None]) -> Tally:
    """Use the page for so long, and say whether the memory of each part stayed flat within 10 %."""
    home = folder / "soak"
    shutil.copytree(ROOT / "datasets" / "ink-icons", home / "training-images" / "icons")
    server, url = serve(home)
    browser = Browser(url)
    try:
        memory = _used(browser, server.pid, home, minutes, say)
    finally:
        browser.driver.quit()
        _end(server.pid, home)
    tally = Tally()
    for name in memory.points:
        first, last, ratio = memory.growth(name)
        say(f"g: {name}: {first / 2**20:.1f} MiB, then {last / 2**20:.1f} MiB ({ratio:.3f})")
        problems = (
            [f"{name} grew from {first / 2**20:.1f} to {last / 2**20:.1f} MiB"] if ratio > _GROWTH else []
        )
        tally.add(problems, f"--only g --minutes {minutes:g}", say, home)
    return tally


def _used(browser: Browser, server: int, home: Path, minutes: float, say: Callable[[str], None]) -> Memory:
    driver, memory = browser.driver, Memory()
    queue = JobQueue(home / "runs" / ".sdlora-ui" / "jobs", home)
    browser.open("", 2)
    browser.type("#steps input", "3")
    tabs = {"drawing": driver.current_window_handle}
    for name, page in (("training", 1), ("data set", 0)):
        driver.switch_to.new_window("tab")
        tabs[name] = driver.current_window_handle
        browser.open("", page)
    browser.click("#demo")
    begun, looked, rounds = time.monotonic(), 0.0, 0
    while (passed := time.monotonic() - begun) < 60 * minutes:
        _keep_training(queue, home, rounds)
        driver.switch_to.window(tabs["drawing"])
        _draw(browser, rounds)
        driver.switch_to.window(tabs["data set"])
        driver.execute_script("scrollTo(0, (arguments[0] % 5) * 700)", rounds)
        if rounds % 20 == 19:
            driver.switch_to.window(tabs["training"])
            browser.open("", 1)
        rounds += 1
        if passed - looked >= _EVERY:
            looked = passed
            memory.note(passed, _measured(driver, tabs, server))
    done = [job.status for job in queue.all()]
    say(f"g: {rounds} images drawn, {done.count('finished')} of {len(done)} trainings finished")
    return memory


def _draw(browser: Browser, number: int) -> None:
    """Draw an image and wait for it."""
    before = _drawn(browser)
    browser.click("#draw")
    browser.wait(lambda: _drawn(browser) not in (None, before), 120)


def _drawn(browser: Browser) -> str | None:
    with suppress(Exception):
        return str(browser.driver.execute_script("return document.querySelector('#drawn img')?.src"))
    return None


def _keep_training(queue: JobQueue, home: Path, number: int) -> None:
    """Have one training under way or waiting, and forget those that ended long ago."""
    jobs = queue.all()
    for job in [job for job in jobs if job.status in ENDED][:-3]:
        queue.delete(job.id, with_run=True)
    if any(job.status not in ENDED for job in jobs):
        return
    values: dict[str, Any] = {
        "data.folder": home / "training-images" / "icons",
        "output.name": f"soak{number}",
        "output.folder": home / "runs" / f"soak{number}",
        "training.steps": 20,
        "training.batch_size": 2,
        "sample.prompts": ("a cat",),
        "sample.every": 5,
        "sample.steps": 2,
    }
    queue.add(load_config(values=values))


def _measured(driver: Any, tabs: Mapping[str, str], server: int) -> dict[str, float]:
    """Return bytes by what holds them."""
    process = psutil.Process(server)
    values = {"server": float(process.memory_info().rss)}
    workers = 0.0
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            if "sdlora_ui.worker" in child.cmdline():
                workers += child.memory_info().rss
    if workers:
        values["workers"] = workers
    for name, handle in tabs.items():
        driver.switch_to.window(handle)
        driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        usage = driver.execute_cdp_cmd("Runtime.getHeapUsage", {})
        values[f"tab: {name}"] = float(usage["usedSize"])
    return values


def _end(server: int, home: Path) -> None:
    """End the server and the trainings it started, which would outlive it."""
    with suppress(psutil.Error):
        process = psutil.Process(server)
        for member in [*process.children(recursive=True), process]:
            with suppress(psutil.Error):
                member.kill()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(f"{home}{os.sep}") for word in words):
            with suppress(psutil.Error):
                process.kill()
