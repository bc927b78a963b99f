"""Every text of the page is in the table of every language, and no entry of a table is for nothing."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from sdlora_ui.app import build, quiet
from sdlora_ui.forms import NOT_FOR_A_BROWSER, settings
from sdlora_ui.languages import in_each_language
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site
from sdlora_ui.words import FIRST_LABELS

from sdlora.config.presets import presets

WEB = ROOT / "ui" / "web"
TABLES = sorted(WEB.glob("*-*.json"))
STAY = {
    "sdlora", "diffusers", "PEFT", "my-images", "my-style", "owner/name", "inkicon, an icon of a cat",
    "ties", "dare", "dare-ties", "https://huggingface.co", "0.35 character=0.85", "English",
    "file name", "512 px (SD 1.5)", "768 px (SD 2)", "1024 px (SDXL)",
}  # fmt: skip
"""Names, examples of what is typed, and values that commands take: the same in every language."""
GRADIO = {
    *("File upload", "Drop File Here", "- or -", "or", "Click to Upload", "Info", "Warning", "Error"),
    *("number input for {A}", "range slider for {A}", "Reset to default value"),
}
"""Words of Gradio itself."""
COMPOSED = (
    "Switch to the dark look",
    "Switch to the light look",
    "from folder name",
    "guidance `x`: give a number, or leave it empty",
    "seed: give a number",
    "steps `x`: give a whole number, or leave it empty",
    "across `x`: give one of strength, seed with values, e.g. strength=0, 0.5, 1",
    "base: choose one, e.g. mini",
    "vae: choose one",
    "there are only 9 images, by 2 processes",
    "about 80 looks at each of 43 images, by 2 processes",
    "about 80 looks at each of 43 images",
    "64x48 px is tiny: enlarged 8.0 times for 512 px, which trains blur",
    "640x480 px is enlarged 1.6 times for 1024 px",
    "1000x100 px has an extreme aspect ratio of 10.0:1: 33% of it is cropped away",
    "33% of it is cropped away (640x480 px to 64x64)",
    "is the same file as a.png, so it counts twice; and their captions differ",
    "has an empty caption file: its caption is only the trigger word `ink`",
    "has an empty caption file: it trains without a caption",
    "`data.sources[0] (faces).trigger_word` has no effect: regularisation images get none",
    "“LoRA > Scaling” = rslora has no effect on LoKr's full factors; use standard",
    "“LoRA > Init” = pissa cannot be undone in a DoRA file; use adapter.kind=lora",
    "fotos: there is no such folder or file; did you mean photos?",
    "fotos: there is no such folder or file; the nearest one that there is: training-images",
    "a.png: holds no `parameters` text; give a PNG that sdlora or WebUI wrote",
    "“Images > Crop” has no effect without “Images > Flip” or “Images > Buckets”",
    "no usable image among 3 file(s) (a.txt: is no image); drop PNG, JPEG or WebP files",
    "reading the base mini and the images …",
    "checking that it is possible: reading the base mini and the images …",
    "`adapter.init=pissa` cannot be undone in a DoRA file; use adapter.kind=lora",
    "`adapter.scaling=rslora` has no effect on LoKr's full factors; use standard",
    "`sample.prompts`: name of the preset: give it one",
    "The machine could not be examined (timeout); run `sdlora doctor` in a shell.",
    "training.attention: sdpa (torch's own fused attention is the fastest general one on cpu)",
    "training.precision: fp32",
    "training.device: cpu",
    "2 errors, 1 warning, 3 notes",
    "12 settings taken. It changed:",
    "12 settings taken. Nothing had to change.",
    *(f"Preset {preset.name}: {preset.about}. It changed:" for preset in presets() if not preset.users),
    *(preset.about for preset in presets() if not preset.users),
    "The same prompts and seeds in every cell; below, its score with its 90 % interval. Click for large; "
    "full images lie in the folder",
    "Style: 0 looks like the base, 1 like the training images. Subject kept: 1 is the base\u2019s own "
    "drawing of the same prompt and seed, 0 is like that of any other prompt. The score is their product. "
    "Drift: how far prompts without the trigger word went towards the style.",
    "beside this page.",
    "Score by step",
    "Held-out loss against the base by step",
    "score, 90 % interval 0.55 to 0.66",
    "0.61 (0.55 to 0.66)",
    "step 100: 0.61 (0.55 to 0.66)",
    "step 200 at strength 0.9",
    "wine: step 200 at strength 0.9",
    "200 of 300",
    *(
        f"score 0.61 (0.55 to 0.66): style 0.61{kept}; {word} the runner-up, step 100 at strength 1 "
        "(0.60 (0.55 to 0.65))"
        for kept in ("", ", subject kept 0.61")
        for word in ("surely above", "not to be told from")
    ),
    *(f"score 0.61 (0.55 to 0.66): style 0.61{kept}" for kept in ("", ", subject kept 0.61")),
    *(
        f"the weights as learned have the score 0.61 (0.55 to 0.66), {word} their average's 0.60 "
        f"(0.55 to 0.65): the {which} the adapter"
        for word, which in (("surely above", "weights as learned are"), ("not surely above", "average is"))
    ),
    "3 of 40 images",
    "cheese.png deleted",
    "3 images excluded",
    "a.txt: is not UTF-8 text (byte 12 is not)",
    "the base mini recommends 0.002 for AdamW, of which this optimizer takes 0.3",
    "is a JPEG XL image, which needs the package pillow-jxl-plugin",
    *("fotos: no such folder; check the path", "no such folder; check the path"),
    "no such folder; download it first",
    "fotos: is empty; put images there (.png, .jpg)",
    "fotos: holds no images, only 2 files without ending, 1 .zip, which can be unpacked; put images there",
    "fotos: holds no images, only 3 folder(s); put images there (.png, .jpg)",
    "a.png: has damaged metadata, which is left out; its pixels are whole",
    "metadata.csv line 3: names cup.png again, after metadata.csv line 2; delete one of the lines",
    "meta.csv: has no column `text` (it has nothing else); name its caption column in data.metadata_caption",
    "masks: 4 of 5 images have no mask and are trained whole",
    *(
        f"{where}{mask} lets nothing through in the part of the image that is kept; correct the mask, or "
        "give a `focus` that says which part to keep"
        for mask in ("its mask", "it is transparent where it is kept: its mask")
        for where in ("", "a.png: ")
    ),
)
"""What is put together of several texts in the code, as a user reads it."""
# what these say is for a shell, for the log, or for a request that the page never makes
NOT_SHOWN = ("app.py", "start.py", "passwords.py", "progress.py", "jobs.py:_", "tasks/")
PROSE = ("data/check/findings.py", "config/contradictions.py", "config/defaults.py")
# what reads a folder, but for its index and the parts that say nothing
READING = sorted(
    {file.name for file in (ROOT / "sdlora" / "data" / "reading").glob("*.py")}
    - {"index.py", "measure.py", "problems.py"}
)
NAME = re.compile(r"\{([0-9a-zA-Z])\}")
NUMBER = r"[-+]?[\d.,:/\xd7x ]*\d%?"


@cache
def keys(file: Path) -> tuple[str, ...]:
    table = json.loads(file.read_text(encoding="utf-8"))
    return (*table["names"], *table["page"])


def pattern(key: str) -> str:
    """Return a key as a regular expression; what must be in the table itself has a name."""
    parts = NAME.split(key)
    text = re.escape(parts[0])
    for count, (name, literal) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        text += NUMBER if name.isdigit() else f"(?P<w{count}>.+?)" if name.isupper() else "(?:.*?)"
        text += re.escape(literal)
    return text


@cache
def patterns(file: Path) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern(key), re.DOTALL) for key in keys(file) if NAME.search(key))


def translated(file: Path, text: str) -> bool:
    """Tell whether a text, in which ``{}`` may stand for something, has a translation."""
    text = " ".join(text.split())
    if text in STAY or not re.search("[A-Za-z]", text) or text in keys(file):
        return True
    if "{}" in text and any(plain(key) == plain(text) for key in keys(file)):
        return True
    for entry in patterns(file):
        for tried in (text, text.replace("{}", "7")):
            if (match := entry.fullmatch(tried)) and all(
                translated(file, part) for part in match.groupdict().values()
            ):
                return True
    return False


def composed(text: str) -> bool:
    """Tell whether a text of the code is a part of :data:`COMPOSED`."""
    pieces = [re.escape(piece) for piece in re.split(r"\{\w?\}", text)]
    return any(re.search(".+?".join(pieces), whole) for whole in COMPOSED)


def plain(text: str) -> str:
    """Return a text or a key with one sign for each thing that is filled in, quoted or not."""
    return re.sub(r"\{\w?\}", "{}", text).replace("`{}`", "{}").replace("`{}={}`", "{}")


class Texts(HTMLParser):
    """The texts of HTML, outside of what stays as it is."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.stays = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stays += self.stays > 0 or dict(attrs).get("translate") == "no"

    def handle_endtag(self, tag: str) -> None:
        self.stays -= self.stays > 0

    def handle_data(self, data: str) -> None:
        if not self.stays:
            self.found.append(data)


@pytest.fixture(scope="module")
def page_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    quiet(home / "uploads")
    folders = {name: Path(name) for name in ("runs", "images", "data")}
    config: dict[str, Any] = build(Site.open(AllowedPaths.of(home, local=True, **folders))).get_config_file()
    return config


def texts_of(config: dict[str, Any]) -> set[str]:
    values = {choice for setting in settings() for choice in setting.choices}
    texts: set[str] = set()
    for part in config["components"]:
        props = part["props"]
        if props.get("visible") == "hidden":
            continue
        texts |= {props[name] for name in ("label", "info", "placeholder") if props.get(name)}
        listed = [
            choice[0] if isinstance(choice, list | tuple) else choice for choice in props.get("choices") or []
        ]
        texts |= {label for label in listed if label not in values and "/" not in label}
        if part["type"] == "button":
            texts.add(props["value"])
        if part["type"] == "html" and props.get("value"):
            texts |= set(Texts(props["value"]).found)
    samplers = {choice for choice in texts if choice in SAMPLERS}
    return texts - samplers


SAMPLERS = {choice for setting in settings() if setting.key == "sample.sampler" for choice in setting.choices}


def literal(node: ast.AST) -> str | None:
    """Return the text that an expression writes, with ``{}`` for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


SAYING = {"problem", "hint", "working", "Info", "Warning", "progress"}


def said_by(file: Path) -> Iterator[str]:
    """Yield what a file's errors, remarks and notes say."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SAYING or name in (
            "ConfigError",
            "DatasetError",
            "OutputError",
            "ModelError",
            "PathRefused",
        ):
            yield from (text for argument in node.args if (text := literal(argument)) and " " in text)


def prose_of(file: Path, raised: bool = False) -> Iterator[str]:
    """Yield every text with a space in it, docstrings and, unless asked for, raised errors left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    passed: set[int] = set()
    for node in ast.walk(tree):
        if (isinstance(node, ast.Raise) and not raised) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            passed |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.JoinedStr):
            passed |= {id(inner) for part in node.values for inner in ast.walk(part)}
    for node in ast.walk(tree):
        text = literal(node)
        if id(node) not in passed and text and " " in text.strip():
            yield text


JS_TEXT = re.compile(r'"((?:[^"\\\n]|\\.)*)"|`([^`\\]*)`')
NO_TEXT = re.compile(
    r"^(sd-|rgb|key \w+$|\.?\w+=|[#.\[:(@*]|/|button\b|input\b|label\b|details$|\w+\?|\$\{|application/|"
    r"and \$|--|width:|left:|0 0)|[<>{};=]{2}|:is\(|textarea|\[data-|^\w+-\$|sd-\w+ |^M$|sdlora-"
)


def texts_in_js(file: Path) -> Iterator[str]:
    """Yield the sentences in a script: quoted texts of several words, and ``{}`` for what is filled in."""
    code = re.sub(r"^\s*//.*$|\s//\s.*$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for match in JS_TEXT.finditer(code):
        text = re.sub(r"\$\{[^{}]*\}", "{}", match[1] if match[1] is not None else match[2])
        if " " in text.strip() and re.search(r"[a-z]{2}", text) and not NO_TEXT.search(text):
            yield text.strip()


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
class TestTable:
    """Of one language."""

    def test_what_the_page_is_built_of_is_in_it(self, file: Path, page_config: dict[str, Any]) -> None:
        missing = sorted(text for text in texts_of(page_config) if not translated(file, text))
        assert missing == []

    def test_labels_and_help_of_settings_are_in_it(self, file: Path) -> None:
        shown = [setting for setting in settings() if setting.key not in (*FIRST_LABELS, *NOT_FOR_A_BROWSER)]
        assert len(shown) > 100
        texts = {text for setting in shown for text in (setting.label, setting.help)}
        assert sorted(text for text in texts if not translated(file, text)) == []

    def test_what_the_pages_own_elements_say_is_in_it(self, file: Path) -> None:
        texts = {text for script in WEB.glob("*.js") for text in texts_in_js(script)}
        assert len(texts) > 80
        assert sorted(text for text in texts if not translated(file, text)) == []

    def test_what_the_pages_own_code_reports_is_in_it(self, file: Path) -> None:
        sources = [
            source
            for source in (ROOT / "ui").rglob("*.py")
            if not any(part in source.as_posix() for part in NOT_SHOWN)
        ]
        texts = {text for source in sources for text in said_by(source)}
        assert len(texts) > 90
        missing = [text for text in texts if not composed(text) and not translated(file, text)]
        assert sorted(missing) == []

    def test_findings_reasons_and_contradictions_are_in_it(self, file: Path) -> None:
        texts = {text for name in PROSE for text in prose_of(ROOT / "sdlora" / name)}
        assert len(texts) > 90
        missing = [text for text in texts if not composed(text) and not translated(file, text)]
        assert sorted(missing) == []

    def test_what_is_said_of_a_folders_files_is_in_it(self, file: Path) -> None:
        reading = ROOT / "sdlora" / "data" / "reading"
        texts = {text for name in READING for text in prose_of(reading / name, raised=True)}
        sentences = {text for text in texts if not re.search(r"\(\?|[{}] [{}]", text)}  # no expressions
        assert len(sentences) > 80
        missing = [text for text in sentences if not composed(text) and not translated(file, text)]
        assert sorted(missing) == []

    def test_what_is_put_together_is_in_it(self, file: Path) -> None:
        assert [text for text in COMPOSED if not translated(file, text)] == []

    @pytest.mark.long
    def test_no_entry_is_for_nothing(self, file: Path, page_config: dict[str, Any]) -> None:
        sources = [*(ROOT / "ui").rglob("*.py"), *(ROOT / "sdlora").rglob("*.py")]
        trees = [ast.parse(source.read_text(encoding="utf-8")) for source in sources]
        written = {text for tree in trees for node in ast.walk(tree) if (text := literal(node))}
        written |= {text for setting in settings() for text in (setting.label, setting.help)}
        written |= texts_of(page_config)
        everything = " ".join("\n".join(written).split())
        everything += "\n".join(script.read_text(encoding="utf-8") for script in WEB.glob("*.js"))
        unused = [
            key
            for key in keys(file)
            if key not in GRADIO and not any(re.fullmatch(pattern(key), whole) for whole in COMPOSED)
            for piece in re.split(r"`?\{\w\}`?", key)
            if re.search("[A-Za-z]{2}", piece) and piece.strip(" .;,:()").removesuffix("s") not in everything
        ]
        assert unused == []

    def test_it_can_be_chosen(self, file: Path) -> None:
        for script in ("words.js", "language.js"):
            assert f'"{file.stem}"' in (WEB / script).read_text(encoding="utf-8")
        assert f'<span lang="{file.stem}">' in in_each_language("Log in")
        assert in_each_language("Log in").count("Log in") == 1

    def test_translations_name_what_their_texts_name(self, file: Path) -> None:
        table = json.loads(file.read_text(encoding="utf-8"))
        wrong = []
        for text, translation in (*table["names"].items(), *table["page"].items()):
            codes = [sorted(re.findall(r"`[^`]*`", words)) for words in (text, translation)]
            names = [set(NAME.findall(text)), set(NAME.findall(translation))]
            stays = text in (
                "LoRA",
                "Alpha",
                "Betas",
                "Epsilon",
                "Clip skip",
                "Huber c",
                "Min snr gamma",
                "Vae",
            )
            same = text == translation and not stays and not NAME.search(text)
            if codes[0] != codes[1] or names[0] != names[1] or same:
                wrong.append(text)
        assert wrong == []
        assert len(table["page"]) > 800
