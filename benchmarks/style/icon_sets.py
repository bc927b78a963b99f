"""Icons of pinned packages by subject: other hands that drew the same things.

Everything here leans on ``tools/mini_base``, which fetches, checks and renders the packages; it needs npm
and ``pip install -e ".[build-base]"``, and is loaded only when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

TEST_SETS = {
    "openmoji": (
        "@iconify-json/openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
        "the OpenMoji project",
        "hfg-gmuend/openmoji",
    ),
    "twemoji": (
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors",
        "twitter/twemoji",
    ),
}
"""Sets for tests only (package, version, digest, licence, owner, source): never committed or in a base."""

STYLE_SETS = {
    "monotone": (
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "sha512-cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
        "CC-BY-4.0",
        "EmojiOne",
        "joypixels/emojione, the design in one colour",
    ),
}
"""Further sets for tests only, which the judge of subjects did not learn from either."""


@cache
def all_sets() -> tuple[Any, ...]:
    """Return every icon set: those of ``tools/mini_base``, and those for tests only."""
    config = _tools().config
    return (*config.ALL_SETS, *(config.IconSet(name, *pins) for name, pins in TEST_SETS.items()))


def hands() -> list[str]:
    """Return the names of the sets that show a style against others: all but ink, the sample style."""
    return [icon_set.key for icon_set in all_sets() if icon_set != _tools().config.INK]


def drawer(which: str, icons: Path, side: int) -> Callable[[str], Image | None]:
    """Return a function that draws a subject (``ice-cream-cone``) in a set's hand, or None if it has none.

    Args:
        which: name of one of :func:`all_sets` or :data:`STYLE_SETS`.
        icons: where packages are kept; fetched there if missing.
        side: px.
    """
    tools = _tools()
    known = (*all_sets(), *(tools.config.IconSet(name, *pins) for name, pins in STYLE_SETS.items()))
    package = _package(next(icon_set for icon_set in known if icon_set.key == which), icons)
    names = dict(known_subjects())

    def draw(subject: str) -> Image | None:
        name = names.get(subject)
        if name is None or name not in package.names():
            return None
        image: Image = tools.icons.render(package.svg(name), side)
        return image

    return draw


@cache
def known_subjects() -> tuple[tuple[str, str], ...]:
    """Return (subject as files are named, name that all icon sets have for it), in the nouns' order."""
    captions = _tools().captions
    phrases = captions.load_nouns().phrases
    return tuple((subject_of(captions.bare(phrase)), name) for name, phrase in phrases.items())


def subject_of(text: str) -> str:
    """Return how files are named after a subject: ``Ice cream_cone`` -> ``ice-cream-cone``."""
    return "-".join(text.lower().replace("_", " ").replace("-", " ").split())


@cache
def _package(icon_set: Any, icons: Path) -> Any:
    try:
        return _tools().icons.load(icon_set, icons)
    except (OSError, ValueError) as error:
        raise ConfigError(f"icon set {icon_set.package}: {error}") from error


@cache
def _tools() -> Any:
    """Return ``tools.mini_base``, whose parts need packages that others do without."""
    try:
        import resvg_py  # noqa: F401  (its own import comes late, when the first icon is drawn)

        from tools import mini_base
        from tools.mini_base import captions, config, icons  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"icon sets need the package {error.name}: pip install -e '.[build-base]'; or measure without "
            "them with --no-icons"
        ) from error
    return mini_base
