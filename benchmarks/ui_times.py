"""How fast the web UI answers, seen from a headless Chromium on the built-in base.

    python -m benchmarks.ui_times --home FOLDER

``FOLDER`` must hold a finished run, as ``python -m tools.ui_images --home FOLDER`` leaves it. Prints JSON:
seconds until the server has its page and until that can be used, from a slider's release to the new
image, of a sweep, and the milliseconds of a scrub through it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tools.ui_images import PROMPT, Browser, serve

RELEASES = 10

RELEASE = """
const [strength, done] = arguments;
const slider = document.querySelector("#strength-0 input[type=range]");
const shown = () => document.querySelector("#drawn .sd-main img");
const before = shown()?.src;
slider.value = strength;
slider.dispatchEvent(new Event("input", { bubbles: true }));
setTimeout(() => {
  const start = performance.now();
  slider.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  const look = () => {
    const now = shown();
    if (now && now.src !== before && now.complete && now.naturalWidth) done(performance.now() - start);
    else requestAnimationFrame(look);
  };
  look();
}, 50);
"""
SCRUB = """
const strip = document.querySelector("#extra sd-strip"), range = strip.querySelector("input[type=range]");
const done = arguments[0], times = [];
const files = (one) => one.name.includes("/sdlora/file");
const asked = () => performance.getEntriesByType("resource").filter(files).length;
const before = asked();
const next = (i) => {
  if (i > Number(range.max)) { done({ times, requests: asked() - before }); return; }
  const start = performance.now();
  range.value = String(i);
  range.dispatchEvent(new Event("input"));
  const painted = () => { times.push(performance.now() - start); next(i + 1); };
  requestAnimationFrame(() => requestAnimationFrame(painted));
};
next(0);
"""


def measure(home: Path) -> dict[str, Any]:
    """Return all figures."""
    browser = Browser("")
    begun = time.perf_counter()
    server, browser.url = serve(home)
    times: dict[str, Any] = {"server_ready_s": round(time.perf_counter() - begun, 2)}
    try:
        browser.open("", 0)
        times["page_usable_s"] = round(time.perf_counter() - begun, 2)
        begun = time.perf_counter()
        browser.open("?__theme=light", 0)
        times["page_again_s"] = round(time.perf_counter() - begun, 2)
        times |= _drawing(browser)
    finally:
        browser.driver.quit()
        server.terminate()
        server.wait()
    return times


def _drawing(browser: Browser) -> dict[str, Any]:
    browser.open("?__theme=light", 1)
    browser.click("button[data-what=try]")
    browser.wait(lambda: browser.shown("#draw"))
    browser.wait(lambda: browser.shown("#adapter-0 input")[0].get_attribute("value"))
    browser.type("#prompt textarea", PROMPT)
    browser.click("#draw-more > button")
    figures: dict[str, Any] = {}
    for steps in (20, 10):
        browser.type("#steps input", str(steps))
        browser.click("#draw")
        browser.wait(
            lambda: browser.shown("#drawn .sd-main img") and not browser.shown("#drawing .sd-working")
        )
        times = []
        for number in range(RELEASES):
            strength = str(round(0.3 + 0.05 * number, 2))
            times.append(browser.driver.execute_async_script(RELEASE, strength) / 1000)
            browser.wait(lambda: not browser.shown("#drawing .sd-working"))
        figures[f"release_to_image_{steps}_steps_s"] = [round(seconds, 2) for seconds in sorted(times)]
        figures[f"release_to_image_{steps}_steps_median_s"] = round(statistics.median(times), 2)
    begun = time.perf_counter()
    browser.click("#sweep")
    browser.wait(lambda: len(browser.shown("#extra .sd-tick")) == 7)
    figures["sweep_of_7_s"] = round(time.perf_counter() - begun, 2)
    scrub = browser.driver.execute_async_script(SCRUB)
    figures["scrub_ms"] = [round(milliseconds, 1) for milliseconds in sorted(scrub["times"])]
    figures["scrub_requests"] = scrub["requests"]
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, required=True, help="working folder with a finished run")
    print(json.dumps(measure(parser.parse_args().home), indent=2))


if __name__ == "__main__":
    main()
