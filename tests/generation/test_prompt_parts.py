"""Prompts that change while an image is drawn: WebUI's documented cases, and a loop written out here."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdlora.diffusion.samplers import make_scheduler
from sdlora.errors import ConfigError
from sdlora.families.base import DiffusionModel, SizeHint
from sdlora.families.emphasis import escape
from sdlora.families.loading import load_model
from sdlora.generation.prompt_parts import MOST_CHANGES, MOST_PARTS, parts_of, schedule
from sdlora.generation.render import GenerateRequest, denoise

# what WebUI's modules/prompt_parser.py documents for 10 steps
DOCUMENTED = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(call, "a" if call % 2 else "(b:1.1)") for call in range(1, 11)],
    "[fe|]male": [(call, "female" if call % 2 else "male") for call in range(1, 11)],
}


@pytest.mark.parametrize("prompt", DOCUMENTED)
def test_schedules_are_those_that_webui_documents(prompt: str) -> None:
    assert list(schedule(prompt, 10)) == DOCUMENTED[prompt]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("x [a::0.25] y", [(5, "x a y"), (20, "x  y")]),
        ("[a:b:1.0]", [(20, "a")]),
        ("[a:b:1]", [(1, "a"), (20, "b")]),
        ("[a:b:0]", [(20, "b")]),
        ("[a:b:-3]", [(20, "b")]),
        ("[a:b:99]", [(20, "a")]),
        ("[a:b:99999999999999999999]", [(20, "[a:b:99999999999999999999]")]),
        ("[a:b:c]", [(20, "[a:b:c]")]),
        ("[a|b:0.5]", [(20, "[a|b:0.5]")]),
        (r"\[a:b:0.5\]", [(20, r"\[a:b:0.5\]")]),
        ("[less] (more:1.2) a | b: c", [(20, "[less] (more:1.2) a | b: c")]),
        (escape("[a:b:0.5] [c|d]"), [(20, escape("[a:b:0.5] [c|d]"))]),
    ],
)
def test_when_a_bracket_changes(prompt: str, texts: list[tuple[int, str]]) -> None:
    assert list(schedule(prompt, 20)) == texts


def test_prompts_joined_by_and_have_their_weights() -> None:
    parts = parts_of("a cat :0.5 AND [b:c:2] AND d:e AND f: -1.5", 10)
    assert [(part.weight, part.texts[0][1]) for part in parts] == [
        (0.5, "a cat"),
        (1.0, " b"),
        (1.0, " d:e"),
        (-1.5, " f"),
    ]
    for word in ("a band AND-less", "sand ANDy"):
        assert len(parts_of(word.replace("AND-", "and-"), 10)) == 1
    assert len(parts_of(r"salt \AND pepper", 10)) == 1 and escape("salt AND pepper") == r"salt \AND pepper"


def test_prompts_beyond_all_measure_are_refused_and_long_ones_are_read_in_a_moment() -> None:
    with pytest.raises(ConfigError, match=f"{MOST_CHANGES + 1} changing brackets.*at most {MOST_CHANGES}"):
        schedule("[a|b]" * (MOST_CHANGES + 1), 20)
    with pytest.raises(ConfigError, match=f"AND joins 40 prompts; at most {MOST_PARTS}"):
        parts_of(" AND ".join(["a"] * 40), 20)
    begun = time.process_time()
    for piece in ("[", "(", "]", "[a:", "[a|", "(]", ":0.5]", "[(", r"\["):
        try:
            parts_of(piece * (100_000 // len(piece)), 20)
        except ConfigError:
            continue
    assert time.process_time() - begun < 15  # linear: under a second here; quadratic: minutes


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> DiffusionModel:
    loaded = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    loaded.prepare(training=False)
    return loaded


Told = Callable[[int], list[tuple[float, str]]]


@torch.no_grad()
def by_hand(
    model: DiffusionModel, request: GenerateRequest, told: Told, unwanted: Callable[[int], str]
) -> Tensor:
    """Denoise one image; ``told`` gives the weights and texts of a call, from 0."""
    scheduler = make_scheduler(request.sampler, model.process, request.steps)
    generator = torch.Generator().manual_seed(request.seed)
    latents = torch.randn(model.facts.latents.shape(32, 32), generator=generator)[None]
    latents = latents * float(scheduler.init_noise_sigma)
    for call, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(latents, timestep)

        def predicted(text: str, seen: Tensor = seen, timestep: Tensor = timestep) -> Tensor:
            hint = SizeHint((32, 32), (0, 0), (32, 32))
            return model.predict(seen, timestep[None], model.encode_text([text]), [hint])

        negative = predicted(unwanted(call))
        total = negative.clone()
        for weight, text in told(call):
            total += request.guidance * weight * (predicted(text) - negative)
        latents = scheduler.step(total, timestep, latents, return_dict=False)[0]
    return latents


CASES: dict[str, tuple[Told, Callable[[int], str], str]] = {
    # what ends at call 3 is used in calls 0 to 3, as in WebUI
    "a [cat:guitar:0.5]": (lambda call: [(1.0, "a cat" if call <= 3 else "a guitar")], lambda call: "", ""),
    # the first of several is used twice, as in WebUI
    "a [cat|guitar]": (lambda call: [(1.0, "a guitar" if call in (2, 4) else "a cat")], lambda call: "", ""),
    "a cat:0.7 AND a [red:blue:2] hat": (
        lambda call: [(0.7, "a cat"), (1.0, f" a {'red' if call <= 2 else 'blue'} hat")],
        lambda call: "bad" if call <= 1 else "ugly",
        "[bad:ugly:1]",
    ),
}


@pytest.mark.parametrize("prompt", CASES)
def test_images_are_those_of_a_loop_written_out(model: DiffusionModel, prompt: str) -> None:
    told, unwanted, negative = CASES[prompt]
    request = GenerateRequest(
        prompt, negative, height=32, width=32, steps=6, guidance=4.0, sampler="Euler", seed=3
    )
    plain = GenerateRequest("a cat", height=32, width=32, steps=6, guidance=4.0, sampler="Euler", seed=4)
    expected = by_hand(model, request, told, unwanted)
    (drawn,) = denoise(model, [request])
    torch.testing.assert_close(drawn[None], expected, rtol=1e-3, atol=1e-3)
    assert float((expected - denoise(model, [plain])).abs().max()) > 0.1
