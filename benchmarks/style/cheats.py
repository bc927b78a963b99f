"""Whether the verdict is fooled: imitations of a style that must score far below the style itself.

For each of nine styles (the sample icons, and what known image operations make of them) the panel is a
number of held-out subjects. The base draws them, the true images are the style's own drawings of them, and
the imitations are cheap: they have the style's statistics without its drawings, or the subject without the
style. Nothing in ``sdlora.judging`` was tuned to any of these styles but ink.

    python -m benchmarks.style.cheats [--subjects 20] [--base mini]

Prints style, subject kept, and the score of each imitation as a share of what the true images get; exit code
1 if one is not below its bound.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sdlora.data.reading.folder import load_pixels, scan
from sdlora.demonstration.data import HOLDOUT, STYLE, find_data
from sdlora.generation.image_generator import ImageGenerator
from sdlora.generation.render import GenerateRequest, usual_guidance
from sdlora.judging.score import through_autoencoder
from sdlora.judging.verdict import PanelJudge

from .restyled import styles

if TYPE_CHECKING:
    from PIL.Image import Image

_BLOCK = 4  # blocks a side that are shuffled: 16 px of 64

BOUNDS: Mapping[str, float] = {
    "shuffled blocks": 0.3,
    "blurred": 0.8,
    "other subjects": 0.3,
    "recoloured base": 0.8,
    "half and half": 0.9,
    "edges of the base": 0.8,
    "another style": 0.8,
}
"""Most that an imitation may score, as a share of what the true images score."""


def shuffled(image: Image, seed: int) -> Image:
    """Return an image with its blocks in another order."""
    from PIL import Image as Pil

    pixels = np.asarray(image.convert("RGB"))
    side = pixels.shape[0] // _BLOCK
    places = [(y * side, x * side) for y in range(_BLOCK) for x in range(_BLOCK)]
    blocks = [pixels[y : y + side, x : x + side] for y, x in places]
    order = np.random.default_rng(seed).permutation(len(blocks))
    rows = [np.hstack([blocks[k] for k in order[row * _BLOCK : (row + 1) * _BLOCK]]) for row in range(_BLOCK)]
    return Pil.fromarray(np.vstack(rows))


def recoloured(image: Image, example: Image) -> Image:
    """Return an image with the tones and colours of another, quantile by quantile."""
    from PIL import Image as Pil

    grey = np.asarray(image.convert("L"), dtype=float).ravel()
    other = np.asarray(example.convert("RGB"), dtype=float).reshape(-1, 3)
    ranked = other[np.argsort(other.sum(1))]
    if ranked[-1].sum() - np.median(ranked.sum(1)) > np.median(ranked.sum(1)) - ranked[0].sum():
        ranked = ranked[::-1]  # a dark ground takes the place of the light one
    places = np.argsort(np.argsort(grey, kind="stable"), kind="stable")
    result = ranked[(places * len(ranked) // len(places)).clip(0, len(ranked) - 1)]
    return Pil.fromarray(result.reshape(image.height, image.width, 3).astype(np.uint8))


def imitations(
    base: Sequence[Image], true: Sequence[Image], other: Sequence[Image]
) -> dict[str, list[Image]]:
    """Return the imitations of a style, each one image a subject."""
    from PIL import ImageFilter

    half = len(base) // 2
    edges = [image.convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB") for image in base]
    return {
        "shuffled blocks": [shuffled(image, number) for number, image in enumerate(true)],
        "blurred": [image.filter(ImageFilter.GaussianBlur(2)) for image in true],
        "other subjects": [*true[1:], true[0]],
        "recoloured base": [recoloured(image, example) for image, example in zip(base, true, strict=True)],
        "half and half": [*true[:half], *base[half:]],
        "edges of the base": edges,
        "another style": list(other),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if an imitation is not below its bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--base", default="mini")
    options = parser.parse_args(arguments)
    data, generator = find_data(), ImageGenerator.load(options.base)
    items = scan(data / HOLDOUT).items
    items = tuple(items[n * len(items) // options.subjects] for n in range(options.subjects))
    base = _drawn(generator, [item.caption.partition(", ")[2] for item in items])
    icons = [load_pixels(item) for item in items]
    trained = [load_pixels(item) for item in scan(data / STYLE).items]
    changes = styles()
    names, worst = list(changes), dict.fromkeys(BOUNDS, 0.0)
    print(f"{'':11}{'true: style kept score':>24}   " + "  ".join(f"{name:>17}" for name in BOUNDS))
    for number, (name, change) in enumerate(changes.items()):
        other = changes[names[(number + 2) % len(names)]]
        true, learned, foreign = (
            through_autoencoder(generator.model, [restyle(image).convert("RGB") for image in images])
            for restyle, images in ((change, icons), (change, trained), (other, icons))
        )
        judge = PanelJudge(base, learned)
        whole = judge.cell("true", None, 1.0, true)
        row = []
        for kind, images in imitations(base, true, foreign).items():
            cell = judge.cell(kind, None, 1.0, images)
            share = cell.score.mean / max(whole.score.mean, 1e-9)
            worst[kind] = max(worst[kind], share)
            kept = 0.0 if cell.kept is None else cell.kept.mean
            row.append(f"{cell.style.mean:5.2f} {kept:5.2f} {share:4.0%}")
        kept = 0.0 if whole.kept is None else whole.kept.mean
        print(
            f"{name:11}{whole.style.mean:10.2f} {kept:6.2f} {whole.score.mean:6.2f}   " + "  ".join(row),
            flush=True,
        )
    failed = [kind for kind, bound in BOUNDS.items() if worst[kind] > bound]
    for kind, bound in BOUNDS.items():
        print(
            f"{kind}: at most {worst[kind]:.0%}, bound {bound:.0%}{'  NOT BELOW' if kind in failed else ''}"
        )
    return 1 if failed else 0


def _drawn(generator: ImageGenerator, prompts: Sequence[str]) -> list[Image]:
    side = generator.model.facts.native_resolution
    requests = [
        GenerateRequest(
            prompt=prompt,
            height=side,
            width=side,
            steps=10,
            guidance=usual_guidance(generator.model),
            sampler="DPM++ 2M Karras",
            seed=number,
        )
        for number, prompt in enumerate(prompts)
    ]
    return [result.image for result in generator.generate(requests)]


if __name__ == "__main__":
    sys.exit(main())
