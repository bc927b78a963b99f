"""From a folder as a camera leaves it to a finished LoRA, by the page alone: decisions, clicks and seconds.

    python -m tools.ui_camera [--home FOLDER] [--steps N]

Twenty photos ``DSC00.jpg`` to ``DSC19.jpg`` without captions, a trigger word, the built-in base. A decision
is something only the user can know; a click is any other press that is needed. Prints JSON. Needs chromium
and chromedriver on the path and the ``test`` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sdlora.files import parse_json

from .ui_images import Browser, serve

PHOTOS = 20
SIZE = (1600, 1200)
_TRIGGER = "#dataset-trigger textarea, #dataset-trigger input"
_STEPS = "#set-training-steps textarea, #set-training-steps input"
_JOBS = "return fetch('/sdlora/jobs').then((answer) => answer.text())"


def photos(folder: Path) -> None:
    """Write photos of what the demo's icons show, as large as a camera's and named as it names them."""
    source = Path(__file__).parent.parent / "datasets" / "ink-icons"
    drawn = sorted(source.glob("*.png"))[:PHOTOS]
    folder.mkdir(parents=True)
    for number, file in enumerate(drawn):
        with Image.open(file) as icon:
            image = ImageOps.pad(icon.convert("RGB"), SIZE, color="white")
        image.save(folder / f"DSC{number:02}.jpg", quality=92)


def walk(browser: Browser, folder: str, steps: int | None) -> dict[str, Any]:
    """Go the way, and return what it took."""
    decisions: list[str] = []
    clicks: list[str] = []
    begun = time.monotonic()

    def seconds() -> float:
        return round(time.monotonic() - begun, 1)

    browser.open("", 0)
    decisions.append("folder")
    browser.type("#dataset-folder input", folder)
    clicks.append("Open folder")
    browser.click("#open-folder")
    browser.wait(lambda: len(browser.shown(".sd-card img")) >= PHOTOS)
    seen = seconds()
    decisions.append("trigger word")
    browser.type(_TRIGGER, "zork")
    browser.wait(lambda: "Ready" in "".join(part.text for part in browser.shown(".sd-verdict")))
    clicks.append("Train on it")
    browser.click("#train-on-it")
    decisions.append("base model")
    browser.type("#base input", "mini")
    browser.wait(lambda: browser.shown("#plan .sd-facts"))
    planned = seconds()
    if steps is not None:
        browser.click("#more > button")
        browser.click("#more-training > button")
        browser.type(_STEPS, str(steps))
    clicks.append("Start training")
    browser.click("#start-training")
    ended = ("finished", "failed")
    (job,) = browser.wait(lambda: [job for job in jobs(browser) if job["status"] in ended], 7200)
    return {
        "decisions": decisions,
        "clicks": clicks,
        "seconds": {"images seen": seen, "plan seen": planned, "adapter": seconds()},
        "steps": job["steps"],
        "status": job["status"],
        "error": job["error"],
        "load": round(os.getloadavg()[1], 1),
    }


def jobs(browser: Browser) -> list[dict[str, Any]]:
    """Return the queue."""
    listed: list[dict[str, Any]] = parse_json(browser.driver.execute_script(_JOBS))["jobs"]
    return listed


def main() -> None:
    """Walk on a server of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--home", type=Path, help="empty folder for photos and runs; default: a temporary one"
    )
    parser.add_argument("--steps", type=int, help="of the training; default: what the page decides")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = given.home or Path(temporary)
        photos(home / "training-images" / "camera")
        process, url = serve(home)
        browser = None
        try:
            browser = Browser(url)
            print(json.dumps(walk(browser, "training-images/camera", given.steps), indent=1))
        finally:
            if browser is not None:
                browser.driver.quit()
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
