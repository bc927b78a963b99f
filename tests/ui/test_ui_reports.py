"""A run's report is read in the page's language; what the user and the program named stays."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sdlora_ui.languages import translated_report

from sdlora.events import Estimate
from sdlora.judging.report_page import Report, Series, score_curve, write_report_page
from sdlora.judging.verdict import Cell, Verdict, choose, copy_note


def cell(step: int, strength: float, score: float, *, kept: bool = True) -> Cell:
    draws = np.linspace(score - 0.05, score + 0.05, 20)
    value = Estimate(score, score - 0.05, score + 0.05)
    return Cell(f"step {step}", step, strength, value, value if kept else None, value, 0.7, draws)


def written(folder: Path, verdict: Verdict) -> str:
    tile = [Image.new("RGB", (8, 8), "white")] * 4
    curve = score_curve(verdict)
    assert curve is not None
    loss = "loss on held-out images minus that of the base alone, image by image; below 0 is better"
    report = Report(
        title="wine: step 200 at strength 0.9",
        verdict=verdict,
        prompts=["a best score of wine"],
        images={("step 200", 1.0): tile, ("base", 0.0): tile},
        training=tile,
        curves=[curve, Series("Held-out loss against the base", loss, curve.points)],
        facts=[
            ("200 of 300", "best step"),
            ("0.9", "recommended strength"),
            ("0.61", "score, 90 % interval 0.55 to 0.66"),
            ("12%", "of the training's time went into judging"),
        ],
        settings=[("images trained on", "43"), ("steps", "300"), ("training.seed", "score")],
        commands=[("draw", "sdlora generate"), ("more steps would help", "sdlora train")],
    )
    write_report_page(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def texts(page: str) -> list[str]:
    """Return what is read, apart from what stays: the user's prompts, values of settings, command lines."""
    page = re.sub(r"<(style|ol|dd|code)\b.*?</\1>", "<br>", page, flags=re.DOTALL)
    shown = re.findall(r">([^<>]+)<|(?:title|alt|aria-label)=\"([^\"]+)\"", page)
    return [" ".join(unescape(text).split()) for pair in shown for text in pair if text.strip()]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("runner_up", [0.61, 0.2])
def test_a_report_is_in_chinese_as_a_whole(tmp_path: Path, kept: bool, runner_up: float) -> None:
    cells = [cell(100, 1.0, runner_up, kept=kept), cell(200, 1.0, 0.61, kept=kept)]
    note = copy_note(0.5)
    assert note is not None
    verdict = choose(cells, [note]).beside(cell(200, 1.0, 0.2))
    assert len(verdict.notes) == 3 and verdict.surely == (runner_up == 0.2)
    page = written(tmp_path, verdict)
    shown = translated_report(page, "zh-CN")
    assert len(texts(page)) > 40 and len(texts(page)) == len(texts(shown))
    names = ("wine", "training.seed", "judging", "LoRA", "WebUI", "rank")
    left = [text for text in texts(shown) if re.search("[A-Za-z]", re.sub("|".join(names), "", text))]
    assert left == []
    assert "<li>a best score of wine</li>" in shown and "<dd>score</dd>" in shown
    assert '<html lang="zh-CN">' in shown and shown.count("data:image") == page.count("data:image")


def test_a_report_stays_as_it_is_in_english_and_in_what_is_no_language(tmp_path: Path) -> None:
    page = written(tmp_path, choose([cell(100, 1.0, 0.5), cell(200, 1.0, 0.6)]))
    assert translated_report(page, "en") == page == translated_report(page, "../zh-CN")
