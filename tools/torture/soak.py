"""(g) The page for two hours in three tabs: drawing, training, looking at images; memory stays flat.

Needs chromium and chromedriver on the path and the ``test`` extra, like the browser tests. Memory is what the
server and its worker hold for themselves (unique set size); trainings are processes that end. It counts as
flat if the median of the last tenth of the time is at most a tenth above that of the second tenth (in the
first, libraries and caches fill).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ..ui_images import Browser, jobs
from .play import Play, Tally
from .warm import ROOT

_MARK = "SDLORA_SOAK"
_PAUSE = 60.0  # seconds between two rounds: people look at what they see
_GROWTH = 1.1
_PATIENCE = 600.0  # seconds that one action may take on a busy machine
_FIELD = "{0} textarea, {0} input"


@dataclass
class _Memory:
    """Bytes of the server and its worker, and of each kind of process at its last look, by time."""

    times: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def look(self, server: psutil.Process, seconds: float) -> None:
        """Note what they hold now."""
        processes = [server, *(child for child in server.children(recursive=True) if not _trains(child))]
        size = 0
        for process in processes:
            with suppress(psutil.Error):
                size += int(process.memory_full_info().uss)
        self.times.append(seconds)
        self.sizes.append(size)

    def between(self, begin: float, end: float) -> float:
        """Return the median of a part of the time, given as shares."""
        last = self.times[-1]
        part = [
            size
            for when, size in zip(self.times, self.sizes, strict=True)
            if begin * last <= when <= end * last
        ]
        return statistics.median(part or self.sizes)

    def problems(self) -> list[str]:
        """Return what is wrong with them."""
        early, late = self.between(0.1, 0.2), self.between(0.9, 1.0)
        if late <= _GROWTH * early:
            return []
        return [f"memory grew from {early / 2**20:.0f} to {late / 2**20:.0f} MiB"]


def _trains(process: psutil.Process) -> bool:
    """Tell whether a process is a training that the queue started."""
    with suppress(psutil.Error):
        return "--events" in process.cmdline()
    return True  # it is gone


class _Tabs:
    """One browser with three windows on the server, each left where it was."""

    def __init__(self, url: str) -> None:
        self.browser = Browser(url)
        self.browser.driver.set_page_load_timeout(_PATIENCE)
        driver = self.browser.driver
        self.windows = [driver.current_window_handle]
        for _ in range(2):
            driver.switch_to.new_window("window")
            self.windows.append(driver.current_window_handle)

    def go(self, number: int) -> Browser:
        """Return the browser, looking at one of the windows."""
        self.browser.driver.switch_to.window(self.windows[number])
        self._be("active")
        return self.browser

    def rest(self) -> None:
        """Freeze them all, as browsers do with windows that nobody looks at: no polling, no drawing."""
        for window in self.windows:
            self.browser.driver.switch_to.window(window)
            self._be("frozen")

    def _be(self, state: str) -> None:
        self.browser.driver.execute_cdp_cmd("Page.setWebLifecycleState", {"state": state})

    def end(self) -> None:
        """Close them."""
        with suppress(Exception):
            self.browser.driver.quit()


def soak(play: Play, trials: int, seed: int, say: Callable[[str], None]) -> Tally:
    """Use the page for ``trials`` minutes."""
    rng, tally, memory = random.Random(seed), Tally(), _Memory()
    home = play.folder / "page"
    shutil.copytree(ROOT / "datasets" / "ink-icons", home / "training-images" / "ink")
    server, url = _serve(home)
    try:
        tabs = _Tabs(url)
        try:
            _rounds(tabs, psutil.Process(server.pid), rng, memory, tally, say, home, 60.0 * trials)
        finally:
            tabs.end()
    finally:
        _end(str(home))
        server.wait()
    tenths = (memory.between(tenth / 10, (tenth + 1) / 10) / 2**20 for tenth in range(10))
    say(f"g: memory in MiB, by tenths of the time: {', '.join(f'{size:.0f}' for size in tenths)}")
    tally.add(memory.problems(), f"--only g --seed {seed} --trials {trials} (memory)", say, home)
    return tally


def _rounds(
    tabs: _Tabs,
    server: psutil.Process,
    rng: random.Random,
    memory: _Memory,
    tally: Tally,
    say: Callable[[str], None],
    home: Path,
    seconds: float,
) -> None:
    begun, number = time.monotonic(), 0
    actions: Sequence[Callable[[_Tabs, random.Random, Path, int], None]] = (_train, _draw, _look)
    while time.monotonic() - begun < seconds:
        for action in actions:
            problems: list[str] = []
            try:
                action(tabs, rng, home, number)
            except (Exception, SystemExit) as error:
                problems = [f"{type(error).__name__}: {str(error)[:300]}"]
                with suppress(Exception):
                    tabs.browser.driver.save_screenshot(str(home / f"failed-{number}.png"))
            name = action.__name__.strip("_")
            tally.add(problems, f"--only g (round {number}, {name})", say, home / f"{name}-{number}")
            memory.look(server, time.monotonic() - begun)
            if not server.is_running():
                return
        number += 1
        say(f"round {number}, {(time.monotonic() - begun) / 60:.0f} min: {memory.sizes[-1] / 2**20:.0f} MiB")
        tabs.rest()
        time.sleep(_PAUSE)


def _train(tabs: _Tabs, rng: random.Random, home: Path, number: int) -> None:
    """Train the demo for some steps; the first time everything is set, then it is only started again."""
    browser = tabs.go(0)
    before = len(jobs(browser.url))
    if number == 0:
        browser.open("?__theme=light", 0)
        browser.click("#demo")
        browser.wait(lambda: browser.shown("#start-training"), _PATIENCE)
        for section in ("#more", "#more-training", "#more-sample"):
            browser.click(f"{section} > button")
        for name, text in (
            *(("#set-training-steps", "4"), ("#set-training-batch-size", "2"), ("#set-sample-steps", "2")),
            ("#set-sample-prompts", "inkicon, an icon of a cat"),
        ):
            browser.type(_FIELD.format(name), text)
    browser.type(_FIELD.format("#train-name"), f"soak-{number}")
    browser.click("#start-training")
    browser.wait(lambda: len(jobs(browser.url)) > before, _PATIENCE)
    browser.wait(
        lambda: all(job["status"] in ("finished", "failed", "stopped") for job in jobs(browser.url)),
        _PATIENCE,
    )
    failed = [job for job in jobs(browser.url) if job["status"] != "finished"]
    if failed:
        raise ValueError(f"a training did not finish: {failed[0]}")


def _draw(tabs: _Tabs, rng: random.Random, home: Path, number: int) -> None:
    """Draw with the newest adapter, now and then a sweep."""
    browser = tabs.go(1)
    if number % 10 == 0:  # people reload, too
        browser.open("?__theme=light", 2)
    browser.type(
        _FIELD.format("#prompt"), f"inkicon, an icon of a {rng.choice(('dog', 'tree', 'car'))} {number}"
    )
    before = len(list(home.rglob("*.png")))
    browser.click("#sweep" if number % 5 == 4 else "#draw")
    browser.wait(lambda: len(list(home.rglob("*.png"))) > before, _PATIENCE)
    browser.wait(lambda: browser.shown("#drawn img, #extra img"), _PATIENCE)


def _look(tabs: _Tabs, rng: random.Random, home: Path, number: int) -> None:
    """Open a folder, change a caption, reload."""
    browser = tabs.go(2)
    browser.open("?__theme=dark", 0)
    browser.type("#dataset-folder input", "training-images/ink")
    browser.click("#open-folder")
    browser.wait(lambda: browser.shown(".sd-card"), _PATIENCE)
    text = f"inkicon, an icon seen in round {number}"
    browser.type(".sd-card textarea", text)
    browser.wait(lambda: _holds(home / "training-images" / "ink", text), _PATIENCE)


def _holds(folder: Path, text: str) -> bool:
    return any(text in file.read_text(encoding="utf-8") for file in folder.glob("*.txt"))


def _serve(home: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server whose processes carry a mark, and wait for its page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        _MARK: str(home),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    words = [sys.executable, "-m", "sdlora", "ui", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(words, cwd=home, env=environment, stdout=log, stderr=log)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/sdlora/jobs", timeout=5).close()
            return process, url
        time.sleep(0.1)
    _end(str(home))
    raise SystemExit(f"the page did not start: {(home / 'server.log').read_text(encoding='utf-8')[-500:]}")


def _end(mark: str) -> None:
    """Kill everything that carries the mark: the server, its worker, trainings that outlive it."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == mark and process.pid != os.getpid():
                process.send_signal(signal.SIGKILL)
