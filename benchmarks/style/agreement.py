"""How well two judges of subjects agree with the benchmark's classifier, over adapters and strengths.

    python -m benchmarks.style.agreement --output build/recipes --style ink --adapter FILE --adapter FILE ...

Both see the base and no true images: the edges that are kept of its own images
(``sdlora.judging.structure``, what runs judge by), and what it recognises (:mod:`.recognition`). Each adapter
is drawn at each strength on subjects it never saw; printed are a row for each cell and, over all of them,
the rank correlation of either judge with the share of subjects that the classifier names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdlora.judging.structure import pair_likeness

from .gallery import Drawing, Studio
from .icon_sets import subject_of
from .judge import SubjectJudge
from .measure import Array
from .recognition import Recognition
from .styles import find_style

ENOUGH = 3.0
"""Evidence from which on an image counts as recognised for certain."""


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two rows of values, equal ones sharing their mean rank."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Array) -> Array:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = (ends - (counts - 1) / 2)[places]
    return ranks


def main() -> None:
    """Draw, judge, and print the table and the two correlations."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.style.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="images and the judge are kept in it")
    parser.add_argument("--style", required=True)
    parser.add_argument("--adapter", type=Path, action="append", required=True)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    parser.add_argument("--subjects", type=int, default=30)
    options = parser.parse_args()
    work: Path = options.output.resolve()
    judge = SubjectJudge(work / "judge", work / "icons")
    studio = Studio("mini", Drawing(), work / "images", lambda text: None)
    items = find_style(options.style, None, work, work / "icons").subjects(options.subjects)
    captions = [item.caption.partition(", ")[2] for item in items]
    encoded = studio.model.encode_text(captions)
    text = {
        caption: {name: tensor[n] for name, tensor in encoded.items()} for n, caption in enumerate(captions)
    }
    recognition = Recognition(
        studio.model, text.__getitem__, captions, studio.model.facts.native_resolution, rows=6
    )
    base = studio.draw(f"{options.style} base", None, [0.0], items)[0.0]
    subjects = [subject_of(item.path.stem) for item in items]
    edges, recognised, named = [], [], []
    for adapter in options.adapter:
        drawn = studio.draw(options.style, adapter, options.strengths, items)
        for strength, images in drawn.items():
            edges.append(float(pair_likeness(images, base).mean()))
            recognised.append(float(np.clip(recognition.evidence(images) / ENOUGH, 0, 1).mean()))
            named.append(float(np.nanmean(judge.ranks(images, subjects) <= 1)))
            print(
                f"{adapter} at {strength:g}: edges {edges[-1]:.2f}, recognised {recognised[-1]:.2f}, "
                f"named {named[-1]:.0%}",
                flush=True,
            )
    both = (rank_correlation(values, named) for values in (edges, recognised))
    print(
        f"{len(named)} cells; rank correlation with the share named: edges {next(both):.3f}, "
        f"recognised {next(both):.3f}"
    )


if __name__ == "__main__":
    main()
