"""Messages on the page name settings by their fields."""

from __future__ import annotations

import pytest
from sdlora_ui.forms import settings
from sdlora_ui.words import labels, page_words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("or set data.trigger_word", "or set “Trigger word”"),
        ("`adapter.rank=-3`: should be 1 or more", "“LoRA > Rank” = -3: should be 1 or more"),
        ("`optimizer.betas=[0.9, 2]`: no", "“Optimizer > Betas” = [0.9, 2]: no"),
        ("or lower data.resolution.", "or lower “Images > Resolution”."),
        ("switch off: sample.prompts=[], judge.every=0", "“Previews > Prompts” = [], “Best step"),
        ("/home/x/data.folder/a.png and data.zip", "/home/x/data.folder/a.png and data.zip"),
    ],
)
def test_settings_are_named_as_their_fields(text: str, shown: str) -> None:
    assert shown in page_words(text)


def test_every_setting_has_a_name_of_its_own_on_the_page() -> None:
    names = [labels()[setting.key] for setting in settings()]
    assert len(set(names)) == len(names)
