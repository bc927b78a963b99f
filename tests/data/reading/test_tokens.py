"""Token counts without torch equal those of the tokenizer that training uses."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

import sdlora
from sdlora.data.reading.tokens import count_tokens
from sdlora.families.clip import count_tokens as count_in_training

TOKENIZER = CLIPTokenizer.from_pretrained(Path(sdlora.__file__).parent / "assets" / "sd1" / "tokenizer")
CAPTIONS = [
    "",
    "a cat",
    "ink, a cat's 2 toys!",
    "2024, (masterpiece:1.2), 1girl, score_9, best_quality",
    "extraordinarily supercalifragilistic",
    "猫と犬 🐈‍⬛ naïve café",
    "  spaces\t and\nlines  ",
    "it's we'll they're I'D",
    "a" * 300,
]


def test_counts_equal_those_of_the_tokenizer_used_in_training() -> None:
    assert count_tokens(CAPTIONS) == [count_in_training(TOKENIZER, caption) for caption in CAPTIONS]


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_counted_as_in_training(text: str) -> None:
    assert count_tokens([text]) == [count_in_training(TOKENIZER, text)]


def test_many_captions_are_counted_in_order() -> None:
    words = [" ".join(random.Random(seed).choices(["red", "ink", "unicorn"], k=seed)) for seed in range(200)]
    assert count_tokens(words) == [count_tokens([text])[0] for text in words]
    assert count_tokens([]) == []
