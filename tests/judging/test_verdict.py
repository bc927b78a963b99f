"""The verdict: neither style nor subject alone wins, and it claims no more than it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_score import BASE, TRAINING, TRUE, Images, changed

from sdlora.errors import SdloraError
from sdlora.judging.panel import Subject, make_panel, without_trigger
from sdlora.judging.verdict import Cell, PanelJudge, choose, copy_note, is_better, without_gain

COUNT = 12
PANEL, STYLED = BASE[:COUNT], TRUE[:COUNT]


def mixed(share: float) -> Images:
    """Return images part of the way from the base's drawing to the true one of the same subject."""
    return [Image.blend(base, true, share) for base, true in zip(PANEL, STYLED, strict=True)]


@pytest.fixture(scope="module")
def judge() -> PanelJudge:
    return PanelJudge(PANEL, TRAINING[:24], TRUE[COUNT : COUNT + 12], BASE[COUNT : COUNT + 2])


def cell(judge: PanelJudge, images: Sequence[Image.Image], step: int = 1, strength: float = 1.0) -> Cell:
    return judge.cell(f"step {step}", step, strength, images)


def test_style_and_subject_together_win(judge: PanelJudge) -> None:
    learned = cell(judge, STYLED)
    unlearned, wrong = cell(judge, PANEL), cell(judge, STYLED[1:] + STYLED[:1])
    assert unlearned.style.mean == pytest.approx(0) and unlearned.kept is not None and wrong.kept is not None
    assert unlearned.kept.mean == pytest.approx(1) and learned.style.mean > 0.8
    assert wrong.style.mean == pytest.approx(learned.style.mean) and wrong.kept.mean < 0.15
    assert learned.score.mean > 0.4
    for other in (unlearned, wrong, cell(judge, changed(PANEL, ImageOps.grayscale))):
        assert other.score.mean < learned.score.mean - 0.1 and is_better(learned, other)
        assert not is_better(other, learned)


def test_the_style_rises_with_every_image_that_is_in_it(judge: PanelJudge) -> None:
    cells = [cell(judge, STYLED[:count] + PANEL[count:]) for count in (0, 4, 8, COUNT)]
    assert [each.style.mean for each in cells[:3]] == pytest.approx([0, 1 / 3, 2 / 3], abs=0.12)
    scores = [each.score.mean for each in cells]
    assert scores == sorted(scores)


def test_a_tie_is_called_one_and_the_interval_holds_the_score(judge: PanelJudge) -> None:
    whole = cell(judge, STYLED)
    near = cell(judge, [*STYLED[:-1], PANEL[-1]], step=2)
    assert not is_better(near, whole) and not is_better(whole, near) and not is_better(whole, whole)
    assert whole.score.low < whole.score.mean + 0.05 and whole.score.low < whole.score.high
    verdict = choose([whole, near])
    assert verdict.runner_up is not None and not verdict.surely and "not to be told from" in verdict.reason


def test_best_step_strength_and_whether_more_would_help(judge: PanelJudge) -> None:
    cells = [
        cell(judge, mixed(share), step, strength)
        for step, row in ((10, (0.1, 0.3, 0.4)), (20, (0.5, 0.9, 0.6)), (30, (0.6, 1.0, 0.7)))
        for strength, share in zip((0.5, 1.0, 1.5), row, strict=True)
    ]
    verdict = choose(cells)
    assert (verdict.best.step, verdict.best.strength) == (30, 1.0)
    assert verdict.runner_up is not None and verdict.runner_up.step == 20
    assert 0.75 <= verdict.strength <= 1.25  # the top of a parabola through three points
    assert choose(cells[:6]).rising and verdict.to_dict()["best"]["step"] == 30
    assert without_gain(cells[:6]) == 0
    flat = [*cells, *(cell(judge, mixed(0.9), step, 1.0) for step in (40, 50))]
    assert without_gain(flat) >= 2 and not choose(flat).rising


def test_an_earlier_step_is_chosen_only_if_it_is_surely_better(judge: PanelJudge) -> None:
    near = [cell(judge, [*STYLED[:10], *mixed(0.7)[10:]], 10), cell(judge, STYLED, 20)]
    ahead, behind = sorted(near, key=lambda each: -each.score.mean)
    assert not is_better(ahead, behind)
    first, last = (
        replace(each, source=name, step=step) for each, name, step in ((ahead, "a", 10), (behind, "b", 20))
    )
    verdict = choose([first, last])
    assert verdict.best.step == 20 and verdict.runner_up is not None and verdict.runner_up.step == 10
    worse = replace(cell(judge, PANEL), source="b", step=20)
    assert choose([first, worse]).best.step == 10


def test_copies_are_told_from_the_style(judge: PanelJudge) -> None:
    assert judge.copies(TRAINING[:COUNT]) > 0.9 and judge.copies(STYLED) < 0.2
    assert judge.copies(changed(TRAINING[:COUNT], ImageOps.mirror)) > 0.9
    assert copy_note(0.5) is not None and copy_note(0.0) is None


def test_prompts_without_the_trigger_word_that_change_are_drift(judge: PanelJudge) -> None:
    plain = BASE[COUNT : COUNT + 2]
    kept = judge.cell("step 1", 1, 1.0, STYLED, plain)
    gone = judge.cell("step 1", 1, 1.0, STYLED, TRUE[COUNT : COUNT + 2])
    assert kept.drift == pytest.approx(0) and gone.drift is not None and gone.drift > 0.5
    assert "without the trigger word" in " ".join(choose([gone]).notes) and choose([kept]).notes == ()
    assert cell(judge, STYLED).drift is None


def test_what_cannot_be_judged_is_refused_or_said() -> None:
    with pytest.raises(SdloraError, match="too few"):
        PanelJudge(PANEL[:3], TRAINING[:8])
    with pytest.raises(SdloraError, match="cannot be told from the true ones"):
        PanelJudge(TRAINING[:8], TRAINING[:8])
    alike = PanelJudge(PANEL, TRAINING[:24], judges_subject=False).cell("a", None, 1.0, STYLED)
    assert alike.kept is None and alike.score.mean == pytest.approx(min(1.0, alike.style.mean))


def test_a_panel_shows_different_captions_held_out_ones_first() -> None:
    held = [Subject(f"zork, a {name}", "zork") for name in ("cat", "dog")]
    trained = [Subject(f"zork, a {number}", "zork") for number in range(20)]
    panel = make_panel(held, trained, 6)
    assert panel.prompts[:2] == ("zork, a cat", "zork, a dog") and len(set(panel.prompts)) == 6
    assert panel.plain == ("a cat", "a dog") and panel.judges_subject and panel.notes == ()
    assert panel.all_prompts == (*panel.prompts, *panel.plain)
    few = make_panel([], [Subject("a style")] * 3, 4)
    assert few.prompts == ("a style",) * 4 and not few.judges_subject and few.plain == ()
    assert [word in note for note, word in zip(few.notes, ("held out", "alike", "trigger"), strict=True)]
    with pytest.raises(ValueError, match="no image has a caption"):
        make_panel([], [Subject("")], 4)


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("zork, an icon of a cat", "an icon of a cat"),
        ("a cat in zork style", "a cat in style"),
        ("a cat, zork, red", "a cat, red"),
        ("zork", None),
        ("a cat", None),
    ],
)
def test_prompts_without_the_trigger_word_read_well(prompt: str, plain: str | None) -> None:
    assert without_trigger(Subject(prompt, "zork")) == plain


def test_resampling_is_the_same_for_all_cells_so_differences_are_paired(judge: PanelJudge) -> None:
    first, other = cell(judge, mixed(0.8)), cell(judge, mixed(0.85))
    apart = float(np.std(first.draws)) + float(np.std(other.draws))
    assert float(np.std(first.draws - other.draws)) < 0.5 * apart
