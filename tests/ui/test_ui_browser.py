"""The page in a real headless Chromium: from the demo to an exported LoRA, and what must not happen."""

from __future__ import annotations

import json
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import ROOT, Server, free_port, start_server
from past_runs import put_run
from patience import PATIENCE, wait_for
from PIL import Image
from processes import end_marked, new_mark, with_mark

CHROMIUM = next(
    (
        program
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (program := shutil.which(name))
    ),
    None,
)
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.timeout(1800),  # the longest takes 432 s at a load of 15 on two cores
    pytest.mark.skipif(
        CHROMIUM is None or CHROMEDRIVER is None,
        reason="no chromium and chromedriver on the path (Debian: apt-get install chromium chromium-driver)",
    ),
]
PHONE = (390, 844)
NAME = "#train-name textarea, #train-name input"


class Element:
    """What a selector means when it is asked: the page may replace it between finding and reading."""

    def __init__(self, page: Page, css: str) -> None:
        self.page, self.css = page, css

    @property
    def text(self) -> str:
        return str(self._asked(lambda element: element.text))

    def get_attribute(self, name: str) -> str | None:
        value = self._asked(lambda element: element.get_attribute(name))
        return None if value is None else str(value)

    def send_keys(self, *keys: str) -> None:
        self._asked(lambda element: element.send_keys(*keys))

    def _asked(self, ask: Callable[[Any], Any]) -> Any:
        from selenium.common import exceptions

        replaced = (exceptions.StaleElementReferenceException, exceptions.ElementNotInteractableException)
        answers: list[Any] = []

        def answered() -> bool:
            with suppress(*replaced):
                answers.append(ask(self.page.found(self.css)))
            return bool(answers)

        wait_for(answered, f"`{self.css}` to answer")
        return answers[0]


class Page:
    """A browser window on the server, found by what a user sees."""

    def __init__(self, driver: Any, server: Server) -> None:
        self.driver, self.server = driver, server

    def open(self, query: str = "") -> None:
        self.driver.get(f"{self.server.url}/{query}")
        self.one("#demo")
        wait_for(lambda: self.js("return document.body.dataset.filled"), "what the tab held, filled in again")

    def all(self, css: str) -> list[Any]:
        return list(self.js(VISIBLE, css))

    def one(self, css: str) -> Element:
        """Wait until it is there."""
        self.found(css)
        return Element(self, css)

    def found(self, css: str) -> Any:
        try:
            return wait_for(lambda: self.all(css), f"`{css}`")[0]
        except AssertionError as error:
            raise AssertionError(f"{error}; the page shows: {self.text()[-1500:]}") from None

    def text(self) -> str:
        return str(self.driver.find_element("tag name", "body").text)

    def click(self, css: str) -> None:
        """Click as soon as nothing covers it (a message that fades) or replaces it (a list made again)."""
        wait_for(lambda: self._clicked(css, 0), f"a click on `{css}`")

    def _clicked(self, css: str, number: int) -> bool:
        from selenium.common import exceptions

        self.one(css)
        with suppress(
            IndexError,
            exceptions.ElementClickInterceptedException,
            exceptions.ElementNotInteractableException,
            exceptions.StaleElementReferenceException,
        ):
            field = self.all(css)[number]
            self.js("arguments[0].scrollIntoView({block: 'center'})", field)
            field.click()
            return True
        return False

    def type(self, css: str, text: str) -> None:
        """Write over what a field holds, all at once as by pasting, and leave it.

        Each key would send the whole form to the server, which takes the page longer than the rest of a test.
        """
        from selenium.webdriver.common.keys import Keys

        self.click(css)
        self.write(css, text)
        self.one(css).send_keys(Keys.TAB)

    def write(self, css: str, text: str) -> None:
        """Write over what the field with the focus holds; the last letter by its key, as Gradio wants one."""
        from selenium.webdriver.common.keys import Keys

        self.one(css).send_keys(Keys.CONTROL, "a")
        if text[:-1]:
            self.driver.execute_cdp_cmd("Input.insertText", {"text": text[:-1]})
        self.one(css).send_keys(text[-1:] or Keys.DELETE)

    def tab(self, number: int) -> None:
        wait_for(lambda: self._clicked("button[role=tab]", number), f"tab {number}")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)


# What a user sees of what a selector means, in one question: many small ones keep the page from its work.
VISIBLE = """
const shown = (one) => {
  const box = one.getBoundingClientRect();
  return box.width > 0 && box.height > 0 && one.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
};
return [...document.querySelectorAll(arguments[0])].filter(shown);
"""  # noqa: E501


def make_driver(mark: str) -> Any:
    """Start a browser whose processes carry a mark."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = Service(str(CHROMEDRIVER), env=with_mark(mark))
    chrome = webdriver.Chrome(options=options, service=service)
    chrome.set_script_timeout(PATIENCE)
    chrome.command_executor.client_config.timeout = 5 * PATIENCE  # a busy page answers nobody for a while
    return chrome


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    mark = new_mark()
    try:
        browser = make_driver(mark)
        yield browser
        browser.quit()
    finally:
        end_marked(mark)


@pytest.fixture(scope="module")
def page(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "datasets" / "ink-icons", home / "training-images" / "few", ignore=few)
    running = start_server(home)
    yield Page(driver, running)
    running.end()


def few(folder: str, names: list[str]) -> set[str]:
    """Leave all but four images out of a copy."""
    return {name for name in names if Path(name).stem not in ("bee", "candle", "cheese", "dog")}


def image(page: Page) -> str | None:
    shown = page.all("#drawn img")
    return str(shown[0].get_attribute("src")) if shown else None


def open_folder(page: Page, name: str) -> None:
    page.tab(0)
    page.type("#dataset-folder input", f"training-images/{name}")
    page.click("#open-folder")
    page.one(".sd-card")


def test_from_the_demo_to_an_exported_adapter(page: Page, wait: Callable[..., Any]) -> None:
    page.open()
    page.click("#demo")
    page.one("#start-training")
    wait(lambda: page.one(NAME).get_attribute("value") == "ink-icons")
    unfold(page, "#more", "#more-training", "#more-sample")
    page.type("#set-training-steps textarea, #set-training-steps input", "6")
    page.type("#set-training-batch-size textarea, #set-training-batch-size input", "2")
    page.type("#set-sample-prompts textarea", "inkicon, an icon of a cat")
    page.type("#set-sample-steps input", "2")
    page.click("#start-training")
    page.one(".sd-job")
    page.one("figure.sd-figure")
    page.one(".sd-job.finished")
    wait(lambda: "Loss over 6 steps" in page.one(".sd-figure svg").get_attribute("aria-label"))
    job = page.server.ask("/sdlora/jobs")["jobs"][0]
    assert (job["step"], job["status"]) == (6, "finished")
    page.one(".sd-previews img")

    page.click("button[data-what=try]")
    page.one("#draw")
    wait(lambda: page.one("#prompt textarea").get_attribute("value") == "inkicon, an icon of a cat")
    unfold(page, "#draw-more")
    page.type("#steps input", "4")
    page.click("#draw")
    first = wait(lambda: image(page))

    slider = page.one("#strength-0 input[type=range]")
    slider.send_keys("\ue012" * 4)  # the left arrow, four times
    wait(lambda: float(slider.get_attribute("value")) == pytest.approx(0.8))
    wait(lambda: image(page) not in (None, first))
    drawn = drawn_images(page)
    assert len(drawn) >= 2

    page.click("#sweep")
    page.one("#extra sd-strip")
    wait(lambda: len(page.all("#extra .sd-tick")) == 7)
    took = page.js(SCRUB)
    assert took["strengths"] == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5"]
    assert took["requests"] == 0 and took["milliseconds"] < 100

    page.click("#compare")
    page.one("#extra sd-compare img.sd-after")

    unfold(page, "#checkpoints")
    page.type("#grid-strengths textarea, #grid-strengths input", "0.5, 1.5")
    page.click("#grid")
    wait(lambda: len(page.all("#extra .sd-cell")) == 2 * (1 + len(checkpoints(page))))
    page.click("#extra .sd-cell[aria-label$='1.5']")
    wait(lambda: page.one("#strength-0 input[type=range]").get_attribute("value") == "1.5")
    wait(lambda: "(step " in page.one("#adapter-0 input").get_attribute("value"))

    page.type("#prompt textarea", "something else")
    page.driver.find_element("css selector", "#import-file input[type=file]").send_keys(str(drawn[0]))
    wait(lambda: page.one("#prompt textarea").get_attribute("value") == "inkicon, an icon of a cat")
    wait(lambda: page.one("#adapter-0 input").get_attribute("value") == "ink-icons")
    wait(lambda: page.one("#strength-0 input[type=range]").get_attribute("value") == "1")

    page.tab(3)
    wait(lambda: "ink-icons" in page.one("#export-source input").get_attribute("value"))
    page.click("button#export, #export button")
    assert "largest delta difference" in page.one("#export-report .sd-proof").text
    assert (page.server.home / "runs" / "exported" / "ink-icons.safetensors").is_file()
    assert (page.server.home / "runs" / "exported" / "ink-icons.png").is_file()
    tools_work(page, wait)
    two_adapters_draw(page, wait)
    the_text_encoder_has_its_own_strength(page, wait)


def tools_work(page: Page, wait: Callable[..., Any]) -> None:
    """Inspect, merge, resize and bake the adapter that was trained and the one that was exported."""
    exported = page.server.home / "runs" / "exported"
    page.tab(2)
    page.tab(3)  # the lists are made again
    choose(page, wait, "#inspect-file input", "exported/ink-icons")
    page.click("button#inspect, #inspect button")
    assert "inkicon" in page.one("#inspect-report pre").text
    unfold(page, "#merge-box")
    choose(page, wait, "#merge-0 input", "ink-icons")
    choose(page, wait, "#merge-1 input", "exported/ink-icons")
    page.click("button#merge, #merge button")
    page.one("#merge-report .sd-done")
    unfold(page, "#resize-box")
    choose(page, wait, "#resize-file input", "exported/ink-icons")
    page.type("#resize-rank textarea, #resize-rank input", "4")
    page.click("button#resize, #resize button")
    page.one("#resize-report .sd-done")
    unfold(page, "#bake-box")
    choose(page, wait, "#bake-file input", "exported/ink-icons")
    page.click("button#bake, #bake button")
    page.one("#bake-report .sd-done")
    assert (exported / "merged.safetensors").is_file() and (exported / "resized.safetensors").is_file()
    assert (exported / "baked" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def two_adapters_draw(page: Page, wait: Callable[..., Any]) -> None:
    """Draw with two adapters of different strengths."""
    page.tab(2)
    page.click("#another")
    choose(page, wait, "#adapter-1 input", "exported/merged")
    page.one("#strength-1 input[type=range]").send_keys("\ue012" * 2)  # the left arrow: to 0.9
    page.click("#draw")
    wait(lambda: drawn_with(page, "<lora:ink-icons:1>", "<lora:merged:0.9>"))


def the_text_encoder_has_its_own_strength(page: Page, wait: Callable[..., Any]) -> None:
    """Take the text encoder's strength apart and lower it; the image follows by itself."""
    unfold(page, "#apart-0")
    page.click("#separate-0 input")
    page.one("#text-0 input[type=range]").send_keys("\ue012" * 3)  # the left arrow: to 0.85
    wait(lambda: drawn_with(page, "<lora:ink-icons:0.85:1>", "<lora:merged:0.9>"))


def drawn_with(page: Page, *phrases: str) -> bool:
    """Tell whether an image was drawn whose settings hold all of these."""
    texts = [Image.open(file).info.get("parameters", "") for file in drawn_images(page)]
    return any(all(phrase in text for phrase in phrases) for text in texts)


def drawn_images(page: Page) -> list[Path]:
    """Return the whole images by name; one that is just being written has a hidden one, or is empty."""
    files = (page.server.home / "images").glob("*.png")
    return sorted(file for file in files if not file.name.startswith(".") and file.stat().st_size)


def choose(page: Page, wait: Callable[..., Any], css: str, label: str) -> None:
    """Choose from a list by typing what it is called; the page may be making the list again meanwhile."""
    from selenium.common.exceptions import ElementClickInterceptedException, ElementNotInteractableException

    def chosen() -> bool:
        if page.one(css).get_attribute("value") == label:
            return True
        page.click(css)
        page.write(css, label[:-1])  # not the whole: only a choice makes the field say `label`
        options = [option for option in page.all("ul[role=listbox] li") if option.text.strip("✓ \n") == label]
        if options:
            with suppress(ElementClickInterceptedException, ElementNotInteractableException):
                options[0].click()
        return bool(page.one(css).get_attribute("value") == label)

    wait(chosen)


def use_mini(page: Page) -> None:
    """Choose the built-in base: without one on the machine, none is chosen."""
    page.type("#base input", "mini")


def unfold(page: Page, *sections: str) -> None:
    """Open what is folded away, one inside the other."""
    for section in sections:
        page.click(f"{section} > button")


def checkpoints(page: Page) -> list[Path]:
    return list((page.server.home / "runs" / "ink-icons" / "checkpoints").glob("step-*/adapter.safetensors"))


# Scrubs through the whole strip, five times because of what else the machine does; an image is there
# when it is the one visible and decoded.
SCRUB = """
const strip = document.querySelector("#extra sd-strip"), range = strip.querySelector("input[type=range]");
const asked = () => performance.getEntriesByType("resource").filter((one) => one.name.includes("/sdlora/file")).length;
const before = asked(), strengths = [], times = [];
for (let i = 0, round = 0; round < 5; i === Number(range.max) ? (i = 0, round++) : i++) {
  const start = performance.now();
  range.value = String(i);
  range.dispatchEvent(new Event("input"));
  const shown = [...strip.querySelectorAll(".sd-stack img")]
    .filter((one) => getComputedStyle(one).visibility === "visible");
  if (shown.length !== 1 || !shown[0].complete || !shown[0].naturalWidth) throw new Error("not shown");
  times[i] = Math.min(times[i] ?? Infinity, performance.now() - start);
  if (round === 0) strengths.push(strip.dataset.shown);
}
return { strengths, milliseconds: Math.max(...times), requests: asked() - before };
"""  # noqa: E501


def test_an_image_is_drawn_with_the_keyboard_alone(page: Page, wait: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open()
    reach(page, "button[role=tab]:nth-of-type(3)", Keys.ENTER)
    reach(page, "#prompt textarea", "an icon of a cat seen by keyboard")
    reach(page, "#draw", Keys.ENTER)
    wait(lambda: drawn_with(page, "an icon of a cat seen by keyboard"))
    wait(lambda: image(page))


def reach(page: Page, css: str, keys: str) -> None:
    """Go on with the tabulator until the focus is there, see that it shows, and press keys."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    for _ in range(80):
        if page.js("return document.activeElement.matches(arguments[0])", css):
            break
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
    else:
        raise AssertionError(f"`{css}` is not reached by the tabulator")
    assert page.js(FOCUS_SHOWS), f"`{css}` does not show that it has the focus"
    ActionChains(page.driver).send_keys(keys).perform()


FOCUS_SHOWS = """
const one = document.activeElement, marks = () => {
  const style = getComputedStyle(one);
  return [style.outlineStyle, style.outlineWidth, style.boxShadow, style.borderColor].join();
};
const focused = marks();
one.blur();
const plain = marks();
one.focus();
return focused !== plain;
"""


def test_an_edited_caption_is_saved_by_itself_and_can_be_undone(page: Page, wait: Callable[..., Any]) -> None:
    page.open()
    open_folder(page, "few")
    page.type("textarea[data-name='bee.png']", "inkicon, a busy bee")
    file = page.server.home / "training-images" / "few" / "bee.txt"
    wait(lambda: file.read_text() == "inkicon, a busy bee\n")
    page.open()
    open_folder(page, "few")
    assert page.one("textarea[data-name='bee.png']").get_attribute("value") == "inkicon, a busy bee"
    page.click("#sd-undo")
    wait(
        lambda: (
            page.one("textarea[data-name='bee.png']").get_attribute("value") == "inkicon, an icon of a bee"
        )
    )


def test_captions_are_replaced_in_all_images_and_get_the_trigger_word(
    page: Page, wait: Callable[..., Any]
) -> None:
    page.open()
    open_folder(page, "few")
    page.one("#sd-find").send_keys("inkicon, an icon of")
    page.one("#sd-put").send_keys("a drawing of")
    page.click("#sd-replace")
    file = page.server.home / "training-images" / "few" / "dog.txt"
    wait(lambda: file.read_text().strip() == "a drawing of a dog")
    page.one("#sd-trigger").send_keys("inkicon")
    page.click("#sd-add-trigger")
    wait(lambda: file.read_text().strip() == "inkicon, a drawing of a dog")
    shown = "textarea[data-name='dog.png']"
    wait(lambda: page.one(shown).get_attribute("value") == "inkicon, a drawing of a dog")


def test_a_folder_is_captioned_by_a_model_and_put_back(page: Page, wait: Callable[..., Any]) -> None:
    pytest.importorskip("onnxruntime")
    from data.captioning.tiny_captioners import write_tagger

    images = page.server.home / "training-images"
    shutil.copytree(ROOT / "datasets" / "ink-icons", images / "bare", ignore=few)
    for file in (images / "bare").glob("*.txt"):
        file.unlink()
    write_tagger(page.server.home / "runs" / "tagger")
    page.open()
    open_folder(page, "bare")
    page.click("#sd-caption summary")
    page.type("#sd-caption-model", "runs/tagger")
    page.type("#sd-caption-threshold", "0")
    page.click("#sd-caption-preview")
    wait(lambda: "4 images to caption" in page.one("#sd-caption-status").text)
    assert list((images / "bare").glob("*.txt")) == []
    page.click("#sd-caption-start")
    wait(lambda: "4 captions written, 0 kept" in page.one("#sd-caption-status").text)
    caption = (images / "bare" / "bee.txt").read_text().strip()
    assert caption
    wait(lambda: page.one("textarea[data-name='bee.png']").get_attribute("value") == caption)
    page.click("#sd-undo")
    wait(lambda: list((images / "bare").glob("*.txt")) == [])


def test_two_tabs_agree_about_a_caption(page: Page, wait: Callable[..., Any]) -> None:
    driver, shown = page.driver, "textarea[data-name='cheese.png']"
    page.open()
    open_folder(page, "few")
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        page.open()
        open_folder(page, "few")
        page.type(shown, "inkicon, cheese of the second tab")
        driver.switch_to.window(first)
        wait(lambda: page.one(shown).get_attribute("value") == "inkicon, cheese of the second tab")
    finally:
        driver.switch_to.window(next(handle for handle in driver.window_handles if handle != first))
        driver.close()
        driver.switch_to.window(first)


def test_a_crash_of_the_browser_loses_nothing(page: Page, wait: Callable[..., Any]) -> None:
    home = page.server.home
    mark = new_mark()
    try:
        other = Page(make_driver(mark), page.server)
        other.open()
        open_folder(other, "few")
        other.click("#train-on-it")
        wait(lambda: other.one(NAME).get_attribute("value") == "few")
        other.click(NAME)
        other.write(NAME, "half-")
        other.one(NAME).send_keys("typed")
        kept = home / "runs" / ".sdlora-ui" / "forms" / "train.json"
        wait(lambda: kept.is_file() and "half-typed" in kept.read_text())
        other.tab(0)
        field = other.one("textarea[data-name='candle.png']")
        field.send_keys(" and its light")  # the field keeps the focus: only typing saves
        file = home / "training-images" / "few" / "candle.txt"
        wait(lambda: file.read_text().endswith("and its light\n"))
    finally:
        end_marked(mark)  # as a crash would
    driver, first = page.driver, page.driver.current_window_handle
    driver.switch_to.new_window(
        "tab"
    )  # a tab that was open keeps its own form, a new one begins with the newest
    try:
        page.open()
        page.tab(1)
        wait(lambda: page.one(NAME).get_attribute("value") == "half-typed")
    finally:
        driver.close()
        driver.switch_to.window(first)


def test_a_grid_and_a_list_of_prompts_are_drawn(page: Page, wait: Callable[..., Any]) -> None:
    page.open()
    page.tab(2)
    page.type("#prompt textarea", "an icon of a cat")
    page.click("#draw-more > button")
    page.type("#steps input", "1")
    page.click("#axes > button")
    page.type("#axis-across input, #axis-across textarea", "guidance=1, 2")
    page.type("#axis-down input, #axis-down textarea", "seed=3")
    page.click("#draw-axes")
    wait(lambda: len(page.all("#extra .sd-grid img")) == 2 and "seed 3" in page.one("#extra").text)
    page.click("#prompt-lines > button")
    page.type("#lines-text textarea", "a dog --s 1\na bird --d 7 --s oops")
    page.click("#draw-lines")
    wait(lambda: "line 2" in page.one("#drawing").text)
    page.type("#lines-text textarea", "a dog --s 1\na bird --d 7 --s 1")
    page.click("#draw-lines")
    wait(lambda: len(page.all("#extra .sd-grid img")) == 2 and "a bird" in page.one("#extra").text)


def test_a_preset_and_a_text_fill_the_form_and_say_what_changed(page: Page, wait: Callable[..., Any]) -> None:
    page.open()
    page.tab(1)
    choose(page, wait, "#preset input", "detailed-subject")
    wait(lambda: "Rank" in page.one("#filling-said").text and "32" in page.one("#filling-said").text)
    page.click("#as-text > button")
    page.click("#settings-show")
    area = "#settings-text textarea"
    wait(lambda: "alpha = 64" in (page.one(area).get_attribute("value") or ""))
    assert '"detailed-subject"' in (page.one(area).get_attribute("value") or "")
    page.type(area, "[adapter]\nrnak = 3\n")
    page.click("#settings-use")
    wait(lambda: "rnak" in page.one("#filling-said .sd-problem").text)
    page.type(area, "accelerate launch train_network.py --network_dim=12 --network_alpha=6 --mystery=1")
    page.click("#settings-use")
    wait(lambda: "mystery" in (page.one("#filling-said").get_attribute("innerHTML") or ""))
    page.click("#settings-show")
    wait(lambda: "rank = 12" in (page.one(area).get_attribute("value") or ""))
    assert "gradient_accumulation" not in (page.one(area).get_attribute("value") or "")


def test_a_plan_that_had_to_wait_does_not_take_a_newer_draft_back(
    page: Page, wait: Callable[..., Any]
) -> None:
    config = page.server.ask("/config")
    parts = {part["id"]: part["props"] for part in config["components"]}
    ids = {props.get("elem_id"): number for number, props in parts.items()}
    events = [
        event
        for event in config["dependencies"]
        if event["outputs"] == [ids["plan"], ids["changed"]] and ids["train-name"] in event["inputs"]
    ]
    edit = next(event for event in events if [ids["train-name"], "input"] in event["targets"])
    follow = next(event for event in events if event["targets"][0][1] == "then")
    kept = page.server.home / "runs" / ".sdlora-ui" / "forms" / "train.json"

    def send(event: dict[str, Any], session: str, name: str, steps: str) -> None:
        texts = {"train-folder": "training-images/few", "train-name": name, "set-training-steps": steps}
        given = [texts.get(parts[part].get("elem_id"), parts[part].get("value")) for part in event["inputs"]]
        body = {"data": given, "fn_index": event["id"], "session_hash": session}
        page.server.ask("/gradio_api/queue/join", body)

    send(follow, "first", "first", "7")
    send(follow, "second", "older", "8")
    send(edit, "second", "newer", "9")
    wait(lambda: kept.is_file() and json.loads(kept.read_text())["output.name"] == "newer")
    for session in ("first", "second"):  # each answer comes whole, so nothing is under way after it
        answer = page.server.ask(f"/gradio_api/queue/data?session_hash={session}", raw=True).decode()
        assert "process_completed" in answer
    assert json.loads(kept.read_text())["output.name"] == "newer"


def test_dropped_images_and_zips_become_a_data_set(
    page: Page, tmp_path: Path, wait: Callable[..., Any]
) -> None:
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for name in ("dog.png", "dog.txt"):
            archive.write(ROOT / "datasets" / "ink-icons" / name, name)
    (tmp_path / "fake.png").write_text("no image")
    Image.new("RGB", (400, 100), "teal").save(tmp_path / "wide.png")
    page.open()
    page.type("#drop-name textarea, #drop-name input", "dropped")
    files = [str(tmp_path / name) for name in ("more.zip", "fake.png", "wide.png")]
    page.driver.find_element("css selector", "#drop input[type=file]").send_keys("\n".join(files))
    page.one("textarea[data-name='wide.png']")  # the folder that was open before may hold a dog, too
    folder = page.server.home / "training-images" / "dropped"
    assert sorted(file.name for file in folder.iterdir()) == ["dog.png", "dog.txt", "wide.png"]
    wait(lambda: "fake.png" in page.text())  # a warning says what was left out
    edges = wait(lambda: page.js(CROP))
    assert edges["image"] == pytest.approx(4, rel=0.03)  # not squeezed, so that the crop fits it
    assert edges["crop"] == pytest.approx(edges["bucket"], rel=0.05)


CROP = """
const card = document.querySelector("textarea[data-name='wide.png']").closest(".sd-card");
const box = (one) => one.getBoundingClientRect();
const image = card.querySelector("img"), crop = card.querySelector(".sd-crop");
if (!image.complete || !image.naturalWidth) { image.loading = "eager"; return null; }
const [width, height] = crop.title.match(/\\d+/g).map(Number);
return { image: box(image).width / box(image).height, crop: box(crop).width / box(crop).height, bucket: width / height };
"""  # noqa: E501


def test_what_cannot_work_is_refused_before_the_start(page: Page, wait: Callable[..., Any]) -> None:
    before = len(page.server.ask("/sdlora/jobs")["jobs"])
    page.open()
    open_folder(page, "few")
    page.click("#train-on-it")
    wait(lambda: page.one(NAME).get_attribute("value").startswith("few"))
    page.type("#base input", "runs/not-there.safetensors")
    page.click("#start-training")
    assert "there is no such file" in page.one("#start-said .sd-problem").text
    wait(lambda: "there is no such file" in page.one("#plan .sd-problem").text)
    assert len(page.server.ask("/sdlora/jobs")["jobs"]) == before


def test_no_page_needs_another_site_or_lacks_a_label_or_loads_torch(
    page: Page, wait: Callable[..., Any]
) -> None:
    page.open()
    for number in range(4):
        page.tab(number)
        page.one(("#demo", "#start-training", "#draw", "#export-source")[number])
        assert page.js(UNLABELLED) == []
        assert page.js(NULLS) == 0
    asked = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in asked
        if message["method"] == "Network.requestWillBeSent"
    ]
    hosts = {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:", "about:"))}
    assert hosts == {f"127.0.0.1:{page.server.port}"}, "everything the browser asked for in this module"
    maps = Path(f"/proc/{page.server.process.pid}/maps")
    if maps.is_file():  # Linux tells which libraries the server holds
        assert "libpython" in maps.read_text() or "python" in maps.read_text()
        assert "libtorch" not in maps.read_text()


NULLS = """
const texts = document.evaluate("//text()[.='null' or .='undefined']", document.body, null, 7, null);
const all = [...Array(texts.snapshotLength).keys()].map((i) => texts.snapshotItem(i));
return all.filter((one) => one.parentElement.offsetParent).length;
"""
UNLABELLED = """
const visible = (one) => one.offsetParent !== null;
const named = (one) => one.getAttribute("aria-label") || one.getAttribute("aria-labelledby")
  || one.labels?.length || one.closest("label") || one.textContent.trim() || one.title;
return [...document.querySelectorAll("input, textarea, select, button")]
  .filter((one) => visible(one) && !named(one)).map((one) => one.outerHTML.slice(0, 200));
"""


def bare_photos(folder: Path, count: int) -> Path:
    """Write images named as a camera names them, without captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        image = Image.new("RGB", (96, 80), (number * 11, 255 - number * 9, 90))
        image.paste((9, number * 12, 255), (number * 3, 5, number * 3 + 30, 30 + number * 2))
        image.save(folder / f"DSC{number:02d}.jpg")
    return folder


TRIGGER = "#dataset-trigger input, #dataset-trigger textarea"
WORD = "#train-trigger input, #train-trigger textarea"


def test_photos_without_captions_are_trained_with_a_trigger_word(
    page: Page, wait: Callable[..., Any]
) -> None:
    bare_photos(page.server.home / "training-images" / "camera", 20)
    page.open()
    page.tab(0)
    page.type("#dataset-folder input", "training-images/camera")
    page.click("#open-folder")
    wait(lambda: len(page.all(".sd-card textarea")) == 20 and len(page.all(".sd-card img")) == 20)
    assert page.all(".sd-broken") == [] and "or set “Trigger word”" in page.one(".sd-findings").text
    page.type(TRIGGER, "zork")
    wait(lambda: "Ready" in page.one(".sd-verdict").text)
    assert "2\nheld out to measure progress" in page.one(".sd-summary").text
    page.tab(1)
    wait(lambda: page.one(WORD).get_attribute("value") == "zork")
    use_mini(page)
    wait(lambda: "18\nimages to train on" in page.one("#plan").text)  # made for the word: without, refused
    unfold(page, "#more", "#more-training", "#more-sample")
    page.type("#set-training-steps textarea, #set-training-steps input", "2")
    page.type("#set-sample-prompts textarea", "[]")
    wait(lambda: [line for line in page.one("#changed").text.splitlines() if "Training > Steps" in line])
    before = {job["id"] for job in page.server.ask("/sdlora/jobs")["jobs"]}
    page.click("#start-training")
    (job,) = wait(
        lambda: [
            job
            for job in page.server.ask("/sdlora/jobs")["jobs"]
            if job["id"] not in before and job["status"] in ("finished", "failed")
        ]
    )
    assert (job["status"], job["error"]) == ("finished", "")


def test_a_folder_after_the_demo_starts_automatic_and_settings_go_back_to_it(
    page: Page, wait: Callable[..., Any]
) -> None:
    bare_photos(page.server.home / "training-images" / "plain", 2)
    page.open()
    page.tab(0)
    page.click("#demo")
    wait(lambda: page.one(WORD).get_attribute("value") == "inkicon")
    wait(lambda: "Output > License" in page.one("#changed").text)
    open_folder(page, "plain")
    page.tab(1)
    wait(lambda: page.one(NAME).get_attribute("value").startswith("plain"))
    wait(lambda: page.all("#changed sd-changed") == [])
    assert page.one(WORD).get_attribute("value") == ""
    hidden = "return document.querySelector('#set-output-license input, #set-output-license textarea')?.value"
    assert not page.js(hidden)
    unfold(page, "#more", "#more-adapter")
    rank = "#set-adapter-rank textarea, #set-adapter-rank input"
    page.type(rank, "3")
    page.type("#set-adapter-alpha textarea, #set-adapter-alpha input", "2")
    wait(lambda: "Set by you (2)" in page.one("#changed").text)
    page.click("[data-reset='adapter.rank']")
    wait(lambda: page.one(rank).get_attribute("value") == "" and "(1)" in page.one("#changed").text)
    open_folder(page, "few")
    wait(lambda: page.one("#dataset-view sd-dataset").get_attribute("folder").endswith("few"))
    open_folder(page, "plain")  # comes back with what was set for it
    page.tab(1)
    wait(lambda: "Set by you (1)" in page.one("#changed").text)
    page.click("#reset-all")
    wait(lambda: page.all("#changed sd-changed") == [])
    log = (page.server.home / "server.log").read_text()
    assert "arning" not in log and "Traceback" not in log, "many plans were cancelled by now"
    assert page.one("#train-folder input, #train-folder textarea").get_attribute("value").endswith("plain")


def test_each_tab_keeps_its_form_over_a_reload_and_plans_what_it_holds(
    page: Page, wait: Callable[..., Any]
) -> None:
    driver, kept = page.driver, page.server.home / "runs" / ".sdlora-ui" / "forms"
    page.open()
    open_folder(page, "few")
    page.tab(1)
    wait(lambda: page.one(NAME).get_attribute("value").startswith("few"))
    use_mini(page)
    page.type(NAME, "first-tab")
    wait(lambda: any("first-tab" in file.read_text() for file in kept.glob("train-*.json")))
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        page.open()
        page.tab(1)
        wait(lambda: page.one(NAME).get_attribute("value") == "first-tab")  # begins with the newest
        page.type(NAME, "second-tab")
        wait(lambda: "second-tab" in (kept / "train.json").read_text())
        driver.switch_to.window(first)
        driver.refresh()  # the address leads to the same tab again
        page.one("#start-training")
        wait(lambda: page.one(NAME).get_attribute("value") == "first-tab")
        assert "Choose a folder" not in page.one("#plan").text
        wait(lambda: "images to train on" in page.one("#plan").text)
    finally:
        driver.switch_to.window(next(handle for handle in driver.window_handles if handle != first))
        driver.close()
        driver.switch_to.window(first)


def test_a_folder_is_chosen_from_a_list_and_another_one_added(page: Page, tmp_path: Path) -> None:
    photos = bare_photos(tmp_path / "photos", 1)
    page.open()
    page.tab(0)
    page.click("#browse-folders")
    page.click(".sd-folder[data-path$='/training-images']")
    page.click(".sd-folder[data-path$='/few']")
    page.click("#browse-open")
    page.one("textarea[data-name='bee.png']")
    page.type("#dataset-folder input", str(photos))
    page.click("#open-folder")
    page.click("#allow-folder")
    page.one("textarea[data-name='DSC00.jpg']")
    kept = json.loads((page.server.home / "settings" / "sdlora" / "page.json").read_text())
    assert kept == {"allowed": [str(photos)]}
    assert page.server.status(f"/sdlora/folders?path={photos.parent}") == 403


def test_a_path_that_is_mistyped_says_which_one_there_is(page: Page) -> None:
    page.open()
    page.tab(0)
    page.type("#dataset-folder input", "training-images/fews")
    page.click("#open-folder")
    problem = page.one("#dataset-view .sd-problem").text
    assert "there is no such folder" in problem and "did you mean training-images/few?" in problem


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_fit_a_phone(page: Page, theme: str) -> None:
    size = {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open(f"?__theme={theme}")
        for number in range(4):
            page.js("document.querySelectorAll('button[role=tab]')[arguments[0]].click()", number)
            page.one(("#demo", "#start-training", "#draw", "#export-source")[number])
            assert page.js("return document.documentElement.scrollWidth") <= PHONE[0]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_another_sites_page_can_do_nothing(page: Page) -> None:
    file = page.server.home / "training-images" / "few" / "cheese.txt"
    before = file.read_text()

    class Evil(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<h1>evil</h1>")

        def log_message(self, *arguments: Any) -> None:
            return None

    # Chromium opens connections ahead that it may use a minute later; one thread would wait for the first.
    evil = ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    Thread(target=evil.serve_forever, daemon=True).start()
    try:
        page.driver.get(f"http://127.0.0.1:{evil.server_port}/")
        body = '{"folder": "training-images/few", "texts": {"cheese.png": "owned"}}'
        outcome = page.driver.execute_async_script(EVIL, page.server.url, body)
    finally:
        evil.shutdown()
        evil.server_close()
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
  one.src = url + "/sdlora/file?path=training-images/few/bee.png";
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
        "/sdlora/file?path=training-images/../../../etc/passwd",
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


def test_an_image_that_was_not_uploaded_cannot_be_named_as_dropped(page: Page, tmp_path: Path) -> None:
    shutil.copy(ROOT / "datasets" / "ink-icons" / "bee.png", tmp_path / "bee.png")
    config = page.server.ask("/config")
    ids = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
    events = config["dependencies"]
    upload = next(e["id"] for e in events if ("drop", "upload") in [(ids.get(a), b) for a, b in e["targets"]])
    file = {"path": str(tmp_path / "bee.png"), "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [[file], "stolen", "", 64], "fn_index": upload, "session_hash": "stranger"}
    page.server.ask("/gradio_api/queue/join", body)
    answer = page.server.ask("/gradio_api/queue/data?session_hash=stranger", raw=True).decode()
    assert "it was not uploaded" in answer
    assert not (page.server.home / "training-images" / "stolen").exists()


def test_captions_outside_are_not_written(page: Page) -> None:
    outside = page.server.home / "outside"
    outside.mkdir(exist_ok=True)
    shutil.copy(ROOT / "datasets" / "ink-icons" / "bee.png", outside / "bee.png")
    for folder in ("outside", str(outside), "training-images/../outside"):
        body = {"folder": folder, "texts": {"bee.png": "x"}}
        assert page.server.status("/sdlora/captions/set", body) == 403
    body = {"folder": "training-images/few", "texts": {"../../outside/bee.png": "x"}}
    assert page.server.status("/sdlora/captions/set", body) == 403
    assert not (outside / "bee.txt").exists()


def test_the_queue_survives_a_killed_server(
    driver: Any, tmp_path: Path, wait: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    shutil.copytree(ROOT / "datasets" / "ink-icons", tmp_path / "training-images" / "few", ignore=few)
    port = free_port()
    page = Page(driver, start_server(tmp_path, port=port))
    request.addfinalizer(page.server.end)
    page.open()
    open_folder(page, "few")
    page.click("#train-on-it")
    page.one("#start-training")
    wait(lambda: page.one(NAME).get_attribute("value") == "few")
    use_mini(page)
    unfold(page, "#more", "#more-training", "#more-sample")
    page.type("#set-training-steps textarea, #set-training-steps input", "50000")
    page.type("#set-sample-prompts textarea", "[]")
    for name in ("first", "second"):
        page.type(NAME, name)
        page.click("#start-training")
        wait(lambda name=name: name in [job["name"] for job in page.server.ask("/sdlora/jobs")["jobs"]])
    wait(lambda: page.server.ask("/sdlora/jobs")["jobs"][0]["step"] > 0)
    page.server.kill()

    page = Page(driver, start_server(tmp_path, port=port))
    request.addfinalizer(page.server.end)
    jobs = page.server.ask("/sdlora/jobs")["jobs"]
    assert [(job["name"], job["status"]) for job in jobs] == [("first", "running"), ("second", "waiting")]
    step = jobs[0]["step"]
    wait(lambda: page.server.ask("/sdlora/jobs")["jobs"][0]["step"] > step)
    page.open()
    page.tab(1)
    page.click(f".sd-job[data-job='{jobs[1]['id']}'] .sd-job-name")
    page.click("button[data-what=delete]")
    page.click("#sd-confirm")
    wait(lambda: len(page.all(".sd-job")) == 1)
    page.click("button[data-what=log]")
    wait(lambda: "steps" in page.one(".sd-dialog .sd-log").text)
    page.click(".sd-dialog .sd-button")
    page.click("button[data-what=stop]")
    page.one(".sd-job.stopped")
    assert list((tmp_path / "runs" / "first" / "checkpoints").iterdir())
    page.click("button[data-what=clone]")
    wait(lambda: page.one(NAME).get_attribute("value") == "first-2")
    page.click("button[data-what=resume]")
    page.one(".sd-job.running")


def test_images_of_a_data_set_are_curated_with_the_keyboard(page: Page, wait: Callable[..., Any]) -> None:
    folder = page.server.home / "training-images" / "bench"
    shutil.copytree(ROOT / "datasets" / "ink-icons", folder, ignore=few)
    page.open()
    open_folder(page, "bench")
    page.click("button[aria-label='Open bee.png']")
    viewer = page.one("dialog.sd-viewer[open]")
    wait(lambda: "image=bee.png" in page.driver.current_url)
    viewer.send_keys("\ue014")  # the right arrow
    wait(lambda: "image=candle.png" in page.driver.current_url)
    viewer.send_keys("x")
    wait(lambda: not (folder / "candle.png").exists())
    assert (folder / ".sdlora-excluded" / "candle.png").exists()
    wait(lambda: "image=cheese.png" in page.driver.current_url)
    viewer.send_keys("\ue017")  # Delete
    wait(lambda: not (folder / "cheese.png").exists() and not (folder / "cheese.txt").exists())
    wait(lambda: "image=dog.png" in page.driver.current_url)
    viewer.send_keys("e")
    page.one(".sd-viewer-side textarea:focus").send_keys("!\ue00c")  # Escape leaves the caption alone
    wait(lambda: (folder / "dog.txt").read_text().strip() == "inkicon, an icon of a dog!")
    assert page.all("dialog.sd-viewer[open]")
    viewer.send_keys("m")
    page.click("#mask-background")
    page.click("#mask-save")
    wait(lambda: (folder / ".masks" / "dog.png").exists())
    about = f"folder={folder}&name=dog.png&tab={page.js('return sessionStorage.getItem(`sdlora-tab`)')}"
    wait(lambda: page.server.ask(f"/sdlora/workbench/mask?{about}")["used"])  # the training form names it
    page.driver.back()
    wait(lambda: not page.all("dialog.sd-viewer[open]"))
    page.one("#sd-history summary").send_keys("\ue007")
    wait(lambda: "cheese.png deleted" in page.one("#sd-history").text)
    for file in (folder / "candle.png", folder / "cheese.png"):
        assert not file.exists()
    page.click("#sd-history .sd-apart:last-child button")
    wait(lambda: (folder / "candle.png").exists() and (folder / "cheese.txt").exists())
    assert (folder / "dog.txt").read_text().strip() == "inkicon, an icon of a dog" and not (
        folder / ".masks" / "dog.png"
    ).exists()


def test_several_images_are_drawn_seen_large_and_linked_to(page: Page, wait: Callable[..., Any]) -> None:
    from safetensors.torch import save_file
    from torch import ones

    page.open()
    page.tab(2)
    wait(lambda: page.driver.current_url.endswith("#generate"))
    page.type("#prompt textarea", "an icon of two cats")
    page.click("#draw-more > button")
    page.type("#steps input", "1")
    page.type("#count input", "2")
    page.click("#draw")
    wait(lambda: len(page.all("#drawn .sd-grid img")) == 2)
    newest = f".sd-thumb[title='{drawn_images(page)[-1].name}']"
    page.click(newest)
    viewer = page.one("dialog.sd-viewer[open]")
    link = wait(lambda: "image=" in page.driver.current_url and page.driver.current_url)
    viewer.send_keys("\ue014")  # the right arrow: the older one
    wait(lambda: page.driver.current_url != link and "image=" in page.driver.current_url)
    page.driver.back()
    wait(lambda: not page.all("dialog.sd-viewer[open]"))
    page.driver.back()
    wait(lambda: page.all("#dataset-folder"))
    page.driver.get(link)
    page.driver.refresh()
    wait(lambda: drawn_images(page)[-1].name in page.one("dialog.sd-viewer[open]").text)
    page.one("dialog.sd-viewer[open]").send_keys("u")
    wait(lambda: page.one("#prompt textarea").get_attribute("value") == "an icon of two cats")

    file = page.server.home / "dropped style.safetensors"
    save_file({"lora_unet_x.lora_up.weight": ones(2, 2)}, file, {"modelspec.trigger_phrase": "quillwort"})
    page.driver.find_element("css selector", "#drop-adapter input[type=file]").send_keys(str(file))
    wait(lambda: page.one("#adapter-0 input").get_attribute("value") == "exported/dropped style")
    page.click("#browse-adapters")
    page.one(".sd-find").send_keys("quillwort")  # no other adapter's
    wait(lambda: len(page.all(".sd-adapter")) == 1 and "dropped style" in page.one(".sd-adapter").text)


# Every text in the document, folded ones too, but for what the queue says now, and fields that nobody sees.
TEXTS = """
const LEFT = "script, style, sd-jobs, #plan, #sd-said, [translate=no], [id^=chosen-], #try-run, #export-run, "
  + "#clone-run, #import-png, #reset-setting, #use-masks, #tab-word, #preview-rows";
const texts = [], nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (nodes.nextNode()) {
  const { data, parentElement } = nodes.currentNode;
  if (data.trim() && !parentElement.closest(LEFT)) texts.push(data);
}
for (const one of document.querySelectorAll("[placeholder], [title], [aria-label]"))
  if (!one.closest(LEFT))
    texts.push(...["placeholder", "title", "aria-label"].map((name) => one.getAttribute(name)).filter(Boolean));
return texts;
"""  # noqa: E501


def test_the_page_is_read_in_chinese_and_in_english_again(page: Page) -> None:
    def texts() -> list[str]:
        return list(page.js(TEXTS))

    page.open()
    page.click(".sd-language")
    try:
        for number in range(4):
            page.tab(number)
            with suppress(AssertionError):
                wait_for(lambda: not left_in_english(texts()), "every text in Chinese")
            assert left_in_english(texts()) == []
            assert page.js("return document.documentElement.lang") == "zh-CN"
        in_chinese = texts()
        page.click(".sd-language")
        wait_for(lambda: not re.search("[\u4e00-\u9fff]", "".join(texts())), "every text in English")
        in_english = texts()
        page.click(".sd-language")
        wait_for(lambda: texts() == in_chinese, "the same in Chinese")
        page.click(".sd-language")
        wait_for(lambda: texts() == in_english, "the same in English")
    finally:
        page.js("localStorage.removeItem('sdlora-language')")


def left_in_english(texts: list[str]) -> list[str]:
    """Return those that are English words: two in a row, and nothing Chinese beside them."""
    words = re.compile(r"[A-Za-z]{2,} [a-z]{2,}")
    return [
        text
        for text in texts
        if words.search(text)
        and not re.search("[\u4e00-\u9fff]", text)
        and text.strip() not in NAMES_THAT_STAY
    ]


NAMES_THAT_STAY = ("Clip skip", "in loop", "file name", "inkicon, an icon of a cat", "Euler trailing")


def test_previews_are_seen_large_by_step_and_prompt_with_the_keyboard(
    page: Page, wait: Callable[..., Any]
) -> None:
    job = put_run(page.server.home, "looked-at", 40)
    page.driver.get(f"{page.server.url}/?seen#train?run={job}")
    page.click(".sd-previews tbody tr:last-child td:last-child a")  # the first step's second prompt
    wait(lambda: previewed(page) == "step-000010-2.png")
    assert "preview 1 of 4, prompt 2 of 2" in page.one(".sd-preview").text
    for key, seen in (
        ("\ue014", "step-000020-2.png"),  # right
        ("\ue013", "step-000020-1.png"),  # up
        ("\ue010", "step-000040-1.png"),  # End
        ("\ue014", "step-000040-1.png"),  # right: there is no later one
        ("\ue015", "step-000040-2.png"),  # down
        ("\ue012", "step-000030-2.png"),  # left
        ("\ue011", "step-000010-2.png"),  # Home
    ):
        page.driver.switch_to.active_element.send_keys(key)
        wait(lambda seen=seen: previewed(page) == seen)
    assert "prompt b of looked-at" in page.one(".sd-preview").text
    wait(lambda: "image=10-2" in page.driver.current_url)
    page.driver.back()
    wait(lambda: not page.all(".sd-preview"))
    page.driver.get(f"{page.server.url}/?linked#train?run={job}&image=30-1")
    wait(lambda: previewed(page) == "step-000030-1.png")
    page.driver.switch_to.active_element.send_keys("\ue00c")  # Esc
    wait(lambda: not page.all(".sd-preview") and "image=" not in page.driver.current_url)


def previewed(page: Page) -> str:
    """Return the file that the viewer of previews shows, when it is there."""
    script = """
    const image = document.querySelector(".sd-preview[open] img.sd-large");
    return image && image.complete && image.naturalWidth ? new URL(image.src).searchParams.get("path") : "";
    """
    return Path(str(page.js(script))).name


def test_curves_are_smoothed_zoomed_and_laid_over_each_other(page: Page, wait: Callable[..., Any]) -> None:
    from selenium.webdriver import ActionChains

    put_run(page.server.home, "other-run", 60)
    job = put_run(page.server.home, "this-run", 40)
    page.driver.get(f"{page.server.url}/?curves#train?run={job}")
    wait(lambda: page.one(".sd-plot svg").get_attribute("aria-label").startswith("Loss over 40 steps"))
    line = page.one(".sd-plot path.smooth").get_attribute("d")
    page.one(".sd-smooth").send_keys("\ue011")  # Home: no smoothing at all
    raw = page.one(".sd-plot path.raw").get_attribute("d")
    wait(lambda: page.one(".sd-plot path.smooth").get_attribute("d") == raw != line)
    page.click(".sd-log-scale")
    wait(lambda: page.one(".sd-plot path.raw").get_attribute("d") != raw)

    plot = page.found(".sd-plot")
    drag = ActionChains(page.driver).move_to_element_with_offset(plot, 0, 0)
    drag.click_and_hold().move_by_offset(plot.size["width"] // 4, 0).release().perform()
    wait(lambda: 10 <= len(raw_steps(page)) < 25)  # the middle to three quarters, and nothing else
    page.one(".sd-plot svg").send_keys("0")
    wait(lambda: len(raw_steps(page)) == 40)
    assert not page.all(".sd-whole")

    page.click(".sd-others summary")
    listed = page.all(".sd-others-list label")  # with those of other tests
    next(label for label in listed if "other-run" in label.text).find_element("css selector", "input").click()
    wait(lambda: len(page.all(".sd-plot path.smooth")) == 2)
    assert page.one(".sd-figure figcaption").text.split()[:2] == ["this-run", "other-run"]


def raw_steps(page: Page) -> list[str]:
    """Return the points of the losses that are in the plot, none of them smoothed."""
    return re.findall(r"[ML][^ML]+", page.one(".sd-plot path.raw").get_attribute("d") or "")


def test_waiting_runs_are_ordered_and_given_a_time(page: Page, wait: Callable[..., Any]) -> None:
    tomorrow = time.time() + 86_400
    first = put_run(page.server.home, "first", 4, status="waiting", not_before=tomorrow)
    second = put_run(page.server.home, "second", 4, status="waiting", not_before=tomorrow)
    page.driver.get(f"{page.server.url}/?queue#train?run={second}")
    wait(lambda: waiting_names(page) == ["first", "second"])
    assert "waiting until" in page.one(f"[data-job='{first}']").text
    wait(lambda: {"processor", "memory", "disk"} <= set(page.one("sd-device").text.split()))
    page.click(f"[data-what='move-1-{second}']")
    wait(lambda: waiting_names(page) == ["second", "first"])
    page.driver.refresh()
    wait(lambda: waiting_names(page) == ["second", "first"])

    field = page.one("#sd-until")
    wait(lambda: field.get_attribute("value"))
    page.js("document.querySelector('#sd-until').value = '2026-12-24T06:00'")
    page.click("[data-what=wait]")
    asked = "return new Date('2026-12-24T06:00').getTime() / 1000"
    wait(lambda: page.server.ask(f"/sdlora/jobs/{second}")["not_before"] == page.js(asked))
    page.click("[data-what=stop]")
    wait(lambda: waiting_names(page) == ["first"])
    page.server.ask(f"/sdlora/jobs/{first}/stop", {})


def waiting_names(page: Page) -> list[str]:
    """Return the waiting runs in the order in which the page shows them."""
    script = "return [...document.querySelectorAll('.sd-job.waiting strong')].map((one) => one.textContent)"
    return list(page.js(script))


NOTIFICATIONS = """
window.told = [];
window.Notification = class {
  static permission = "default";
  static requestPermission() { this.permission = "granted"; return Promise.resolve("granted"); }
  constructor(title, options) { window.told.push([title, options.body]); }
};
"""


def test_a_run_that_ends_is_told_when_that_was_asked_for(page: Page, wait: Callable[..., Any]) -> None:
    job = put_run(page.server.home, "ends-soon", 4, status="waiting", not_before=time.time() + 86_400)
    page.driver.get(f"{page.server.url}/?told#train?run={job}")
    page.js(NOTIFICATIONS)
    page.one("[data-what=notify]")
    assert page.js("return window.told.length + (Notification.permission === 'granted')") == 0
    page.click("[data-what=notify]")
    wait(lambda: page.one("[data-what=notify]").get_attribute("aria-pressed") == "true")
    page.js("Document.prototype.hasFocus = () => false; document.hasFocus = () => false")  # nobody looks
    wait(lambda: page.all(f".sd-job.waiting[data-job='{job}']"))
    file = page.server.home / "runs" / ".sdlora-ui" / "jobs" / job / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "finished"}))
    wait(lambda: page.js("return window.told") == [["ends-soon", "The run is finished"]])
    assert page.driver.title == "✓ ends-soon"
    page.js("document.hasFocus = () => true; window.dispatchEvent(new Event('focus'))")
    wait(lambda: page.driver.title == "sdlora")
    page.click("[data-what=notify]")
    wait(lambda: page.one("[data-what=notify]").get_attribute("aria-pressed") == "false")


def test_a_negative_prompt_of_ones_own_is_kept_chosen_and_removed(
    page: Page, wait: Callable[..., Any]
) -> None:
    page.open("?negative")
    page.tab(2)
    unfold(page, "#draw-more")
    field, name = "#negative textarea", "#negative-name textarea, #negative-name input"
    page.type(field, "mud, fog")
    page.js("document.activeElement.blur()")  # the next field is a list, which opens over the button
    page.click("#negative-keep")
    wait(lambda: "write one and a name for it" in page.text())
    page.type(name, "dull days")
    page.click("#negative-keep")
    wait(lambda: "write one and a name for it" not in page.text())
    page.type(field, "fog")
    choose(page, wait, "#negative-preset input", "dull days (yours)")
    wait(lambda: page.one(field).get_attribute("value") == "fog, mud")

    page.open("?later")  # it is there for every page of this machine
    page.tab(2)
    unfold(page, "#draw-more")
    choose(page, wait, "#negative-preset input", "dull days (yours)")
    wait(lambda: page.one(name).get_attribute("value") == "dull days")
    page.click("#negative-remove")
    wait(lambda: page.one(name).get_attribute("value") == "")
    kept = json.loads((page.server.home / "settings" / "sdlora" / "page.json").read_text())
    assert kept["negatives"] == {}


def test_previews_are_written_as_a_table_of_prompts(page: Page, wait: Callable[..., Any]) -> None:
    page.open("?prompt-rows")
    page.tab(1)
    unfold(page, "#more")
    unfold(page, "#more-sample")
    lines, row = "#set-sample-prompts textarea", "sd-prompts tbody tr:last-child [data-column='{}']"
    page.type(lines, "a cat --d 7 --n blurry --am 0.5")
    wait(lambda: len(page.all("sd-prompts tbody tr")) == 1)
    shown = {name: page.one(row.format(name)).get_attribute("value") for name in ("prompt", "d", "w", "am")}
    assert shown == {"prompt": "a cat", "d": "7", "w": "", "am": "0.5"}
    page.click("[data-what=add-prompt]")
    wait(lambda: len(page.all("sd-prompts tbody tr")) == 2)
    page.type(row.format("prompt"), "a dog")
    page.type(row.format("w"), "64")
    page.type(row.format("h"), "32")
    wait(
        lambda: (
            page.one(lines).get_attribute("value") == "a cat --d 7 --n blurry --am 0.5\na dog --w 64 --h 32"
        )
    )
    wait(lambda: page.one("#set-sample-prompt-options input").get_attribute("value") == "true")
    page.click("sd-prompts tbody tr:first-child button")
    wait(lambda: page.one(lines).get_attribute("value") == "a dog --w 64 --h 32")
