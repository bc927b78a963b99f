"""Judges of subjects: what is taken off is taken off, and a base recognises what it drew itself."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.style.agreement import rank_correlation
from benchmarks.style.recognition import Recognition, evidence
from sdlora.generation.image_generator import ImageGenerator
from sdlora.generation.render import GenerateRequest


def test_what_images_and_captions_cost_by_themselves_is_no_evidence() -> None:
    generator = np.random.default_rng(0)
    count, rivals = 10, 4
    columns = [[(first + k) % count for k in range(rivals + 1)] for first in range(count)]
    images, captions = generator.normal(5, 3, count), generator.normal(0, 2, count)
    noise = generator.normal(0, 0.01, (count, rivals + 1))
    plain = images[:, None] + captions[np.array(columns)] + noise
    assert np.abs(evidence(plain, columns, count)).max() < 6
    seen = plain.copy()
    seen[:5, 0] -= 0.5  # these are explained by their own captions
    told = evidence(seen, columns, count)
    assert (told[:5] > 20).all() and np.abs(told[5:]).max() < 6


def test_equal_values_share_their_rank() -> None:
    assert rank_correlation([1, 2, 2, 3], [10, 20, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # by hand: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4
    assert rank_correlation([1, 5, 5, 9], [0, 2, 1, 3]) == pytest.approx(0.9486833)


def test_a_base_recognises_its_own_images_under_their_captions_and_under_no_others() -> None:
    generator = ImageGenerator.load("mini")
    captions = [f"an icon of a {name}" for name in ("cat", "tree", "car", "house", "fish", "umbrella")]
    side = generator.model.facts.native_resolution
    requests = [
        GenerateRequest(
            prompt=text, height=side, width=side, steps=6, guidance=4.0, seed=n, sampler="Euler a"
        )
        for n, text in enumerate(captions)
    ]
    images = [result.image for result in generator.generate(requests)]
    encoded = generator.model.encode_text(captions)
    text = {c: {name: t[n] for name, t in encoded.items()} for n, c in enumerate(captions)}
    recognition = Recognition(generator.model, text.__getitem__, captions, side)
    right, wrong = recognition.evidence(images), recognition.evidence(images[1:] + images[:1])
    assert right.mean() > 2 and right.mean() > wrong.mean() + 2
    with pytest.raises(ValueError, match="captions are alike"):
        Recognition(generator.model, text.__getitem__, captions[:1] * 3, side)
    with pytest.raises(ValueError, match="5 images for 6 captions"):
        recognition.evidence(images[1:])
