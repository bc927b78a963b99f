"""Every tab of the web UI looked at: at three widths, light and dark, in every language, and by axe-core.

    npm pack axe-core && tar xzf axe-core-*.tgz
    python -m tools.ui_look --output DIR [--axe package/axe.min.js] [--home FOLDER] [--demo]

Needs chromium and chromedriver on the path and the ``test`` extra; for Chinese a font that has it (Debian:
fonts-wqy-zenhei). Everything that can be folded is unfolded. Ends with 1 where axe-core finds something
serious or critical.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

from .ui_images import Browser, serve

LANGUAGES = ("en", "zh-CN")
THEMES = ("light", "dark")
TABS = ("dataset", "train", "generate", "tools")
WIDTHS = (1440, 1920, 390)
_TALLEST = 2400
_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
_AXE = """
const [rules, done] = arguments;
axe.run(document, { runOnly: rules }).then(({ violations }) => done(violations.map(
  ({ id, impact, help, nodes }) => ({ id, impact, help, nodes: nodes.map((one) => one.target.join(" ")) }))));
"""
_UNFOLD = """
const all = [...document.querySelectorAll("button.label-wrap:not(.open)")];
const folded = all.filter((one) => one.offsetParent);
folded.forEach((one) => one.click());
return folded.length;
"""


def look(
    browser: Browser, output: Path, axe: str | None, languages: list[str], themes: list[str]
) -> Counter[str]:
    """Take every screenshot, and return how many findings of each impact axe-core has."""
    impacts: Counter[str] = Counter()
    browser.driver.set_script_timeout(120)
    for language, theme in product(languages, themes):
        store = "localStorage.setItem('sdlora-language', arguments[0])"
        browser.driver.execute_script(store, language)
        for number, tab in enumerate(TABS):
            browser.open(f"?__theme={theme}", number)
            while browser.driver.execute_script(_UNFOLD):
                time.sleep(0.5)
            if axe:
                for finding in examine(browser, axe):
                    impacts[finding["impact"]] += 1
                    where = f"{language} {theme} {tab}"
                    print(f"{where}: {finding['impact']}: {finding['help']}: {finding['nodes'][:4]}")
            for width in WIDTHS:
                take(browser, output / f"{tab}-{language}-{theme}-{width}.png", width)
    return impacts


def examine(browser: Browser, axe: str) -> list[dict[str, Any]]:
    """Return what axe-core finds on the page as it is now."""
    browser.driver.execute_script(axe)
    findings: list[dict[str, Any]] = browser.driver.execute_async_script(_AXE, _RULES)
    return findings


def take(browser: Browser, file: Path, width: int) -> None:
    """Write the page as a screen of that width shows it, from its top."""
    phone = width < 500
    size = {"width": width, "height": 844 if phone else 900, "deviceScaleFactor": 1, "mobile": phone}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(0.6)
    browser.driver.execute_script("scrollTo(0, 0); document.activeElement?.blur()")
    whole = browser.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    if whole["width"] > width:
        print(f"{file.name}: is {whole['width']} px wide")
    part = {"x": 0, "y": 0, "width": width, "height": min(_TALLEST, whole["height"]), "scale": 1}
    asked = {"format": "png", "captureBeyondViewport": True, "clip": part}
    data = browser.driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"]
    file.write_bytes(base64.b64decode(data))
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def main() -> None:
    """Look at a server of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--axe", type=Path, help="axe.min.js of the package axe-core; without it, only screenshots"
    )
    parser.add_argument("--home", type=Path, help="folder for runs and images; default: a temporary one")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES)
    parser.add_argument("--themes", nargs="+", choices=THEMES, default=THEMES)
    parser.add_argument("--demo", action="store_true", help="open the demo's images first")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        process, url = serve(given.home or Path(temporary))
        browser = None
        try:
            browser = Browser(url)
            browser.open("", 0)
            if given.demo:
                browser.click("#demo")
                browser.wait(lambda: browser and browser.shown("#plan .sd-facts"))
            axe = given.axe.read_text(encoding="utf-8") if given.axe else None
            impacts = look(browser, given.output, axe, given.languages, given.themes)
        finally:
            if browser is not None:
                browser.driver.quit()
            process.terminate()
            process.wait()
    print(json.dumps(dict(impacts)))
    sys.exit(1 if impacts["serious"] or impacts["critical"] else 0)


if __name__ == "__main__":
    main()
