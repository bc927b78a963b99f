"""Weights in prompts: the grammar, the chunks, and what the weights do to the text states."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.errors import ConfigError
from sdlora.families.base import DiffusionModel
from sdlora.families.emphasis import MAX_CHARS, Chunk, Fragment, escape, layout, parse, weigh
from sdlora.families.loading import load_model
from sdlora.generation.render import GenerateRequest, conditioning_of


def fragments(prompt: str) -> list[list[tuple[str, float]]]:
    return [[(part.text, round(part.weight, 6)) for part in section] for section in parse(prompt)]


@pytest.mark.parametrize(
    ("prompt", "meaning"),
    [
        ("normal text", [[("normal text", 1.0)]]),
        ("an (important) word", [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]]),
        ("(unbalanced", [[("unbalanced", 1.1)]]),
        ("unnecessary)(parens", [[("unnecessary)", 1.0), ("parens", 1.1)]]),
        (r"\(literal\]", [[("(literal]", 1.0)]]),
        (r"a \\ b", [[("a \\ b", 1.0)]]),
        (r"a \n b", [[(r"a \n b", 1.0)]]),
        (
            "((two)) [less] [[least]]",
            [[("two", 1.21), (" ", 1.0), ("less", 0.909091), (" ", 1.0), ("least", 0.826446)]],
        ),
        ("(a:1.3) (b:.5)( c : -2 )", [[("a", 1.3), (" ", 1.0), ("b", 0.5), (" c ", -2.0)]]),
        ("at 12:30) or (x:y)", [[("at 12:30) or ", 1.0), ("x:y", 1.1)]]),
        ("[a:1.2]", [[("a:1.2", 0.909091)]]),
        ("(a (b:2):1.5)", [[("a ", 1.5), ("b", 3.0)]]),
        ("(a:1.2.3)", [[("a:1.2.3", 1.1)]]),
        ("one BREAK two", [[("one", 1.0)], [("two", 1.0)]]),
        ("BREAKFAST", [[("BREAKFAST", 1.0)]]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                [
                    ("a ", 1.0),
                    ("house", 1.573),
                    (" ", 1.1),
                    ("on", 1.0),
                    (" a ", 1.1),
                    ("hill", 0.55),
                    (", sun, ", 1.1),
                    ("sky", 1.4641),
                    (".", 1.1),
                ]
            ],
        ),
        ("", [[]]),
    ],
)
def test_prompts_mean_what_the_webui_takes_them_to_mean(
    prompt: str, meaning: list[list[tuple[str, float]]]
) -> None:
    assert fragments(prompt) == meaning


@given(st.text(alphabet="ab ()[]\\:1.BREAK,", max_size=40))
@settings(max_examples=300, deadline=None)
def test_an_escaped_text_is_said_literally(text: str) -> None:
    assert parse(escape(text)) == [[Fragment(text, 1.0)]] or (not text and parse(escape(text)) == [[]])


@given(st.text(alphabet="ab()[]\\:1.BREK ", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_read(text: str) -> None:
    for section in parse(text):
        for part, other in pairwise(section):
            assert part.text and part.weight != other.weight


def test_texts_without_brackets_need_no_escape() -> None:
    for text in ("a cat, 12:30, {a|b}", "façade 猫", ""):
        assert escape(text) == text


def words(text: str) -> list[int]:
    """One token a word: its number, 0 for a comma."""
    return [0 if word == "," else int(word) for word in text.replace(",", " , ").split()]


def test_chunks_hold_75_tokens_and_there_is_at_least_one() -> None:
    assert layout("", words, 0) == [Chunk((), ())]
    numbers = list(range(1, 171))
    chunks = layout(" ".join(map(str, numbers)), words, 0)
    assert [len(chunk.ids) for chunk in chunks] == [75, 75, 20]
    assert [token for chunk in chunks for token in chunk.ids] == numbers
    assert all(chunk.is_plain for chunk in chunks)
    assert [len(chunk.ids) for chunk in layout(" ".join(map(str, range(1, 76))), words, 0)] == [75]


@pytest.mark.parametrize(
    ("before", "kept"),
    [(74, 75), (73, 74), (60, 61), (55, 56), (54, 75), (20, 75)],
)
def test_what_follows_the_last_comma_moves_to_the_next_chunk_as_a_whole(before: int, kept: int) -> None:
    text = " ".join(["7"] * before) + ", " + " ".join(["8"] * (100 - before))
    chunks = layout(text, words, 0)
    assert len(chunks[0].ids) == kept
    assert [token for chunk in chunks for token in chunk.ids] == words(text)


def test_break_begins_a_new_chunk_and_weights_follow_their_tokens() -> None:
    assert layout("1 (2 3:1.5) BREAK [4]", words, 0) == [
        Chunk((1, 2, 3), (1.0, 1.5, 1.5)),
        Chunk((4,), (1 / 1.1,)),
    ]
    assert layout("1 BREAK", words, 0) == [Chunk((1,), (1.0,))]


def test_weighed_states_keep_the_mean_of_their_chunk() -> None:
    states = torch.randn((3, 77, 8), generator=torch.Generator().manual_seed(1)) + 0.5
    weights = torch.ones((3, 77))
    weights[1, 5:9] = 1.4
    weights[2, 1] = 0.2
    weighed = weigh(states, weights)
    assert torch.equal(weighed[0], states[0])
    torch.testing.assert_close(weighed.mean(dim=(1, 2)), states.mean(dim=(1, 2)))
    for chunk in (1, 2):
        expected = states[chunk] * weights[chunk][:, None]
        expected = expected * (states[chunk].mean() / expected.mean())
        torch.testing.assert_close(weighed[chunk], expected)
    assert weigh(states, torch.ones((3, 77))) is states


def test_states_without_a_mean_are_not_scaled_by_chance() -> None:
    states = torch.randn((1, 77, 8), generator=torch.Generator().manual_seed(1))
    states = states - states.mean(dim=2, keepdim=True)
    weights = torch.ones((1, 77))
    weights[0, 3] = 1.5
    torch.testing.assert_close(weigh(states, weights), states * weights[..., None])
    assert torch.equal(weigh(torch.zeros((1, 77, 8)), weights), torch.zeros((1, 77, 8)))


# --- in a real text encoder


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> DiffusionModel:
    return load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))


def states(model: DiffusionModel, *prompts: str) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_text(prompts)["states"]


def test_prompts_are_encoded_with_the_weights_of_their_words(model: DiffusionModel) -> None:
    tokenizer = model.tokenizers["text_encoder"]  # type: ignore[attr-defined]
    assert [len(tokenizer(word, add_special_tokens=False).input_ids) for word in ("a", "flat")] == [1, 1]
    plain, weighed = states(model, "a flat cat"), states(model, "a (flat:1.5) cat")
    weights = torch.ones((1, 77))
    weights[0, 2] = 1.5  # begin, a, flat
    torch.testing.assert_close(weighed, weigh(plain, weights))
    assert not torch.allclose(weighed, plain)
    assert torch.equal(states(model, "(a flat cat:1)"), plain)


def test_a_literal_text_is_encoded_as_if_there_were_no_grammar(model: DiffusionModel) -> None:
    text = "miku (vocaloid), [sic] a\\b"
    tokenizer = model.tokenizers["text_encoder"]  # type: ignore[attr-defined]

    def tokenize(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False).input_ids)

    assert [chunk.ids for chunk in layout(escape(text), tokenize, None)] == [tuple(tokenize(text))]
    assert not torch.equal(states(model, text), states(model, escape(text)))


def test_a_prompt_alone_and_in_company_of_others_is_the_same(model: DiffusionModel) -> None:
    prompts = ("a (cat:1.4)", "(a dog) on a mat", "a bird")
    for together, alone in zip(
        states(model, *prompts), (states(model, prompt)[0] for prompt in prompts), strict=True
    ):
        torch.testing.assert_close(together, alone)


def test_training_previews_and_generation_read_a_prompt_alike(model: DiffusionModel, tmp_path: Path) -> None:
    from sdlora.data.batching.cache import EncodedDataset
    from sdlora.data.batching.caption_plan import CaptionRun
    from sdlora.data.batching.views import AugmentationViews

    prompt = "a (red:1.3) cat, [small] BREAK on a mat"
    run = CaptionRun(emphasis=True)
    trained = EncodedDataset((), AugmentationViews((), ()), model, tmp_path, captions=run).caption(prompt)[
        "states"
    ]
    request = GenerateRequest(
        prompt=prompt, height=32, width=32, steps=1, guidance=1.0, sampler="Euler", seed=0, strengths={}
    )
    drawn = conditioning_of(model, [request])["states"][0]
    assert trained.shape == (154, 16)
    torch.testing.assert_close(trained, drawn)
    literal = EncodedDataset((), AugmentationViews((), ()), model, tmp_path).caption(prompt)["states"]
    assert literal.shape == (77, 16)


def test_gradients_flow_through_weights(model: DiffusionModel) -> None:
    embedding = model.components()["text_encoder"].get_input_embeddings()  # type: ignore[operator]
    embedding.weight.requires_grad_(True)
    model.encode_text(["a (cat:1.4)"])["states"].square().sum().backward()
    assert embedding.weight.grad is not None and float(embedding.weight.grad.abs().sum()) > 0
    embedding.weight.requires_grad_(False)
    embedding.weight.grad = None


def test_a_prompt_without_end_is_refused() -> None:
    assert len(parse("(a " * (MAX_CHARS // 3))) == 1
    with pytest.raises(ConfigError, match=f"has {MAX_CHARS + 1} characters"):
        parse("a" * (MAX_CHARS + 1))
