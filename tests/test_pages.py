"""The guides and their Chinese versions: the same headings, commands and images; links lead somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from sdlora.commands.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = (
    "first-style",
    "first-character",
    "choosing",
    "when-it-goes-wrong",
    "cards-and-times",
    "drawing",
    "small-cards",
)
PAIRS = [("README.md", "README.zh-CN.md"), *((f"docs/{n}.md", f"docs/{n}.zh-CN.md") for n in PAGES)]
ALL = [name for pair in PAIRS for name in pair]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_a_page_and_its_chinese_version_keep_step(english: str, chinese: str) -> None:
    english_text, chinese_text = read(english), read(chinese)
    levels = [re.findall(r"^(#+) ", prose(text), re.MULTILINE) for text in (english_text, chinese_text)]
    assert levels[0] == levels[1] and len(levels[0]) >= 4
    assert blocks(english_text) == blocks(chinese_text)
    images = [re.findall(r"!\[[^]]*\]\(([^)]*)\)", text) for text in (english_text, chinese_text)]
    assert images[0] == images[1]
    # every setting and command that one of them names in its prose, the other names, too
    named = [
        set(re.findall(r"`((?:[a-z_]+\.[a-z_]+|--[a-z-]+|sdlora)\b[^`]*)`", prose(t)))
        for t in (english_text, chinese_text)
    ]
    assert named[0] == named[1]
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese_text)) > 250
    rows = [len(re.findall(r"^\|", prose(text), re.MULTILINE)) for text in (english_text, chinese_text)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ALL)
def test_links_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", prose(read(name)))
    missing = [t for t in targets if "://" not in t and not ((ROOT / name).parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("name", ALL)
def test_commands_in_pages_are_commands_with_such_options(name: str) -> None:
    count = 0
    for line in "\n".join(blocks(read(name))).splitlines():
        words = shlex.split(line.split("&&")[-1], comments=True)
        if not words or Path(words[0]).name != "sdlora" or len(words) < 2:
            continue
        command = COMMANDS[words[1]]
        parser = argparse.ArgumentParser()
        command.declare(parser)
        known = set(re.findall(r"--[a-z][a-z-]*", parser.format_help()))
        assert {word for word in words[2:] if word.startswith("--")} <= known, line
        count += 1
    assert count > 0 or "wrong" in name


def test_readme_leads_to_every_guide() -> None:
    for english, chinese in PAIRS[1:]:
        assert f"]({english})" in read("README.md") and f"]({chinese})" in read("README.zh-CN.md")
    assert "](README.zh-CN.md)" in read("README.md") and "](README.md)" in read("README.zh-CN.md")
