"""The images of the web UI in ``docs/images``: drives a headless Chromium through the demo and takes them.

    python -m tools.ui_images --output docs/images [--home FOLDER]

Needs chromium and chromedriver on the path and the ``test`` extra. Trains the demo, which takes some minutes
without a GPU; a ``--home`` that holds it already is used again.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

PROMPT = "inkicon, an icon of a bicycle"
WIDTH, HEIGHT = 1280, 960
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
MAX_BYTES = 300_000


class Browser:
    """A headless Chromium on one server."""

    def __init__(self, url: str) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        for argument in (
            *("headless=new", "no-sandbox", "disable-gpu"),
            *("disable-dev-shm-usage", "hide-scrollbars"),
        ):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--window-size={WIDTH},{HEIGHT}")
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.url = url

    def open(self, query: str, page: int) -> None:
        """Open a page of the site."""
        self.driver.get(f"{self.url}/{query}")
        self.wait(lambda: self.shown("#demo"))
        self.driver.execute_script(
            "document.querySelectorAll('button[role=tab]')[arguments[0]].click()", page
        )
        self.wait(lambda: self.shown(("#demo", "#start-training", "#draw", "#export-source")[page]))

    def shown(self, css: str) -> list[Any]:
        """Return what can be seen of something."""
        with suppress(Exception):
            return [
                element
                for element in self.driver.find_elements("css selector", css)
                if element.is_displayed()
            ]
        return []

    def wait(self, ready: Callable[[], Any], seconds: float = 600) -> Any:
        """Return what ``ready`` gives as soon as it gives something."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := ready():
                return value
            time.sleep(0.1)
        raise SystemExit("the page did not get there; look at the server's log")

    def click(self, css: str) -> None:
        """Press something."""
        element = self.wait(lambda: self.shown(css))[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def type(self, css: str, text: str) -> None:
        """Replace the text of a field, all at once: each key would send the whole form to the server."""
        from selenium.webdriver.common.keys import Keys

        field = self.wait(lambda: self.shown(css))[0]
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        self.driver.execute_cdp_cmd("Input.insertText", {"text": text})
        # TAB would go to the next field, and a list there would open over what is pressed next
        self.driver.execute_script("arguments[0].blur()", field)

    def image(self, file: Path, height: int = HEIGHT) -> None:
        """Write what the page shows from its top, as a PNG of few colours."""
        self.driver.execute_script("scrollTo(0, 0); document.activeElement?.blur()")
        self.wait(lambda: self.driver.execute_script(_LOADED))
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        part = {"x": 0, "y": 0, "width": size["width"], "height": min(height, size["height"]), "scale": 1}
        asked = {"format": "png", "captureBeyondViewport": True, "clip": part}
        data = base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"])
        small = Image.open(io.BytesIO(data)).convert("RGB").quantize(192, dither=Image.Dither.NONE)
        small.save(file, optimize=True)
        if file.stat().st_size > MAX_BYTES:
            raise SystemExit(f"{file}: has {file.stat().st_size} bytes, more than {MAX_BYTES}")
        print(file)

    def phone(self) -> None:
        """Be a phone from now on."""
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)


_LOADED = """
const inView = (one) => one.offsetParent && one.getBoundingClientRect().top < innerHeight;
const seen = [...document.images].filter(inView);
return seen.every((one) => one.complete) && !document.querySelector(".sd-working");
"""


def serve(home: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server and return it with its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sdlora", "ui", "--port", str(port)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    process = subprocess.Popen(command, cwd=home, env=os.environ | {"PYTHONPATH": path})
    url = f"http://127.0.0.1:{port}"
    for _ in range(3000):  # minutes on a busy machine
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/sdlora/jobs", timeout=5).close()
            return process, url
        time.sleep(0.1)
    raise SystemExit("the server did not start")


def jobs(url: str) -> list[dict[str, Any]]:
    """Return the queue."""
    with urllib.request.urlopen(f"{url}/sdlora/jobs", timeout=30) as answer:
        listed: list[dict[str, Any]] = json.loads(answer.read())["jobs"]
        return listed


def take(browser: Browser, output: Path) -> None:
    """Take every image."""
    browser.open("?__theme=light", 0)
    if not jobs(browser.url):
        browser.click("#demo")
        browser.wait(lambda: browser.shown("#start-training"))
        browser.wait(lambda: len(browser.shown("#plan .sd-fact")) == 4)
        browser.click("#start-training")
        browser.wait(lambda: any(job["step"] > 90 for job in jobs(browser.url)))
        browser.image(output / "ui-training.png")
    browser.wait(lambda: jobs(browser.url)[0]["status"] == "finished")

    browser.open("?__theme=light", 0)
    browser.type("#dataset-folder input", "training-images/ink-icons")
    browser.click("#open-folder")
    browser.wait(lambda: len(browser.shown(".sd-card")) > 20)
    browser.image(output / "ui-dataset.png", 1240)
    browser.open("?__theme=dark", 1)
    browser.wait(lambda: browser.shown(".sd-previews img"))
    browser.image(output / "ui-train-dark.png", 1100)
    draw(browser, output)
    browser.open("?__theme=light", 3)
    browser.wait(lambda: browser.shown("#export-source input")[0].get_attribute("value"))
    browser.click("button#export, #export button")
    browser.wait(lambda: browser.shown("#export-report .sd-proof, #export-report .sd-problem"))
    browser.image(output / "ui-export.png")


def draw(browser: Browser, output: Path) -> None:
    """Draw a strip and compare, at the desk and on a phone."""
    browser.open("?__theme=light", 1)
    browser.click("button[data-what=try]")
    browser.wait(lambda: browser.shown("#draw"))
    browser.wait(lambda: browser.shown("#adapter-0 input")[0].get_attribute("value") == "ink-icons")
    browser.type("#prompt textarea", PROMPT)
    browser.click("#sweep")
    browser.wait(lambda: len(browser.shown("#extra .sd-tick")) == 7)
    browser.image(output / "ui-generate.png", 1100)
    browser.phone()
    browser.image(output / "ui-phone.png", 1500)
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.click("#compare")
    browser.wait(lambda: browser.shown("#extra sd-compare img"))
    browser.driver.execute_script("document.body.classList.add('dark')")
    browser.image(output / "ui-compare-dark.png", 900)


def main() -> None:
    """Take the images into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    parser.add_argument("--home", type=Path, help="working folder of the server; a new one when left out")
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp(prefix="sdlora-ui-"))
    home.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    server, url = serve(home)
    browser = Browser(url)
    try:
        take(browser, options.output)
    finally:
        browser.driver.quit()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
