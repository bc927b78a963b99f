"""Every text from outside is parsed in time that grows as its length does, whatever it holds."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import SCALE

from sdlora.adapters.strength import parse_adapter
from sdlora.config.toml import load_config
from sdlora.data.reading import wording
from sdlora.data.reading.captions import with_trigger
from sdlora.data.reading.items import ImageItem, Visit
from sdlora.data.reading.metadata_files import read_focus, read_row, rows_of
from sdlora.data.reading.wording import Wording
from sdlora.errors import ConfigError, SdloraError
from sdlora.families.emphasis import escape, layout, parse
from sdlora.generation.png_info import parse_parameters

LENGTH = 100_000
SECONDS = 3.0 * SCALE
"""Of processor time; each parser takes a tenth of it at most, and minutes where it is quadratic."""
WORDING = Wording(shuffle=True, keep=1, tag_dropout=0.1, wildcards=True)
PATTERNS = {
    "blanks": " ",
    "tabs": "\t ",
    "letters": "a",
    "words": "a b ",
    "colons": "a:",
    "quotes": 'ab:"',
    "escaped quotes": 'ab: "\\" ',
    "commas": "a, ",
    "round": "(",
    "round with words": "(a ",
    "square": "[a",
    "closing": "a)",
    "weights": "(a:1.1",
    "digits": "1",
    "digits after a colon": ":1",
    "BREAK": " BREAK",
    "blanks and BREAK": "  \n BREAKs ",
    "literals": "\\(",
    "braces": "{",
    "braces with words": "{a|",
    "closing braces": "a}",
    "tags": "<lora:a:1:",
    "tags without end": "<lora:",
    "separators": " | ",
    "lines": "a\n",
    "brackets": "[[",
    "keys": "a.",
    "csv": 'a,"b',
}


def worded(caption: str) -> str:
    item = ImageItem(Path("a.png"), caption, 8, 8, 1, "0" * 64, "a.png", lines=(caption,))
    return WORDING.at(item, Visit(0, 0, 0), seed=0)


def refused(call: Callable[[], object]) -> str:
    try:
        return str(call())
    except SdloraError as error:
        return str(error)


PARSERS: dict[str, Callable[[str], object]] = {
    "PNG text": lambda text: refused(lambda: parse_parameters(f"cat\n{text}")),
    "prompt": parse,
    "escaped prompt": escape,
    "chunks": lambda text: layout(text, lambda part: [1] * len(part), 2),
    "caption at a visit": worded,
    "trigger word": lambda text: with_trigger(text, "inkicon"),
    "CSV": lambda text: [read_row(row, "", None) for _, row in rows_of(f"file_name,text\n{text}", "a.csv")],
    "JSON lines": lambda text: [read_row(row, "", None) for _, row in rows_of(text, "a.jsonl")],
    "adapter": lambda text: refused(lambda: parse_adapter(f"a.safetensors{text}")),
    "setting": lambda text: refused(lambda: load_config(None, [f"sample.negative_prompt={text}"])),
}


@pytest.mark.parametrize("parser", PARSERS)
def test_a_text_of_any_kind_is_parsed_at_once(parser: str) -> None:
    slow = []
    for name, pattern in PATTERNS.items():
        text = pattern * (LENGTH // len(pattern))
        begun = time.process_time()
        PARSERS[parser](text)
        if (seconds := time.process_time() - begun) > SECONDS:
            slow.append(f"{name}: {seconds:.1f} s")
    assert slow == []


_RE_PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""What A1111's WebUI searches a line of settings with (modules/infotext_utils.py)."""


def test_pairs_are_those_that_webui_finds() -> None:
    draw, num_lines = random.Random(5), 0
    for _ in range(60_000):
        line = "".join(draw.choice('ab1_ -/:::,,"\\\té') for _ in range(draw.randint(1, 40))).strip()
        pairs = _RE_PARAM.findall(line)
        if len(pairs) < 3:
            continue
        num_lines += 1
        read = parse_parameters(f"x\n{line}")
        assert set(read) == {"Prompt", "Negative prompt", *(name for name, _ in pairs)}, line
        for name, value in dict(pairs).items():
            plain = value.strip()
            if not (len(plain) >= 2 and plain[0] == plain[-1] == '"'):
                assert read[name] == plain, line
    assert num_lines > 300


@pytest.mark.parametrize("separator", [",", ", ", " ", "|", " | ", "ab"])
def test_a_split_at_separators_is_the_one_of_the_expression(separator: str) -> None:
    draw = random.Random(7)
    expression = re.compile(rf"(\s*{re.escape(separator)}\s*)")
    for _ in range(2000):
        text = "".join(draw.choice("ab ,|\n") for _ in range(draw.randint(0, 14))).strip()
        assert wording.split_words(text, separator) == expression.split(text), text


@pytest.mark.parametrize(
    "text", ["[" * 400_000, "1" * 5_000, '{"a":' * 100_000, "[" * 5_000 + "]" * 5_000, "9" * 300_000]
)
def test_deep_or_endless_values_are_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"[sample]\nnegative_prompt = {text}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 2000
    assert isinstance(refused(lambda: load_config(None, [f"sample.seed={text}"])), str)
    assert [isinstance(row, str) for _, row in rows_of(text, "a.jsonl")] == [True]
    sidecar = tmp_path / "a.json"
    sidecar.write_text(f'{{"focus": {text}}}', encoding="utf-8")
    problem = read_focus(sidecar, "a.json")
    assert problem is not None and len(str(problem)) < 2000
