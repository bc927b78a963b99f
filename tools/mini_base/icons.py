"""Fetches pinned icon packages with npm and renders their icons with resvg."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .config import IconSet

_NOT_SUBJECTS = re.compile(r"-skin-tone|-(dark|light|medium(-dark|-light)?)$")


@dataclass(frozen=True)
class IconPackage:
    """The icons of one set, by name."""

    icon_set: IconSet
    width: int
    height: int
    icons: dict[str, dict[str, Any]]
    aliases: dict[str, str]

    def names(self) -> set[str]:
        """Returns every name that can be rendered, without skin-tone variants."""
        known = set(self.icons) | set(self.aliases)
        return {name for name in known if not _NOT_SUBJECTS.search(name)}

    def svg(self, name: str) -> str:
        """Returns the icon ``name`` as a complete SVG document."""
        icon = self.icons[self.aliases.get(name, name)]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        # `currentColor` is how single-colour sets spell "ink".
        body = icon["body"].replace("currentColor", "#000000")
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
            f"{body}</svg>"
        )


def check_integrity(path: Path, expected: str) -> None:
    """Raises ``ValueError`` unless ``path`` has the pinned sha512 digest."""
    digest = hashlib.sha512(path.read_bytes()).digest()
    actual = "sha512-" + base64.b64encode(digest).decode("ascii")
    if actual != expected:
        raise ValueError(
            f"{path.name} is not the pinned package: expected {expected}, found {actual}. "
            "Delete the file and try again; if it stays so, the pin in config.py is out of date."
        )


def fetch(icon_set: IconSet, cache_dir: Path) -> Path:
    """Returns the tarball of ``icon_set``, fetching it with ``npm pack`` if absent."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / f"{icon_set.key}-{icon_set.version}.tgz"
    if not target.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("npm is needed to fetch the icon sets; install Node.js.")
        spec = f"{icon_set.package}@{icon_set.version}"
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            subprocess.run([npm, "pack", "--silent", spec], cwd=scratch, check=True)
            (tarball,) = Path(scratch).glob("*.tgz")
            tarball.replace(target)
    check_integrity(target, icon_set.integrity)
    return target


def load(icon_set: IconSet, cache_dir: Path) -> IconPackage:
    """Reads the icons of ``icon_set`` straight from its verified tarball."""
    with tarfile.open(fetch(icon_set, cache_dir)) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        data = json.loads(member.read().decode("utf-8"))
    # Aliases that rotate or flip are not plain other names; none of our nouns is one.
    aliases = {
        name: alias["parent"]
        for name, alias in data.get("aliases", {}).items()
        if set(alias) == {"parent"} and alias["parent"] in data["icons"]
    }
    size = data.get("height", 16)
    return IconPackage(icon_set, data.get("width", size), size, data["icons"], aliases)


def render(svg: str, size: int) -> Image.Image:
    """Renders ``svg`` as a square RGB image of ``size`` pixels on white."""
    import resvg_py  # only builds draw; the rest works without the extra that installs it

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, background="#ffffff", skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if image.size == (size, size):
        return image
    # A few drawings are not square (Noto's flags and some tall icons).
    square = Image.new("RGB", (size, size), "white")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square
