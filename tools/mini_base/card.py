"""Writes what travels with the weights: card, nouns, recommended settings, licences and hashes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .captions import bare, load_nouns
from .config import BASE_SETS, FLUENT, INK, RECOMMENDED
from .denoiser import DenoiserSettings
from .files import read_json, sha256, write_json, write_text
from .licences import apache, mit
from .progress import clock

TEMPLATE = Path(__file__).with_name("card.md")

_CONTINUED = (
    "**What it was trained from.** The weights of another base, given with `--start-from`; "
    "without that option the script trains everything itself."
)
_SCRATCH = "**What it was trained from.** Random weights: every part was trained by the script."


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _figures_table(figures: dict[str, Any]) -> str:
    """Returns the measured figures as table rows; what was not measured is left out."""
    rows: list[tuple[str, str]] = []
    if "named" in figures:
        rows.append(
            (
                f"Subject named by a classifier, {figures['named_images']} generated images of all "
                "training nouns (guidance 4, 20 steps, plain prompts): first guess / first five",
                f"{_percent(figures['named'])} / {_percent(figures['named_in_five'])}",
            )
        )
        rows.append(
            (
                "The same classifier on the real icons, in new placings, through the autoencoder",
                f"{_percent(figures['real_named'])} / {_percent(figures['real_named_in_five'])}",
            )
        )
    if "vae_psnr" in figures:
        label = f"Autoencoder, PSNR on {figures['vae_unseen']} icons it never saw"
        rows.append((label, f"{figures['vae_psnr']:.1f} dB"))
    if "seconds_per_image" in figures:
        label = f"Seconds an image, 20 steps, batches of 8, {figures['machine']}"
        rows.append((label, f"{figures['seconds_per_image']:.2f}"))
    return "\n".join(f"| {label} | {value} |" for label, value in rows)


def _sets_table() -> str:
    return "\n".join(
        f"| {s.source} | {s.owner} | {s.licence} | `{s.package}` {s.version} "
        f"| {', '.join(s.styles) or 'none: autoencoder only'} |"
        for s in (*BASE_SETS, INK)
    )


def _card(figures: dict[str, Any], continued: bool) -> str:
    nouns = load_nouns()
    return TEMPLATE.read_text(encoding="utf-8").format(
        nouns=len(nouns.phrases),
        samples=f"{figures.get('samples', 0):,}",
        images=figures.get("images", 0),
        batch=figures.get("batch", DenoiserSettings.batch),
        duration=clock(figures.get("seconds", 0)),
        machine=figures.get("trained_on", "an unknown machine"),
        origin=_CONTINUED if continued else _SCRATCH,
        prediction=figures.get("prediction", "epsilon"),
        looks=_looks_line(figures),
        vae=_vae_line(figures, continued),
        figures=_figures_table(figures),
        sets=_sets_table(),
        showcase=", ".join(f"`an icon of {nouns.phrases[n]}`" for n in nouns.showcase),
        words=", ".join(bare(phrase) for phrase in nouns.phrases.values()),
    )


def _vae_line(figures: dict[str, Any], continued: bool) -> str:
    count = figures.get("vae_samples")
    if count is None:
        return "The autoencoder is the other base's, unchanged." if continued else ""
    part = "autoencoder's decoder was" if figures.get("vae_decoder_only") else "autoencoder was"
    time = f" ({clock(figures['vae_seconds'])})" if "vae_seconds" in figures else ""
    return f"The {part} trained by the script on {count:,} images{time}, ink icons included."


def _looks_line(figures: dict[str, Any]) -> str:
    looks = ", ".join(f"`a {s.styles[0]} icon of a cat`" for s in BASE_SETS)
    if "looks_followed" not in figures:
        return looks + "."
    share = _percent(figures["looks_followed"])
    return (
        f"{looks}. Of {figures['looks_images']} images drawn with one of the four, {share} came nearest to "
        "the true icon of the set it names (25 % would be chance)."
    )


def write(output: Path, work: Path, continued: bool) -> None:
    """Writes card, nouns, recommended settings, licences and hashes into ``output``.

    Args:
        output: The exported pipeline.
        work: Where earlier stages left ``figures.json`` and the contact sheet.
        continued: Whether the weights go on from another base's.
    """
    path = work / "figures.json"
    figures = read_json(path) if path.exists() else {}
    nouns = load_nouns()
    listed = {
        "nouns": list(nouns.phrases.values()),
        "showcase": [f"an icon of {nouns.phrases[name]}" for name in nouns.showcase],
    }
    write_json(output / "nouns.json", listed)
    write_json(output / "sdlora.json", {"recommended": RECOMMENDED})
    write_text(output / "LICENSE", apache())
    write_text(output / "LICENSE-noto-emoji", apache())
    write_text(output / "LICENSE-fluent-emoji", mit(FLUENT.owner))
    sheet = work / "contact-sheet.png"
    if sheet.exists():
        shutil.copyfile(sheet, output / "contact-sheet.png")
    write_text(output / "README.md", _card(figures, continued))
    files = sorted(f for f in output.rglob("*") if f.is_file() and f.name != "SHA256SUMS")
    sums = [f"{sha256(file)}  {file.relative_to(output).as_posix()}" for file in files]
    write_text(output / "SHA256SUMS", "\n".join(sums) + "\n")
