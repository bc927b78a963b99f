"""Narrow bases of all families, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .narrow import FAMILY_NAMES, States, make_base

Bases = dict[str, tuple[Path, States]]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Return family -> (diffusers folder, weights by component)."""
    root = tmp_path_factory.mktemp("narrow-bases")
    made_bases: Bases = {}
    for name in FAMILY_NAMES:
        (root / name).mkdir()
        made_bases[name] = (root / name, make_base(root / name, name))
    return made_bases
