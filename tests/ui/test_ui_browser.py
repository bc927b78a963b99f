"""The page in a real headless Chromium: from the demo to an exported LoRA, and what must not happen."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import ROOT, Server, free_port, start_server

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or CHROMEDRIVER is None,
        reason="no chromium and chromedriver on the path (Debian: apt-get install chromium chromium-driver)",
    ),
]
PHONE = (390, 844)
NAME = "#train-name textarea, #train-name input"


class Page:
    """A browser window on the server, found by what a user sees."""

    def __init__(self, driver: Any, server: Server) -> None:
        self.driver, self.server = driver, server

    def open(self, query: str = "") -> None:
        self.driver.get(f"{self.server.url}/{query}")
        self.one("#demo", 30)

    def all(self, css: str) -> list[Any]:
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            found = self.driver.find_elements("css selector", css)
            return [one for one in found if one.is_displayed()]
        except StaleElementReferenceException:  # redrawn while looking
            return []

    def one(self, css: str, seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.all(css):
                return found[0]
            time.sleep(0.05)
        raise AssertionError(
            f"`{css}` did not appear within {seconds} s; the page shows: {self.text()[-1500:]}"
        )

    def text(self) -> str:
        return str(self.driver.find_element("tag name", "body").text)

    def click(self, css: str) -> None:
        found = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def type(self, css: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def tab(self, number: int) -> None:
        self.all("button[role=tab]")[number].click()

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)


def make_driver() -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1280,1000")
    return webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    made = make_driver()
    yield made
    made.quit()


@pytest.fixture(scope="module")
def page(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "datasets" / "ink-icons", home / "training-pictures" / "few", ignore=few)
    running = start_server(home)
    yield Page(driver, running)
    for job in running.ask("/sdlora/jobs")["jobs"]:
        if job["status"] in ("running", "stopping"):
            running.status(f"/sdlora/jobs/{job['id']}/kill", {})
    running.kill()


def few(folder: str, names: list[str]) -> set[str]:
    """Leave all but four pictures out of a copy."""
    return {name for name in names if Path(name).stem not in ("bee", "candle", "cheese", "dog")}


def image(page: Page) -> str | None:
    shown = page.all("#drawn img")
    return str(shown[0].get_attribute("src")) if shown else None


def open_folder(page: Page, name: str) -> None:
    page.tab(0)
    page.type("#dataset-folder input", f"training-pictures/{name}")
    page.click("#open-folder")
    page.one(".sd-card")


def test_from_the_demo_to_an_exported_adapter(page: Page, wait: Callable[..., Any]) -> None:
    page.open()
    page.click("#demo")
    page.one("#start-training")
    wait(lambda: page.one(NAME).get_attribute("value") == "ink-icons")
    for section in ("#more", "#more-training", "#more-sample"):
        page.click(f"{section} > button")
    page.type("#set-training-steps textarea, #set-training-steps input", "6")
    page.type("#set-training-batch-size textarea, #set-training-batch-size input", "2")
    page.type("#set-sample-prompts textarea", "inkicon, an icon of a cat")
    page.type("#set-sample-steps input", "2")
    page.click("#start-training")
    page.one(".sd-job.running")
    page.one("figure.sd-figure", 150)
    page.one(".sd-job.finished", 150)
    assert "Loss over 6 steps" in page.one(".sd-figure svg").get_attribute("aria-label")
    job = page.server.ask("/sdlora/jobs")["jobs"][0]
    assert (job["step"], job["status"]) == (6, "finished")
    assert page.all(".sd-previews img")

    page.click("button[data-what=try]")
    page.one("#draw")
    wait(lambda: page.one("#prompt textarea").get_attribute("value") == "inkicon, an icon of a cat")
    page.click("#draw-more > button")
    page.type("#steps input", "4")
    page.click("#draw")
    first = wait(lambda: image(page), 60)

    slider = page.one("#strength-0 input[type=range]")
    slider.send_keys("\ue012" * 4)  # the left arrow, four times
    assert float(slider.get_attribute("value")) == pytest.approx(0.8)
    wait(lambda: image(page) not in (None, first), 30)
    drawn = sorted((page.server.home / "pictures").glob("*.png"))
    assert len(drawn) >= 2

    page.click("#sweep")
    page.one("#extra sd-strip", 30)
    wait(lambda: len(page.all("#extra .sd-tick")) == 7, 60)
    took = page.js(SCRUB)
    assert took["strengths"] == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5"]
    assert took["requests"] == 0 and took["milliseconds"] < 100

    page.tab(3)
    wait(lambda: "ink-icons" in page.one("#export-source input").get_attribute("value"))
    page.click("button#export, #export button")
    assert "largest delta difference" in page.one("#export-report .sd-proof", 60).text
    assert (page.server.home / "runs" / "exported" / "ink-icons.safetensors").is_file()


# Scrubs through the whole strip; a picture is there when it is the one visible and decoded.
SCRUB = """
const strip = document.querySelector("#extra sd-strip"), range = strip.querySelector("input[type=range]");
const asked = () => performance.getEntriesByType("resource").filter((one) => one.name.includes("/sdlora/file")).length;
const before = asked(), strengths = [], times = [];
for (let i = 0; i <= Number(range.max); i++) {
  const start = performance.now();
  range.value = String(i);
  range.dispatchEvent(new Event("input"));
  const shown = [...strip.querySelectorAll(".sd-stack img")]
    .filter((one) => getComputedStyle(one).visibility === "visible");
  if (shown.length !== 1 || !shown[0].complete || !shown[0].naturalWidth) throw new Error("not shown");
  times.push(performance.now() - start);
  strengths.push(strip.dataset.shown);
}
return { strengths, milliseconds: Math.max(...times), requests: asked() - before };
"""  # noqa: E501


def test_an_edited_caption_is_saved_by_itself_and_can_be_undone(page: Page, wait: Callable[..., Any]) -> None:
    page.open()
    open_folder(page, "few")
    page.type("textarea[data-name='bee.png']", "inkicon, a busy bee")
    file = page.server.home / "training-pictures" / "few" / "bee.txt"
    wait(lambda: file.read_text() == "inkicon, a busy bee\n", 5)
    page.open()
    open_folder(page, "few")
    assert page.one("textarea[data-name='bee.png']").get_attribute("value") == "inkicon, a busy bee"
    page.click("#sd-undo")
    wait(
        lambda: (
            page.one("textarea[data-name='bee.png']").get_attribute("value") == "inkicon, an icon of a bee"
        )
    )


def test_captions_are_replaced_in_all_pictures(page: Page, wait: Callable[..., Any]) -> None:
    page.open()
    open_folder(page, "few")
    page.one("#sd-find").send_keys("an icon of")
    page.one("#sd-put").send_keys("a drawing of")
    page.all(".sd-tools .sd-button")[0].click()
    file = page.server.home / "training-pictures" / "few" / "dog.txt"
    wait(lambda: file.read_text().strip() == "inkicon, a drawing of a dog", 5)


def test_no_page_needs_another_site_or_lacks_a_label(page: Page) -> None:
    page.open()
    for number in range(4):
        page.tab(number)
        time.sleep(0.5)
        assert page.js(UNLABELLED) == []
    hosts = [host for host in page.js(HOSTS) if host]  # data: and blob: addresses have none
    assert hosts == [f"127.0.0.1:{page.server.port}"]


HOSTS = """
return [...new Set(performance.getEntriesByType("resource").map((one) => new URL(one.name).host))];
"""
UNLABELLED = """
const visible = (one) => one.offsetParent !== null;
const named = (one) => one.getAttribute("aria-label") || one.getAttribute("aria-labelledby")
  || one.labels?.length || one.closest("label") || one.textContent.trim() || one.title;
return [...document.querySelectorAll("input, textarea, select, button")]
  .filter((one) => visible(one) && !named(one)).map((one) => one.outerHTML.slice(0, 200));
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_fit_a_phone(page: Page, theme: str) -> None:
    size = {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open(f"?__theme={theme}")
        for number in range(4):
            page.js("document.querySelectorAll('button[role=tab]')[arguments[0]].click()", number)
            time.sleep(0.4)
            assert page.js("return document.documentElement.scrollWidth") <= PHONE[0]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_another_sites_page_can_do_nothing(page: Page) -> None:
    file = page.server.home / "training-pictures" / "few" / "cheese.txt"
    before = file.read_text()

    class Evil(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<h1>evil</h1>")

        def log_message(self, *arguments: Any) -> None:
            return None

    evil = HTTPServer(("127.0.0.1", 0), Evil)
    Thread(target=evil.serve_forever, daemon=True).start()
    try:
        page.driver.get(f"http://127.0.0.1:{evil.server_port}/")
        body = '{"folder": "training-pictures/few", "texts": {"cheese.png": "owned"}}'
        outcome = page.driver.execute_async_script(EVIL, page.server.url, body)
    finally:
        evil.shutdown()
    assert outcome == {"write": "blocked", "simple": "blocked", "read": "blocked", "image": "blocked"}
    assert file.read_text() == before


EVIL = """
const [url, body, done] = arguments, outcome = {};
const attempt = (name, options, path) => fetch(url + path, options).then((answer) => {
  outcome[name] = answer.type === "opaque" ? "blocked" : `answered ${answer.status}`;
}).catch(() => { outcome[name] = "blocked"; });
const image = new Promise((ready) => {
  const one = new Image();
  one.onload = () => ready("loaded");
  one.onerror = () => ready("blocked");
  one.src = url + "/sdlora/file?path=training-pictures/few/bee.png";
}).then((text) => { outcome.image = text; });
const headers = { "Content-Type": "application/json", "X-Sdlora": "1" };
Promise.all([
  attempt("write", { method: "POST", body, headers }, "/sdlora/captions/set"),
  attempt("simple", { method: "POST", body, mode: "no-cors" }, "/sdlora/captions/set"),
  attempt("read", {}, "/sdlora/jobs"),
  image,
]).then(() => done(outcome));
"""


@pytest.mark.parametrize(
    "path",
    [
        "/sdlora/file?path=/etc/passwd",
        "/sdlora/file?path=training-pictures/../../../etc/passwd",
        "/sdlora/thumb?path=/usr/share/pixmaps/x.png",
        "/sdlora/dataset?folder=/etc",
        "/sdlora/settings?path=../secret.png",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../etc/passwd",
        "/gradio_api/file=runs/.sdlora-ui/jobs",
        "/sdlora/web/../jobs.py",
        "/sdlora/web/%2e%2e/jobs.py",
    ],
)
def test_paths_outside_are_not_served(page: Page, path: str) -> None:
    assert page.server.status(path) in (403, 404)


def test_captions_outside_are_not_written(page: Page) -> None:
    outside = page.server.home / "outside"
    outside.mkdir(exist_ok=True)
    shutil.copy(ROOT / "datasets" / "ink-icons" / "bee.png", outside / "bee.png")
    for folder in ("outside", str(outside), "training-pictures/../outside"):
        body = {"folder": folder, "texts": {"bee.png": "x"}}
        assert page.server.status("/sdlora/captions/set", body) == 403
    body = {"folder": "training-pictures/few", "texts": {"../../outside/bee.png": "x"}}
    assert page.server.status("/sdlora/captions/set", body) == 403
    assert not (outside / "bee.txt").exists()


def test_the_queue_survives_a_killed_server(
    driver: Any, tmp_path: Path, wait: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    shutil.copytree(ROOT / "datasets" / "ink-icons", tmp_path / "training-pictures" / "few", ignore=few)
    port = free_port()
    page = Page(driver, start_server(tmp_path, port=port))
    request.addfinalizer(page.server.kill)
    page.open()
    open_folder(page, "few")
    page.click("#train-on-it")
    page.one("#start-training")
    wait(lambda: page.one(NAME).get_attribute("value") == "few")
    for section in ("#more", "#more-training", "#more-sample"):
        page.click(f"{section} > button")
    page.type("#set-training-steps textarea, #set-training-steps input", "5000")
    page.type("#set-sample-prompts textarea", "[]")
    for name in ("first", "second"):
        page.type(NAME, name)
        page.click("#start-training")
        wait(lambda name=name: name in [job["name"] for job in page.server.ask("/sdlora/jobs")["jobs"]])
    wait(lambda: page.server.ask("/sdlora/jobs")["jobs"][0]["step"] > 0, 150)
    page.server.kill()

    page = Page(driver, start_server(tmp_path, port=port))
    request.addfinalizer(page.server.kill)
    jobs = page.server.ask("/sdlora/jobs")["jobs"]
    assert [(job["name"], job["status"]) for job in jobs] == [("first", "running"), ("second", "waiting")]
    step = jobs[0]["step"]
    wait(lambda: page.server.ask("/sdlora/jobs")["jobs"][0]["step"] > step, 60)
    page.open()
    page.tab(1)
    page.click(f".sd-job[data-job='{jobs[1]['id']}'] .sd-job-name")
    page.click("button[data-what=delete]")
    page.click("#sd-confirm")
    wait(lambda: len(page.all(".sd-job")) == 1)
    page.click("button[data-what=stop]")
    page.one(".sd-job.stopped", 90)
    assert list((tmp_path / "runs" / "first" / "checkpoints").iterdir())
