"""The design behind the defaults: effects are told apart, and what is known comes out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from benchmarks.recipes import FACTORS, STRENGTHS, design, effects, merit
from benchmarks.style.restyled import at_side, styles
from sdlora.config.toml import load_config


def levels() -> np.ndarray:
    return np.array([[1 if letter == "+" else -1 for letter in name] for name in design()])


def result(style: float, named: float, true: float = 1.0) -> dict[str, object]:
    """Return a result whose middle strength has these values, with worse ones beside it."""
    rows = {}
    for strength, share in zip(STRENGTHS, (0.5, 1.0, 0.25), strict=True):
        row = {"style": share * style, "named": named}
        rows[f"{strength:g}"] = {**row, "style_draws": [share * style] * 3, "named_draws": [named] * 3}
    return {"named_true": true, "strengths": rows}


def test_no_effect_is_mixed_up_with_another_or_with_a_pair_of_others() -> None:
    table = levels()
    assert table.shape == (16, len(FACTORS)) and len(FACTORS) == 8
    assert (table.sum(0) == 0).all()
    assert np.array_equal(table.T @ table, 16 * np.eye(8, dtype=int))
    triples = list(itertools.combinations(range(8), 3))
    assert len(triples) == 56
    assert all((table[:, a] * table[:, b] * table[:, c]).sum() == 0 for a, b, c in triples)


@pytest.mark.parametrize("name", list(design()))
def test_every_recipe_is_made_of_settings_that_go_together(name: str) -> None:
    config = load_config(None, list(design()[name]))
    assert config.adapter.targets == ("all" if name[0] == "+" else "linear")
    assert (config.optimizer.lora_plus_ratio == 4) == (name[2] == "+")


def test_merit_is_the_best_strength_and_counts_only_subjects_that_can_be_named() -> None:
    value, draws, strength = merit(result(0.8, 0.5, true=0.5))
    assert (value, strength) == (pytest.approx(0.8), STRENGTHS[1]) and draws.tolist() == pytest.approx(
        [0.8] * 3
    )
    assert merit(result(0.8, 0.25, true=0.5))[0] == pytest.approx(0.4)
    assert merit(result(1.4, 1.0))[0] == 1.0  # nobody is more in the style than the style


def test_effects_that_were_put_in_come_out_with_intervals_that_hold_them() -> None:
    true = np.array([0.1, -0.2, 0.05, 0.0, 0.0, 0.0, -0.08, 0.02])
    noise = np.random.default_rng(0)
    results = {
        (name, style, 0): result(0.5 + level + float(row @ true) / 2 + noise.normal(0, 0.01), 1.0)
        for style, level in (("a", 0.05), ("b", -0.1))
        for name, row in zip(design(), levels(), strict=True)
    }
    rows = effects(results)
    assert [name for name, _, _ in rows] == [factor.name for factor in FACTORS]
    assert np.array([value for _, value, _ in rows]) == pytest.approx(true, abs=0.02)
    assert all(0.001 < half < 0.03 for _, _, half in rows)


def test_a_restyled_icon_has_the_style_and_its_drawing() -> None:
    icon = Image.new("RGB", (256, 256), "white")
    icon.paste((0, 0, 0), (64, 64, 192, 192))
    changes = styles()
    assert len(changes) == 9
    for name in ("night", "hatching", "dots", "soft"):
        changed = at_side(icon, changes[name])
        assert changed.size == (256, 256) and changed.mode == "RGB"
        assert changed.getpixel((8, 8)) != changed.getpixel((128, 128)), name
    assert at_side(icon, changes["night"]).getpixel((8, 8)) == (16, 24, 48)
